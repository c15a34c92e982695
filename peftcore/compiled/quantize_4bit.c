/* Blockwise quantisation to the nearest of 16 values. `quantization.py` says why it is here.

   Each block has one scale, its largest absolute value. The codes are those of bitsandbytes, bit for bit. */

#include "vectors.h"

#define LARGEST_BLOCK 4096
#define LEAST_SCALE 1e-38f
#define TOGETHER (1 << 14) /* elements that a thread takes at once; a multiple of all block sizes */
#define BOUNDS 15

struct call {
    uint8_t *codes; /* two in a byte, the first one in the upper half */
    float *scales;  /* one for each block */
    const void *weight;
    const float *bounds;  /* the values in the middle between neighbours of the 16 values, which are in order */
    const uint8_t *order; /* the code of each of the 16 values */
    long elements, block; /* the last block may be shorter */
    int is_bfloat16;
    long next; /* first element that no thread has taken */
};

/* The larger one, or NaN if one of them is NaN. */
INLINE float larger(float one, float other)
{
    return one > other || one != one ? one : other;
}

INLINE float largest_absolute(const void *weight, long first, long end, const int is_bfloat16)
{
    floats largest = {0};
    float result = 0;
    for (; first + WIDTH <= end; first += WIDTH) {
        floats value = (floats)((words)widened_load(weight, first, is_bfloat16) & 0x7fffffff);
        words is_larger = (words)(value > largest) | (words)(value != value);
        largest = (floats)((is_larger & (words)value) | (~is_larger & (words)largest));
    }
    for (int lane = 0; lane < WIDTH; lane++)
        result = larger(largest[lane], result);
    for (; first < end; first++)
        result = larger(fabsf(element(weight, first, is_bfloat16)), result);
    return result;
}

INLINE void quantize_block(const struct call *call, long first, long end, const int is_bfloat16)
{
    uint8_t places[LARGEST_BLOCK + 1]; /* among the 16 values, in order; those of NaN are the last */
    const long length = end - first;
    const int is_whole = length == call->block;
    float scale = largest_absolute(call->weight, first, end, is_bfloat16);
    const float divisor = scale < LEAST_SCALE ? LEAST_SCALE : scale, factor = 1 / divisor;
    call->scales[first / call->block] = is_whole ? scale : divisor;
    long i = 0;
    for (; is_whole && i + WIDTH <= length; i += WIDTH) {
        floats value = widened_load(call->weight, first + i, is_bfloat16) * factor;
        words place = (words){0} + BOUNDS;
        for (int k = 0; k < BOUNDS; k++)
            place += (words)(value <= call->bounds[k]); /* a true comparison is -1 */
        bytes narrow = __builtin_convertvector(place, bytes);
        memcpy(places + i, &narrow, sizeof narrow);
    }
    for (; i < length + length % 2; i++) {
        const float given = i < length ? element(call->weight, first + i, is_bfloat16) : 0;
        const float value = i == length ? 0 : is_whole ? given * factor : given / divisor;
        places[i] = BOUNDS;
        for (int k = 0; k < BOUNDS; k++)
            places[i] -= value <= call->bounds[k];
    }
    for (i = 0; i < length; i += 2)
        call->codes[(first + i) / 2] = call->order[places[i]] << 4 | call->order[places[i + 1]];
}

static void take(void *of)
{
    struct call *call = of;
    long first;
    while ((first = __atomic_fetch_add(&call->next, TOGETHER, __ATOMIC_RELAXED)) < call->elements) {
        const long last = first + TOGETHER < call->elements ? first + TOGETHER : call->elements;
        for (; first < last; first += call->block) {
            const long end = first + call->block < call->elements ? first + call->block : call->elements;
            if (call->is_bfloat16)
                quantize_block(call, first, end, 1);
            else
                quantize_block(call, first, end, 0);
        }
    }
}

/* `block` is a power of 2 from 2 to LARGEST_BLOCK. `parallel` is GOMP_parallel, or 0 for one thread. */
void quantize_4bit(uint8_t *codes, float *scales, const void *weight, const float *bounds, const uint8_t *order,
                   long elements, long block, int is_bfloat16, start_threads parallel, unsigned threads)
{
    struct call call = {codes, scales, weight, bounds, order, elements, block, is_bfloat16, 0};
    if (parallel && threads > 1)
        parallel(take, &call, threads, 0);
    else
        take(&call);
}
