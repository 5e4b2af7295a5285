// What sampling one token after the other takes the time for: a few rows are multiplied with many
// weights, and read many keys and values. They are read once, as they lie in memory.
//
// Each number is a sum of its own, added up in the same order whatever rows are beside it and however
// many threads there are.

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
    AHEAD = 2048, // bytes
};

typedef int Whole LANES(WIDTH);

// A float of bf16 is the upper half of one of fp32.
typedef unsigned short Half;
typedef Half Halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

static inline Lanes lanes(const float *at) { return *(const Lanes *)at; }
static inline Lanes lanes(const Half *at) {
    return (Lanes)(__builtin_convertvector(*(const Halves *)at, Whole) << 16);
}

static inline float single(float number) { return number; }
static inline float single(Half number) {
    union { unsigned bits; float number; } whole = {(unsigned)number << 16};
    return whole.number;
}

// Products.

// A tile of the product: so many rows [in] times so many weights [in], into y [out]. The weights are
// `apart` of one another, so that each is the next one of those that the tile before has read.
template <int rows, int outs, typename Weight>
static inline void tile(const float *x, const Weight *weights, const float *bias, float *y, long in,
                        long out, long apart) {
    Lanes sums[rows][outs] = {};
    long k = 0;
    for (; k + WIDTH <= in; k += WIDTH) {
        Lanes read[outs];
        for (int o = 0; o < outs; o++) {
            const Weight *at = weights + o * apart * in + k;
            // Beyond the last ones it is no more than a wish.
            __builtin_prefetch((const char *)at + AHEAD);
            read[o] = lanes(at);
        }
        for (int r = 0; r < rows; r++) {
            const Lanes own = lanes(x + r * in + k);
            for (int o = 0; o < outs; o++)
                sums[r][o] += own * read[o];
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int o = 0; o < outs; o++) {
            float sum = total(sums[r][o]);
            for (long rest = k; rest < in; rest++)
                sum += x[r * in + rest] * single(weights[o * apart * in + rest]);
            y[r * out + o * apart] = bias ? sum + bias[o * apart] : sum;
        }
    }
}

// All rows, at most so many at a time, times so many weights, which stay in a processor's own cache.
template <int most, int outs, typename Weight>
static inline void strip(const float *x, const Weight *weights, const float *bias, float *y,
                         long rows, long in, long out, long apart) {
    for (; rows >= most; rows -= most, x += most * in, y += most * out)
        tile<most, outs>(x, weights, bias, y, in, out, apart);
    if constexpr (most > 1)
        strip<most / 2, outs>(x, weights, bias, y, rows, in, out, apart);
}

// Rows x [rows, in] times weights [out, in], transposed, and a bias [out] or none: y [rows, out].
template <typename Weight>
static void multiply(const float *x, const Weight *weights, const float *bias, float *y, long rows,
                     long in, long out) {
    // As many streams of weights, each of which lies in one piece.
    const long stream = out / OUTS;
#pragma omp parallel for schedule(static)
    for (long o = 0; o < stream; o++)
        strip<ROWS, OUTS>(x, weights + o * in, bias ? bias + o : bias, y + o, rows, in, out, stream);
    for (long o = stream * OUTS; o < out; o++)
        strip<ROWS, 1>(x, weights + o * in, bias ? bias + o : bias, y + o, rows, in, out, 1);
}

// Attention.

// e to the power of numbers that are not above 0; 0 where that is no normal float, which would take
// a hundred times as long to compute with.
static inline Lanes exponential(Lanes x) {
    const Whole small = x < -87.0f;
    // 2^n * e^r with n whole: added to 1.5 * 2^23, a float has no digits behind the point.
    const Lanes rounder = Lanes{} + 12582912.0f;
    const Lanes n = (x * 1.44269504f + rounder) - rounder;
    const Lanes r = x - n * 0.693145752f - n * 1.42860677e-6f; // ln 2 in two parts
    Lanes sum = r * (1 / 5040.0f) + 1 / 720.0f; // of the series: r is at most ln 2 / 2
    sum = sum * r + 1 / 120.0f;
    sum = sum * r + 1 / 24.0f;
    sum = sum * r + 1 / 6.0f;
    sum = sum * r + 1 / 2.0f;
    sum = sum * r + 1;
    sum = sum * r + 1;
    const Whole power = (__builtin_convertvector(n, Whole) + 127) << 23;
    return small ? Lanes{} : sum * (Lanes)power;
}

