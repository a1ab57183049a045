// Attention of each sequence's first token over all of them, all that the last layer is asked for, without keys and
// values: q (W x) = (q W) x, so a head's one query goes through the weights instead of every token, and the mean of
// values is that of the inputs, through the weights. Exact: what a bias of the keys adds to all scores alike, softmax
// takes off.
//
// For h heads of d columns: x [b, l, in], rows ldx apart, of which lengths[b] count; q [b, h d]; W [2 h d, in], the
// keys' rows and then the values'; random bytes [b, h, l]. Whoever adapts keys or values has the products with A behind
// x and B behind W. Room for queries, means and the like, [b, h, whole(in)] in float, has a vector more.

#pragma once

#include "kernels.h"

template <class T>
struct First {
    i64 b, h, l, d, in, ldx;
    const T *x, *W;
    Dropout drop;

    i64 wide() const { return whole(in); }
    i64 keys() const { return whole(l); }
    i64 columns() const { return whole(d); }

    // A thread's own memory, and what it takes out of the operands.
    struct Own {
        const First& at;
        std::vector<float> none, rows, turned, some, X, XT, S, P, keep;

        explicit Own(const First& at)
            : at(at), none(std::max(at.wide(), at.h * at.d)), rows(at.columns() * at.wide()),
              turned(at.columns() * at.wide()), some(at.b * at.columns()), X(at.keys() * at.wide()),
              XT(at.keys() * at.wide()), S(at.h * at.keys()), P(at.h * at.keys()), keep(at.keys()) {}
        // The weights of one head's keys (0) or values (1): rows [d, wide()], turned [wide(), columns()].
        void weights(i64 head, i64 values) {
            gather(at.d, at.in, at.W + (values * at.h + head) * at.d * at.in, at.in, none.data(), 1, rows.data());
            transpose(at.d, at.in, rows.data(), turned.data(), at.columns());
        }
        // One head's columns of [b, h d], rows ld apart, plus `shift`, as `some` [b, columns()].
        void head(const T* from, i64 ld, i64 head, const float* shift, float scale) {
            gather(at.b, at.d, from + head * at.d, ld, (shift ? shift : none.data()) + head * at.d, scale, some.data());
        }
        // The tokens of a sequence, X [n, wide()] and XT [wide(), keys()].
        void tokens(i64 sequence, i64 n) {
            gather(n, at.in, at.x + sequence * at.l * at.ldx, at.ldx, none.data(), 1, X.data());
            transpose(n, at.in, X.data(), XT.data(), at.keys());
        }
        // What dropout multiplies the probabilities of one head of a sequence with: `keep` [n].
        void kept(i64 sequence, i64 head, i64 n) { at.drop.factors(n, (sequence * at.h + head) * at.l, keep.data()); }
    };
};

// -> context [b, h d], rows ldc apart; and for the way back the queries through the weights, the means of inputs, the
// probabilities [b, h, whole(l)] and what dropout leaves of their sum [b, h].
template <class T>
static void attend_first(i64 b, i64 h, i64 l, i64 d, i64 in, i64 ldx, const i64* lengths, const T* q, const T* x,
                         const T* W, const float* q_bias, const float* v_bias, const int8_t* bits, const int8_t* limit,
                         float scale, T* context, i64 ldc, float* queries, float* means, float* probabilities,
                         float* left) {
    const First<T> at = {b, h, l, d, in, ldx, x, W, {bits, limit, scale}};
    const i64 wide = at.wide(), keys = at.keys(), columns = at.columns();
#pragma omp parallel
    {
        typename First<T>::Own own(at);
#pragma omp for schedule(static)
        for (i64 head = 0; head < h; head++) {
            own.weights(head, 0), own.head(q, h * d, head, q_bias, 1 / std::sqrt(float(d)));
            product(b, wide, d, own.some.data(), columns, 1, own.rows.data(), wide, queries + head * wide, h * wide);
        }
#pragma omp for schedule(static)
        for (i64 i = 0; i < b; i++) {
            const i64 n = lengths[i], full = whole(n);
            own.tokens(i, n);
            product(h, full, in, queries + i * h * wide, wide, 1, own.XT.data(), keys, own.S.data(), keys);
            for (i64 head = 0; head < h; head++) {
                float *s = own.S.data() + head * keys, *p = probabilities + (i * h + head) * keys, top = s[0], sum = 0;
                for (i64 j = 0; j < n; j++) top = std::max(top, s[j]);
                for (i64 j = 0; j < full; j++) p[j] = j < n ? fast_exp(s[j] - top) : 0.0f;
#pragma omp simd reduction(+ : sum)
                for (i64 j = 0; j < full; j++) sum += p[j];
                own.kept(i, head, n);
                float rest = 0;
#pragma omp simd reduction(+ : rest)
                for (i64 j = 0; j < full; j++) p[j] /= sum, rest += s[j] = p[j] * own.keep[j];
                left[i * h + head] = rest;
            }
            product(h, wide, n, own.S.data(), keys, 1, own.X.data(), wide, means + i * h * wide, wide);
        }
#pragma omp for schedule(static)
        for (i64 head = 0; head < h; head++) {
            own.weights(head, 1);
            product(b, columns, in, means + head * wide, h * wide, 1, own.turned.data(), columns, own.some.data(),
                    columns);
            for (i64 i = 0; i < b; i++)
                for (i64 j = 0; j < d; j++)
                    store(context[i * ldc + head * d + j],
                          own.some[i * columns + j] + v_bias[head * d + j] * left[i * h + head]);
        }
    }
}

