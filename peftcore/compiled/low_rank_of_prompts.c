/* Changes y to g * (y + s * B diag(e) A x) for many tokens in bfloat16. `low_rank_of_prompts.py` says why it
   exists.

   A, s * B and A x are rounded to bfloat16, as in PyTorch's products of these; sums are in float32. */

#include "vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#include <immintrin.h>

#define LANES 16  /* of a vector; each has a pair of bfloat16 numbers */
#define VECTORS 2 /* of outputs that are computed at once */
#define ROWS 12   /* that are computed at once */
#define MOST_RANK 256

struct call {
    uint16_t *y;       /* (rows, outputs) */
    const uint32_t *x; /* (rows, pairs) */
    const uint32_t *a; /* (groups, pairs, LANES): of each group of LANES rows of A, each pair of inputs */
    const uint32_t *b; /* (groups, r / 2, LANES): of each group of LANES rows of B, each pair of columns */
    const float *diagonal, *gain;
    long rows, pairs, r, outputs;
    long next; /* first row that no thread has taken */
};

INLINE __m512 widened_halves(__m256i half)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* The pair of elements `at` and `at` + 1 of a row with `width` elements, times `scale`, in bfloat16; 0 behind the end. */
INLINE uint32_t pair_of(const void *row, long at, long width, float scale, const int is_bfloat16)
{
    const uint32_t low = rounded(element(row, at, is_bfloat16) * scale);
    return at + 1 < width ? low | (uint32_t)rounded(element(row, at + 1, is_bfloat16) * scale) << 16 : low;
}

/* Write the pairs of a matrix (rows, width) to `packed` (groups, pairs, LANES), with 0 for missing rows. */
static void pack(uint32_t *packed, const void *matrix, long rows, long width, float scale, int is_bfloat16)
{
    const long pairs = (width + 1) / 2, size = is_bfloat16 ? 2 : 4;
    uint32_t words[LANES] __attribute__((aligned(64)));
    for (long group = 0; group * LANES < rows; group++) {
        const long first = group * LANES, count = rows - first < LANES ? rows - first : LANES;
        uint32_t *to = packed + group * pairs * LANES;
        long p = 0;
        for (; count == LANES && 2 * p + LANES <= width; p += LANES / 2) { /* exchange rows and pairs */
            floats vectors[LANES / 2]; /* of two rows each */
            const char *row = (const char *)matrix + first * width * size;
            for (int k = 0; k < LANES / 2; k++, row += 2 * width * size) {
                const floats one = widened_load(row, 2 * p, is_bfloat16) * scale;
                const floats other = widened_load(row + width * size, 2 * p, is_bfloat16) * scale;
                vectors[k] = (floats)_mm512_cvtne2ps_pbh((__m512)other, (__m512)one);
            }
            exchange(vectors, LANES / 2);
            for (int k = 0; k < LANES / 2; k++)
                store((float *)to + (p + k) * LANES, vectors[k]);
        }
        for (; p < pairs; p++) {
            for (long lane = 0; lane < LANES; lane++)
                words[lane] = lane < count ? pair_of((const char *)matrix + (first + lane) * width * size, 2 * p, width,
                                                     scale, is_bfloat16)
                                           : 0;
            memcpy(to + p * LANES, words, sizeof words);
        }
    }
}

/* Write diag(e) A x of `rows` rows in bfloat16 to h (rows, halves). */
INLINE void project(const struct call *call, uint16_t *h, long halves, long row, const int rows)
{
    const long pairs = call->pairs;
    const uint32_t *x = call->x + row * pairs;
    for (long k = 0; k < call->r; k += LANES) {
        const uint32_t *a = call->a + k * pairs;
        const __mmask16 present = call->r - k >= LANES ? 0xffff : (1 << (call->r - k)) - 1;
        __m512 sums[ROWS], diagonal = _mm512_set1_ps(1);
        for (int n = 0; n < rows; n++)
            sums[n] = _mm512_setzero_ps();
        for (long p = 0; p < pairs; p++) {
            const __m512bh factor = (__m512bh)_mm512_loadu_si512(a + p * LANES);
            for (int n = 0; n < rows; n++)
                sums[n] = _mm512_dpbf16_ps(sums[n], (__m512bh)_mm512_set1_epi32(x[n * pairs + p]), factor);
        }
        if (call->diagonal)
            diagonal = _mm512_maskz_loadu_ps(present, call->diagonal + k);
        for (int n = 0; n < rows; n++) { /* 0 behind the last column: an infinite x times a missing row is not 0 */
            const __m512 columns = _mm512_maskz_mul_ps(present, sums[n], diagonal);
            _mm256_storeu_si256((__m256i *)(h + n * halves + k), (__m256i)_mm512_cvtneps_pbh(columns));
        }
    }
}

