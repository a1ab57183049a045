// What a DistilBERT layer does between its matrix products, each in one pass over memory, forward and backward.
//
// kernels.py compiles this file where there is a compiler; layers.py says the same in PyTorch, and the tests hold
// one to the other. T is the type of the matrix products, bf16 or float; sums are in float. Threads are those of
// torch: the OpenMP runtime it has loaded serves this library too. Nothing depends on timing, so the same number of
// threads gives the same bits.

#include "adamw.h"
#include "first.h"
#include "floats.h"
#include "kernels.h"
#include "lora.h"
#include "products.h"
#include "tape.h"

// The products come without their biases, which are added here. All biases and sums of gradients are in float.

// z = x + dropout(y + shift); h = layer norm of z, in float and in T. x, z, h: [n, d]; rows of x are ldx apart, those of
// half ldh.
template <class T>
static void add_norm(i64 n, i64 d, const float* x, i64 ldx, const T* y, const float* shift, const int8_t* random,
                     const int8_t* limit, float scale, const float* weight, const float* bias, float eps, float* z,
                     float* h, T* half, i64 ldh, float* mean, float* rstd) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i++) {
        const float* xi = x + i * ldx;
        const T* yi = y + i * d;
        float *zi = z + i * d, *hi = h + i * d;
        if (random) {
            const int8_t* bits = random + i * d;
            for (i64 j = 0; j < d; j++)
                zi[j] = xi[j] + (bits[j] >= limit[j] ? (load(yi[j]) + shift[j]) * scale : 0.0f);
        } else {
            for (i64 j = 0; j < d; j++) zi[j] = xi[j] + (load(yi[j]) + shift[j]);
        }
        const float m = row_sum(d, zi, [](auto one) { return one; }) / d;
        const float squares = row_sum(d, zi, [m](auto one) { return (one - m) * (one - m); });
        const float r = 1.0f / std::sqrt(squares / d + eps);
        mean[i] = m, rstd[i] = r;
        for (i64 j = 0; j < d; j++) hi[j] = (zi[j] - m) * r * weight[j] + bias[j];
        if (half)
            for (i64 j = 0; j < d; j++) store(half[i * ldh + j], hi[j]);
    }
}

// The gradient dy + more of h -> dz [n, d] in float, and of y in T, with the sums over rows for the norm's weight
// and bias and for the bias that was added to y. Rows of `more` are ldm apart.
template <class T>
static void add_norm_backward(i64 n, i64 d, const float* dy, const T* more, i64 ldm, const float* z, const float* mean,
                              const float* rstd, const float* weight, const int8_t* bits, const int8_t* limit,
                              float scale, float* dz, T* half, float* dweight, float* dbias, float* dlinear) {
    const Dropout drop = {bits, limit, scale};
    ColumnSums sums(3 * d);
    std::vector<float> rows(omp_get_max_threads() * d);
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i++) {
        float *dw = sums.mine(), *db = dw + d, *dl = db + d, *dzi = dz + i * d;
        float *g = rows.data() + omp_get_thread_num() * d, m = mean[i], r = rstd[i], a = 0, b = 0;
        const float *zi = z + i * d, *dyi = dy + i * d;
        if (more)
            for (i64 j = 0; j < d; j++) g[j] = dyi[j] + load(more[i * ldm + j]);
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
    sums.put(dweight, 0, d), sums.put(dbias, d, d), sums.put(dlinear, 2 * d, d);
}

// y = gelu(u + shift), and u becomes the derivative there, which is all that the way back needs: a product instead of
// another exponential. Rows of u are d long and tight, those of y ldy apart.
template <class T>
static void gelu(i64 n, i64 d, T* u, const float* shift, T* y, i64 ldy) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i++) {
        T *__restrict at = u + i * d, *__restrict to = y + i * ldy;
        for (i64 j = 0; j < d; j++) {
            const float x = load(at[j]) + shift[j];
            const Normal found = normal(x);
            store(to[j], x * found.integral);
            store(at[j], found.integral + x * found.density);
        }
    }
}

