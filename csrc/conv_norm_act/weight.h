// 3x3 weights, [O, I, 3, 3], between their layout and Winograd's domain.
#pragma once

#include <algorithm>
#include <utility>

#include "common/gemm.h"
#include "common/transpose.h"
#include "conv_norm_act/winograd.h"

namespace fastunet {

inline constexpr int kTaps = 9;

// As a convolution of K input and N output channels reads them: weights[o][i], the taps adjacent,
// or turned around (k = o, n = i, taps reversed), which gives the input's gradient. The outputs may
// be those of two sources side by side, the first having `split`: each begins a block of its own.
struct Weight {
  const float* data;
  int64_t K, N, k_stride, n_stride;
  bool turned;
  int64_t split = 0;

  int64_t blocks() const { return blocks_of(split) + blocks_of(N - split); }
  // Of a block, the first output and the one behind the last.
  std::pair<int64_t, int64_t> outputs_of(int64_t block) const {
    const bool second = block >= blocks_of(split);
    const int64_t first = second ? split + (block - blocks_of(split)) * kBlock : block * kBlock;
    return {first, std::min(first + kBlock, second ? N : split)};
  }
};

// taps[t][i] = from[i * stride + t] for `count` channels i of a block.
FASTUNET_INLINE void gather_taps(const float* from, int64_t stride, int64_t count, float* taps) {
  if (count >= kBlock) {
    for (int i = 0; i < kBlock; i += 4, from += 4 * stride) {
      for (int t = 0; t < 8; t += 4) transpose_4x4(from + t, stride, taps + t * kBlock + i, kBlock);
      for (int j = 0; j < 4; ++j) taps[8 * kBlock + i + j] = from[j * stride + 8];
    }
    return;
  }
  for (int64_t i = 0; i < std::min<int64_t>(count, kBlock); ++i)
    for (int t = 0; t < kTaps; ++t) taps[t * kBlock + i] = from[i * stride + t];
}

// And back: to[i * stride + q] = taps[q][i] for q < row, the taps of all inputs. Four channels at a
// time, chunk by chunk: sixteen may be a power of two apart, in the same sets of a cache.
inline void scatter_taps(const float* taps, int64_t row, int64_t stride, int64_t count, float* to) {
  constexpr int64_t kChunk = 256;
  count = std::min<int64_t>(count, kBlock);
  const int64_t whole = count / 4 * 4;
  for (int64_t first = 0; first < row; first += kChunk) {
    const int64_t last = std::min(first + kChunk, row), even = last / 4 * 4;
    for (int64_t i = 0; i < whole; i += 4)
      for (int64_t q = first; q < even; q += 4)
        transpose_4x4(taps + q * kBlock + i, kBlock, to + i * stride + q, stride);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t q = i < whole ? even : first; q < last; ++q)
        to[i * stride + q] = taps[q * kBlock + i];
  }
}

// u[point][k - begin][16] for inputs [begin, end) and one block of outputs; points `plane` apart.
template <int kTile>
void transform_weight(const Weight& w, int64_t begin, int64_t end, int64_t block, float* u,
                      int64_t plane) {
  const auto [first, last] = w.outputs_of(block);
  alignas(64) float taps[kTaps * kBlock] = {};
  for (int64_t k = begin; k < end; ++k, u += kBlock) {
    gather_taps(w.data + k * w.k_stride + first * w.n_stride, w.n_stride, last - first, taps);
    for (int c = 0; c < kBlock; c += kLanes)
      transform_square<WeightTransform<kTile>>(
          [&](int i, int j) {
            const int t = i * 3 + j;
            return load(taps + (w.turned ? kTaps - 1 - t : t) * kBlock + c);
          },
          [&](int i, int j, vfloat value) {
            store(u + (i * patch_of(kTile) + j) * plane + c, value);
          });
  }
}

}  // namespace fastunet
