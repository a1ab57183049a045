// What a DistilBERT layer does between its matrix products, each in one pass over memory, forward and backward.
//
// kernels.py compiles this file where there is a compiler; layers.py says the same in PyTorch, and the tests hold
// one to the other. T is the type of the matrix products, bf16 or float; sums are in float. Threads are those of
// torch: the OpenMP runtime it has loaded serves this library too. Nothing depends on timing, so the same number of
// threads gives the same bits.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include <omp.h>

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

// exp to 2e-7 of its value (Cephes' polynomial), 0 below exp(-80), without branches: loops of it become vector code.
static inline float fast_exp(float x) {
    bool vanishes = x < -80.0f;
    x = std::min(std::max(x, -80.0f), 88.0f);
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return vanishes ? 0.0f : std::bit_cast<float>(std::bit_cast<int32_t>(p) + (int32_t(n) << 23));
}

// The normal distribution's density and integral, the latter to 3e-7: the smooth ratio of the lower tail to exp(-x^2/2)
// as a polynomial fitted on [0, 5.5] (beyond, the tail is below 2e-8). No division, no branch.
struct Normal {
    float density, integral;
};
static inline Normal normal(float x) {
    const float ratio[] = {4.99999732e-1f, -3.98930579e-1f, 2.49872848e-1f, -1.32381901e-1f, 6.09727576e-2f, -2.42187697e-2f,
                           7.97915645e-3f, -2.05724873e-3f, 3.8795665e-4f, -4.93209336e-5f, 3.72853992e-6f, -1.25557818e-7f};
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
    void put(float* to, i64 first, i64 count, bool add) {
        if (!to) return;
        for (i64 j = 0; j < count; j++) {
            float sum = add ? to[j] : 0.0f;
            for (size_t start = first; start < parts.size(); start += columns) sum += parts[start + j];
            to[j] = sum;
        }
    }

  private:
    i64 columns;
    std::vector<float> parts;
};

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

// The products come without their biases, which are added here. All biases and sums of gradients are in float.

// z = x + dropout(y + shift); h = layer norm of z, in float and in T. x, z, h: [n, d], rows of x ldx apart, of half ldh apart.
template <class T>
static void add_norm(i64 n, i64 d, const float* x, i64 ldx, const T* y, const float* shift, Dropout drop,
                     const float* weight, const float* bias, float eps, float* z, float* h, T* half, i64 ldh, float* mean, float* rstd) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i++) {
        const float* xi = x + i * ldx;
        const T* yi = y + i * d;
        float *zi = z + i * d, *hi = h + i * d, sum = 0, squares = 0;
        const float scale = drop.scale;
        if (drop.bits) {
            const int8_t *bits = drop.bits + i * d, *limit = drop.limit;
#pragma omp simd reduction(+ : sum)
            for (i64 j = 0; j < d; j++) {
                zi[j] = xi[j] + (bits[j] >= limit[j] ? (load(yi[j]) + shift[j]) * scale : 0.0f);
                sum += zi[j];
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (i64 j = 0; j < d; j++) sum += zi[j] = xi[j] + (load(yi[j]) + shift[j]);
        }
        float m = sum / d;
#pragma omp simd reduction(+ : squares)
        for (i64 j = 0; j < d; j++) squares += (zi[j] - m) * (zi[j] - m);
        float r = 1.0f / std::sqrt(squares / d + eps);
        mean[i] = m, rstd[i] = r;
        for (i64 j = 0; j < d; j++) hi[j] = (zi[j] - m) * r * weight[j] + bias[j];
        if (half)
            for (i64 j = 0; j < d; j++) store(half[i * ldh + j], hi[j]);
    }
}

