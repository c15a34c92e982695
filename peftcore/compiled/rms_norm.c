/* Root-mean-square normalisation of rows: w * x / sqrt(mean(x²) + epsilon). `norm.py` says why it exists.

   Sums are in float32. As in transformers, a bfloat16 row is rounded to bfloat16 before it is multiplied by w. */

#include <math.h>

#include "vectors.h"

#define TOGETHER 16 /* rows that a thread takes at once */

struct call {
    char *out;
    const char *x, *weight; /* (rows, width) without gaps, (width) */
    float epsilon;
    long rows, width;
    int is_bfloat16;
    long next; /* first row that no thread has taken */
};

INLINE void normalize(void *out, const void *x, const void *weight, float epsilon, long width, const int is_bfloat16)
{
    floats sums = {0};
    long i = 0;
    for (; i + WIDTH <= width; i += WIDTH) {
        floats value = widened_load(x, i, is_bfloat16);
        sums += value * value;
    }
    float sum = total(sums);
    for (long rest = i; rest < width; rest++)
        sum += element(x, rest, is_bfloat16) * element(x, rest, is_bfloat16);
    const float factor = 1 / sqrtf(sum / width + epsilon);
    for (i = 0; i + WIDTH <= width; i += WIDTH) {
        floats value = widened_load(x, i, is_bfloat16) * factor;
        if (is_bfloat16)
            value = rounded_values(value);
        rounded_store(out, i, is_bfloat16, value * widened_load(weight, i, is_bfloat16));
    }
    for (; i < width; i++) {
        const float value = element(x, i, is_bfloat16) * factor;
        if (is_bfloat16)
            ((uint16_t *)out)[i] = rounded(widened(rounded(value)) * element(weight, i, 1));
        else
            ((float *)out)[i] = value * element(weight, i, 0);
    }
}

static void take(void *of)
{
    struct call *call = of;
    const long size = call->is_bfloat16 ? 2 : 4;
    long row;
    while ((row = __atomic_fetch_add(&call->next, TOGETHER, __ATOMIC_RELAXED)) < call->rows)
        for (long end = row + TOGETHER < call->rows ? row + TOGETHER : call->rows; row < end; row++) {
            char *out = call->out + row * call->width * size;
            const char *x = call->x + row * call->width * size;
            if (call->is_bfloat16)
                normalize(out, x, call->weight, call->epsilon, call->width, 1);
            else
                normalize(out, x, call->weight, call->epsilon, call->width, 0);
        }
}

/* `parallel` is GOMP_parallel, or 0 for one thread. */
void rms_norm(void *out, const void *x, const void *weight, float epsilon, long rows, long width, int is_bfloat16,
              start_threads parallel, unsigned threads)
{
    struct call call = {out, x, weight, epsilon, rows, width, is_bfloat16, 0};
    if (parallel && threads > 1)
        parallel(take, &call, threads, 0);
    else
        take(&call);
}
