/* Changes y to g * (y + s * B diag(e) A x) for a few tokens, in one call. `compiled_low_rank.py` says why it exists.

   All matrices lie row by row without gaps, and sums are in float32. */

#include "vectors.h"

#define TOGETHER 4 /* rows that share each read of a factor */
#define MOST_ROWS 32 /* rows of one adapter that a thread takes at once */

/* h (rows, r) = A x, each element times `scale` and, if given, its element of `diagonal`. */
INLINE void project(const int rows, float *h, const float *x, const float *a, const float *diagonal, float scale,
                    long inputs, long r)
{
    for (long k = 0; k < r; k++, a += inputs) {
        floats sums[TOGETHER] = {{0}};
        long i = 0;
        for (; i + WIDTH <= inputs; i += WIDTH)
            for (int row = 0; row < rows; row++)
                sums[row] += load(a + i) * load(x + row * inputs + i);
        for (int row = 0; row < rows; row++) {
            float sum = total(sums[row]);
            for (long rest = i; rest < inputs; rest++)
                sum += a[rest] * x[row * inputs + rest];
            h[row * r + k] = sum * (diagonal ? scale * diagonal[k] : scale);
        }
    }
}

/* Add WIDTH outputs to each row, from output `at` on, and multiply by `gain`, if given. `columns` (r, WIDTH) are their
   rows of B, transposed. */
INLINE void add(const int rows, void *y, long at, const float *h, const float *columns, const float *gain, long outputs,
                long r, const int is_bfloat16)
{
    floats sums[TOGETHER] = {{0}};
    for (long k = 0; k < r; k++)
        for (int row = 0; row < rows; row++)
            sums[row] += load(columns + k * WIDTH) * h[row * r + k];
    for (int row = 0; row < rows; row++) {
        floats output = widened_load(y, row * outputs + at, is_bfloat16) + sums[row];
        rounded_store(y, row * outputs + at, is_bfloat16, gain ? output * load(gain + at) : output);
    }
}

/* `scratch` has room for r * (WIDTH + rows) floats, and is aligned like x to a line of the cache. */
INLINE void add_low_rank(void *y, const float *x, const float *a, const float *b, const float *diagonal,
                         const float *gain, float scale, long rows, long inputs, long r, long outputs, float *scratch,
                         const int is_bfloat16)
{
    float *columns = scratch, *h = scratch + r * WIDTH;
    const long size = is_bfloat16 ? 2 : 4;
    long row = 0;
    for (; row + TOGETHER <= rows; row += TOGETHER)
        project(TOGETHER, h + row * r, x + row * inputs, a, diagonal, scale, inputs, r);
    for (; row < rows; row++)
        project(1, h + row * r, x + row * inputs, a, diagonal, scale, inputs, r);
    long at = 0;
    for (; at + WIDTH <= outputs; at += WIDTH) {
        for (long k = 0; k < r; k++)
            for (int lane = 0; lane < WIDTH; lane++)
                columns[k * WIDTH + lane] = b[(at + lane) * r + k];
        for (row = 0; row + TOGETHER <= rows; row += TOGETHER)
            add(TOGETHER, (char *)y + row * outputs * size, at, h + row * r, columns, gain, outputs, r, is_bfloat16);
        for (; row < rows; row++)
            add(1, (char *)y + row * outputs * size, at, h + row * r, columns, gain, outputs, r, is_bfloat16);
    }
    for (; at < outputs; at++)
        for (row = 0; row < rows; row++) {
            float sum = 0;
            for (long k = 0; k < r; k++)
                sum += h[row * r + k] * b[at * r + k];
            uint16_t *half = (uint16_t *)y + row * outputs + at;
            float *whole = (float *)y + row * outputs + at;
            float output = ((is_bfloat16 ? widened(*half) : *whole) + sum) * (gain ? gain[at] : 1);
            if (is_bfloat16)
                *half = rounded(output);
            else
                *whole = output;
        }
}

/* A call: rows that have one adapter, the first, or `each` rows at a time their own. Rows whose pointer to A is 0 have no
   adapter. */
struct call {
    char *y;
    const char *x;
    const float *const *a, *const *b;
    const float *scales;
    const long *ranks;
    long each;                     /* rows with one adapter, which lie next to each other */
    const float *diagonal, *gain;  /* of the one adapter; 0 for none */
    long rows, inputs, outputs;
    int is_bfloat16;
    long most;   /* rows of one adapter that a thread takes at once */
    long next;   /* first row that no thread has taken */
    int failed;  /* there was no memory */
};

