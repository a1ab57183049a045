// LoRA's skinny products on tiles, their dropout on the way: no masked copy of x in memory, none in float.
// For G adapters of rank r that read x [n, in], whose matrices A come as [G, r, in]; random bytes [G, n, in].

#pragma once

#include "products.h"

// After a step: the columns of wide [out, columns] from `in` on become factors * B, block by block. B: [G each, r].
template <class T>
static void lora_extend(i64 columns, i64 in, i64 each, i64 r, i64 groups, const i64* offsets, const float* factors,
                        const T* B, T* wide) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < groups * each; i++) {
        const i64 g = i / each;
        T* to = wide + (offsets[g] + i % each) * columns + in + g * r;
        for (i64 j = 0; j < r; j++) store(to[j], load(B[i * r + j]) * factors[g]);
    }
}

#ifdef TILES
static const i64 GROUPS = 3;  // adapters of one call at most: q, k and v

// What dropout leaves of 32 neighbours in a row, but for the scale.
static inline __mmask32 kept(const Dropout& drop, i64 start, i64 column) {
    if (!drop.bits) return ~__mmask32(0);
    return _mm256_cmpge_epi8_mask(_mm256_loadu_si256((const __m256i*)(drop.bits + start + column)),
                                  _mm256_loadu_si256((const __m256i*)(drop.limit + column)));
}

// `rows` rows of `count` numbers, ld apart -> the rows of a left operand's tile, with zeros around.
static inline void pad_tile(const bf16* from, i64 ld, i64 rows, i64 count, bf16* to) {
    const __mmask32 there = count >= DEEP ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
    for (i64 i = 0; i < ROWS; i++)
        _mm512_store_si512(to + i * DEEP, i < rows ? _mm512_maskz_loadu_epi16(there, from + i * ld)
                                                   : _mm512_setzero_si512());
}

// `count` columns of 32 rows, of which `rows` are there, as the tile of a right operand.
static inline void pack_skinny(const bf16* from, i64 ld, i64 rows, i64 count, bf16* to) {
    alignas(64) bf16 padded[2 * TILE], nothing[TILE];
    pad_tile(from, ld, rows, count, padded);
    pad_tile(from + ROWS * ld, ld, rows - ROWS, count, padded + TILE);
    pack_tiles(padded, DEEP, DEEP, to, nothing);
}

// The way down: h [n, G r] = dropout(x) A^T, and zeros in the `padding` columns behind.
static void lora_down_tiles(i64 n, i64 in, i64 r, i64 groups, const bf16* x, i64 ldx, const bf16* A, const int8_t* bits,
                            const int8_t* limit, float scale, bf16* h, i64 ldh, i64 padding) {
    const Dropout drop = {bits, limit, scale};
    const i64 deep = in / DEEP, across = (r + ROWS - 1) / ROWS;
#pragma omp parallel
    {
        Tiles right(groups * across * deep), left(deep);
        alignas(64) bf16 tile[TILE];
        alignas(64) float sums[ROWS * ROWS];
        shape_tiles(ROWS, ROWS);
        for (i64 g = 0; g < groups; g++)
            for (i64 c = 0; c < across; c++)
                for (i64 p = 0; p < deep; p++) {
                    pad_tile(A + (g * r + c * ROWS) * in + p * DEEP, in, r - c * ROWS, DEEP, tile);
                    turn_tile(tile, DEEP, right.at((g * across + c) * deep + p));
                }
#pragma omp for schedule(static)
        for (i64 first = 0; first < n; first += ROWS) {
            const i64 rows = std::min(ROWS, n - first);
            for (i64 g = 0; g < groups; g++) {
                for (i64 i = 0; i < rows; i++)
                    for (i64 p = 0; p < deep; p++) {
                        const __mmask32 mask = kept(drop, (g * n + first + i) * in, p * DEEP);
                        _mm512_store_si512(left.at(p) + i * DEEP,
                                           _mm512_maskz_loadu_epi16(mask, x + (first + i) * ldx + p * DEEP));
                    }
                for (i64 c = 0; c < across; c++) {
                    skinny(deep, left.at(0), right.at((g * across + c) * deep), sums);
                    for (i64 i = 0; i < rows; i++)
                        for (i64 j = 0; j < std::min(ROWS, r - c * ROWS); j++)
                            store(h[(first + i) * ldh + g * r + c * ROWS + j], sums[i * ROWS + j] * scale);
                }
            }
            for (i64 i = 0; i < rows; i++)
                for (i64 j = 0; j < padding; j++) store(h[(first + i) * ldh + groups * r + j], 0.0f);
        }
        release_tiles();
    }
}

