// Winograd's minimal filtering, two-dimensional by nesting: with tiles of 4x4 (6x6) outputs, a 3x3
// convolution takes 36 (64) products per pair of channels where the direct way takes 144 (324).
//
//   y = A'[(G g G') * (B' x B)]A       g: 3x3 weights,   x: 6x6 inputs,  y: 4x4 outputs
//   dg = C'[(D dy D') * (B' x B)]C     dy: 4x4 gradients, x: 6x6 inputs, dg: 3x3 gradients
//
// Lavin, Gray: "Fast algorithms for convolutional neural networks" (2015). With f(x) the polynomial
// of the inputs' coefficients, the rows are f at points 0, -a, a, ..., and the leading coefficient;
// the inputs' transforms carry the products of differences of points, but for their constants.
// Points for tiles of 4: sqrt(1/2) and sqrt(2) instead of the usual 1 and 2, which halves the
// error, see Barabasz et al.: "Error analysis and improving the accuracy of Winograd convolution
// for deep neural networks" (2020). For tiles of 6: 1/2, 1 and 2; a search around them found none
// better. Relative L2 error in fp32, 64 channels: 0.7e-6 and 2.9e-6.
#pragma once

#include "common/vec.h"

namespace fastunet {

inline constexpr int patch_of(int tile) { return tile + 2; }  // inputs per side
inline constexpr int points_of(int tile) { return patch_of(tile) * patch_of(tile); }

// Each is one dimension of a transform: `kIn` values to `kOut`. `kHalo`: how far inputs reach
// beyond the tile.
template <int kTile>
struct InputTransform;  // B
template <int kTile>
struct WeightTransform;  // G
template <int kTile>
struct OutputTransform;  // A
template <int kTile>
struct GradTransform;  // D: the output's gradient, as the weights of a correlation
template <int kTile>
struct WeightGradTransform;  // C

// out[first] and out[first + 1]: values at a point and its negative.
FASTUNET_INLINE void at_pair(vfloat even, vfloat odd, vfloat* out) {
  out[0] = even + odd;
  out[1] = even - odd;
}

inline constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;

template <>
struct InputTransform<4> {
  static constexpr int kTile = 4, kIn = 6, kOut = 6, kHalo = 1;
  static FASTUNET_INLINE void apply(const vfloat* d, vfloat* out) {
    out[0] = d[0] + d[4] - 2.5f * d[2];
    at_pair(d[4] - 2.0f * d[2], kA * (d[3] - 2.0f * d[1]), out + 1);
    at_pair(d[4] - 0.5f * d[2], kB * (d[3] - 0.5f * d[1]), out + 3);
    out[5] = d[1] + d[5] - 2.5f * d[3];
  }
};

template <>
struct WeightTransform<4> {
  static constexpr int kIn = 3, kOut = 6;
  static FASTUNET_INLINE void apply(const vfloat* g, vfloat* out) {
    out[0] = g[0];
    at_pair((-2.0f / 3) * g[0] - (1.0f / 3) * g[2], (-2.0f / 3 * kA) * g[1], out + 1);
    at_pair((1.0f / 6) * g[0] + (1.0f / 3) * g[2], (kB / 6) * g[1], out + 3);
    out[5] = g[2];
  }
};

template <>
struct OutputTransform<4> {
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

template <>
struct GradTransform<4> {
  static constexpr int kTile = 4, kIn = 4, kOut = 6, kHalo = 0;
  static FASTUNET_INLINE void apply(const vfloat* d, vfloat* out) {
    out[0] = d[0];
    at_pair((-2.0f / 3) * d[0] - (1.0f / 3) * d[2],
            (-2.0f / 3 * kA) * d[1] - (1.0f / 3 * kA) * d[3], out + 1);
    at_pair((1.0f / 6) * d[0] + (1.0f / 3) * d[2], (kB / 6) * d[1] + (kB / 3) * d[3], out + 3);
    out[5] = d[3];
  }
};

template <>
struct WeightGradTransform<4> {
  static constexpr int kIn = 6, kOut = 3;
  static FASTUNET_INLINE void apply(const vfloat* m, vfloat* out) {
    const vfloat even_a = m[1] + m[2], odd_a = kA * (m[1] - m[2]);
    const vfloat even_b = m[3] + m[4], odd_b = kB * (m[3] - m[4]);
    out[0] = m[0] + even_a + even_b;
    out[1] = odd_a + odd_b;
    out[2] = 0.5f * even_a + 2.0f * even_b + m[5];
  }
};

template <>
struct InputTransform<6> {
  static constexpr int kTile = 6, kIn = 8, kOut = 8, kHalo = 1;
  static FASTUNET_INLINE void apply(const vfloat* d, vfloat* out) {
    out[0] = d[0] - d[6] + 5.25f * (d[4] - d[2]);
    at_pair(d[2] + d[6] - 4.25f * d[4], d[1] + d[5] - 4.25f * d[3], out + 1);
    at_pair(0.25f * d[2] + d[6] - 1.25f * d[4], 0.5f * d[1] + 2.0f * d[5] - 2.5f * d[3], out + 3);
    at_pair(4.0f * d[2] + d[6] - 5.0f * d[4], 2.0f * d[1] + 0.5f * d[5] - 2.5f * d[3], out + 5);
    out[7] = d[7] - d[1] + 5.25f * (d[3] - d[5]);
  }
};

template <>
struct WeightTransform<6> {
  static constexpr int kIn = 3, kOut = 8;
  static FASTUNET_INLINE void apply(const vfloat* g, vfloat* out) {
    out[0] = g[0];
    at_pair((-2.0f / 9) * (g[0] + g[2]), (-2.0f / 9) * g[1], out + 1);
    at_pair((1.0f / 90) * g[0] + (2.0f / 45) * g[2], (1.0f / 45) * g[1], out + 3);
    at_pair((32.0f / 45) * g[0] + (8.0f / 45) * g[2], (16.0f / 45) * g[1], out + 5);
    out[7] = g[2];
  }
};

template <>
struct OutputTransform<6> {
  static constexpr int kIn = 8, kOut = 6;
  static FASTUNET_INLINE void apply(const vfloat* m, vfloat* out) {
    const vfloat even_1 = m[1] + m[2], odd_1 = m[1] - m[2];
    const vfloat even_2 = m[3] + m[4], odd_2 = m[3] - m[4];
    const vfloat even_h = m[5] + m[6], odd_h = m[5] - m[6];
    out[0] = m[0] + even_1 + even_2 + even_h;
    out[1] = odd_1 + 2.0f * odd_2 + 0.5f * odd_h;
    out[2] = even_1 + 4.0f * even_2 + 0.25f * even_h;
    out[3] = odd_1 + 8.0f * odd_2 + 0.125f * odd_h;
    out[4] = even_1 + 16.0f * even_2 + 0.0625f * even_h;
    out[5] = odd_1 + 32.0f * odd_2 + 0.03125f * odd_h + m[7];
  }
};

template <>
struct GradTransform<6> {
  static constexpr int kTile = 6, kIn = 6, kOut = 8, kHalo = 0;
  static FASTUNET_INLINE void apply(const vfloat* d, vfloat* out) {
    out[0] = d[0];
    at_pair((-2.0f / 9) * (d[0] + d[2] + d[4]), (-2.0f / 9) * (d[1] + d[3] + d[5]), out + 1);
    at_pair((1.0f / 90) * (d[0] + 4.0f * d[2] + 16.0f * d[4]),
            (1.0f / 45) * (d[1] + 4.0f * d[3] + 16.0f * d[5]), out + 3);
    at_pair((32.0f / 45) * (d[0] + 0.25f * d[2] + 0.0625f * d[4]),
            (16.0f / 45) * (d[1] + 0.25f * d[3] + 0.0625f * d[5]), out + 5);
    out[7] = d[5];
  }
};

template <>
struct WeightGradTransform<6> {
  static constexpr int kIn = 8, kOut = 3;
  static FASTUNET_INLINE void apply(const vfloat* m, vfloat* out) {
    const vfloat even_1 = m[1] + m[2], even_2 = m[3] + m[4], even_h = m[5] + m[6];
    out[0] = m[0] + even_1 + even_2 + even_h;
    out[1] = m[1] - m[2] + 2.0f * (m[3] - m[4]) + 0.5f * (m[5] - m[6]);
    out[2] = even_1 + 4.0f * even_2 + 0.25f * even_h + m[7];
  }
};

// Both dimensions of a square: from(row, column) to to(row, column, value).
template <class Transform, class From, class To>
FASTUNET_INLINE void transform_square(From from, To to) {
  constexpr int kIn = Transform::kIn, kOut = Transform::kOut;
  vfloat half[kIn][kOut];
#pragma GCC unroll 8
  for (int i = 0; i < kIn; ++i) {
    vfloat row[kIn];
#pragma GCC unroll 8
    for (int j = 0; j < kIn; ++j) row[j] = from(i, j);
    Transform::apply(row, half[i]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < kOut; ++j) {
    vfloat column[kIn], out[kOut];
#pragma GCC unroll 8
    for (int i = 0; i < kIn; ++i) column[i] = half[i][j];
    Transform::apply(column, out);
#pragma GCC unroll 8
    for (int i = 0; i < kOut; ++i) to(i, j, out[i]);
  }
}

}  // namespace fastunet
