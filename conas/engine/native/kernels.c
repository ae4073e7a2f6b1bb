/* Kernels for the operations of DARTS on a CPU, and for their gradients (arXiv:1806.09055, equations 1 and 2).

   The unit of work is ReLU, depthwise convolution, pointwise convolution and the sums for BatchNorm, in one pass over
   rows of an image that stay in the cache; what torch's operators do badly is the trips through memory in between. Maps
   are channels last: x (N, H, W, C) is x[((n*H + h)*W + w)*ld + c], with ld >= C where a map is a part of a wider one.

   One text for float and double and for several vector widths: the file includes itself with REAL, INT and BYTES set.
   Only compiler vector extensions (GCC, clang): the same source serves AVX2, AVX-512 and NEON.

   Sums over images are taken in parts that do not depend on the number of threads, and added in a fixed order. All
   functions return 0, or 1 if there was no memory. `threads` is how many to use. */
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* How the maps of a unit relate. DEPTHWISE: z = depthwise(relu(x)). POINTWISE: z = relu(x). HALVES, of
   FactorizedReduce: z = the pixels of relu(x) in even rows and columns, beside those in odd ones (2C channels). */
enum { DEPTHWISE, POINTWISE, HALVES };

/* The sizes of x (N, H, W, C), whose pixels are `ld` apart, and of y (N, OH, OW, K). `eps` is BatchNorm's. */
struct unit {
    int64_t N, H, W, C, ld, OH, OW, K, kind, kernel, stride, dilation;
    double eps;
};

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define GROUP 32  /* pixels, at least, that go through a pointwise convolution together */
#define PARTS 32  /* of the images, by which sums over them are taken */
#define CHUNK 16384  /* bytes of a map that stay in the first cache while other maps pass */
#define AHEAD 64  /* pixels: memory is asked for so early, while others are computed */
#define LARGEST 15  /* kernel size */

#ifndef OWN_ROOM /* or a test has both, with bounds that can be checked */
/* Memory that belongs to a thread, at least `bytes` of it, or NULL; it is kept for the next call. */
static void *room(int which, int64_t bytes)
{
    static _Thread_local struct { void *start; int64_t size; } rooms[2];
    if (rooms[which].size < bytes) {
        free(rooms[which].start);
        bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        rooms[which].start = aligned_alloc(64, bytes);
        rooms[which].size = rooms[which].start ? bytes : 0;
    }
    return rooms[which].start;
}

/* A piece of `*free` for `count` items of `size` bytes. */
static void *take(char **free, int64_t count, int64_t size)
{
    void *piece = *free;
    *free += (count * size + 63) / 64 * 64;
    return piece;
}
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
#define BLOCK 8  /* pixels, or channels, whose sums are kept in registers: of 32 */
#else
#define BLOCK 4  /* of 16 */
#endif
#ifdef __AVX__
#define NARROW 32
#else
#define NARROW 16
#endif

#define REAL float
#define INT int32_t
#define BYTES NARROW
#define NAME(f) f##_float
#include __FILE__
#ifdef __AVX512F__
#define REAL float
#define INT int32_t
#define BYTES 64
#define NAME(f) f##_float_wide
#include __FILE__
#endif
#define REAL double
#define INT int64_t
#define BYTES NARROW
#define NAME(f) f##_double
#include __FILE__

/* 1 if there are the functions for channels that come by 64 bytes. */
int has_wide(void)
{
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}

#else /* the text for one REAL and one width */

#define V NAME(vector)
#define U NAME(unaligned)
#define M NAME(mask)
#define PLACES NAME(places)
typedef REAL V __attribute__((vector_size(BYTES)));
typedef REAL U __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
typedef INT M __attribute__((vector_size(BYTES)));
typedef int8_t PLACES __attribute__((vector_size(BYTES / sizeof(REAL))));
#define L ((int64_t)(BYTES / sizeof(REAL)))
#define UP(channels) (((channels) + MAX(L, 8) - 1) / MAX(L, 8) * MAX(L, 8))  /* in memory of our own */
#define AT(pointer) (*(V *)(pointer))
#define READ(pointer) (*(const V *)(pointer))

/* The first n of L values at p, then zeros. Four (of 4, 12, 20 or 36 channels) are put together in a register: a vector
   that is read after only a part of it was written makes the processor wait. */
INLINE V NAME(load)(const REAL *p, int64_t n)
{
    if (n >= L)
        return (V)*(const U *)p;
    if (n == 4) {
        V four = {0};
#pragma GCC unroll 4
        for (int i = 0; i < MIN(4, L); i++)
            four[i] = p[i];
        return four;
    }
    V v = {0};
    memcpy(&v, p, n * sizeof(REAL));
    return v;
}

INLINE void NAME(store)(REAL *p, V v, int64_t n)
{
    if (n >= L)
        *(U *)p = (U)v;
    else if (n == 4)
        memcpy(p, &v, 4 * sizeof(REAL));
    else
        memcpy(p, &v, n * sizeof(REAL));
}

INLINE V NAME(keep)(V v, M where) { return (V)((M)v & where); }  /* v, or 0 */

INLINE V NAME(relu)(V v) { return NAME(keep)(v, ~(v <= 0)); }  /* NaN stays */

/* ---- Depthwise convolution of a row ---- */

/* z[p] = sum over rows t and columns c of ws[t][c] * rows[t][p*s + c*d], for P pixels and L channels. */
INLINE void NAME(pixels)(REAL *z, const REAL *const *rows, const REAL *const *ws, int64_t at, int64_t v, int64_t taps,
                         int64_t C, const int P, int64_t k, int64_t s, int64_t d)
{
    V sum[BLOCK];
#pragma GCC unroll 8
    for (int p = 0; p < P; p++)
        sum[p] = (V){0};
    for (int64_t t = 0; t < taps; t++) {
        const REAL *row = rows[t] + at, *w = ws[t] + v;
#pragma GCC unroll 5
        for (int64_t c = 0; c < k; c++) {
            V weight = READ(w + c * C);
#pragma GCC unroll 8
            for (int p = 0; p < P; p++)
                sum[p] += READ(row + (p * s + c * d) * C) * weight;
        }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; p++)
        AT(z + p * C) = sum[p];
}

