/* Kernels for the operations of DARTS on a CPU, and for their gradients (arXiv:1806.09055, equations 1 and 2).

   The unit of work is ReLU, depthwise convolution, pointwise convolution and the sums for BatchNorm, in one pass over
   rows of an image that stay in the cache; what torch's operators do badly is the trips through memory in between. Maps
   are channels last: x (N, H, W, C) is x[((n*H + h)*W + w)*ld + c], with ld >= C where a map is a part of a wider one.

   One text for float and double and for several vector widths: the file includes itself, and the other files here, with
   REAL, INT and BYTES set. Only compiler vector extensions (GCC, clang): the same source serves AVX2, AVX-512 and NEON.

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
#define PRAGMA(text) _Pragma(#text)
/* A loop that is unrolled, up to `most` times. */
#define EACH(i, count, most) PRAGMA(GCC unroll most) for (int i = 0; i < (count); i++)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define GROUP 32  /* pixels, at least, that go through a pointwise convolution together */
#define PARTS 32  /* of the images, by which sums over them are taken */
#define CHUNK 16384  /* bytes of a map that stay in the first cache while other maps pass */
#define AHEAD 64  /* pixels: memory is asked for so early, while others are computed */
#define LARGEST 15  /* kernel size */

#ifdef _OPENMP
int omp_get_thread_num(void);
#else
#define omp_get_thread_num() 0
#endif

#ifndef OWN_ROOM /* or a test has both, with bounds that can be checked */
/* Memory of the thread that asks for it, at least `bytes` of it, or NULL; it is kept for the next call. */
static void *room(int64_t bytes)
{
    static _Thread_local struct { void *start; int64_t size; } kept;
    if (kept.size < bytes) {
        free(kept.start);
        bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        kept.start = aligned_alloc(64, bytes);
        kept.size = kept.start ? bytes : 0;
    }
    return kept.start;
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

/* Where this thread's memory begins, of all threads' of `bytes` each, a multiple of 64. */
INLINE char *own_part(char *all, int64_t bytes) { return all + omp_get_thread_num() * bytes; }

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
    V v = {0};
    if (n == 4)
        EACH(i, MIN(4, L), 4)
            v[i] = p[i];
    else
        memcpy(&v, p, n * sizeof(REAL));
    return v;
}

INLINE void NAME(store)(REAL *p, V v, int64_t n)
{
    if (n >= L)
        *(U *)p = (U)v;
    else
        memcpy(p, &v, (n == 4 ? 4 : n) * sizeof(REAL));
}

INLINE V NAME(keep)(V v, M where) { return (V)((M)v & where); }  /* v, or 0 */

INLINE V NAME(relu)(V v) { return NAME(keep)(v, ~(v <= 0)); }  /* NaN stays */

#include "convolutions.c"
#include "batchnorm.c"
#include "unit.c"
#include "unit_backward.c"
#include "pools.c"
#include "mixture.c"
#include "evaluate.c"

#undef REAL
#undef INT
#undef BYTES
#undef NAME
#endif
