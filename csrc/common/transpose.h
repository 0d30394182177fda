// 4x4 values, for packing weights whose taps lie side by side.
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

}  // namespace fastunet