// dcontext [b, h d], rows ldc apart -> dq [b, h d], the columns from `first` on of the gradient of x, dx [b, l,
// in - first] (unless null), the sums of inputs by the scores' gradients, and the gradient of both biases [2 h d]
// (unless null). `through`: room for dcontext through the weights.
template <class T>
static void attend_first_backward(i64 b, i64 h, i64 l, i64 d, i64 in, i64 ldx, const i64* lengths, const T* q,
                                  const T* x, const T* W, const float* q_bias, const float* v_bias, const int8_t* bits,
                                  const int8_t* limit, float scale, const float* queries, const float* probabilities,
                                  const float* left, const T* dcontext, i64 ldc, float* through, float* sums,
                                  T* dq, i64 first, T* dx, float* dbias) {
    const First<T> at = {b, h, l, d, in, ldx, x, W, {bits, limit, scale}};
    const i64 wide = at.wide(), keys = at.keys(), columns = at.columns(), count = in - first;
#pragma omp parallel
    {
        typename First<T>::Own own(at);
        std::vector<float> out(dx ? keys * whole(count) : 0);
#pragma omp for schedule(static)
        for (i64 head = 0; head < h; head++) {
            own.weights(head, 1), own.head(dcontext, ldc, head, nullptr, 1);
            product(b, wide, d, own.some.data(), columns, 1, own.rows.data(), wide, through + head * wide, h * wide);
            for (i64 j = 0; dbias && j < d; j++) {
                float sum = 0;
                for (i64 i = 0; i < b; i++) sum += own.some[i * columns + j] * left[i * h + head];
                dbias[head * d + j] = 0, dbias[(h + head) * d + j] = sum;
            }
        }
#pragma omp for schedule(static)
        for (i64 i = 0; i < b; i++) {
            const i64 n = lengths[i], full = whole(n);
            own.tokens(i, n);
            product(h, full, in, through + i * h * wide, wide, 1, own.XT.data(), keys, own.S.data(), keys);
            for (i64 head = 0; head < h; head++) {  // S becomes the gradient of the scores, P what dropout leaves
                const float* p = probabilities + (i * h + head) * keys;
                float *g = own.S.data() + head * keys, *rest = own.P.data() + head * keys, bias = 0, dot = 0;
                for (i64 j = 0; j < d; j++) bias += v_bias[head * d + j] * load(dcontext[i * ldc + head * d + j]);
                own.kept(i, head, n);
#pragma omp simd reduction(+ : dot)
                for (i64 j = 0; j < full; j++) {
                    rest[j] = p[j] * own.keep[j], g[j] = (g[j] + bias) * own.keep[j];
                    dot += p[j] * g[j];
                }
                for (i64 j = 0; j < full; j++) g[j] = p[j] * (g[j] - dot);
            }
            product(h, wide, n, own.S.data(), keys, 1, own.X.data(), wide, sums + i * h * wide, wide);
            if (!dx) continue;
            const i64 start = i * h * wide + first, ldo = whole(count);
            product(n, ldo, h, own.S.data(), 1, keys, queries + start, wide, out.data(), ldo);
            product<true>(n, ldo, h, own.P.data(), 1, keys, through + start, wide, out.data(), ldo);
            std::fill(out.begin() + n * ldo, out.begin() + l * ldo, 0.0f);
            scatter(l, count, out.data(), 1, dx + i * l * count, count);
        }
#pragma omp for schedule(static)
        for (i64 head = 0; head < h; head++) {
            own.weights(head, 0);
            product(b, columns, in, sums + head * wide, h * wide, 1, own.turned.data(), columns, own.some.data(),
                    columns);
            scatter(b, d, own.some.data(), 1 / std::sqrt(float(d)), dq + head * d, h * d);
        }
    }
}

// The gradient of `count` columns of W from `first` on, for keys or values: to [h d, count] = scale (left + shift)^T
// right, head by head. Keys: of the queries and the sums; values: of dcontext (no shift) and the means. Rows of `left`
// are ldl apart.
template <class T>
static void attend_first_gradient(i64 b, i64 h, i64 d, i64 in, i64 first, i64 count, const T* left, i64 ldl,
                                  const float* shift, float scale, const float* right, T* to) {
    const i64 wide = whole(in), columns = whole(d);
#pragma omp parallel
    {
        std::vector<float> none(h * d), some(b * columns), sums(d * whole(count));
#pragma omp for schedule(static)
        for (i64 head = 0; head < h; head++) {
            gather(b, d, left + head * d, ldl, (shift ? shift : none.data()) + head * d, scale, some.data());
            product(d, whole(count), b, some.data(), 1, columns, right + head * wide + first, h * wide, sums.data(),
                    whole(count));
            scatter(d, count, sums.data(), 1, to + head * d * count, count);
        }
    }
}
