// Products of packed weights with many rows: what packed.cpp and decode_kernels.cpp share.
//
//     y[b][n] = sum over k of w[n][k] x[b][k]
//
// A thread dequantises the weights of some outputs, DEPTH columns at a time, into panels [columns][WIDE outputs], which
// stay in its cache, and multiplies each with all rows of x. Sums are added up in the order of the columns, so a row's
// results depend neither on the other rows nor on the number of threads.

#pragma once

#include "blocks.h"

#include <utility>

#include <omp.h>

namespace {

struct Span {
    int64_t begin, end;
};

// This thread's part of n, in whole groups.
inline Span share(int64_t n, int64_t group) {
    int64_t groups = (n + group - 1) / group, t = omp_get_thread_num(), threads = omp_get_num_threads();
    return {std::min(n, groups * t / threads * group), std::min(n, groups * (t + 1) / threads * group)};
}

struct Rows {  // B vectors, one after another
    float *data;
    int64_t count, stride;
    float *operator[](int64_t b) const { return data + b * stride; }
};

constexpr int WIDE = 2 * LANES, PANELS = 64 / WIDE, DEPTH = 768;
#ifdef __AVX512F__
constexpr int TALL = 12;  // 2 x 12 vectors of sums stay in 32 registers
#else
constexpr int TALL = 6;
#endif

// Transposes LANES vectors, by exchanging blocks of H lanes.
template <int H, int... L>
inline void exchange(vec &a, vec &b, std::integer_sequence<int, L...>) {
    const vec low = __builtin_shufflevector(a, b, (L & H ? LANES + L - H : L)...);
    b = __builtin_shufflevector(a, b, (L & H ? LANES + L : L + H)...);
    a = low;
}
template <int H = LANES / 2>
inline void transpose(vec *rows) {
    for (int i = 0; i < LANES; i++)
        if (!(i & H)) exchange<H>(rows[i], rows[i + H], std::make_integer_sequence<int, LANES>());
    if constexpr (H > 1) transpose<H / 2>(rows);
}

// 16 bytes that LANES rows have at the same place: q[j] is the j-th four bytes of each.
inline void quarters(const uint8_t *from, int64_t row_bytes, ints *q) {
    vec parts[4];
    for (int i = 0; i < 4; i++) {  // rows i, i + 4, ...
        auto row = [&](int n) { return load<four>(from + (i + 4 * n) * row_bytes); };
#if defined(__AVX512F__)
        __m512 rows = _mm512_insertf32x4(_mm512_castps128_ps512((__m128)row(0)), (__m128)row(1), 1);
        rows = _mm512_insertf32x4(_mm512_insertf32x4(rows, (__m128)row(2), 2), (__m128)row(3), 3);
        parts[i] = (vec)rows;
#else
        const four rows[2] = {row(0), row(1)};
        parts[i] = load<vec>(rows);
#endif
    }
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    exchange<2>(parts[0], parts[2], lanes), exchange<2>(parts[1], parts[3], lanes);
    exchange<1>(parts[0], parts[1], lanes), exchange<1>(parts[2], parts[3], lanes);
    for (int j = 0; j < 4; j++) q[j] = (ints)parts[j];
}

// CHUNK columns of LANES rows, from chunk c on, each in to[column * WIDE]: what F::unpack gives, transposed. For common
// formats the bytes are transposed before they are unpacked.
template <class F>
inline void fill_chunk(F, const uint8_t *rows, int64_t row_bytes, int64_t c, float *to) {
    vec parts[LANES][PARTS];
    for (int i = 0; i < LANES; i++) F::unpack(rows + i * row_bytes, c, parts[i]);
    for (int p = 0; p < PARTS; p++) {
        vec block[LANES];
        for (int i = 0; i < LANES; i++) block[i] = parts[i][p];
        transpose(block);
        for (int i = 0; i < LANES; i++) store(to + (p * LANES + i) * WIDE, block[i]);
    }
}

inline void fill_chunk(F32, const uint8_t *rows, int64_t row_bytes, int64_t c, float *to) {
    for (int i = 0; i < CHUNK; i += 4) {
        ints q[4];
        quarters(rows + (c * CHUNK + i) * 4, row_bytes, q);
        for (int j = 0; j < 4; j++) store(to + (i + j) * WIDE, (vec)q[j]);
    }
}

inline void fill_chunk(BF16, const uint8_t *rows, int64_t row_bytes, int64_t c, float *to) {
    for (int i = 0; i < CHUNK; i += 8) {
        ints q[4];
        quarters(rows + (c * CHUNK + i) * 2, row_bytes, q);
        for (int j = 0; j < 4; j++) {
            store(to + (i + 2 * j) * WIDE, (vec)(q[j] << 16));
            store(to + (i + 2 * j + 1) * WIDE, (vec)(q[j] & ~0xffff));
        }
    }
}

inline void fill_chunk(Q8_0, const uint8_t *rows, int64_t row_bytes, int64_t c, float *to) {
    const uint8_t *block = rows + c * Q8_0::BLOCK;
    vec d;
    for (int i = 0; i < LANES; i++) d[i] = half(block + i * row_bytes);
    for (int i = 0; i < CHUNK; i += 16) {
        ints q[4];
        quarters(block + 2 + i, row_bytes, q);
        for (int k = 0; k < 16; k++) store(to + (i + k) * WIDE, real(q[k / 4] << (24 - k % 4 * 8) >> 24) * d);
    }
}

template <bool FIVE, bool MINIMUM>
inline void fill_chunk(Q45<FIVE, MINIMUM>, const uint8_t *rows, int64_t row_bytes, int64_t c, float *to) {
    constexpr int BLOCK = Q45<FIVE, MINIMUM>::BLOCK;
    const uint8_t *block = rows + c * BLOCK;
    float d[LANES], least[LANES];
    ints q[4], fifth = {};
    for (int i = 0; i < LANES; i++) {
        const four scales = halves(block + i * row_bytes);
        d[i] = scales[0], least[i] = scales[1];
        if (FIVE) fifth[i] = load<int32_t>(block + i * row_bytes + BLOCK - 20);
    }
    quarters(block + BLOCK - 16, row_bytes, q);
    for (int k = 0; k < CHUNK; k++) {
        ints v = (q[k % 16 / 4] >> (k % 4 * 8 + k / 16 * 4)) & 15;
        if (FIVE) v |= ((fifth >> k) & 1) << 4;
        const vec w = MINIMUM ? real(v) * load<vec>(d) + load<vec>(least) : real(v - (FIVE ? 16 : 8)) * load<vec>(d);
        store(to + k * WIDE, w);
    }
}

// The weights of outputs n to n + WIDE, from column k on: [depth padded to chunks][WIDE]; 0 beyond the last output.
template <class F>
void fill_panel(const Matrix &w, int64_t n, int64_t k, int64_t depth, float *panel) {
    for (int half = 0; half < 2; half++) {
        const int64_t row = n + half * LANES, whole = w.columns / CHUNK;
        for (int64_t c = k / CHUNK; c < (k + padded(depth)) / CHUNK; c++) {
            const uint8_t *rows = w.data + row * w.row_bytes;
            float *to = panel + (c * CHUNK - k) * WIDE + half * LANES;
            if (row + LANES <= w.rows && c < whole) {
                fill_chunk(F(), rows, w.row_bytes, c, to);
                continue;
            }
            for (int i = 0; i < LANES; i++) {
                vec parts[PARTS] = {};
                if (row + i < w.rows)
                    c < whole ? F::unpack(rows + i * w.row_bytes, c, parts)
                              : unpack_end<F>(rows + i * w.row_bytes, w.columns, c, parts);
                for (int l = 0; l < CHUNK; l++) to[l * WIDE + i] = parts[l / LANES][l % LANES];
            }
        }
    }
}

// y[b] += a panel times x[b] for B rows; `first`: y is not read.
template <int B>
void panel_tile(const float *panel, int64_t depth, const float *x, int64_t x_stride, float *y, int64_t y_stride, bool first) {
    vec sums[B][2];
    for (int b = 0; b < B; b++)
        for (int half = 0; half < 2; half++)
            sums[b][half] = first ? vec{} : load<vec>(y + b * y_stride + half * LANES);
    for (int64_t k = 0; k < depth; k++) {
        const vec low = load<vec>(panel + k * WIDE), high = load<vec>(panel + k * WIDE + LANES);
        for (int b = 0; b < B; b++) {
            const vec v = all(x[b * x_stride + k]);
            sums[b][0] = multiply_add(v, low, sums[b][0]);
            sums[b][1] = multiply_add(v, high, sums[b][1]);
        }
    }
    for (int b = 0; b < B; b++)
        for (int half = 0; half < 2; half++) store(y + b * y_stride + half * LANES, sums[b][half]);
}

template <int B = TALL>
void panel_tiles(const float *panel, int64_t depth, const float *x, int64_t x_stride, float *y, int64_t y_stride, bool first,
           int64_t rows) {
    if (rows == B) return panel_tile<B>(panel, depth, x, x_stride, y, y_stride, first);
    if constexpr (B > 1) panel_tiles<B - 1>(panel, depth, x, x_stride, y, y_stride, first, rows);
}

// y = w x for some rows of w.
template <class F>
void panel_product(const Matrix &w, Span rows, const Rows &x, const Rows &y) {
    alignas(64) float panels[PANELS * WIDE * DEPTH], edge[TALL * WIDE];
    const int64_t tiles = (x.count + TALL - 1) / TALL, tall = tiles ? (x.count + tiles - 1) / tiles : 1;
    for (int64_t from = rows.begin; from < rows.end; from += PANELS * WIDE) {
        const int64_t to = std::min<int64_t>(from + PANELS * WIDE, rows.end);
        for (int64_t k = 0; k < w.columns; k += DEPTH) {
            const int64_t depth = std::min<int64_t>(DEPTH, w.columns - k);
            for (int64_t n = from; n < to; n += WIDE) fill_panel<F>(w, n, k, depth, panels + (n - from) * DEPTH);
            for (int64_t b = 0; b < x.count; b += tall)
                for (int64_t n = from; n < to; n += WIDE) {
                    const int64_t most = std::min(tall, x.count - b), left = to - n;
                    const float *panel = panels + (n - from) * DEPTH;
                    float *out = y[b] + n;
                    if (left >= WIDE) {
                        panel_tiles(panel, depth, x[b] + k, x.stride, out, y.stride, k == 0, most);
                        continue;
                    }
                    for (int64_t r = 0; k && r < most; r++) std::copy_n(out + r * y.stride, left, edge + r * WIDE);
                    panel_tiles(panel, depth, x[b] + k, x.stride, edge, WIDE, k == 0, most);
                    for (int64_t r = 0; r < most; r++) std::copy_n(edge + r * WIDE, left, out + r * y.stride);
                }
        }
    }
}

}  // namespace
