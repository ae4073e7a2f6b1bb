/* Equations 1 and 2 of DARTS: sums over the operations on all edges into a node, and gradients w.r.t. alphas.

   A part of kernels.c, which includes it once for each type and width. */

/* out = sum over m of p[m] BatchNorm(maps[m]) for P pixels of C channels, which are lds[m] and ldo apart: a node, from
   all operations on all edges into it. A map without a record is taken as it is. */
int NAME(combine)(int64_t P, int64_t C, int64_t count, const REAL *const *maps, const int64_t *lds,
                  const double *const *stats, const double *p, REAL *out, int64_t ldo, int64_t threads)
{
    char *shared = room((count + 1) * 2 * UP(C) * sizeof(REAL) + 64);
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
                int64_t left = C - v, end = MIN(P, first + chunk), one = m < count, two = m + 1 < count;
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
    char *shared = room(2 * size * sizeof(REAL) + parts * size * sizeof(double) + 3 * 64);
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
                            EACH(j, 4, 4) {
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
