// What kernels.cpp and decode_kernels.cpp share.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

inline double exponential(double x) { return std::exp(x); }
inline float exponential(float x) {  // Cephes' expf, without branches: 2^n times a polynomial in |r| <= ln(2)/2
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}
