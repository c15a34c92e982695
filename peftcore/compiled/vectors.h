/* Vectors of float32, read from and written to memory in float32 or bfloat16. Only what GCC and Clang have in common
   is used. `compiled.py` compiles the C files of this folder. */

#include <math.h>
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
typedef uint32_t words __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t halves __attribute__((vector_size(WIDTH * 2)));
typedef uint8_t bytes __attribute__((vector_size(WIDTH)));

INLINE floats load(const float *from)
{
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

/* The same values, kept in a register. Without this, GCC reads a vector from memory again for each use of it. */
INLINE floats kept(floats values)
{
#if defined(__AVX__)
    __asm__("" : "+v"(values));
#endif
    return values;
}

INLINE void store(float *to, floats values)
{
    memcpy(to, &values, sizeof values);
}

/* Clang and GCC name this operation differently. Places are those of `one` and then `other`. */
#ifdef __clang__
#define CHOOSE(one, other, ...) __builtin_shufflevector(one, other, __VA_ARGS__)
#else
#define CHOOSE(one, other, ...) __builtin_shuffle(one, other, (words){__VA_ARGS__})
#endif
#if WIDTH == 16
#define EVEN_PLACES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_PLACES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif WIDTH == 8
#define EVEN_PLACES 0, 2, 4, 6, 8, 10, 12, 14
#define ODD_PLACES 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN_PLACES 0, 2, 4, 6
#define ODD_PLACES 1, 3, 5, 7
#endif

/* The elements of `one` and then `other` whose places are even, or odd. */
INLINE floats of_even_places(floats one, floats other)
{
    return CHOOSE(one, other, EVEN_PLACES);
}

INLINE floats of_odd_places(floats one, floats other)
{
    return CHOOSE(one, other, ODD_PLACES);
}

/* Exchange rows and columns of (WIDTH, r) elements in r vectors. Taking the elements of even places first, then those of
   odd places, moves the last bit of each place to its front; this is done once for each bit of r. */
INLINE void exchange(floats *vectors, const int r)
{
    for (int size = 1; size < r; size *= 2) {
        floats moved[WIDTH];
        for (int k = 0; k < r / 2; k++) {
            moved[k] = of_even_places(vectors[2 * k], vectors[2 * k + 1]);
            moved[r / 2 + k] = of_odd_places(vectors[2 * k], vectors[2 * k + 1]);
        }
        for (int k = 0; k < r; k++)
            vectors[k] = moved[k];
    }
}

INLINE void add_neighbours(floats *vectors, const int count)
{
    for (int i = 0; i < count; i++)
        vectors[i] = of_even_places(vectors[2 * i], vectors[2 * i + 1]) +
                     of_odd_places(vectors[2 * i], vectors[2 * i + 1]);
}

/* The sums of each `count` elements that lie next to each other in `count` vectors; a power of 2, at most WIDTH. The
   vectors change. */
INLINE floats sums_of_groups(floats *vectors, const int count)
{
    if (count == 16)
        add_neighbours(vectors, 8);
    if (count >= 8)
        add_neighbours(vectors, 4);
    if (count >= 4)
        add_neighbours(vectors, 2);
    if (count >= 2)
        add_neighbours(vectors, 1);
    return vectors[0];
}

/* A bfloat16 is the upper half of a float32. */
INLINE float widened(uint16_t half)
{
    uint32_t word = (uint32_t)half << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

/* The float32 or bfloat16 value of element `at`. */
INLINE float element(const void *from, long at, int is_bfloat16)
{
    return is_bfloat16 ? widened(((const uint16_t *)from)[at]) : ((const float *)from)[at];
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

/* The bits of the nearest bfloat16 of each value, in the lower half of a word. */
INLINE words rounded_bits(floats values)
{
    words word = (words)values;
    words is_nan = (words)(values != values);
    word = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    return (is_nan & 0x7fc0) | (~is_nan & word);
}

/* The values, rounded to bfloat16. */
INLINE floats rounded_values(floats values)
{
    return (floats)(rounded_bits(values) << 16);
}

INLINE void rounded_store(void *to, long at, int is_bfloat16, floats values)
{
    if (!is_bfloat16) {
        memcpy((float *)to + at, &values, sizeof values);
        return;
    }
    halves half = __builtin_convertvector(rounded_bits(values), halves);
    memcpy((uint16_t *)to + at, &half, sizeof half);
}

/* The sum of all elements, in the order of `sums_of_groups`. */
INLINE float total(floats values)
{
    for (int left = WIDTH; left > 1; left /= 2)
        values = of_even_places(values, values) + of_odd_places(values, values);
    return values[0];
}

/* e^x for x <= 0, to 2 units in the last place. */
INLINE floats exponential(floats x)
{
    floats lowest = (floats){0} - 87.0f;
    words is_lower = (words)(x < lowest);
    x = (floats)((is_lower & (words)lowest) | (~is_lower & (words)x));
    floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the rounded power of 2 is in the last bits */
    words power = (words)shifted << 23;
    floats n = shifted - 12582912.0f;
    floats rest = x - n * 0.693145752f - n * 1.42860677e-6f;
    floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    return (floats)(~is_lower & ((words)sum + power));
}

/* Memory for `count` floats, aligned to a line of the cache: reads that cross a line take twice as long. */
INLINE float *memory_for(long count)
{
    return aligned_alloc(64, (sizeof(float) * count + 63) / 64 * 64);
}

/* GOMP_parallel of PyTorch's OpenMP library: runs `work` in each thread. */
typedef void (*start_threads)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
