/* Vectors of float32, read from and written to memory in float32 or bfloat16. Only what GCC and Clang have in common
   is used. `compiled.py` compiles the C files of this folder. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 16 /* floats of the processor's vectors */
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(WIDTH * 4)));
typedef float floats8 __attribute__((vector_size(32)));
typedef float floats4 __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t halves __attribute__((vector_size(WIDTH * 2)));

INLINE floats load(const float *from)
{
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

/* A bfloat16 is the upper half of a float32. */
INLINE float widened(uint16_t half)
{
    uint32_t word = (uint32_t)half << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

INLINE uint16_t rounded(float value)
{
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return value != value ? 0x7fc0 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

/* The vector of float32 or bfloat16 values from element `at` on. */
INLINE floats widened_load(const void *from, long at, int is_bfloat16)
{
    if (!is_bfloat16)
        return load((const float *)from + at);
    halves half;
    memcpy(&half, (const uint16_t *)from + at, sizeof half);
    return (floats)(__builtin_convertvector(half, words) << 16);
}

INLINE void rounded_store(void *to, long at, int is_bfloat16, floats values)
{
    if (!is_bfloat16) {
        memcpy((float *)to + at, &values, sizeof values);
        return;
    }
    words word = (words)values;
    words is_nan = (words)(values != values);
    word = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    word = (is_nan & 0x7fc0) | (~is_nan & word);
    halves half = __builtin_convertvector(word, halves);
    memcpy((uint16_t *)to + at, &half, sizeof half);
}

/* The sum of all elements, added by halves. */
INLINE float total(floats values)
{
#if WIDTH == 16
    floats8 upper;
    memcpy(&upper, (char *)&values + sizeof upper, sizeof upper);
    floats8 eight;
    memcpy(&eight, &values, sizeof eight);
    eight += upper;
#elif WIDTH == 8
    floats8 eight = values;
#endif
#if WIDTH >= 8
    floats4 higher, four;
    memcpy(&higher, (char *)&eight + sizeof higher, sizeof higher);
    memcpy(&four, &eight, sizeof four);
    four += higher;
#else
    floats4 four = values;
#endif
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* Memory for `count` floats, aligned to a line of the cache: reads that cross a line take twice as long. */
INLINE float *memory_for(long count)
{
    return aligned_alloc(64, (sizeof(float) * count + 63) / 64 * 64);
}

/* GOMP_parallel of PyTorch's OpenMP library: runs `work` in each thread. */
typedef void (*start_threads)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