INLINE void NAME(span)(REAL *z, const REAL *const *rows, const REAL *const *ws, int64_t taps, int64_t C, int64_t W,
                       const int64_t k, const int64_t s, const int64_t d)
{
    for (int64_t v = 0; v < C; v += L) {
        int64_t x = 0;
        for (; x + BLOCK <= W; x += BLOCK)
            NAME(pixels)(z + x * C + v, rows, ws, x * s * C + v, v, taps, C, BLOCK, k, s, d);
        for (; x + 2 <= W; x += 2)
            NAME(pixels)(z + x * C + v, rows, ws, x * s * C + v, v, taps, C, 2, k, s, d);
        for (; x < W; x++)
            NAME(pixels)(z + x * C + v, rows, ws, x * s * C + v, v, taps, C, 1, k, s, d);
    }
}

/* A row z (W, C) of a depthwise convolution: `rows` are those of its input that kernel rows `ws` (k, C) meet. */
static void NAME(convolve)(REAL *z, const REAL *const *rows, const REAL *const *ws, int64_t taps, int64_t C, int64_t W,
                           int64_t k, int64_t s, int64_t d)
{
    if (k == 3 && s == 1 && d == 1)
        NAME(span)(z, rows, ws, taps, C, W, 3, 1, 1);
    else if (k == 5 && s == 1 && d == 1)
        NAME(span)(z, rows, ws, taps, C, W, 5, 1, 1);
    else if (k == 3 && s == 1 && d == 2)
        NAME(span)(z, rows, ws, taps, C, W, 3, 1, 2);
    else if (k == 5 && s == 1 && d == 2)
        NAME(span)(z, rows, ws, taps, C, W, 5, 1, 2);
    else
        NAME(span)(z, rows, ws, taps, C, W, k, s, d);
}

/* dw[t][c] += sum over x of dz[x] * rows[t][x*s + c*d]: T rows of the kernel's gradient, L channels in registers. */
INLINE void NAME(correlate)(REAL *const *dw, const REAL *const *rows, const REAL *dz, int64_t C, int64_t W, const int T,
                            const int64_t k, int64_t s, int64_t d)
{
    for (int64_t v = 0; v < C; v += L) {
        V sum[25];
#pragma GCC unroll 25
        for (int i = 0; i < T * k; i++)
            sum[i] = READ(dw[i / k] + i % k * C + v);
        for (int64_t x = 0; x < W; x++) {
            V grad = READ(dz + x * C + v);
#pragma GCC unroll 5
            for (int t = 0; t < T; t++)
#pragma GCC unroll 5
                for (int64_t c = 0; c < k; c++)
                    sum[t * k + c] += READ(rows[t] + (x * s + c * d) * C + v) * grad;
        }
#pragma GCC unroll 25
        for (int i = 0; i < T * k; i++)
            AT(dw[i / k] + i % k * C + v) = sum[i];
    }
}

static void NAME(kernel_gradient)(REAL *const *dw, const REAL *const *rows, const REAL *dz, int64_t taps, int64_t C,
                                  int64_t W, int64_t k, int64_t s, int64_t d)
{
    if (k == 3 && taps == 3)
        NAME(correlate)(dw, rows, dz, C, W, 3, 3, s, d);
    else if (k == 5 && taps == 5 && BLOCK == 8)
        NAME(correlate)(dw, rows, dz, C, W, 5, 5, s, d);
    else
        for (int64_t t = 0; t < taps; t++) {
            if (k == 3)
                NAME(correlate)(dw + t, rows + t, dz, C, W, 1, 3, s, d);
            else if (k == 5)
                NAME(correlate)(dw + t, rows + t, dz, C, W, 1, 5, s, d);
            else
                for (int64_t c = 0; c < k; c++) {
                    REAL *one = dw[t] + c * C;
                    const REAL *row = rows[t] + c * d * C;
                    NAME(correlate)(&one, &row, dz, C, W, 1, 1, s, d);
                }
        }
}

/* ---- Pointwise convolution of P pixels ---- */

INLINE void NAME(product)(REAL *y, int64_t ldy, const REAL *z, int64_t ldz, const REAL *w, int64_t ldw, int64_t I,
                          const int P, const int Q)
{
    V sum[BLOCK][2];
#pragma GCC unroll 8
    for (int p = 0; p < P; p++)
#pragma GCC unroll 2
        for (int q = 0; q < Q; q++)
            sum[p][q] = (V){0};
    for (int64_t i = 0; i < I; i++) {
#pragma GCC unroll 8
        for (int p = 0; p < P; p++)
#pragma GCC unroll 2
            for (int q = 0; q < Q; q++)
                sum[p][q] += READ(w + i * ldw + q * L) * z[p * ldz + i];
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; p++)
#pragma GCC unroll 2
        for (int q = 0; q < Q; q++)
            AT(y + p * ldy + q * L) = sum[p][q];
}

/* y (P, O) = z (P, I) w (I, O); O is a multiple of L. */
static void NAME(multiply)(REAL *y, const REAL *z, const REAL *w, int64_t P, int64_t I, int64_t O)
{
    for (int64_t o = 0; o < O; o += 2 * L) {
        int64_t p = 0;
        if (o + 2 * L <= O) {
            for (; p + BLOCK <= P; p += BLOCK)
                NAME(product)(y + p * O + o, O, z + p * I, I, w + o, O, I, BLOCK, 2);
            for (; p < P; p++)
                NAME(product)(y + p * O + o, O, z + p * I, I, w + o, O, I, 1, 2);
        } else {
            for (; p + BLOCK <= P; p += BLOCK)
                NAME(product)(y + p * O + o, O, z + p * I, I, w + o, O, I, BLOCK, 1);
            for (; p < P; p++)
                NAME(product)(y + p * O + o, O, z + p * I, I, w + o, O, I, 1, 1);
        }
    }
}

