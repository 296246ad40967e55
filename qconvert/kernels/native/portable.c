/* The loops for any processor. */
#include "portable.h"

#include "table.h"
