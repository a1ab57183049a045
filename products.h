// Matrix products in bf16 with sums in float, on the processor's tile registers (AMX: 16 x 32 by 32 x 16 in one
// instruction) or else on vectors (AVX512-BF16: 16 sums of two products each). For the shapes of a small encoder
// (hundreds of rows, 384 to 1536 columns) the library's take longer: it packs the weights at every call, compiles code
// for every shape, and cannot be recorded (tape.py).
//
// A tile of the right operand holds 32 x 16 numbers as 16 rows of 16 pairs; a pair is two neighbours along the inner
// dimension. `Packed` matrices [k, n] are such tiles, those of 16 columns one after the other down the inner dimension.
// The order of the sums depends on the shapes alone, not on the number of threads.

#pragma once

#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__linux__)
#define TILES
#include <new>
#include <sys/mman.h>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

static const i64 ROWS = 16, DEEP = 32, TILE = ROWS * DEEP;
typedef int32_t pair __attribute__((may_alias, aligned(2)));  // two neighbours

// Memory for tiles. Much of it comes on large pages, where the system has them: small ones lie where they happen to, and
// then compete for the same places of a cache (up to a quarter of the time of `gradient`, in one process of two).
class Tiles {
  public:
    explicit Tiles(i64 count = 0) { reserve(count); }
    ~Tiles() { std::free(space); }
    Tiles(const Tiles&) = delete;
    void reserve(i64 count) {
        if (count <= room) return;
        const i64 bytes = TILE * sizeof(bf16), large = 2 << 20, unit = count * bytes < large / 2 ? 64 : large;
        const i64 size = (count * bytes + unit - 1) / unit * unit;
        std::free(space);
        space = (bf16*)std::aligned_alloc(unit, size);
        if (!space) throw std::bad_alloc();
        if (unit == large) madvise(space, size, MADV_HUGEPAGE);
        room = size / bytes;
    }
    bf16* at(i64 tile) { return space + tile * TILE; }

  private:
    bf16* space = nullptr;
    i64 room = 0;
};

// What follows depends on the registers: `tiles_allowed`, `shape_tiles` before products and `release_tiles` behind them,
// `block`: out [32, 32] = a [rows, k] b, where b are two neighbouring columns of tiles and the rows of a are lda apart,
// or, PACKED, tiles of 16 (tiles are filled up with zeros where k is no multiple of 32); `ahead`: what the next block
// reads as b, unless null, if it is to be fetched meanwhile; and `skinny`: out [16, 16] = a b, both as tiles down the
// inner dimension.
#ifdef __AMX_BF16__
// Linux gives a process the registers when asked.
static bool tiles_allowed() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
    return allowed;
}

// gcc 12 does not know what the instructions for tiles read: to stand between writing that and using it.
static inline void compiler_barrier() { asm volatile("" ::: "memory"); }

// Registers 0 to 3 hold the result, 2 x 2 tiles, of which the upper ones have `top` rows and the lower ones `bottom`;
// 4 and 5 the left operand, 6 and 7 the right one.
static void shape_tiles(i64 top, i64 bottom) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {};
    } shape;
    for (int i : {0, 1, 4}) shape.rows[i] = uint8_t(top);
    for (int i : {2, 3, 5}) shape.rows[i] = uint8_t(bottom);
    shape.rows[6] = shape.rows[7] = ROWS;
    compiler_barrier();
    _tile_loadconfig(&shape);
}