// dy *= derivative, with the sums over rows. Rows of dy are ldy apart.
template <class T>
static void gelu_backward(i64 n, i64 d, const T* derivative, T* dy, i64 ldy, float* dlinear) {
    ColumnSums sums(d);
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i++) {
        float* __restrict dl = sums.mine();
        T* __restrict to = dy + i * ldy;
        const T* __restrict by = derivative + i * d;
        for (i64 j = 0; j < d; j++) {
            store(to[j], load(to[j]) * load(by[j]));
            dl[j] += load(to[j]);
        }
    }
    sums.put(dlinear, 0, d);
}

// Heads of one batch: q, k and v [B, L, ld]; head h has the d columns from h * d on, of the biases too. Keys from
// lengths[b] on are hidden. Random bytes: [B, H, L, L].
template <class T>
struct Heads {
    i64 b, h, l, d, ld;
    const i64* lengths;
    const T *q, *k, *v;
    const float *q_bias, *k_bias, *v_bias;
    Dropout drop;

    i64 wide() const { return whole(d); }
    i64 keys() const { return whole(l); }
    i64 start(i64 head) const { return head / h * l * ld + head % h * d; }
    // The scores of one head, [l, keys()], -inf where a key is hidden.
    void scores(i64 head, i64 n, float* Q, float* K, float* KT, float* S) const {
        i64 at = head % h * d;
        gather(l, d, q + start(head), ld, q_bias + at, 1 / std::sqrt(float(d)), Q);
        gather(n, d, k + start(head), ld, k_bias + at, 1, K);
        transpose(n, d, K, KT, keys());
        product(l, whole(n), d, Q, wide(), 1, KT, keys(), S, keys());
        for (i64 i = 0; i < l; i++) std::fill(S + i * keys() + n, S + i * keys() + whole(n), -INFINITY);
    }
};

// norms [B, H, L, 2]: each row's highest score and 1 / its sum of exponentials, for the way back. Rows of context
// are ldc apart.
template <class T>
static void attend(i64 b, i64 h, i64 l, i64 d, i64 ld, const i64* lengths, const T* q, const T* k,
                   const T* v, const float* q_bias, const float* k_bias, const float* v_bias, const int8_t* bits,
                   const int8_t* limit, float scale, T* context, i64 ldc, float* norms) {
    const Heads<T> at = {b, h, l, d, ld, lengths, q, k, v, q_bias, k_bias, v_bias, {bits, limit, scale}};
    i64 wide = at.wide(), keys = at.keys();
#pragma omp parallel
    {
        std::vector<float> Q(at.l * wide), K(keys * wide), KT(wide * keys), P(at.l * keys), C(at.l * wide);
#pragma omp for schedule(static)
        for (i64 head = 0; head < at.b * at.h; head++) {
            i64 n = at.lengths[head / at.h], full = whole(n);
            at.scores(head, n, Q.data(), K.data(), KT.data(), P.data());
            for (i64 i = 0; i < at.l; i++) {
                float *p = P.data() + i * keys, *norm = norms + 2 * (head * at.l + i);
                vec top = load_vec(p), sum = {};
                for (i64 j = LANES; j < full; j += LANES) top = load_vec(p + j) > top ? load_vec(p + j) : top;
                norm[0] = largest_of(top);
                for (i64 j = 0; j < full; j += LANES) {
                    const vec e = fast_exp(load_vec(p + j) - norm[0]);
                    store_vec(p + j, e), sum += e;
                }
                norm[1] = 1 / sum_of(sum);
                for (i64 j = 0; j < full; j += LANES)
                    store_vec(p + j, load_vec(p + j) * norm[1] * at.drop.factor((head * at.l + i) * at.l, j));
            }
            gather(n, at.d, at.v + at.start(head), at.ld, at.v_bias + head % at.h * at.d, 1, K.data());
            product(at.l, wide, n, P.data(), keys, 1, K.data(), wide, C.data(), wide);
            scatter(at.l, at.d, C.data(), 1, context + head / at.h * at.l * ldc + head % at.h * at.d, ldc);
        }
    }
}

