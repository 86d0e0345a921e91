// Packed weights to float32, and their products with many rows; packed.py calls these.

#include "blocks.h"

#include <utility>

#include <omp.h>

namespace {

template <class F>
void dequantize(const Matrix &w, float *y) {
#pragma omp parallel for schedule(static) if (w.rows * w.columns > 8192)
    for (int64_t n = 0; n < w.rows; n++)
        for (int64_t c = 0; c < w.columns / CHUNK; c++) {
            vec parts[PARTS];
            F::unpack(w.data + n * w.row_bytes, c, parts);
            for (int p = 0; p < PARTS; p++) store(y + n * w.columns + c * CHUNK + p * LANES, parts[p]);
        }
}

// Products -------------------------------------------------------------------------------------------------------------
//
//     y[b][n] = sum over k of w[n][k] x[b][k]
//
// A thread dequantises the weights of some outputs, DEPTH columns at a time, into panels [columns][WIDE outputs], which
// stay in its cache, and multiplies each with all rows of x. Sums are added up in the order of the columns, so a row's
// results depend neither on the other rows nor on the number of threads.

constexpr int WIDE = 2 * LANES, PANELS = 64 / WIDE, DEPTH = 768;
#ifdef __AVX512F__
constexpr int MOST_ROWS = 12;  // 2 x 12 vectors of sums stay in 32 registers
#else
constexpr int MOST_ROWS = 6;
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

// The weights of outputs n to n + WIDE, from column k on: [depth padded to chunks][WIDE]; 0 beyond the last output.
template <class F>
void fill_panel(const Matrix &w, int64_t n, int64_t k, int64_t depth, float *panel) {
    for (int64_t c = k / CHUNK; c < (k + padded(depth)) / CHUNK; c++)
        for (int half = 0; half < 2; half++) {
            vec parts[LANES][PARTS] = {};
            for (int i = 0; i < LANES; i++) {
                const int64_t row = n + half * LANES + i;
                if (row >= w.rows) break;
                if ((c + 1) * CHUNK <= w.columns)
                    F::unpack(w.data + row * w.row_bytes, c, parts[i]);
                else
                    unpack_end<F>(w.data + row * w.row_bytes, w.columns, c, parts[i]);
            }
            for (int p = 0; p < PARTS; p++) {
                vec block[LANES];
                for (int i = 0; i < LANES; i++) block[i] = parts[i][p];
                transpose(block);
                float *to = panel + (c * CHUNK - k + p * LANES) * WIDE + half * LANES;
                for (int i = 0; i < LANES; i++) store(to + i * WIDE, block[i]);
            }
        }
}

// y[b] += a panel times x[b] for B rows; `first`: y is not read.
template <int B>
void tile(const float *panel, int64_t depth, const float *x, int64_t columns, float *y, int64_t outputs, bool first) {
    vec sums[B][2];
    for (int b = 0; b < B; b++)
        for (int half = 0; half < 2; half++)
            sums[b][half] = first ? vec{} : load<vec>(y + b * outputs + half * LANES);
    for (int64_t k = 0; k < depth; k++) {
        const vec low = load<vec>(panel + k * WIDE), high = load<vec>(panel + k * WIDE + LANES);
        for (int b = 0; b < B; b++) {
            const vec v = all(x[b * columns + k]);
            sums[b][0] = multiply_add(v, low, sums[b][0]);
            sums[b][1] = multiply_add(v, high, sums[b][1]);
        }
    }
    for (int b = 0; b < B; b++)
        for (int half = 0; half < 2; half++) store(y + b * outputs + half * LANES, sums[b][half]);
}

template <int B = MOST_ROWS>
void tiles(const float *panel, int64_t depth, const float *x, int64_t columns, float *y, int64_t outputs, bool first,
           int64_t rows) {
    if (rows == B) return tile<B>(panel, depth, x, columns, y, outputs, first);
    if constexpr (B > 1) tiles<B - 1>(panel, depth, x, columns, y, outputs, first, rows);
}

template <class F>
void product(const Matrix &w, const float *x, int64_t rows, float *y) {
    alignas(64) float panels[PANELS * WIDE * DEPTH], edge[MOST_ROWS * WIDE];
    const int64_t count = (w.rows + WIDE - 1) / WIDE, thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t end = count * (thread + 1) / threads;
    for (int64_t from = count * thread / threads; from < end; from += PANELS) {
        const int64_t to = std::min<int64_t>(from + PANELS, end);
        for (int64_t k = 0; k < w.columns; k += DEPTH) {
            const int64_t depth = std::min<int64_t>(DEPTH, w.columns - k);
            for (int64_t i = from; i < to; i++) fill_panel<F>(w, i * WIDE, k, depth, panels + (i - from) * WIDE * DEPTH);
            for (int64_t b = 0; b < rows; b += MOST_ROWS)
                for (int64_t i = from; i < to; i++) {
                    const int64_t most = std::min<int64_t>(MOST_ROWS, rows - b), left = w.rows - i * WIDE;
                    const float *panel = panels + (i - from) * WIDE * DEPTH, *at = x + b * w.columns + k;
                    float *out = y + b * w.rows + i * WIDE;
                    if (left >= WIDE) {
                        tiles(panel, depth, at, w.columns, out, w.rows, k == 0, most);
                        continue;
                    }
                    for (int64_t r = 0; k && r < most; r++) std::copy_n(out + r * w.rows, left, edge + r * WIDE);
                    tiles(panel, depth, at, w.columns, edge, WIDE, k == 0, most);
                    for (int64_t r = 0; r < most; r++) std::copy_n(edge + r * WIDE, left, out + r * w.rows);
                }
        }
    }
}

}  // namespace

extern "C" {

// y [rows, columns]; whole chunks.
void packed_dequantize(const Matrix *w, float *y) {
    with_format(w->format, [&](auto format) { dequantize<decltype(format)>(*w, y); });
}

// y [B, rows] = x [B, columns] w^T.
void packed_product(const Matrix *w, const float *x, int64_t rows, float *y) {
#pragma omp parallel if (rows * w->rows * w->columns > 1 << 18)
    with_format(w->format, [&](auto format) { product<decltype(format)>(*w, x, rows, y); });
}

}  // extern "C"
