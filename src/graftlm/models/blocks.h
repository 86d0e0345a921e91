// Vectors, and the storage formats of weights: what packed.cpp and decode_kernels.cpp share.
//
// A scale times a number of few bits is exact in float, so it does not matter whether the compiler fuses a product and
// a sum: the values are those of packed.py's plain torch to the bit.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

// Vectors --------------------------------------------------------------------------------------------------------------

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int CHUNK = 32, PARTS = CHUNK / LANES;  // weights that are unpacked at a time; in vectors

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float four __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

template <class V>
inline V load(const void *from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
inline void store(float *to, vec v) { std::memcpy(to, &v, sizeof v); }

inline vec all(float x) {
#if defined(__AVX512F__)
    return (vec)_mm512_set1_ps(x);
#elif defined(__AVX__)
    return (vec)_mm256_set1_ps(x);
#else
    return vec{} + x;
#endif
}

// LANES unsigned or signed bytes, or unsigned 16-bit numbers. GCC 12 converts such vectors one element at a time.
#if defined(__AVX512F__)
inline ints unsigned8(const void *from) { return (ints)_mm512_cvtepu8_epi32(load<__m128i>(from)); }
inline ints signed8(const void *from) { return (ints)_mm512_cvtepi8_epi32(load<__m128i>(from)); }
inline ints unsigned16(const void *from) { return (ints)_mm512_cvtepu16_epi32(load<__m256i>(from)); }
#elif defined(__AVX2__)
inline ints unsigned8(const void *from) { return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)); }
inline ints signed8(const void *from) { return (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)); }
inline ints unsigned16(const void *from) { return (ints)_mm256_cvtepu16_epi32(load<__m128i>(from)); }
#else
template <class T>
inline ints each(const void *from) {
    ints v;
    for (int i = 0; i < LANES; i++) v[i] = load<T>((const T *)from + i);
    return v;
}
inline ints unsigned8(const void *from) { return each<uint8_t>(from); }
inline ints signed8(const void *from) { return each<int8_t>(from); }
inline ints unsigned16(const void *from) { return each<uint16_t>(from); }
#endif
inline vec real(ints v) { return __builtin_convertvector(v, vec); }