INLINE void NAME(outer)(REAL *dw, int64_t ldw, const REAL *dy, int64_t ldy, const REAL *z, int64_t ldz, int64_t P,
                        const int Q)
{
    V sum[BLOCK][2];
#pragma GCC unroll 8
    for (int o = 0; o < BLOCK; o++)
#pragma GCC unroll 2
        for (int q = 0; q < Q; q++)
            sum[o][q] = READ(dw + o * ldw + q * L);
    for (int64_t p = 0; p < P; p++)
#pragma GCC unroll 8
        for (int o = 0; o < BLOCK; o++)
#pragma GCC unroll 2
            for (int q = 0; q < Q; q++)
                sum[o][q] += READ(z + p * ldz + q * L) * dy[p * ldy + o];
#pragma GCC unroll 8
    for (int o = 0; o < BLOCK; o++)
#pragma GCC unroll 2
        for (int q = 0; q < Q; q++)
            AT(dw + o * ldw + q * L) = sum[o][q];
}

/* dw (O, I) += dy (P, O)^T z (P, I); O is a multiple of 8, I of L. */
static void NAME(weight_gradient)(REAL *dw, const REAL *dy, const REAL *z, int64_t P, int64_t O, int64_t I)
{
    for (int64_t o = 0; o < O; o += BLOCK)
        for (int64_t i = 0; i < I; i += 2 * L) {
            if (i + 2 * L <= I)
                NAME(outer)(dw + o * I + i, I, dy + o, O, z + i, I, P, 2);
            else
                NAME(outer)(dw + o * I + i, I, dy + o, O, z + i, I, P, 1);
        }
}

/* ---- The sums of BatchNorm: its record is `stat` (3, K): mean, biased variance and 1/std of every channel ---- */

/* Add P pixels y, of which `seen` were added before, to part (2, UP(K)): mean, and sum of squares about it. */
static void NAME(observe)(double *part, int64_t seen, const REAL *y, int64_t ld, int64_t P, int64_t K)
{
    double share = (double)P / (seen + P), weight = seen * share, *mean = part, *square = part + UP(K);
    for (int64_t v = 0; v < K; v += L) {
        int64_t left = K - v, p = 0;
        V sums[4] = {{0}}, squares[4] = {{0}}, sum, centred;
        for (; p + 4 <= P; p += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sums[j] += NAME(load)(y + (p + j) * ld + v, left);
        for (; p < P; p++)
            sums[0] += NAME(load)(y + p * ld + v, left);
        sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        V of = sum / (REAL)P;
        for (p = 0; p + 4 <= P; p += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                centred = NAME(load)(y + (p + j) * ld + v, left) - of;
                squares[j] += centred * centred;
            }
        for (; p < P; p++) {
            centred = NAME(load)(y + p * ld + v, left) - of;
            squares[0] += centred * centred;
        }
        V all = (squares[0] + squares[1]) + (squares[2] + squares[3]);
        for (int64_t c = 0; c < L; c++) {
            double apart = of[c] - mean[v + c];
            mean[v + c] += apart * share;
            square[v + c] += all[c] + apart * apart * weight;
        }
    }
}

/* The record of all images, from the parts of each, of P pixels. */
static void NAME(conclude)(double *stat, const double *parts, int64_t N, int64_t P, int64_t K, double eps)
{
    for (int64_t c = 0; c < K; c++) {
        double mean = 0, square = 0;
        for (int64_t n = 0; n < N; n++) {
            const double *part = parts + n * 2 * UP(K) + c;
            double apart = part[0] - mean;
            mean += apart / (n + 1);
            square += part[UP(K)] + apart * apart * P * n / (n + 1);
        }
        stat[c] = mean;
        stat[K + c] = square / ((double)N * P);
        stat[2 * K + c] = 1 / sqrt(stat[K + c] + eps);
    }
}

/* a (C,) and b (C,), padded, so that BatchNorm(x) = a x + b times p; without a record p x. */
static void NAME(affine)(REAL *a, REAL *b, const double *stat, double p, int64_t C)
{
    for (int64_t c = 0; c < UP(C); c++) {
        a[c] = c >= C ? 0 : stat ? p * stat[2 * C + c] : p;
        b[c] = c < C && stat ? -p * stat[2 * C + c] * stat[c] : 0;
    }
}

/* The gradient of p BatchNorm(y) for that of the sum it is in, g: dL/dy = a g + b y + c. With y^ = BatchNorm(y) by a
   batch of `pixels`, `dot` (K,) = sum g y^ and `sum` (K,) = sum g: p / std (g - sum / pixels - y^ dot / pixels). Adds
   to b and c. By running statistics, where dot is NULL, p / std g. */
static void NAME(slopes)(REAL *a, REAL *b, REAL *c, const double *stat, double p, const double *dot, const double *sum,
                         double pixels, int64_t K)
{
    for (int64_t i = 0; i < K; i++) {
        double scale = p * stat[2 * K + i], slope = dot ? scale * stat[2 * K + i] * dot[i] / pixels : 0;
        a[i] = scale;
        b[i] -= slope;
        c[i] += dot ? slope * stat[i] - scale * sum[i] / pixels : 0;
    }
}

/* ---- The unit ---- */

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

/* Rows oy to oy + rows of z (OH, OW, channels), ahead of the pointwise convolution; where they are. */
static const REAL *NAME(inner)(REAL *z, const struct unit *u, int64_t pad, const REAL *xp, const REAL *wd, int64_t oy,
                               int64_t rows)
{
    int64_t C = UP(u->C), width = (u->W + 2 * pad) * C, k = u->kernel;
    if (u->kind == POINTWISE)
        return xp + oy * width;
    for (int64_t r = oy; r < oy + rows; r++) {
        REAL *row = z + (r - oy) * u->OW * (u->kind == HALVES ? 2 * C : C);
        if (u->kind == HALVES)
            for (int64_t w = 0; w < u->OW; w++) {
                memcpy(row + w * 2 * C, xp + 2 * r * width + 2 * w * C, C * sizeof(REAL));
                if (2 * r + 1 < u->H && 2 * w + 1 < u->W)
                    memcpy(row + w * 2 * C + C, xp + (2 * r + 1) * width + (2 * w + 1) * C, C * sizeof(REAL));
                else
                    memset(row + w * 2 * C + C, 0, C * sizeof(REAL));
            }
        else {
            const REAL *from[LARGEST], *ws[LARGEST];
            int64_t taps = 0;
            for (int64_t t = 0; t < k; t++) {
                int64_t y = r * u->stride + t * u->dilation - pad;
                if (y >= 0 && y < u->H) {
                    from[taps] = xp + y * width;
                    ws[taps++] = wd + t * k * C;
                }
            }
            NAME(convolve)(row, from, ws, taps, C, u->OW, k, u->stride, u->dilation);
        }
    }
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
    char *shared = room(0, (size * C + I * K + 2 * C) * sizeof(REAL) + u->N * 2 * K * sizeof(double) + 8 * 64);
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
    int failed = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        char *own = room(1, (image + group * (I + K)) * sizeof(REAL) + 4 * 64);
        REAL *xp = take(&own, image, sizeof(REAL)), *z = take(&own, group * I, sizeof(REAL));
        REAL *padded = take(&own, group * K, sizeof(REAL));
        if (xp)
            memset(xp, 0, image * sizeof(REAL));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < u->N; n++) {
            if (!xp) {
                failed = 1;
                continue;
            }
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
    }
    if (stat && !failed)
        NAME(conclude)(stat, parts, u->N, u->OH * u->OW, u->K, u->eps);
    return failed;
}

