/* Integer levels of codes and their tables, section 11. */
#ifndef QCONVERT_LEVEL_CODE_H
#define QCONVERT_LEVEL_CODE_H

#include "packing.h"

INLINE int level_count(LevelCode code) {
    return 1 << code.bits;
}

/* Steps from the lowest on are stored as 0, 1, ...: those of 4 bits have no sign. */
INLINE int lowest_step(LevelCode code) {
    return code.step_bits < 5 ? 0 : -(1 << (code.step_bits - 1));
}

INLINE int highest_step(LevelCode code) {
    return lowest_step(code) + (1 << code.step_bits) - 1;
}

INLINE size_t level_blocks(LevelCode code, size_t columns) {
    return (columns + code.block - 1) / code.block;
}

/* Codes of a row with their padding. */
INLINE size_t level_row(size_t columns) {
    return (columns + PACK_GROUP - 1) / PACK_GROUP * PACK_GROUP;
}

#endif
