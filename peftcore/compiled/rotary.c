/* Rotary position embeddings of queries and keys. `rotary.py` says why it exists.

   As in transformers, each product and their sum is rounded to bfloat16 where the tensors are in bfloat16. */

#include "vectors.h"

#define TOGETHER 8 /* tokens that a thread takes at once */

/* The queries or the keys. Strides are in elements; the last dimension lies without gaps. */
struct heads {
    char *out;
    const char *x;
    long row, head, token, count; /* strides, and the number of heads */
};

struct call {
    struct heads q, k;
    const char *cosines, *sines; /* (rows, tokens, width) */
    long table_row, table_token; /* strides of both; table_row is 0 if all rows share one table */
    long rows, tokens, width;
    int is_bfloat16;
    long next; /* first token of all rows that no thread has taken */
};

INLINE floats as_stored(floats values, const int is_bfloat16)
{
    return is_bfloat16 ? rounded_values(values) : kept(values);
}

INLINE float one_as_stored(float value, const int is_bfloat16)
{
    return is_bfloat16 ? widened(rounded(value)) : value;
}

/* Rotate one head of one token: the pair of x[i] and x[i + width / 2] by the angle whose cosine and sine are given twice. */
INLINE void rotate(char *out, const char *x, const char *cosines, const char *sines, long width, const int is_bfloat16)
{
    const long half = width / 2;
    long i = 0;
    for (; i + WIDTH <= half; i += WIDTH) {
        const floats one = widened_load(x, i, is_bfloat16), other = widened_load(x, half + i, is_bfloat16);
        rounded_store(out, i, is_bfloat16,
                      as_stored(one * widened_load(cosines, i, is_bfloat16), is_bfloat16) -
                          as_stored(other * widened_load(sines, i, is_bfloat16), is_bfloat16));
        rounded_store(out, half + i, is_bfloat16,
                      as_stored(other * widened_load(cosines, half + i, is_bfloat16), is_bfloat16) +
                          as_stored(one * widened_load(sines, half + i, is_bfloat16), is_bfloat16));
    }
    for (; i < half; i++) {
        const float one = element(x, i, is_bfloat16), other = element(x, half + i, is_bfloat16);
        const float first = one_as_stored(one * element(cosines, i, is_bfloat16), is_bfloat16) -
                            one_as_stored(other * element(sines, i, is_bfloat16), is_bfloat16);
        const float second = one_as_stored(other * element(cosines, half + i, is_bfloat16), is_bfloat16) +
                             one_as_stored(one * element(sines, half + i, is_bfloat16), is_bfloat16);
        if (is_bfloat16) {
            ((uint16_t *)out)[i] = rounded(first);
            ((uint16_t *)out)[half + i] = rounded(second);
        } else {
            ((float *)out)[i] = first;
            ((float *)out)[half + i] = second;
        }
    }
}

INLINE void rotate_heads(const struct heads *heads, long row, long token, const char *cosines, const char *sines,
                         long width, const int is_bfloat16)
{
    const long size = is_bfloat16 ? 2 : 4;
    for (long head = 0; head < heads->count; head++) {
        const long at = (row * heads->row + head * heads->head + token * heads->token) * size;
        rotate(heads->out + at, heads->x + at, cosines, sines, width, is_bfloat16);
    }
}

INLINE void take_of_type(struct call *call, const int is_bfloat16)
{
    const long size = is_bfloat16 ? 2 : 4, all = call->rows * call->tokens;
    long number;
    while ((number = __atomic_fetch_add(&call->next, TOGETHER, __ATOMIC_RELAXED)) < all)
        for (long end = number + TOGETHER < all ? number + TOGETHER : all; number < end; number++) {
            const long row = number / call->tokens, token = number % call->tokens;
            const long at = (row * call->table_row + token * call->table_token) * size;
            const char *cosines = call->cosines + at, *sines = call->sines + at;
            rotate_heads(&call->q, row, token, cosines, sines, call->width, is_bfloat16);
            rotate_heads(&call->k, row, token, cosines, sines, call->width, is_bfloat16);
        }
}

static void take(void *of)
{
    struct call *call = of;
    if (call->is_bfloat16)
        take_of_type(call, 1);
    else
        take_of_type(call, 0);
}

/* `sizes`: rows, heads of q, heads of k, tokens, width. `strides`: of q and k by row, head and token, of the tables by row
   and token; the outputs have those of q and k. `parallel` is GOMP_parallel, or 0 for one thread. */
void rotate_positions(void *out_q, const void *q, void *out_k, const void *k, const void *cosines, const void *sines,
                      const long *sizes, const long *strides, int is_bfloat16, start_threads parallel,
                      unsigned threads)
{
    struct call call = {{out_q, q, strides[0], strides[1], strides[2], sizes[1]},
                        {out_k, k, strides[3], strides[4], strides[5], sizes[2]},
                        cosines,
                        sines,
                        strides[6],
                        strides[7],
                        sizes[0],
                        sizes[3],
                        sizes[4],
                        is_bfloat16,
                        0};
    if (parallel && threads > 1)
        parallel(take, &call, threads, 0);
    else
        take(&call);
}
