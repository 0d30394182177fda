// A vector of 8 lanes (16 with AVX-512) over GCC/Clang vector extensions: the compiler lowers it to
// whatever the build's instruction set offers (two SSE registers, one AVX2 register, NEON, ...).
#pragma once

#include <cstring>

#include "common/map.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace fastunet {

// Storage types; arithmetic is in fp32 (fp64 for double).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#ifdef __AVX512F__
inline constexpr int kLanes = 16;
#else
inline constexpr int kLanes = 8;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef double vdouble __attribute__((vector_size(8 * kLanes)));
typedef uint32_t vuint32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vuint16 __attribute__((vector_size(2 * kLanes)));

template <class A>
using vec = std::conditional_t<std::is_same_v<A, double>, vdouble, vfloat>;

#define FASTUNET_INLINE inline __attribute__((always_inline))

// Subtracting zero changes no value, not even -0, so nothing but a broadcast is left of it.
template <class A>
FASTUNET_INLINE vec<A> splat(A value) {
  return value - vec<A>{};
}

FASTUNET_INLINE vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FASTUNET_INLINE vdouble load(const double* p) {
  vdouble v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FASTUNET_INLINE vfloat load(const bf16* p) {
  vuint16 h;
  std::memcpy(&h, p, sizeof h);
  return (vfloat)(__builtin_convertvector(h, vuint32) << 16);
}

FASTUNET_INLINE void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
FASTUNET_INLINE void store(double* p, vdouble v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even; a NaN stays one.
FASTUNET_INLINE void store(bf16* p, vfloat v) {
  const vuint32 u = (vuint32)v;
  const vuint32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vuint16 h = __builtin_convertvector(v != v ? vuint32{} + 0x7fc0u : rounded, vuint16);
  std::memcpy(p, &h, sizeof h);
}

#if defined(__AVX512F__)
FASTUNET_INLINE vfloat load(const f16* p) {
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

FASTUNET_INLINE void store(f16* p, vfloat v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
FASTUNET_INLINE vfloat load(const f16* p) {
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

FASTUNET_INLINE void store(f16* p, vfloat v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
FASTUNET_INLINE vfloat load(const f16* p) {
  vuint16 h;
  std::memcpy(&h, p, sizeof h);
  const vuint32 u = __builtin_convertvector(h, vuint32);
  const vuint32 magnitude = u & 0x7fffu;
  // Shift the mantissa into place and rescale the exponent: exact for subnormals too.
  const vuint32 finite = (vuint32)((vfloat)(magnitude << 13) * 0x1p112f);
  const vuint32 special = (magnitude << 13) | 0x7f800000u;
  return (vfloat)((magnitude >= 0x7c00u ? special : finite) | ((u & 0x8000u) << 16));
}

FASTUNET_INLINE void store(f16* p, vfloat v) {
  const vuint32 u = (vuint32)v, magnitude = u & 0x7fffffffu;
  const vuint32 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const vuint32 subnormal = (vuint32)((vfloat)magnitude + 0.5f) - 0x3f000000u;
  const vuint32 huge = magnitude > 0x7f800000u ? vuint32{} + 0x7e00u : vuint32{} + 0x7c00u;
  vuint32 h = magnitude < 0x38800000u ? subnormal : normal;
  h = (magnitude >= 0x477ff000u ? huge : h) | ((u >> 16) & 0x8000u);
  const vuint16 packed = __builtin_convertvector(h, vuint16);
  std::memcpy(p, &packed, sizeof packed);
}
#endif

// The first n lanes; the others read as zero and are not written.
template <class T>
FASTUNET_INLINE vec<acc_t<T>> load(const T* p, int n) {
  if (n == kLanes) return load(p);
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float>)
    return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#endif
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <class T>
FASTUNET_INLINE void store(T* p, vec<acc_t<T>> v, int n) {
  if (n == kLanes) return store(p, v);
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#endif
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

template <class A>
FASTUNET_INLINE A sum_lanes(vec<A> v) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<A, float>) return _mm512_reduce_add_ps((__m512)v);
#endif
  A sum[4] = {v[0], v[1], v[2], v[3]};
  for (int i = 4; i < kLanes; ++i) sum[i % 4] += v[i];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// Pixels whose channels for_tiles takes at a time.
inline constexpr int64_t kTilePixels = 32;  // at most
inline int64_t tile_pixels(int64_t channels) {
  return channels >= 512 ? 2 : channels > 32 ? 1024 / channels : kTilePixels;
}

// Calls f(first pixel, end pixel, channel, lanes) over [0, pixels) x [0, channels): tiles small
// enough to stay in L1, and within a tile one group of channels at a time, so that per-channel
// values stay in registers. `lanes` is a compile-time kLanes except in the last, partial group.
template <class F>
FASTUNET_INLINE void for_tiles(int64_t pixels, int64_t channels, F f) {
  const int64_t tile = tile_pixels(channels);
  for (int64_t p = 0; p < pixels; p += tile) {
    const int64_t end = p + tile < pixels ? p + tile : pixels;
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) f(p, end, c, std::integral_constant<int, kLanes>{});
    if (c < channels) f(p, end, c, static_cast<int>(channels - c));
  }
}

}  // namespace fastunet
