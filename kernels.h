// What the kernels share: bf16, fast functions, sums over rows, dropout, random bytes, and small matrix products.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

using i64 = int64_t;

struct bf16 {
    uint16_t bits;
};

static inline float load(float x) { return x; }
static inline float load(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
static inline void store(float& to, float x) { to = x; }
static inline void store(bf16& to, float x) {  // round to nearest, ties to even
    uint32_t u = std::bit_cast<uint32_t>(x);
    to.bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// The processor's vectors. Of longer ones gcc makes code ten times slower: a step with AVX2 took 334 ms instead of 248,
// with LoRA 471 instead of 216.
#ifdef __AVX512F__
static const i64 LANES = 16;
#else
static const i64 LANES = 8;
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t int_vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t word_vec __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_vec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t byte_vec __attribute__((vector_size(LANES), aligned(1), may_alias));

static inline vec load_vec(const float* from) { return *(const vec*)from; }
static inline vec load_vec(const bf16* from) {
    return (vec)(__builtin_convertvector(*(const half_vec*)from, word_vec) << 16);
}
static inline void store_vec(float* to, vec x) { *(vec*)to = x; }
static inline void store_vec(bf16* to, vec x) {
    const word_vec u = (word_vec)x;
    *(half_vec*)to = __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, half_vec);
}

// Of all numbers of a vector. gcc's own reductions of a loop add them one by one, for 30 to 60 cycles a row.
typedef float quad __attribute__((vector_size(16)));
template <class F>
static inline float across(vec x, F f) {
    quad part[LANES / 4];
    std::memcpy(part, &x, sizeof x);
    for (int i = 1; i < LANES / 4; i++) part[0] = f(part[0], part[i]);
    return f(f(part[0][0], part[0][2]), f(part[0][1], part[0][3]));
}
static inline float sum_of(vec x) {
    return across(x, [](auto a, auto b) { return a + b; });
}
static inline float largest_of(vec x) {
    return across(x, [](auto a, auto b) { return a > b ? a : b; });
}

// The sum of f(x) over a row; f takes vectors and, behind the last whole one, numbers.
template <class F>
static inline float row_sum(i64 n, const float* x, F f) {
    vec sum = {};
    i64 j = 0;
    for (; j + LANES <= n; j += LANES) sum += f(load_vec(x + j));
    float all = sum_of(sum);
    for (; j < n; j++) all += f(x[j]);
    return all;
}

// exp to 2e-7 of its value (Cephes' polynomial), 0 below exp(-80), without branches: of a number, whose loops become
// vector code, or of a vector. W: the same in whole numbers without a sign.
template <class F, class W>
static inline F fast_exp_of(F x) {
    const auto vanishes = x < -80.0f;
    x = x < -80.0f ? -80.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const F shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // to the nearest whole number
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p = std::bit_cast<F>(std::bit_cast<W>(p) + (std::bit_cast<W>(shifted) << 23));  // n stands in its lowest bits
    return vanishes ? 0.0f : p;
}
static inline float fast_exp(float x) { return fast_exp_of<float, uint32_t>(x); }
static inline vec fast_exp(vec x) { return fast_exp_of<vec, word_vec>(x); }

// The normal distribution's density and integral, the latter to 3e-7: the smooth ratio of the lower tail to exp(-x^2/2)
// as a polynomial fitted on [0, 5.5] (beyond, the tail is below 2e-8). No division, no branch.
struct Normal {
    float density, integral;
};
static inline Normal normal(float x) {
    const float ratio[] = {4.99999732e-1f,  -3.98930579e-1f, 2.49872848e-1f, -1.32381901e-1f,
                           6.09727576e-2f,  -2.42187697e-2f, 7.97915645e-3f, -2.05724873e-3f,
                           3.8795665e-4f,   -4.93209336e-5f, 3.72853992e-6f, -1.25557818e-7f};
    float e = fast_exp(-0.5f * x * x), z = std::min(std::fabs(x), 5.5f), tail = ratio[11];
#pragma GCC unroll 11
    for (int i = 10; i >= 0; i--) tail = tail * z + ratio[i];
    tail *= e;
    return {0.39894228f * e, x < 0 ? tail : 1.0f - tail};
}

// Sums over rows, column by column, in a fixed order: each thread adds its rows, then the threads are added in turn.
class ColumnSums {
  public:
    explicit ColumnSums(i64 columns) : columns(columns), parts(omp_get_max_threads() * columns, 0.0f) {}
    float* mine() { return parts.data() + omp_get_thread_num() * columns; }
    void put(float* to, i64 first, i64 count) {
        if (!to) return;
        for (i64 j = 0; j < count; j++) {
            float sum = 0;
            for (size_t start = first; start < parts.size(); start += columns) sum += parts[start + j];
            to[j] = sum;
        }
    }

  private:
    i64 columns;
    std::vector<float> parts;
};

static const i64 WIDTH = 16;  // rows are filled up to multiples of it: whole vectors, however long the processor's are
static i64 whole(i64 n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// Dropout: the element of a row in column j is kept where its random byte is at least limit[j] (see Draw).
struct Dropout {
    const int8_t *bits, *limit;  // both null: nothing is dropped
    float scale;                 // 1 / (1 - p)

    // to [n] = what is left of from [n], a row whose bytes begin at `start`.
    template <class T>
    void apply(i64 n, i64 start, const T* __restrict from, float* __restrict to) const {
        const int8_t *__restrict random = bits + start, *__restrict least = limit;  // locals: to[j] is none of them
        const float factor = scale;
        if (bits)
            for (i64 j = 0; j < n; j++) to[j] = random[j] >= least[j] ? load(from[j]) * factor : 0.0f;
        else
            for (i64 j = 0; j < n; j++) to[j] = load(from[j]);
    }

    // The same of a vector in column j. There are WIDTH bytes more than bytes in use.
    vec factor(i64 start, i64 j) const {
        if (!bits) return vec{} + 1.0f;
        const auto stays = *(const byte_vec*)(bits + start + j) >= *(const byte_vec*)(limit + j);
        return (vec)(__builtin_convertvector(stays, int_vec) & (int_vec)(vec{} + scale));
    }

    // to [whole(n)] = what such a row is multiplied with.
    void factors(i64 n, i64 start, float* to) const {
        for (i64 j = 0; j < whole(n); j += LANES) store_vec(to + j, factor(start, j));
    }
};

// n random bytes, a multiple of 4: a counter mixed with the seed (the rounds of Ettinger's triple32), itself mixed
// first (Vigna's splitmix64), so that like seeds give unlike bytes.
static void random_bytes(i64 n, i64 seed, uint32_t* to) {
    uint64_t z = uint64_t(seed) + 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    const uint32_t low = uint32_t(z), high = uint32_t(z >> 32);
#pragma omp parallel for simd schedule(static)
    for (i64 i = 0; i < n / 4; i++) {
        uint32_t x = uint32_t(i) * 0x9e3779b9u + low;
        x ^= x >> 17, x *= 0xed5ad4bbu;
        x ^= (x >> 11) + high, x *= 0xac4c1b51u;
        x ^= x >> 15, x *= 0x31848babu;
        to[i] = x ^ (x >> 14);
    }
}

// Random bytes for a mask of dropout, and each column's limit: `least`, or one more if a draw of 16 bits of its own is
// below the threshold (see dropout.Draw). n is a multiple of 8.
static void draw(const i64* seed, i64 n, int8_t* bits, i64 columns, i64 threshold, i64 least, int8_t* limit) {
    random_bytes(n, *seed, (uint32_t*)bits);
    std::vector<int16_t> coins(columns + 1);
    random_bytes((columns + 1) / 2 * 4, ~*seed, (uint32_t*)coins.data());
    for (i64 j = 0; j < columns; j++) limit[j] = int8_t(least + (coins[j] < threshold));
}

// R rows and C vectors of c [m, n] = (c +) a [m, k] b [k, n]; a has any strides, b and c have rows of whole vectors.
template <int R, int C, bool ADD>
static inline void tile(i64 k, const float* a, i64 row, i64 column, const float* b, i64 ldb, float* c, i64 ldc) {
    vec sum[R][C] = {};
    if (ADD)
        for (int x = 0; x < R; x++)
            for (int y = 0; y < C; y++) sum[x][y] = *(const vec*)(c + x * ldc + y * LANES);
    for (i64 p = 0; p < k; p++) {
        vec right[C];
        for (int y = 0; y < C; y++) right[y] = *(const vec*)(b + p * ldb + y * LANES);
        for (int x = 0; x < R; x++)
            for (int y = 0; y < C; y++) sum[x][y] += a[x * row + p * column] * right[y];
    }
    for (int x = 0; x < R; x++)
        for (int y = 0; y < C; y++) *(vec*)(c + x * ldc + y * LANES) = sum[x][y];
}

// The same of any number of rows, which a has six by six: `six` apart, and `row` within.
template <int C, bool ADD>
static void strip(i64 m, i64 k, const float* a, i64 six, i64 row, i64 column, const float* b, i64 ldb, float* c,
                  i64 ldc) {
    i64 i = 0;
    for (; i + 6 <= m; i += 6, a += six) tile<6, C, ADD>(k, a, row, column, b, ldb, c + i * ldc, ldc);
    for (; i + 4 <= m; i += 4, a += 4 * row) tile<4, C, ADD>(k, a, row, column, b, ldb, c + i * ldc, ldc);
    for (; i + 2 <= m; i += 2, a += 2 * row) tile<2, C, ADD>(k, a, row, column, b, ldb, c + i * ldc, ldc);
    for (; i < m; i++, a += row) tile<1, C, ADD>(k, a, row, column, b, ldb, c + i * ldc, ldc);
}

template <bool ADD = false>
static void product(i64 m, i64 n, i64 k, const float* a, i64 row, i64 column, const float* b, i64 ldb, float* c,
                    i64 ldc) {
    i64 j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES) strip<2, ADD>(m, k, a, 6 * row, row, column, b + j, ldb, c + j, ldc);
    for (; j < n; j += LANES) strip<1, ADD>(m, k, a, 6 * row, row, column, b + j, ldb, c + j, ldc);
}

// to [rows, whole(d)] = (from + shift) * scale; from: [rows, d] of T, rows ld apart; shift: [d].
template <class T>
static void gather(i64 rows, i64 d, const T* __restrict from, i64 ld, const float* __restrict shift, float scale,
                   float* __restrict to) {
    for (i64 i = 0; i < rows; i++) {
        i64 j = 0;
        for (; j + LANES <= d; j += LANES)
            store_vec(to + i * whole(d) + j, (load_vec(from + i * ld + j) + load_vec(shift + j)) * scale);
        for (; j < d; j++) to[i * whole(d) + j] = (load(from[i * ld + j]) + shift[j]) * scale;
    }
}
#ifdef __AVX512F__
typedef __m512i Words;
// Transposes 16 x 16 words.
static inline void turn(__m512i* r) {
    __m512i s[16];
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd);
    }
}
#elif defined(__AVX2__)
typedef __m256 Words;
// Transposes 8 x 8 words.
static inline void turn(__m256* r) {
    __m256 s[8];
    for (int i = 0; i < 8; i += 2)
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44), r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44), r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++)
        s[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20), s[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    std::copy_n(s, 8, r);
}
#endif