// Gradients of the matrices B: dB [G, out, r] = factors * dy^T h. dy: [n, .], of which the out columns from
// offsets[g] on are those of adapter g; h: [n, G r], rows ldh apart.
static void lora_up_gradient(i64 n, i64 out, i64 r, i64 groups, const i64* offsets, const float* factors,
                             const bf16* dy, i64 ldy, const bf16* h, i64 ldh, bf16* dB) {
    const i64 deep = (n + DEEP - 1) / DEEP, across = (r + ROWS - 1) / ROWS;
#pragma omp parallel
    {
        Tiles right(groups * across * deep), left(2 * deep);
        alignas(64) bf16 tiles[2 * TILE];
        alignas(64) float sums[ROWS * ROWS];
        shape_tiles(ROWS, ROWS);
        for (i64 g = 0; g < groups; g++)
            for (i64 c = 0; c < across; c++)
                for (i64 p = 0; p < deep; p++)
                    pack_skinny(h + p * DEEP * ldh + g * r + c * ROWS, ldh, std::min(DEEP, n - p * DEEP),
                                std::min(ROWS, r - c * ROWS), right.at((g * across + c) * deep + p));
#pragma omp for schedule(static)
        for (i64 strip = 0; strip < groups * (out / 32); strip++) {
            const i64 g = strip / (out / 32), column = strip % (out / 32) * 32;
            for (i64 p = 0; p < deep; p++) {
                pack_tiles(dy + p * DEEP * ldy + offsets[g] + column, ldy, std::min(DEEP, n - p * DEEP), tiles,
                           tiles + TILE);
                turn_tile(tiles, DEEP, left.at(p)), turn_tile(tiles + TILE, DEEP, left.at(deep + p));
            }
            for (i64 half = 0; half < 2; half++)
                for (i64 c = 0; c < across; c++) {
                    skinny(deep, left.at(half * deep), right.at((g * across + c) * deep), sums);
                    bf16* to = dB + (g * out + column + half * ROWS) * r + c * ROWS;
                    for (i64 i = 0; i < ROWS; i++)
                        for (i64 j = 0; j < std::min(ROWS, r - c * ROWS); j++)
                            store(to[i * r + j], sums[i * ROWS + j] * factors[g]);
                }
        }
        release_tiles();
    }
}

// And back: dx [n, in] is the gradient of x through the frozen layer, to which is added what comes through the adapters
// from dh [n, G r], that of h. Rows of both are ldd apart.
static void lora_dx(i64 n, i64 in, i64 r, i64 groups, const bf16* A, const Dropout& drop, const bf16* dh,
                    bf16* dx, i64 ldd) {
    const i64 deep = (r + DEEP - 1) / DEEP, columns = in / 32;
#pragma omp parallel
    {
        Tiles right(groups * deep * columns * 2), left(groups * deep);
        alignas(64) float sums[GROUPS][ROWS * 32];
        const __m512 scale = _mm512_set1_ps(drop.scale);
        shape_tiles(ROWS, ROWS);
        for (i64 g = 0; g < groups; g++)
            for (i64 c = 0; c < columns; c++)
                for (i64 p = 0; p < deep; p++) {
                    bf16* to = right.at((g * columns + c) * deep * 2 + p);
                    pack_tiles(A + (g * r + p * DEEP) * in + c * 32, in, std::min(DEEP, r - p * DEEP), to,
                               to + deep * TILE);
                }
#pragma omp for schedule(static)
        for (i64 first = 0; first < n; first += ROWS) {
            const i64 rows = std::min(ROWS, n - first);
            for (i64 g = 0; g < groups; g++)
                for (i64 p = 0; p < deep; p++)
                    pad_tile(dh + first * ldd + g * r + p * DEEP, ldd, rows, std::min(DEEP, r - p * DEEP),
                             left.at(g * deep + p));
            for (i64 c = 0; c < columns; c++) {
                for (i64 g = 0; g < groups; g++) {
                    const bf16* up = right.at((g * columns + c) * deep * 2);
                    block<true>(ROWS, r, left.at(g * deep), 0, up, sums[g]);
                }
                for (i64 i = 0; i < rows; i++) {
                    bf16* const at = dx + (first + i) * ldd + c * 32;
                    __builtin_prefetch(at + 32, 1, 3);  // rows lie too far apart for the processor to foresee them
                    const __m512i through = _mm512_loadu_si512(at);
                    __m512 low = widen(_mm512_castsi512_si256(through));
                    __m512 high = widen(_mm512_extracti64x4_epi64(through, 1));
                    for (i64 g = 0; g < groups; g++) {
                        const __mmask32 mask = kept(drop, (g * n + first + i) * in, c * 32);
                        const float* sum = sums[g] + i * 32;
                        low = _mm512_mask3_fmadd_ps(_mm512_load_ps(sum), scale, low, __mmask16(mask));
                        high = _mm512_mask3_fmadd_ps(_mm512_load_ps(sum + ROWS), scale, high, __mmask16(mask >> 16));
                    }
                    _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh(high, low));
                }
            }
        }
        release_tiles();
    }
}