// dcontext [B, L, H d], rows ldc apart -> dq, dk and dv, laid out as q, k and v. Probabilities are computed anew.
template <class T>
static void attend_backward(i64 batch, i64 heads, i64 l, i64 d, i64 ld, const i64* lengths,
                            const T* q, const T* k, const T* v, const float* q_bias, const float* k_bias,
                            const float* v_bias, const int8_t* bits, const int8_t* limit, float scale,
                            const float* norms, const T* dcontext, i64 ldc, T* dq, T* dk, T* dv) {
    const Heads<T> at = {batch, heads, l, d, ld, lengths, q, k, v, q_bias, k_bias, v_bias,
                         {bits, limit, scale}};
    i64 wide = at.wide(), keys = at.keys();
    std::vector<float> none(at.d);
#pragma omp parallel
    {
        std::vector<float> Q(at.l * wide), K(keys * wide), V(keys * wide), turned(wide * keys), dC(at.l * wide),
            P(at.l * keys), S(at.l * keys), out(at.l * wide);
#pragma omp for schedule(static)
        for (i64 head = 0; head < at.b * at.h; head++) {
            i64 b = head / at.h, h = head % at.h, n = at.lengths[b], full = whole(n);
            at.scores(head, n, Q.data(), K.data(), turned.data(), P.data());
            gather(n, at.d, at.v + at.start(head), at.ld, at.v_bias + h * at.d, 1, V.data());
            gather(at.l, at.d, dcontext + b * at.l * ldc + h * at.d, ldc, none.data(), 1, dC.data());
            transpose(n, at.d, V.data(), turned.data(), keys);
            product(at.l, full, at.d, dC.data(), wide, 1, turned.data(), keys, S.data(), keys);
            for (i64 i = 0; i < at.l; i++) {  // P becomes what dropout leaves of it, S the gradient of the scores
                float *p = P.data() + i * keys, *g = S.data() + i * keys;
                const float* norm = norms + 2 * (head * at.l + i);
                const i64 start = (head * at.l + i) * at.l;
                vec sum = {};
                for (i64 j = 0; j < full; j += LANES) {
                    const vec e = fast_exp(load_vec(p + j) - norm[0]) * norm[1];
                    store_vec(p + j, e), sum += e * load_vec(g + j) * at.drop.factor(start, j);
                }
                const float dot = sum_of(sum);
                for (i64 j = 0; j < full; j += LANES) {
                    const vec e = load_vec(p + j), keep = at.drop.factor(start, j);
                    store_vec(g + j, e * (load_vec(g + j) * keep - dot)), store_vec(p + j, e * keep);
                }
            }
            product(at.l, wide, n, S.data(), keys, 1, K.data(), wide, out.data(), wide);
            scatter(at.l, at.d, out.data(), 1 / std::sqrt(float(at.d)), dq + at.start(head), at.ld);
            std::fill(out.begin(), out.end(), 0.0f);
            product(n, wide, at.l, S.data(), 1, keys, Q.data(), wide, out.data(), wide);
            scatter(at.l, at.d, out.data(), 1, dk + at.start(head), at.ld);
            product(n, wide, at.l, P.data(), 1, keys, dC.data(), wide, out.data(), wide);
            scatter(at.l, at.d, out.data(), 1, dv + at.start(head), at.ld);
        }
    }
}