// The gradient dy + more of h -> dz [n, d] in float, and of y in T, with the sums over rows for the norm's weight
// and bias and for the bias that was added to y.
template <class T>
static void add_norm_backward(i64 n, i64 d, const float* dy, const T* more, const float* z, const float* mean,
                              const float* rstd, const float* weight, Dropout drop, float* dz, T* half, float* dweight,
                              float* dbias, float* dlinear, bool add) {
    ColumnSums sums(3 * d);
    std::vector<float> rows(omp_get_max_threads() * d);
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i++) {
        float *dw = sums.mine(), *db = dw + d, *dl = db + d, *dzi = dz + i * d;
        float *g = rows.data() + omp_get_thread_num() * d, m = mean[i], r = rstd[i], a = 0, b = 0;
        const float *zi = z + i * d, *dyi = dy + i * d;
        if (more)
            for (i64 j = 0; j < d; j++) g[j] = dyi[j] + load(more[i * d + j]);
        else
            std::copy(dyi, dyi + d, g);
#pragma omp simd reduction(+ : a, b)
        for (i64 j = 0; j < d; j++) {
            float x = (zi[j] - m) * r, gw = g[j] * weight[j];
            dw[j] += g[j] * x, db[j] += g[j];
            a += gw, b += gw * x;
        }
        a /= d, b /= d;
        for (i64 j = 0; j < d; j++) dzi[j] = r * (g[j] * weight[j] - a - (zi[j] - m) * r * b);
        T* hi = half + i * d;
        drop.apply(d, i * d, dzi, g);
        for (i64 j = 0; j < d; j++) store(hi[j], g[j]);
        for (i64 j = 0; j < d; j++) dl[j] += load(hi[j]);
    }
    sums.put(dweight, 0, d, add), sums.put(dbias, d, d, add), sums.put(dlinear, 2 * d, d, add);
}

// gelu(u + shift). Rows of u and du are d long and tight, those of y ldy apart.
template <class T>
static void gelu(i64 n, i64 d, const T* u, const float* shift, T* y, i64 ldy) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j < d; j++) {
            float x = load(u[i * d + j]) + shift[j];
            store(y[i * ldy + j], x * normal(x).integral);
        }
}

template <class T>
static void gelu_backward(i64 n, i64 d, const T* u, const float* shift, const T* dy, T* du, float* dlinear, bool add) {
    ColumnSums sums(d);
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i++) {
        float* dl = sums.mine();
        T* to = du + i * d;
        for (i64 j = 0; j < d; j++) {
            float x = load(u[i * d + j]) + shift[j];
            Normal at = normal(x);
            store(to[j], load(dy[i * d + j]) * (at.integral + x * at.density));
        }
        for (i64 j = 0; j < d; j++) dl[j] += load(to[j]);
    }
    sums.put(dlinear, 0, d, add);
}

typedef float vec __attribute__((vector_size(64), aligned(4)));
static const i64 WIDTH = 16;
static i64 whole(i64 n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// R rows and C vectors of c [m, n] = (c +) a [m, k] b [k, n]; a has any strides, b and c have rows of whole vectors.
template <int R, int C, bool ADD>
static inline void tile(i64 k, const float* a, i64 row, i64 column, const float* b, i64 ldb, float* c, i64 ldc) {
    vec sum[R][C] = {};
    if (ADD)
        for (int x = 0; x < R; x++)
            for (int y = 0; y < C; y++) sum[x][y] = *(const vec*)(c + x * ldc + y * WIDTH);
    for (i64 p = 0; p < k; p++) {
        vec right[C];
        for (int y = 0; y < C; y++) right[y] = *(const vec*)(b + p * ldb + y * WIDTH);
        for (int x = 0; x < R; x++)
            for (int y = 0; y < C; y++) sum[x][y] += a[x * row + p * column] * right[y];
    }
    for (int x = 0; x < R; x++)
        for (int y = 0; y < C; y++) *(vec*)(c + x * ldc + y * WIDTH) = sum[x][y];
}

template <int C, bool ADD>
static void strip(i64 m, i64 k, const float* a, i64 row, i64 column, const float* b, i64 ldb, float* c, i64 ldc) {
    i64 i = 0;
    for (; i + 6 <= m; i += 6) tile<6, C, ADD>(k, a + i * row, row, column, b, ldb, c + i * ldc, ldc);
    for (; i + 2 <= m; i += 2) tile<2, C, ADD>(k, a + i * row, row, column, b, ldb, c + i * ldc, ldc);
    for (; i < m; i++) tile<1, C, ADD>(k, a + i * row, row, column, b, ldb, c + i * ldc, ldc);
}

template <bool ADD = false>
static void product(i64 m, i64 n, i64 k, const float* a, i64 row, i64 column, const float* b, i64 ldb, float* c,
                    i64 ldc) {
    i64 j = 0;
    for (; j + 2 * WIDTH <= n; j += 2 * WIDTH) strip<2, ADD>(m, k, a, row, column, b + j, ldb, c + j, ldc);
    for (; j < n; j += WIDTH) strip<1, ADD>(m, k, a, row, column, b + j, ldb, c + j, ldc);
}

// [rows, d] of T, rows ld apart, plus shift -> float, rows of whole vectors; and transposed, rows ldt apart.
template <class T>
static void gather(i64 rows, i64 d, const T* __restrict from, i64 ld, const float* __restrict shift, float scale,
                   float* __restrict to) {
    for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < d; j++) to[i * whole(d) + j] = (load(from[i * ld + j]) + shift[j]) * scale;
}
static void transpose(i64 rows, i64 d, const float* __restrict from, float* __restrict to, i64 ldt) {
    for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < d; j++) to[j * ldt + i] = from[i * whole(d) + j];
}
template <class T>
static void scatter(i64 rows, i64 d, const float* __restrict from, float scale, T* __restrict to, i64 ld) {
    for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < d; j++) store(to[i * ld + j], from[i * whole(d) + j] * scale);
}