/* d, where xp > 0, is added to a row dx (W, C), or written; also into sums (2, C) of d xp and of d, if given. */
INLINE void NAME(emit_row)(REAL *dx, int64_t ld, const REAL *d, const REAL *xp, int64_t W, int64_t channels,
                           const int add, double *sums, const int with_sums)
{
    int64_t C = UP(channels);
    for (int64_t v = 0; v < channels; v += L) {
        int64_t left = channels - v, w = 0;
        V dot[4] = {{0}}, sum[4] = {{0}};
#define PIXEL(j) \
        V value = READ(xp + (w + j) * C + v), grad = NAME(keep)(READ(d + (w + j) * C + v), value > 0); \
        REAL *to = dx + (w + j) * ld + v; \
        __builtin_prefetch(to + AHEAD * ld, 1); \
        if (with_sums) { \
            dot[j] += grad * value; \
            sum[j] += grad; \
        } \
        NAME(store)(to, add ? NAME(load)(to, left) + grad : grad, left);
        for (; w + 4 <= W; w += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                PIXEL(j)
            }
        for (; w < W; w++) {
            PIXEL(0)
        }
#undef PIXEL
        if (with_sums) {
            V all = (dot[0] + dot[1]) + (dot[2] + dot[3]), alone = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            for (int64_t c = 0; c < MIN(L, left); c++) {
                sums[v + c] += all[c];
                sums[C + v + c] += alone[c];
            }
        }
    }
}

static void NAME(emit)(REAL *dx, int64_t ld, const REAL *d, const REAL *xp, int64_t W, int64_t channels, int add,
                       double *sums)
{
    if (add)
        NAME(emit_row)(dx, ld, d, xp, W, channels, 1, NULL, 0);
    else if (sums)
        NAME(emit_row)(dx, ld, d, xp, W, channels, 0, sums, 1);
    else
        NAME(emit_row)(dx, ld, d, xp, W, channels, 0, NULL, 0);
}

/* The gradient of p BatchNorm(unit_forward(x)), a term of a sum whose gradient is g (N, OH, OW, K), pixels ldg apart.
   `y` and `stat` are what unit_forward gave, `dot` and `sum` what `dots` gives of them, or NULL by running statistics.
   dL/dx goes into dx, laid out as x, unless that is NULL: added, if `add`. With in_stat it is dL/dx^ for the normalised
   x^, and dx_sums (2, C) becomes sum dL/dx^ x^ and sum dL/dx^. Into d_dw, d_pw and d_pw2, unless d_pw is NULL, go the
   gradients w.r.t. the weights: a pass for the alphas alone needs none, and then z is not computed again. */
