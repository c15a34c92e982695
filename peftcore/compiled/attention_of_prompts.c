/* Attention of many query tokens in each row, for prompts and scoring. `attention.py` says why it exists.

   Keys and values are widened to float32 once for a block of queries, and sums and weights are in float32. Keys that no
   query of a few neighbours sees, at the beginning or at the end, are left out. */

#include "vectors.h"

#define QUERIES 6 /* pairs of token and query head that share each read of keys and values */
#define PARTS 4   /* vectors of keys, or of a value, whose sums are in registers */
#define BLOCK 64  /* query tokens that share widened keys and values; a multiple of WIDTH */

/* A call. Strides are in elements; the last dimension of each tensor lies without gaps. */
struct call {
    char *out;             /* (rows, queries, heads, width), without gaps */
    const char *q, *k, *v; /* (rows, heads, queries, width), (rows, key heads, tokens, width) twice */
    const char *mask;      /* a byte for each token of each query, 0 for a hidden one; 0 for no mask */
    long q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, mask_row, mask_token;
    long rows, key_heads, group, queries, tokens, width; /* group: query heads of a key head */
    float scale;
    int is_causal; /* without a mask, a query sees the tokens up to its own */
    int is_bfloat16;
    long next;  /* first block that no thread has taken */
    int failed; /* there was no memory */
};

/* The memory of a thread. `room`: tokens, rounded up to PARTS vectors. */
struct memory {
    long room;
    float *keys;   /* (width, room) */
    float *values; /* (room, width) */
    float *q;      /* (QUERIES, width) */
    float *scores; /* (QUERIES, room), then weights */
    char *visible; /* (QUERIES, room): 0 for a token that a query does not see */
};

static int is_empty(const char *eight_bytes)
{
    uint64_t word;
    memcpy(&word, eight_bytes, 8);
    return !word;
}

/* Write which tokens a query sees to `visible`. They are among those from `*first` to `*end`, multiples of 8. */
static void find_visible(const struct call *call, long row, long query, char *visible, long room, long *first,
                         long *end)
{
    const long tokens = call->is_causal ? query + 1 : call->tokens;
    if (call->mask)
        memcpy(visible, call->mask + row * call->mask_row + query * call->mask_token, tokens);
    else
        memset(visible, 1, tokens);
    memset(visible + tokens, 0, room - tokens);
    *first = 0, *end = (tokens + 7) / 8 * 8;
    while (*end && is_empty(visible + *end - 8))
        *end -= 8;
    while (*first < *end && is_empty(visible + *first))
        *first += 8;
}

/* Widen keys, as columns, and values of a key head up to token `end`. That is a multiple of BLOCK or the last one, so that
   zeros follow up to the next multiple of WIDTH. */
INLINE void widen(const struct call *call, struct memory *memory, const char *k, const char *v, long end,
                  const int is_bfloat16)
{
    const long size = is_bfloat16 ? 2 : 4, width = call->width, room = memory->room;
    for (long token = 0; token < end; token += WIDTH)
        for (long i = 0; i < width; i += WIDTH) {
            floats vectors[WIDTH];
            for (int n = 0; n < WIDTH; n++)
                vectors[n] = token + n < end ? widened_load(k + (token + n) * call->k_token * size, i, is_bfloat16)
                                             : (floats){0};
            exchange(vectors, WIDTH);
            for (int n = 0; n < WIDTH; n++)
                store(memory->keys + (i + n) * room + token, vectors[n]);
        }
    for (long token = 0; token < end; token++)
        for (long i = 0; i < width; i += WIDTH)
            store(memory->values + token * width + i,
                  widened_load(v + token * call->v_token * size, i, is_bfloat16));
}

