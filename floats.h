// Matrix products in fp32, for processors without bf16 ones: as fast as the library's (it depends on the shape which are
// faster), but they can be recorded (tape.py).

#pragma once

#include "kernels.h"

static const i64 PANEL = 2 * LANES, DEPTH = 448, HIGH = 96, GROUP = 4, PACKED_GROUP = 192 / PANEL;

// `deep` numbers of PANEL columns of the right operand, side by side: from b, rows ldb apart, or, TURNED, from b^T.
template <bool TURNED>
static void pack_panel(i64 deep, const float* __restrict b, i64 ldb, float* __restrict to) {
    if (!TURNED)
        for (i64 i = 0; i < deep; i++) std::copy_n(b + i * ldb, PANEL, to + i * PANEL);
    else
        for (i64 i = 0; i < deep; i += WIDTH)  // `deep` is a multiple of it here
            for (i64 x = 0; x < PANEL; x++)
                for (i64 y = i; y < i + WIDTH; y++) to[y * PANEL + x] = b[x * ldb + y];
}

// `deep` numbers of each of `rows` rows of the left operand, six rows side by side: from a, whose rows lie side by side
// and whose columns are `column` apart. Read in place, columns of the same sets throw each other out of the first cache.
static void pack_rows(i64 rows, i64 deep, const float* __restrict a, i64 column, float* __restrict to) {
    for (i64 p = 0; p < deep; p += 8) {
        const i64 end = std::min(deep, p + 8);
        for (i64 i = 0; i + 6 <= rows; i += 6)
            for (i64 q = p; q < end; q++) std::copy_n(a + q * column + i, 6, to + i * deep + q * 6);
        for (i64 i = rows / 6 * 6, q = p; q < end && i < rows; q++)
            std::copy_n(a + q * column + i, rows - i, to + i * deep + q * 6);
    }
}

// Into what the columns of products here must fit.
static i64 panel() { return PANEL; }

// c [m, n] = a [m, k] b [k, n], or, TURNED, a b^T; a has any strides (PACKED: its rows lie side by side), n is a multiple
// of PANEL. A panel stays in the first cache for HIGH rows, a group of at most GROUP (or PACKED_GROUP, which share what
// packing costs) in the second; the groups are of like size, and as many for each thread. The order of the sums depends
// on k alone, which is cut into like slices. With AVX2, medians of 100 calls in turn: to pack a made the gradients of
// weights 13 to 20% faster (N 435, 1536 x 384: 4.55 ms, then 3.60), but products whose rows of a are whole 3 to 12%
// slower.
template <bool TURNED, bool PACKED>
static void multiply_floats(i64 m, i64 n, i64 k, const float* a, i64 row, i64 column, const float* b, i64 ldb, float* c,
                     i64 ldc) {
    const i64 threads = omp_get_max_threads(), all = n / PANEL, most = threads * (PACKED ? PACKED_GROUP : GROUP);
    const i64 groups = std::min(all, (all + most - 1) / most * threads);
    const i64 parts = std::max<i64>(1, threads / groups), high = (m / parts + 6) / 6 * 6;  // rows, for many threads
    const i64 slices = (k + DEPTH - 1) / DEPTH, slice = whole((k + slices - 1) / slices);
#pragma omp parallel
    {
        static thread_local std::vector<float> panels(PACKED_GROUP * DEPTH * PANEL), left(HIGH * DEPTH);
#pragma omp for collapse(2) schedule(static)
        for (i64 part = 0; part < parts; part++)
            for (i64 group = 0; group < groups; group++) {
                const i64 first = group * all / groups * PANEL, last = (group + 1) * all / groups * PANEL;
                const i64 end = std::min(m, (part + 1) * high);
                for (i64 p = 0; p < k; p += slice) {
                    const i64 deep = std::min(slice, k - p);
                    for (i64 j = first; j < last; j += PANEL)
                        pack_panel<TURNED>(deep, TURNED ? b + j * ldb + p : b + p * ldb + j, ldb,
                                           panels.data() + (j - first) * deep);
                    for (i64 i = part * high; i < end; i += HIGH) {
                        const i64 rows = std::min(HIGH, end - i);
                        const float* from = a + i * row + p * column;
                        if (PACKED) pack_rows(rows, deep, from, column, left.data()), from = left.data();
                        const i64 six = PACKED ? 6 * deep : 6 * row, one = PACKED ? 1 : row, next = PACKED ? 6 : column;
                        for (i64 j = first; j < last; j += PANEL)
                            (p ? strip<2, true> : strip<2, false>)(rows, deep, from, six, one, next,
                                                                   panels.data() + (j - first) * deep, PANEL,
                                                                   c + i * ldc + j, ldc);
                    }
                }
            }
    }
}

// y [n, out] = x w^T, rows of x and w ldx and ldw apart.
static void multiply_forward(i64 n, i64 out, i64 in, const float* x, i64 ldx, const float* w, i64 ldw, float* y) {
    multiply_floats<true, false>(n, out, in, x, ldx, 1, w, ldw, y, out);
}

// dx [n, in] = dy w.
static void multiply_backward(i64 n, i64 in, i64 out, const float* dy, i64 ldy, const float* w, i64 ldw, float* dx) {
    multiply_floats<false, false>(n, in, out, dy, ldy, 1, w, ldw, dx, in);
}

// dw [out, in] = dy^T x.
static void gradient_floats(i64 n, i64 out, i64 in, const float* dy, i64 ldy, const float* x, i64 ldx, float* dw) {
    multiply_floats<false, true>(out, in, n, dy, 1, ldy, x, ldx, dw, in);
}

// As `lora_up_gradient`.
static void lora_up_gradient_floats(i64 n, i64 out, i64 r, i64 groups, const i64* offsets, const float* factors,
                                    const float* dy, i64 ldy, const float* h, i64 ldh, float* dB) {
    const i64 ranks = whole(r);
#pragma omp parallel
    {
        std::vector<float> right(n * ranks), sums(HIGH * ranks), nothing(r);
#pragma omp for collapse(2) schedule(static)
        for (i64 g = 0; g < groups; g++)
            for (i64 i = 0; i < out; i += HIGH) {
                const i64 rows = std::min(HIGH, out - i);
                gather(n, r, h + g * r, ldh, nothing.data(), 1, right.data());
                product(rows, ranks, n, dy + offsets[g] + i, 1, ldy, right.data(), ranks, sums.data(), ranks);
                scatter(rows, r, sums.data(), factors[g], dB + (g * out + i) * r, r);
            }
    }
}
