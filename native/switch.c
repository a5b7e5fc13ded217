/* The switch's arithmetic, once per generated token: eight features of the base's logits, then one
 * dot product per expert. Its slow twin is colm_edge/readout.py; tests check that the two agree.
 *
 * The kernels come first and do not use Python; the binding comes last. Over 700 lines in one file,
 * because a second one would need a header for the kernels' static functions.
 *
 * Every kernel is written once, as plain loops that gcc and clang vectorise (-O3 -fopenmp-simd),
 * and compiled once per instruction set. With a compiler that ignores the pragmas, such as MSVC,
 * the portable variant gives the same numbers, only slower. -ffast-math must stay off: infinities
 * and NaN are part of the contract.
 */
#if !defined(Py_LIMITED_API)      /* as in CMakeLists.txt */
#define Py_LIMITED_API 0x030B0000 /* 3.11: the first limited API with the buffer protocol */
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD == 2
#error "x87 arithmetic is not supported: compile with -msse2 -mfpmath=sse"
#endif

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#define PRAGMA(text) _Pragma(#text)
#else
#define INLINE static inline
#define PRAGMA(text)
#endif

/* ---------------------------------------------------------------------------- kernels ---- */

enum { N_FEATURES = 8, N_TOP = 5, BLOCK = 64 };

/* The five largest logits so far, and the id of the largest. */
typedef struct {
    float value[N_TOP]; /* descending; -inf if there are fewer */
    ptrdiff_t argmax;   /* the lowest id of value[0]; -1 before the first finite logit */
    ptrdiff_t bad;      /* the first id with NaN or +inf; -1: none */
} Top;

/* The result of one pass over the logits. */
typedef struct {
    double feature[N_FEATURES]; /* entropy, logp1, margin, p1 .. p5 */
    double logsumexp;
    ptrdiff_t argmax; /* -1: nothing to choose */
    ptrdiff_t bad;    /* -1: none */
} Reading;

INLINE int is_bad_logit(float x) {
    return !(x <= FLT_MAX); /* NaN compares false; -inf is allowed: probability 0 */
}

INLINE void top_insert(Top *top, float x, ptrdiff_t id) {
    int i = N_TOP - 1;
    if (x > top->value[0])
        top->argmax = id; /* a strict comparison: the lowest id wins a tie */
    for (; i > 0 && x > top->value[i - 1]; i--)
        top->value[i] = top->value[i - 1];
    top->value[i] = x;
}

/* Is any of x[0..n) above the fifth best, or NaN? Almost always no, so most time is spent here. */
INLINE int any_above(const float *x, ptrdiff_t n, float fifth) {
    int hit = 0;
    PRAGMA(omp simd reduction(| : hit))
    for (ptrdiff_t i = 0; i < n; i++)
        hit |= !(x[i] <= fifth);
    return hit;
}

INLINE void top_scan(Top *top, const float *x, ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t i = begin; i < end && top->bad < 0; i += BLOCK) {
        ptrdiff_t n = end - i < BLOCK ? end - i : BLOCK;
        /* a constant length lets the compiler omit the loop for the remainder */
        int hit = n == BLOCK ? any_above(x + i, BLOCK, top->value[N_TOP - 1])
                             : any_above(x + i, n, top->value[N_TOP - 1]);
        if (!hit)
            continue;
        for (ptrdiff_t id = i; id < i + n; id++) {
            if (x[id] <= top->value[N_TOP - 1])
                continue;
            if (is_bad_logit(x[id])) {
                top->bad = id;
                return;
            }
            top_insert(top, x[id], id);
        }
    }
}

typedef union {
    float f;
    int32_t i;
} Bits;

/* exp(-z) for 0 <= z <= 88, relative error below 1.2e-7: -z = r - k ln 2, and the Cephes
 * polynomial of r. Exactly 0 at 88, where k is 127. */
INLINE float exp_minus(float z) {
    int32_t k = (int32_t)(z * 1.44269504f + 0.5f); /* truncation rounds to nearest */
    float kf = (float)k;
    float r = (kf * 0.693359375f - z) - kf * 2.12194440e-4f; /* ln 2 in two parts, exact first */
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    /* multiply by 2^-k, built from its exponent bits; k = 127 gives the bits of 0 */
    Bits scale = {.i = (127 - k) * (1 << 23)};
    return p * scale.f;
}

