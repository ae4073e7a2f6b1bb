/* Calls every kernel of conas/engine/native/ over odd shapes, for a build that checks bounds; test_native_bounds.py
   makes and runs it.

   Every map, and every piece of a kernel's own memory, is a block of its own and exactly as long as the kernel is told,
   so that a sanitizer sees the first number beyond it. What a kernel may not read is NaN: results must be finite.

       native_bounds          all cases
       native_bounds 1        the same, with `planted` = 1, which the test puts into a loop's end */
#ifndef REAL
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int64_t planted = 0;
static long calls = 0, bad = 0;
static void *blocks[4096], *pieces[64];
static int block_count = 0, piece_count = 0;

static void *block(int64_t bytes)
{
    void *found = NULL;
    if (posix_memalign(&found, 64, bytes ? bytes : 1))
        abort();
    memset(found, 0xff, bytes);  /* NaN in both types */
    return found;
}

static void *kept(int64_t bytes) { return blocks[block_count++] = block(bytes); }

static void forget(void)
{
    while (block_count)
        free(blocks[--block_count]);
}

/* In place of those of kernels.c: what `take` gives is a block of its own until `room` is asked again. */
#define OWN_ROOM
static void *room(int64_t bytes)
{
    (void)bytes;
    while (piece_count)
        free(pieces[--piece_count]);
    return pieces;
}

static void *take(char **free, int64_t count, int64_t size)
{
    (void)free;
    return pieces[piece_count++] = block(count * size);
}

#include "kernels.c"

static double *doubles(int64_t count, double low)
{
    double *found = kept(count * sizeof(double));
    for (int64_t i = 0; i < count; i++)
        found[i] = low + (i % 7) * 0.25;
    return found;
}

static const int64_t SIDES[][3] = {{1, 1, 1}, {1, 5, 3}, {2, 4, 7}, {3, 9, 2}, {1, 2, 33}};  /* N, H, W */

#define REAL float
#define NAME(f) f##_float
#define WIDE 1
#include __FILE__
#ifdef __AVX512F__
#define REAL float
#define NAME(f) f##_float_wide
#define WIDE 16  /* what channels of outputs are multiples of */
#include __FILE__
#endif
#define REAL double
#define NAME(f) f##_double
#define WIDE 1
#include __FILE__

int main(int count, char **arguments)
{
    planted = count > 1 ? atoi(arguments[1]) : 0;
    all_float();
#ifdef __AVX512F__
    all_float_wide();
#endif
    all_double();
    printf("%ld calls, %ld results not finite\n", calls, bad);
    return bad > 0;
}

#else /* the cases of one type and width */

static REAL *NAME(numbers)(int64_t count)
{
    REAL *found = kept(count * sizeof(REAL));
    for (int64_t i = 0; i < count; i++)
        found[i] = (REAL)((i * 37 % 23) - 11) / 8;
    return found;
}

static int64_t NAME(length)(int64_t pixels, int64_t channels, int64_t ld) { return (pixels - 1) * ld + channels; }

/* A map (pixels, channels), whose pixels are `ld` apart; not aligned if `off`. */
static REAL *NAME(map)(int64_t pixels, int64_t channels, int64_t ld, int off)
{
    return NAME(numbers)(NAME(length)(pixels, channels, ld) + off) + off;
}

static REAL *NAME(empty)(int64_t count, int off) { return (REAL *)kept((count + off) * sizeof(REAL)) + off; }

static void NAME(check)(const REAL *found, int64_t pixels, int64_t channels, int64_t ld)
{
    for (int64_t i = 0; found && i < pixels; i++)
        for (int64_t c = 0; c < channels; c++)
            bad += !isfinite((double)found[i * ld + c]);
}