int NAME(unit_backward)(const struct unit *u, const REAL *x, const double *in_stat, const REAL *dw, const REAL *pw,
                        const REAL *pw2, const REAL *y, const double *stat, double p, const REAL *g, int64_t ldg,
                        const double *dot, const double *sum, REAL *dx, int64_t add, double *dx_sums, REAL *d_dw,
                        REAL *d_pw, REAL *d_pw2, int64_t threads)
{
    int64_t C = UP(u->C), K = UP(u->K), I = u->kind == HALVES ? 2 * C : C, pad = PAD(u), size = u->kernel * u->kernel;
    int64_t rows = ROWS(u), group = rows * u->OW, width = (u->W + 2 * pad) * C, image = u->H * width;
    int64_t blocks = MIN(u->N, PARTS), part = d_pw ? K * I + size * C : 0, spread = dx && u->kind == DEPTHWISE;
    char *shared = room(0, (2 * size * C + I * K + 2 * C + 3 * K + blocks * (part + 16)) * sizeof(REAL)
                           + blocks * 2 * C * sizeof(double) + 12 * 64);
    if (!shared)
        return 1;
    REAL *wd = take(&shared, size * C, sizeof(REAL)), *turned = take(&shared, size * C, sizeof(REAL));
    REAL *w = take(&shared, I * K, sizeof(REAL)), *in_a = take(&shared, C, sizeof(REAL));
    REAL *in_b = take(&shared, C, sizeof(REAL)), *a = take(&shared, 3 * K, sizeof(REAL)), *b = a + K, *c = b + K;
    double *sums = take(&shared, blocks * 2 * C, sizeof(double));
    REAL *parts = take(&shared, blocks * part, sizeof(REAL));
    if (u->kind == DEPTHWISE) {
        NAME(arrange_kernel)(wd, u, dw, 0);
        NAME(arrange_kernel)(turned, u, dw, 1);
    }
    NAME(arrange_weights)(w, u, pw, pw2, 0);
    if (in_stat)
        NAME(affine)(in_a, in_b, in_stat, 1, u->C);
    memset(a, 0, 3 * K * sizeof(REAL));
    NAME(slopes)(a, b, c, stat, p, dot, sum, (double)u->N * u->OH * u->OW, u->K);
    memset(sums, 0, blocks * 2 * C * sizeof(double));
    memset(parts, 0, blocks * part * sizeof(REAL));
    int failed = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        char *own = room(1, (image + group * (2 * I + K) + (spread ? u->OH * width : 0) + 2 * u->W * C) * sizeof(REAL)
                            + 8 * 64);
        REAL *xp = take(&own, image, sizeof(REAL)), *z = take(&own, group * I, sizeof(REAL));
        REAL *dz = take(&own, group * I, sizeof(REAL)), *dy = take(&own, group * K, sizeof(REAL));
        REAL *row = take(&own, 2 * u->W * C, sizeof(REAL)), *dzp = take(&own, spread ? u->OH * width : 0, sizeof(REAL));
        if (xp) {
            memset(xp, 0, image * sizeof(REAL));
            memset(dzp, 0, (spread ? u->OH * width : 0) * sizeof(REAL));
        }
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            REAL *of_pw = parts + block * part, *of_dw = of_pw + K * I;
            double *of_x = in_stat ? sums + block * 2 * C : NULL;
            if (!xp) {
                failed = 1;
                continue;
            }
            for (int64_t n = block * u->N / blocks; n < (block + 1) * u->N / blocks; n++) {
                REAL *to = dx ? dx + n * u->H * u->W * u->ld : NULL;
                int64_t ready = 0, done = 0;  /* rows of xp, and of dx */
                for (int64_t oy = 0; oy < u->OH; oy += rows) {
                    int64_t count = MIN(rows, u->OH - oy), P = count * u->OW, first = (n * u->OH + oy) * u->OW;
                    ready = NAME(rectify)(xp, u, pad, x + n * u->H * u->W * u->ld, in_stat ? in_a : NULL, in_b, ready,
                                          oy + count < u->OH ? NEEDED(u, pad, oy + count) : u->H);
                    for (int64_t v = 0; v < K; v += L)  /* through BatchNorm */
                        for (int64_t i = 0; i < P; i++) {
                            const REAL *at_g = g + (first + i) * ldg + v, *at_y = y + (first + i) * u->K + v;
                            __builtin_prefetch(at_g + AHEAD * ldg);
                            __builtin_prefetch(at_y + AHEAD * u->K);
                            AT(dy + i * K + v) = READ(c + v) + READ(a + v) * NAME(load)(at_g, MAX(0, u->K - v))
                                                 + READ(b + v) * NAME(load)(at_y, MAX(0, u->K - v));
                        }
                    if (d_pw)
                        NAME(weight_gradient)(of_pw, dy, NAME(inner)(z, u, pad, xp, wd, oy, count), P, K, I);
                    if (dx || u->kind == DEPTHWISE)
                        NAME(multiply)(dz, dy, w, P, K, I);
                    for (int64_t r = oy; r < oy + count; r++) {
                        const REAL *of_z = dz + (r - oy) * u->OW * I;
                        if (u->kind == DEPTHWISE && d_pw) {
                            const REAL *from[LARGEST];
                            REAL *into[LARGEST];
                            int64_t taps = 0;
                            for (int64_t t = 0; t < u->kernel; t++) {
                                int64_t h = r * u->stride + t * u->dilation - pad;
                                if (h >= 0 && h < u->H) {
                                    from[taps] = xp + h * width;
                                    into[taps++] = of_dw + t * u->kernel * C;
                                }
                            }
                            NAME(kernel_gradient)(into, from, of_z, taps, C, u->OW, u->kernel, u->stride, u->dilation);
                        }
                        if (spread)  /* with zeros between the pixels if there is a stride */
                            for (int64_t i = 0; i < u->OW; i++)
                                memcpy(dzp + r * width + (pad + i * u->stride) * C, of_z + i * C, C * sizeof(REAL));
                        else if (dx && u->kind == POINTWISE)
                            NAME(emit)(to + r * u->W * u->ld, u->ld, of_z, xp + r * width, u->W, u->C, add, of_x);
                        else if (dx)
                            for (int64_t h = 2 * r; h < MIN(2 * r + 2, u->H); h++) {
                                memset(row, 0, u->W * C * sizeof(REAL));
                                for (int64_t i = h % 2; i < u->W; i += 2)
                                    memcpy(row + i * C, of_z + (i / 2) * I + h % 2 * C, C * sizeof(REAL));
                                NAME(emit)(to + h * u->W * u->ld, u->ld, row, xp + h * width, u->W, u->C, add, of_x);
                            }
                    }
                    /* rows of dx that no later row of z adds to */
                    int64_t until = oy + count < u->OH ? MIN(u->H, (oy + count) * u->stride - pad) : u->H;
                    for (; spread && done < until; done++) {
                        const REAL *from[LARGEST], *ws[LARGEST];
                        int64_t taps = 0;
                        for (int64_t t = 0; t < u->kernel; t++) {  /* of the turned kernel */
                            int64_t r = done - pad + t * u->dilation;
                            if (r >= 0 && r % u->stride == 0 && r / u->stride < u->OH) {
                                from[taps] = dzp + r / u->stride * width;
                                ws[taps++] = turned + t * u->kernel * C;
                            }
                        }
                        NAME(convolve)(row, from, ws, taps, C, u->W, u->kernel, 1, u->dilation);
                        NAME(emit)(to + done * u->W * u->ld, u->ld, row, xp + done * width + pad * C, u->W, u->C, add,
                                   of_x);
                    }
                }
            }
        }
    }
    if (failed)
        return 1;
    if (dx_sums)
        for (int64_t i = 0; i < 2 * u->C; i++) {
            dx_sums[i] = 0;
            for (int64_t block = 0; block < blocks; block++)
                dx_sums[i] += sums[block * 2 * C + i / u->C * C + i % u->C];
        }
    if (!d_pw)
        return 0;
    for (int64_t block = 1; block < blocks; block++)
        for (int64_t i = 0; i < part; i++)
            parts[i] += parts[block * part + i];
    for (int64_t o = 0; o < u->K; o++) {
        int64_t at;
        REAL *of = (REAL *)NAME(weights_of)(u, d_pw, d_pw2, o, &at);
        memcpy(of, parts + o * I + at, u->C * sizeof(REAL));
    }
    for (int64_t i = 0; u->kind == DEPTHWISE && i < u->C * size; i++)
        d_dw[i] = parts[K * I + i % size * C + i / size];
    return 0;
}