/* Add the sums of exp(-z) and of exp(-z) z, z = max - x. In double: a float sum of 128k terms
 * would drift. */
INLINE void sum_exp(const float *x, ptrdiff_t n, float max, double *sum, double *sum_z) {
    const Bits limit = {.f = 88.0f};
    double s = 0.0, sz = 0.0;
    PRAGMA(omp simd reduction(+ : s, sz))
    for (ptrdiff_t i = 0; i < n; i++) {
        /* From z = 88 on a term counts as 0; this limit also avoids 0 * inf. Floats >= 0 sort like
         * their bits, and a minimum of integers vectorises, unlike a branch. */
        Bits z = {.f = max - x[i]};
        z.i = z.i < limit.i ? z.i : limit.i;
        float e = exp_minus(z.f);
        s += (double)e;
        sz += (double)(e * z.f);
    }
    *sum += s;
    *sum_z += sz;
}

/* Read x[0..n) without row `skip` (-1: none); the argmax is only over ids below n_choose. */
INLINE void read_logits(const float *x, ptrdiff_t n, ptrdiff_t n_choose, ptrdiff_t skip,
                        Reading *reading) {
    Top top = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY}, -1, -1};
    ptrdiff_t hole = skip < 0 ? n : skip; /* [hole, after) is left out */
    ptrdiff_t after = skip < 0 ? n : skip + 1;
    double sum = 0.0, sum_z = 0.0;

    if (skip >= 0 && is_bad_logit(x[skip]))
        top.bad = skip;
    if (hole < n_choose) {
        top_scan(&top, x, 0, hole);
        top_scan(&top, x, after, n_choose);
        reading->argmax = top.argmax;
        top_scan(&top, x, n_choose, n);
    } else {
        top_scan(&top, x, 0, n_choose);
        reading->argmax = top.argmax;
        top_scan(&top, x, n_choose, hole);
        top_scan(&top, x, after, n);
    }
    reading->bad = top.bad;
    if (reading->bad >= 0 || reading->argmax < 0)
        return;

    sum_exp(x, hole, top.value[0], &sum, &sum_z);
    sum_exp(x + after, n - after, top.value[0], &sum, &sum_z);
    double log_sum = log(sum); /* sum >= 1 and sum_z >= 0: the entropy below never cancels */
    reading->logsumexp = (double)top.value[0] + log_sum;
    reading->feature[0] = log_sum + sum_z / sum;
    reading->feature[1] = -log_sum;
    for (int i = 0; i < N_TOP; i++)
        reading->feature[3 + i] = exp((double)top.value[i] - (double)top.value[0]) / sum;
    reading->feature[2] = reading->feature[3] - reading->feature[4];
}

/* Products of floats are exact in double, so the order of the sum does not change the float
 * result. */
INLINE double dot_product(const float *a, const float *b, ptrdiff_t n) {
    double sum = 0.0;
    PRAGMA(omp simd reduction(+ : sum))
    for (ptrdiff_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

/* --------------------------------------------------------------------------- variants ---- */

typedef struct {
    const char *name;
    int (*supported)(void);
    void (*read)(const float *x, ptrdiff_t n, ptrdiff_t n_choose, ptrdiff_t skip, Reading *out);
    double (*dot)(const float *a, const float *b, ptrdiff_t n);
} Variant;

#define DEFINE_VARIANT(name, attribute)                                                          \
    attribute static void read_##name(const float *x, ptrdiff_t n, ptrdiff_t n_choose,           \
                                      ptrdiff_t skip, Reading *out) {                            \
        read_logits(x, n, n_choose, skip, out);                                                  \
    }                                                                                            \
    attribute static double dot_##name(const float *a, const float *b, ptrdiff_t n) {            \
        return dot_product(a, b, n);                                                             \
    }

#define NO_ATTRIBUTE

static int always(void) {
    return 1;
}

