// The vector type of this translation unit: W floats, and the few operations that the kernel needs.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
using Vec = __m512;
constexpr int W = 16;
constexpr int kMaxRows = 6;  // 6 x 4 sums, 4 loads, 1 broadcast of 32 registers
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec splat(float v) { return _mm512_set1_ps(v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
using Vec = __m256;
constexpr int W = 8;
constexpr int kMaxRows = 3;  // 3 x 4 sums of 16 registers
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec splat(float v) { return _mm256_set1_ps(v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef float Vec __attribute__((vector_size(16)));
typedef float Loose __attribute__((vector_size(16), aligned(4), may_alias));
constexpr int W = 4;
constexpr int kMaxRows = 3;
inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
inline Vec splat(float v) { return Vec{v, v, v, v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

}  // namespace