// a b + c, rounded once where the processor can; the compiler's own choice would differ from one tile to another.
#if defined(__AVX512F__)
inline vec multiply_add(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__) && defined(__FMA__)
inline vec multiply_add(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline vec multiply_add(vec a, vec b, vec c) { return a * b + c; }
#endif

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float half(const uint8_t *from) {  // float16
    uint16_t h = load<uint16_t>(from);
#ifdef __F16C__
    return _cvtsh_ss(h);
#else
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity, NaN
    return from_bits(sign) + (sign ? -1 : 1) * from_bits(rest << 13) * 0x1p112f;
#endif
}

inline four halves(const uint8_t *from) {  // two float16
#ifdef __F16C__
    return (four)_mm_cvtph_ps(_mm_cvtsi32_si128(load<int32_t>(from)));
#else
    return four{half(from), half(from + 2)};
#endif
}

// Storage formats ------------------------------------------------------------------------------------------------------
//
// unpack(row, c, w): the CHUNK weights from CHUNK c on of a stored row. GGUF's blocks have 32 weights, its K blocks 256.

struct F32 {
    static constexpr int BYTES = 4;  // of a weight; 0: whole blocks only
    static void unpack(const uint8_t *row, int64_t c, vec *w) {
        for (int p = 0; p < PARTS; p++) w[p] = load<vec>(row + (c * CHUNK + p * LANES) * 4);
    }
};

struct BF16 {
    static constexpr int BYTES = 2;
    static void unpack(const uint8_t *row, int64_t c, vec *w) {
        for (int p = 0; p < PARTS; p++) w[p] = (vec)(unsigned16(row + (c * CHUNK + p * LANES) * 2) << 16);
    }
};

struct F16 {
    static constexpr int BYTES = 2;
    static void unpack(const uint8_t *row, int64_t c, vec *w) {
        float x[CHUNK];
#ifdef __F16C__
        for (int i = 0; i < CHUNK; i += 8)
            _mm256_storeu_ps(x + i, _mm256_cvtph_ps(load<__m128i>(row + (c * CHUNK + i) * 2)));
#else
        for (int i = 0; i < CHUNK; i++) x[i] = half(row + (c * CHUNK + i) * 2);
#endif
        for (int p = 0; p < PARTS; p++) w[p] = load<vec>(x + p * LANES);
    }
};

// 16 bytes: weight i of 32 in the lower four bits of byte i, weight 16 + i in the upper four.
inline void nibbles(const uint8_t *from, ints *q) {
    for (int p = 0; p < PARTS / 2; p++) {
        ints both = unsigned8(from + p * LANES);
        q[p] = both & 15;
        q[PARTS / 2 + p] = both >> 4;
    }
}

// The fifth bits of 32 weights: bit i of a word.
inline void fifth_bits(const uint8_t *from, ints *q) {
    ints shifts, word = ints{} + load<int32_t>(from);
    for (int i = 0; i < LANES; i++) shifts[i] = i;
    for (int p = 0; p < PARTS; p++) q[p] |= ((word >> (shifts + p * LANES)) & 1) << 4;
}

template <bool FIVE, bool MINIMUM>
struct Q45 {  // Q4_0, Q4_1, Q5_0, Q5_1: a scale; a minimum, or the middle; fifth bits; lower four bits
    static constexpr int BYTES = 0;
    static constexpr int BLOCK = 2 + 2 * MINIMUM + 4 * FIVE + 16;
    static void unpack(const uint8_t *row, int64_t c, vec *w) {
        const uint8_t *block = row + c * BLOCK;
        ints q[PARTS];
        nibbles(block + BLOCK - 16, q);
        if (FIVE) fifth_bits(block + BLOCK - 20, q);
        const four scales = halves(block);
        const float d = scales[0], least = scales[1];
        for (int p = 0; p < PARTS; p++) w[p] = MINIMUM ? real(q[p]) * d + least : real(q[p] - (FIVE ? 16 : 8)) * d;
    }
};

struct Q8_0 {
    static constexpr int BYTES = 0;
    static constexpr int BLOCK = 34;
    static void unpack(const uint8_t *row, int64_t c, vec *w) {
        const uint8_t *block = row + c * BLOCK;
        float d = half(block);
        for (int p = 0; p < PARTS; p++)
            w[p] = real(signed8(block + 2 + p * LANES)) * d;
    }
};

// Q4_K and Q5_K: 8 times 32 weights, each with a scale and a minimum of six bits, in 12 bytes.
template <bool FIVE>
struct Q45_K {
    static constexpr int BYTES = 0;
    static constexpr int BLOCK = FIVE ? 176 : 144;
    static void unpack(const uint8_t *row, int64_t c, vec *w) {
        const uint8_t *block = row + c / 8 * BLOCK, *s = block + 4, *q = block + (FIVE ? 48 : 16) + c % 8 / 2 * 32;
        const int j = int(c % 8);
        int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        int least = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | (s[j] >> 6) << 4;
        const four scales = halves(block);
        const float d = scales[0] * scale, m = scales[1] * least;
        for (int p = 0; p < PARTS; p++) {
            ints v = (unsigned8(q + p * LANES) >> (4 * (j & 1))) & 15;
            if (FIVE) v |= ((unsigned8(block + 16 + p * LANES) >> j) & 1) << 4;
            w[p] = real(v) * d - m;
        }
    }
};

// 16 times 16 weights with a scale each; of 128 weights the lower four bits are in 64 bytes, the upper two in 32.
struct Q6_K {
    static constexpr int BYTES = 0;
    static constexpr int BLOCK = 210;
    static void unpack(const uint8_t *row, int64_t c, vec *w) {
        const uint8_t *block = row + c / 8 * BLOCK;
        const int upper = int(c % 8) / 4, j = int(c % 4);
        const uint8_t *low = block + 64 * upper + 32 * (j & 1), *high = block + 128 + 32 * upper;
        const int8_t *scales = (const int8_t *)block + 192 + 8 * upper + 2 * j;
        const float d = half(block + 208);
        for (int p = 0; p < PARTS; p++) {
            ints v = (unsigned8(low + p * LANES) >> (4 * (j / 2))) & 15;
            v |= ((unsigned8(high + p * LANES) >> (2 * j)) & 3) << 4;
            w[p] = real(v - 32) * (d * scales[p * LANES / 16]);
        }
    }
};

// Unpacked formats may end within a chunk: the weights beyond the last column are 0.
template <class F>
inline void unpack_end(const uint8_t *row, int64_t columns, int64_t c, vec *w) {
    if constexpr (F::BYTES > 0) {
        uint8_t rest[CHUNK * F::BYTES] = {};
        std::memcpy(rest, row + c * CHUNK * F::BYTES, (columns - c * CHUNK) * F::BYTES);
        F::unpack(rest, 0, w);
    }
}

inline int64_t padded(int64_t n) { return (n + CHUNK - 1) / CHUNK * CHUNK; }

struct Matrix {  // [rows, columns]; without data it is missing
    const uint8_t *data;
    int64_t format, rows, columns, row_bytes;
};

// use(the struct of a format), in the order of packed.py's CPP_FORMATS.
template <class Use>
inline void with_format(int64_t format, const Use &use) {
    switch (format) {
        case 0: return use(F32());
        case 1: return use(BF16());
        case 2: return use(F16());
        case 3: return use(Q45<false, false>());
        case 4: return use(Q45<false, true>());
        case 5: return use(Q45<true, false>());
        case 6: return use(Q45<true, true>());
        case 7: return use(Q8_0());
        case 8: return use(Q45_K<false>());
        case 9: return use(Q45_K<true>());
        case 10: return use(Q6_K());
    }
}

}  // namespace