DEFINE_VARIANT(portable, NO_ATTRIBUTE)

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__) && !defined(_MSC_VER)
#define HAVE_X86
#if defined(__clang__)
#define WIDE /* clang chooses 512 bits on its own */
#else
#define WIDE ",prefer-vector-width=512"
#endif
DEFINE_VARIANT(avx2, __attribute__((target("avx2,fma"))))
DEFINE_VARIANT(avx512, __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma" WIDE))))

static int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
#endif

/* Best first. */
static const Variant variants[] = {
#if defined(HAVE_X86)
    {"avx512", has_avx512, read_avx512, dot_avx512},
    {"avx2", has_avx2, read_avx2, dot_avx2},
#elif defined(__aarch64__) || defined(_M_ARM64)
    /* every 64-bit ARM has NEON, and the portable code compiles to it */
    {"neon", always, read_portable, dot_portable},
#endif
    {"portable", always, read_portable, dot_portable},
};

enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

/* ---------------------------------------------------------------------------- binding ---- */

/* With fewer numbers to read, releasing the GIL costs more than it saves. */
enum { RELEASE_GIL_FROM = 16384 };

/* The arguments of read(), in order; the first N_BUFFERS are buffers. */
enum { LOGITS, HIDDEN, W_HIDDEN, W_LOGIT, BIAS, OUT, N_CHOOSE, DEFER_ROW, N_ARGUMENTS };
enum { N_BUFFERS = N_CHOOSE };

typedef struct {
    const Variant *variant;
} State;

/* A type of number that a buffer may hold, as Python and the struct module name it. */
typedef struct {
    const char *name, *format;
    size_t size;
} Kind;

static const Kind float32 = {"float32", "f", sizeof(float)};
static const Kind float64 = {"float64", "d", sizeof(double)};
static const Kind int32 = {"int32", "i", sizeof(int32_t)};

/* A borrowed buffer. `data` points to its values if they are floats; it is NULL for None. */
typedef struct {
    Py_buffer view;
    const float *data;
    Py_ssize_t n;
} Borrowed;

static int is_native(const char *format, const char *wanted) {
    const uint16_t one = 1;
    if (format == NULL)
        return 0;
    if (*format == '@' || *format == '=' || *format == (*(const char *)&one ? '<' : '>'))
        format++; /* ctypes arrays use '<f' where numpy uses 'f' */
    return strcmp(format, wanted) == 0;
}

static int holds(const char *format, const Kind *kind) {
    /* where a C long has 32 bits, numpy's int32 is one */
    return is_native(format, kind->format) ||
           (kind == &int32 && sizeof(long) == sizeof(int32_t) && is_native(format, "l"));
}

/* Borrow `object` as C-contiguous native numbers, or raise. Free it with `release`. */
static int borrow(Borrowed *floats, const char *name, PyObject *object, const Kind *kind,
                  int writable) {
    Py_buffer *view = &floats->view;
    if (!PyObject_CheckBuffer(object)) {
        PyObject *type = PyType_GetName(Py_TYPE(object));
        if (type != NULL)
            PyErr_Format(PyExc_TypeError, "%s: expected a buffer of %s, got %U", name, kind->name,
                         type);
        Py_XDECREF(type);
        return -1;
    }
    /* accept any buffer and check it here, because exporters' own messages differ */
    if (PyObject_GetBuffer(object, view, PyBUF_FULL_RO) < 0)
        return -1;
    if (!holds(view->format, kind))
        PyErr_Format(PyExc_TypeError, "%s: expected %s (format '%s'), got format '%s'", name,
                     kind->name, kind->format, view->format != NULL ? view->format : "B");
    else if (!PyBuffer_IsContiguous(view, 'C'))
        PyErr_Format(PyExc_ValueError, "%s: expected a C-contiguous buffer, got a strided one",
                     name);
    else if ((uintptr_t)view->buf % kind->size != 0)
        PyErr_Format(PyExc_ValueError, "%s: expected %zu-byte alignment, got an unaligned buffer",
                     name, kind->size);
    else if (writable && view->readonly)
        PyErr_Format(PyExc_BufferError, "%s: expected a writable buffer, got a read-only one",
                     name);
    else {
        floats->data = view->buf;
        floats->n = view->len / (Py_ssize_t)kind->size;
        return 0;
    }
    PyBuffer_Release(view);
    view->obj = NULL;
    return -1;
}

static void release(Borrowed *floats) {
    if (floats->view.obj != NULL)
        PyBuffer_Release(&floats->view);
}

static int expect(int holds, const char *name, const char *expected, Py_ssize_t got) {
    if (!holds)
        PyErr_Format(PyExc_ValueError, "%s: expected %s, got %zd", name, expected, got);
    return holds;
}

/* Is every part of the head None, as it must be without experts and with a defer row? */
static int expect_no_head(PyObject *const *args, const char *why) {
    static const char *const names[] = {"hidden", "w_hidden", "w_logit", "bias"};
    for (int i = HIDDEN; i <= BIAS; i++)
        if (args[i] != Py_None) {
            PyErr_Format(PyExc_ValueError, "%s: expected None together with %s, got a buffer",
                         names[i - HIDDEN], why);
            return 0;
        }
    return 1;
}

static int index_argument(PyObject *object, Py_ssize_t *value) {
    *value = PyNumber_AsSsize_t(object, NULL); /* clipped; the caller checks the range */
    return *value == -1 && PyErr_Occurred() ? -1 : 0;
}

static const char *value_name(float x) {
    return isnan(x) ? "nan" : x > 0 ? "inf" : "-inf";
}

static Py_ssize_t first_not_finite(const float *x, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++)
        if (!isfinite(x[i]))
            return i;
    return -1;
}