/* Add s * B h to LANES * `vectors` outputs of `rows` rows. */
INLINE void add_outputs(const struct call *call, const uint32_t *h, long words, long row, long at, const int rows,
                        const int vectors)
{
    const long pairs = (call->r + 1) / 2, outputs = call->outputs;
    const uint32_t *b = call->b + at * pairs;
    __m512 sums[ROWS * VECTORS];
    __mmask16 present[VECTORS];
    for (int v = 0; v < vectors; v++) {
        const long left = outputs - at - v * LANES;
        present[v] = left >= LANES ? 0xffff : (1 << left) - 1;
        for (int n = 0; n < rows; n++)
            sums[n * vectors + v] = widened_halves(
                _mm256_maskz_loadu_epi16(present[v], call->y + (row + n) * outputs + at + v * LANES));
    }
    for (long p = 0; p < pairs; p++) {
        __m512bh factors[VECTORS];
        for (int v = 0; v < vectors; v++)
            factors[v] = (__m512bh)_mm512_loadu_si512(b + (v * pairs + p) * LANES);
        for (int n = 0; n < rows; n++) {
            const __m512bh input = (__m512bh)_mm512_set1_epi32(h[n * words + p]);
            for (int v = 0; v < vectors; v++)
                sums[n * vectors + v] = _mm512_dpbf16_ps(sums[n * vectors + v], input, factors[v]);
        }
    }
    for (int v = 0; v < vectors; v++) {
        const __m512 gain = call->gain ? _mm512_maskz_loadu_ps(present[v], call->gain + at + v * LANES)
                                       : _mm512_set1_ps(1);
        for (int n = 0; n < rows; n++)
            _mm256_mask_storeu_epi16(call->y + (row + n) * outputs + at + v * LANES, present[v],
                                     (__m256i)_mm512_cvtneps_pbh(sums[n * vectors + v] * gain));
    }
}

INLINE void compute(const struct call *call, long row, const int rows)
{
    uint16_t h[ROWS * MOST_RANK] __attribute__((aligned(64)));
    const long halves = (call->r + LANES - 1) / LANES * LANES;
    long at = 0;
    project(call, h, halves, row, rows);
    for (; call->outputs - at > LANES; at += VECTORS * LANES)
        add_outputs(call, (const uint32_t *)h, halves / 2, row, at, rows, VECTORS);
    if (at < call->outputs)
        add_outputs(call, (const uint32_t *)h, halves / 2, row, at, rows, 1);
}

static void take(void *of)
{
    struct call *call = of;
    long row;
    while ((row = __atomic_fetch_add(&call->next, ROWS, __ATOMIC_RELAXED)) < call->rows) {
        if (row + ROWS <= call->rows) {
            compute(call, row, ROWS);
            continue;
        }
        for (; row + 4 <= call->rows; row += 4)
            compute(call, row, 4);
        for (; row < call->rows; row++)
            compute(call, row, 1);
    }
}

/* x (rows, inputs), y (rows, outputs), A (r, inputs) and B (outputs, r) in float32 or bfloat16; `inputs` is even.
   `diagonal` and `gain` are float32, or 0. Returns 0, with y as it was, if there is no memory. */
int add_low_rank_to_prompts(uint16_t *y, const void *x, const void *a, const void *b, float scale, long rows,
                            long inputs, long r, long outputs, int are_bfloat16, const float *diagonal,
                            const float *gain, start_threads parallel, unsigned threads)
{
    const long of_a = (r + LANES - 1) / LANES * LANES * (inputs / 2);
    const long of_b = (outputs + LANES - 1) / LANES * LANES * ((r + 1) / 2);
    uint32_t *packed = (uint32_t *)memory_for(of_a + of_b);
    if (!packed)
        return 0;
    pack(packed, a, r, inputs, 1, are_bfloat16);
    pack(packed + of_a, b, outputs, r, scale, are_bfloat16);
    struct call call = {y, x, packed, packed + of_a, diagonal, gain, rows, inputs / 2, r, outputs, 0};
    if (parallel && threads > 1)
        parallel(take, &call, threads, 0);
    else
        take(&call);
    free(packed);
    return 1;
}

int most_rank_of_prompts(void)
{
    return MOST_RANK;
}
#else
int add_low_rank_to_prompts(void)
{
    return 0;
}

int most_rank_of_prompts(void)
{
    return 0;
}
#endif
