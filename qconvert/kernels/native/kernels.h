/* What the loops offer, one table of functions per instruction set.
 *
 * Plain C: nothing here knows Python. Sizes are checked by the caller. Arrays do not overlap; they
 * are C-contiguous and aligned for their type, except `raw` bytes. The definitions are those of
 * ../reference, bit for bit; section numbers are those of formats/schemes/SPEC.md.
 */
#ifndef QCONVERT_KERNELS_H
#define QCONVERT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum {
    LANES = 16,            /* partial sums, section 6 */
    PIECE = 256,           /* values whose binary32 sums are added before binary64 takes over */
    PACK_GROUP = 32,       /* values packed together, section 4 */
    SEGMENT = 16384,       /* columns that an int32 accumulator can take, section 7 */
    HISTOGRAM_BINS = 65536,
};

/* What a function that may fail returns. */
enum { DONE = 0, NO_MEMORY = 1, NOT_FINITE = 2 };

typedef struct {
    size_t nonfinite;       /* NaN and Inf values */
    size_t first_nonfinite; /* index of the first of them */
    size_t zeros;
    size_t count;           /* finite values; the fields below mean nothing when it is 0 */
    double minimum, maximum, mean, m2, m3, m4;
} Statistics;

/* The code of an affine scheme. */
typedef struct {
    int bits;      /* 2, 3, 4, 5, 6 or 8 */
    int symmetric;
    size_t block;  /* values of a row that share a scale; 0: the whole row */
} Scheme;

typedef struct {
    double signal, noise, worst;
    size_t clipped;
    double weighted_signal, weighted_noise; /* 0 without weights */
} Errors;

/* Where the mse search looks, as in qconvert/ranges.py but already binary32. */
typedef struct {
    const float *factors, *moves;
    size_t factor_count, move_count;
} Grid;

/* What weighs the values of groups: group g has row g % period; `Weighting` in ../records.py. */
typedef struct {
    size_t period;
    const float *weight, *reach; /* (period, length); of use to the search alone */
} Weights;

enum source_type { SOURCE_F32, SOURCE_BF16, SOURCE_F16, SOURCE_TYPES };

/* Values as they lie in a file, aligned anyhow. */
typedef struct {
    enum source_type type;
    const uint8_t *raw;
} Source;

enum scale_type { SCALE_F16, SCALE_BF16, SCALE_F32, SCALE_TYPES };

/* Whole blocks to be quantized: their number times the block is a multiple of 32 below 8 bits. */
typedef struct {
    Scheme scheme;             /* with a block */
    enum scale_type scale_type;
    Grid grid;                 /* no factors: minmax */
    Source source;             /* (groups, block) values */
    size_t groups;
    float low, high;           /* values outside are counted */
    double pivot;              /* from which distances are measured */
    uint8_t *codes, *scales;   /* as stored */
    uint8_t *zeros;            /* as stored, a byte each; only when asymmetric */
    Weights weights;           /* for the search; no weight: none */
    const float *mean_square;  /* (period, block), what weighs the errors, or NULL */
} Blocks;

/* Whole blocks in rows that are a multiple of 32 values, for formats of other tools. */
typedef struct {
    Blocks blocks; /* `zeros` are whole codes or biases; bounds and pivot are not looked at */
    int biased;    /* value = code * scale + bias, of the type of scales */
} Streams;

/* Whole rows with a scale each, of binary32. */
typedef struct {
    Scheme scheme;          /* without a block */
    Source source;          /* (rows, columns) values */
    size_t rows, columns;
    float low, high;
    double pivot;           /* as in Blocks */
    int either_side;        /* whether a symmetric scale may take its extra code to either side */
    const float *scale;     /* given parameters as stored, (rows), or NULL: minmax */
    const int32_t *zero;
    uint8_t *codes, *scales, *zeros; /* as in Blocks */
    const float *mean_square;        /* (period, columns), what weighs the errors, or NULL */
    size_t period;
} Channels;

/* What became of them: `Encoded` in ../records.py. */
typedef struct {
    Errors errors; /* the signal follows from the powers, and is 0 here */
    size_t outside;
    double symmetric_power, asymmetric_power, smallest, largest;
    double minimum, maximum, powers[4]; /* sums of the first to fourth power of the distances */
} BlockFigures;

