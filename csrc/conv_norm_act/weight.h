// 3x3 weights, [O, I, 3, 3], between their layout and Winograd's domain.
#pragma once

#ifdef __SSE__
#include <immintrin.h>
#endif

#include <algorithm>

#include "common/gemm.h"
#include "conv_norm_act/winograd.h"

namespace fastunet {

inline constexpr int kTaps = 9;

// As a convolution of K input and N output channels reads them: weights[o][i], the taps adjacent,
// or turned around (k = o, n = i, taps reversed), which gives the input's gradient.
struct Weight {
  const float* data;
  int64_t K, N, k_stride, n_stride;
  bool turned;
};

// taps[t][i] = from[i * stride + t] for 16 channels i.
FASTUNET_INLINE void gather_taps(const float* from, int64_t stride, float* taps) {
#ifdef __SSE__
  for (int i = 0; i < kBlock; i += 4, from += 4 * stride) {
    for (int t = 0; t < 8; t += 4) {
      __m128 a = _mm_loadu_ps(from + t), b = _mm_loadu_ps(from + stride + t);
      __m128 c = _mm_loadu_ps(from + 2 * stride + t), d = _mm_loadu_ps(from + 3 * stride + t);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(taps + t * kBlock + i, a);
      _mm_storeu_ps(taps + (t + 1) * kBlock + i, b);
      _mm_storeu_ps(taps + (t + 2) * kBlock + i, c);
      _mm_storeu_ps(taps + (t + 3) * kBlock + i, d);
    }
    for (int j = 0; j < 4; ++j) taps[8 * kBlock + i + j] = from[j * stride + 8];
  }
#else
  for (int i = 0; i < kBlock; ++i)
    for (int t = 0; t < kTaps; ++t) taps[t * kBlock + i] = from[i * stride + t];
#endif
}

// And back: to[i * stride + t] = taps[t][i].
FASTUNET_INLINE void scatter_taps(const float* taps, float* to, int64_t stride) {
#ifdef __SSE__
  for (int i = 0; i < kBlock; i += 4, to += 4 * stride) {
    for (int t = 0; t < 8; t += 4) {
      const float* p = taps + t * kBlock + i;
      __m128 a = _mm_loadu_ps(p), b = _mm_loadu_ps(p + kBlock);
      __m128 c = _mm_loadu_ps(p + 2 * kBlock), d = _mm_loadu_ps(p + 3 * kBlock);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(to + t, a);
      _mm_storeu_ps(to + stride + t, b);
      _mm_storeu_ps(to + 2 * stride + t, c);
      _mm_storeu_ps(to + 3 * stride + t, d);
    }
    for (int j = 0; j < 4; ++j) to[j * stride + 8] = taps[8 * kBlock + i + j];
  }
#else
  for (int i = 0; i < kBlock; ++i)
    for (int t = 0; t < kTaps; ++t) to[i * stride + t] = taps[t * kBlock + i];
#endif
}

// u[point][k - begin][16] for inputs [begin, end) and one block of outputs; points `plane` apart.
inline void transform_weight(const Weight& w, int64_t begin, int64_t end, int64_t block, float* u,
                             int64_t plane) {
  const int64_t first = block * kBlock, count = std::min<int64_t>(kBlock, w.N - first);
  alignas(64) float taps[kTaps * kBlock] = {};
  for (int64_t k = begin; k < end; ++k, u += kBlock) {
    const float* from = w.data + k * w.k_stride + first * w.n_stride;
    if (count == kBlock) {
      gather_taps(from, w.n_stride, taps);
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int t = 0; t < kTaps; ++t) taps[t * kBlock + i] = from[i * w.n_stride + t];
    }
    for (int c = 0; c < kBlock; c += kLanes)
      transform_square<WeightTransform>(
          [&](int i, int j) {
            const int t = i * 3 + j;
            return load(taps + (w.turned ? kTaps - 1 - t : t) * kBlock + c);
          },
          [&](int i, int j, vfloat value) { store(u + (i * kPatch + j) * plane + c, value); });
  }
}

}  // namespace fastunet
