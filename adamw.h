// The optimiser: torch.optim.AdamW's update of flat buffers, of matrices packed for the products, and of a few rows.

#pragma once

#include "kernels.h"
#include "products.h"

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
// rest: 1 - beta in double precision, which 1.0f - 0.999f misses by 1e-5.
struct AdamW {
    float scale, lr, rest1, beta2, rest2, eps, decay, correction1, root_correction2;

    template <class T>
    void update(i64 n, float* __restrict p, const T* __restrict g, float* __restrict m, float* __restrict v,
                bf16* __restrict copy) const {
        const float step = lr / correction1;
#pragma omp simd
        for (i64 i = 0; i < n; i++) {
            float grad = load(g[i]) * scale;
            m[i] += rest1 * (grad - m[i]);
            v[i] = beta2 * v[i] + rest2 * grad * grad;
            p[i] = p[i] * (1 - lr * decay) - step * m[i] / (std::sqrt(v[i]) / root_correction2 + eps);
            if (copy) store(copy[i], p[i]);
        }
    }
};

template <class T>
static void adamw(i64 n, float* p, const T* g, float* m, float* v, bf16* copy, const AdamW* by) {
    const AdamW rule = *by;
    const i64 block = 8192;
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i += block)
        rule.update(std::min(block, n - i), p + i, g + i, m + i, v + i, copy ? copy + i : nullptr);
}

// The same of a matrix [out, in] of which only the packed copies are needed.
template <class T>
static void adamw_packed(i64 out, i64 in, float* p, const T* g, float* m, float* v, bf16* forward, bf16* backward,
                         const AdamW* by) {
    const AdamW rule = *by;
    const i64 block = 32 * in;
#pragma omp parallel
    {
        std::vector<bf16> rows(block);
#pragma omp for schedule(static)
        for (i64 o = 0; o < out; o += 32) {
            const i64 at = o * in;
            rule.update(block, p + at, g + at, m + at, v + at, rows.data());
            pack_rows(o, out, in, 0, rows.data(), forward, backward);
        }
    }
}

// Of the rows of p, m and v [., d] named by `rows` [n], for the gradients g [n, d].
static void adamw_rows(i64 n, i64 d, const i64* rows, float* p, const float* g, float* m, float* v, const AdamW* by) {
    const AdamW rule = *by;
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i++) {
        const i64 at = rows[i] * d;
        rule.update(d, p + at, g + i * d, m + at, v + at, nullptr);
    }
}

// What steps with gradient 0 did to those rows: optim.LazyTable has the mathematics. rules [., 3 + 2 nodes], one of
// them for each row by `rule` [n]: factors of p, m and v, then nodes and their weights.
static void adamw_skipped(i64 n, i64 d, const i64* rows, const i64* rule, i64 nodes, const float* rules, float eps,
                          float* p, float* m, float* v) {
    auto fetch = [=](i64 i) {  // a row is where no cache has it
        for (i64 j = 0; j < d; j += 16)
            for (const float* from : {p, m, v}) __builtin_prefetch(from + rows[i] * d + j, 1);
    };
#pragma omp parallel
    {
        std::vector<float> space(2 * d);
        float *__restrict root = space.data(), *__restrict sum = root + d;
#pragma omp for schedule(static)
        for (i64 i = 0; i < n; i++) {
            if (i + 1 < n) fetch(i + 1);
            const float *factors = rules + rule[i] * (3 + 2 * nodes), *node = factors + 3, *weight = node + nodes;
            const float decay = factors[0], decay_m = factors[1], decay_v = factors[2];
            float *__restrict to = p + rows[i] * d, *__restrict first = m + rows[i] * d;
            float* __restrict second = v + rows[i] * d;
            for (i64 j = 0; j < d; j++) root[j] = std::sqrt(second[j]), sum[j] = 0;
            for (i64 k = 0; k < nodes; k++) {
                const float x = node[k], w = weight[k];
                for (i64 j = 0; j < d; j++) sum[j] += w / (root[j] * x + eps);
            }
            for (i64 j = 0; j < d; j++) {
                to[j] = to[j] * decay - first[j] * sum[j];
                first[j] *= decay_m, second[j] *= decay_v;
            }
        }
    }
}
