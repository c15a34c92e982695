/* Changes y to g * (y + s * B diag(e) A x) for a few tokens, in one call. `low_rank.py` says why it exists.

   All matrices lie row by row without gaps, and sums are in float32. x and y have one type, float32 or bfloat16, and so
   have A and B. */

#include "vectors.h"

#define TOGETHER 4 /* rows that share each read of a factor */
#define MOST_ROWS 32 /* rows of one adapter that a thread takes at once; a multiple of TOGETHER */

/* h = A x for `rows` rows, and for `count` rows of A from row k on; each element times `scale` and, if given, its element
   of `diagonal`. */
INLINE void project_rows(const int rows, const int count, float *h, const float *x, const void *a,
                         const float *diagonal, float scale, long inputs, long k, long r,
                         const int has_bfloat16_factors)
{
    floats sums[WIDTH] = {{0}};
    long i = 0;
    for (; i + WIDTH <= inputs; i += WIDTH) {
        floats input[TOGETHER];
        for (int row = 0; row < rows; row++)
            input[row] = kept(load(x + row * inputs + i));
        for (int n = 0; n < count; n++) {
            floats factor = kept(widened_load(a, (k + n) * inputs + i, has_bfloat16_factors));
            for (int row = 0; row < rows; row++)
                sums[row * count + n] += factor * input[row];
        }
    }
    float found[WIDTH];
    if (rows * count == WIDTH)
        store(found, sums_of_groups(sums, WIDTH));
    else
        for (int n = 0; n < rows * count; n++)
            found[n] = total(sums[n]);
    for (int row = 0; row < rows; row++)
        for (int n = 0; n < count; n++) {
            float sum = found[row * count + n];
            for (long rest = i; rest < inputs; rest++)
                sum += element(a, (k + n) * inputs + rest, has_bfloat16_factors) * x[row * inputs + rest];
            h[row * r + k + n] = sum * (diagonal ? scale * diagonal[k + n] : scale);
        }
}

/* h (rows, r) = A x for `rows` rows and all of A, with the same factors. */
INLINE void project(const int rows, float *h, const float *x, const void *a, const float *diagonal, float scale,
                    long inputs, long r, const int has_bfloat16_factors)
{
    long k = 0; /* with one row, reading A takes the time, and is fastest from its first element to its last */
    for (; rows > 1 && k + WIDTH / TOGETHER <= r; k += WIDTH / TOGETHER)
        project_rows(rows, WIDTH / TOGETHER, h, x, a, diagonal, scale, inputs, k, r, has_bfloat16_factors);
    for (; k < r; k++)
        project_rows(rows, 1, h, x, a, diagonal, scale, inputs, k, r, has_bfloat16_factors);
}

/* WIDTH rows of B, which have r elements each, are read as vectors in two cases. If r is a multiple of WIDTH, each row is
   several vectors. If r is a smaller power of 2, each vector is several rows. */
INLINE int are_vectors(long r)
{
    return r % WIDTH == 0 || (r < WIDTH && !(r & (r - 1)));
}

/* Write `count` columns of WIDTH rows of B to `columns`. */
INLINE void write_columns(float *columns, const void *b, long first, long stride, const int count,
                          const int has_bfloat16_factors)
{
    floats vectors[WIDTH];
    for (int k = 0; k < count; k++)
        vectors[k] = widened_load(b, first + k * stride, has_bfloat16_factors);
    exchange(vectors, count);
    for (int k = 0; k < count; k++)
        store(columns + k * WIDTH, vectors[k]);
}

/* Write WIDTH rows of B, from element `first` on, to `columns` (r, WIDTH), as columns. */
INLINE void transpose(float *columns, const void *b, long first, long r, const int has_bfloat16_factors)
{
    if (r % WIDTH == 0)
        for (long k = 0; k < r; k += WIDTH)
            write_columns(columns + k * WIDTH, b, first + k, r, WIDTH, has_bfloat16_factors);
    else if (r == 8)
        write_columns(columns, b, first, WIDTH, 8, has_bfloat16_factors);
    else if (r == 4)
        write_columns(columns, b, first, WIDTH, 4, has_bfloat16_factors);
    else
        for (long k = 0; k < r; k++)
            for (int lane = 0; lane < WIDTH; lane++)
                columns[k * WIDTH + lane] = element(b, first + lane * r + k, has_bfloat16_factors);
}

/* WIDTH outputs of one row: WIDTH rows of B, from element `first` on, times h, which is repeated if it is shorter than a
   vector. */
