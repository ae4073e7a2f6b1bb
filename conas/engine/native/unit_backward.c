/* The gradients of a unit.

   A part of kernels.c, which includes it once for each type and width. */

/* d, where xp > 0, is added to a row dx (W, C), or written; also into sums (2, C) of d xp and of d, if given. */
INLINE void NAME(emit_row)(REAL *dx, int64_t ld, const REAL *d, const REAL *xp, int64_t W, int64_t channels,
                           const int add, double *sums, const int with_sums)
{
    int64_t C = UP(channels);
    for (int64_t v = 0; v < channels; v += L) {
        int64_t left = channels - v, w = 0;
        V dot[4] = {{0}}, sum[4] = {{0}};
#define PIXEL(j) { \
        V value = READ(xp + (w + j) * C + v), grad = NAME(keep)(READ(d + (w + j) * C + v), value > 0); \
        REAL *to = dx + (w + j) * ld + v; \
        __builtin_prefetch(to + AHEAD * ld, 1); \
        if (with_sums) { \
            dot[j] += grad * value; \
            sum[j] += grad; \
        } \
        NAME(store)(to, add ? NAME(load)(to, left) + grad : grad, left); }
        for (; w + 4 <= W; w += 4)
            EACH(j, 4, 4)
                PIXEL(j)
        for (; w < W; w++)
            PIXEL(0)
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

/* The gradient of p BatchNorm(unit_forward(x)), a term of a sum whose gradient is g (N, OH, OW, K), pixels ldg apart,
   images times `shares` (N,), if given. `y` and `stat` are what unit_forward gave, `dot` and `sum` what `dots` gives of
   them, or NULL by running statistics. dL/dx goes into dx, laid out as x, unless that is NULL: added, if `add`. With
   in_stat it is dL/dx^ for x^ = BatchNorm(x), and dx_sums (2, C) becomes sum dL/dx^ x^ and sum dL/dx^, unless that is
   NULL. Into d_dw, d_pw and d_pw2, unless d_pw is NULL, go the gradients w.r.t. the weights: a pass for the alphas
   alone needs none, and then z is not computed again. */
int NAME(unit_backward)(const struct unit *u, const REAL *x, const double *in_stat, const REAL *dw, const REAL *pw,
                        const REAL *pw2, const REAL *y, const double *stat, double p, const double *shares,
                        const REAL *g, int64_t ldg, const double *dot, const double *sum, REAL *dx, int64_t add,
                        double *dx_sums, REAL *d_dw, REAL *d_pw, REAL *d_pw2, int64_t threads)
{
    int64_t C = UP(u->C), K = UP(u->K), I = u->kind == HALVES ? 2 * C : C, pad = PAD(u), size = u->kernel * u->kernel;
    int64_t rows = ROWS(u), group = rows * u->OW, width = (u->W + 2 * pad) * C, image = u->H * width;
    int64_t blocks = MIN(u->N, PARTS), part = d_pw ? K * I + size * C : 0, spread = dx && u->kind == DEPTHWISE;
    int64_t room_of_dz = spread ? u->OH * width : 0;
    int64_t each = ((image + group * (2 * I + K) + room_of_dz + 2 * u->W * C) * sizeof(REAL) + 8 * 64) / 64 * 64;
    char *shared = room((2 * size * C + I * K + 2 * C + 3 * K + blocks * (part + 16)) * sizeof(REAL)
                        + blocks * 2 * C * sizeof(double) + 12 * 64 + threads * each);
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
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        char *own = own_part(shared, each);
        REAL *xp = take(&own, image, sizeof(REAL)), *z = take(&own, group * I, sizeof(REAL));
        REAL *dz = take(&own, group * I, sizeof(REAL)), *dy = take(&own, group * K, sizeof(REAL));
        REAL *row = take(&own, 2 * u->W * C, sizeof(REAL)), *dzp = take(&own, room_of_dz, sizeof(REAL));
        memset(xp, 0, image * sizeof(REAL));
        memset(dzp, 0, room_of_dz * sizeof(REAL));
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            REAL *of_pw = parts + block * part, *of_dw = of_pw + K * I;
            double *of_x = dx_sums ? sums + block * 2 * C : NULL;
            for (int64_t n = block * u->N / blocks; n < (block + 1) * u->N / blocks; n++) {
                REAL *to = dx ? dx + n * u->H * u->W * u->ld : NULL;
                int64_t ready = 0, done = 0;  /* rows of xp, and of dx */
                for (int64_t oy = 0; oy < u->OH; oy += rows) {
                    int64_t count = MIN(rows, u->OH - oy), P = count * u->OW, first = (n * u->OH + oy) * u->OW;
                    ready = NAME(rectify)(xp, u, pad, x + n * u->H * u->W * u->ld, in_stat ? in_a : NULL, in_b, ready,
                                          oy + count < u->OH ? NEEDED(u, pad, oy + count) : u->H);
                    for (int64_t v = 0; v < K; v += L) {  /* through BatchNorm */
                        V slope = READ(a + v) * (shares ? (REAL)shares[n] : 1);
                        for (int64_t i = 0; i < P; i++) {
                            const REAL *at_g = g + (first + i) * ldg + v, *at_y = y + (first + i) * u->K + v;
                            __builtin_prefetch(at_g + AHEAD * ldg);
                            __builtin_prefetch(at_y + AHEAD * u->K);
                            AT(dy + i * K + v) = READ(c + v) + slope * NAME(load)(at_g, MAX(0, u->K - v))
                                                 + READ(b + v) * NAME(load)(at_y, MAX(0, u->K - v));
                        }
                    }
                    if (d_pw)
                        NAME(weight_gradient)(of_pw, dy, NAME(inner)(z, u, pad, xp, wd, oy, count), P, K, I);
                    if (dx || u->kind == DEPTHWISE)
                        NAME(multiply)(dz, dy, w, P, K, I);
                    for (int64_t r = oy; r < oy + count; r++) {
                        const REAL *of_z = dz + (r - oy) * u->OW * I;
                        if (u->kind == DEPTHWISE && d_pw) {
                            const REAL *from[LARGEST], *into[LARGEST];
                            int64_t taps = NAME(meet)(from, into, xp, u->H, width, 1, r * u->stride - pad, of_dw,
                                                      u->kernel, u->dilation, C);
                            NAME(kernel_gradient)((REAL *const *)into, from, of_z, taps, C, u->OW, u->kernel, u->stride,
                                                  u->dilation);
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
                        int64_t taps = NAME(meet)(from, ws, dzp, u->OH, width, u->stride, done - pad, turned, u->kernel,
                                                  u->dilation, C);
                        NAME(convolve)(row, from, ws, taps, C, u->W, u->kernel, 1, u->dilation);
                        NAME(emit)(to + done * u->W * u->ld, u->ld, row, xp + done * width + pad * C, u->W, u->C, add,
                                   of_x);
                    }
                }
            }
        }
    }
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
