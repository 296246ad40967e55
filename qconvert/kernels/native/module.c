/* qconvert.kernels._native: the loops for Python. Buffers in, buffers filled; every size is checked
 * here. The GIL is released while a loop runs.
 *
 * Arguments go by name: each function has one list of them, from which its call is checked and that
 * `signatures` tells, so that ../_native.pyi can be held against it. */
#include <Python.h>
#include <string.h>

#include "kernels.h"

static const Kernels *active; /* changed and read with the GIL held */

/* --- arguments --------------------------------------------------------------------------------*/

enum { MOST_ARGUMENTS = 20 };

/* One call: its arguments in the order of the list, and the buffers that are held. Once something
 * is wrong `failed` is set, with an exception, and what is asked for further is 0 or NULL. */
typedef struct {
    const Kernels *kernels;
    const char *const *names;
    PyObject *value[MOST_ARGUMENTS]; /* borrowed */
    Py_buffer view[MOST_ARGUMENTS];
    int views, failed;
} Call;

#define AS_NAME(name) #name,
#define AS_INDEX(name) ARG_##name,
/* The beginning of a function whose list of arguments is LIST: its indices and the call. */
#define BEGIN(function, LIST)                                                                    \
    enum { LIST(AS_INDEX) arguments };                                                           \
    (void)module;                                                                                \
    Call call;                                                                                   \
    _Static_assert(arguments <= MOST_ARGUMENTS, "too many arguments");                           \
    if (!begin(&call, function##_arguments, arguments, positional, named)) {                     \
        return NULL;                                                                             \
    }

static int begin(Call *call, const char *const *names, int count, PyObject *positional,
                 PyObject *named) {
    call->kernels = active;
    call->names = names;
    call->views = call->failed = 0;
    if (PyTuple_Size(positional)) {
        PyErr_SetString(PyExc_TypeError, "arguments go by name");
        return 0;
    }
    for (int i = 0; i < count; i++) {
        call->value[i] = named ? PyDict_GetItemString(named, names[i]) : NULL;
        if (!call->value[i]) {
            PyErr_Format(PyExc_TypeError, "argument '%s' is missing", names[i]);
            return 0;
        }
    }
    if (named && PyDict_Size(named) != count) {
        PyErr_SetString(PyExc_TypeError, "there are arguments of other names");
        return 0;
    }
    return 1;
}

static void release(Call *call) {
    while (call->views) {
        PyBuffer_Release(&call->view[--call->views]);
    }
}

/* The end of a function; an argument that was wrong has left an exception. */
#define RETURN(result)                                     \
    do {                                                   \
        release(&call);                                    \
        return call.failed ? NULL : (result);              \
    } while (0)

static PyObject *none_or_no_memory(int status) {
    return status == DONE ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

static int require(Call *call, int condition, const char *what) {
    if (!condition && !call->failed) {
        PyErr_SetString(PyExc_ValueError, what);
        call->failed = 1;
    }
    return !call->failed;
}

/* An exception that the interpreter has set, if it has. */
static int sound(Call *call, int suspicious) {
    call->failed |= suspicious && PyErr_Occurred();
    return !call->failed;
}

/* Not negative. */
static Py_ssize_t size_at(Call *call, int index) {
    if (call->failed) {
        return 0;
    }
    const Py_ssize_t found = PyLong_AsSsize_t(call->value[index]);
    if (!sound(call, found == -1) || !require(call, found >= 0, "a size below 0")) {
        return 0;
    }
    return found;
}

static int integer_at(Call *call, int index, int low, int high) {
    if (call->failed) {
        return low;
    }
    const long found = PyLong_AsLong(call->value[index]);
    if (!sound(call, found == -1) || !require(call, found >= low && found <= high, "an integer out "
                                              "of range")) {
        return low;
    }
    return (int)found;
}

static double number_at(Call *call, int index) {
    const double found = call->failed ? 0.0 : PyFloat_AsDouble(call->value[index]);
    return sound(call, found == -1.0) ? found : 0.0;
}

static int flag_at(Call *call, int index) {
    const int found = call->failed ? 0 : PyObject_IsTrue(call->value[index]);
    return sound(call, found < 0) ? found : 0;
}

/* Whether a text is this one. */
static int is_text(Call *call, int index, const char *text) {
    PyObject *known = call->failed ? NULL : PyUnicode_FromString(text);
    const int same = known ? PyObject_RichCompareBool(call->value[index], known, Py_EQ) : 0;
    Py_XDECREF(known);
    return sound(call, !known || same < 0) && same;
}

static int is_none(const Call *call, int index) {
    return call->value[index] == Py_None;
}

static Py_ssize_t times(Py_ssize_t a, Py_ssize_t b) {
    return a < 0 || b < 0 || (b && a > PY_SSIZE_T_MAX / b) ? -1 : a * b;
}

static const Py_buffer *view_at(Call *call, int index, int flags) {
    Py_buffer *view = &call->view[call->views];
    if (call->failed || PyObject_GetBuffer(call->value[index], view, flags) < 0) {
        call->failed = 1;
        return NULL;
    }
    call->views++;
    return view;
}

/* Memory of a C-contiguous object of exactly count * size bytes. */
static void *memory_at(Call *call, int index, Py_ssize_t count, size_t size, int flags) {
    const Py_buffer *view = view_at(call, index, flags);
    if (!view) {
        return NULL;
    }
    if (count < 0 || (size_t)count > PY_SSIZE_T_MAX / size
        || view->len != count * (Py_ssize_t)size) {
        PyErr_Format(PyExc_ValueError, "'%s' has %zd bytes where %zd values of %zu bytes belong",
                     call->names[index], view->len, count, size);
        call->failed = 1;
        return NULL;
    }
    return view->buf;
}

/* All of an array of binary32, and how many there are. */
static const float *floats_at(Call *call, int index, size_t *count) {
    const Py_buffer *view = view_at(call, index, PyBUF_SIMPLE);
    *count = view ? (size_t)view->len / sizeof(float) : 0;
    return require(call, !view || view->len % (Py_ssize_t)sizeof(float) == 0,
                   "bytes that are no binary32")
                   && view ? view->buf : NULL;
}

#define INPUT(name, count, type) \
    ((const type *)memory_at(&call, ARG_##name, count, sizeof(type), PyBUF_SIMPLE))
#define OUTPUT(name, count, type) \
    ((type *)memory_at(&call, ARG_##name, count, sizeof(type), PyBUF_WRITABLE))
#define OPTIONAL(name, count, type) (is_none(&call, ARG_##name) ? NULL : INPUT(name, count, type))
#define SIZE(name) size_at(&call, ARG_##name)
#define NUMBER(name) number_at(&call, ARG_##name)
#define FLAG(name) flag_at(&call, ARG_##name)

/* Rows of floats that are used in turn, (period, length), or NULL for None. */
static const float *in_turn_at(Call *call, int index, Py_ssize_t period, Py_ssize_t length) {
    if (is_none(call, index) || !require(call, period > 0, "weights of nothing")) {
        return NULL;
    }
    return memory_at(call, index, times(period, length), sizeof(float), PyBUF_SIMPLE);
}

#define IN_TURN(name, period, length) in_turn_at(&call, ARG_##name, period, length)

static Scheme scheme_at(Call *call, int bits, int symmetric, int block) {
    const Scheme found = {integer_at(call, bits, 2, 8), flag_at(call, symmetric),
                          block < 0 ? 0 : (size_t)size_at(call, block)};
    require(call, found.bits != 7, "bits must be 2..6 or 8");
    require(call, found.block == 0 || found.block == 16 || found.block == 32 || found.block == 64
                      || found.block == 128 || found.block == 256,
            "block must be 0, 16, 32, 64, 128 or 256");
    return found;
}

static enum source_type dtype_at(Call *call, int index) {
    for (int type = 0; type < SOURCE_TYPES && !call->failed; type++) {
        if (is_text(call, index, source_types[type].name)) {
            return (enum source_type)type;
        }
    }
    require(call, 0, "no dtype that is read as it lies in a file");
    return SOURCE_F32;
}

/* Values in one of the types that loops read as they lie in a file. */
static Source source_at(Call *call, int data, int dtype, Py_ssize_t count) {
    const enum source_type type = dtype_at(call, dtype);
    return (Source){type, memory_at(call, data, count, source_types[type].bytes, PyBUF_SIMPLE)};
}

/* --- results ----------------------------------------------------------------------------------*/

/* Errors as numbers; None where the values were not finite. */
static PyObject *errors_unless(int not_finite, const Errors *found) {
    return not_finite ? Py_NewRef(Py_None)
                      : Py_BuildValue("ddd", found->signal, found->noise, found->worst);
}

static PyObject *errors_of(Errors found) {
    return Py_BuildValue("dddndd", found.signal, found.noise, found.worst,
                         (Py_ssize_t)found.clipped, found.weighted_signal, found.weighted_noise);
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

/* Runs a loop without the GIL, unless an argument was wrong. */
#define RUN(statement)                                                                          \
    if (!call.failed) {                                                                         \
        Py_BEGIN_ALLOW_THREADS                                                                  \
        statement;                                                                              \
        Py_END_ALLOW_THREADS                                                                    \
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

/* --- functions --------------------------------------------------------------------------------*/

#define FUNCTION(name, LIST)                                                 \
    static const char *const name##_arguments[] = {LIST(AS_NAME) NULL};      \
    static PyObject *name(PyObject *module, PyObject *positional, PyObject *named)

#define WIDEN(X) X(raw) X(out)
FUNCTION(widen_bf16, WIDEN) {
    BEGIN(widen_bf16, WIDEN)
    const Py_buffer *raw = view_at(&call, ARG_raw, PyBUF_SIMPLE);
    const Py_ssize_t n = raw ? raw->len / 2 : 0;
    float *out = OUTPUT(out, n, float);
    RUN(call.kernels->widen_bf16(raw->buf, (size_t)n, out))
    RETURN(Py_NewRef(Py_None));
}

FUNCTION(widen_f16, WIDEN) {
    BEGIN(widen_f16, WIDEN)
    const Py_buffer *raw = view_at(&call, ARG_raw, PyBUF_SIMPLE);
    const Py_ssize_t n = raw ? raw->len / 2 : 0;
    float *out = OUTPUT(out, n, float);
    RUN(call.kernels->widen_f16(raw->buf, (size_t)n, out))
    RETURN(Py_NewRef(Py_None));
}

#define WIDEN_TABLE(X) X(raw) X(table) X(out)
FUNCTION(widen_table, WIDEN_TABLE) {
    BEGIN(widen_table, WIDEN_TABLE)
    const Py_buffer *raw = view_at(&call, ARG_raw, PyBUF_SIMPLE);
    const float *table = INPUT(table, 256, float);
    float *out = OUTPUT(out, raw ? raw->len : 0, float);
    RUN(call.kernels->widen_table(raw->buf, (size_t)raw->len, table, out))
    RETURN(Py_NewRef(Py_None));
}

#define OBSERVE(X) X(x) X(n) X(wide)
FUNCTION(observe, OBSERVE) {
    BEGIN(observe, OBSERVE)
    const Py_ssize_t n = SIZE(n);
    const int wide = FLAG(wide);
    const void *x = memory_at(&call, ARG_x, n, wide ? sizeof(double) : sizeof(float), PyBUF_SIMPLE);
    Statistics s = {0};
    int status = DONE;
    RUN(status = wide ? call.kernels->observe_f64(x, (size_t)n, &s)
                      : call.kernels->observe_f32(x, (size_t)n, &s))
    RETURN(status == DONE
                             ? Py_BuildValue("nnnndddddd", (Py_ssize_t)s.nonfinite,
                                             (Py_ssize_t)s.first_nonfinite, (Py_ssize_t)s.zeros,
                                             (Py_ssize_t)s.count, s.minimum, s.maximum, s.mean,
                                             s.m2, s.m3, s.m4)
                             : PyErr_NoMemory());
}

#define HISTOGRAM(X) X(x) X(bins)
FUNCTION(histogram, HISTOGRAM) {
    BEGIN(histogram, HISTOGRAM)
    size_t n;
    const float *x = floats_at(&call, ARG_x, &n);
    int64_t *bins = OUTPUT(bins, HISTOGRAM_BINS, int64_t);
    RUN(call.kernels->histogram(x, n, bins))
    RETURN(Py_NewRef(Py_None));
}

#define EXTREMA(X) X(x) X(groups) X(length) X(low) X(high) X(zeros)
FUNCTION(extrema, EXTREMA) {
    BEGIN(extrema, EXTREMA)
    const Py_ssize_t groups = SIZE(groups), length = SIZE(length);
    require(&call, length > 0, "groups must not be empty");
    const float *x = INPUT(x, times(groups, length), float);
    float *low = OUTPUT(low, groups, float), *high = OUTPUT(high, groups, float);
    int64_t *zeros = OUTPUT(zeros, groups, int64_t);
    RUN(call.kernels->extrema(x, (size_t)groups, (size_t)length, low, high, zeros))
    RETURN(Py_NewRef(Py_None));
}

#define ALL_FINITE(X) X(x)
FUNCTION(all_finite, ALL_FINITE) {
    BEGIN(all_finite, ALL_FINITE)
    size_t n;
    const float *x = floats_at(&call, ARG_x, &n);
    int finite = 0;
    RUN(finite = call.kernels->all_finite(x, n))
    RETURN(PyBool_FromLong(finite));
}

#define ERROR_SUMS(X) X(x) X(decoded)
FUNCTION(error_sums, ERROR_SUMS) {
    BEGIN(error_sums, ERROR_SUMS)
    size_t n;
    const float *x = floats_at(&call, ARG_x, &n);
    const float *decoded = INPUT(decoded, (Py_ssize_t)n, float);
    Errors found = {0};
    RUN(call.kernels->error_sums(x, decoded, n, &found))
    RETURN(errors_unless(0, &found));
}

#define WORST_STEP(X)                                                                         \
    X(weights) X(values) X(rows) X(columns) X(group) X(scale) X(offset) X(zero) X(code_step)  \
    X(low) X(high) X(scale_rounding) X(offset_rounding)
FUNCTION(worst_step, WORST_STEP) {
    BEGIN(worst_step, WORST_STEP)
    const Py_ssize_t rows = SIZE(rows), columns = SIZE(columns), group = SIZE(group);
    require(&call, group > 0, "no such groups");
    const Py_ssize_t size = times(rows, columns);
    const Py_ssize_t per_row = group ? columns / group + (columns % group != 0) : 0;
    const Py_ssize_t groups = times(rows, per_row);
    const Decoded task = {
        .weights = INPUT(weights, size, float),
        .values = INPUT(values, size, float),
        .rows = (size_t)rows,
        .columns = (size_t)columns,
        .group = (size_t)group,
        .scale = INPUT(scale, groups, float),
        .offset = OPTIONAL(offset, groups, float),
        .zero = INPUT(zero, groups, int32_t),
        .code_step = NUMBER(code_step),
        .low = NUMBER(low),
        .high = NUMBER(high),
        .scale_rounding = OPTIONAL(scale_rounding, groups, float),
        .offset_rounding = OPTIONAL(offset_rounding, groups, float),
    };
    double worst = 0;
    int unscaled = 0;
    RUN(unscaled = call.kernels->worst_step(&task, &worst))
    RETURN(Py_BuildValue("dO", worst, unscaled ? Py_True : Py_False));
}

#define POWER_SUMS(X) X(x) X(pivot)
FUNCTION(power_sums, POWER_SUMS) {
    BEGIN(power_sums, POWER_SUMS)
    size_t n;
    const float *x = floats_at(&call, ARG_x, &n);
    const double pivot = NUMBER(pivot);
    double sums[4] = {0};
    RUN(call.kernels->power_sums(x, n, pivot, sums))
    RETURN(Py_BuildValue("dddd", sums[0], sums[1], sums[2], sums[3]));
}

/* --- searching a scale ------------------------------------------------------------------------*/

#define LONG_SUMS(X) \
    X(x) X(weights) X(rows) X(length) X(candidates) X(inverse) X(offset) X(low) X(top) X(sums)
FUNCTION(long_sums, LONG_SUMS) {
    BEGIN(long_sums, LONG_SUMS)
    const Py_ssize_t rows = SIZE(rows), length = SIZE(length), candidates = SIZE(candidates);
    const int low = integer_at(&call, ARG_low, 0, 255);
    const int top = integer_at(&call, ARG_top, low, 255);
    const float *x = INPUT(x, times(rows, length), float);
    const float *weights = OPTIONAL(weights, times(rows, length), float);
    const float *inverse = INPUT(inverse, times(candidates, rows), float);
    const float *offset = INPUT(offset, times(candidates, rows), float);
    double *sums = OUTPUT(sums, times(times(candidates, rows), 3), double);
    RUN(call.kernels->long_sums(x, weights, (size_t)rows, (size_t)length, (size_t)candidates,
                                inverse, offset, (float)low, (float)top, sums))
    RETURN(Py_NewRef(Py_None));
}

static int counts_fit(const int32_t *counts, Py_ssize_t groups, Py_ssize_t length) {
    int fit = 1;
    for (Py_ssize_t g = 0; g < groups; g++) {
        fit &= counts[g] > 0 && counts[g] <= length;
    }
    return fit;
}

#define SEARCH(X)                                                                         \
    X(x) X(groups) X(length) X(counts) X(low) X(high) X(has_zero) X(weight) X(reach)      \
    X(period) X(bits) X(symmetric) X(factors) X(moves) X(scale) X(zero) X(found)
FUNCTION(search, SEARCH) {
    BEGIN(search, SEARCH)
    const Py_ssize_t groups = SIZE(groups), length = SIZE(length), period = SIZE(period);
    const Scheme scheme = scheme_at(&call, ARG_bits, ARG_symmetric, -1);
    require(&call, length > 0 && length <= PIECE, "groups must have 1..256 values");
    const float *x = INPUT(x, times(groups, length), float);
    const int32_t *counts = OPTIONAL(counts, groups, int32_t);
    require(&call, !counts || counts_fit(counts, groups, length), "a count outside 1..length");
    const float *low = INPUT(low, groups, float), *high = INPUT(high, groups, float);
    const uint8_t *has_zero = INPUT(has_zero, groups, uint8_t);
    const Weights weights = {(size_t)period, IN_TURN(weight, period, length),
                             IN_TURN(reach, period, length)};
    require(&call, !weights.weight == !weights.reach, "weights without reach");
    Grid grid;
    grid.factors = floats_at(&call, ARG_factors, &grid.factor_count);
    grid.moves = floats_at(&call, ARG_moves, &grid.move_count);
    double *scale = OUTPUT(scale, groups, double);
    int32_t *zero = OUTPUT(zero, groups, int32_t);
    uint8_t *found = OUTPUT(found, groups, uint8_t);
    int status = DONE;
    RUN(status = call.kernels->search(x, (size_t)groups, (size_t)length, counts, low, high,
                                      has_zero, weights.weight ? &weights : NULL, scheme, grid,
                                      scale, zero, found))
    RETURN(none_or_no_memory(status));
}

/* --- codes ------------------------------------------------------------------------------------*/

static Py_ssize_t groups_of(Scheme scheme, Py_ssize_t columns) {
    return (Py_ssize_t)row_groups(scheme, (size_t)columns);
}

static Py_ssize_t row_bytes(Scheme scheme, Py_ssize_t columns) {
    return (Py_ssize_t)packed_bytes(stored_row(scheme, (size_t)columns), scheme.bits);
}

#define ENCODE(X) X(x) X(groups) X(length) X(scale) X(zero) X(bits) X(symmetric) X(codes)
FUNCTION(encode, ENCODE) {
    BEGIN(encode, ENCODE)
    const Py_ssize_t groups = SIZE(groups), length = SIZE(length);
    const Scheme scheme = scheme_at(&call, ARG_bits, ARG_symmetric, -1);
    const float *x = INPUT(x, times(groups, length), float);
    const float *scale = INPUT(scale, groups, float);
    const int32_t *zero = INPUT(zero, groups, int32_t);
    uint8_t *codes = OUTPUT(codes, times(groups, length), uint8_t);
    size_t clipped = 0;
    RUN(clipped = call.kernels->encode(x, (size_t)groups, (size_t)length, scale, zero, scheme,
                                       codes))
    RETURN(PyLong_FromSize_t(clipped));
}

#define DECODE(X) X(codes) X(groups) X(length) X(scale) X(zero) X(bits) X(symmetric) X(x)
FUNCTION(decode, DECODE) {
    BEGIN(decode, DECODE)
    const Py_ssize_t groups = SIZE(groups), length = SIZE(length);
    const Scheme scheme = scheme_at(&call, ARG_bits, ARG_symmetric, -1);
    const uint8_t *codes = INPUT(codes, times(groups, length), uint8_t);
    const float *scale = INPUT(scale, groups, float);
    const int32_t *zero = INPUT(zero, groups, int32_t);
    float *x = OUTPUT(x, times(groups, length), float);
    RUN(call.kernels->decode(codes, (size_t)groups, (size_t)length, scale, zero, scheme, x))
    RETURN(Py_NewRef(Py_None));
}

#define ENCODE_ROWS(X)                                                                      \
    X(x) X(rows) X(columns) X(scale) X(zero) X(groups) X(bits) X(symmetric) X(block)        \
    X(mean_square) X(period) X(packed)
FUNCTION(encode_rows, ENCODE_ROWS) {
    BEGIN(encode_rows, ENCODE_ROWS)
    const Py_ssize_t rows = SIZE(rows), columns = SIZE(columns), groups = SIZE(groups);
    const Py_ssize_t period = SIZE(period);
    const Scheme scheme = scheme_at(&call, ARG_bits, ARG_symmetric, ARG_block);
    require(&call, columns > 0, "rows must not be empty");
    require(&call, groups == 1 || groups == times(rows, groups_of(scheme, columns)),
            "scales must be one, or one for each group");
    const float *x = INPUT(x, times(rows, columns), float);
    const float *scale = INPUT(scale, groups, float);
    const int32_t *zero = INPUT(zero, groups, int32_t);
    const float *mean_square = IN_TURN(mean_square, period, columns);
    uint8_t *packed = OUTPUT(packed, times(rows, row_bytes(scheme, columns)), uint8_t);
    Errors found = {0};
    RUN(call.kernels->encode_rows(x, (size_t)rows, (size_t)columns, scale, zero, (size_t)groups,
                                  scheme, mean_square, (size_t)period, packed, &found))
    RETURN(errors_of(found));
}

static enum scale_type scale_dtype_at(Call *call, int index) {
    for (int type = 0; type < SCALE_TYPES && !call->failed; type++) {
        if (is_text(call, index, scale_types[type].name)) {
            return (enum scale_type)type;
        }
    }
    require(call, 0, "no dtype of a scale");
    return SCALE_F32;
}

#define BLOCKS(X)                                                                               \
    X(data) X(dtype) X(groups) X(block) X(bits) X(symmetric) X(scale_dtype) X(factors) X(moves) \
    X(weight) X(reach) X(mean_square) X(period) X(codes) X(scales) X(zeros)

/* The arguments of BLOCKS, which come first; a zero point has the size of a scale, or is a byte. */
static Blocks task_at(Call *call, int biased) {
    enum { BLOCKS(AS_INDEX) arguments };
    const Py_ssize_t groups = size_at(call, ARG_groups), block = size_at(call, ARG_block);
    const Py_ssize_t period = size_at(call, ARG_period), count = times(groups, block);
    Blocks task = {.groups = (size_t)groups};
    task.scheme = scheme_at(call, ARG_bits, ARG_symmetric, ARG_block);
    task.scale_type = scale_dtype_at(call, ARG_scale_dtype);
    require(call, block > 0, "blocks must have a length");
    task.source = source_at(call, ARG_data, ARG_dtype, count);
    task.grid.factors = floats_at(call, ARG_factors, &task.grid.factor_count);
    task.grid.moves = floats_at(call, ARG_moves, &task.grid.move_count);
    task.weights.period = (size_t)period;
    task.weights.weight = in_turn_at(call, ARG_weight, period, block);
    task.weights.reach = in_turn_at(call, ARG_reach, period, block);
    task.mean_square = in_turn_at(call, ARG_mean_square, period, block);
    require(call, !task.weights.weight == !task.weights.reach, "weights without reach");
    const Py_ssize_t scale = (Py_ssize_t)scale_types[task.scale_type].bytes;
    const Py_ssize_t zero = task.scheme.symmetric ? 0 : biased ? scale : 1;
    task.codes = memory_at(call, ARG_codes, count / 8 * task.scheme.bits, 1, PyBUF_WRITABLE);
    task.scales = memory_at(call, ARG_scales, times(groups, scale), 1, PyBUF_WRITABLE);
    task.zeros = memory_at(call, ARG_zeros, times(groups, zero), 1, PyBUF_WRITABLE);
    return task;
}

#define QUANTIZE_BLOCKS(X) BLOCKS(X) X(low) X(high) X(pivot)
FUNCTION(quantize_blocks, QUANTIZE_BLOCKS) {
    BEGIN(quantize_blocks, QUANTIZE_BLOCKS)
    Blocks task = task_at(&call, 0);
    BlockFigures found = {0};
    require(&call, task.scheme.bits == 8 || task.groups * task.scheme.block % PACK_GROUP == 0,
            "values must fill groups of 32");
    task.low = (float)NUMBER(low);
    task.high = (float)NUMBER(high);
    task.pivot = NUMBER(pivot);
    int status = DONE;
    RUN(status = call.kernels->quantize_blocks(&task, &found))
    RETURN(figures_of(status, &found));
}

#define QUANTIZE_STREAM(X) BLOCKS(X) X(biased)
FUNCTION(quantize_stream, QUANTIZE_STREAM) {
    BEGIN(quantize_stream, QUANTIZE_STREAM)
    const int biased = FLAG(biased);
    const Streams task = {.blocks = task_at(&call, biased), .biased = biased};
    Errors found = {0};
    require(&call, task.blocks.groups * task.blocks.scheme.block % PACK_GROUP == 0,
            "values must fill groups of 32");
    require(&call, !biased || !task.blocks.scheme.symmetric, "biases of symmetric codes");
    int status = DONE;
    RUN(status = call.kernels->quantize_stream(&task, &found))
    RETURN(status == NO_MEMORY    ? PyErr_NoMemory()
           : status == NOT_FINITE ? Py_NewRef(Py_None)
                                  : errors_of(found));
}

#define QUANTIZE_CHANNELS(X)                                                                   \
    X(data) X(dtype) X(rows) X(columns) X(bits) X(symmetric) X(either_side) X(low) X(high)     \
    X(pivot) X(scale) X(zero) X(mean_square) X(period) X(codes) X(scales) X(zeros)
FUNCTION(quantize_channels, QUANTIZE_CHANNELS) {
    BEGIN(quantize_channels, QUANTIZE_CHANNELS)
    const Py_ssize_t rows = SIZE(rows), columns = SIZE(columns), period = SIZE(period);
    Channels task = {0};
    BlockFigures found = {0};
    task.scheme = scheme_at(&call, ARG_bits, ARG_symmetric, -1);
    task.source = source_at(&call, ARG_data, ARG_dtype, times(rows, columns));
    task.rows = (size_t)rows;
    task.columns = (size_t)columns;
    task.low = (float)NUMBER(low);
    task.high = (float)NUMBER(high);
    task.pivot = NUMBER(pivot);
    task.either_side = FLAG(either_side);
    task.scale = OPTIONAL(scale, rows, float);
    task.zero = OPTIONAL(zero, rows, int32_t);
    require(&call, !task.scale == !task.zero, "scales without zero points");
    task.period = (size_t)period;
    task.mean_square = IN_TURN(mean_square, period, columns);
    task.codes = OUTPUT(codes, times(rows, row_bytes(task.scheme, columns)), uint8_t);
    task.scales = OUTPUT(scales, times(rows, 4), uint8_t);
    task.zeros = OUTPUT(zeros, task.scheme.symmetric ? 0 : rows, uint8_t);
    int status = DONE;
    RUN(status = call.kernels->quantize_channels(&task, &found))
    RETURN(figures_of(status, &found));
}

#define PACK(X) X(values) X(groups) X(width) X(packed)
FUNCTION(pack, PACK) {
    BEGIN(pack, PACK)
    const Py_ssize_t groups = SIZE(groups);
    const int width = integer_at(&call, ARG_width, 1, 8);
    const uint8_t *values = INPUT(values, times(groups, PACK_GROUP), uint8_t);
    uint8_t *packed = OUTPUT(packed, times(groups, 4 * width), uint8_t);
    RUN(call.kernels->pack(values, (size_t)groups, width, packed))
    RETURN(Py_NewRef(Py_None));
}

FUNCTION(unpack, PACK) {
    BEGIN(unpack, PACK)
    const Py_ssize_t groups = SIZE(groups);
    const int width = integer_at(&call, ARG_width, 1, 8);
    const uint8_t *packed = INPUT(packed, times(groups, 4 * width), uint8_t);
    uint8_t *values = OUTPUT(values, times(groups, PACK_GROUP), uint8_t);
    RUN(call.kernels->unpack(packed, (size_t)groups, width, values))
    RETURN(Py_NewRef(Py_None));
}

#define STREAM(X) X(codes) X(rows) X(columns) X(bits) X(stride) X(packed)
FUNCTION(pack_stream, STREAM) {
    BEGIN(pack_stream, STREAM)
    const Py_ssize_t rows = SIZE(rows), columns = SIZE(columns), stride = SIZE(stride);
    const int bits = integer_at(&call, ARG_bits, 2, 8);
    require(&call, times(columns, bits) <= times(stride, 8), "rows that are too short");
    const uint8_t *codes = INPUT(codes, times(rows, columns), uint8_t);
    uint8_t *packed = OUTPUT(packed, times(rows, stride), uint8_t);
    RUN(call.kernels->pack_stream(codes, (size_t)rows, (size_t)columns, bits, (size_t)stride, packed))
    RETURN(Py_NewRef(Py_None));
}

FUNCTION(unpack_stream, STREAM) {
    BEGIN(unpack_stream, STREAM)
    const Py_ssize_t rows = SIZE(rows), columns = SIZE(columns), stride = SIZE(stride);
    const int bits = integer_at(&call, ARG_bits, 2, 8);
    require(&call, times(columns, bits) <= times(stride, 8), "rows that are too short");
    const uint8_t *packed = INPUT(packed, times(rows, stride), uint8_t);
    uint8_t *codes = OUTPUT(codes, times(rows, columns), uint8_t);
    RUN(call.kernels->unpack_stream(packed, (size_t)rows, (size_t)columns, bits, (size_t)stride, codes))
    RETURN(Py_NewRef(Py_None));
}

#define CAST(X) X(data) X(dtype) X(count) X(to) X(out)
FUNCTION(cast, CAST) {
    BEGIN(cast, CAST)
    const Py_ssize_t count = SIZE(count);
    const Source source = source_at(&call, ARG_data, ARG_dtype, count);
    const enum source_type to = dtype_at(&call, ARG_to);
    uint8_t *out = OUTPUT(out, times(count, (Py_ssize_t)source_types[to].bytes), uint8_t);
    Errors found = {0};
    int status = DONE;
    RUN(status = call.kernels->cast(source, (size_t)count, to, out, &found))
    RETURN(errors_unless(status == NOT_FINITE, &found));
}

/* --- matrix products --------------------------------------------------------------------------*/

#define INTEGER_DOTS(X) X(codes) X(inputs) X(spans) X(rows) X(samples) X(length) X(sums)
FUNCTION(integer_dots, INTEGER_DOTS) {
    BEGIN(integer_dots, INTEGER_DOTS)
    const Py_ssize_t spans = SIZE(spans), rows = SIZE(rows), samples = SIZE(samples);
    const Py_ssize_t length = SIZE(length);
    const int16_t *codes = INPUT(codes, times(spans, times(rows, length)), int16_t);
    const int8_t *inputs = INPUT(inputs, times(spans, times(samples, length)), int8_t);
    int32_t *sums = OUTPUT(sums, times(spans, times(samples, rows)), int32_t);
    int status = DONE;
    RUN(status = call.kernels->products->integer_dots(codes, (size_t)spans, (size_t)rows, inputs,
                                                      (size_t)samples, (size_t)length, sums))
    RETURN(none_or_no_memory(status));
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

#define PRODUCT(X)                                                                             \
    X(packed) X(rows) X(row_codes) X(columns) X(scale) X(zero) X(groups) X(bits) X(symmetric)   \
    X(block) X(inputs) X(samples) X(zero_point) X(y)
FUNCTION(product, PRODUCT) {
    BEGIN(product, PRODUCT)
    const Py_ssize_t rows = SIZE(rows), columns = SIZE(columns), groups = SIZE(groups);
    const Py_ssize_t samples = SIZE(samples), row_codes = SIZE(row_codes);
    const Scheme scheme = scheme_at(&call, ARG_bits, ARG_symmetric, ARG_block);
    require(&call, columns > 0, "rows must not be empty");
    require(&call, (size_t)row_codes == stored_row(scheme, (size_t)columns),
            "row_codes does not belong to this row length");
    require(&call, groups == groups_of(scheme, columns), "scales must be one for each group");
    const Product task = {
        .scheme = scheme,
        .packed = INPUT(packed, times(rows, row_bytes(scheme, columns)), uint8_t),
        .rows = (size_t)rows,
        .row_codes = (size_t)row_codes,
        .columns = (size_t)columns,
        .scale = INPUT(scale, times(rows, groups), float),
        .zero = INPUT(zero, times(rows, groups), int32_t),
        .groups = (size_t)groups,
        .inputs = INPUT(inputs, times(samples, columns), int8_t),
        .samples = (size_t)samples,
        .zero_point = integer_at(&call, ARG_zero_point, -128, 127),
        .y = OUTPUT(y, times(samples, rows), float),
    };
    int fit = 1, status = DONE;
    RUN(fit = scheme.symmetric || zeros_fit(&task); status = fit ? call.kernels->products->product(&task)
                                                                 : DONE)
    require(&call, fit, "a zero point out of range");
    RETURN(none_or_no_memory(status));
}

/* --- ggml -------------------------------------------------------------------------------------*/

static PyObject *list_ggml_types(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
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

static enum ggml_type ggml_type_at(Call *call, int index) {
    for (int type = 0; type < GGML_TYPES && !call->failed; type++) {
        if (is_text(call, index, ggml_types[type].name)) {
            return (enum ggml_type)type;
        }
    }
    require(call, 0, "no such block type");
    return GGML_Q4_0;
}

/* Weights of as many blocks of a type as there are, or none. */
static const float *importance_at(Call *call, int index, GgmlType kind, size_t *period) {
    size_t count = 0;
    const float *found = is_none(call, index) ? NULL : floats_at(call, index, &count);
    *period = count / kind.values;
    require(call, is_none(call, index) || (count && count % kind.values == 0),
            "importance of no block");
    return found;
}

#define GGML_ENCODE(X) X(ggml_type) X(x) X(importance) X(blocks) X(out)
FUNCTION(ggml_encode, GGML_ENCODE) {
    BEGIN(ggml_encode, GGML_ENCODE)
    const enum ggml_type type = ggml_type_at(&call, ARG_ggml_type);
    const GgmlType kind = ggml_types[type];
    const Py_ssize_t blocks = SIZE(blocks);
    const float *x = INPUT(x, times(blocks, (Py_ssize_t)kind.values), float);
    size_t period;
    const float *importance = importance_at(&call, ARG_importance, kind, &period);
    uint8_t *out = OUTPUT(out, times(blocks, (Py_ssize_t)kind.bytes), uint8_t);
    RUN(call.kernels->ggml->encode(type, x, importance, period, (size_t)blocks, out))
    RETURN(Py_NewRef(Py_None));
}

#define GGML_QUANTIZE(X) X(ggml_type) X(data) X(dtype) X(importance) X(blocks) X(out)
FUNCTION(ggml_quantize, GGML_QUANTIZE) {
    BEGIN(ggml_quantize, GGML_QUANTIZE)
    const enum ggml_type type = ggml_type_at(&call, ARG_ggml_type);
    const GgmlType kind = ggml_types[type];
    const Py_ssize_t blocks = SIZE(blocks);
    const Source source =
        source_at(&call, ARG_data, ARG_dtype, times(blocks, (Py_ssize_t)kind.values));
    size_t period;
    const float *importance = importance_at(&call, ARG_importance, kind, &period);
    uint8_t *out = OUTPUT(out, times(blocks, (Py_ssize_t)kind.bytes), uint8_t);
    Errors found = {0};
    int status = DONE;
    RUN(status = call.kernels->ggml->quantize(type, source, importance, period, (size_t)blocks, out,
                                             &found))
    RETURN(errors_unless(status == NOT_FINITE, &found));
}

#define GGML_DECODE(X) X(ggml_type) X(data) X(blocks) X(x)
FUNCTION(ggml_decode, GGML_DECODE) {
    BEGIN(ggml_decode, GGML_DECODE)
    const enum ggml_type type = ggml_type_at(&call, ARG_ggml_type);
    const GgmlType kind = ggml_types[type];
    const Py_ssize_t blocks = SIZE(blocks);
    const uint8_t *data = INPUT(data, times(blocks, (Py_ssize_t)kind.bytes), uint8_t);
    float *x = OUTPUT(x, times(blocks, (Py_ssize_t)kind.values), float);
    RUN(call.kernels->ggml->decode(type, data, (size_t)blocks, x))
    RETURN(Py_NewRef(Py_None));
}

/* --- codebooks --------------------------------------------------------------------------------*/

static size_t codebook_block_at(Call *call, int index) {
    const int block = integer_at(call, index, 2, LONGEST_CODEBOOK_BLOCK);
    require(call, block % 2 == 0, "a block of an odd number of values");
    return (size_t)block;
}

static Py_ssize_t pieces(Py_ssize_t count, Py_ssize_t of) {
    return count / of + (count % of != 0);
}

#define CODEBOOK_ENCODE(X) X(x) X(count) X(scale) X(block) X(midpoints) X(midpoint_count) \
    X(entries) X(out)
FUNCTION(codebook_encode, CODEBOOK_ENCODE) {
    BEGIN(codebook_encode, CODEBOOK_ENCODE)
    const Py_ssize_t count = SIZE(count);
    const size_t block = codebook_block_at(&call, ARG_block);
    const Py_ssize_t midpoints = integer_at(&call, ARG_midpoint_count, 0, 15);
    const Codebook book = {INPUT(midpoints, midpoints, float), (size_t)midpoints,
                           INPUT(entries, midpoints + 1, uint8_t)};
    const float *x = INPUT(x, count, float);
    const float *scale = INPUT(scale, pieces(count, (Py_ssize_t)block), float);
    uint8_t *out = OUTPUT(out, pieces(count, 2), uint8_t);
    RUN(call.kernels->codebook_encode(x, (size_t)count, scale, block, book, out))
    RETURN(Py_NewRef(Py_None));
}

#define CODEBOOK_DECODE(X) X(data) X(count) X(scale) X(block) X(table) X(x)
FUNCTION(codebook_decode, CODEBOOK_DECODE) {
    BEGIN(codebook_decode, CODEBOOK_DECODE)
    const Py_ssize_t count = SIZE(count);
    const size_t block = codebook_block_at(&call, ARG_block);
    const uint8_t *data = INPUT(data, pieces(count, 2), uint8_t);
    const float *scale = INPUT(scale, pieces(count, (Py_ssize_t)block), float);
    const float *table = INPUT(table, 16, float);
    float *x = OUTPUT(x, count, float);
    RUN(call.kernels->codebook_decode(data, (size_t)count, scale, block, table, x))
    RETURN(Py_NewRef(Py_None));
}

/* --- levels -----------------------------------------------------------------------------------*/

static LevelCode level_code_at(Call *call, int bits, int block, int step_bits, int shift,
                               int levels) {
    LevelCode found = {integer_at(call, bits, 2, 6), (size_t)integer_at(call, block, 16, 32),
                       integer_at(call, step_bits, 4, 6), integer_at(call, shift, 0, 8), {0}};
    require(call, found.block == 16 || found.block == 32, "block must be 16 or 32");
    require(call, found.shift % 4 == 0 && (1 << found.step_bits) * level_shifts(found) <= 256,
            "shift must be 0, 4 or, for steps of 4 bits, 8");
    const int count = 1 << found.bits;
    const int8_t *given = memory_at(call, levels, count, 1, PyBUF_SIMPLE);
    for (int k = 0; given && k < count; k++) {
        found.levels[k] = given[k];
        require(call, k == 0 || given[k - 1] < given[k], "levels must ascend");
    }
    const int furthest = (level_shifts(found) - 1) * found.shift;
    require(call, !given || given[count - 1] + furthest <= 127, "levels above 127");
    return found;
}

static Py_ssize_t blocks_at(LevelCode code, Py_ssize_t columns) {
    return pieces(columns, (Py_ssize_t)code.block);
}

static Py_ssize_t level_bytes(LevelCode code, Py_ssize_t columns) {
    return times(pieces(columns, PACK_GROUP), 4 * code.bits);
}

#define LEVELS_ENCODE(X)                                                                    \
    X(x) X(rows) X(columns) X(unit) X(bits) X(block) X(step_bits) X(shift) X(levels)        \
    X(weights) X(mean_square) X(codes) X(steps)
FUNCTION(levels_encode, LEVELS_ENCODE) {
    BEGIN(levels_encode, LEVELS_ENCODE)
    const Py_ssize_t rows = SIZE(rows), columns = SIZE(columns);
    require(&call, columns > 0, "rows must not be empty");
    LevelRows task = {0};
    Errors found = {0};
    task.code = level_code_at(&call, ARG_bits, ARG_block, ARG_step_bits, ARG_shift, ARG_levels);
    const Py_ssize_t blocks = blocks_at(task.code, columns);
    task.x = INPUT(x, times(rows, columns), float);
    task.rows = (size_t)rows;
    task.columns = (size_t)columns;
    task.unit = INPUT(unit, rows, float);
    task.weights = OPTIONAL(weights, times(blocks, (Py_ssize_t)task.code.block), float);
    require(&call, task.weights || columns % (Py_ssize_t)task.code.block == 0,
            "padded blocks need weights");
    task.mean_square = OPTIONAL(mean_square, columns, float);
    task.codes = OUTPUT(codes, times(rows, level_bytes(task.code, columns)), uint8_t);
    task.steps = OUTPUT(steps, times(rows, blocks), uint8_t);
    int status = DONE;
    RUN(status = call.kernels->levels_encode(&task, &found))
    RETURN(status == DONE ? errors_of(found) : PyErr_NoMemory());
}

static StoredLevels stored_levels_at(Call *call, LevelCode code, const int index[6]) {
    const Py_ssize_t rows = size_at(call, index[0]), columns = size_at(call, index[1]);
    require(call, columns > 0, "rows must not be empty");
    const Py_ssize_t blocks = times(rows, blocks_at(code, columns));
    return (StoredLevels){
        .code = code,
        .packed = memory_at(call, index[2], times(rows, level_bytes(code, columns)), 1,
                            PyBUF_SIMPLE),
        .rows = (size_t)rows,
        .columns = (size_t)columns,
        .unit = memory_at(call, index[3], rows, sizeof(float), PyBUF_SIMPLE),
        .steps = memory_at(call, index[4], blocks, 1, PyBUF_SIMPLE),
        .shifts = memory_at(call, index[5], blocks, 1, PyBUF_SIMPLE),
    };
}

/* The arguments that both functions of stored levels have. */
#define STORED_LEVELS(X)                                                                       \
    X(packed) X(rows) X(columns) X(unit) X(steps) X(shifts) X(bits) X(block) X(step_bits)      \
    X(shift) X(levels)
#define STORED_LEVELS_AT                                                                       \
    stored_levels_at(&call,                                                                    \
                     level_code_at(&call, ARG_bits, ARG_block, ARG_step_bits, ARG_shift,       \
                                   ARG_levels),                                                \
                     (const int[]){ARG_rows, ARG_columns, ARG_packed, ARG_unit, ARG_steps,     \
                                   ARG_shifts})

#define LEVELS_DECODE(X) STORED_LEVELS(X) X(x)
FUNCTION(levels_decode, LEVELS_DECODE) {
    BEGIN(levels_decode, LEVELS_DECODE)
    const StoredLevels stored = STORED_LEVELS_AT;
    float *x = OUTPUT(x, times((Py_ssize_t)stored.rows, (Py_ssize_t)stored.columns), float);
    RUN(call.kernels->levels_decode(&stored, x))
    RETURN(Py_NewRef(Py_None));
}

#define LEVELS_PRODUCT(X) STORED_LEVELS(X) X(inputs) X(samples) X(zero_point) X(y)
FUNCTION(levels_product, LEVELS_PRODUCT) {
    BEGIN(levels_product, LEVELS_PRODUCT)
    const Py_ssize_t samples = SIZE(samples);
    const StoredLevels stored = STORED_LEVELS_AT;
    const LevelProduct task = {
        .stored = stored,
        .inputs = INPUT(inputs, times(samples, (Py_ssize_t)stored.columns), int8_t),
        .samples = (size_t)samples,
        .zero_point = integer_at(&call, ARG_zero_point, -128, 127),
        .y = OUTPUT(y, times(samples, (Py_ssize_t)stored.rows), float),
    };
    int status = DONE;
    RUN(status = call.kernels->products->levels_product(&task))
    RETURN(none_or_no_memory(status));
}

/* --- compensated rounding ---------------------------------------------------------------------*/

/* Whether codes have levels, and the order has every column, where there is one. */
static int indices_fit(const Compensation *task) {
    unsigned largest = 0;
    for (size_t i = 0; i < task->rows * task->columns; i++) {
        largest = task->codes[i] > largest ? task->codes[i] : largest;
    }
    for (size_t c = 0; task->order && c < task->columns; c++) {
        if (task->order[c] < 0 || (size_t)task->order[c] >= task->columns) {
            return 0;
        }
    }
    return largest < task->level_count;
}

enum { LONGEST_RESCALED = 256 };

/* Multiples of a unit between two integers, or none. */
static Multiples multiples_at(Call *call, int unit, int low, int high, Py_ssize_t count) {
    if (is_none(call, unit)) {
        return (Multiples){NULL, 0.0f, 0.0f};
    }
    const float *units = memory_at(call, unit, count, sizeof(float), PyBUF_SIMPLE);
    return (Multiples){units, (float)integer_at(call, low, -4096, 4096),
                       (float)integer_at(call, high, -4096, 4096)};
}

#define COMPENSATE(X)                                                                           \
    X(x) X(rows) X(columns) X(order) X(levels) X(scale) X(zero) X(offset) X(length) X(gram)     \
    X(feedback) X(passes) X(scale_dtype) X(scale_unit) X(scale_low) X(scale_high)               \
    X(offset_unit) X(offset_low) X(offset_high) X(codes)
FUNCTION(compensate, COMPENSATE) {
    BEGIN(compensate, COMPENSATE)
    const Py_ssize_t rows = SIZE(rows), columns = SIZE(columns), length = SIZE(length);
    require(&call, length > 0, "groups must not be empty");
    const Py_ssize_t groups = call.failed ? 0 : columns / length + (columns % length != 0);
    Compensation task = {0};
    task.x = INPUT(x, times(rows, columns), float);
    task.rows = (size_t)rows;
    task.columns = (size_t)columns;
    task.order = INPUT(order, columns, int32_t);
    task.levels = floats_at(&call, ARG_levels, &task.level_count);
    require(&call, task.level_count >= 1 && task.level_count <= 256, "no levels, or too many");
    task.scale = OUTPUT(scale, times(rows, groups), float);
    task.zero = INPUT(zero, times(rows, groups), float);
    task.offset = OUTPUT(offset, times(rows, groups), float);
    task.groups = (size_t)groups;
    task.length = (size_t)length;
    task.gram = INPUT(gram, times(columns, columns), float);
    task.feedback = INPUT(feedback, times(columns, columns), float);
    task.passes = (size_t)SIZE(passes);
    task.rescale = !is_none(&call, ARG_scale_dtype);
    if (task.rescale) {
        task.scale_type = scale_dtype_at(&call, ARG_scale_dtype);
    }
    task.scales = multiples_at(&call, ARG_scale_unit, ARG_scale_low, ARG_scale_high,
                               times(rows, groups));
    task.offsets = multiples_at(&call, ARG_offset_unit, ARG_offset_low, ARG_offset_high,
                                times(rows, groups));
    const int stay = !task.rescale && !task.scales.unit && !task.offsets.unit;
    require(&call, stay || length <= LONGEST_RESCALED, "groups too long for other scales");
    task.codes = OUTPUT(codes, times(rows, columns), uint8_t);
    int fit = 1, status = DONE;
    RUN(fit = indices_fit(&task); status = fit ? call.kernels->compensate(&task) : DONE)
    require(&call, fit, "a code without level, or a column that is none");
    RETURN(none_or_no_memory(status));
}

#define SWEEP_COLUMNS(X)                                                                        \
    X(rows) X(columns) X(first) X(width) X(levels) X(scale) X(zero) X(offset) X(length) X(gram) \
    X(shares) X(slope) X(values) X(codes) X(moves) X(places)
FUNCTION(sweep_columns, SWEEP_COLUMNS) {
    BEGIN(sweep_columns, SWEEP_COLUMNS)
    const Py_ssize_t rows = SIZE(rows), columns = SIZE(columns), length = SIZE(length);
    const Py_ssize_t first = SIZE(first), width = SIZE(width);
    require(&call, length > 0, "groups must not be empty");
    require(&call, rows > 0 && rows <= SWEPT_ROWS, "rows that are none, or too many");
    const int there = width > 0 && width <= SWEPT_COLUMNS && width <= columns && first <= columns - width;
    require(&call, there, "columns that are none, or too many");
    const Py_ssize_t groups = call.failed ? 0 : columns / length + (columns % length != 0);
    ColumnSweep task = {.first = (size_t)first, .width = (size_t)width};
    Compensation *of = &task.of;
    of->rows = (size_t)rows;
    of->columns = (size_t)columns;
    of->levels = floats_at(&call, ARG_levels, &of->level_count);
    require(&call, of->level_count >= 1 && of->level_count <= 256, "no levels, or too many");
    of->scale = (float *)INPUT(scale, times(rows, groups), float);
    of->zero = INPUT(zero, times(rows, groups), float);
    of->offset = (float *)INPUT(offset, times(rows, groups), float);
    of->groups = (size_t)groups;
    of->length = (size_t)length;
    of->gram = INPUT(gram, times(columns, columns), float);
    task.shares = INPUT(shares, times(rows, rows), float);
    task.slope = OUTPUT(slope, times(rows, columns), float);
    task.values = OUTPUT(values, times(rows, columns), float);
    of->codes = OUTPUT(codes, times(rows, columns), uint8_t);
    task.moves = OUTPUT(moves, times(rows, width), float);
    task.places = OUTPUT(places, width, int32_t);
    size_t moved = 0;
    int changed = 0, status = DONE;
    RUN(status = call.kernels->sweep_columns(&task, &moved, &changed))
    RETURN(status == DONE ? Py_BuildValue("nO", (Py_ssize_t)moved, changed ? Py_True : Py_False)
                          : PyErr_NoMemory());
}

/* Whether all of them are numbers of rows. */
static int rows_fit(const int32_t *order, Py_ssize_t count, Py_ssize_t rows) {
    for (Py_ssize_t i = 0; order && i < count; i++) {
        if (order[i] < 0 || order[i] >= rows) {
            return 0;
        }
    }
    return order || count == rows;
}

#define MULTIPLY_ORDERED(X)                                                                     \
    X(sums) X(left) X(right) X(order) X(rows) X(depth) X(right_rows) X(columns) X(begin) X(end)
FUNCTION(multiply_ordered, MULTIPLY_ORDERED) {
    BEGIN(multiply_ordered, MULTIPLY_ORDERED)
    const Py_ssize_t rows = SIZE(rows), depth = SIZE(depth), columns = SIZE(columns);
    const Py_ssize_t right_rows = SIZE(right_rows), begin = SIZE(begin), end = SIZE(end);
    require(&call, begin <= end && end <= columns, "columns that are none");
    Products task = {
        .sums = OUTPUT(sums, times(rows, columns), float),
        .left = INPUT(left, times(rows, depth), float),
        .right = INPUT(right, times(right_rows, columns), float),
        .order = OPTIONAL(order, depth, int32_t),
        .rows = (size_t)rows, .depth = (size_t)depth, .columns = (size_t)columns,
        .begin = (size_t)begin, .end = (size_t)end,
    };
    require(&call, call.failed || rows_fit(task.order, depth, right_rows), "rows that are none");
    int status = DONE;
    RUN(status = call.kernels->multiply_ordered(&task))
    RETURN(none_or_no_memory(status));
}

/* --- module -----------------------------------------------------------------------------------*/

#define EACH_FUNCTION(X)                                                                        \
    X(widen_bf16) X(widen_f16) X(widen_table) X(observe) X(histogram) X(extrema) X(all_finite)  \
    X(error_sums) X(worst_step) X(power_sums) X(long_sums) X(search) X(encode) X(decode)        \
    X(encode_rows) X(quantize_blocks) X(quantize_channels) X(quantize_stream) X(pack) X(unpack)  \
    X(pack_stream) X(unpack_stream) X(cast)                                                     \
    X(integer_dots) X(product) X(ggml_encode) X(ggml_quantize) X(ggml_decode)                   \
    X(codebook_encode) X(codebook_decode) X(levels_encode) X(levels_decode) X(levels_product)   \
    X(compensate) X(multiply_ordered) X(sweep_columns)

/* Names of the arguments of each function, by its name. */
static PyObject *signatures(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    static const struct {
        const char *name;
        const char *const *arguments;
    } all[] = {
#define ROW(name) {#name, name##_arguments},
        EACH_FUNCTION(ROW)
#undef ROW
    };
    PyObject *found = PyDict_New();
    for (size_t i = 0; found && i < sizeof all / sizeof *all; i++) {
        PyObject *names = PyList_New(0);
        for (const char *const *argument = all[i].arguments; names && *argument; argument++) {
            PyObject *name = PyUnicode_FromString(*argument);
            if (!name || PyList_Append(names, name) < 0) {
                Py_CLEAR(names);
            }
            Py_XDECREF(name);
        }
        if (!names || PyDict_SetItemString(found, all[i].name, names) < 0) {
            Py_CLEAR(found);
        }
        Py_XDECREF(names);
    }
    return found;
}

static PyMethodDef methods[] = {
    {"variants", variants, METH_NOARGS, NULL},
    {"variant", active_name, METH_NOARGS, NULL},
    {"select", select_variant, METH_O, NULL},
    {"ggml_types", list_ggml_types, METH_NOARGS, NULL},
    {"signatures", signatures, METH_NOARGS, NULL},
#define ROW(name) {#name, (PyCFunction)(void (*)(void))name, METH_VARARGS | METH_KEYWORDS, NULL},
    EACH_FUNCTION(ROW)
#undef ROW
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
