/* Matrix products for any processor. */
#include "portable.h"

#include "table_products.h"