// Heads of one batch: q [B, Lq, ldq], k and v [B, L, ldk]; head h has the d columns from h * d on, of the biases too.
// Keys from lengths[b] on are hidden. Random bytes: [B, H, Lq, L].
template <class T>
struct Heads {
    i64 b, h, lq, l, d, ldq, ldk;
    const i64* lengths;
    const T *q, *k, *v;
    const float *q_bias, *k_bias, *v_bias;
    Dropout drop;

    i64 wide() const { return whole(d); }
    i64 keys() const { return whole(l); }
    i64 query(i64 head) const { return head / h * lq * ldq + head % h * d; }
    i64 key(i64 head) const { return head / h * l * ldk + head % h * d; }
    // The scores of one head, [lq, keys()], -inf where a key is hidden.
    void scores(i64 head, i64 n, float* Q, float* K, float* KT, float* S) const {
        i64 at = head % h * d;
        gather(lq, d, q + query(head), ldq, q_bias + at, 1 / std::sqrt(float(d)), Q);
        gather(n, d, k + key(head), ldk, k_bias + at, 1, K);
        transpose(n, d, K, KT, keys());
        product(lq, whole(n), d, Q, wide(), 1, KT, keys(), S, keys());
        for (i64 i = 0; i < lq; i++) std::fill(S + i * keys() + n, S + i * keys() + whole(n), -INFINITY);
    }
    // The factors of dropout for one row of probabilities. There are WIDTH bytes more than bytes in use.
    void kept(i64 head, i64 i, i64 n, float* __restrict factor) const {
        const int8_t *__restrict bits = drop.bits + (head * lq + i) * l, *__restrict limit = drop.limit;
        const float scale = drop.scale;
        for (i64 j = 0; j < whole(n); j++) factor[j] = bits[j] >= limit[j] ? scale : 0.0f;
    }
};

// norms [B, H, Lq, 2]: each row's highest score and 1 / its sum of exponentials, for the way back. Rows of context
// are ldc apart.
template <class T>
static void attend(Heads<T> at, T* context, i64 ldc, float* norms) {
    i64 wide = at.wide(), keys = at.keys();
#pragma omp parallel
    {
        std::vector<float> Q(at.lq * wide), K(at.l * wide), KT(at.d * keys), P(at.lq * keys), C(at.lq * wide), keep(keys);
#pragma omp for schedule(static)
        for (i64 head = 0; head < at.b * at.h; head++) {
            i64 n = at.lengths[head / at.h], full = whole(n);
            at.scores(head, n, Q.data(), K.data(), KT.data(), P.data());
            for (i64 i = 0; i < at.lq; i++) {
                float *p = P.data() + i * keys, top = p[0], sum = 0;
#pragma omp simd reduction(max : top)
                for (i64 j = 0; j < full; j++) top = std::max(top, p[j]);
#pragma omp simd reduction(+ : sum)
                for (i64 j = 0; j < full; j++) sum += p[j] = fast_exp(p[j] - top);
                float* norm = norms + 2 * (head * at.lq + i);
                norm[0] = top, norm[1] = sum = 1 / sum;
                for (i64 j = 0; j < full; j++) p[j] *= sum;
                if (at.drop.bits) {
                    at.kept(head, i, n, keep.data());
                    for (i64 j = 0; j < full; j++) p[j] *= keep[j];
                }
            }
            gather(n, at.d, at.v + at.key(head), at.ldk, at.v_bias + head % at.h * at.d, 1, K.data());
            product(at.lq, wide, n, P.data(), keys, 1, K.data(), wide, C.data(), wide);
            scatter(at.lq, at.d, C.data(), 1, context + head / at.h * at.lq * ldc + head % at.h * at.d, ldc);
        }
    }
}

