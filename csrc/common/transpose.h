// For packing weights whose taps lie side by side.
#pragma once

#ifdef __SSE__
#include <immintrin.h>
#endif

#include "common/vec.h"

namespace fastunet {

// to[j * to_row + i] = from[i * from_row + j]
FASTUNET_INLINE void transpose_4x4(const float* from, int64_t from_row, float* to, int64_t to_row) {
#ifdef __SSE__
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_row);
  __m128 c = _mm_loadu_ps(from + 2 * from_row), d = _mm_loadu_ps(from + 3 * from_row);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_row, b);
  _mm_storeu_ps(to + 2 * to_row, c);
  _mm_storeu_ps(to + 3 * to_row, d);
#else
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[j * to_row + i] = from[i * from_row + j];
#endif
}

// to[j][i] = from[i * from_row + j] for 8 values of kLanes rows, which stay in registers: a vector
// that is read where its parts have just been written waits for all stores before.
#ifdef __AVX2__
FASTUNET_INLINE void transpose_8(const float* from, int64_t from_row, vfloat* to) {
#ifdef __AVX512F__
#define FASTUNET_MM(name) _mm512_##name
  // Four rows and the next four; halves of 128 bits then meet in order.
  const auto load_rows = [&](int i) {
    const float* low = from + (i < 4 ? i : i + 4) * from_row;
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)),
                              _mm256_loadu_ps(low + 4 * from_row), 1);
  };
  const auto low_halves = [](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0x88); };
  const auto high_halves = [](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0xdd); };
#else
#define FASTUNET_MM(name) _mm256_##name
  const auto load_rows = [&](int i) { return _mm256_loadu_ps(from + i * from_row); };
  const auto low_halves = [](__m256 a, __m256 b) { return _mm256_permute2f128_ps(a, b, 0x20); };
  const auto high_halves = [](__m256 a, __m256 b) { return _mm256_permute2f128_ps(a, b, 0x31); };
#endif
  vfloat of_rows[2][4];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const auto a = load_rows(4 * half), b = load_rows(4 * half + 1);
    const auto c = load_rows(4 * half + 2), d = load_rows(4 * half + 3);
    const auto ab = FASTUNET_MM(castps_pd)(FASTUNET_MM(unpacklo_ps)(a, b));
    const auto cd = FASTUNET_MM(castps_pd)(FASTUNET_MM(unpacklo_ps)(c, d));
    const auto ab_high = FASTUNET_MM(castps_pd)(FASTUNET_MM(unpackhi_ps)(a, b));
    const auto cd_high = FASTUNET_MM(castps_pd)(FASTUNET_MM(unpackhi_ps)(c, d));
    of_rows[half][0] = (vfloat)FASTUNET_MM(unpacklo_pd)(ab, cd);
    of_rows[half][1] = (vfloat)FASTUNET_MM(unpackhi_pd)(ab, cd);
    of_rows[half][2] = (vfloat)FASTUNET_MM(unpacklo_pd)(ab_high, cd_high);
    of_rows[half][3] = (vfloat)FASTUNET_MM(unpackhi_pd)(ab_high, cd_high);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    to[j] = low_halves(of_rows[0][j], of_rows[1][j]);
    to[j + 4] = high_halves(of_rows[0][j], of_rows[1][j]);
  }
#undef FASTUNET_MM
}
#else
FASTUNET_INLINE void transpose_8(const float* from, int64_t from_row, vfloat* to) {
  alignas(vfloat) float lanes[8][kLanes];
  for (int i = 0; i < kLanes; i += 4)
    for (int j = 0; j < 8; j += 4)
      transpose_4x4(from + i * from_row + j, from_row, lanes[j] + i, kLanes);
  for (int j = 0; j < 8; ++j) to[j] = load(lanes[j]);
}
#endif

}  // namespace fastunet