/* ---- Pools of 3x3 pixels ---- */

/* The first and one after the last of a window's 3 positions that lie inside, of output `o` at this stride. */
#define FROM(o, s) ((o) * (s) == 0)
#define UNTIL(o, s, size) MIN(3, (size) + 1 - (o) * (s))

/* Sum and maximum of n channels in rows `top` to `bottom` and columns `left` to `right` of the window at `corner`,
   whose rows and pixels are `row` and `ld` apart, and the place of the maximum. */
INLINE void NAME(window)(const REAL *corner, int64_t row, int64_t ld, const int64_t n, int64_t top, int64_t bottom,
                         const int64_t left, const int64_t right, V *all, V *maximum, M *where)
{
    V sum = {0}, best = (V){0} - (REAL)INFINITY;
    M place = (M){0} + (INT)(top * 3 + left);
    for (int64_t i = top; i < bottom; i++)
#pragma GCC unroll 3
        for (int64_t j = left; j < right; j++) {
            V value = NAME(load)(corner + i * row + j * ld, n);
            M better = (value > best) | (value != value);
            sum += value;
            best = (V)(((M)value & better) | ((M)best & ~better));
            place = ((INT)(i * 3 + j) & better) | (place & ~better);
        }
    *all = sum;
    *maximum = best;
    *where = place;
}

/* What reaches L channels of the pixel (h, w) of x from the averages and maxima of its windows, in which it is at rows
   `top` to `bottom` and columns `left` to `right`, in steps of s. Their gradients are `average` and `maximum`
   (OH, OW, C), and `which` are the places of the maxima. */
INLINE V NAME(from_windows)(const REAL *average, const REAL *maximum, const INT *which, int64_t C, int64_t OW,
                            int64_t h, int64_t w, int64_t top, int64_t bottom, const int64_t left,
                            const int64_t right, const int64_t s)
{
    V sum = {0};
    for (int64_t i = top; i < bottom; i += s)
#pragma GCC unroll 3
        for (int64_t j = left; j < right; j += s) {
            int64_t o = ((h + 1 - i) / s * OW + (w + 1 - j) / s) * C;
            sum += READ(average + o);
            sum += NAME(keep)(READ(maximum + o), *(const M *)(which + o) == (INT)(i * 3 + j));
        }
    return sum;
}

/* `average` and `maximum` (N, OH, OW, C) of x (N, H, W, C), with their records; `which` are the places 0 to 8 of the
   maxima in their windows, the first of several. Either of the two may be NULL. */
int NAME(pools_forward)(const struct unit *u, const REAL *x, REAL *average, double *average_stat, REAL *maximum,
                        int8_t *which, double *maximum_stat, int64_t threads)
{
    int64_t C = u->C, size = u->OH * u->OW, s = u->stride;
    char *shared = room(0, 2 * u->N * 2 * UP(C) * sizeof(double) + 2 * 64);
    if (!shared)
        return 1;
    double *parts = take(&shared, u->N * 2 * UP(C), sizeof(double));
    double *of_maximum = take(&shared, u->N * 2 * UP(C), sizeof(double));
    memset(parts, 0, u->N * 2 * UP(C) * sizeof(double));
    memset(of_maximum, 0, u->N * 2 * UP(C) * sizeof(double));
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t n = 0; n < u->N; n++)
        for (int64_t oy = 0; oy < u->OH; oy++) {
            int64_t first = n * size + oy * u->OW;
            for (int64_t ox = 0; ox < u->OW; ox++) {
                int64_t top = FROM(oy, s), bottom = UNTIL(oy, s, u->H), left = FROM(ox, s), right = UNTIL(ox, s, u->W);
                REAL share = (REAL)1 / ((bottom - top) * (right - left));
                const REAL *corner = x + ((n * u->H + oy * s - 1) * u->W + ox * s - 1) * u->ld;
                for (int64_t v = 0; v < C; v += L) {
                    V sum, best;
                    M where;
                    int64_t at = (first + ox) * C + v, n = MIN(L, C - v), row = u->W * u->ld;
                    __builtin_prefetch(corner + (row + AHEAD * u->ld) + v);
                    if (n == L && left == 0 && right == 3)
                        NAME(window)(corner + v, row, u->ld, L, top, bottom, 0, 3, &sum, &best, &where);
                    else
                        NAME(window)(corner + v, row, u->ld, n, top, bottom, left, right, &sum, &best, &where);
                    if (average)
                        NAME(store)(average + at, sum * share, n);
                    if (maximum) {
                        PLACES places = __builtin_convertvector(where, PLACES);
                        NAME(store)(maximum + at, best, n);
                        memcpy(which + at, &places, n);
                    }
                }
            }
            if (average && average_stat)
                NAME(observe)(parts + n * 2 * UP(C), oy * u->OW, average + first * C, C, u->OW, C);
            if (maximum && maximum_stat)
                NAME(observe)(of_maximum + n * 2 * UP(C), oy * u->OW, maximum + first * C, C, u->OW, C);
        }
    if (average && average_stat)
        NAME(conclude)(average_stat, parts, u->N, size, C, u->eps);
    if (maximum && maximum_stat)
        NAME(conclude)(maximum_stat, of_maximum, u->N, size, C, u->eps);
    return 0;
}