// dcontext [B, Lq, H d] -> dq, dk and dv, laid out as q, k and v. Probabilities are computed anew.
template <class T>
static void attend_backward(Heads<T> at, const float* norms, const T* dcontext, T* dq, T* dk, T* dv) {
    i64 wide = at.wide(), keys = at.keys(), width = at.h * at.d;
    std::vector<float> none(at.d);
#pragma omp parallel
    {
        std::vector<float> Q(at.lq * wide), K(at.l * wide), V(at.l * wide), turned(at.d * keys), dC(at.lq * wide),
            P(at.lq * keys), S(at.lq * keys), out(std::max(at.l, at.lq) * wide), keep(keys);
#pragma omp for schedule(static)
        for (i64 head = 0; head < at.b * at.h; head++) {
            i64 b = head / at.h, h = head % at.h, n = at.lengths[b], full = whole(n);
            at.scores(head, n, Q.data(), K.data(), turned.data(), P.data());
            gather(n, at.d, at.v + at.key(head), at.ldk, at.v_bias + h * at.d, 1, V.data());
            gather(at.lq, at.d, dcontext + b * at.lq * width + h * at.d, width, none.data(), 1, dC.data());
            transpose(n, at.d, V.data(), turned.data(), keys);
            product(at.lq, full, at.d, dC.data(), wide, 1, turned.data(), keys, S.data(), keys);
            for (i64 i = 0; i < at.lq; i++) {  // P becomes what dropout leaves of it, S the gradient of the scores
                float *p = P.data() + i * keys, *g = S.data() + i * keys, dot = 0;
                const float* norm = norms + 2 * (head * at.lq + i);
                for (i64 j = 0; j < full; j++) p[j] = fast_exp(p[j] - norm[0]) * norm[1];
                if (at.drop.bits) {
                    at.kept(head, i, n, keep.data());
                    for (i64 j = 0; j < full; j++) g[j] *= keep[j];
                }
#pragma omp simd reduction(+ : dot)
                for (i64 j = 0; j < full; j++) dot += p[j] * g[j];
                for (i64 j = 0; j < full; j++) g[j] = p[j] * (g[j] - dot);
                if (at.drop.bits)
                    for (i64 j = 0; j < full; j++) p[j] *= keep[j];
            }
            product(at.lq, wide, n, S.data(), keys, 1, K.data(), wide, out.data(), wide);
            scatter(at.lq, at.d, out.data(), 1 / std::sqrt(float(at.d)), dq + at.query(head), at.ldq);
            std::fill(out.begin(), out.end(), 0.0f);
            product(n, wide, at.lq, S.data(), 1, keys, Q.data(), wide, out.data(), wide);
            scatter(at.l, at.d, out.data(), 1, dk + at.key(head), at.ldk);
            product(n, wide, at.lq, P.data(), 1, keys, dC.data(), wide, out.data(), wide);
            scatter(at.l, at.d, out.data(), 1, dv + at.key(head), at.ldk);
        }
    }
}

// LoRA's way down, for G adapters of rank r that read x [n, in]: h = dropout(x) A^T, [n, G r], and zeros in the
// `padding` columns behind. A comes as [G, in, whole(r)]; rows of x ldx apart, those of h ldh; bytes [G, n, in].
template <class T>
static void lora_down(i64 n, i64 in, i64 r, i64 groups, const T* x, i64 ldx, const float* turned, Dropout drop, T* h,
                      i64 ldh, i64 padding) {
    const i64 ranks = whole(r), block = 12;
#pragma omp parallel
    {
        std::vector<float> rows(block * in), sums(block * ranks);
#pragma omp for schedule(static)
        for (i64 start = 0; start < n; start += block) {
            i64 count = std::min(block, n - start);
            for (i64 g = 0; g < groups; g++) {
                for (i64 i = 0; i < count; i++)
                    drop.apply(in, (g * n + start + i) * in, x + (start + i) * ldx, rows.data() + i * in);
                product(count, ranks, in, rows.data(), in, 1, turned + g * in * ranks, ranks, sums.data(), ranks);
                for (i64 i = 0; i < count; i++)
                    for (i64 j = 0; j < r; j++) store(h[(start + i) * ldh + g * r + j], sums[i * ranks + j]);
            }
            for (i64 i = 0; i < count; i++)
                for (i64 j = 0; j < padding; j++) store(h[(start + i) * ldh + groups * r + j], 0.0f);
        }
    }
}

