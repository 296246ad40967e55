/* qconvert.kernels._native: the loops for Python. Buffers in, buffers filled; every size is checked
 * here, dtypes in ../compiled.py. The GIL is released while a loop runs. */
#include <Python.h>

#include "kernels.h"

static const Kernels *active; /* changed and read with the GIL held */

/* --- buffers ----------------------------------------------------------------------------------*/

enum { MAX_BUFFERS = 14 };

/* Buffers of one call. */
typedef struct {
    Py_buffer view[MAX_BUFFERS];
    int count;
} Buffers;

static void release(Buffers *held) {
    while (held->count) {
        PyBuffer_Release(&held->view[--held->count]);
    }
}

/* Memory of a C-contiguous object of exactly count * size bytes; else NULL and an exception. */
static void *memory(Buffers *held, PyObject *object, Py_ssize_t count, size_t size, int flags) {
    Py_buffer *view = &held->view[held->count];
    if (PyObject_GetBuffer(object, view, flags) < 0) {
        return NULL;
    }
    held->count++;
    if (count < 0 || (size_t)count > PY_SSIZE_T_MAX / size
        || view->len != count * (Py_ssize_t)size) {
        PyErr_Format(PyExc_ValueError, "a buffer of %zd bytes where %zd values of %zu bytes belong",
                     view->len, count, size);
        return NULL;
    }
    return view->buf;
}

#define INPUT(object, count, type) \
    ((const type *)memory(&held, object, count, sizeof(type), PyBUF_SIMPLE))
#define OUTPUT(object, count, type) \
    ((type *)memory(&held, object, count, sizeof(type), PyBUF_WRITABLE))

static PyObject *done(Buffers *held, PyObject *result) {
    release(held);
    return result;
}

/* The end of a function whose loop may run out of memory. */
static PyObject *done_or_no_memory(Buffers *held, int status) {
    release(held);
    if (status != DONE) {
        return PyErr_NoMemory();
    }
    Py_RETURN_NONE;
}

/* Errors as numbers; None where the values were not finite. */
static PyObject *errors_unless(int not_finite, const Errors *found) {
    return not_finite ? Py_NewRef(Py_None)
                      : Py_BuildValue("ddd", found->signal, found->noise, found->worst);
}

static int require(int condition, const char *what) {
    if (!condition) {
        PyErr_SetString(PyExc_ValueError, what);
    }
    return condition;
}

static int valid_scheme(int bits, int symmetric, Py_ssize_t block, Scheme *scheme) {
    *scheme = (Scheme){bits, symmetric, (size_t)block};
    return require((bits >= 2 && bits <= 6) || bits == 8, "bits must be 2..6 or 8")
           && require(block == 0 || block == 16 || block == 32 || block == 64 || block == 128
                          || block == 256,
                      "block must be 0, 16, 32, 64, 128 or 256");
}

/* Values in one of the types that loops read as they lie in a file. */
static int valid_source(Buffers *held, PyObject *object, int type, Py_ssize_t count,
                        Source *source) {
    source->type = (enum source_type)type;
    return require(type >= 0 && type < SOURCE_TYPES, "no such type of source")
           && (source->raw = memory(held, object, count, type == SOURCE_F32 ? 4 : 2,
                                    PyBUF_SIMPLE));
}

static Py_ssize_t times(Py_ssize_t a, Py_ssize_t b) {
    return a < 0 || b < 0 || (b && a > PY_SSIZE_T_MAX / b) ? -1 : a * b;
}

/* --- variants ---------------------------------------------------------------------------------*/

static PyObject *variants(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *names = PyTuple_New((Py_ssize_t)variant_count());
    for (size_t i = 0; names && i < variant_count(); i++) {
        PyObject *name = PyUnicode_FromString(variant(i)->name);
        if (!name || PyTuple_SetItem(names, (Py_ssize_t)i, name) < 0) {
            Py_DECREF(names);
            return NULL;
        }
    }
    return names;
}

static PyObject *active_name(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(active->name);
}

static PyObject *select_variant(PyObject *module, PyObject *name) {
    (void)module;
    for (size_t i = 0; i < variant_count(); i++) {
        PyObject *known = PyUnicode_FromString(variant(i)->name);
        if (!known) {
            return NULL;
        }
        const int same = PyObject_RichCompareBool(name, known, Py_EQ);
        Py_DECREF(known);
        if (same < 0) {
            return NULL;
        }
        if (same) {
            active = variant(i);
            Py_RETURN_NONE;
        }
    }
    PyErr_Format(PyExc_ValueError, "no variant %R for this processor", name);
    return NULL;
}

/* --- statistics -------------------------------------------------------------------------------*/

