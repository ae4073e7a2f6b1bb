/* Equations 1 and 2 of DARTS: sums over the operations on all edges into a node, and gradients w.r.t. alphas.

   A part of kernels.c, which includes it once for each type and width. */

/* out = sum over m of shares[m, n] BatchNorm(maps[m]) for N images n of P pixels of C channels, which are lds[m] and
   ldo apart: a node, from all operations on all edges into it, one at least. A map without a record is as it is. */
int NAME(combine)(int64_t N, int64_t P, int64_t C, int64_t count, const REAL *const *maps, const int64_t *lds,
                  const double *const *stats, const double *shares, REAL *out, int64_t ldo, int64_t threads)
{
    char *shared = room(count * 2 * UP(C) * sizeof(REAL) + 64);
    if (!shared)
        return 1;
    REAL *a = take(&shared, count * 2 * UP(C), sizeof(REAL)), *b = a + count * UP(C);
    for (int64_t m = 0; m < count; m++)
        NAME(affine)(a + m * UP(C), b + m * UP(C), stats[m], 1, C);
    int64_t chunk = MAX(1, CHUNK / (C * (int64_t)sizeof(REAL)));
#pragma omp parallel for schedule(static) collapse(2) num_threads((int)threads) if (threads > 1)
    for (int64_t n = 0; n < N; n++)
        for (int64_t first = 0; first < P; first += chunk)
            for (int64_t m = 0; m < count; m += 2)
                for (int64_t v = 0; v < C; v += L) {
                    int64_t left = C - v, next = MIN(m + 1, count - 1);
                    REAL p0 = shares[m * N + n], p1 = next > m ? shares[next * N + n] : 0;
                    V a0 = p0 * READ(a + m * UP(C) + v), a1 = p1 * READ(a + next * UP(C) + v);
                    V shift = p0 * READ(b + m * UP(C) + v) + p1 * READ(b + next * UP(C) + v);
                    for (int64_t i = n * P + first; i < n * P + MIN(P, first + chunk); i++) {
                        const REAL *y0 = maps[m] + i * lds[m] + v, *y1 = maps[next] + i * lds[next] + v;
                        __builtin_prefetch(y0 + AHEAD * lds[m]);
                        __builtin_prefetch(y1 + AHEAD * lds[next]);
                        V sum = a0 * NAME(load)(y0, left) + a1 * NAME(load)(y1, left) + shift;
                        NAME(store)(out + i * ldo + v, m ? NAME(load)(out + i * ldo + v, left) + sum : sum, left);
                    }
                }
    return 0;
}

/* For the gradient g of such a sum: dots (count + 1, C) become sum g BatchNorm(maps[m]), before its weights, and, last,
   sum g; the images by their `shares` (N,), if given. Without weights dL/dp[m] is the sum of a row. */
int NAME(dots)(int64_t N, int64_t P, int64_t C, int64_t count, const REAL *const *maps, const int64_t *lds,
               const double *const *stats, const double *shares, const REAL *g, int64_t ldg, double *dots,
               int64_t threads)
{
    int64_t chunk = MAX(1, CHUNK / (C * (int64_t)sizeof(REAL))), all = N * P;
    int64_t parts = MIN(PARTS, (all + chunk - 1) / chunk), size = (count + 1) * UP(C);
    char *shared = room(2 * size * sizeof(REAL) + parts * size * sizeof(double) + 3 * 64);
    if (!shared)
        return 1;
    REAL *a = take(&shared, size, sizeof(REAL)), *b = take(&shared, size, sizeof(REAL));
    double *sums = take(&shared, parts * size, sizeof(double));
    for (int64_t m = 0; m < count; m++)
        NAME(affine)(a + m * UP(C), b + m * UP(C), stats[m], 0, C);
    memset(sums, 0, parts * size * sizeof(double));
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t first = part * all / parts, end; first < (part + 1) * all / parts; first = end) {
            end = MIN(MIN((part + 1) * all / parts, first + chunk), (first / P + 1) * P);  /* of one image */
            for (int64_t m = 0; m <= count; m++)
                for (int64_t v = 0; v < C; v += L) {
                    int64_t left = C - v, i = first;
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
                        sums[part * size + m * UP(C) + v + c] += (shares ? shares[first / P] : 1) * sum[0][c];
                }
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
