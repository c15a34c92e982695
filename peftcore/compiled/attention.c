/* Attention of one query token in each row, for a decoding step. `attention.py` says why it exists.

   Keys and values are read where they lie, and sums are in float32. */

#include "vectors.h"

#define QUERIES 4 /* query heads that share each read of keys and values */

/* A call. Strides are in elements; the last dimension of each tensor lies without gaps. */
struct call {
    char *out;             /* (rows, heads, width), without gaps */
    const char *q, *k, *v; /* (rows, heads, width), (rows, key heads, tokens, width) twice */
    const char *mask;      /* a byte for each token, 0 for a hidden one; 0 for no mask */
    long q_row, q_head, k_row, k_head, k_token, v_row, v_head, v_token, mask_row;
    long rows, key_heads, group, tokens, width; /* group: query heads of a key head */
    float scale;
    int is_bfloat16;
    long next;  /* first pair of row and key head that no thread has taken */
    int failed; /* there was no memory */
};

/* Write `vectors` vectors of each query's output, from element `at` on: the values, times their weights. */
INLINE void weigh(const int count, const int vectors, const struct call *call, char *out, long at, const char *v,
                  const float *weights, long room, const float *factors, const int is_bfloat16)
{
    const long size = is_bfloat16 ? 2 : 4;
    floats outputs[QUERIES][2] = {{{0}}};
    for (long token = 0; token < call->tokens; token++)
        for (int part = 0; part < vectors; part++) {
            floats value = widened_load(v + token * call->v_token * size, at + part * WIDTH, is_bfloat16);
            for (int query = 0; query < count; query++)
                outputs[query][part] += value * weights[query * room + token];
        }
    for (int query = 0; query < count; query++)
        for (int part = 0; part < vectors; part++)
            rounded_store(out + query * call->width * size, at + part * WIDTH, is_bfloat16,
                         outputs[query][part] * factors[query]);
}

/* Compute `count` query heads of one key head. `scores` has room for count * tokens floats, rounded up to vectors. */
INLINE void attend(const int count, const struct call *call, char *out, const float *q, const char *k, const char *v,
                   const char *mask, float *scores, const int is_bfloat16)
{
    const long width = call->width, tokens = call->tokens, size = is_bfloat16 ? 2 : 4;
    const long room = (tokens + WIDTH - 1) / WIDTH * WIDTH;
    float most[QUERIES], factors[QUERIES];
    for (int query = 0; query < count; query++)
        most[query] = -INFINITY;
    for (long token = 0; token < tokens; token++) {
        if (mask && !mask[token]) {
            for (int query = 0; query < count; query++)
                scores[query * room + token] = -INFINITY;
            continue;
        }
        for (long i = 0; i < width * size; i += 64)
            __builtin_prefetch(v + token * call->v_token * size + i);
        floats products[QUERIES] = {{0}};
        for (long i = 0; i < width; i += WIDTH) {
            floats key = widened_load(k + token * call->k_token * size, i, is_bfloat16);
            for (int query = 0; query < count; query++)
                products[query] += key * load(q + query * width + i);
        }
        for (int query = 0; query < count; query++) {
            float score = total(products[query]);
            scores[query * room + token] = score;
            most[query] = score > most[query] || score != score ? score : most[query];
        }
    }
    for (int query = 0; query < count; query++) {
        floats sum = {0};
        float *row = scores + query * room;
        const float highest = most[query] == -INFINITY ? 0 : most[query]; /* all tokens are hidden */
        for (long token = tokens; token < room; token++)
            row[token] = -INFINITY;
        for (long token = 0; token < room; token += WIDTH) {
            floats value = exponential(load(row + token) - highest);
            sum += value;
            memcpy(row + token, &value, sizeof value);
        }
        const float whole = total(sum);
        factors[query] = whole ? 1 / whole : 0;
    }
    long i = 0;
    for (; i + 2 * WIDTH <= width; i += 2 * WIDTH)
        weigh(count, 2, call, out, i, v, scores, room, factors, is_bfloat16);
    for (; i < width; i += WIDTH)
        weigh(count, 1, call, out, i, v, scores, room, factors, is_bfloat16);
}

/* Compute all query heads of a key head of a row. */
INLINE void compute(const struct call *call, long number, float *memory, const int is_bfloat16)
{
    const long row = number / call->key_heads, head = number % call->key_heads, size = is_bfloat16 ? 2 : 4;
    const long width = call->width;
    const char *k = call->k + (row * call->k_row + head * call->k_head) * size;
    const char *v = call->v + (row * call->v_row + head * call->v_head) * size;
    const char *mask = call->mask ? call->mask + row * call->mask_row : 0;
    float *q = memory, *scores = memory + QUERIES * width;
    for (long first = 0; first < call->group; first += QUERIES) {
        const long left = call->group - first, count = left < QUERIES ? left : QUERIES;
        const long at = head * call->group + first;
        for (long query = 0; query < count; query++)
            for (long i = 0; i < width; i += WIDTH) {
                const char *from = call->q + (row * call->q_row + (at + query) * call->q_head) * size;
                floats value = widened_load(from, i, is_bfloat16) * call->scale;
                memcpy(q + query * width + i, &value, sizeof value);
            }
        char *out = call->out + (row * call->key_heads * call->group + at) * width * size;
        switch (count) {
        case 1: attend(1, call, out, q, k, v, mask, scores, is_bfloat16); break;
        case 2: attend(2, call, out, q, k, v, mask, scores, is_bfloat16); break;
        case 3: attend(3, call, out, q, k, v, mask, scores, is_bfloat16); break;
        default: attend(4, call, out, q, k, v, mask, scores, is_bfloat16);
        }
    }
}

/* Take pairs of row and key head until none is left. */
static void take(void *of)
{
    struct call *call = of;
    float *memory = memory_for(QUERIES * (call->width + call->tokens + WIDTH));
    if (!memory) {
        __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    long number;
    while ((number = __atomic_fetch_add(&call->next, 1, __ATOMIC_RELAXED)) < call->rows * call->key_heads)
        if (call->is_bfloat16)
            compute(call, number, memory, 1);
        else
            compute(call, number, memory, 0);
    free(memory);
}

/* `sizes`: rows, key heads, query heads of each, tokens, width, which is a multiple of WIDTH. `strides`: of q by row and
   head, of k and of v by row, head and token, of the mask by row. `parallel` is GOMP_parallel, or 0 for one thread.
   Returns 0 if there is no memory. */
int attend_one_token(void *out, const void *q, const void *k, const void *v, const void *mask, const long *sizes,
                     const long *strides, float scale, int is_bfloat16, start_threads parallel, unsigned threads)
{
    struct call call = {out,        q,          k,          v,          mask,       strides[0], strides[1],
                        strides[2], strides[3], strides[4], strides[5], strides[6], strides[7], strides[8],
                        sizes[0],   sizes[1],   sizes[2],   sizes[3],   sizes[4],   scale,      is_bfloat16};
    if (parallel && threads > 1)
        parallel(take, &call, threads, 0);
    else
        take(&call);
    return !call.failed;
}

/* Elements of a vector. */
int vector_width(void)
{
    return WIDTH;
}
