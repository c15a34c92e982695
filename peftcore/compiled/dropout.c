/* Dropout masks as bits. `dropout.py` says why they are here.

   Element 8 k + j of a mask is bit 7 - j of byte k, as in NumPy's packbits: 1 for elements that are kept. */

#include "vectors.h"

#define WORDS 64           /* random words that are drawn at once */
#define TOGETHER (1 << 14) /* elements that a thread takes at once */

/* Bits of the mask that belong to the elements of one vector. */
#if WIDTH == 16
#define BITS 1 << 7, 1 << 6, 1 << 5, 1 << 4, 1 << 3, 1 << 2, 1 << 1, 1, \
             1 << 15, 1 << 14, 1 << 13, 1 << 12, 1 << 11, 1 << 10, 1 << 9, 1 << 8
#elif WIDTH == 8
#define BITS 1 << 7, 1 << 6, 1 << 5, 1 << 4, 1 << 3, 1 << 2, 1 << 1, 1
#else
#define BITS 1 << 7, 1 << 6, 1 << 5, 1 << 4
#endif

/* The state of SFC64 (Chris Doty-Humphrey, PractRand), as NumPy has it. */
struct sfc64 {
    uint64_t a, b, c, count;
};

INLINE uint64_t next_random(struct sfc64 *state)
{
    const uint64_t number = state->a + state->b + state->count++;
    state->a = state->b ^ (state->b >> 11);
    state->b = state->c + (state->c << 3);
    state->c = ((state->c << 24) | (state->c >> 40)) + number;
    return number;
}

/* Draw the mask of `elements` elements into `bits`, with 0 behind the last one: those are kept whose random byte is at
   least `threshold`, 0 to 256. `given` is the generator's state. */
void draw_dropout_mask(uint8_t *bits, const struct sfc64 *given, int threshold, long elements)
{
    struct sfc64 state = *given;
    uint64_t numbers[WORDS];
    uint8_t random[8 * WORDS], packed[WORDS];
    const uint8_t least = threshold;
    if (threshold > 255) {
        memset(bits, 0, (elements + 7) / 8);
        return;
    }
    for (long first = 0; first < elements; first += 8 * WORDS) {
        for (int i = 0; i < WORDS; i++)
            numbers[i] = next_random(&state);
        memcpy(random, numbers, sizeof random);
        for (int i = 0; i < 8 * WORDS; i++)
            random[i] = random[i] >= least;
        memcpy(numbers, random, sizeof random);
        for (int i = 0; i < WORDS; i++)
            packed[i] = numbers[i] * 0x8040201008040201u >> 56; /* 8 bytes of 0 or 1 become bits 7 to 0 */
        const long left = (elements - first + 7) / 8;
        memcpy(bits + first / 8, packed, left < WORDS ? left : WORDS);
    }
    if (elements % 8)
        bits[elements / 8] &= 0xff << (8 - elements % 8);
}

struct call {
    char *out;
    const char *x;
    const uint8_t *bits;
    long elements;
    int size; /* bytes of an element: 2 or 4 */
    long next; /* first element that no thread has taken */
};

/* The bits from element `at` on, a multiple of WIDTH, in the places of `BITS`. */
INLINE uint16_t bits_from(const uint8_t *bits, long at)
{
    const uint8_t *from = bits + at / 8;
    return WIDTH == 16 ? from[0] | from[1] << 8 : from[0] << at % 8;
}

INLINE void keep(const struct call *call, long first, long end, const int size)
{
    long i = first;
    for (; i + WIDTH <= end; i += WIDTH) {
        const uint16_t bits = bits_from(call->bits, i);
        if (size == 2) {
            halves values, kept = ((halves){0} + bits) & (halves){BITS};
            memcpy(&values, call->x + i * size, sizeof values);
            values &= (halves)(kept != 0);
            memcpy(call->out + i * size, &values, sizeof values);
        } else {
            words values, kept = ((words){0} + bits) & (words){BITS};
            memcpy(&values, call->x + i * size, sizeof values);
            values &= (words)(kept != 0);
            memcpy(call->out + i * size, &values, sizeof values);
        }
    }
    for (; i < end; i++) {
        if (call->bits[i / 8] >> (7 - i % 8) & 1)
            memmove(call->out + i * size, call->x + i * size, size);
        else
            memset(call->out + i * size, 0, size);
    }
}

static void take(void *of)
{
    struct call *call = of;
    long first;
    while ((first = __atomic_fetch_add(&call->next, TOGETHER, __ATOMIC_RELAXED)) < call->elements) {
        const long end = first + TOGETHER < call->elements ? first + TOGETHER : call->elements;
        if (call->size == 2)
            keep(call, first, end, 2);
        else
            keep(call, first, end, 4);
    }
}

/* Write x with 0 for the elements that the mask drops; `out` may be x. `parallel` is GOMP_parallel, or 0 for one
   thread. */
void apply_dropout_mask(void *out, const void *x, const uint8_t *bits, long elements, int size, start_threads parallel,
                        unsigned threads)
{
    struct call call = {out, x, bits, elements, size, 0};
    if (parallel && threads > 1)
        parallel(take, &call, threads, 0);
    else
        take(&call);
}