static void raise_bad_d(const Borrowed *hidden, Py_ssize_t expert, float d) {
    Py_ssize_t bad = first_not_finite(hidden->data, hidden->n);
    if (bad >= 0)
        PyErr_Format(PyExc_ValueError, "hidden: expected finite values, got %s at index %zd",
                     value_name(hidden->data[bad]), bad);
    else
        PyErr_Format(PyExc_ValueError, "d: expected a finite value, got %s for expert %zd",
                     value_name(d), expert);
}

/* Check the arguments of one call, after every buffer is borrowed. */
static int check_arguments(const Borrowed *f, PyObject *const *args, Py_ssize_t n_choose,
                           Py_ssize_t defer_row) {
    Py_ssize_t n_vocab = f[LOGITS].n, n_experts = 1;

    if (!expect(n_vocab >= 1, "logits", "at least 1 value", n_vocab))
        return -1;
    if (n_choose < 1 || n_choose > n_vocab) {
        PyErr_Format(PyExc_ValueError, "n_choose: expected 1 to n_vocab = %zd, got %zd", n_vocab,
                     n_choose);
        return -1;
    }
    if (defer_row < -1 || defer_row >= n_vocab) {
        PyErr_Format(PyExc_ValueError,
                     "defer_row: expected -1 or an id below n_vocab = %zd, got %zd", n_vocab,
                     defer_row);
        return -1;
    }
    if (defer_row >= 0) {
        if (!expect_no_head(args, "defer_row"))
            return -1;
    } else if (args[BIAS] == Py_None) {
        if (!expect_no_head(args, "no bias"))
            return -1;
        n_experts = 0; /* only the features */
    } else {
        n_experts = f[BIAS].n;
        if (!expect(n_experts >= 1, "bias", "one value per expert", n_experts))
            return -1;
        if (args[W_LOGIT] == Py_None) {
            PyErr_SetString(PyExc_ValueError,
                            "w_logit: expected a buffer together with bias, got None");
            return -1;
        }
        if (f[W_LOGIT].n / N_FEATURES != n_experts || f[W_LOGIT].n % N_FEATURES != 0) {
            PyErr_Format(PyExc_ValueError,
                         "w_logit: expected n_experts x 8 = %zd x 8 values, got %zd", n_experts,
                         f[W_LOGIT].n);
            return -1;
        }
        if ((args[HIDDEN] == Py_None) != (args[W_HIDDEN] == Py_None)) {
            PyErr_SetString(PyExc_ValueError,
                            args[HIDDEN] == Py_None
                                ? "hidden: expected a buffer together with w_hidden, got None"
                                : "w_hidden: expected a buffer together with hidden, got None");
            return -1;
        }
        if (args[HIDDEN] != Py_None) {
            Py_ssize_t n_embd = f[HIDDEN].n;
            if (!expect(n_embd >= 1, "hidden", "at least 1 value", n_embd))
                return -1;
            /* divide, because the product of two lengths could overflow */
            if (f[W_HIDDEN].n / n_embd != n_experts || f[W_HIDDEN].n % n_embd != 0) {
                PyErr_Format(PyExc_ValueError,
                             "w_hidden: expected n_experts x n_embd = %zd x %zd values, got %zd",
                             n_experts, n_embd, f[W_HIDDEN].n);
                return -1;
            }
        }
    }
    if (f[OUT].n - N_FEATURES != n_experts) {
        PyErr_Format(PyExc_ValueError, "out: expected 8 + n_experts = 8 + %zd values, got %zd",
                     n_experts, f[OUT].n);
        return -1;
    }
    return 0;
}

