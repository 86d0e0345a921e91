// The steps between a training step's matrix products, each in one pass over memory; fused_ops.py compiles and calls them.
//
// The formulas are those of fused_ops.py, where their letters are explained. Rows and elements are shared out among
// the threads without any sum across them, so the results do not depend on how many threads there are.
// Arithmetic is float for float and bfloat16, double for double.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "exponential.h"

namespace {

enum class bf16 : uint16_t {};  // its bits; a struct would keep the compiler from using vectors

inline float wide(float x) { return x; }
inline double wide(double x) { return x; }
inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline void put(float &to, float x) { to = x; }
inline void put(double &to, double x) { to = x; }
// Rounds to nearest, ties to even. NaN stays NaN: one that comes of bfloat16 inputs has no bit among the lower sixteen.
inline void put(bf16 &to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to = bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

const int64_t ALONE = 8192;  // elements that are not worth a second thread

template <class T, class W>
void norm(const T *__restrict x, const T *__restrict w, int64_t rows, int64_t d, double eps, T *__restrict y,
          W *__restrict s) {
#pragma omp parallel for schedule(static) if (rows * d > ALONE)
    for (int64_t r = 0; r < rows; r++) {
        const T *a = x + r * d;
        T *b = y + r * d;
        W sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++) sum += wide(a[i]) * wide(a[i]);
        W scale = 1 / std::sqrt(sum / W(d) + W(eps));
        s[r] = scale;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) put(b[i], wide(a[i]) * scale * wide(w[i]));
    }
}

template <class T, class W>
void norm_back(const T *__restrict g, const T *__restrict x, const T *__restrict w, const W *__restrict s, int64_t rows,
               int64_t d, T *__restrict dx) {
#pragma omp parallel for schedule(static) if (rows * d > ALONE)
    for (int64_t r = 0; r < rows; r++) {
        const T *a = x + r * d, *b = g + r * d;
        T *c = dx + r * d;
        W scale = s[r], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < d; i++) dot += wide(a[i]) * wide(b[i]) * wide(w[i]);
        W share = dot * scale * scale / W(d);
#pragma omp simd
        for (int64_t i = 0; i < d; i++) put(c[i], scale * (wide(b[i]) * wide(w[i]) - wide(a[i]) * share));
    }
}

template <class T, class W>
void gated_back(const T *__restrict dy, const T *__restrict g, const T *__restrict u, int64_t n, T *__restrict dg,
                T *__restrict du) {
#pragma omp parallel for simd schedule(static) if (n > ALONE)
    for (int64_t i = 0; i < n; i++) {
        W a = wide(g[i]), y = wide(dy[i]), s = 1 / (1 + exponential(-a));
        put(du[i], y * s * a);
        put(dg[i], y * wide(u[i]) * s * (1 + a * (1 - s)));
    }
}

// x [rows, heads, 2 half]; cosines and sines [places, half], row r at place r modulo places; sign -1 turns back.
template <class T, class W>
void rotate(const T *__restrict x, const T *__restrict cosines, const T *__restrict sines, int64_t rows, int64_t heads,
            int64_t half, int64_t places, double sign, T *__restrict y) {
    W turn = W(sign);
#pragma omp parallel for schedule(static) if (rows * heads * half > ALONE)
    for (int64_t r = 0; r < rows; r++) {
        const T *c = cosines + r % places * half, *s = sines + r % places * half;
        for (int64_t h = 0; h < heads; h++) {
            const T *a = x + (r * heads + h) * 2 * half;
            T *b = y + (r * heads + h) * 2 * half;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                W one = wide(a[i]), two = wide(a[half + i]), cosine = wide(c[i]), sine = turn * wide(s[i]);
                put(b[i], one * cosine - two * sine);
                put(b[half + i], two * cosine + one * sine);
            }
        }
    }
}

// x where gradients.Mask keeps it, else 0: each 64 bits of the mixed counter decide over four elements.
template <class T, class W>
void masked(const T *__restrict x, int64_t seed, int64_t below, int64_t n, T *__restrict y) {
    const int64_t piece = 512;  // elements at a time
    const int16_t least = int16_t(below);
#pragma omp parallel for schedule(static) if (n > ALONE)
    for (int64_t start = 0; start < n; start += piece) {
        int64_t draws[piece / 4];
        int16_t lanes[piece];
#pragma omp simd
        for (int64_t j = 0; j < piece / 4; j++) {
            uint64_t z = uint64_t(seed) + uint64_t(start / 4 + j + 1) * 0x9e3779b97f4a7c15u;
            z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
            z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
            draws[j] = int64_t(z ^ (z >> 31));
        }
        std::memcpy(lanes, draws, sizeof lanes);
        const int64_t end = n - start < piece ? n - start : piece;
        const T none = T(0);
#pragma omp simd
        for (int64_t i = 0; i < end; i++) y[start + i] = lanes[i] >= least ? x[start + i] : none;
    }
}

}  // namespace

#define FOR(T, W, NAME)                                                                                              \
    extern "C" {                                                                                                     \
    void norm_##NAME(const T *x, const T *w, int64_t rows, int64_t d, double eps, T *y, W *s) {                      \
        norm<T, W>(x, w, rows, d, eps, y, s);                                                                        \
    }                                                                                                                \
    void norm_back_##NAME(const T *g, const T *x, const T *w, const W *s, int64_t rows, int64_t d, T *dx) {          \
        norm_back<T, W>(g, x, w, s, rows, d, dx);                                                                    \
    }                                                                                                                \
    void gated_back_##NAME(const T *dy, const T *g, const T *u, int64_t n, T *dg, T *du) {                           \
        gated_back<T, W>(dy, g, u, n, dg, du);                                                                       \
    }                                                                                                                \
    void rotate_##NAME(const T *x, const T *cosines, const T *sines, int64_t rows, int64_t heads, int64_t half,      \
                       int64_t places, double sign, T *y) {                                                          \
        rotate<T, W>(x, cosines, sines, rows, heads, half, places, sign, y);                                         \
    }                                                                                                                \
    void masked_##NAME(const T *x, int64_t seed, int64_t below, int64_t n, T *y) {                                   \
        masked<T, W>(x, seed, below, n, y);                                                                          \
    }                                                                                                                \
    }

FOR(float, float, float32)
FOR(double, double, float64)
FOR(bf16, float, bfloat16)