/* What all edges out of a state x share, backwards: for E edges whose sums have the gradients g[e], pixels ldg apart,
   and which hold p[3e] BatchNorm(average), p[3e+1] BatchNorm(maximum) and p[3e+2] x, dL/dx is added to dx (N, H, W, C),
   laid out as x. dots[2e], dots[2e+1] and sums[e] are what `dots` gives of the pools and g[e]; dots is NULL by running
   statistics. average or maximum may be NULL. */
int NAME(pools_backward)(const struct unit *u, const REAL *average, const double *average_stat, const REAL *maximum,
                         const int8_t *which, const double *maximum_stat, int64_t E, const double *p,
                         const REAL *const *g, int64_t ldg, const double *const *dots, const double *const *sums,
                         REAL *dx, int64_t threads)
{
    int64_t C = UP(u->C), size = u->OH * u->OW, s = u->stride;
    char *shared = room(0, 2 * (E + 2) * C * sizeof(REAL) + 2 * 64);
    if (!shared)
        return 1;
    /* of both pools: a of every edge, then b and c */
    REAL *slopes[2] = {take(&shared, (E + 2) * C, sizeof(REAL)), take(&shared, (E + 2) * C, sizeof(REAL))};
    const REAL *maps[2] = {average, maximum};
    const double *stats[2] = {average_stat, maximum_stat};
    for (int kind = 0; kind < 2; kind++) {
        memset(slopes[kind], 0, (E + 2) * C * sizeof(REAL));
        for (int64_t e = 0; maps[kind] && e < E; e++)
            NAME(slopes)(slopes[kind] + e * C, slopes[kind] + E * C, slopes[kind] + (E + 1) * C, stats[kind],
                         p[3 * e + kind], dots ? dots[2 * e + kind] : NULL, sums ? sums[e] : NULL,
                         (double)u->N * size, u->C);
    }
    int failed = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        char *own = room(1, 3 * size * C * sizeof(REAL) + 3 * 64);
        REAL *grads[2] = {take(&own, size * C, sizeof(REAL)), take(&own, size * C, sizeof(REAL))};
        INT *places = take(&own, size * C, sizeof(INT));
        if (grads[0]) {  /* one of the pools may not be there */
            memset(grads[0], 0, size * C * sizeof(REAL));
            memset(grads[1], 0, size * C * sizeof(REAL));
            memset(places, 0, size * C * sizeof(INT));
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < u->N; n++) {
            if (!grads[0]) {
                failed = 1;
                continue;
            }
            for (int64_t i = 0; i < size; i++) {  /* through BatchNorm */
                int64_t oy = i / u->OW, ox = i % u->OW, at = n * size + i;
                int64_t seen = (UNTIL(oy, s, u->H) - FROM(oy, s)) * (UNTIL(ox, s, u->W) - FROM(ox, s));
                for (int64_t v = 0; v < u->C; v += L)
                    for (int kind = 0; kind < 2; kind++) {
                        const REAL *of = slopes[kind] + v, *map = maps[kind] ? maps[kind] + at * u->C + v : NULL;
                        if (!map)
                            continue;
                        __builtin_prefetch(map + AHEAD * u->C);
                        V sum = READ(of + E * C) * NAME(load)(map, u->C - v) + READ(of + (E + 1) * C);
                        for (int64_t e = 0; e < E; e++)
                            sum += READ(of + e * C) * NAME(load)(g[e] + at * ldg + v, u->C - v);
                        AT(grads[kind] + i * C + v) = kind ? sum : sum / (REAL)seen;
                    }
                for (int64_t c = 0; maximum && c < u->C; c++)
                    places[i * C + c] = which[at * u->C + c];
                for (int64_t e = 0; e < E; e++)
                    for (int64_t v = 0; v < u->C; v += L)
                        __builtin_prefetch(g[e] + (at + AHEAD) * ldg + v);
            }
            for (int64_t h = 0; h < u->H; h++)
                for (int64_t w = 0; w < u->W; w++) {
                    int64_t at = (n * u->H + h) * u->W + w, top = MAX((h + 1) % s, h + 1 - s * (u->OH - 1));
                    int64_t left = MAX((w + 1) % s, w + 1 - s * (u->OW - 1));
                    int64_t bottom = MIN(3, h + 2), right = MIN(3, w + 2);
                    for (int64_t v = 0; v < u->C; v += L) {
                        int64_t all = MIN(L, u->C - v);
                        __builtin_prefetch(dx + (at + AHEAD) * u->ld + v, 1);
                        V sum = NAME(load)(dx + at * u->ld + v, all);
                        for (int64_t e = 0; s == 1 && e < E; e++)
                            sum += (REAL)p[3 * e + 2] * NAME(load)(g[e] + at * ldg + v, all);
                        if (s == 1 && left == 0 && right == 3)
                            sum += NAME(from_windows)(grads[0] + v, grads[1] + v, places + v, C, u->OW, h, w, top,
                                                      bottom, 0, 3, 1);
                        else
                            sum += NAME(from_windows)(grads[0] + v, grads[1] + v, places + v, C, u->OW, h, w, top,
                                                      bottom, left, right, s);
                        NAME(store)(dx + at * u->ld + v, sum, all);
                    }
                }
        }
    }
    return failed;
}

