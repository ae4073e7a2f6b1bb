/* The sums of BatchNorm over a batch, and what it does to images and gradients. Its record is
   `stat` (5, K): mean, biased variance and 1/std of every channel, and what BatchNorm then multiplies by and adds.

   A part of kernels.c, which includes it once for each type and width. */

/* Add P pixels y, of which `seen` were added before, to part (2, UP(K)): mean, and sum of squares about it. */
static void NAME(observe)(double *part, int64_t seen, const REAL *y, int64_t ld, int64_t P, int64_t K)
{
    double share = (double)P / (seen + P), weight = seen * share, *mean = part, *square = part + UP(K);
    for (int64_t v = 0; v < K; v += L) {
        int64_t left = K - v, p = 0;
        V sums[4] = {{0}}, squares[4] = {{0}}, sum, centred;
        for (; p + 4 <= P; p += 4)
            EACH(j, 4, 4)
                sums[j] += NAME(load)(y + (p + j) * ld + v, left);
        for (; p < P; p++)
            sums[0] += NAME(load)(y + p * ld + v, left);
        sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        V of = sum / (REAL)P;
        for (p = 0; p + 4 <= P; p += 4)
            EACH(j, 4, 4) {
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

/* The record of all images but for its last two rows, from the parts of each, of P pixels. */
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

/* a (C,) and b (C,), padded: BatchNorm(x) = a x + b or, unless `all`, what it multiplies; x without a record. */
static void NAME(affine)(REAL *a, REAL *b, const double *stat, const int all, int64_t C)
{
    for (int64_t c = 0; c < UP(C); c++) {
        double weight = all && c < C && stat ? stat[3 * C + c] : 1;
        a[c] = c >= C ? 0 : stat ? weight * stat[2 * C + c] : 1;
        b[c] = c < C && stat ? (all ? stat[4 * C + c] : 0) - weight * stat[2 * C + c] * stat[c] : 0;
    }
}

/* The gradient of p BatchNorm(y) for that of the sum it is in, g: dL/dy = a g + b y + c. With y^ = BatchNorm(y) by a
   batch of `pixels`, before its weight w, `dot` (K,) = sum g y^ and `sum` (K,) = sum g:
   p w / std (g - sum / pixels - y^ dot / pixels). Adds to b and c. By running statistics, where dot is NULL,
   p w / std g. */
static void NAME(slopes)(REAL *a, REAL *b, REAL *c, const double *stat, double p, const double *dot, const double *sum,
                         double pixels, int64_t K)
{
    for (int64_t i = 0; i < K; i++) {
        double scale = p * stat[3 * K + i] * stat[2 * K + i];
        double slope = dot ? scale * stat[2 * K + i] * dot[i] / pixels : 0;
        a[i] = scale;
        b[i] -= slope;
        c[i] += dot ? slope * stat[i] - scale * sum[i] / pixels : 0;
    }
}
