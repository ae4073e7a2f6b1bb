/* Evaluation of a supernet: all operations on all edges out of a state, whose BatchNorms are folded into the weights.

   A part of kernels.c, which includes it once for each type and width. A state goes through the cache once, image by
   image, and nothing of it is kept. */
#ifndef STEPS
#define STEPS

/* One operation, or PLAIN ones together. `to` is the first channel of the node that it adds to; w are places in
   `weights`, in which channels are padded as by UP:
     DEPTHWISE    y += pw(dw(relu(x)))                      w = dw (k, k, C), pw (C, K)
     POINTWISE    y += pw(relu(x))                          w = -, pw (C, K)
     HALVES       y += pw(z), z as of a unit                w = -, pw (2C, K)
     SEPARABLE    y += pw2(dw2(relu(shift + pw(dw(relu(x))))))      w = dw, pw, shift (C,), dw2, pw2
     PLAIN        y += a x + b average(x) + c maximum(x)    w = a, b, c (C,), or -1 where there is no such operation
   The shifts of all operations, but for the one halfway, are in y from the start. */
enum { SEPARABLE = 3, PLAIN };
struct step {
    int64_t kind, kernel, dilation, to, w[5];
};
#endif

/* The larger of both; NaN wins. */
INLINE V NAME(larger)(V a, V b)
{
    M other = (b > a) | (b != b);
    return (V)(((M)b & other) | ((M)a & ~other));
}

/* A row (OW, C) of both pools of x (H, W, C), 3x3 pixels; `columns` (2, W + 2, C) is for sums and maxima of three. */
static void NAME(pool_row)(REAL *average, REAL *maximum, REAL *columns, const struct unit *u, const REAL *x, int64_t oy)
{
    int64_t C = UP(u->C), s = u->stride, top = MAX(0, oy * s - 1), bottom = MIN(u->H, oy * s + 2), W = u->W;
    REAL *sums = columns, *highest = columns + (W + 2) * C;
    for (int64_t v = 0; v < u->C; v += L) {
        int64_t left = u->C - v;
        for (int64_t edge = 0; edge < 2; edge++) {
            AT(sums + edge * (W + 1) * C + v) = (V){0};
            AT(highest + edge * (W + 1) * C + v) = (V){0} - (REAL)INFINITY;
        }
        for (int64_t w = 0; w < W; w++) {
            V sum = {0}, best = (V){0} - (REAL)INFINITY;
            for (int64_t h = top; h < bottom; h++) {
                V value = NAME(load)(x + (h * W + w) * u->ld + v, left);
                sum += value;
                best = NAME(larger)(best, value);
            }
            AT(sums + (w + 1) * C + v) = sum;
            AT(highest + (w + 1) * C + v) = best;
        }
        for (int64_t o = 0; o < u->OW; o++) {
            const REAL *at = sums + o * s * C + v, *of = highest + o * s * C + v;
            REAL share = (REAL)1 / ((bottom - top) * (MIN(W, o * s + 2) - MAX(0, o * s - 1)));
            AT(average + o * C + v) = (READ(at) + READ(at + C) + READ(at + 2 * C)) * share;
            AT(maximum + o * C + v) = NAME(larger)(NAME(larger)(READ(of), READ(of + C)), READ(of + 2 * C));
        }
    }
}

/* What a PLAIN step adds to a row y of its node: `count` maps, of which `left` channels remain, times their scales. */
INLINE void NAME(plain_row)(REAL *y, int64_t ldy, const REAL *const *maps, const int64_t *lds, const V *scales,
                            int64_t OW, int64_t left, const int count)
{
    for (int64_t o = 0; o < OW; o++) {
        V sum = NAME(load)(y + o * ldy, left);
        EACH(m, count, 3)
            sum += scales[m] * NAME(load)(maps[m] + o * lds[m], left);
        NAME(store)(y + o * ldy, sum, left);
    }
}

static void NAME(plain)(REAL *y, int64_t ldy, const struct unit *u, const struct step *step, const REAL *weights,
                        const REAL *x, const REAL *average, const REAL *maximum)
{
    const REAL *all[3] = {x, average, maximum};
    for (int64_t v = 0; v < u->C; v += L) {
        const REAL *maps[3] = {0};
        int64_t lds[3] = {0}, count = 0, full = v + L <= u->C;
        V scales[3] = {{0}};
        for (int m = 0; m < 3; m++)
            if (step->w[m] >= 0) {
                maps[count] = all[m] + v;
                lds[count] = m ? UP(u->C) : u->ld;
                scales[count++] = READ(weights + step->w[m] + v);
            }
        if (full && count == 3)
            NAME(plain_row)(y + v, ldy, maps, lds, scales, u->OW, L, 3);
        else if (full && count == 2)
            NAME(plain_row)(y + v, ldy, maps, lds, scales, u->OW, L, 2);
        else
            for (int m = 0; m < count; m++)
                NAME(plain_row)(y + v, ldy, maps + m, lds + m, scales + m, u->OW, u->C - v, 1);
    }
}

