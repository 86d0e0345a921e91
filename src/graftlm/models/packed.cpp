// Blocks of packed weights to float32, at the speed of memory; packed.py has the formats in plain torch, and calls these.
//
// A scale times a number of few bits is exact in float, so it does not matter whether the compiler fuses a product and
// a sum: the values are those of the plain way to the bit.

#include <cstdint>
#include <cstring>

namespace {

inline float half(const uint8_t *from) {  // finite ones only
    uint16_t h;
    std::memcpy(&h, from, 2);
    uint32_t bits = uint32_t(h & 0x7fff) << 13;
    float y;
    std::memcpy(&y, &bits, 4);
    return (h & 0x8000 ? -0x1p112f : 0x1p112f) * y;
}

struct q4_0 {
    static const int64_t bytes = 18, size = 32;
    static void unpack(const uint8_t *__restrict b, float *__restrict y) {
        const float d = half(b);
        for (int i = 0; i < 16; i++) y[i] = d * float(int(b[2 + i] & 15) - 8);
        for (int i = 0; i < 16; i++) y[16 + i] = d * float(int(b[2 + i] >> 4) - 8);
    }
};

struct q4_1 {
    static const int64_t bytes = 20, size = 32;
    static void unpack(const uint8_t *__restrict b, float *__restrict y) {
        const float d = half(b), m = half(b + 2);
        for (int i = 0; i < 16; i++) y[i] = d * float(int(b[4 + i] & 15)) + m;
        for (int i = 0; i < 16; i++) y[16 + i] = d * float(int(b[4 + i] >> 4)) + m;
    }
};

// 32 numbers of five bits: the fifth ones are the bits of four bytes, the others are nibbles.
inline void five(const uint8_t *__restrict high, const uint8_t *__restrict low, int32_t *__restrict q) {
    uint32_t bits;
    std::memcpy(&bits, high, 4);
    for (int i = 0; i < 16; i++) q[i] = int32_t(low[i] & 15) | int32_t((bits >> i) & 1) << 4;
    for (int i = 0; i < 16; i++) q[16 + i] = int32_t(low[i] >> 4) | int32_t((bits >> (16 + i)) & 1) << 4;
}

struct q5_0 {
    static const int64_t bytes = 22, size = 32;
    static void unpack(const uint8_t *__restrict b, float *__restrict y) {
        const float d = half(b);
        int32_t q[32];
        five(b + 2, b + 6, q);
        for (int i = 0; i < 32; i++) y[i] = d * float(q[i] - 16);
    }
};

struct q5_1 {
    static const int64_t bytes = 24, size = 32;
    static void unpack(const uint8_t *__restrict b, float *__restrict y) {
        const float d = half(b), m = half(b + 2);
        int32_t q[32];
        five(b + 4, b + 8, q);
        for (int i = 0; i < 32; i++) y[i] = d * float(q[i]) + m;
    }
};

struct q8_0 {
    static const int64_t bytes = 34, size = 32;
    static void unpack(const uint8_t *__restrict b, float *__restrict y) {
        const float d = half(b);
        for (int i = 0; i < 32; i++) y[i] = d * float(int(int8_t(b[2 + i])));
    }
};

// Scales and minima of the 8 groups of 32 numbers of a K block.
inline void k_scales(const uint8_t *__restrict b, float *__restrict scale, float *__restrict minimum) {
    const float d = half(b), m = half(b + 2);
    const uint8_t *s = b + 4;
    for (int j = 0; j < 4; j++) {
        scale[j] = d * float(s[j] & 63);
        minimum[j] = m * float(s[j + 4] & 63);
        scale[j + 4] = d * float((s[j + 8] & 15) | ((s[j] >> 2) & 0x30));
        minimum[j + 4] = m * float((s[j + 8] >> 4) | ((s[j + 4] >> 2) & 0x30));
    }
}

struct q4_k {
    static const int64_t bytes = 144, size = 256;
    static void unpack(const uint8_t *__restrict b, float *__restrict y) {
        float scale[8], minimum[8];
        k_scales(b, scale, minimum);
        for (int g = 0; g < 8; g++) {
            const uint8_t *low = b + 16 + 32 * (g >> 1);
            const int shift = 4 * (g & 1);
            for (int i = 0; i < 32; i++) y[32 * g + i] = scale[g] * float((low[i] >> shift) & 15) - minimum[g];
        }
    }
};

struct q5_k {
    static const int64_t bytes = 176, size = 256;
    static void unpack(const uint8_t *__restrict b, float *__restrict y) {
        float scale[8], minimum[8];
        k_scales(b, scale, minimum);
        for (int g = 0; g < 8; g++) {
            const uint8_t *low = b + 48 + 32 * (g >> 1), *high = b + 16;
            const int shift = 4 * (g & 1);
            for (int i = 0; i < 32; i++) {
                const int q = ((low[i] >> shift) & 15) | ((high[i] >> g) & 1) << 4;
                y[32 * g + i] = scale[g] * float(q) - minimum[g];
            }
        }
    }
};

struct q6_k {
    static const int64_t bytes = 210, size = 256;
    static void unpack(const uint8_t *__restrict b, float *__restrict y) {
        const float d = half(b + 208);
        for (int g = 0; g < 8; g++) {
            const uint8_t *low = b + 64 * (g >> 2) + 32 * (g & 1), *high = b + 128 + 32 * (g >> 2);
            const int shift = 4 * ((g >> 1) & 1), up = 2 * (g & 3);
            for (int part = 0; part < 2; part++) {
                const float scale = d * float(int8_t(b[192 + 2 * g + part]));
                for (int i = 16 * part; i < 16 * part + 16; i++) {
                    const int q = ((low[i] >> shift) & 15) | ((high[i] >> up) & 3) << 4;
                    y[32 * g + i] = scale * float(q - 32);
                }
            }
        }
    }
};

template <class F>
void dequantize(const uint8_t *__restrict blocks, int64_t n, float *__restrict y) {
#pragma omp parallel for schedule(static) if (n * F::size > 8192)
    for (int64_t i = 0; i < n; i++) F::unpack(blocks + i * F::bytes, y + i * F::size);
}

}  // namespace

#define FORMAT(NAME)                                                                                                 \
    extern "C" void dequantize_##NAME(const uint8_t *blocks, int64_t n, float *y) { dequantize<NAME>(blocks, n, y); }

FORMAT(q4_0)
FORMAT(q4_1)
FORMAT(q5_0)
FORMAT(q5_1)
FORMAT(q8_0)
FORMAT(q4_k)
FORMAT(q5_k)
FORMAT(q6_k)
