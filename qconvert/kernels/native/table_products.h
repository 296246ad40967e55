/* The matrix products of a variant. */
#pragma GCC diagnostic ignored "-Wunused-function" /* loops of table.h, of which parts serve here */
#ifdef USE_AVX2
#include "product_x86.h"
#else
#include "product_plain.h"
#endif
#include "product_levels.h"

const ProductKernels OF_VARIANT(products) = {
    .integer_dots = integer_dots,
    .levels_product = levels_product,
#ifdef USE_AVX2
    .product = product_x86,
#else
    .product = product_plain,
#endif
};