/* Fill `out`; return the first expert whose d is not finite, or -1. */
static ptrdiff_t apply_head(const Variant *variant, const Borrowed *f, const Reading *reading,
                            float *out) {
    const double *feature = reading->feature;
    for (int i = 0; i < N_FEATURES; i++)
        out[i] = (float)feature[i];
    for (ptrdiff_t expert = 0; expert < f[BIAS].n; expert++) {
        const float *w = f[W_LOGIT].data + expert * N_FEATURES;
        double d = f[BIAS].data[expert];
        for (int i = 0; i < N_FEATURES; i++)
            d += w[i] * feature[i];
        if (f[HIDDEN].data != NULL)
            d += variant->dot(f[W_HIDDEN].data + expert * f[HIDDEN].n, f[HIDDEN].data, f[HIDDEN].n);
        /* the conversion to float of a double beyond FLT_MAX is undefined */
        out[N_FEATURES + expert] = fabs(d) <= FLT_MAX ? (float)d : isnan(d) ? NAN
                                   : d > 0            ? INFINITY
                                                      : -INFINITY;
        if (!isfinite(out[N_FEATURES + expert]))
            return expert;
    }
    return -1;
}

static PyObject *read_checked(const Variant *variant, const Borrowed *f, Py_ssize_t n_choose,
                              Py_ssize_t defer_row) {
    const Borrowed *logits = &f[LOGITS];
    float *out = f[OUT].view.buf;
    Reading reading;
    ptrdiff_t bad_d = -1;
    PyThreadState *released = NULL;

    if (logits->n + f[W_HIDDEN].n >= RELEASE_GIL_FROM)
        released = PyEval_SaveThread();
    variant->read(logits->data, logits->n, n_choose, defer_row, &reading);
    if (reading.bad < 0 && reading.argmax >= 0) {
        bad_d = apply_head(variant, f, &reading, out);
        if (defer_row >= 0)
            out[N_FEATURES] = logits->data[defer_row]; /* -inf: never defer */
    }
    if (released != NULL)
        PyEval_RestoreThread(released);

    if (reading.bad >= 0)
        return PyErr_Format(PyExc_ValueError,
                            "logits: expected finite values or -inf, got %s at id %zd",
                            value_name(logits->data[reading.bad]), (Py_ssize_t)reading.bad);
    if (reading.argmax < 0)
        return PyErr_Format(PyExc_ValueError,
                            "logits: nothing to choose: expected a finite value among the ids "
                            "below n_choose = %zd (defer_row = %zd left out), got none",
                            n_choose, defer_row);
    if (bad_d >= 0) {
        raise_bad_d(&f[HIDDEN], bad_d, out[N_FEATURES + bad_d]);
        return NULL;
    }
    return Py_BuildValue("(nd)", (Py_ssize_t)reading.argmax, reading.logsumexp);
}

PyDoc_STRVAR(read_doc,
             "read(logits, hidden, w_hidden, w_logit, bias, out, n_choose, defer_row, /)\n--\n\n"
             "Read the switch; colm_edge.readout.read_numpy, its twin, documents it.");

static PyObject *switch_read(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    const State *state = PyModule_GetState(module);
    static const char *const names[] = {"logits",  "hidden", "w_hidden",
                                        "w_logit", "bias",   "out"};
    Borrowed floats[N_BUFFERS];
    Py_ssize_t n_choose, defer_row;
    PyObject *result = NULL;

    if (n_args != N_ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "read: expected %d positional arguments, got %zd",
                            (int)N_ARGUMENTS, n_args);
    if (index_argument(args[N_CHOOSE], &n_choose) < 0 ||
        index_argument(args[DEFER_ROW], &defer_row) < 0)
        return NULL;
    memset(floats, 0, sizeof floats);
    for (int i = 0; i < N_BUFFERS; i++) {
        if (args[i] == Py_None && i != LOGITS && i != OUT)
            continue; /* check_arguments checks which may be None together */
        if (borrow(&floats[i], names[i], args[i], &float32, i == OUT) < 0)
            goto done;
    }
    if (check_arguments(floats, args, n_choose, defer_row) == 0)
        result = read_checked(state->variant, floats, n_choose, defer_row);
done:
    for (int i = 0; i < N_BUFFERS; i++)
        release(&floats[i]);
    return result;
}