/* Compute `rows` rows of one adapter, from row `first` on. */
static void compute(struct call *call, long first, long rows)
{
    const long size = call->is_bfloat16 ? 2 : 4, inputs = call->inputs, outputs = call->outputs;
    const long adapter = first / call->each, r = call->ranks[adapter];
    const float *a = call->a[adapter], *b = call->b[adapter], scale = call->scales[adapter];
    const char *x = call->x + first * inputs * size;
    char *y = call->y + first * outputs * size;
    long widened_inputs = call->is_bfloat16 ? (rows * inputs + 15) / 16 * 16 : 0;
    float *memory = memory_for(widened_inputs + r * (WIDTH + rows));
    if (!memory) {
        __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    float *scratch = memory + widened_inputs;
    if (call->is_bfloat16) {
        for (long i = 0; i < rows * inputs; i++)
            memory[i] = widened(((const uint16_t *)x)[i]);
        add_low_rank(y, memory, a, b, call->diagonal, call->gain, scale, rows, inputs, r, outputs, scratch, 1);
    } else
        add_low_rank(y, (const float *)x, a, b, call->diagonal, call->gain, scale, rows, inputs, r, outputs, scratch,
                     0);
    free(memory);
}

static int have_one_adapter(const struct call *call, long first, long second)
{
    long one = first / call->each, other = second / call->each;
    return one == other || (call->a[one] == call->a[other] && call->b[one] == call->b[other] &&
                            call->scales[one] == call->scales[other]);
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
        if (call->a[first / call->each])
            compute(call, first, end - first);
        first = __atomic_load_n(&call->next, __ATOMIC_RELAXED);
    }
}

/* `parallel` is GOMP_parallel of PyTorch's OpenMP library, or 0 for one thread. Returns 0, with some rows of y changed,
   if there is no memory. */
static int compute_rows(struct call call, start_threads parallel, unsigned threads)
{
    if (parallel && threads > 1)
        parallel(take_rows, &call, threads, 0);
    else
        take_rows(&call);
    return !call.failed;
}

static int add_of_one(void *y, const void *x, const float *a, const float *b, const float *diagonal, const float *gain,
                      float scale, long rows, long inputs, long r, long outputs, start_threads parallel,
                      unsigned threads, int is_bfloat16)
{
    long share = parallel && threads > 1 ? (rows + threads - 1) / threads : rows;
    long most = (share + TOGETHER - 1) / TOGETHER * TOGETHER;
    struct call call = {y, x, &a, &b, &scale, &r, rows, diagonal, gain, rows, inputs, outputs, is_bfloat16, most, 0, 0};
    return compute_rows(call, parallel, threads);
}

static int add_by_row(void *y, const void *x, const float *const *a, const float *const *b, const float *scales,
                      const long *ranks, long rows, long each, long inputs, long outputs, start_threads parallel,
                      unsigned threads, int is_bfloat16)
{
    struct call call = {y, x, a, b, scales, ranks, each, 0, 0, rows, inputs, outputs, is_bfloat16, MOST_ROWS, 0, 0};
    return compute_rows(call, parallel, threads);
}

/* x (rows, inputs) and y (rows, outputs) in float32, with one adapter. */
int add_low_rank_float32(float *y, const float *x, const float *a, const float *b, const float *diagonal,
                         const float *gain, float scale, long rows, long inputs, long r, long outputs,
                         start_threads parallel, unsigned threads)
{
    return add_of_one(y, x, a, b, diagonal, gain, scale, rows, inputs, r, outputs, parallel, threads, 0);
}

/* The same with x and y in bfloat16. */
int add_low_rank_bfloat16(uint16_t *y, const uint16_t *x, const float *a, const float *b, const float *diagonal,
                          const float *gain, float scale, long rows, long inputs, long r, long outputs,
                          start_threads parallel, unsigned threads)
{
    return add_of_one(y, x, a, b, diagonal, gain, scale, rows, inputs, r, outputs, parallel, threads, 1);
}

/* x and y in float32, with A, B, s and r of each `each` rows. */
int add_low_rank_by_row_float32(float *y, const float *x, const float *const *a, const float *const *b,
                                const float *scales, const long *ranks, long rows, long each, long inputs, long outputs,
                                start_threads parallel, unsigned threads)
{
    return add_by_row(y, x, a, b, scales, ranks, rows, each, inputs, outputs, parallel, threads, 0);
}

/* The same with x and y in bfloat16. */
int add_low_rank_by_row_bfloat16(uint16_t *y, const uint16_t *x, const float *const *a, const float *const *b,
                                 const float *scales, const long *ranks, long rows, long each, long inputs, long outputs,
                                 start_threads parallel, unsigned threads)
{
    return add_by_row(y, x, a, b, scales, ranks, rows, each, inputs, outputs, parallel, threads, 1);
}
