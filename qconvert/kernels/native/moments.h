/* Statistics of one type of number. Included once per type, with these macros:
 *
 *     NUMBER                         float or double
 *     OBSERVE, SURVEY, CENTRAL, ...  the names to define
 */

INLINE int FINITE(NUMBER v) {
    return v - v == 0; /* NaN for Inf and NaN */
}

/* Everything that one pass can tell; the sum and the extremes hold when all values are finite. */
static void SURVEY(const NUMBER *restrict x, size_t n, Statistics *restrict s, double *sum) {
    double sums[LANES] = {0};
    NUMBER low[LANES], high[LANES];
    size_t zeros = 0, finite = 0;
    for (int j = 0; j < LANES; j++) {
        low[j] = high[j] = x[0];
    }
    size_t whole = n / LANES * LANES;
    for (size_t start = 0; start < whole;) {
        /* Short runs, so that the counters of a lane may be as narrow as its numbers. */
        size_t stop = smaller(whole, start + (1u << 20));
        int32_t zero_lanes[LANES] = {0}, finite_lanes[LANES] = {0};
        for (; start < stop; start += LANES) {
            for (int j = 0; j < LANES; j++) {
                NUMBER v = x[start + j];
                sums[j] += (double)v;
                low[j] = v < low[j] ? v : low[j];
                high[j] = v > high[j] ? v : high[j];
                zero_lanes[j] += v == 0;
                finite_lanes[j] += FINITE(v);
            }
        }
        for (int j = 0; j < LANES; j++) {
            zeros += (size_t)zero_lanes[j];
            finite += (size_t)finite_lanes[j];
        }
    }
    for (size_t i = whole; i < n; i++) {
        NUMBER v = x[i];
        sums[i - whole] += (double)v;
        low[0] = v < low[0] ? v : low[0];
        high[0] = v > high[0] ? v : high[0];
        zeros += v == 0;
        finite += (size_t)FINITE(v);
    }
    for (int j = 1; j < LANES; j++) {
        low[0] = low[j] < low[0] ? low[j] : low[0];
        high[0] = high[j] > high[0] ? high[j] : high[0];
    }
    s->zeros = zeros;
    s->count = finite;
    s->minimum = (double)low[0];
    s->maximum = (double)high[0];
    *sum = fold_wide(sums);
}

/* Sums of the powers of the distances from the mean. */
static void CENTRAL(const NUMBER *restrict x, size_t n, Statistics *restrict s) {
    double m2[LANES] = {0}, m3[LANES] = {0}, m4[LANES] = {0};
    double mean = s->mean;
    size_t whole = n / LANES * LANES;
    for (size_t i = 0; i < whole; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            double d = (double)x[i + j] - mean;
            double d2 = d * d;
            m2[j] += d2;
            m3[j] += d2 * d;
            m4[j] += d2 * d2;
        }
    }
    for (size_t i = whole; i < n; i++) {
        double d = (double)x[i] - mean;
        double d2 = d * d;
        m2[i - whole] += d2;
        m3[i - whole] += d2 * d;
        m4[i - whole] += d2 * d2;
    }
    s->m2 = fold_wide(m2);
    s->m3 = fold_wide(m3);
    s->m4 = fold_wide(m4);
}

/* The finite values of x, in order. */
static NUMBER *COMPRESS(const NUMBER *x, size_t n, size_t finite) {
    NUMBER *kept = malloc((finite ? finite : 1) * sizeof *kept);
    if (kept) {
        for (size_t i = 0, k = 0; i < n; i++) {
            if (FINITE(x[i])) {
                kept[k++] = x[i];
            }
        }
    }
    return kept;
}

static int OBSERVE(const NUMBER *x, size_t n, Statistics *s) {
    memset(s, 0, sizeof *s);
    if (n == 0) {
        return DONE;
    }
    double sum;
    SURVEY(x, n, s, &sum);
    NUMBER *kept = NULL;
    s->nonfinite = n - s->count;
    if (s->nonfinite) {
        while (FINITE(x[s->first_nonfinite])) {
            s->first_nonfinite++;
        }
        kept = COMPRESS(x, n, s->count);
        if (!kept) {
            return NO_MEMORY;
        }
        x = kept;
        n = s->count;
        if (n) {
            SURVEY(x, n, s, &sum);
        }
    }
    if (n) {
        s->mean = sum / (double)n;
        CENTRAL(x, n, s);
    }
    free(kept);
    return DONE;
}