template <bool PACKED, bool BOTTOM>
static inline void tile_block(i64 k, const bf16* a, i64 lda, const bf16* b, float* out) {
    const i64 deep = (k + DEEP - 1) / DEEP;
    const bf16 *low = a + (PACKED ? deep * TILE : ROWS * lda), *right = b + deep * TILE;
    const i64 stride = PACKED ? 64 : 2 * lda, next = PACKED ? TILE : DEEP;
    compiler_barrier();
    _tile_zero(0);
    _tile_zero(1);
    if (BOTTOM) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (i64 p = 0; p < deep; p++) {
        _tile_loadd(4, a + p * next, stride);
        _tile_loadd(6, b + p * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + p * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (BOTTOM) {
            _tile_loadd(5, low + p * next, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, 128);
    _tile_stored(1, out + ROWS, 128);
    if (BOTTOM) {
        _tile_stored(2, out + 32 * ROWS, 128);
        _tile_stored(3, out + 33 * ROWS, 128);
    }
}

template <bool PACKED>
static inline void block(i64 rows, i64 k, const bf16* a, i64 lda, const bf16* b, float* out, const bf16* = nullptr) {
    rows > ROWS ? tile_block<PACKED, true>(k, a, lda, b, out) : tile_block<PACKED, false>(k, a, lda, b, out);
}

// out [16, 16] = a b, both as tiles down the inner dimension.
static inline void skinny(i64 deep, const bf16* a, const bf16* b, float* out) {
    compiler_barrier();
    _tile_zero(0);
    for (i64 p = 0; p < deep; p++) {
        _tile_loadd(4, a + p * TILE, 64);
        _tile_loadd(6, b + p * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, out, 64);
}
static inline void release_tiles() { _tile_release(); }
#else
static bool tiles_allowed() { return true; }
static inline void shape_tiles(i64, i64) {}
static inline void release_tiles() {}

// out [R, 16 C] = a [R, k] b: rows of a ld apart, their next 32 numbers `next` further on; columns of tiles of b `column`
// apart.
// Not inlined: one copy of each serves every product. 256 numbers a step from `ahead` on are fetched, unless it is null.
template <int R, int C>
[[gnu::noinline]] static void dots(i64 k, const bf16* a, i64 ld, i64 next, const bf16* b, i64 column, float* out,
                                    const bf16* ahead = nullptr) {
    __m512 sums[R][C] = {};
    auto add = [&](i64 i) {
        if (ahead && i % 2 == 0) __builtin_prefetch(ahead, 0, 2), ahead += DEEP;
        __m512bh right[C];
        for (int c = 0; c < C; c++) right[c] = (__m512bh)_mm512_load_si512(b + c * column + i * DEEP);
        for (int r = 0; r < R; r++) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(*(const pair*)(a + r * ld + 2 * i));
            for (int c = 0; c < C; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], right[c], left);
        }
    };
    i64 p = 0;
    for (; p + DEEP <= k; p += DEEP, a += next, b += TILE)
#pragma GCC unroll 4
        for (i64 i = 0; i < ROWS; i++) add(i);
    for (i64 i = 0; p + 2 * i < k; i++) add(i);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) _mm512_store_ps(out + (r * C + c) * ROWS, sums[r][c]);
}

template <bool PACKED>
static inline void block(i64 rows, i64 k, const bf16* a, i64 lda, const bf16* b, float* out,
                         const bf16* ahead = nullptr) {
    const i64 ld = PACKED ? DEEP : lda, next = PACKED ? TILE : DEEP, column = (k + DEEP - 1) / DEEP * TILE;
    for (i64 half = 0; half < rows; half += ROWS, a += PACKED ? column : ROWS * lda) {
        i64 i = 0, count = std::min(ROWS, rows - half);
        auto some = [&]<int R>() {
            for (; i + R <= count; i += R) {
                dots<R, 2>(k, a + i * ld, ld, next, b, column, out + (half + i) * 32, ahead);
                if (ahead) ahead += k * R;
            }
        };
        some.template operator()<8>(), some.template operator()<4>();
        some.template operator()<2>(), some.template operator()<1>();
    }
}

static inline void skinny(i64 deep, const bf16* a, const bf16* b, float* out) {
    dots<ROWS, 1>(deep * DEEP, a, DEEP, TILE, b, 0, out);
}
#endif

// Asks for the lines of 32 x 32 results while they are computed: most of them are not in the cache.
static inline void prefetch_rows(i64 rows, const bf16* to, i64 ld) {
    for (i64 r = 0; r < rows; r++) __builtin_prefetch(to + r * ld, 1, 3);
}

static inline __m512 widen(__m256i x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

static inline void store_row(const float* from, bf16* to) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(from + ROWS), _mm512_load_ps(from)));
}

// The rows [first, last) and columns of one thread's part of an [m, n] result. Rows are dealt as the kernels before and
// after deal them, so that a core finds in its own cache what it wrote, and columns where there are too few rows.
struct Part {
    i64 first, last, left, right;