// LoRA's way down, for G adapters of rank r that read x [n, in]: h = dropout(x) A^T, [n, G r], and zeros in the
// `padding` columns behind. A comes as [G, in, whole(r)]; rows of x ldx apart, those of h ldh; bytes [G, n, in].
template <class T>
static void lora_down(i64 n, i64 in, i64 r, i64 groups, const T* x, i64 ldx, const float* turned, const int8_t* bits,
                      const int8_t* limit, float scale, T* h, i64 ldh, i64 padding) {
    const Dropout drop = {bits, limit, scale};
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

// And back: dh [n, G r] is the gradient of h, dx [n, in] (unless null) that of x through the frozen layer, to which is
// added what comes through the adapters; and dA [G, r, in]. Rows of both are ldd apart; A comes as [G, r, whole(in)].
template <class T>
static void lora_backward(i64 n, i64 in, i64 r, i64 groups, const T* x, i64 ldx, const float* A, const int8_t* bits,
                          const int8_t* limit, float scale, const T* dh, T* dx, i64 ldd, float* dA) {
    const i64 wide = whole(in), block = 16, most = 384, ranks = groups * r;  // of columns: 1.22 ms, then 0.94, for 1,536
    ColumnSums sums(ranks * wide);
#pragma omp parallel
    {
        std::vector<float> rows(block * most), sum(block * most), kept(most), down(block * ranks);
        float* mine = sums.mine();
#pragma omp for schedule(static)
        for (i64 start = 0; start < n; start += block) {
            const i64 count = std::min(block, n - start);
            for (i64 i = 0; i < count; i++)
                for (i64 j = 0; j < ranks; j++) down[i * ranks + j] = load(dh[(start + i) * ldd + j]);
            for (i64 first = 0; first < in; first += most) {
                const i64 columns = std::min(most, in - first), full = whole(columns);
                T* to = dx ? dx + start * ldd + first : nullptr;
                for (i64 i = 0; dx && i < count; i++)
                    for (i64 j = 0; j < columns; j++) sum[i * most + j] = load(to[i * ldd + j]);
                for (i64 g = 0; g < groups; g++) {
                    const Dropout part = {bits ? bits + (g * n + start) * in + first : nullptr, limit + first, scale};
                    for (i64 i = 0; i < count; i++)
                        part.apply(columns, i * in, x + (start + i) * ldx + first, rows.data() + i * most);
                    product<true>(r, full, count, down.data() + g * r, 1, ranks, rows.data(), most,
                                  mine + g * r * wide + first, wide);
                    if (!dx) continue;
                    product(count, full, r, down.data() + g * r, ranks, 1, A + g * r * wide + first, wide, rows.data(),
                            most);
                    for (i64 i = 0; i < count; i++) {
                        float *__restrict total = sum.data() + i * most, *__restrict from = kept.data();
                        part.apply(columns, i * in, rows.data() + i * most, from);
                        for (i64 j = 0; j < columns; j++) total[j] += from[j];
                    }
                }
                for (i64 i = 0; dx && i < count; i++)
                    for (i64 j = 0; j < columns; j++) store(to[i * ldd + j], sum[i * most + j]);
            }
        }
    }
    for (i64 row = 0; row < groups * r; row++) sums.put(dA + row * in, row * wide, in);
}

template <class T>
static void column_sums(i64 n, i64 d, const T* x, float* to) {
    ColumnSums sums(d);
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i++) {
        float* sum = sums.mine();
        for (i64 j = 0; j < d; j++) sum[j] += load(x[i * d + j]);
    }
    sums.put(to, 0, d);
}

// `lora_extend`, and A [G, r, in] becomes what `lora_down` reads, [G, in, whole(r)], and `lora_backward`, [G, r,
// whole(in)].
template <class T>
static void lora_follow(i64 columns, i64 in, i64 each, i64 r, i64 groups, const i64* offsets, const float* factors,
                        const T* B, T* wide, const float* A, float* down, float* back) {
    lora_extend(columns, in, each, r, groups, offsets, factors, B, wide);
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < groups * in; i++)
        for (i64 j = 0; j < r; j++) {
            const i64 row = i / in * r + j, column = i % in;
            down[i * whole(r) + j] = back[row * whole(in) + column] = A[row * in + column];
        }
}

// x [n, d], rows ldx apart -> to, rows ldt apart.
template <class T>
static void cast(i64 n, i64 d, const float* x, i64 ldx, T* to, i64 ldt) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j < d; j++) store(to[i * ldt + j], x[i * ldx + j]);
}

// to [b, l, d] = x, with first + more, [b, d] each, added at each sequence's first position. Rows of x are ldx apart,
// those of `more` ldm.
template <class T>
static void add_first(i64 b, i64 l, i64 d, const T* x, i64 ldx, const float* first, const T* more, i64 ldm, float* to) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < b * l; i++) {
        for (i64 j = 0; j < d; j++) to[i * d + j] = load(x[i * ldx + j]);
        for (i64 j = 0; i % l == 0 && j < d; j++) to[i * d + j] += first[i / l * d + j] + load(more[i / l * ldm + j]);
    }
}

