// Packed weights to float32, and their products with many rows; packed.py calls these.

#include "panels.h"

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

}  // namespace

extern "C" {

// y [rows, columns]; whole chunks.
void packed_dequantize(const Matrix *w, float *y) {
    with_format(w->format, [&](auto format) { dequantize<decltype(format)>(*w, y); });
}

// y [B, rows] = x [B, columns] w^T.
void packed_product(const Matrix *w, const float *x, int64_t rows, float *y) {
#pragma omp parallel if (rows * w->rows * w->columns > 1 << 18)
    {
        const Rows from = {const_cast<float *>(x), rows, w->columns}, to = {y, rows, w->rows};
        with_format(w->format, [&](auto format) { panel_product<decltype(format)>(*w, share(w->rows, WIDE), from, to); });
    }
}

}  // extern "C"
