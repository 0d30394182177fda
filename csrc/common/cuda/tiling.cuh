// How the threads of a kernel share a map, and how they add up.
#pragma once

#include <algorithm>

#include "common/cuda/device.cuh"

namespace fastunet::cuda {

// A thread takes one vector of channels of one column of units (pixels, or windows of them) and
// walks down a strip of rows. Next to it is the next vector, then the next column: a warp's
// accesses are adjacent. Depends on shapes alone, so sums are the same on every GPU.
struct Tiling {
  int64_t rows, columns;  // of units, in a sample
  int64_t strip;          // rows that a thread walks
  int64_t tiles;          // blocks that share a sample's pixels
  int vectors;            // of a unit
  int width;              // vectors that a block handles
  int channel_blocks;

  FASTUNET_HOST_DEVICE int lanes() const { return kThreads / width; }
  int64_t blocks(int64_t samples) const { return samples * tiles * channel_blocks; }
};

inline Tiling tiling(int64_t samples, int64_t rows, int64_t columns, int64_t channels, int V) {
  constexpr int64_t kMostWidth = 64, kBlocks = 2048, kMostRows = 64;
  Tiling t;
  t.rows = rows;
  t.columns = columns;
  t.vectors = static_cast<int>(ceil_div(channels, V));
  t.channel_blocks = static_cast<int>(ceil_div(t.vectors, kMostWidth));
  t.width = static_cast<int>(ceil_div(t.vectors, t.channel_blocks));
  const int64_t threads = samples * rows * columns * t.vectors;  // with a row each
  t.strip = std::clamp<int64_t>(threads / (kThreads * kBlocks), 1, std::min(kMostRows, rows));
  t.tiles = ceil_div(ceil_div(rows, t.strip) * columns, t.lanes());
  return t;
}

// What a thread has to do. Threads without anything still meet at barriers.
struct Position {
  int64_t n, column, first, last;  // rows [first, last)
  int64_t tile;                    // counted through the samples
  int64_t c;                       // first channel
  int lane;
  bool active;

  __device__ Position(const Tiling& t, int V) {
    const int64_t block = blockIdx.x;
    const int vector = threadIdx.x % t.width + static_cast<int>(block % t.channel_blocks) * t.width;
    tile = block / t.channel_blocks;
    n = tile / t.tiles;
    lane = threadIdx.x / t.width;
    const int64_t unit = tile % t.tiles * t.lanes() + lane;
    column = unit % t.columns;
    first = unit / t.columns * t.strip;
    last = first + t.strip < t.rows ? first + t.strip : t.rows;
    c = static_cast<int64_t>(vector) * V;
    active = lane < t.lanes() && vector < t.vectors && first < t.rows;
  }
};

// Merges the values of a block's lanes in a fixed order; the result is that of lane 0. Threads are
// numbered lane * width + i, those of the same i merge: merge(mine, other's) each time. All
// threads of the block call it, those beyond the last lane too.
template <class A, int M, class Merge>
__device__ void merge_lanes(Values<A, M>& mine, int lane, int lanes, int width, Merge merge) {
  __shared__ Shared<A, M * kThreads> shared;
  const int thread = threadIdx.x;
  for (int n = lanes; n > 1;) {
    const int half = (n + 1) / 2;
    if (lane >= half && lane < n)
      for (int i = 0; i < M; ++i) shared.set(i * kThreads + thread, mine[i]);
    __syncthreads();
    if (lane + half < n) {
      Values<A, M> other;
      for (int i = 0; i < M; ++i) other[i] = shared.get(i * kThreads + thread + half * width);
      merge(mine, other);
    }
    n = half;
  }
}

template <class A, int M>
__device__ void add_lanes(Values<A, M>& mine, int lane, int lanes, int width) {
  merge_lanes(mine, lane, lanes, width, [](Values<A, M>& a, const Values<A, M>& b) {
    for (int i = 0; i < M; ++i) a[i] += b[i];
  });
}

// Count, mean and sum of squared deviations of M values each, merged as in Chan, Golub, LeVeque,
// "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
template <class A, int M>
struct MergeMoments {
  __device__ void operator()(Values<A, 2 * M + 1>& a, const Values<A, 2 * M + 1>& b) const {
    const A total = a[2 * M] + b[2 * M];
    if (b[2 * M] == 0) return;
    const A share = b[2 * M] / total, weight = a[2 * M] * share;
    for (int i = 0; i < M; ++i) {
      const A delta = b[i] - a[i];
      a[i] += delta * share;
      a[M + i] += b[M + i] + delta * delta * weight;
    }
    a[2 * M] = total;
  }
};

}  // namespace fastunet::cuda
