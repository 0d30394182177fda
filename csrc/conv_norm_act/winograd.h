// Winograd's minimal filtering, two-dimensional by nesting: a 3x3 convolution computes 4x4 outputs
// from 6x6 inputs with 36 products per pair of channels where the direct way takes 144.
//
//   y = A'[(G g G') * (B' x B)]A       g: 3x3 weights,   x: 6x6 inputs,  y: 4x4 outputs
//   dg = C'[(D dy D') * (B' x B)]C     dy: 4x4 gradients, x: 6x6 inputs, dg: 3x3 gradients
//
// Lavin, Gray: "Fast algorithms for convolutional neural networks" (2015). Interpolation points 0,
// -a, a, -b, b, infinity with a = sqrt(1/2), b = sqrt(2) instead of the usual 1 and 2: half the
// error, see Barabasz et al.: "Error analysis and improving the accuracy of Winograd convolution
// for deep neural networks" (2020). With f(x) the polynomial of the inputs' coefficients and N the
// products of differences of points, the rows are f(0), f(a), f(-a), f(b), f(-b), leading one.
#pragma once

#include "common/vec.h"

namespace fastunet {

inline constexpr int kTile = 4;   // outputs per side
inline constexpr int kPatch = 6;  // inputs per side, and interpolation points
inline constexpr int kPoints = kPatch * kPatch;
inline constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;

// Each is one dimension of a transform: `kIn` values to `kOut`.
struct InputTransform {
  static constexpr int kIn = 6, kOut = 6, kHalo = 1;
  static FASTUNET_INLINE void apply(const vfloat* d, vfloat* out) {
    const vfloat even_a = d[4] - 2.0f * d[2], odd_a = kA * (d[3] - 2.0f * d[1]);
    const vfloat even_b = d[4] - 0.5f * d[2], odd_b = kB * (d[3] - 0.5f * d[1]);
    out[0] = d[0] + d[4] - 2.5f * d[2];
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = d[1] + d[5] - 2.5f * d[3];
  }
};

struct WeightTransform {
  static constexpr int kIn = 3, kOut = 6;
  static FASTUNET_INLINE void apply(const vfloat* g, vfloat* out) {
    const vfloat even_a = (-2.0f / 3) * g[0] - (1.0f / 3) * g[2], odd_a = (-2.0f / 3 * kA) * g[1];
    const vfloat even_b = (1.0f / 6) * g[0] + (1.0f / 3) * g[2], odd_b = (kB / 6) * g[1];
    out[0] = g[0];
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = g[2];
  }
};

struct OutputTransform {
  static constexpr int kIn = 6, kOut = 4;
  static FASTUNET_INLINE void apply(const vfloat* m, vfloat* out) {
    const vfloat even_a = m[1] + m[2], odd_a = kA * (m[1] - m[2]);
    const vfloat even_b = m[3] + m[4], odd_b = kB * (m[3] - m[4]);
    out[0] = m[0] + even_a + even_b;
    out[1] = odd_a + odd_b;
    out[2] = 0.5f * even_a + 2.0f * even_b;
    out[3] = 0.5f * odd_a + 2.0f * odd_b + m[5];
  }
};

// The output's gradient in the weight's gradient: the weights of a correlation with 4x4 taps.
struct GradTransform {
  static constexpr int kIn = 4, kOut = 6, kHalo = 0;
  static FASTUNET_INLINE void apply(const vfloat* d, vfloat* out) {
    const vfloat even_a = (-2.0f / 3) * d[0] - (1.0f / 3) * d[2];
    const vfloat odd_a = (-2.0f / 3 * kA) * d[1] - (1.0f / 3 * kA) * d[3];
    const vfloat even_b = (1.0f / 6) * d[0] + (1.0f / 3) * d[2];
    const vfloat odd_b = (kB / 6) * d[1] + (kB / 3) * d[3];
    out[0] = d[0];
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = d[3];
  }
};

struct WeightGradTransform {
  static constexpr int kIn = 6, kOut = 3;
  static FASTUNET_INLINE void apply(const vfloat* m, vfloat* out) {
    const vfloat even_a = m[1] + m[2], odd_a = kA * (m[1] - m[2]);
    const vfloat even_b = m[3] + m[4], odd_b = kB * (m[3] - m[4]);
    out[0] = m[0] + even_a + even_b;
    out[1] = odd_a + odd_b;
    out[2] = 0.5f * even_a + 2.0f * even_b + m[5];
  }
};

// Both dimensions of a square: from(row, column) to to(row, column, value).
template <class Transform, class From, class To>
FASTUNET_INLINE void transform_square(From from, To to) {
  constexpr int kIn = Transform::kIn, kOut = Transform::kOut;
  vfloat half[kIn][kOut];
#pragma GCC unroll 6
  for (int i = 0; i < kIn; ++i) {
    vfloat row[kIn];
#pragma GCC unroll 6
    for (int j = 0; j < kIn; ++j) row[j] = from(i, j);
    Transform::apply(row, half[i]);
  }
#pragma GCC unroll 6
  for (int j = 0; j < kOut; ++j) {
    vfloat column[kIn], out[kOut];
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) column[i] = half[i][j];
    Transform::apply(column, out);
#pragma GCC unroll 6
    for (int i = 0; i < kOut; ++i) to(i, j, out[i]);
  }
}

}  // namespace fastunet