static PyObject *widen(PyObject *args, Py_ssize_t width,
                       void (*loop)(const uint8_t *, size_t, float *)) {
    Buffers held = {0};
    PyObject *raw, *out;
    Py_ssize_t n;
    const uint8_t *from;
    float *to;
    if (!PyArg_ParseTuple(args, "OOn", &raw, &out, &n)
        || !(from = INPUT(raw, times(n, width), uint8_t)) || !(to = OUTPUT(out, n, float))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    loop(from, (size_t)n, to);
    Py_END_ALLOW_THREADS
    return done(&held, Py_NewRef(Py_None));
}

static PyObject *widen_bf16(PyObject *module, PyObject *args) {
    (void)module;
    return widen(args, 2, active->widen_bf16);
}

static PyObject *widen_f16(PyObject *module, PyObject *args) {
    (void)module;
    return widen(args, 2, active->widen_f16);
}

static PyObject *widen_table(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *raw, *table, *out;
    Py_ssize_t n;
    const uint8_t *from;
    const float *values;
    float *to;
    if (!PyArg_ParseTuple(args, "OOOn", &raw, &table, &out, &n) || !(from = INPUT(raw, n, uint8_t))
        || !(values = INPUT(table, 256, float)) || !(to = OUTPUT(out, n, float))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    kernels->widen_table(from, (size_t)n, values, to);
    Py_END_ALLOW_THREADS
    return done(&held, Py_NewRef(Py_None));
}

static PyObject *statistics(Statistics s) {
    return Py_BuildValue("nnnndddddd", (Py_ssize_t)s.nonfinite, (Py_ssize_t)s.first_nonfinite,
                         (Py_ssize_t)s.zeros, (Py_ssize_t)s.count, s.minimum, s.maximum, s.mean,
                         s.m2, s.m3, s.m4);
}

static PyObject *observe(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values;
    Py_ssize_t n;
    int wide, status;
    const void *x;
    Statistics found;
    if (!PyArg_ParseTuple(args, "Onp", &values, &n, &wide)
        || !(x = memory(&held, values, n, wide ? sizeof(double) : sizeof(float), PyBUF_SIMPLE))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    status = wide ? kernels->observe_f64(x, (size_t)n, &found)
                  : kernels->observe_f32(x, (size_t)n, &found);
    Py_END_ALLOW_THREADS
    release(&held);
    return status == DONE ? statistics(found) : PyErr_NoMemory();
}

static PyObject *histogram(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *out;
    Py_ssize_t n;
    const float *x;
    int64_t *bins;
    if (!PyArg_ParseTuple(args, "OnO", &values, &n, &out) || !(x = INPUT(values, n, float))
        || !(bins = OUTPUT(out, HISTOGRAM_BINS, int64_t))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    kernels->histogram(x, (size_t)n, bins);
    Py_END_ALLOW_THREADS
    return done(&held, Py_NewRef(Py_None));
}

static PyObject *extrema(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *lows, *highs, *counts;
    Py_ssize_t groups, length;
    const float *x;
    float *low, *high;
    int64_t *zeros;
    if (!PyArg_ParseTuple(args, "OnnOOO", &values, &groups, &length, &lows, &highs, &counts)
        || !require(length > 0, "groups must not be empty")
        || !(x = INPUT(values, times(groups, length), float))
        || !(low = OUTPUT(lows, groups, float)) || !(high = OUTPUT(highs, groups, float))
        || !(zeros = OUTPUT(counts, groups, int64_t))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    kernels->extrema(x, (size_t)groups, (size_t)length, low, high, zeros);
    Py_END_ALLOW_THREADS
    return done(&held, Py_NewRef(Py_None));
}

static PyObject *error_sums(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *others;
    Py_ssize_t n;
    const float *x, *decoded;
    Errors found;
    if (!PyArg_ParseTuple(args, "OOn", &values, &others, &n) || !(x = INPUT(values, n, float))
        || !(decoded = INPUT(others, n, float))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    kernels->error_sums(x, decoded, (size_t)n, &found);
    Py_END_ALLOW_THREADS
    return done(&held, errors_unless(0, &found));
}

static PyObject *worst_step(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *weights, *values, *scales, *offsets, *zeros, *roundings[2];
    Py_ssize_t rows, columns, group;
    Decoded task;
    double worst;
    int unscaled;
    if (!PyArg_ParseTuple(args, "OOnnnOOOdddOO", &weights, &values, &rows, &columns, &group,
                          &scales, &offsets, &zeros, &task.code_step, &task.low, &task.high,
                          &roundings[0], &roundings[1])
        || !require(rows >= 0 && columns >= 0 && group > 0, "no such groups")) {
        return NULL;
    }
    const Py_ssize_t groups = times(rows, columns / group + (columns % group != 0));
    task.offset = task.scale_rounding = task.offset_rounding = NULL;
    if (!(task.weights = INPUT(weights, times(rows, columns), float))
        || !(task.values = INPUT(values, times(rows, columns), float))
        || !(task.scale = INPUT(scales, groups, float))
        || (offsets != Py_None && !(task.offset = INPUT(offsets, groups, float)))
        || !(task.zero = INPUT(zeros, groups, int32_t))
        || (roundings[0] != Py_None && !(task.scale_rounding = INPUT(roundings[0], groups, float)))
        || (roundings[1] != Py_None
            && !(task.offset_rounding = INPUT(roundings[1], groups, float)))) {
        return done(&held, NULL);
    }
    task.rows = (size_t)rows;
    task.columns = (size_t)columns;
    task.group = (size_t)group;
    Py_BEGIN_ALLOW_THREADS
    unscaled = kernels->worst_step(&task, &worst);
    Py_END_ALLOW_THREADS
    return done(&held, Py_BuildValue("dO", worst, unscaled ? Py_True : Py_False));
}

static PyObject *power_sums(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values;
    Py_ssize_t n;
    double pivot, sums[4];
    const float *x;
    if (!PyArg_ParseTuple(args, "Ond", &values, &n, &pivot) || !(x = INPUT(values, n, float))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    kernels->power_sums(x, (size_t)n, pivot, sums);
    Py_END_ALLOW_THREADS
    return done(&held, Py_BuildValue("dddd", sums[0], sums[1], sums[2], sums[3]));
}

/* --- searching a scale ------------------------------------------------------------------------*/

static PyObject *column_sums(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *out;
    Py_ssize_t length, groups;
    const float *columns;
    float *sums;
    if (!PyArg_ParseTuple(args, "OnnO", &values, &length, &groups, &out)
        || !require(length <= PIECE, "more than 256 values in a column")
        || !(columns = INPUT(values, times(length, groups), float))
        || !(sums = OUTPUT(out, groups, float))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    kernels->column_sums(columns, (size_t)length, (size_t)groups, sums);
    Py_END_ALLOW_THREADS
    return done(&held, Py_NewRef(Py_None));
}

static PyObject *code_sums(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *inverses, *offsets, *masks, *sums_u, *sums_uu, *sums_xu;
    Py_ssize_t length, groups;
    int low, top;
    const float *columns, *inverse, *offset, *mask = NULL;
    float *su, *suu, *sxu;
    if (!PyArg_ParseTuple(args, "OnnOOiiOOOO", &values, &length, &groups, &inverses, &offsets, &low,
                          &top, &masks, &sums_u, &sums_uu, &sums_xu)
        || !require(length <= PIECE, "more than 256 values in a column")
        || !require(0 <= low && low <= top && top <= 255, "codes must lie in 0..255")
        || !(columns = INPUT(values, times(length, groups), float))
        || !(inverse = INPUT(inverses, groups, float)) || !(offset = INPUT(offsets, groups, float))
        || (masks != Py_None && !(mask = INPUT(masks, times(length, groups), float)))
        || !(su = OUTPUT(sums_u, groups, float)) || !(suu = OUTPUT(sums_uu, groups, float))
        || !(sxu = OUTPUT(sums_xu, groups, float))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    kernels->code_sums(columns, (size_t)length, (size_t)groups, inverse, offset, (float)low,
                       (float)top, mask, su, suu, sxu);
    Py_END_ALLOW_THREADS
    return done(&held, Py_NewRef(Py_None));
}

static PyObject *long_sums(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *weights, *inverses, *offsets, *out;
    Py_ssize_t rows, length, candidates;
    int low, top;
    const float *x, *weight = NULL, *inverse, *offset;
    double *sums;
    if (!PyArg_ParseTuple(args, "OOnnnOOiiO", &values, &weights, &rows, &length, &candidates,
                          &inverses, &offsets, &low, &top, &out)
        || !require(0 <= low && low <= top && top <= 255, "codes must lie in 0..255")
        || !(x = INPUT(values, times(rows, length), float))
        || (weights != Py_None && !(weight = INPUT(weights, times(rows, length), float)))
        || !(inverse = INPUT(inverses, times(candidates, rows), float))
        || !(offset = INPUT(offsets, times(candidates, rows), float))
        || !(sums = OUTPUT(out, times(times(candidates, rows), 3), double))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    kernels->long_sums(x, weight, (size_t)rows, (size_t)length, (size_t)candidates, inverse,
                       offset, (float)low, (float)top, sums);
    Py_END_ALLOW_THREADS
    return done(&held, Py_NewRef(Py_None));
}

static int counts_fit(const int32_t *counts, Py_ssize_t groups, Py_ssize_t length) {
    int fit = 1;
    for (Py_ssize_t g = 0; g < groups; g++) {
        fit &= counts[g] > 0 && counts[g] <= length;
    }
    return require(fit, "a count outside 1..length");
}

/* Rows of floats that are used in turn, (period, length), or NULL for None. */
static int in_turn(Buffers *held, PyObject *object, Py_ssize_t period, Py_ssize_t length,
                   const float **rows) {
    *rows = NULL;
    return object == Py_None
           || (require(period > 0, "weights of nothing")
               && (*rows = memory(held, object, times(period, length), sizeof(float),
                                  PyBUF_SIMPLE)));
}

static PyObject *search(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *counts, *lows, *highs, *zeros, *factors, *moves, *scales, *points, *founds;
    PyObject *weights, *reaches;
    Py_ssize_t groups, length, factor_count, move_count, period;
    int bits, symmetric, status;
    Scheme scheme;
    Grid grid;
    Weights weighting;
    const float *x, *low, *high;
    const int32_t *count = NULL;
    const uint8_t *has_zero;
    double *scale;
    int32_t *zero;
    uint8_t *found;
    if (!PyArg_ParseTuple(args, "OnnOOOOOOnipOnOnOOO", &values, &groups, &length, &counts, &lows,
                          &highs, &zeros, &weights, &reaches, &period, &bits, &symmetric, &factors,
                          &factor_count, &moves, &move_count, &scales, &points, &founds)
        || !valid_scheme(bits, symmetric, 0, &scheme)
        || !require(length > 0 && length <= PIECE, "groups must have 1..256 values")
        || !(x = INPUT(values, times(groups, length), float))
        || (counts != Py_None && !(count = INPUT(counts, groups, int32_t)))
        || (count && !counts_fit(count, groups, length)) || !(low = INPUT(lows, groups, float))
        || !(high = INPUT(highs, groups, float)) || !(has_zero = INPUT(zeros, groups, uint8_t))
        || !in_turn(&held, weights, period, length, &weighting.weight)
        || !in_turn(&held, reaches, period, length, &weighting.reach)
        || !require(!weighting.weight == !weighting.reach, "weights without reach")
        || !(grid.factors = INPUT(factors, factor_count, float))
        || !(grid.moves = INPUT(moves, move_count, float))
        || !(scale = OUTPUT(scales, groups, double)) || !(zero = OUTPUT(points, groups, int32_t))
        || !(found = OUTPUT(founds, groups, uint8_t))) {
        return done(&held, NULL);
    }
    grid.factor_count = (size_t)factor_count;
    grid.move_count = (size_t)move_count;
    weighting.period = (size_t)period;
    Py_BEGIN_ALLOW_THREADS
    status = kernels->search(x, (size_t)groups, (size_t)length, count, low, high, has_zero,
                             weighting.weight ? &weighting : NULL, scheme, grid, scale, zero,
                             found);
    Py_END_ALLOW_THREADS
    return done_or_no_memory(&held, status);
}

/* --- codes ------------------------------------------------------------------------------------*/

static Py_ssize_t groups_of(Scheme scheme, Py_ssize_t columns) {
    return (Py_ssize_t)row_groups(scheme, (size_t)columns);
}

static Py_ssize_t row_bytes(Scheme scheme, Py_ssize_t columns) {
    return (Py_ssize_t)packed_bytes(stored_row(scheme, (size_t)columns), scheme.bits);
}

static PyObject *encode(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *scales, *zeros, *out;
    Py_ssize_t groups, length;
    int bits, symmetric;
    Scheme scheme;
    const float *x, *scale;
    const int32_t *zero;
    uint8_t *codes;
    size_t clipped;
    if (!PyArg_ParseTuple(args, "OnnOOipO", &values, &groups, &length, &scales, &zeros, &bits,
                          &symmetric, &out)
        || !valid_scheme(bits, symmetric, 0, &scheme)
        || !(x = INPUT(values, times(groups, length), float))
        || !(scale = INPUT(scales, groups, float)) || !(zero = INPUT(zeros, groups, int32_t))
        || !(codes = OUTPUT(out, times(groups, length), uint8_t))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    clipped = kernels->encode(x, (size_t)groups, (size_t)length, scale, zero, scheme, codes);
    Py_END_ALLOW_THREADS
    return done(&held, PyLong_FromSize_t(clipped));
}

static PyObject *decode(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *stored, *scales, *zeros, *out;
    Py_ssize_t groups, length;
    int bits, symmetric;
    Scheme scheme;
    const uint8_t *codes;
    const float *scale;
    const int32_t *zero;
    float *x;
    if (!PyArg_ParseTuple(args, "OnnOOipO", &stored, &groups, &length, &scales, &zeros, &bits,
                          &symmetric, &out)
        || !valid_scheme(bits, symmetric, 0, &scheme)
        || !(codes = INPUT(stored, times(groups, length), uint8_t))
        || !(scale = INPUT(scales, groups, float)) || !(zero = INPUT(zeros, groups, int32_t))
        || !(x = OUTPUT(out, times(groups, length), float))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    kernels->decode(codes, (size_t)groups, (size_t)length, scale, zero, scheme, x);
    Py_END_ALLOW_THREADS
    return done(&held, Py_NewRef(Py_None));
}

static PyObject *errors_of(Errors found) {
    return Py_BuildValue("dddndd", found.signal, found.noise, found.worst,
                         (Py_ssize_t)found.clipped, found.weighted_signal, found.weighted_noise);
}

static PyObject *encode_rows(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *scales, *zeros, *squares, *out;
    Py_ssize_t rows, columns, block, groups, period;
    int bits, symmetric;
    Scheme scheme;
    const float *x, *scale, *mean_square;
    const int32_t *zero;
    uint8_t *packed;
    Errors found;
    if (!PyArg_ParseTuple(args, "OnnOOnipnOnO", &values, &rows, &columns, &scales, &zeros,
                          &groups, &bits, &symmetric, &block, &squares, &period, &out)
        || !valid_scheme(bits, symmetric, block, &scheme)
        || !(x = INPUT(values, times(rows, columns), float))
        || !require(columns > 0, "rows must not be empty")
        || !require(groups == 1 || groups == times(rows, groups_of(scheme, columns)),
                    "scales must be one, or one for each group")
        || !(scale = INPUT(scales, groups, float)) || !(zero = INPUT(zeros, groups, int32_t))
        || !in_turn(&held, squares, period, columns, &mean_square)
        || !(packed = OUTPUT(out, times(rows, row_bytes(scheme, columns)), uint8_t))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    kernels->encode_rows(x, (size_t)rows, (size_t)columns, scale, zero, (size_t)groups, scheme,
                         mean_square, (size_t)period, packed, &found);
    Py_END_ALLOW_THREADS
    return done(&held, errors_of(found));
}

static PyObject *packing(PyObject *args, int unpacks) {
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *source, *target;
    Py_ssize_t groups;
    int width;
    const uint8_t *from;
    uint8_t *to;
    if (!PyArg_ParseTuple(args, "OniO", &source, &groups, &width, &target)
        || !require(width >= 1 && width <= 8, "width must be 1..8")
        || !(from = INPUT(source, times(groups, unpacks ? 4 * width : PACK_GROUP), uint8_t))
        || !(to = OUTPUT(target, times(groups, unpacks ? PACK_GROUP : 4 * width), uint8_t))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    (unpacks ? kernels->unpack : kernels->pack)(from, (size_t)groups, width, to);
    Py_END_ALLOW_THREADS
    return done(&held, Py_NewRef(Py_None));
}

/* What a pass over groups found; None where a value is not finite. */
static PyObject *figures_of(int status, const BlockFigures *found) {
    if (status == NO_MEMORY) {
        return PyErr_NoMemory();
    }
    if (status == NOT_FINITE) {
        Py_RETURN_NONE;
    }
    return Py_BuildValue("Nn(dddd)(dddddd)", errors_of(found->errors), (Py_ssize_t)found->outside,
                         found->symmetric_power, found->asymmetric_power, found->smallest,
                         found->largest, found->minimum, found->maximum, found->powers[0],
                         found->powers[1], found->powers[2], found->powers[3]);
}

static PyObject *quantize_blocks(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *factors, *moves, *weights, *reaches, *squares, *codes, *scales, *zeros;
    Py_ssize_t groups, block, factor_count, move_count, period;
    int source, bits, symmetric, type, status;
    Blocks task = {0};
    BlockFigures found;
    if (!PyArg_ParseTuple(args, "OinnipiOnOnffdOOOnOOO", &values, &source, &groups, &block, &bits,
                          &symmetric, &type, &factors, &factor_count, &moves, &move_count,
                          &task.low, &task.high, &task.pivot, &weights, &reaches, &squares, &period,
                          &codes, &scales, &zeros)
        || !valid_scheme(bits, symmetric, block, &task.scheme)
        || !require(block > 0, "blocks must have a length")
        || !require(type >= 0 && type < SCALE_TYPES, "no such type of scale")
        || !require(bits == 8 || times(groups, block) % PACK_GROUP == 0,
                    "values must fill groups of 32")
        || !valid_source(&held, values, source, times(groups, block), &task.source)
        || !(task.grid.factors = INPUT(factors, factor_count, float))
        || !(task.grid.moves = INPUT(moves, move_count, float))
        || !in_turn(&held, weights, period, block, &task.weights.weight)
        || !in_turn(&held, reaches, period, block, &task.weights.reach)
        || !in_turn(&held, squares, period, block, &task.mean_square)
        || !require(!task.weights.weight == !task.weights.reach, "weights without reach")
        || !(task.codes = OUTPUT(codes, times(groups, block) / 8 * bits, uint8_t))
        || !(task.scales = OUTPUT(scales, times(groups, type == SCALE_F32 ? 4 : 2), uint8_t))
        || !(task.zeros = OUTPUT(zeros, symmetric ? 0 : groups, uint8_t))) {
        return done(&held, NULL);
    }
    task.scale_type = (enum scale_type)type;
    task.groups = (size_t)groups;
    task.weights.period = (size_t)period;
    task.grid.factor_count = (size_t)factor_count;
    task.grid.move_count = (size_t)move_count;
    Py_BEGIN_ALLOW_THREADS
    status = kernels->quantize_blocks(&task, &found);
    Py_END_ALLOW_THREADS
    release(&held);
    return figures_of(status, &found);
}

static PyObject *quantize_channels(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *given_scales, *given_zeros, *squares, *codes, *scales, *zeros;
    Py_ssize_t rows, columns, period;
    int source, bits, symmetric, status;
    Channels task = {0};
    BlockFigures found;
    if (!PyArg_ParseTuple(args, "OinnippffdOOOnOOO", &values, &source, &rows, &columns, &bits,
                          &symmetric, &task.either_side, &task.low, &task.high, &task.pivot,
                          &given_scales, &given_zeros, &squares, &period, &codes, &scales, &zeros)
        || !valid_scheme(bits, symmetric, 0, &task.scheme)
        || !valid_source(&held, values, source, times(rows, columns), &task.source)
        || !in_turn(&held, squares, period, columns, &task.mean_square)) {
        return done(&held, NULL);
    }
    if (given_scales != Py_None
        && (!(task.scale = INPUT(given_scales, rows, float))
            || !(task.zero = INPUT(given_zeros, rows, int32_t)))) {
        return done(&held, NULL);
    }
    const Py_ssize_t stored =
        times(rows, (Py_ssize_t)packed_bytes(stored_row(task.scheme, (size_t)columns), bits));
    if (!(task.codes = OUTPUT(codes, stored, uint8_t))
        || !(task.scales = OUTPUT(scales, times(rows, 4), uint8_t))
        || !(task.zeros = OUTPUT(zeros, symmetric ? 0 : rows, uint8_t))) {
        return done(&held, NULL);
    }
    task.rows = (size_t)rows;
    task.columns = (size_t)columns;
    task.period = (size_t)period;
    Py_BEGIN_ALLOW_THREADS
    status = kernels->quantize_channels(&task, &found);
    Py_END_ALLOW_THREADS
    release(&held);
    return figures_of(status, &found);
}

static PyObject *all_finite(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values;
    Py_ssize_t n;
    const float *x;
    int finite;
    if (!PyArg_ParseTuple(args, "On", &values, &n) || !(x = INPUT(values, n, float))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    finite = kernels->all_finite(x, (size_t)n);
    Py_END_ALLOW_THREADS
    return done(&held, PyBool_FromLong(finite));
}

static PyObject *pack(PyObject *module, PyObject *args) {
    (void)module;
    return packing(args, 0);
}

static PyObject *unpack(PyObject *module, PyObject *args) {
    (void)module;
    return packing(args, 1);
}

/* --- matrix products --------------------------------------------------------------------------*/

static PyObject *integer_product(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *weights, *activations, *out;
    Py_ssize_t rows, samples, length;
    int status;
    const int16_t *codes;
    const int8_t *inputs;
    int32_t *sums;
    if (!PyArg_ParseTuple(args, "OOnnnO", &weights, &activations, &rows, &samples, &length, &out)
        || !(codes = INPUT(weights, times(rows, length), int16_t))
        || !(inputs = INPUT(activations, times(samples, length), int8_t))
        || !(sums = OUTPUT(out, times(samples, rows), int32_t))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    status = kernels->integer_product(codes, (size_t)rows, inputs, (size_t)samples, (size_t)length,
                                      sums);
    Py_END_ALLOW_THREADS
    return done_or_no_memory(&held, status);
}

/* The bound of section 7, without which accumulators and bytes could overflow. */
static int zeros_fit(const Product *task) {
    const int32_t top = zero_top(task->scheme.bits);
    int32_t signs = 0; /* negative when a zero point or its distance from the top is */
    for (size_t i = 0; i < task->rows * task->groups; i++) {
        signs |= task->zero[i] | (int32_t)((uint32_t)top - (uint32_t)task->zero[i]);
    }
    return signs >= 0;
}

static PyObject *product(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *codes, *scales, *zeros, *activations, *out;
    Py_ssize_t rows, row_codes, columns, groups, samples, block;
    int bits, symmetric, zero_point, fit, status;
    Product task;
    if (!PyArg_ParseTuple(args, "OnnnOOnipnOniO", &codes, &rows, &row_codes, &columns, &scales,
                          &zeros, &groups, &bits, &symmetric, &block, &activations, &samples,
                          &zero_point, &out)
        || !valid_scheme(bits, symmetric, block, &task.scheme)
        || !require(columns > 0 && rows >= 0 && samples >= 0, "sizes must not be negative")
        || !require((size_t)row_codes == stored_row(task.scheme, (size_t)columns),
                    "row_codes does not belong to this row length")
        || !require(groups == groups_of(task.scheme, columns),
                    "scales must be one for each group")
        || !require(zero_point >= -128 && zero_point <= 127, "zero_point must be a signed byte")
        || !(task.packed = INPUT(codes, times(rows, row_bytes(task.scheme, columns)), uint8_t))
        || !(task.scale = INPUT(scales, times(rows, groups), float))
        || !(task.zero = INPUT(zeros, times(rows, groups), int32_t))
        || !(task.inputs = INPUT(activations, times(samples, columns), int8_t))
        || !(task.y = OUTPUT(out, times(samples, rows), float))) {
        return done(&held, NULL);
    }
    task.rows = (size_t)rows;
    task.row_codes = (size_t)row_codes;
    task.columns = (size_t)columns;
    task.groups = (size_t)groups;
    task.samples = (size_t)samples;
    task.zero_point = zero_point;
    Py_BEGIN_ALLOW_THREADS
    fit = symmetric || zeros_fit(&task);
    status = fit ? kernels->product(&task) : DONE;
    Py_END_ALLOW_THREADS
    if (!require(fit, "a zero point out of range")) {
        return done(&held, NULL);
    }
    return done_or_no_memory(&held, status);
}

/* --- ggml -------------------------------------------------------------------------------------*/

static PyObject *list_ggml_types(PyObject *module, PyObject *args) {
    (void)module;
    (void)args;
    PyObject *types = PyTuple_New(GGML_TYPES);
    for (int i = 0; types && i < GGML_TYPES; i++) {
        const GgmlType kind = ggml_types[i];
        PyObject *row = Py_BuildValue("snn", kind.name, (Py_ssize_t)kind.values,
                                      (Py_ssize_t)kind.bytes);
        if (!row || PyTuple_SetItem(types, i, row)) {
            Py_CLEAR(types);
        }
    }
    return types;
}

/* Weights of `period` blocks of a type, or none; 1 unless refused. */
static int ggml_weights(Buffers *held, PyObject *weights, Py_ssize_t *period, GgmlType kind,
                        const float **importance) {
    if (weights == Py_None) {
        *period = 0;
        *importance = NULL;
        return 1;
    }
    return require(*period > 0, "importance of no block")
           && (*importance = memory(held, weights, times(*period, (Py_ssize_t)kind.values),
                                    sizeof **importance, PyBUF_SIMPLE));
}

static PyObject *ggml_encode(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *weights, *target;
    Py_ssize_t period, blocks;
    int type;
    if (!PyArg_ParseTuple(args, "iOOnnO", &type, &values, &weights, &period, &blocks, &target)
        || !require(type >= 0 && type < GGML_TYPES, "no such block type")) {
        return NULL;
    }
    const GgmlType kind = ggml_types[type];
    const float *x, *importance;
    uint8_t *out;
    if (!(x = INPUT(values, times(blocks, (Py_ssize_t)kind.values), float))
        || !ggml_weights(&held, weights, &period, kind, &importance)
        || !(out = OUTPUT(target, times(blocks, (Py_ssize_t)kind.bytes), uint8_t))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    kernels->ggml_encode((enum ggml_type)type, x, importance, (size_t)period, (size_t)blocks, out);
    Py_END_ALLOW_THREADS
    return done(&held, Py_NewRef(Py_None));
}

static PyObject *ggml_quantize(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *weights, *target;
    Py_ssize_t period, blocks;
    Errors found;
    int type, source_type, status;
    if (!PyArg_ParseTuple(args, "iOiOnnO", &type, &values, &source_type, &weights, &period, &blocks,
                          &target)
        || !require(type >= 0 && type < GGML_TYPES, "no such block type")) {
        return NULL;
    }
    const GgmlType kind = ggml_types[type];
    Source source;
    const float *importance;
    uint8_t *out;
    if (!valid_source(&held, values, source_type, times(blocks, (Py_ssize_t)kind.values), &source)
        || !ggml_weights(&held, weights, &period, kind, &importance)
        || !(out = OUTPUT(target, times(blocks, (Py_ssize_t)kind.bytes), uint8_t))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    status = kernels->ggml_quantize((enum ggml_type)type, source, importance, (size_t)period,
                                    (size_t)blocks, out, &found);
    Py_END_ALLOW_THREADS
    return done(&held, errors_unless(status == NOT_FINITE, &found));
}

static PyObject *cast(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *values, *target;
    Py_ssize_t count;
    Source source;
    Errors found;
    uint8_t *out;
    int source_type, type, status;
    if (!PyArg_ParseTuple(args, "OiniO", &values, &source_type, &count, &type, &target)
        || !require(type >= 0 && type < SOURCE_TYPES, "no such type")
        || !valid_source(&held, values, source_type, count, &source)
        || !(out = OUTPUT(target, times(count, type == SOURCE_F32 ? 4 : 2), uint8_t))) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    status = kernels->cast(source, (size_t)count, (enum source_type)type, out, &found);
    Py_END_ALLOW_THREADS
    return done(&held, errors_unless(status == NOT_FINITE, &found));
}

static PyObject *ggml_decode(PyObject *module, PyObject *args) {
    (void)module;
    const Kernels *kernels = active;
    Buffers held = {0};
    PyObject *source, *target;
    Py_ssize_t blocks;
    int type;
    if (!PyArg_ParseTuple(args, "iOnO", &type, &source, &blocks, &target)
        || !require(type >= 0 && type < GGML_TYPES, "no such block type")) {
        return NULL;
    }
    const GgmlType kind = ggml_types[type];
    const uint8_t *data = INPUT(source, times(blocks, (Py_ssize_t)kind.bytes), uint8_t);
    float *x = data ? OUTPUT(target, times(blocks, (Py_ssize_t)kind.values), float) : NULL;
    if (!x) {
        return done(&held, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    kernels->ggml_decode((enum ggml_type)type, data, (size_t)blocks, x);
    Py_END_ALLOW_THREADS
    return done(&held, Py_NewRef(Py_None));
}

/* --- module -----------------------------------------------------------------------------------*/

static PyMethodDef methods[] = {
    {"variants", variants, METH_NOARGS, NULL},
    {"variant", active_name, METH_NOARGS, NULL},
    {"select", select_variant, METH_O, NULL},
    {"widen_bf16", widen_bf16, METH_VARARGS, NULL},
    {"widen_f16", widen_f16, METH_VARARGS, NULL},
    {"widen_table", widen_table, METH_VARARGS, NULL},
    {"observe", observe, METH_VARARGS, NULL},
    {"histogram", histogram, METH_VARARGS, NULL},
    {"extrema", extrema, METH_VARARGS, NULL},
    {"error_sums", error_sums, METH_VARARGS, NULL},
    {"worst_step", worst_step, METH_VARARGS, NULL},
    {"power_sums", power_sums, METH_VARARGS, NULL},
    {"column_sums", column_sums, METH_VARARGS, NULL},
    {"code_sums", code_sums, METH_VARARGS, NULL},
    {"long_sums", long_sums, METH_VARARGS, NULL},
    {"search", search, METH_VARARGS, NULL},
    {"encode", encode, METH_VARARGS, NULL},
    {"decode", decode, METH_VARARGS, NULL},
    {"encode_rows", encode_rows, METH_VARARGS, NULL},
    {"quantize_blocks", quantize_blocks, METH_VARARGS, NULL},
    {"quantize_channels", quantize_channels, METH_VARARGS, NULL},
    {"cast", cast, METH_VARARGS, NULL},
    {"all_finite", all_finite, METH_VARARGS, NULL},
    {"pack", pack, METH_VARARGS, NULL},
    {"unpack", unpack, METH_VARARGS, NULL},
    {"integer_product", integer_product, METH_VARARGS, NULL},
    {"product", product, METH_VARARGS, NULL},
    {"ggml_types", list_ggml_types, METH_NOARGS, NULL},
    {"ggml_encode", ggml_encode, METH_VARARGS, NULL},
    {"ggml_quantize", ggml_quantize, METH_VARARGS, NULL},
    {"ggml_decode", ggml_decode, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "qconvert.kernels._native",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__native(void) {
    active = variant(variant_count() - 1);
    return PyModule_Create(&definition);
}