// And back: base [n, in | G r], the gradients of x through the frozen layer and of h -> dx [n, in], with what comes
// through the adapters, and dA [G, r, in]. A comes as [G, r, whole(in)]; rows of base ldb apart.
template <class T>
static void lora_backward(i64 n, i64 in, i64 r, i64 groups, const T* x, i64 ldx, const float* A, Dropout drop,
                          const T* base, i64 ldb, T* dx, float* dA) {
    const i64 wide = whole(in), block = 16;
    ColumnSums sums(groups * r * wide);
#pragma omp parallel
    {
        std::vector<float> rows(block * wide), sum(block * wide), kept(wide), dh(block * r);
        float* mine = sums.mine();
#pragma omp for schedule(static)
        for (i64 start = 0; start < n; start += block) {
            i64 count = std::min(block, n - start);
            for (i64 i = 0; dx && i < count; i++)
                for (i64 j = 0; j < in; j++) sum[i * wide + j] = load(base[(start + i) * ldb + j]);
            for (i64 g = 0; g < groups; g++) {
                for (i64 i = 0; i < count; i++) {
                    for (i64 j = 0; j < r; j++) dh[i * r + j] = load(base[(start + i) * ldb + in + g * r + j]);
                    drop.apply(in, (g * n + start + i) * in, x + (start + i) * ldx, rows.data() + i * wide);
                }
                product<true>(r, wide, count, dh.data(), 1, r, rows.data(), wide, mine + g * r * wide, wide);
                if (!dx) continue;
                product(count, wide, r, dh.data(), r, 1, A + g * r * wide, wide, rows.data(), wide);
                for (i64 i = 0; i < count; i++) {
                    float *__restrict to = sum.data() + i * wide, *__restrict from = kept.data();
                    drop.apply(in, (g * n + start + i) * in, rows.data() + i * wide, from);
                    for (i64 j = 0; j < in; j++) to[j] += from[j];
                }
            }
            for (i64 i = 0; dx && i < count; i++)
                for (i64 j = 0; j < in; j++) store(dx[(start + i) * in + j], sum[i * wide + j]);
        }
    }
    for (i64 row = 0; row < groups * r; row++) sums.put(dA + row * in, row * wide, in, false);
}

template <class T>
static void column_sums(i64 n, i64 d, const T* x, float* to, bool add) {
    ColumnSums sums(d);
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i++) {
        float* sum = sums.mine();
        for (i64 j = 0; j < d; j++) sum[j] += load(x[i * d + j]);
    }
    sums.put(to, 0, d, add);
}

template <class T>
static double square_sum(i64 n, const T* x) {
    const i64 block = 4096;
    std::vector<float> parts((n + block - 1) / block);
#pragma omp parallel for schedule(static)
    for (i64 part = 0; part < i64(parts.size()); part++) {
        float sum = 0;
        i64 start = part * block, end = std::min(n, start + block);
#pragma omp simd reduction(+ : sum)
        for (i64 i = start; i < end; i++) sum += load(x[i]) * load(x[i]);
        parts[part] = sum;
    }
    return std::accumulate(parts.begin(), parts.end(), 0.0);
}

// torch.optim.AdamW's update of p [n] for the gradient g * scale, with the copy of p for the next step's products.
template <class T, class G>
static void adamw(i64 n, float* p, const G* g, float* m, float* v, T* copy, float scale, float lr, float beta1,
                  float beta2, float eps, float decay, float correction1, float root_correction2) {
    float step = lr / correction1;
#pragma omp parallel for simd schedule(static)
    for (i64 i = 0; i < n; i++) {
        float grad = load(g[i]) * scale;
        m[i] += (1 - beta1) * (grad - m[i]);
        v[i] = beta2 * v[i] + (1 - beta2) * grad * grad;
        float at = p[i] * (1 - lr * decay) - step * m[i] / (std::sqrt(v[i]) / root_correction2 + eps);
        p[i] = at;
        if (copy) store(copy[i], at);
    }
}