static void NAME(units)(struct unit u, int off)
{
    int64_t pixels = u.N * u.OH * u.OW, inputs = u.N * u.H * u.W, half = u.kind == HALVES ? u.K / 2 : u.K;
    REAL *x = NAME(map)(inputs, u.C, u.ld, off);
    REAL *dw = u.kind == DEPTHWISE ? NAME(numbers)(u.C * u.kernel * u.kernel) : NULL, *pw = NAME(numbers)(half * u.C);
    REAL *pw2 = u.kind == HALVES ? NAME(numbers)((u.K - half) * u.C) : NULL, *y = NAME(empty)(pixels * u.K, off);
    REAL *d_dw = dw ? NAME(empty)(u.C * u.kernel * u.kernel, 0) : NULL, *d_pw = NAME(empty)(half * u.C, 0);
    REAL *d_pw2 = pw2 ? NAME(empty)((u.K - half) * u.C, 0) : NULL;
    double *stat = kept(5 * u.K * sizeof(double)), *in_stat = doubles(5 * u.C, 0.5), *dot = doubles(u.K, -1);
    double *sum = doubles(u.K, -0.5), *running = doubles(5 * u.K, 0.5), *dx_sums = kept(2 * u.C * sizeof(double));
    double *shares = doubles(u.N, 0.5);
    memcpy(stat, running, 5 * u.K * sizeof(double));
    for (int normalised = 0; normalised < 2; normalised++) {
        bad += NAME(unit_forward)(&u, x, normalised ? in_stat : NULL, dw, pw, pw2, y, normalised ? stat : NULL, 1);
        NAME(check)(y, pixels, u.K, u.K);
        calls++;
    }
    for (int64_t i = 0; i < 5 * u.K; i++)
        bad += !isfinite(stat[i]);
    for (int way = 0; way < 6; way++) {  /* normalised, all; added; for the alphas; weights alone; running; all */
        int64_t ldg = u.K + (way % 2 ? 3 : 0);
        REAL *g = NAME(map)(pixels, u.K, ldg, off), *dx = way == 3 ? NULL : NAME(map)(inputs, u.C, u.ld, off);
        int weights = way != 2, of_x = way == 0, by_batch = way != 4;
        bad += NAME(unit_backward)(&u, x, of_x ? in_stat : NULL, dw, pw, pw2, y, by_batch ? stat : running, 0.75,
                                   way % 2 ? shares : NULL, g, ldg, by_batch ? dot : NULL, by_batch ? sum : NULL, dx,
                                   way == 1, of_x ? dx_sums : NULL, weights ? d_dw : NULL,
                                   weights ? d_pw : NULL, weights ? d_pw2 : NULL, 1);
        NAME(check)(dx, inputs, u.C, u.ld);
        NAME(check)(weights ? d_pw : NULL, 1, half * u.C, 1);
        NAME(check)(weights ? d_pw2 : NULL, 1, (u.K - half) * u.C, 1);
        NAME(check)(weights ? d_dw : NULL, 1, u.C * u.kernel * u.kernel, 1);
        for (int64_t i = 0; of_x && i < 2 * u.C; i++)
            bad += !isfinite(dx_sums[i]);
        calls++;
    }
    forget();
}

static void NAME(pools)(struct unit u, int off)
{
    int64_t pixels = u.N * u.OH * u.OW, inputs = u.N * u.H * u.W, E = 2, ldg = u.C + 1;
    const REAL *g[2] = {NAME(map)(pixels, u.C, ldg, off), NAME(map)(pixels, u.C, ldg, off)};
    const double *dots[4] = {doubles(u.C, 0), doubles(u.C, 1), doubles(u.C, 2), doubles(u.C, 3)};
    const double *sums[2] = {doubles(u.C, 0), doubles(u.C, -1)};
    REAL *x = NAME(map)(inputs, u.C, u.ld, off);
    for (int which = 1; which < 4; which++) {  /* one of the pools, the other, both */
        REAL *average = which & 1 ? NAME(empty)(pixels * u.C, off) : NULL;
        REAL *maximum = which & 2 ? NAME(empty)(pixels * u.C, off) : NULL, *dx = NAME(map)(inputs, u.C, u.ld, off);
        int8_t *places = kept(pixels * u.C);
        double *first = doubles(5 * u.C, 0.5), *second = doubles(5 * u.C, 0.5), *p = doubles(3 * E, 0.1);
        bad += NAME(pools_forward)(&u, x, average, which == 3 ? NULL : first, maximum, places, second, 1);
        NAME(check)(average, pixels, u.C, u.C);
        NAME(check)(maximum, pixels, u.C, u.C);
        for (int by_batch = 0; by_batch < 2; by_batch++)
            bad += NAME(pools_backward)(&u, average, first, maximum, places, second, E, p, g, ldg,
                                        by_batch ? dots : NULL, by_batch ? sums : NULL, dx, 1);
        NAME(check)(dx, inputs, u.C, u.ld);
        calls += 3;
    }
    forget();
}

static void NAME(sums)(int64_t N, int64_t P, int64_t C, int off)
{
    const REAL *maps[3];
    int64_t lds[3] = {C, C + 3, 4 * C}, ldo = C + 2;
    const double *stats[3] = {doubles(5 * C, 0.5), NULL, doubles(5 * C, 0.75)}, *p = doubles(3 * N, 0.2);
    for (int m = 0; m < 3; m++)
        maps[m] = NAME(map)(N * P, C, lds[m], off);
    for (int64_t count = 0; count < 4; count++) {
        REAL *out = NAME(empty)(NAME(length)(N * P, C, ldo), off);
        double *dots = kept((count + 1) * C * sizeof(double));
        if (count) {
            bad += NAME(combine)(N, P, C, count, maps, lds, stats, p, out, ldo, 1);
            NAME(check)(out, N * P, C, ldo);
        }
        bad += NAME(dots)(N, P, C, count, maps, lds, stats, N > 1 ? p : NULL, maps[1], lds[1], dots, 1);
        for (int64_t i = 0; i < (count + 1) * C; i++)
            bad += !isfinite(dots[i]);
        calls += 2;
    }
    forget();
}

