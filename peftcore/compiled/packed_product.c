/* Products of bfloat16 inputs with a bfloat16 weight in the order in which they read it. `packed_product.py` says why
   they are here.

   Products of two elements are exact, and their sums are in float32. Numbers below 1.2e-38 count as 0. */

#include "vectors.h"

/* with AMX, oneDNN takes less time for long inputs */
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)
#include <immintrin.h>

#define LANES 16     /* outputs of a vector; each has a pair of inputs */
#define VECTORS 2    /* of a block of outputs */
#define MOST_ROWS 12 /* that share each read of a weight; with 14, which registers would allow, it is slower */
#define BLOCK (LANES * VECTORS)
#define TOGETHER 4 /* blocks that a thread takes at once */

struct call {
    uint16_t *y;            /* (rows, outputs) */
    const uint32_t *x;      /* (rows, pairs) */
    const uint32_t *weight; /* (blocks, pairs, BLOCK) */
    const uint16_t *bias;   /* (outputs), or 0 */
    long rows, pairs, outputs;
    long next; /* first block that no thread has taken */
};

/* Compute `rows` rows of one block. */
INLINE void compute_tile(const struct call *call, long row, long block, const int rows)
{
    const long pairs = call->pairs;
    const uint32_t *weight = call->weight + block * pairs * BLOCK, *x = call->x + row * pairs;
    __m512 sums[MOST_ROWS * VECTORS];
    __mmask16 present[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        const long at = block * BLOCK + v * LANES, left = call->outputs - at;
        present[v] = left >= LANES ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
        __m512 start = _mm512_setzero_ps();
        if (call->bias) {
            __m256i half = _mm256_maskz_loadu_epi16(present[v], call->bias + at);
            start = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        }
        for (int r = 0; r < rows; r++)
            sums[r * VECTORS + v] = start;
    }
    for (long p = 0; p < pairs; p++) {
        __m512bh weights[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            weights[v] = (__m512bh)_mm512_loadu_si512(weight + p * BLOCK + v * LANES);
        for (int r = 0; r < rows; r++) {
            const __m512bh input = (__m512bh)_mm512_set1_epi32(x[r * pairs + p]);
            for (int v = 0; v < VECTORS; v++)
                sums[r * VECTORS + v] = _mm512_dpbf16_ps(sums[r * VECTORS + v], input, weights[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) {
            uint16_t *to = call->y + (row + r) * call->outputs + block * BLOCK + v * LANES;
            _mm256_mask_storeu_epi16(to, present[v], (__m256i)_mm512_cvtneps_pbh(sums[r * VECTORS + v]));
        }
}

static void compute_rows(const struct call *call, long row, long block, long rows)
{
    switch (rows) {
    case 1: return compute_tile(call, row, block, 1);
    case 2: return compute_tile(call, row, block, 2);
    case 3: return compute_tile(call, row, block, 3);
    case 4: return compute_tile(call, row, block, 4);
    case 5: return compute_tile(call, row, block, 5);
    case 6: return compute_tile(call, row, block, 6);
    case 7: return compute_tile(call, row, block, 7);
    case 8: return compute_tile(call, row, block, 8);
    case 9: return compute_tile(call, row, block, 9);
    case 10: return compute_tile(call, row, block, 10);
    case 11: return compute_tile(call, row, block, 11);
    case 12: return compute_tile(call, row, block, 12);
    }
}

static void take(void *of)
{
    struct call *call = of;
    const long blocks = (call->outputs + BLOCK - 1) / BLOCK, tiles = (call->rows + MOST_ROWS - 1) / MOST_ROWS;
    const long together = blocks >= 16 * TOGETHER ? TOGETHER : 1;
    long block;
    while ((block = __atomic_fetch_add(&call->next, together, __ATOMIC_RELAXED)) < blocks)
        for (long end = block + together < blocks ? block + together : blocks; block < end; block++)
            for (long tile = 0; tile < tiles; tile++) { /* of almost equal sizes */
                const long row = tile * call->rows / tiles;
                compute_rows(call, row, block, (tile + 1) * call->rows / tiles - row);
            }
}

/* y (rows, outputs) = x (rows, 2 * pairs) times the weight, plus the bias, if given. `parallel` is GOMP_parallel, or 0
   for one thread. */
void packed_product(void *y, const void *x, const void *weight, const void *bias, long rows, long pairs, long outputs,
                    start_threads parallel, unsigned threads)
{
    struct call call = {y, x, weight, bias, rows, pairs, outputs, 0};
    if (parallel && threads > 1)
        parallel(take, &call, threads, 0);
    else
        take(&call);
}

int has_packed_product(void)
{
    return 1;
}
#else
void packed_product(void) {}

int has_packed_product(void)
{
    return 0;
}
#endif