/* The scores of PARTS vectors of keys, from token `at` on. */
INLINE void score(const int count, const struct memory *memory, long width, long at)
{
    const long room = memory->room;
    floats sums[QUERIES][PARTS] = {{{0}}};
    for (long i = 0; i < width; i++) {
        floats keys[PARTS];
        for (int part = 0; part < PARTS; part++)
            keys[part] = kept(load(memory->keys + i * room + at + part * WIDTH));
        for (int n = 0; n < count; n++)
            for (int part = 0; part < PARTS; part++)
                sums[n][part] += keys[part] * memory->q[n * width + i];
    }
    for (int n = 0; n < count; n++)
        for (int part = 0; part < PARTS; part++)
            store(memory->scores + n * room + at + part * WIDTH, sums[n][part]);
}

/* Make weights of the scores from token `first` to `end`, multiples of WIDTH; returns 1 / their sum, or 0. */
INLINE float weigh(float *scores, const char *visible, long first, long end)
{
    const floats lowest = (floats){0} - INFINITY;
    floats highest = lowest;
    for (long token = first; token < end; token += WIDTH) {
        bytes seen;
        memcpy(&seen, visible + token, sizeof seen);
        words is_seen = (words)(__builtin_convertvector(seen, words) != 0);
        floats found = (floats)((is_seen & (words)load(scores + token)) | (~is_seen & (words)lowest));
        words is_higher = (words)(found > highest);
        highest = (floats)((is_higher & (words)found) | (~is_higher & (words)highest));
        store(scores + token, found);
    }
    float most = -INFINITY;
    for (int lane = 0; lane < WIDTH; lane++)
        most = highest[lane] > most ? highest[lane] : most;
    if (most == -INFINITY) /* all tokens are hidden */
        most = 0;
    floats sum = {0};
    for (long token = first; token < end; token += WIDTH) {
        floats weights = exponential(load(scores + token) - most);
        sum += weights;
        store(scores + token, weights);
    }
    const float whole = total(sum);
    return whole ? 1 / whole : 0;
}

/* Write `parts` vectors of each query's output, from element `at` on: the values, times their weights. */
INLINE void add_values(const int count, const int parts, const struct memory *memory, long width, long at, long first,
                       long end, const float *factors, char *const *outputs, const int is_bfloat16)
{
    floats sums[QUERIES][PARTS] = {{{0}}};
    for (long token = first; token < end; token++) {
        floats values[PARTS];
        for (int part = 0; part < parts; part++)
            values[part] = kept(load(memory->values + token * width + at + part * WIDTH));
        for (int n = 0; n < count; n++)
            for (int part = 0; part < parts; part++)
                sums[n][part] += values[part] * memory->scores[n * memory->room + token];
    }
    for (int n = 0; n < count; n++)
        for (int part = 0; part < parts; part++)
            rounded_store(outputs[n], at + part * WIDTH, is_bfloat16, sums[n][part] * factors[n]);
}

/* Compute `count` pairs of token and query head of a key head; pair n is token n / group with head n % group. */
INLINE void attend(const int count, const struct call *call, const struct memory *memory, long row, long head,
                   long pair, const int is_bfloat16)
{
    const long size = is_bfloat16 ? 2 : 4, width = call->width, group = call->group;
    const long step = PARTS * WIDTH, room = memory->room;
    long first = room, end = 0, last_query = -1;
    const char *last_visible = 0, *visible[QUERIES];
    char *outputs[QUERIES];
    float factors[QUERIES];
    for (int n = 0; n < count; n++) {
        const long query = (pair + n) / group, at = head * group + (pair + n) % group;
        if (query != last_query) {
            long own_first, own_end;
            find_visible(call, row, query, memory->visible + n * room, room, &own_first, &own_end);
            first = own_first < first ? own_first : first;
            end = own_end > end ? own_end : end;
            last_query = query, last_visible = memory->visible + n * room;
        }
        visible[n] = last_visible;
        const char *q = call->q + (row * call->q_row + at * call->q_head + query * call->q_token) * size;
        for (long i = 0; i < width; i += WIDTH)
            store(memory->q + n * width + i, widened_load(q, i, is_bfloat16) * call->scale);
        outputs[n] = call->out + ((row * call->queries + query) * call->key_heads * group + at) * width * size;
    }
    first = first / WIDTH * WIDTH, end = (end + WIDTH - 1) / WIDTH * WIDTH;
    for (long token = first / step * step; token < end; token += step)
        score(count, memory, width, token);
    for (int n = 0; n < count; n++)
        factors[n] = weigh(memory->scores + n * room, visible[n], first, end);
    long i = 0;
    for (; i + PARTS * WIDTH <= width; i += PARTS * WIDTH)
        add_values(count, PARTS, memory, width, i, first, end, factors, outputs, is_bfloat16);
    for (; i < width; i += WIDTH)
        add_values(count, 1, memory, width, i, first, end, factors, outputs, is_bfloat16);
}