/* Add to y (N, OH, OW, K), whose pixels are ldy apart, what `count` steps make of a state x (N, H, W, C), u: all have
   its stride, and C == K but for POINTWISE and HALVES. */
int NAME(evaluate)(const struct unit *u, const REAL *x, int64_t count, const struct step *steps, const REAL *weights,
                   REAL *y, int64_t ldy, int64_t threads)
{
    int64_t C = UP(u->C), inset = 0, halfway = 0, plain = 0, rows = ROWS(u), OW = u->OW;
    for (const struct step *step = steps; step < steps + count; step++) {
        int64_t pad = (step->kernel - 1) * step->dilation / 2;
        plain += step->kind == PLAIN;
        inset = MAX(inset, step->kind == DEPTHWISE || step->kind == SEPARABLE ? pad : 0);
        halfway = MAX(halfway, step->kind == SEPARABLE ? pad : 0);
    }
    int64_t width = (u->W + 2 * inset) * C, image = u->H * width, pools = (2 * OW + 2 * (u->W + 2)) * C;
    int64_t width2 = (OW + 2 * halfway) * C, image2 = u->OH * width2;
    int64_t each = ((image + image2 + 2 * rows * OW * C + pools) * sizeof(REAL) + 8 * 64) / 64 * 64;
    char *shared = room(threads * each);
    if (!shared)
        return 1;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        char *own = own_part(shared, each);
        REAL *xp = take(&own, image, sizeof(REAL)), *half = take(&own, image2, sizeof(REAL));
        REAL *z = take(&own, 2 * rows * OW * C, sizeof(REAL)), *average = take(&own, pools, sizeof(REAL));
        REAL *maximum = average + OW * C, *columns = maximum + OW * C;
        memset(xp, 0, image * sizeof(REAL));
        memset(half, 0, image2 * sizeof(REAL));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < u->N; n++) {
            const REAL *from = x + n * u->H * u->W * u->ld;
            REAL *to = y + n * u->OH * OW * ldy;
            if (plain < count)
                NAME(rectify)(xp, u, inset, from, NULL, NULL, 0, u->H);
            for (int64_t oy = 0; plain && oy < u->OH; oy++) {
                NAME(pool_row)(average, maximum, columns, u, from, oy);
                for (const struct step *step = steps; step < steps + count; step++)
                    if (step->kind == PLAIN)
                        NAME(plain)(to + oy * OW * ldy + step->to, ldy, u, step, weights, from + oy * u->W * u->ld,
                                    average, maximum);
            }
            for (const struct step *step = steps; step < steps + count; step++) {
                int64_t k = step->kernel, d = step->dilation, I = u->C, ldz = C, done = 0;
                const REAL *dw = weights + step->w[0];
                for (int64_t oy = 0; step->kind != PLAIN && oy < u->OH; oy += rows) {
                    int64_t now = MIN(rows, u->OH - oy);
                    const REAL *of = z, *pw = weights + step->w[step->kind == SEPARABLE ? 4 : 1];
                    if (step->kind == SEPARABLE) {  /* rows of the map halfway, as far as these rows need them */
                        while (done < MIN(u->OH, oy + now + (k - 1) * d / 2)) {
                            NAME(depthwise)(z, xp, u->H, width, inset, dw, C, done, 1, OW, k, u->stride, d);
                            NAME(mix)(half + done * width2 + halfway * C, C, weights + step->w[2], 0, z, C,
                                      weights + step->w[1], OW, u->C, u->C, 1, 0);
                            done++;
                        }
                        NAME(depthwise)(z, half, u->OH, width2, halfway, weights + step->w[3], C, oy, now, OW, k, 1, d);
                    } else if (step->kind == DEPTHWISE)
                        NAME(depthwise)(z, xp, u->H, width, inset, dw, C, oy, now, OW, k, u->stride, d);
                    else if (step->kind == HALVES) {
                        I = ldz = 2 * u->C;
                        NAME(halves)(z, u, xp + inset * C, width, u->C, oy, now);
                    } else if (inset)
                        for (int64_t r = oy; r < oy + now; r++)
                            memcpy(z + (r - oy) * OW * C, xp + r * width + inset * C, OW * C * sizeof(REAL));
                    else
                        of = xp + oy * width;
                    REAL *into = to + oy * OW * ldy + step->to;
                    NAME(mix)(into, ldy, into, ldy, of, ldz, pw, now * OW, I, u->K, 0, 0);
                }
            }
        }
    }
    return 0;
}
