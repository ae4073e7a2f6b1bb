/* Rows of depthwise and pointwise convolutions, and of their gradients w.r.t. weights.

   A part of kernels.c, which includes it once for each type and width. */

/* ---- Depthwise convolution of a row ---- */

/* z[p] = sum over rows t and columns c of ws[t][c] * rows[t][p*s + c*d], for P pixels and L channels. */
INLINE void NAME(pixels)(REAL *z, const REAL *const *rows, const REAL *const *ws, int64_t at, int64_t v, int64_t taps,
                         int64_t C, const int P, int64_t k, int64_t s, int64_t d)
{
    V sum[BLOCK];
    EACH(p, P, 8)
        sum[p] = (V){0};
    for (int64_t t = 0; t < taps; t++) {
        const REAL *row = rows[t] + at, *w = ws[t] + v;
        EACH(c, k, 5) {
            V weight = READ(w + c * C);
            EACH(p, P, 8)
                sum[p] += READ(row + (p * s + c * d) * C) * weight;
        }
    }
    EACH(p, P, 8)
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

/* The rows of a `map` of H rows, `width` numbers long and `apart` in the input, that the rows of a kernel w (k, k, C)
   meet when its first lies at row `first` of the input; and those of the kernel, into ws. Returns how many. */
INLINE int64_t NAME(meet)(const REAL **rows, const REAL **ws, const REAL *map, int64_t H, int64_t width, int64_t apart,
                          int64_t first, const REAL *w, int64_t k, int64_t d, int64_t C)
{
    int64_t taps = 0;
    for (int64_t t = 0, h = first; t < k; t++, h += d)
        if (h >= 0 && h % apart == 0 && h / apart < H) {
            rows[taps] = map + h / apart * width;
            ws[taps++] = w + t * k * C;
        }
    return taps;
}

/* Rows oy to oy + rows of z (OH, OW, C) = depthwise(xp), of an image with H rows and `inset` columns of zeros at both
   sides, which are `width` numbers long. */
static void NAME(depthwise)(REAL *z, const REAL *xp, int64_t H, int64_t width, int64_t inset, const REAL *dw,
                            int64_t C, int64_t oy, int64_t rows, int64_t OW, int64_t k, int64_t s, int64_t d)
{
    int64_t pad = (k - 1) * d / 2;
    for (int64_t r = oy; r < oy + rows; r++) {
        const REAL *from[LARGEST], *ws[LARGEST];
        int64_t taps = NAME(meet)(from, ws, xp + (inset - pad) * C, H, width, 1, r * s - pad, dw, k, d, C);
        NAME(convolve)(z + (r - oy) * OW * C, from, ws, taps, C, OW, k, s, d);
    }
}

/* dw[t][c] += sum over x of dz[x] * rows[t][x*s + c*d]: T rows of the kernel's gradient, L channels in registers. */
INLINE void NAME(correlate)(REAL *const *dw, const REAL *const *rows, const REAL *dz, int64_t C, int64_t W, const int T,
                            const int64_t k, int64_t s, int64_t d)
{
    for (int64_t v = 0; v < C; v += L) {
        V sum[25];
        EACH(i, T * k, 25)
            sum[i] = READ(dw[i / k] + i % k * C + v);
        for (int64_t x = 0; x < W; x++) {
            V grad = READ(dz + x * C + v);
            EACH(t, T, 5)
                EACH(c, k, 5)
                    sum[t * k + c] += READ(rows[t] + (x * s + c * d) * C + v) * grad;
        }
        EACH(i, T * k, 25)
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

/* y (P, K) = init + z (P, I) w (I, ldw), of which `left` channels count; then ReLU, if `rectified`. No init: NULL. */
INLINE void NAME(product)(REAL *y, int64_t ldy, const REAL *init, int64_t ldi, const REAL *z, int64_t ldz,
                          const REAL *w, int64_t ldw, int64_t I, const int64_t left, const int rectified, const int P,
                          const int Q)
{
    V sum[BLOCK][2];
    EACH(p, P, 8)
        EACH(q, Q, 2)
            sum[p][q] = init ? NAME(load)(init + p * ldi + q * L, left - q * L) : (V){0};
    for (int64_t i = 0; i < I; i++) {
        EACH(p, P, 8)
            EACH(q, Q, 2)
                sum[p][q] += READ(w + i * ldw + q * L) * z[p * ldz + i];
    }
    EACH(p, P, 8)
        EACH(q, Q, 2)
            NAME(store)(y + p * ldy + q * L, rectified ? NAME(relu)(sum[p][q]) : sum[p][q], left - q * L);
}

/* The same for all P and K; w is (I, UP(K)). `padded` says that K is a multiple of L. */
INLINE void NAME(mix)(REAL *y, int64_t ldy, const REAL *init, int64_t ldi, const REAL *z, int64_t ldz, const REAL *w,
                      int64_t P, int64_t I, int64_t K, const int rectified, const int padded)
{
#define PRODUCT(P, Q) NAME(product)(y + p * ldy + o, ldy, init ? init + p * ldi + o : NULL, ldi, z + p * ldz, ldz, \
                                    w + o, UP(K), I, padded ? 2 * L : K - o, rectified, P, Q)
    for (int64_t o = 0; o < K; o += o + 2 * L <= K ? 2 * L : L) {
        int64_t p = 0, wide = o + 2 * L <= K;
        for (; wide && p + BLOCK <= P; p += BLOCK)
            PRODUCT(BLOCK, 2);
        for (; wide && p < P; p++)
            PRODUCT(1, 2);
        for (; p + BLOCK <= P; p += BLOCK)
            PRODUCT(BLOCK, 1);
        for (; p < P; p++)
            PRODUCT(1, 1);
    }
#undef PRODUCT
}

/* y (P, O) = z (P, I) w (I, O); O is a multiple of L. */
static void NAME(multiply)(REAL *y, const REAL *z, const REAL *w, int64_t P, int64_t I, int64_t O)
{
    NAME(mix)(y, O, NULL, 0, z, I, w, P, I, O, 0, 1);
}

INLINE void NAME(outer)(REAL *dw, int64_t ldw, const REAL *dy, int64_t ldy, const REAL *z, int64_t ldz, int64_t P,
                        const int Q)
{
    V sum[BLOCK][2];
    EACH(o, BLOCK, 8)
        EACH(q, Q, 2)
            sum[o][q] = READ(dw + o * ldw + q * L);
    for (int64_t p = 0; p < P; p++)
        EACH(o, BLOCK, 8)
            EACH(q, Q, 2)
                sum[o][q] += READ(z + p * ldz + q * L) * dy[p * ldy + o];
    EACH(o, BLOCK, 8)
        EACH(q, Q, 2)
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