// dA [G, r, in] = the gradient of h, transposed, times dropout(x).
static void lora_down_gradient(i64 n, i64 in, i64 r, i64 groups, const bf16* x, i64 ldx, const Dropout& drop,
                               const bf16* dh, i64 ldd, bf16* dA) {
    const i64 deep = (n + DEEP - 1) / DEEP, down = (r + ROWS - 1) / ROWS;
#pragma omp parallel
    {
        Tiles left(groups * down * deep), right(2 * deep);
        alignas(64) bf16 masked[2 * TILE], tile[TILE];
        alignas(64) float sums[ROWS * 32];
        shape_tiles(ROWS, ROWS);
        for (i64 g = 0; g < groups; g++)
            for (i64 c = 0; c < down; c++)
                for (i64 p = 0; p < deep; p++) {
                    pack_skinny(dh + p * DEEP * ldd + g * r + c * ROWS, ldd, std::min(DEEP, n - p * DEEP),
                                std::min(ROWS, r - c * ROWS), tile);
                    turn_tile(tile, DEEP, left.at((g * down + c) * deep + p));
                }
#pragma omp for schedule(static)
        for (i64 column = 0; column < in; column += 32)
            for (i64 g = 0; g < groups; g++) {
                for (i64 p = 0; p < deep; p++) {
                    const i64 first = p * DEEP, rows = std::min(DEEP, n - first);
                    for (i64 i = 0; i < rows; i++) {
                        const bf16* from = x + (first + i) * ldx + column;
                        const i64 start = (g * n + first + i) * in;
                        // For the next columns, as above.
                        __builtin_prefetch(from + 32, 0, 2);
                        if (drop.bits) __builtin_prefetch(drop.bits + start + column + 32, 0, 2);
                        _mm512_store_si512(masked + i * DEEP, _mm512_maskz_loadu_epi16(kept(drop, start, column), from));
                    }
                    pack_tiles(masked, DEEP, rows, right.at(p), right.at(deep + p));
                }
                for (i64 c = 0; c < down; c++) {
                    block<true>(ROWS, n, left.at((g * down + c) * deep), 0, right.at(0), sums);
                    for (i64 i = 0; i < std::min(ROWS, r - c * ROWS); i++)
                        for (i64 j = 0; j < 32; j++)
                            store(dA[(g * r + c * ROWS + i) * in + column + j], sums[i * 32 + j] * drop.scale);
                }
            }
        release_tiles();
    }
}

static void lora_backward_tiles(i64 n, i64 in, i64 r, i64 groups, const bf16* x, i64 ldx, const bf16* A,
                                const int8_t* bits, const int8_t* limit, float scale, const bf16* dh,
                                bf16* dx, i64 ldd, bf16* dA) {
    const Dropout drop = {bits, limit, scale};
    if (dx) lora_dx(n, in, r, groups, A, drop, dh, dx, ldd);
    lora_down_gradient(n, in, r, groups, x, ldx, drop, dh, ldd, dA);
}

// The same, and those columns are packed.
static void lora_refresh(i64 out, i64 columns, i64 in, i64 each, i64 r, i64 groups, const i64* offsets,
                         const float* factors, const bf16* B, bf16* wide, bf16* forward, bf16* backward) {
    lora_extend(columns, in, each, r, groups, offsets, factors, B, wide);
    pack_weight(out, columns, in, wide, forward, backward);
}
#else
static void lora_refresh(i64, i64, i64, i64, i64, i64, const i64*, const float*, const bf16*, bf16*, bf16*, bf16*) {}
static void lora_down_tiles(i64, i64, i64, i64, const bf16*, i64, const bf16*, const int8_t*, const int8_t*, float,
                            bf16*, i64, i64) {}
static void lora_up_gradient(i64, i64, i64, i64, const i64*, const float*, const bf16*, i64, const bf16*, i64, bf16*) {}
static void lora_backward_tiles(i64, i64, i64, i64, const bf16*, i64, const bf16*, const int8_t*, const int8_t*, float,
                                const bf16*, bf16*, i64, bf16*) {}
#endif