INLINE floats outputs_of_row(const void *b, long first, const float *h, long r, const int has_bfloat16_factors)
{
    floats sums[WIDTH] = {{0}};
    if (r % WIDTH == 0) {
        for (long k = 0; k < r; k += WIDTH)
            for (int lane = 0; lane < WIDTH; lane++)
                sums[lane] += widened_load(b, first + lane * r + k, has_bfloat16_factors) * load(h + k);
        return sums_of_groups(sums, WIDTH);
    }
    for (int k = 0; k < WIDTH; k++)
        if (k < r)
            sums[k] = widened_load(b, first + k * WIDTH, has_bfloat16_factors) * load(h);
    return r == 8   ? sums_of_groups(sums, 8)
           : r == 4 ? sums_of_groups(sums, 4)
           : r == 2 ? sums_of_groups(sums, 2)
                    : sums[0];
}

/* Add `sums` to WIDTH outputs, from element `at` on, and multiply by `gain`, if given. */
INLINE void add_sums(void *y, long at, floats sums, const float *gain, const int is_bfloat16)
{
    floats output = widened_load(y, at, is_bfloat16) + sums;
    rounded_store(y, at, is_bfloat16, gain ? output * load(gain) : output);
}

/* Add WIDTH outputs to each of `rows` rows, with columns of B. */
INLINE void add_columns(const int rows, void *y, long at, const float *h, const float *columns, const float *gain,
                        long outputs, long r, const int is_bfloat16)
{
    floats sums[TOGETHER] = {{0}};
    for (long k = 0; k < r; k++)
        for (int row = 0; row < rows; row++)
            sums[row] += load(columns + k * WIDTH) * h[row * r + k];
    for (int row = 0; row < rows; row++)
        add_sums(y, row * outputs + at, sums[row], gain, is_bfloat16);
}

/* `scratch` has room for r * (WIDTH + rows) + TOGETHER * WIDTH floats, and is aligned like x to a line of the cache. */
INLINE void add_low_rank(void *y, const float *x, const void *a, const void *b, const float *diagonal,
                         const float *gain, float scale, long rows, long inputs, long r, long outputs, float *scratch,
                         const int is_bfloat16, const int has_bfloat16_factors)
{
    float *columns = scratch, *repeated = columns + r * WIDTH, *h = repeated + TOGETHER * WIDTH;
    const long size = is_bfloat16 ? 2 : 4, together = rows / TOGETHER * TOGETHER;
    const int has_vectors = are_vectors(r);
    long row = 0;
    for (; row < together; row += TOGETHER)
        project(TOGETHER, h + row * r, x + row * inputs, a, diagonal, scale, inputs, r, has_bfloat16_factors);
    for (; row < rows; row++)
        project(1, h + row * r, x + row * inputs, a, diagonal, scale, inputs, r, has_bfloat16_factors);
    for (row = together; has_vectors && r < WIDTH && row < rows; row++)
        for (int lane = 0; lane < WIDTH; lane++)
            repeated[(row - together) * WIDTH + lane] = h[row * r + (lane & (r - 1))];
    long at = 0;
    for (; at + WIDTH <= outputs; at += WIDTH) {
        const float *gains = gain ? gain + at : 0;
        if (together || !has_vectors)
            transpose(columns, b, at * r, r, has_bfloat16_factors);
        for (row = 0; row < together; row += TOGETHER)
            add_columns(TOGETHER, (char *)y + row * outputs * size, at, h + row * r, columns, gains, outputs, r,
                        is_bfloat16);
        for (; row < rows; row++) {
            if (!has_vectors) {
                add_columns(1, (char *)y + row * outputs * size, at, h + row * r, columns, gains, outputs, r,
                            is_bfloat16);
                continue;
            }
            const float *full = r < WIDTH ? repeated + (row - together) * WIDTH : h + row * r;
            add_sums(y, row * outputs + at, outputs_of_row(b, at * r, full, r, has_bfloat16_factors), gains,
                     is_bfloat16);
        }
    }
    for (; at < outputs; at++)
        for (row = 0; row < rows; row++) {
            float sum = 0;
            for (long k = 0; k < r; k++)
                sum += h[row * r + k] * element(b, at * r + k, has_bfloat16_factors);
            const long place = row * outputs + at;
            float output = (element(y, place, is_bfloat16) + sum) * (gain ? gain[at] : 1);
            if (is_bfloat16)
                ((uint16_t *)y)[place] = rounded(output);
            else
                ((float *)y)[place] = output;
        }
}