/* The arguments of read_rows(), in order; the first N_ROW_BUFFERS are buffers. */
enum { ROWS, FEATURES, ARGMAX, LOGSUMEXP, ROWS_CHOOSE, N_ROW_ARGUMENTS };
enum { N_ROW_BUFFERS = ROWS_CHOOSE };

static int check_rows(const Borrowed *f, int has_features, Py_ssize_t n_choose) {
    Py_ssize_t n = f[ARGMAX].n;

    if (!expect(n >= 1, "argmax", "at least 1 row", n))
        return -1;
    if (f[ROWS].n < n || f[ROWS].n % n != 0) {
        PyErr_Format(PyExc_ValueError, "logits: expected n_rows x n_vocab = %zd x n_vocab values, "
                     "got %zd", n, f[ROWS].n);
        return -1;
    }
    if (f[LOGSUMEXP].n != n) {
        PyErr_Format(PyExc_ValueError, "logsumexp: expected n_rows = %zd values, got %zd", n,
                     f[LOGSUMEXP].n);
        return -1;
    }
    /* divide, because the product of two lengths could overflow */
    if (has_features && (f[FEATURES].n / N_FEATURES != n || f[FEATURES].n % N_FEATURES != 0)) {
        PyErr_Format(PyExc_ValueError, "features: expected n_rows x 8 = %zd x 8 values, got %zd",
                     n, f[FEATURES].n);
        return -1;
    }
    if (n_choose < 1 || n_choose > f[ROWS].n / n) {
        PyErr_Format(PyExc_ValueError, "n_choose: expected 1 to n_vocab = %zd, got %zd",
                     f[ROWS].n / n, n_choose);
        return -1;
    }
    return 0;
}

static PyObject *read_rows_checked(const Variant *variant, const Borrowed *f, Py_ssize_t n_choose) {
    Py_ssize_t n = f[ARGMAX].n, n_vocab = f[ROWS].n / n, row = 0;
    float *features = f[FEATURES].view.buf;
    int32_t *argmax = f[ARGMAX].view.buf;
    double *logsumexp = f[LOGSUMEXP].view.buf;
    Reading reading = {.argmax = -1, .bad = -1};
    PyThreadState *released = NULL;

    if (f[ROWS].n >= RELEASE_GIL_FROM)
        released = PyEval_SaveThread();
    for (; row < n; row++) {
        variant->read(f[ROWS].data + row * n_vocab, n_vocab, n_choose, -1, &reading);
        if (reading.bad >= 0 || reading.argmax < 0)
            break;
        argmax[row] = (int32_t)reading.argmax;
        logsumexp[row] = reading.logsumexp;
        for (int i = 0; features != NULL && i < N_FEATURES; i++)
            features[row * N_FEATURES + i] = (float)reading.feature[i];
    }
    if (released != NULL)
        PyEval_RestoreThread(released);

    if (row == n)
        Py_RETURN_NONE;
    if (reading.bad >= 0)
        return PyErr_Format(PyExc_ValueError,
                            "logits: expected finite values or -inf, got %s at id %zd of row %zd",
                            value_name(f[ROWS].data[row * n_vocab + reading.bad]),
                            (Py_ssize_t)reading.bad, row);
    return PyErr_Format(PyExc_ValueError,
                        "logits: nothing to choose: expected a finite value among the ids below "
                        "n_choose = %zd, got none in row %zd",
                        n_choose, row);
}

PyDoc_STRVAR(read_rows_doc,
             "read_rows(logits, features, argmax, logsumexp, n_choose, /)\n--\n\n"
             "Read many rows; colm_edge.readout.read_rows_numpy, its twin, documents it.");