/* A piece of weights, aligned as evaluate.c has them. */
static int64_t NAME(put)(int64_t *used, int64_t rows, int64_t channels)
{
    int64_t at = *used;
    *used += (rows * ((channels + 7) / 8 * 8) + 15) / 16 * 16;
    return at;
}

static void NAME(steps)(struct unit u, int64_t k, int64_t d, int off)
{
    int64_t used = 0, count = 0, ldy = 2 * u.K + 1, pixels = u.N * u.OH * u.OW, to = u.K + 1;
    struct step steps[5];
#define STEP(KIND, ...) steps[count++] = (struct step){KIND, k, d, count % 2 ? to : 0, {__VA_ARGS__}}
#define PUT(rows, channels) NAME(put)(&used, rows, channels)
    if (u.kind == HALVES)
        STEP(HALVES, -1, PUT(2 * u.C, u.K), -1, -1, -1);
    else if (u.C != u.K || k == 0)
        STEP(POINTWISE, -1, PUT(u.C, u.K), -1, -1, -1);
    else {
        int64_t a[8];  /* in the order in which they lie */
        for (int i = 0; i < 8; i++)
            a[i] = PUT(i == 0 || i == 2 || i == 5 ? k * k : i == 4 ? 1 : u.C, u.C);
        STEP(DEPTHWISE, a[0], a[1], -1, -1, -1);
        STEP(SEPARABLE, a[2], a[3], a[4], a[5], a[6]);
        STEP(PLAIN, u.stride == 1 ? PUT(1, u.C) : -1, PUT(1, u.C), PUT(1, u.C), -1, -1);
        STEP(PLAIN, -1, -1, PUT(1, u.C), -1, -1);
    }
    REAL *weights = NAME(numbers)(used), *y = NAME(numbers)(NAME(length)(pixels, to + u.K, ldy) + off) + off;
    bad += NAME(evaluate)(&u, NAME(map)(u.N * u.H * u.W, u.C, u.ld, off), count, steps, weights, y, ldy, 1);
    NAME(check)(y, pixels, to + u.K, ldy);
    calls++;
    forget();
}

static void NAME(all)(void)
{
    static const int64_t CHANNELS[] = {WIDE, 3 * WIDE, WIDE == 1 ? 8 : 32, WIDE == 1 ? 13 : 48};
    static const int64_t KERNELS[][2] = {{1, 1}, {3, 1}, {3, 2}, {5, 1}, {5, 2}, {7, 1}, {3, 3}, {15, 1}};
    for (int i = 0; i < 4; i++)
        for (int side = 0; side < 5; side++) {
            int off = (i + side) % 2;
            int64_t K = CHANNELS[i], N = SIDES[side][0], H = SIDES[side][1], W = SIDES[side][2];
            for (int64_t s = 1; s < 3; s++) {
                int64_t OH = (H + s - 1) / s, OW = (W + s - 1) / s, ld = K * (1 + 3 * (side % 2));
                for (int kernel = 0; kernel < 8; kernel++)
                    if ((kernel + i + side) % 2 || kernel < 2) {
                        int64_t k = KERNELS[kernel][0], d = KERNELS[kernel][1];
                        struct unit u = {N, H, W, K, ld, OH, OW, K, DEPTHWISE, k, s, d, 1e-5};
                        NAME(units)(u, off);
                        NAME(steps)(u, k, d, off);
                    }
                NAME(pools)((struct unit){N, H, W, K, ld, OH, OW, K, 0, 3, s, 1, 1e-5}, off);
            }
            for (int64_t C = 1; C < 20; C += 6) {
                struct unit u = {N, H, W, C, C + side, H, W, K, POINTWISE, 0, 1, 1, 1e-5};
                NAME(units)(u, off);
                NAME(steps)(u, 1, 1, off);
                u.kind = HALVES, u.stride = 2, u.OH = (H + 1) / 2, u.OW = (W + 1) / 2;
                if (K > 1) {
                    NAME(units)(u, off);
                    NAME(steps)(u, 1, 1, off);
                }
            }
            NAME(sums)(N, H * W, K, off);
        }
    for (int64_t N = 1; N < 3; N++)
        NAME(sums)(N, WIDE == 1 ? 6000 : 700, WIDE == 1 ? 3 : 48, 1);  /* several chunks */
}

#undef STEP
#undef PUT
#undef REAL
#undef NAME
#undef WIDE
#endif
