// The two products of Winograd's algorithm, per point, on channels in blocks of 16:
//   multiply     m[n][t] (+)= sum over k of v[k][t] * u[n][k]     forward: k input, n output
//   channels correlate    du[i][n]  =  sum over t of v[i][t] * d[n][t]     weight gradient, t tiles
#pragma once

#include <utility>

#include "common/source.h"

namespace fastunet {

inline constexpr int kBlock = 16;              // channels: one cache line of floats
inline constexpr int kVecs = kBlock / kLanes;  // vectors per block

// Register tiles: as many accumulators as the registers leave beside one row of operands.
#if defined(__AVX512F__)
inline constexpr int kRows = 12, kBlocks = 2, kGradRows = 8;
#elif defined(__AVX2__)
inline constexpr int kRows = 6, kBlocks = 1, kGradRows = 4;
#else
inline constexpr int kRows = 2, kBlocks = 1, kGradRows = 2;
#endif

// Winograd-domain maps, [points][blocks][tiles][16]. Planes are a cache line further apart than
// they are large, so that the points of one tile do not fall into the same sets of a cache.
struct Panels {
  float* data;
  int64_t blocks, tiles;

  static int64_t floats(int64_t blocks, int64_t tiles) {
    return 36 * (blocks * tiles + 1) * kBlock;
  }
  int64_t plane() const { return (blocks * tiles + 1) * kBlock; }
  int64_t block() const { return tiles * kBlock; }
  float* at(int64_t point, int64_t b, int64_t tile = 0) const {
    return data + point * plane() + b * block() + tile * kBlock;
  }
};

// R tiles, B blocks of outputs. v: blocks of 16 inputs v_block apart; u: blocks u_block apart.
template <int R, int B>
void multiply_tile(const float* v, int64_t v_block, const float* u, int64_t u_block, int64_t K,
                   float* m, int64_t m_block, bool add) {
  vfloat acc[R][B][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i)
        acc[r][b][i] = add ? load(m + b * m_block + r * kBlock + i * kLanes) : vfloat{};
  for (; K > 0; K -= kBlock, v += v_block, u += kBlock * kBlock) {
    const int64_t count = K < kBlock ? K : kBlock;
    for (int64_t k = 0; k < count; ++k) {
      vfloat w[B][kVecs];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i) w[b][i] = load(u + b * u_block + k * kBlock + i * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vfloat x = splat(v[r * kBlock + k]);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
          for (int i = 0; i < kVecs; ++i) acc[r][b][i] += x * w[b][i];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i)
        store(m + b * m_block + r * kBlock + i * kLanes, acc[r][b][i]);
}

// Calls f with `rows` as a compile-time number in 1 ... kRows.
template <class F>
FASTUNET_INLINE void with_rows(int64_t rows, F f) {
  [&]<int... R>(std::integer_sequence<int, R...>) {
    (void)((rows == R + 1 && (f(std::integral_constant<int, R + 1>{}), true)) || ...);
  }(std::make_integer_sequence<int, kRows>{});
}

// Blocks [n, n + B) of u and m, all tiles of v. u: [blocks][K][16] of one point.
template <int B>
void multiply_blocks(const float* v, int64_t v_block, const float* u, int64_t K, float* m,
                     int64_t m_block, int64_t tiles, bool add) {
  const int64_t panels = ceil_div(tiles, kRows);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t t = tiles * p / panels, rows = tiles * (p + 1) / panels - t;
    with_rows(rows, [&](auto R) {
      multiply_tile<R, B>(v + t * kBlock, v_block, u, K * kBlock, K, m + t * kBlock, m_block, add);
    });
  }
}

inline void multiply(const float* v, int64_t v_block, const float* u, int64_t K, float* m,
                     int64_t m_block, int64_t blocks, int64_t tiles, bool add) {
  int64_t n = 0;
  for (; n + kBlocks <= blocks; n += kBlocks)
    multiply_blocks<kBlocks>(v, v_block, u + n * K * kBlock, K, m + n * m_block, m_block, tiles,
                             add);
  if constexpr (kBlocks > 1)
    if (n < blocks)
      multiply_blocks<1>(v, v_block, u + n * K * kBlock, K, m + n * m_block, m_block, tiles, add);
}

// One block of inputs by B blocks of outputs; du: [16 inputs][du_row].
template <int B>
void correlate_blocks(const float* v, const float* d, int64_t d_block, int64_t tiles, float* du,
                      int64_t du_row) {
  for (int i0 = 0; i0 < kBlock; i0 += kGradRows) {
    vfloat acc[kGradRows][B][kVecs] = {};
    for (int64_t t = 0; t < tiles; ++t) {
      vfloat w[B][kVecs];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i) w[b][i] = load(d + b * d_block + t * kBlock + i * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kGradRows; ++r) {
        const vfloat x = splat(v[t * kBlock + i0 + r]);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
          for (int i = 0; i < kVecs; ++i) acc[r][b][i] += x * w[b][i];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kGradRows; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i)
          store(du + (i0 + r) * du_row + b * kBlock + i * kLanes, acc[r][b][i]);
  }
}

inline void correlate(const float* v, const float* d, int64_t d_block, int64_t blocks,
                      int64_t tiles, float* du, int64_t du_row) {
  int64_t n = 0;
  for (; n + kBlocks <= blocks; n += kBlocks)
    correlate_blocks<kBlocks>(v, d + n * d_block, d_block, tiles, du + n * kBlock, du_row);
  if constexpr (kBlocks > 1)
    if (n < blocks)
      correlate_blocks<1>(v, d + n * d_block, d_block, tiles, du + n * kBlock, du_row);
}

}  // namespace fastunet