typedef struct {
    Scheme scheme;
    const uint8_t *packed; /* (rows, row_codes * bits / 8) */
    size_t rows, row_codes, columns;
    const float *scale;    /* (rows, groups) as stored */
    const int32_t *zero;   /* (rows, groups) zero steps; read only when asymmetric */
    size_t groups;
    const int8_t *inputs;  /* (samples, columns) */
    size_t samples;
    int32_t zero_point;    /* of the inputs, -128..127 */
    float *y;              /* (samples, rows) */
} Product;

enum ggml_type {
    GGML_Q4_0,
    GGML_Q4_1,
    GGML_Q5_0,
    GGML_Q5_1,
    GGML_Q8_0,
    GGML_IQ4_NL,
    GGML_IQ4_XS,
    GGML_MXFP4,
    GGML_NVFP4,
    GGML_TQ1_0,
    GGML_TQ2_0,
    GGML_Q1_0,
    GGML_Q2_0,
    GGML_Q2_K,
    GGML_Q3_K,
    GGML_Q4_K,
    GGML_Q5_K,
    GGML_Q6_K,
    GGML_TYPES
};

enum { LONGEST_CODEBOOK_BLOCK = 256 };

/* How the numbers of a table of 16 are told apart: `entries[k]` is the index of the nearest where k
 * of the ascending midpoints between neighbours lie below. */
typedef struct {
    const float *midpoints;
    size_t midpoint_count; /* at most 15 */
    const uint8_t *entries; /* one more */
} Codebook;

enum { MOST_LEVELS = 64 };

/* Codes of integer levels with steps, section 11. */
typedef struct {
    int bits;           /* 2 to 6 */
    size_t block;       /* 16 or 32 */
    int step_bits;      /* 4, without sign, or 5 or 6 */
    int shift;          /* 0, 4 or 8 */
    int8_t levels[MOST_LEVELS]; /* 2^bits of them, ascending; with any shift at most 127 */
} LevelCode;

/* Rows to be searched and encoded. */
typedef struct {
    LevelCode code;
    const float *x;           /* (rows, columns), finite */
    size_t rows, columns;
    const float *unit;        /* (rows), what a step and a level of 1 count for; 0 for all zeros */
    const float *weights;     /* of a row's blocks, 0 for their padding, or NULL: all count 1 */
    const float *mean_square; /* (columns), what weighs the errors, or NULL */
    uint8_t *codes;           /* rows padded to groups of 32, packed */
    uint8_t *steps;           /* (rows, blocks), as stored before they are packed */
} LevelRows;

/* Rows as they are stored. */
typedef struct {
    LevelCode code;
    const uint8_t *packed;
    size_t rows, columns;
    const float *unit;
    const int8_t *steps, *shifts; /* (rows, blocks) */
} StoredLevels;

typedef struct {
    StoredLevels stored;
    const int8_t *inputs; /* (samples, columns) */
    size_t samples;
    int32_t zero_point;   /* of the inputs, -128..127 */
    float *y;             /* (samples, rows) */
} LevelProduct;

/* Numbers of groups that are stored as whole multiples of a unit; NULL where they are not. */
typedef struct {
    const float *unit; /* (rows, groups) */
    float low, high;
} Multiples;

/* Rows whose codes are to make up for each other's errors: `CodeGrid` and `Factors` in
 * ../records.py. */
typedef struct {
    const float *x;               /* (rows, columns) */
    size_t rows, columns;
    const int32_t *order;         /* in which columns are rounded, each once */
    const float *levels;          /* ascending, 1..256 */
    size_t level_count;
    float *scale;                 /* (rows, groups): those before, then those found */
    const float *zero;            /* (rows, groups) */
    float *offset;                /* (rows, groups): as `scale` */
    size_t groups, length;        /* of a row, and columns of a group */
    const float *gram, *feedback; /* (columns, columns), the second in `order` */
    size_t passes;                /* at most, in which single codes are changed */
    int rescale;                  /* whether scales of `scale_type` are changed in the first of them */
    enum scale_type scale_type;
    uint8_t *codes;               /* (rows, columns), below level_count: those before, then found */
    Multiples scales, offsets;    /* that are changed in the first of them */
} Compensation;

