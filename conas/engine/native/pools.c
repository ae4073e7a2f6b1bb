/* Average and max pooling over windows of 3x3 pixels, with the sums for BatchNorm, and their gradients.

   A part of kernels.c, which includes it once for each type and width. */

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
    REAL *maps[2] = {average, maximum};
    double *stats[2] = {average_stat, maximum_stat};
    char *shared = room(u->N * 4 * UP(C) * sizeof(double) + 64);
    if (!shared)
        return 1;
    double *parts = take(&shared, u->N * 4 * UP(C), sizeof(double));  /* of both pools, image by image */
    memset(parts, 0, u->N * 4 * UP(C) * sizeof(double));
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
            for (int kind = 0; kind < 2; kind++)
                if (maps[kind] && stats[kind])
                    NAME(observe)(parts + (kind * u->N + n) * 2 * UP(C), oy * u->OW, maps[kind] + first * C, C,
                                  u->OW, C);
        }
    for (int kind = 0; kind < 2; kind++)
        if (maps[kind] && stats[kind])
            NAME(conclude)(stats[kind], parts + kind * u->N * 2 * UP(C), u->N, size, C, u->eps);
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
    int64_t each = (2 * size * C * sizeof(REAL) + size * C * sizeof(INT) + 4 * 64) / 64 * 64;
    char *shared = room(2 * (E + 2) * C * sizeof(REAL) + 3 * 64 + threads * each);
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
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        char *own = own_part(shared, each);
        REAL *grads[2] = {take(&own, size * C, sizeof(REAL)), take(&own, size * C, sizeof(REAL))};
        INT *places = take(&own, size * C, sizeof(INT));
        memset(grads[0], 0, size * C * sizeof(REAL));  /* one of the pools may not be there */
        memset(grads[1], 0, size * C * sizeof(REAL));
        memset(places, 0, size * C * sizeof(INT));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < u->N; n++) {
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
    return 0;
}