static PyObject *switch_read_rows(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    const State *state = PyModule_GetState(module);
    static const char *const names[] = {"logits", "features", "argmax", "logsumexp"};
    static const Kind *const kinds[] = {&float32, &float32, &int32, &float64};
    Borrowed buffers[N_ROW_BUFFERS];
    Py_ssize_t n_choose;
    PyObject *result = NULL;

    if (n_args != N_ROW_ARGUMENTS)
        return PyErr_Format(PyExc_TypeError,
                            "read_rows: expected %d positional arguments, got %zd",
                            (int)N_ROW_ARGUMENTS, n_args);
    if (index_argument(args[ROWS_CHOOSE], &n_choose) < 0)
        return NULL;
    memset(buffers, 0, sizeof buffers);
    for (int i = 0; i < N_ROW_BUFFERS; i++) {
        if (args[i] == Py_None && i == FEATURES)
            continue;
        if (borrow(&buffers[i], names[i], args[i], kinds[i], i != ROWS) < 0)
            goto done;
    }
    if (check_rows(buffers, args[FEATURES] != Py_None, n_choose) == 0)
        result = read_rows_checked(state->variant, buffers, n_choose);
done:
    for (int i = 0; i < N_ROW_BUFFERS; i++)
        release(&buffers[i]);
    return result;
}

/* Return the tuple of variants that this CPU can run, best first. */
static PyObject *supported_names(void) {
    PyObject *list = PyList_New(0), *tuple;
    if (list == NULL)
        return NULL;
    for (int i = 0; i < N_VARIANTS; i++) {
        if (!variants[i].supported())
            continue;
        PyObject *name = PyUnicode_FromString(variants[i].name);
        if (name == NULL || PyList_Append(list, name) < 0) {
            Py_XDECREF(name);
            Py_DECREF(list);
            return NULL;
        }
        Py_DECREF(name);
    }
    tuple = PyList_AsTuple(list);
    Py_DECREF(list);
    return tuple;
}

static const Variant *choose_variant(const char *wanted) {
    for (int i = 0; i < N_VARIANTS; i++)
        if (variants[i].supported() && (wanted == NULL || strcmp(variants[i].name, wanted) == 0))
            return &variants[i];
    return NULL;
}

/* Return COLM_EDGE_NATIVE from os.environ, a new reference; None if it is unset or empty. Not from
 * getenv, which misses changes made from Python on some platforms. */
static PyObject *forced_name(void) {
    PyObject *os = PyImport_ImportModule("os"), *environ = NULL, *value = NULL;
    if (os != NULL)
        environ = PyObject_GetAttrString(os, "environ");
    if (environ != NULL)
        value = PyObject_CallMethod(environ, "get", "s", "COLM_EDGE_NATIVE");
    Py_XDECREF(os);
    Py_XDECREF(environ);
    if (value != NULL && value != Py_None && PyUnicode_GetLength(value) == 0) {
        Py_DECREF(value);
        return Py_NewRef(Py_None);
    }
    return value;
}

static int switch_exec(PyObject *module) {
    State *state = PyModule_GetState(module);
    PyObject *names = supported_names(), *forced = forced_name(), *implementation = NULL;
    const char *wanted = NULL;
    int status = -1;

    if (names == NULL || forced == NULL)
        goto done;
    if (forced != Py_None) {
        wanted = PyUnicode_AsUTF8AndSize(forced, NULL);
        if (wanted == NULL)
            goto done;
    }
    state->variant = choose_variant(wanted);
    if (state->variant == NULL) {
        PyErr_Format(PyExc_ImportError,
                     "COLM_EDGE_NATIVE: expected numpy or one of %R, which this CPU can run, "
                     "got %R",
                     names, forced);
        goto done;
    }
    implementation = PyUnicode_FromString(state->variant->name);
    if (implementation == NULL || PyModule_AddObjectRef(module, "implementations", names) < 0 ||
        PyModule_AddObjectRef(module, "implementation", implementation) < 0)
        goto done;
    status = 0;
done:
    Py_XDECREF(names);
    Py_XDECREF(forced);
    Py_XDECREF(implementation);
    return status;
}

/* Cast through void(*)(void), the only function type to and from which no compiler warns. */
static PyMethodDef methods[] = {
    {"read", (PyCFunction)(void (*)(void))switch_read, METH_FASTCALL, read_doc},
    {"read_rows", (PyCFunction)(void (*)(void))switch_read_rows, METH_FASTCALL, read_rows_doc},
    {NULL, NULL, 0, NULL},
};

/* ISO C cannot convert a function pointer to the void * of a slot; all our platforms can. */
#if defined(__GNUC__) || defined(__clang__)
#pragma GCC diagnostic ignored "-Wpedantic"
#endif
static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)switch_exec},
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_colm_edge_native",
    .m_doc = "The switch in C: read(), read_rows(), implementation, implementations.",
    .m_size = sizeof(State),
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__colm_edge_native(void) {
    return PyModuleDef_Init(&definition);
}