/* sums (rows, columns) += left (rows, depth) · right, columns begin..end of them; row j of `right` is
 * order[j] of a matrix of as many columns, or its row j. */
typedef struct {
    float *sums;
    const float *left, *right;
    const int32_t *order; /* (depth), or NULL */
    size_t rows, depth, columns, begin, end;
} Products;

/* A step of the descent of rows that make up for each other's errors: columns first..first + width, at
 * most SWEPT_COLUMNS, of at most SWEPT_ROWS rows. `of` says what it says there, but for x, `order` and
 * scales that change. */
enum { SWEPT_ROWS = 128, SWEPT_COLUMNS = 64 };
typedef struct {
    Compensation of;
    size_t first, width;
    const float *shares;   /* (rows, rows) */
    float *slope, *values; /* (rows, columns), those of these columns before and after */
    float *moves;          /* (rows, columns that moved): of targets */
    int32_t *places;       /* of these columns */
} ColumnSweep;

/* What values (rows, columns) were decoded to, in groups of `group` columns, the last of a row
 * perhaps shorter. Codes are low..high, a code step apart, in the units of `zero`. */
typedef struct {
    const float *weights, *values;
    size_t rows, columns, group;
    const float *scale, *offset; /* of each group: of a step, and of the smallest value or NULL */
    const int32_t *zero;
    double code_step, low, high;
    /* By how much they may have been rounded after codes were made, relative to them, or NULL. */
    const float *scale_rounding, *offset_rounding;
} Decoded;

/* Matrix products. */
typedef struct {
    int (*integer_dots)(const int16_t *codes, size_t spans, size_t rows, const int8_t *inputs,
                        size_t samples, size_t length, int32_t *sums);
    int (*product)(const Product *task);
    int (*levels_product)(const LevelProduct *task);
} ProductKernels;

/* ggml's block types. `importance`: weights of the values of `period` blocks, used in turn; NULL when
 * period is 0. */
typedef struct {
    void (*encode)(enum ggml_type type, const float *x, const float *importance, size_t period,
                   size_t blocks, uint8_t *out);
    /* The same from the bytes of a file, and the error of what was encoded. */
    int (*quantize)(enum ggml_type type, Source source, const float *importance, size_t period,
                    size_t blocks, uint8_t *out, Errors *found);
    void (*decode)(enum ggml_type type, const uint8_t *data, size_t blocks, float *out);
} GgmlKernels;

/* What a variant has. Products and ggml's types are files of their own: a build compiles all files
 * side by side, and takes as long as the longest. */
