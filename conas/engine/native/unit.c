/* ReLU, depthwise convolution, pointwise convolution and the sums for BatchNorm, in one pass.

   A part of kernels.c, which includes it once for each type and width. */

/* Rows `from` to `until` of relu(x), of an image, into xp (H, W + 2 pad, UP(C)), whose borders are zero; by
   in_a x + in_b first, if given. Returns `until`. */
static int64_t NAME(rectify)(REAL *xp, const struct unit *u, int64_t pad, const REAL *x, const REAL *in_a,
                             const REAL *in_b, int64_t from, int64_t until)
{
    int64_t C = UP(u->C);
    for (int64_t h = from; h < until; h++)
        for (int64_t v = 0; v < u->C; v += L) {
            const REAL *at = x + h * u->W * u->ld + v;
            REAL *to = xp + (h * (u->W + 2 * pad) + pad) * C + v;
            V slope = in_a ? READ(in_a + v) : (V){0} + 1, shift = in_a ? READ(in_b + v) : (V){0};
            for (int64_t w = 0; w < u->W; w++) {
                __builtin_prefetch(at + (w + AHEAD) * u->ld);
                AT(to + w * C) = NAME(relu)(slope * NAME(load)(at + w * u->ld, u->C - v) + shift);
            }
        }
    return MAX(from, until);
}

/* Rows oy to oy + rows of z (OH, OW, 2 size): the pixels of xp (H, width) in even rows and columns, `size` channels of
   each, beside those in odd ones, zeros where there are none. */
static void NAME(halves)(REAL *z, const struct unit *u, const REAL *xp, int64_t width, int64_t size, int64_t oy,
                         int64_t rows)
{
    for (int64_t r = oy; r < oy + rows; r++)
        for (int64_t w = 0; w < u->OW; w++) {
            REAL *pixel = z + ((r - oy) * u->OW + w) * 2 * size;
            const REAL *even = xp + 2 * r * width + 2 * w * UP(u->C);
            memcpy(pixel, even, size * sizeof(REAL));
            if (2 * r + 1 < u->H && 2 * w + 1 < u->W)
                memcpy(pixel + size, even + width + UP(u->C), size * sizeof(REAL));
            else
                memset(pixel + size, 0, size * sizeof(REAL));
        }
}

/* Rows oy to oy + rows of z (OH, OW, channels), ahead of the pointwise convolution; where they are. */
static const REAL *NAME(inner)(REAL *z, const struct unit *u, int64_t pad, const REAL *xp, const REAL *wd, int64_t oy,
                               int64_t rows)
{
    int64_t C = UP(u->C), width = (u->W + 2 * pad) * C;
    if (u->kind == POINTWISE)
        return xp + oy * width;
    if (u->kind == HALVES)
        NAME(halves)(z, u, xp, width, C, oy, rows);
    else
        NAME(depthwise)(z, xp, u->H, width, pad, wd, C, oy, rows, u->OW, u->kernel, u->stride, u->dilation);
    return z;
}

/* The depthwise kernel (C, k, k) as (k, k, UP(C)); turned by 180 degrees if `turned`. */
static void NAME(arrange_kernel)(REAL *w, const struct unit *u, const REAL *kernel, int turned)
{
    int64_t size = u->kernel * u->kernel, C = UP(u->C);
    memset(w, 0, size * C * sizeof(REAL));
    for (int64_t c = 0; c < u->C; c++)
        for (int64_t i = 0; i < size; i++)
            w[(turned ? size - 1 - i : i) * C + c] = kernel[c * size + i];
}

/* Where output o of a pointwise convolution has its weights (C,): in the first of two tensors, or in the second, and
   which of the inner channels they meet first. */
INLINE const REAL *NAME(weights_of)(const struct unit *u, const REAL *first, const REAL *second, int64_t o, int64_t *at)
{
    int64_t half = u->kind == HALVES ? u->K / 2 : u->K;
    *at = o < half ? 0 : UP(u->C);
    return o < half ? first + o * u->C : second + (o - half) * u->C;
}

/* The pointwise kernel as (inner channels, UP(K)) if `across`, else as (UP(K), inner channels). */
static void NAME(arrange_weights)(REAL *w, const struct unit *u, const REAL *first, const REAL *second, int across)
{
    int64_t K = UP(u->K), I = u->kind == HALVES ? 2 * UP(u->C) : UP(u->C), at;
    memset(w, 0, K * I * sizeof(REAL));
    for (int64_t o = 0; o < u->K; o++) {
        const REAL *of = NAME(weights_of)(u, first, second, o, &at);
        for (int64_t c = 0; c < u->C; c++)
            w[across ? (at + c) * K + o : o * I + at + c] = of[c];
    }
}