// The head: used [b, d] = dropout(relu(x w1^T + b1)), logits [b, classes] = used w2^T + b2. d: a multiple of PANEL.
static void head(i64 b, i64 d, i64 classes, const float* x, const float* w1, const float* b1, const float* w2,
                 const float* b2, const int8_t* bits, const int8_t* limit, float scale, float* used, float* logits) {
    const Dropout drop = {bits, limit, scale};
    multiply_forward(b, d, d, x, d, w1, d, used);
#pragma omp parallel
    {
        std::vector<float> keep(whole(d));
#pragma omp for schedule(static)
        for (i64 i = 0; i < b; i++) {
            float* __restrict to = used + i * d;
            drop.factors(d, i * d, keep.data());
            for (i64 j = 0; j < d; j++) to[j] = std::max(to[j] + b1[j], 0.0f) * keep[j];
            for (i64 c = 0; c < classes; c++) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (i64 j = 0; j < d; j++) sum += to[j] * w2[c * d + j];
                logits[i * classes + c] = sum + b2[c];
            }
        }
    }
}

// The gradient dy of the logits -> dx [b, d] and, where they are wanted, those of the weights. Where `used` is 0, relu or
// dropout let nothing through.
static void head_backward(i64 b, i64 d, i64 classes, const float* x, const float* w1, const float* w2,
                          const float* used, float scale, const float* dy, float* dx, float* dw1, float* db1,
                          float* dw2, float* db2) {
    std::vector<float> dh(b * d);
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
        for (i64 i = 0; i < b; i++)
            for (i64 j = 0; j < d; j++) {
                float sum = 0;
                for (i64 c = 0; c < classes; c++) sum += dy[i * classes + c] * w2[c * d + j];
                dh[i * d + j] = used[i * d + j] > 0 ? sum * scale : 0.0f;
            }
#pragma omp for schedule(static)
        for (i64 c = 0; c < classes; c++) {
            if (dw2) std::fill_n(dw2 + c * d, d, 0.0f);
            float sum = 0;
            for (i64 i = 0; i < b; i++) {
                const float from = dy[i * classes + c];
                sum += from;
                for (i64 j = 0; dw2 && j < d; j++) dw2[c * d + j] += from * used[i * d + j];
            }
            if (db2) db2[c] = sum;
        }
    }
    multiply_backward(b, d, d, dh.data(), d, w1, d, dx);
    if (dw1) gradient_floats(b, d, d, dh.data(), d, x, d, dw1);
    if (db1) column_sums(b, d, dh.data(), db1);
}

// In the order of kernels.SIGNATURES.
template <class T>
static const Entry* table() {
    static const Entry all[] = {
        entry<add_norm<T>>(), entry<add_norm_backward<T>>(), entry<gelu<T>>(), entry<gelu_backward<T>>(),
        entry<attend<T>>(), entry<attend_backward<T>>(), entry<lora_down<T>>(), entry<lora_backward<T>>(),
        entry<lora_follow<T>>(), entry<column_sums<T>>(), entry<square_sum<T>>(), entry<draw>(), entry<adamw<T>>(),
        entry<adamw_packed<T>>(), entry<adamw_rows>(), entry<adamw_skipped>(), entry<tiles_allowed>(), entry<panel>(),
        entry<pack_weight>(), entry<multiply>(), entry<gradient>(), entry<lora_down_tiles>(),
        entry<lora_up_gradient>(), entry<lora_backward_tiles>(), entry<lora_refresh>(), entry<attend_first<T>>(),
        entry<attend_first_backward<T>>(), entry<attend_first_gradient<T>>(), entry<multiply_forward>(),
        entry<multiply_backward>(), entry<gradient_floats>(), entry<lora_up_gradient_floats>(), entry<cast<T>>(),
        entry<add_first<T>>(), entry<head>(), entry<head_backward>(), entry<replay>()};
    return all;
}

extern "C" {
const Entry* kernels_bf16() { return table<bf16>(); }
const Entry* kernels_float() { return table<float>(); }
}