typedef struct {
    const char *name;

    void (*widen_bf16)(const uint8_t *raw, size_t n, float *out);
    void (*widen_f16)(const uint8_t *raw, size_t n, float *out);
    void (*widen_table)(const uint8_t *raw, size_t n, const float table[256], float *out);

    int (*observe_f32)(const float *x, size_t n, Statistics *found);
    int (*observe_f64)(const double *x, size_t n, Statistics *found);
    void (*histogram)(const float *x, size_t n, int64_t bins[HISTOGRAM_BINS]);
    void (*extrema)(const float *x, size_t groups, size_t length, float *low, float *high,
                    int64_t *zeros);
    void (*error_sums)(const float *x, const float *decoded, size_t n, Errors *found);
    /* Returns whether a weight that is not 0 has a scale of 0. */
    int (*worst_step)(const Decoded *task, double *worst);
    void (*power_sums)(const float *x, size_t n, double pivot, double sums[4]);

    void (*long_sums)(const float *x, const float *weights, size_t rows, size_t length,
                      size_t candidates, const float *inverse, const float *offset, float low,
                      float top, double *sums);
    int (*search)(const float *x, size_t groups, size_t length, const int32_t *counts,
                  const float *low, const float *high, const uint8_t *has_zero,
                  const Weights *weights, Scheme scheme, Grid grid, double *scale, int32_t *zero,
                  uint8_t *found);

    size_t (*encode)(const float *x, size_t groups, size_t length, const float *scale,
                     const int32_t *zero, Scheme scheme, uint8_t *codes);
    void (*decode)(const uint8_t *codes, size_t groups, size_t length, const float *scale,
                   const int32_t *zero, Scheme scheme, float *out);
    void (*encode_rows)(const float *x, size_t rows, size_t columns, const float *scale,
                        const int32_t *zero, size_t groups, Scheme scheme,
                        const float *mean_square, size_t period, uint8_t *packed, Errors *found);
    int (*quantize_blocks)(const Blocks *task, BlockFigures *figures);
    int (*quantize_channels)(const Channels *task, BlockFigures *figures);
    int (*quantize_stream)(const Streams *task, Errors *found);
    int (*all_finite)(const float *x, size_t n);
    void (*pack)(const uint8_t *values, size_t groups, int width, uint8_t *packed);
    void (*unpack)(const uint8_t *packed, size_t groups, int width, uint8_t *values);
    /* Rows of codes as streams of bits; `stride` bytes of a row. */
    void (*pack_stream)(const uint8_t *codes, size_t rows, size_t columns, int bits, size_t stride,
                        uint8_t *packed);
    void (*unpack_stream)(const uint8_t *packed, size_t rows, size_t columns, int bits,
                          size_t stride, uint8_t *codes);

    /* From one type to another, and the error of that. */
    int (*cast)(Source source, size_t n, enum source_type type, uint8_t *out, Errors *found);

    /* Two codes a byte; `block` values, an even number of at most LONGEST_CODEBOOK_BLOCK, share a
     * scale. */
    void (*codebook_encode)(const float *x, size_t n, const float *scale, size_t block,
                            Codebook book, uint8_t *out);
    void (*codebook_decode)(const uint8_t *data, size_t n, const float *scale, size_t block,
                            const float table[16], float *x);

    int (*levels_encode)(const LevelRows *task, Errors *found);
    void (*levels_decode)(const StoredLevels *stored, float *out);
    int (*compensate)(const Compensation *task);
    int (*multiply_ordered)(const Products *task);
    int (*sweep_columns)(const ColumnSweep *task, size_t *moved, int *changed);

    const ProductKernels *products;
    const GgmlKernels *ggml;
} Kernels;

extern const Kernels kernels_portable;
extern const ProductKernels products_portable;
extern const GgmlKernels ggml_portable;
#ifdef __x86_64__
extern const Kernels kernels_avx2, kernels_avx512;
extern const ProductKernels products_avx2, products_avx512;
extern const GgmlKernels ggml_avx2, ggml_avx512;
#endif

/* The variants that this processor can run, best last; `variant_count` of them. */
const Kernels *variant(size_t index);
size_t variant_count(void);

/* The name of a ggml block type in GGUF, and the values and bytes of a block. */
typedef struct {
    const char *name;
    size_t values, bytes;
} GgmlType;

extern const GgmlType ggml_types[GGML_TYPES];

/* The names of dtypes in files, and their bytes. */
typedef struct {
    const char *name;
    size_t bytes;
} DType;

extern const DType source_types[SOURCE_TYPES], scale_types[SCALE_TYPES];

/* Codes stored per row of `columns` values, padding included. */
static inline size_t stored_row(Scheme scheme, size_t columns) {
    size_t unit = scheme.block ? scheme.block : 1;
    if (scheme.bits < 8 && unit < PACK_GROUP) {
        unit = PACK_GROUP;
    }
    return (columns + unit - 1) / unit * unit;
}

/* Bytes of `codes` stored codes. */
static inline size_t packed_bytes(size_t codes, int bits) {
    return bits == 8 ? codes : codes / 8 * (size_t)bits;
}

/* The largest zero point that its stored form can hold. */
static inline int32_t zero_top(int bits) {
    return bits == 8 ? 255 : (4 << bits) - 1;
}

/* What may be added to the levels of a block: so many multiples of the shift, from 0. */
static inline int level_shifts(LevelCode code) {
    return code.shift == 0 ? 1 : code.shift == 4 ? 2 : 16;
}

/* Groups of a row of `columns` values. */
static inline size_t row_groups(Scheme scheme, size_t columns) {
    return scheme.block ? (columns + scheme.block - 1) / scheme.block : 1;
}

#endif