#define PAD(u) ((u)->kind == DEPTHWISE ? ((u)->kernel - 1) * (u)->dilation / 2 : 0)
/* How many rows of x those rows of y need that end before `oy`. */
#define NEEDED(u, pad, oy) MIN((u)->H, ((oy) - 1) * (u)->stride + MAX(pad, (u)->stride - 1) + 1)
#define ROWS(u) MIN((u)->OH, MAX(1, (GROUP + (u)->OW - 1) / (u)->OW))  /* of z and y that are computed together */

/* y (N, OH, OW, K) = pointwise(depthwise(relu(x))), and its record `stat` unless that is NULL. x (N, H, W, C) is
   normalised first if it has a record of its own, `in_stat`. Weights: dw (C, 1, k, k), pw (K, C, 1, 1); of HALVES
   pw (K/2, C, 1, 1), pw2 (K - K/2, C, 1, 1). This is half of SepConv, DilConv, FactorizedReduce or ReLUConvBN. */
int NAME(unit_forward)(const struct unit *u, const REAL *x, const double *in_stat, const REAL *dw, const REAL *pw,
                       const REAL *pw2, REAL *y, double *stat, int64_t threads)
{
    int64_t C = UP(u->C), K = UP(u->K), I = u->kind == HALVES ? 2 * C : C, pad = PAD(u), size = u->kernel * u->kernel;
    int64_t rows = ROWS(u), group = rows * u->OW, image = u->H * (u->W + 2 * pad) * C;
    int64_t each = ((image + group * (I + K)) * sizeof(REAL) + 4 * 64) / 64 * 64;  /* bytes, of a thread */
    char *shared = room((size * C + I * K + 2 * C) * sizeof(REAL) + u->N * 2 * K * sizeof(double) + 8 * 64
                        + threads * each);
    if (!shared)
        return 1;
    REAL *wd = take(&shared, size * C, sizeof(REAL)), *w = take(&shared, I * K, sizeof(REAL));
    REAL *in_a = take(&shared, C, sizeof(REAL)), *in_b = take(&shared, C, sizeof(REAL));
    double *parts = take(&shared, u->N * 2 * K, sizeof(double));
    if (u->kind == DEPTHWISE)
        NAME(arrange_kernel)(wd, u, dw, 0);
    NAME(arrange_weights)(w, u, pw, pw2, 1);
    if (in_stat)
        NAME(affine)(in_a, in_b, in_stat, 1, u->C);
    memset(parts, 0, u->N * 2 * K * sizeof(double));
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        char *own = own_part(shared, each);
        REAL *xp = take(&own, image, sizeof(REAL)), *z = take(&own, group * I, sizeof(REAL));
        REAL *padded = take(&own, group * K, sizeof(REAL));
        memset(xp, 0, image * sizeof(REAL));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < u->N; n++)
            for (int64_t oy = 0, ready = 0; oy < u->OH; oy += rows) {
                int64_t P = MIN(rows, u->OH - oy) * u->OW;
                ready = NAME(rectify)(xp, u, pad, x + n * u->H * u->W * u->ld, in_stat ? in_a : NULL, in_b, ready,
                                      NEEDED(u, pad, oy + P / u->OW));
                REAL *to = y + (n * u->OH + oy) * u->OW * u->K;
                REAL *sums = K == u->K && (uintptr_t)to % BYTES == 0 ? to : padded;
                for (int64_t i = P * u->K; i < (P + rows * u->OW) * u->K; i += 64 / sizeof(REAL))
                    __builtin_prefetch(to + i, 1);
                NAME(multiply)(sums, NAME(inner)(z, u, pad, xp, wd, oy, P / u->OW), w, P, I, K);
                if (sums != to)
                    for (int64_t p = 0; p < P; p++)
                        memcpy(to + p * u->K, sums + p * K, u->K * sizeof(REAL));
                if (stat)
                    NAME(observe)(parts + n * 2 * K, oy * u->OW, sums, K, P, u->K);
            }
    }
    if (stat)
        NAME(conclude)(stat, parts, u->N, u->OH * u->OW, u->K, u->eps);
    return 0;
}