/* Compute a block of query tokens of a row, with all query heads of a key head. */
INLINE void compute(const struct call *call, struct memory *memory, long number, const int is_bfloat16)
{
    const long blocks = (call->queries + BLOCK - 1) / BLOCK, size = is_bfloat16 ? 2 : 4;
    const long block = number % blocks, head = number / blocks % call->key_heads;
    const long row = number / blocks / call->key_heads, left = call->queries - block * BLOCK;
    const long until = block * BLOCK + (left < BLOCK ? left : BLOCK), end = until * call->group;
    widen(call, memory, call->k + (row * call->k_row + head * call->k_head) * size,
          call->v + (row * call->v_row + head * call->v_head) * size, call->is_causal ? until : call->tokens,
          is_bfloat16);
    long pair = block * BLOCK * call->group;
    for (; pair + QUERIES <= end; pair += QUERIES)
        attend(QUERIES, call, memory, row, head, pair, is_bfloat16);
    for (; pair < end; pair++)
        attend(1, call, memory, row, head, pair, is_bfloat16);
}

/* Take blocks until none is left. */
static void take(void *of)
{
    struct call *call = of;
    const long step = PARTS * WIDTH, width = call->width, room = (call->tokens + step - 1) / step * step;
    float *keys = memory_for(2 * room * width + QUERIES * (width + room + room / 4));
    if (!keys) {
        __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    memset(keys, 0, 2 * room * width * sizeof(float));
    float *q = keys + 2 * room * width;
    struct memory memory = {room, keys, keys + room * width, q, q + QUERIES * width,
                            (char *)(q + QUERIES * (width + room))};
    const long blocks = (call->queries + BLOCK - 1) / BLOCK * call->rows * call->key_heads;
    long number;
    while ((number = __atomic_fetch_add(&call->next, 1, __ATOMIC_RELAXED)) < blocks)
        if (call->is_bfloat16)
            compute(call, &memory, number, 1);
        else
            compute(call, &memory, number, 0);
    free(keys);
}

/* `sizes`: rows, key heads, query heads of each, query tokens, tokens, width, which is a multiple of WIDTH. `strides`:
   of q, k and v by row, head and token, of the mask by row and query. `parallel` is GOMP_parallel, or 0 for one thread.
   Returns 0 if there is no memory. */
int attend_prompts(void *out, const void *q, const void *k, const void *v, const void *mask, const long *sizes,
                   const long *strides, float scale, int is_causal, int is_bfloat16, start_threads parallel,
                   unsigned threads)
{
    struct call call = {out,        q,          k,          v,          mask,       strides[0], strides[1],
                        strides[2], strides[3], strides[4], strides[5], strides[6], strides[7], strides[8],
                        strides[9], strides[10], sizes[0],  sizes[1],   sizes[2],   sizes[3],   sizes[4],
                        sizes[5],   scale,      is_causal,  is_bfloat16};
    if (parallel && threads > 1)
        parallel(take, &call, threads, 0);
    else
        take(&call);
    return !call.failed;
}