    Part(i64 m, i64 n) {
        const i64 threads = omp_get_num_threads(), me = omp_get_thread_num();
        const i64 across = std::clamp<i64>(m / 64, 1, threads), down = threads / across;
        auto cut = [](i64 size, i64 unit, i64 part, i64 parts) {
            return part >= parts ? size : (size * part / parts + unit / 2) / unit * unit;
        };
        first = cut(m, ROWS, me / down, across), last = cut(m, ROWS, me / down + 1, across);
        left = cut(n, 32, me % down, down), right = cut(n, 32, me % down + 1, down);
    }
};

// c [m, n] = a [m, k] b; a and c have rows lda and ldc apart, b is packed. n and k: multiples of 32.
// In its first pass over b a thread fetches the columns it needs next: 1386 to 1293 us for 432 x 1536 x 384, cold.
static void multiply(i64 m, i64 n, i64 k, const bf16* a, i64 lda, const bf16* b, bf16* c, i64 ldc) {
#pragma omp parallel
    {
        alignas(64) float out[32 * 32];
        const Part part(m, n);
        for (i64 i = part.first; i < part.last; i += 32) {
            const i64 rows = std::min<i64>(32, part.last - i), bottom = rows - ROWS;
            shape_tiles(std::min(rows, ROWS), bottom > 0 ? bottom : ROWS);
            for (i64 column = part.left; column < part.right; column += 32) {
                prefetch_rows(rows, c + i * ldc + column, ldc);
                const bool fetch = i == part.first && column + 32 < part.right;
                block<false>(rows, k, a + i * lda, lda, b + column * k, out, fetch ? b + (column + 32) * k : nullptr);
                for (i64 r = 0; r < rows; r++) store_row(out + 32 * r, c + (i + r) * ldc + column);
            }
        }
        release_tiles();
    }
}

// AWAY: past the caches, for what is read much later.
template <bool AWAY>
static inline void put(bf16* to, __m512i x) {
    AWAY ? _mm512_stream_si512((__m512i*)to, x) : _mm512_store_si512(to, x);
}

// from [32, 32], rows ld apart, of which `rows` are there and zeros follow -> two neighbouring tiles.
template <bool AWAY = false>
static inline void pack_tiles(const bf16* from, i64 ld, i64 rows, bf16* left, bf16* right) {
    alignas(64) static const struct Orders {
        uint16_t low[32], high[32];
        Orders() {
            for (int i = 0; i < 16; i++)
                low[2 * i] = i, low[2 * i + 1] = 32 + i, high[2 * i] = 16 + i, high[2 * i + 1] = 48 + i;
        }
    } orders;
    const __m512i low = _mm512_load_si512(orders.low), high = _mm512_load_si512(orders.high);
    for (i64 p = 0; p < ROWS; p++) {
        __m512i even = _mm512_setzero_si512(), odd = even;
        if (2 * p < rows) even = _mm512_loadu_si512(from + 2 * p * ld);
        if (2 * p + 1 < rows) odd = _mm512_loadu_si512(from + (2 * p + 1) * ld);
        put<AWAY>(left + p * DEEP, _mm512_permutex2var_epi16(even, low, odd));
        put<AWAY>(right + p * DEEP, _mm512_permutex2var_epi16(even, high, odd));
    }
}

// 16 x 16 pairs, rows ld numbers apart, transposed: rows of a left operand become a tile of a right one, or back.
template <bool AWAY = false>
static inline void turn_tile(const bf16* from, i64 ld, bf16* to) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * ld);
    turn(r);
    for (int i = 0; i < 16; i++) put<AWAY>(to + i * DEEP, r[i]);
}