/* An adapter; none if A is 0. `low_rank.py` makes this structure and the next one. */
struct low_rank {
    const void *a, *b;
    long r;
    float scale;
};

struct adapters {
    long inputs, outputs;
    int are_bfloat16; /* A and B; else they are float32 */
    struct low_rank of_rows[];
};

/* A call, in which `each` rows at a time have one adapter. */
struct call {
    char *y;
    const char *x;
    const struct adapters *adapters;
    long rows, each;
    int is_bfloat16;              /* x and y; else they are float32 */
    const float *diagonal, *gain; /* of the one adapter; 0 for none */
    long most;                    /* rows of one adapter that a thread takes at once */
    long next;                    /* first row that no thread has taken */
    int failed;                   /* there was no memory */
};

static const struct low_rank *adapter_of(const struct call *call, long row)
{
    return call->adapters->of_rows + row / call->each;
}

/* Compute `rows` rows of one adapter, from row `first` on. */
static void compute(struct call *call, long first, long rows)
{
    const long size = call->is_bfloat16 ? 2 : 4, inputs = call->adapters->inputs, outputs = call->adapters->outputs;
    const struct low_rank *adapter = adapter_of(call, first);
    const void *a = adapter->a, *b = adapter->b;
    const float *diagonal = call->diagonal, *gain = call->gain, scale = adapter->scale;
    const long r = adapter->r;
    const char *x = call->x + first * inputs * size;
    char *y = call->y + first * outputs * size;
    long widened_inputs = call->is_bfloat16 ? (rows * inputs + 15) / 16 * 16 : 0;
    float *memory = memory_for(widened_inputs + r * (WIDTH + rows) + TOGETHER * WIDTH);
    if (!memory) {
        __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    float *scratch = memory + widened_inputs;
    if (call->is_bfloat16)
        for (long i = 0; i < rows * inputs; i++)
            memory[i] = widened(((const uint16_t *)x)[i]);
    if (call->adapters->are_bfloat16)
        add_low_rank(y, memory, a, b, diagonal, gain, scale, rows, inputs, r, outputs, scratch, 1, 1);
    else if (call->is_bfloat16)
        add_low_rank(y, memory, a, b, diagonal, gain, scale, rows, inputs, r, outputs, scratch, 1, 0);
    else
        add_low_rank(y, (const float *)x, a, b, diagonal, gain, scale, rows, inputs, r, outputs, scratch, 0, 0);
    free(memory);
}

static int have_one_adapter(const struct call *call, long first, long second)
{
    const struct low_rank *one = adapter_of(call, first), *other = adapter_of(call, second);
    return one == other || (one->a == other->a && one->b == other->b && one->scale == other->scale);
}

/* Take the next rows that lie next to each other and have one adapter, and compute them together; until none is left. */
static void take_rows(void *of)
{
    struct call *call = of;
    long first = __atomic_load_n(&call->next, __ATOMIC_RELAXED);
    while (first < call->rows) {
        long end = first + 1;
        while (end < call->rows && end - first < call->most && have_one_adapter(call, first, end))
            end++;
        if (!__atomic_compare_exchange_n(&call->next, &first, end, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            continue; /* another thread was faster; `first` is now what is left */
        if (adapter_of(call, first)->a)
            compute(call, first, end - first);
        first = __atomic_load_n(&call->next, __ATOMIC_RELAXED);
    }
}

/* x (rows, inputs) and y (rows, outputs). `diagonal` and `gain` are 0 or those of the one adapter that all rows have.
   `parallel` is GOMP_parallel of PyTorch's OpenMP library, or 0 for one thread. Returns 0, with some rows of y changed,
   if there is no memory. */
int add_low_rank_to_rows(void *y, const void *x, const struct adapters *adapters, long rows, long each, int is_bfloat16,
                         const float *diagonal, const float *gain, start_threads parallel, unsigned threads)
{
    struct call call = {.y = y, .x = x, .adapters = adapters, .rows = rows, .each = each, .is_bfloat16 = is_bfloat16,
                        .diagonal = diagonal, .gain = gain, .most = MOST_ROWS};
    if (each == rows) { /* each thread takes its share at once */
        long share = parallel && threads > 1 ? (rows + threads - 1) / threads : rows;
        call.most = (share + TOGETHER - 1) / TOGETHER * TOGETHER;
    }
    if (parallel && threads > 1)
        parallel(take_rows, &call, threads, 0);
    else
        take_rows(&call);
    return !call.failed;
}
