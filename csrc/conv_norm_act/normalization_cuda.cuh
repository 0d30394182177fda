// Around a convolution on CUDA GPUs: its output's statistics, and the normalisation's backward.
#pragma once

#include "common/cuda/tiling.cuh"

namespace fastunet::cuda {

// Per tile and channel the mean and the sum of squared deviations, moments: [tiles][2][C], and how
// many pixels they are of, counts: [tiles].
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    tile_moments_kernel(Map<const T> y, Tiling t, acc_t<T>* moments, acc_t<T>* counts) {
  using A = acc_t<T>;
  const Position at(t, V);
  Values<A, 2 * V + 1> mine{};
  if (at.active) {
#pragma unroll 4
    for (int64_t row = at.first; row < at.last; ++row) {
      const Values<A, V> values = load<V>(y.at(at.n, row, at.column) + at.c);
      mine[2 * V] += 1;
      const A share = A(1) / mine[2 * V];
#pragma unroll
      for (int v = 0; v < V; ++v) {  // Welford, "Note on a method for calculating corrected sums
        const A delta = values[v] - mine[v];  // of squares and products" (1962)
        mine[v] += delta * share;
        mine[V + v] += delta * (values[v] - mine[v]);
      }
    }
  }
  merge_lanes(mine, at.lane, t.lanes(), t.width, MergeMoments<A, V>{});
  if (at.lane > 0 || !at.active) return;
  for (int i = 0; i < 2; ++i) {
    Values<A, V> part;
#pragma unroll
    for (int v = 0; v < V; ++v) part[v] = mine[i * V + v];
    store<V>(moments + (at.tile * 2 + i) * y.C + at.c, part);
  }
  if (at.c == 0) store_global(counts + at.tile, mine[2 * V]);
}

// Channels that share a statistic, and how many blocks' threads see to them.
struct Groups {
  int64_t count, width;  // of groups; channels of each
  int per_block;         // groups of a block: several where they are single channels

  FASTUNET_HOST_DEVICE int64_t blocks() const { return ceil_div(count, per_block); }
};

// Vectors of values per channel; bias, gamma, beta may be null.
template <class A>
struct Vectors {
  const A *bias, *gamma, *beta;
  A *center, *scale, *shift, *var;  // [rows][C]
};

// center, scale, shift and var from the moments of a row's tiles. Blocks: rows times
// groups.blocks().
template <class A>
__global__ void __launch_bounds__(kThreads, kResident)
    finish_statistics_kernel(const A* moments, const A* counts, int64_t tiles, Groups groups, A eps,
                             Vectors<A> out) {
  const int lane = threadIdx.x / groups.per_block, lanes = kThreads / groups.per_block;
  const int64_t row = blockIdx.x / groups.blocks(), C = groups.count * groups.width;
  const int64_t group =
      blockIdx.x % groups.blocks() * groups.per_block + threadIdx.x % groups.per_block;
  const bool active = group < groups.count;
  // A convolution's bias moves a group's statistics unless the group is one channel.
  const bool biased = out.bias && groups.width > 1;
  Values<A, 3> mine{};
  if (active) {
    for (int64_t i = lane; i < tiles * groups.width; i += lanes) {
      const int64_t tile = row * tiles + i / groups.width;
      const int64_t c = group * groups.width + i % groups.width;
      Values<A, 3> one;
      one[0] = load_global(moments + tile * 2 * C + c) + (biased ? load_global(out.bias + c) : 0);
      one[1] = load_global(moments + (tile * 2 + 1) * C + c);
      one[2] = load_global(counts + tile);
      MergeMoments<A, 1>{}(mine, one);
    }
  }
  merge_lanes(mine, lane, lanes, groups.per_block, MergeMoments<A, 1>{});
  __shared__ Shared<A, 2 * kThreads> found;
  if (lane == 0) {
    found.set(2 * threadIdx.x, mine[0]);
    found.set(2 * threadIdx.x + 1, mine[2] > 0 ? mine[1] / mine[2] : A(0));
  }
  __syncthreads();
  if (!active) return;
  const A mean = found.get(2 * (threadIdx.x % groups.per_block));
  const A var = found.get(2 * (threadIdx.x % groups.per_block) + 1);
  for (int64_t k = lane; k < groups.width; k += lanes) {
    const int64_t c = group * groups.width + k, to = row * C + c;
    const A gamma = out.gamma ? load_global(out.gamma + c) : A(1);
    store_global(out.center + to, mean - (biased ? load_global(out.bias + c) : A(0)));
    store_global(out.scale + to, gamma / sqrt(var + eps));
    store_global(out.shift + to, out.beta ? load_global(out.beta + c) : A(0));
    store_global(out.var + to, var);
  }
}

// What the normalisation's backward needs per channel, [rows][C]:
// dy_total = dy + slope * (y - center) + offset. dscale and dshift may be null.
template <class A>
struct BackwardVectors {
  const A *dscale, *dshift, *scale, *var;
  A *slope, *offset;
  A *dgamma, *dbeta;  // [C]
};

// A thread for every row and group, then one for every channel. count: values per statistic.
template <class A>
__global__ void __launch_bounds__(kThreads, kResident)
    normalization_bwd_terms_kernel(BackwardVectors<A> v, Groups groups, int64_t rows, A count,
                                   A eps) {
  const int64_t C = groups.count * groups.width;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t statistics = rows * groups.count;
  if (i < statistics) {
    const int64_t first = i * groups.width;  // rows of C, groups side by side
    A of_scale = 0, of_shift = 0;
    for (int64_t k = first; k < first + groups.width; ++k) {
      const A scale = load_global(v.scale + k);
      if (v.dscale) of_scale += scale * load_global(v.dscale + k);
      if (v.dshift) of_shift += scale * load_global(v.dshift + k);
    }
    const A slope = -of_scale / ((load_global(v.var + first) + eps) * count);
    for (int64_t k = first; k < first + groups.width; ++k) {
      store_global(v.slope + k, slope);
      store_global(v.offset + k, -of_shift / count);
    }
  } else if (i < statistics + C) {
    const int64_t c = i - statistics;
    A dgamma = 0, dbeta = 0;
    for (int64_t k = c; k < rows * C; k += C) {
      if (v.dscale) dgamma += load_global(v.dscale + k) / sqrt(load_global(v.var + k) + eps);
      if (v.dshift) dbeta += load_global(v.dshift + k);
    }
    store_global(v.dgamma + c, dgamma);
    store_global(v.dbeta + c, dbeta);
  }
}

// The gradient of y. terms: y with slope and offset as scale and shift; dy without data for zero.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    normalization_bwd_apply_kernel(Source<T> terms, Map<const T> dy, Map<T> out, Tiling t) {
  const Position at(t, V);
  if (!at.active) return;
  const Channels<T, V> channel(terms, at.n, at.c);
#pragma unroll 4
  for (int64_t row = at.first; row < at.last; ++row) {
    Values<acc_t<T>, V> total = load<V>(terms.y.at(at.n, row, at.column) + at.c), grad{};
    if (dy.data) grad = load<V>(dy.at(at.n, row, at.column) + at.c);
#pragma unroll
    for (int v = 0; v < V; ++v) total[v] = channel.preact(v, total[v]) + grad[v];
    store<V>(out.at(at.n, row, at.column) + at.c, total);
  }
}

}  // namespace fastunet::cuda