/* ---- Equations 1 and 2 ---- */

/* out = sum over m of p[m] BatchNorm(maps[m]) for P pixels of C channels, which are lds[m] and ldo apart: a node, from
   all operations on all edges into it. A map without a record is taken as it is. */
int NAME(combine)(int64_t P, int64_t C, int64_t count, const REAL *const *maps, const int64_t *lds,
                  const double *const *stats, const double *p, REAL *out, int64_t ldo, int64_t threads)
{
    char *shared = room(0, (count + 1) * 2 * UP(C) * sizeof(REAL) + 64);
    if (!shared)
        return 1;
    REAL *a = take(&shared, (count + 1) * 2 * UP(C), sizeof(REAL)), *b = a + count * UP(C), *all = b + count * UP(C);
    memset(all, 0, UP(C) * sizeof(REAL));
    for (int64_t m = 0; m < count; m++) {
        NAME(affine)(a + m * UP(C), b + m * UP(C), stats[m], p[m], C);
        for (int64_t c = 0; c < C; c++)
            all[c] += b[m * UP(C) + c];
    }
    int64_t chunk = MAX(1, CHUNK / (C * (int64_t)sizeof(REAL)));
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t first = 0; first < P; first += chunk)
        for (int64_t m = 0; m < MAX(count, 1); m += 2)
            for (int64_t v = 0; v < C; v += L) {
                int64_t left = C - v, end = MIN(P, first + chunk);
                int one = m < count, two = m + 1 < count;
                V a0 = one ? READ(a + m * UP(C) + v) : (V){0}, a1 = two ? READ(a + (m + 1) * UP(C) + v) : (V){0};
                const REAL *y0 = one ? maps[m] : out, *y1 = two ? maps[m + 1] : y0;
                int64_t ld0 = one ? lds[m] : ldo, ld1 = two ? lds[m + 1] : ld0;
                for (int64_t i = first; i < end; i++) {
                    __builtin_prefetch(y0 + (i + AHEAD) * ld0 + v);
                    __builtin_prefetch(y1 + (i + AHEAD) * ld1 + v);
                    V sum = m ? NAME(load)(out + i * ldo + v, left) : READ(all + v);
                    if (one)
                        sum += a0 * NAME(load)(y0 + i * ld0 + v, left);
                    if (two)
                        sum += a1 * NAME(load)(y1 + i * ld1 + v, left);
                    NAME(store)(out + i * ldo + v, sum, left);
                }
            }
    return 0;
}

/* For the gradient g of such a sum: dots (count + 1, C) become sum g BatchNorm(maps[m]), and, last, sum g. dL/dp[m] is
   the sum of a row. */
int NAME(dots)(int64_t P, int64_t C, int64_t count, const REAL *const *maps, const int64_t *lds,
               const double *const *stats, const REAL *g, int64_t ldg, double *dots, int64_t threads)
{
    int64_t chunk = MAX(1, CHUNK / (C * (int64_t)sizeof(REAL)));
    int64_t parts = MIN(PARTS, (P + chunk - 1) / chunk), size = (count + 1) * UP(C);
    char *shared = room(0, 2 * size * sizeof(REAL) + parts * size * sizeof(double) + 3 * 64);
    if (!shared)
        return 1;
    REAL *a = take(&shared, size, sizeof(REAL)), *b = take(&shared, size, sizeof(REAL));
    double *sums = take(&shared, parts * size, sizeof(double));
    for (int64_t m = 0; m < count; m++)
        NAME(affine)(a + m * UP(C), b + m * UP(C), stats[m], 1, C);
    memset(sums, 0, parts * size * sizeof(double));
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t first = part * P / parts; first < (part + 1) * P / parts; first += chunk)
            for (int64_t m = 0; m <= count; m++)
                for (int64_t v = 0; v < C; v += L) {
                    int64_t left = C - v, i = first, end = MIN((part + 1) * P / parts, first + chunk);
                    V sum[4] = {{0}};
                    if (m < count) {
                        V slope = READ(a + m * UP(C) + v), shift = READ(b + m * UP(C) + v);
                        for (; i + 4 <= end; i += 4)
#pragma GCC unroll 4
                            for (int j = 0; j < 4; j++) {
                                __builtin_prefetch(maps[m] + (i + j + AHEAD) * lds[m] + v);
                                sum[j] += NAME(load)(g + (i + j) * ldg + v, left)
                                          * (slope * NAME(load)(maps[m] + (i + j) * lds[m] + v, left) + shift);
                            }
                        for (; i < end; i++)
                            sum[0] += NAME(load)(g + i * ldg + v, left)
                                      * (slope * NAME(load)(maps[m] + i * lds[m] + v, left) + shift);
                    } else
                        for (; i < end; i++)
                            sum[0] += NAME(load)(g + i * ldg + v, left);
                    sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
                    for (int64_t c = 0; c < MIN(L, left); c++)
                        sums[part * size + m * UP(C) + v + c] += sum[0][c];
                }
    for (int64_t m = 0; m <= count; m++)
        for (int64_t c = 0; c < C; c++) {
            double sum = 0;
            for (int64_t part = 0; part < parts; part++)
                sum += sums[part * size + m * UP(C) + c];
            dots[m * C + c] = sum;
        }
    return 0;
}

#include "evaluate.c"

#undef V
#undef U
#undef M
#undef PLACES
#undef L
#undef UP
#undef AT
#undef READ
#undef PAD
#undef ROWS
#undef FROM
#undef UNTIL
#undef REAL
#undef INT
#undef BYTES
#undef NAME
#endif