// [rows, d], rows of whole vectors, as [d, rows], rows ldt apart. Both have room for whole vectors either way.
static void transpose(i64 rows, i64 d, const float* __restrict from, float* __restrict to, i64 ldt) {
#ifdef __AVX2__
    for (i64 i = 0; i < rows; i += LANES)
        for (i64 j = 0; j < d; j += LANES) {
            Words r[LANES];
            for (i64 k = 0; k < LANES; k++) r[k] = (Words)*(const vec*)(from + (i + k) * whole(d) + j);
            turn(r);
            for (i64 k = 0; k < LANES; k++) *(vec*)(to + (j + k) * ldt + i) = (vec)r[k];
        }
#else
    for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < d; j++) to[j * ldt + i] = from[i * whole(d) + j];
#endif
}
// The other way: to [rows, d] of T, rows ld apart, = from [rows, whole(d)] * scale.
template <class T>
static void scatter(i64 rows, i64 d, const float* __restrict from, float scale, T* __restrict to, i64 ld) {
    for (i64 i = 0; i < rows; i++) {
        i64 j = 0;
        for (; j + LANES <= d; j += LANES) store_vec(to + i * ld + j, load_vec(from + i * whole(d) + j) * scale);
        for (; j < d; j++) store(to[i * ld + j], from[i * whole(d) + j] * scale);
    }
}