// So many lanes of the values [n, width] at `values`, each value times its weight, over `sum`.
template <int count, typename Held>
static inline void mixed(const Held *values, const float *weights, float sum, float *y, long n,
                         long width) {
    Lanes sums[count] = {};
    for (long i = 0; i < n; i++) {
        if (weights[i] == 0)
            continue;
        for (int l = 0; l < count; l++)
            sums[l] += lanes(values + i * width + l * WIDTH) * weights[i];
    }
    for (int l = 0; l < count; l++)
        *(Lanes *)(y + l * WIDTH) = sums[l] / sum;
}

// One query [width] for one head's keys and values [n, width], of which it sees some, into y
// [width]. There is room for n weights, and for as many more as make whole lanes.
template <typename Held>
static void head(const float *query, const Held *keys, const Held *values, const bool *seen,
                 float *weights, float *y, long n, long width, float scale) {
    float top = -__builtin_inff();
    long i = 0;
    for (; i < n; i++) {
        weights[i] = -__builtin_inff();
        if (seen && !seen[i])
            continue;
        Lanes sums = {};
        for (long k = 0; k < width; k += WIDTH)
            sums += lanes(query + k) * lanes(keys + i * width + k);
        weights[i] = total(sums) * scale;
        top = weights[i] > top ? weights[i] : top;
    }
    for (; i % WIDTH; i++)
        weights[i] = -__builtin_inff();
    Lanes sums = {};
    for (long k = 0; k < n; k += WIDTH)
        sums += *(Lanes *)(weights + k) = exponential(lanes(weights + k) - top);
    const float sum = total(sums);
    long k = 0;
    for (; k + 4 * WIDTH <= width; k += 4 * WIDTH)
        mixed<4>(values + k, weights, sum, y + k, n, width);
    for (; k < width; k += WIDTH)
        mixed<1>(values + k, weights, sum, y + k, n, width);
}

// Queries [rows, heads, width] for keys and values [rows, heads / group, n, width], whose rows and
// heads are so far apart, of which each row sees some [rows, n] or all, into y [rows, heads, width].
// `weights` is room for [rows, heads, room].
template <typename Held>
static void attend(const float *queries, const Held *keys, const Held *values, const bool *seen,
                   float *weights, float *y, long rows, long heads, long group, long n, long width,
                   long room, long keys_row, long keys_head, long values_row, long values_head,
                   float scale) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows * heads; i++) {
        const long row = i / heads, from = i % heads / group;
        head(queries + i * width, keys + row * keys_row + from * keys_head,
             values + row * values_row + from * values_head, seen ? seen + row * n : seen,
             weights + i * room, y + i * width, n, width, scale);
    }
}

// Both, for weights, keys and values in fp32 and in bf16; all else is in fp32.
#define KERNELS(name, Number)                                                                      \
    extern "C" void multiply_##name(const float *x, const Number *weights, const float *bias,      \
                                    float *y, long rows, long in, long out) {                      \
        multiply(x, weights, bias, y, rows, in, out);                                              \
    }                                                                                              \
    extern "C" void attend_##name(const float *queries, const Number *keys, const Number *values,  \
                                  const bool *seen, float *weights, float *y, long rows,           \
                                  long heads, long group, long n, long width, long room,           \
                                  long keys_row, long keys_head, long values_row,                  \
                                  long values_head, float scale) {                                 \
        attend(queries, keys, values, seen, weights, y, rows, heads, group, n, width, room,        \
               keys_row, keys_head, values_row, values_head, scale);                               \
    }

KERNELS(fp32, float)
KERNELS(bf16, Half)