// Columns from `first` on of 32 rows of a weight w [out, in], those from row `o` on, packed as the right operand of
// x w^T, `forward`, and of dy w, `backward`. All are multiples of 32.
static inline void pack_rows(i64 o, i64 out, i64 in, i64 first, const bf16* rows, bf16* forward, bf16* backward) {
    for (i64 i = first; i < in; i += 32) {
        for (i64 half = 0; half < 2; half++)
            turn_tile<true>(rows + half * ROWS * in + i, in, forward + (o + half * ROWS) * in + i * ROWS);
        bf16* to = backward + i * out + o * ROWS;
        pack_tiles<true>(rows + i, in, 32, to, to + ROWS * out);
    }
    _mm_sfence();
}
static void pack_weight(i64 out, i64 in, i64 first, const bf16* w, bf16* forward, bf16* backward) {
#pragma omp parallel for schedule(static)
    for (i64 o = 0; o < out; o += 32) pack_rows(o, out, in, first, w + o * in, forward, backward);
}

// dw [out, in] = dy^T x; dy [n, out] and x [n, in] have rows ldy and ldx apart. out and in: multiples of 32.
// Each thread packs its part of the wider operand for itself, and its share of the other one for all. Leaves the sum of
// the squares, before they are rounded: for the norm of the whole gradient, which would read all of it again.
static void gradient(i64 n, i64 out, i64 in, const bf16* dy, i64 ldy, const bf16* x, i64 ldx, bf16* dw,
                     double* square_sum) {
    const i64 deep = (n + DEEP - 1) / DEEP * DEEP;
    const bool tall = out >= in;
    static thread_local Tiles space;  // kept: the pages of fresh memory would be made anew at every call
    space.reserve(deep * (out + in) / TILE);
    bf16 *left = space.at(0), *right = left + deep * out;
    auto pack_left = [=](i64 i, i64 column) {  // 32 columns of 32 rows of dy, as 32 rows of the left operand
        alignas(64) bf16 tiles[2 * TILE];
        bf16* to = left + column * deep + i * ROWS;
        pack_tiles(dy + i * ldy + column, ldy, std::min(DEEP, n - i), tiles, tiles + TILE);
        turn_tile(tiles, DEEP, to), turn_tile(tiles + TILE, DEEP, to + deep * ROWS);
    };
    auto pack_right = [=](i64 i, i64 column) {
        bf16* to = right + column * deep + i * ROWS;
        pack_tiles(x + i * ldx + column, ldx, std::min(DEEP, n - i), to, to + deep * ROWS);
    };
    std::vector<float> squares(out / 32 * (in / 32));
#pragma omp parallel
    {
        alignas(64) float sums[32 * 32];
        shape_tiles(ROWS, ROWS);
#pragma omp for schedule(static)
        for (i64 i = 0; i < n; i += DEEP)  // row after row, as they lie
            for (i64 column = 0; column < (tall ? in : out); column += 32)
                tall ? pack_right(i, column) : pack_left(i, column);
        const i64 threads = omp_get_num_threads(), me = omp_get_thread_num(), strips = (tall ? out : in) / 32;
        const i64 first = strips * me / threads * 32, last = strips * (me + 1) / threads * 32;
        for (i64 i = 0; i < n; i += DEEP)
            for (i64 column = first; column < last; column += 32) tall ? pack_left(i, column) : pack_right(i, column);
        for (i64 row = tall ? first : 0; row < (tall ? last : out); row += 32)
            for (i64 column = tall ? 0 : first; column < (tall ? in : last); column += 32) {
                prefetch_rows(32, dw + row * in + column, in);
                block<true>(32, n, left + row * deep, 0, right + column * deep, sums);
                for (i64 r = 0; r < 32; r++) store_row(sums + 32 * r, dw + (row + r) * in + column);
                float square = 0;
#pragma omp simd reduction(+ : square)
                for (i64 i = 0; i < 32 * 32; i++) square += sums[i] * sums[i];
                squares[row / 32 * (in / 32) + column / 32] = square;
            }
        release_tiles();
    }
    if (square_sum) *square_sum = std::accumulate(squares.begin(), squares.end(), 0.0);
}
#else
static bool tiles_allowed() { return false; }
static void pack_rows(i64, i64, i64, i64, const bf16*, bf16*, bf16*) {}
static void multiply(i64, i64, i64, const bf16*, i64, const bf16*, bf16*, i64) {}
static void pack_weight(i64, i64, i64, const bf16*, bf16*, bf16*) {}
static void gradient(i64, i64, i64, const bf16*, i64, const bf16*, i64, bf16*, double*) {}
#endif
