// Products of a few rows with many weights: to read the weights is what takes the time, so they are
// read once, as they lie in memory, and the next ones are asked for ahead.
//
// Each number of a product is a sum of its own, added up in the same order whatever rows are beside
// it and however many threads there are.

// Floats as they are in memory, aligned as floats are.
#define LANES(n) __attribute__((vector_size(4 * n), aligned(4), may_alias))
typedef float Four LANES(4);
typedef float Eight LANES(8);

static inline float total(Eight lanes) {
    union { Eight all; Four half[2]; } parts = {lanes};
    Four sums = parts.half[0] + parts.half[1];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

#ifdef __AVX512F__
typedef float Sixteen LANES(16);

static inline float total(Sixteen lanes) {
    union { Sixteen all; Eight half[2]; } parts = {lanes};
    return total(parts.half[0] + parts.half[1]);
}

typedef Sixteen Lanes;
enum { ROWS = 8, OUTS = 3 }; // the sums of a tile are in 24 of 32 registers
#else
typedef Eight Lanes;
enum { ROWS = 4, OUTS = 2 }; // in 8 of 16
#endif

enum {
    WIDTH = sizeof(Lanes) / sizeof(float),
    AHEAD = 2, // tiles
};

// A tile of the product: so many rows [in] times so many weights [in], into y [out].
template <int rows, int outs>
static inline void tile(const float *x, const float *weights, const float *bias, float *y, long in,
                        long out) {
    Lanes sums[rows][outs] = {};
    long k = 0;
    for (; k + WIDTH <= in; k += WIDTH) {
        Lanes read[outs];
        for (int o = 0; o < outs; o++) {
            // Beyond the last ones nothing is read: it is no more than a wish.
            __builtin_prefetch(weights + (o + AHEAD * outs) * in + k);
            read[o] = *(const Lanes *)(weights + o * in + k);
        }
        for (int r = 0; r < rows; r++) {
            const Lanes own = *(const Lanes *)(x + r * in + k);
            for (int o = 0; o < outs; o++)
                sums[r][o] += own * read[o];
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int o = 0; o < outs; o++) {
            float sum = total(sums[r][o]);
            for (long rest = k; rest < in; rest++)
                sum += x[r * in + rest] * weights[o * in + rest];
            y[r * out + o] = bias ? sum + bias[o] : sum;
        }
    }
}

// All rows, at most so many at a time, times so many weights, which stay in a processor's own cache.
template <int most, int outs>
static inline void strip(const float *x, const float *weights, const float *bias, float *y,
                         long rows, long in, long out) {
    for (; rows >= most; rows -= most, x += most * in, y += most * out)
        tile<most, outs>(x, weights, bias, y, in, out);
    if constexpr (most > 1)
        strip<most / 2, outs>(x, weights, bias, y, rows, in, out);
}

// Rows x [rows, in] times weights [out, in], transposed, and a bias [out] or none: y [rows, out].
extern "C" void skinny(const float *x, const float *weights, const float *bias, float *y, long rows,
                       long in, long out) {
    const long whole = out / OUTS * OUTS;
#pragma omp parallel for schedule(static)
    for (long o = 0; o < whole; o += OUTS)
        strip<ROWS, OUTS>(x, weights + o * in, bias ? bias + o : bias, y + o, rows, in, out);
    for (long o = whole; o < out; o++)
        strip<ROWS, 1>(x, weights + o * in, bias ? bias + o : bias, y + o, rows, in, out);
}
