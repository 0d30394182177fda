// 3x3 weights, [O, I, 3, 3], between their layout and Winograd's domain.
#pragma once

#include <algorithm>
#include <utility>

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/transpose.h"
#include "conv_norm_act/winograd.h"

namespace fastunet {

inline constexpr int kTaps = 9;
inline constexpr int kTurnedAhead = 4;  // inputs

// As a convolution of K input and N output channels reads them: weights[o][i], the taps adjacent,
// or turned around (k = o, n = i, taps reversed), which gives the input's gradient. The outputs may
// be those of two sources side by side, the first having `split`: each begins a block of its own.
struct Weight {
  const float* data;
  int64_t K, N, k_stride, n_stride;
  bool turned;
  int64_t split = 0;

  int64_t blocks() const { return blocks_of(split) + blocks_of(N - split); }
  // Of a block, the first output, and how many there are up to the source's end.
  std::pair<int64_t, int64_t> outputs_of(int64_t block) const {
    const bool second = block >= blocks_of(split);
    const int64_t first = second ? split + (block - blocks_of(split)) * kBlock : block * kBlock;
    return {first, (second ? N : split) - first};
  }
};

// The taps of kLanes channels, taps[t][i] = from[i * stride + t]; zero from `count` on.
FASTUNET_INLINE void gather_taps(const float* from, int64_t stride, int64_t count, vfloat* taps) {
  if (count >= kLanes) {
    vfloat last[8];
    transpose_8(from, stride, taps);
    transpose_8(from + kTaps - 8, stride, last);
    taps[8] = last[7];
    return;
  }
  alignas(vfloat) float lanes[kTaps][kLanes] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int t = 0; t < kTaps; ++t) lanes[t][i] = from[i * stride + t];
  for (int t = 0; t < kTaps; ++t) taps[t] = load(lanes[t]);
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
template <int kTile, bool kTurned>
void transform_weight(const Weight& w, int64_t begin, int64_t end, int64_t block, float* u,
                      int64_t plane) {
  const auto [first, count] = w.outputs_of(block);
  const float* from = w.data + begin * w.k_stride + first * w.n_stride;
  for (int64_t k = begin; k < end; ++k, from += w.k_stride, u += kBlock) {
    // The taps of an input's outputs lie side by side if turned, input by input in another page.
    if (kTurned) prefetch(reinterpret_cast<const char*>(from + kTurnedAhead * w.k_stride), kTaps);
    for (int c = 0; c < kBlock; c += kLanes) {
      vfloat taps[kTaps];
      gather_taps(from + c * w.n_stride, w.n_stride, count - c, taps);
      transform_square<WeightTransform<kTile>>(
          [&](int i, int j) { return taps[kTurned ? kTaps - 1 - (i * 3 + j) : i * 3 + j]; },
          [=](int i, int j, vfloat value) {
            store(u + (i * patch_of(kTile) + j) * plane + c, value);
          });
    }
  }
}

// A weight in Winograd's domain: for kBlocks blocks of outputs (fewer at last) after another,
// [points][blocks][K][16], with a line behind each point, as in Panels.
template <int kTile, class F>
struct PackedWeight {
  F* data;
  int64_t K, blocks;

  static int64_t floats(int64_t K, int64_t blocks) {
    return ceil_div(blocks, kBlocks) * floats_before(K);
  }
  // Of the blocks from n on, a multiple of kBlocks.
  F* at(int64_t point, int64_t n) const {
    return data + n / kBlocks * floats_before(K) + point * plane(n);
  }
  int64_t plane(int64_t n) const {
    return std::min<int64_t>(kBlocks, blocks - n) * block() + kBlock;
  }
  int64_t block() const { return K * kBlock; }

  // The blocks from n on, and inputs from k on.
  Operand<F> part(int64_t n, int64_t k) const { return {at(0, n) + k * kBlock, block(), plane(n)}; }

 private:
  static int64_t floats_before(int64_t K) {
    return points_of(kTile) * (kBlocks * K * kBlock + kBlock);
  }
};

// Block b of all of it, from inputs [begin, begin + K) of w and its block `first + b`.
template <int kTile>
void transform_block(const Weight& w, int64_t begin, int64_t first, int64_t b,
                     const PackedWeight<kTile, float>& to) {
  const int64_t n = b / kBlocks * kBlocks;
  const auto transform = w.turned ? transform_weight<kTile, true> : transform_weight<kTile, false>;
  transform(w, begin, begin + to.K, first + b, to.at(0, n) + (b - n) * to.block(), to.plane(n));
}

template <int kTile>
void transform_whole(const Weight& w, const PackedWeight<kTile, float>& to) {
  parallel_tasks(to.blocks, [&](int64_t b) { transform_block<kTile>(w, 0, 0, b, to); });
}

}  // namespace fastunet