#define EXPORT(T)                                                                                                     \
    void add_norm_##T(i64 n, i64 d, const float* x, i64 ldx, const T* y, const float* shift, const int8_t* bits,      \
                      const int8_t* limit, float scale, const float* weight, const float* bias, float eps, float* z, float* h, T* half,    \
                      i64 ldh, float* mean, float* rstd) {                                                            \
        add_norm(n, d, x, ldx, y, shift, {bits, limit, scale}, weight, bias, eps, z, h, half, ldh, mean, rstd);              \
    }                                                                                                                 \
    void add_norm_backward_##T(i64 n, i64 d, const float* dy, const T* more, const float* z, const float* mean,       \
                               const float* rstd, const float* weight, const int8_t* bits, const int8_t* limit,       \
                               float scale, float* dz, T* half, float* dweight, float* dbias, float* dlinear,         \
                               int add) {                                                                             \
        add_norm_backward(n, d, dy, more, z, mean, rstd, weight, {bits, limit, scale}, dz, half, dweight, dbias,      \
                          dlinear, add);                                                                              \
    }                                                                                                                 \
    void gelu_##T(i64 n, i64 d, const T* u, const float* shift, T* y, i64 ldy) { gelu(n, d, u, shift, y, ldy); }                               \
    void gelu_backward_##T(i64 n, i64 d, const T* u, const float* shift, const T* dy, T* du, float* dlinear,          \
                           int add) {                                                                                 \
        gelu_backward(n, d, u, shift, dy, du, dlinear, add);                                                                 \
    }                                                                                                                 \
    void attend_##T(i64 b, i64 h, i64 lq, i64 l, i64 d, i64 ldq, i64 ldk, const i64* lengths, const T* q, const T* k, \
                    const T* v, const float* q_bias, const float* k_bias, const float* v_bias, const int8_t* bits,    \
                    const int8_t* limit, float scale, T* context, i64 ldc, float* norms) {                           \
        attend<T>({b, h, lq, l, d, ldq, ldk, lengths, q, k, v, q_bias, k_bias, v_bias, {bits, limit, scale}},         \
                  context, ldc, norms);                                                                              \
    }                                                                                                                 \
    void attend_backward_##T(i64 b, i64 h, i64 lq, i64 l, i64 d, i64 ldq, i64 ldk, const i64* lengths, const T* q,    \
                             const T* k, const T* v, const float* q_bias, const float* k_bias, const float* v_bias,   \
                             const int8_t* bits, const int8_t* limit, float scale, const float* norms,                \
                             const T* dcontext, T* dq, T* dk, T* dv) {                                                \
        attend_backward<T>({b, h, lq, l, d, ldq, ldk, lengths, q, k, v, q_bias, k_bias, v_bias, {bits, limit, scale}}, \
                           norms, dcontext, dq, dk, dv);                                                             \
    }                                                                                                                 \
    void lora_down_##T(i64 n, i64 in, i64 r, i64 groups, const T* x, i64 ldx, const float* turned,                    \
                       const int8_t* bits, const int8_t* limit, float scale, T* h, i64 ldh, i64 padding) {            \
        lora_down(n, in, r, groups, x, ldx, turned, {bits, limit, scale}, h, ldh, padding);                           \
    }                                                                                                                 \
    void lora_backward_##T(i64 n, i64 in, i64 r, i64 groups, const T* x, i64 ldx, const float* A, const int8_t* bits, \
                           const int8_t* limit, float scale, const T* base, i64 ldb, T* dx, float* dA) {              \
        lora_backward(n, in, r, groups, x, ldx, A, {bits, limit, scale}, base, ldb, dx, dA);                          \
    }                                                                                                                 \
    void column_sums_##T(i64 n, i64 d, const T* x, float* to, int add) { column_sums(n, d, x, to, add); }             \
    double square_sum_##T(i64 n, const T* x) { return square_sum(n, x); }                                             \
    void adamw_##T(i64 n, float* p, const T* g, float* m, float* v, bf16* copy, float scale, float lr, float beta1,   \
                   float beta2, float eps, float decay, float correction1, float root_correction2) {                  \
        adamw(n, p, g, m, v, copy, scale, lr, beta1, beta2, eps, decay, correction1, root_correction2);               \
    }

extern "C" {
EXPORT(bf16)
EXPORT(float)
void random_bytes_float(i64 n, i64 seed, uint32_t* to) { random_bytes(n, seed, to); }
}
