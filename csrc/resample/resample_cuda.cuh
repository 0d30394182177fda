// resample on CUDA GPUs: a source's pending work materialised, and its backward as a gather. One
// pass each over memory; sums in two stages, in a fixed order.
#pragma once

#include "common/cuda/tiling.cuh"
#include "resample/mode.h"

namespace fastunet::cuda {

// One axis of bilinear x2 upsampling, exactly: output d lies at position(d) / unit of the input.
struct Axis {
  int64_t size, step, bias, unit;  // size: of the input

  static Axis of(Mode mode, int64_t size) {
    if (mode == Mode::bilinear_align_corners) return {size, size - 1, 0, 2 * size - 1};
    return {size, 2, 1, 4};
  }

  __device__ int64_t position(int64_t d) const {
    const int64_t at = step * d - bias, last = (size - 1) * unit;
    return at < 0 ? 0 : at > last ? last : at;
  }

  // The outputs 2 i - 1 and 2 i lie between inputs low(i) and high(i).
  __device__ int64_t low(int64_t i) const { return i > 0 ? i - 1 : 0; }
  __device__ int64_t high(int64_t i) const { return low(i) + 1 < size ? low(i) + 1 : size - 1; }

  // Of input high(i) in output d. Past the last input both are the same.
  template <class A>
  __device__ A weight(int64_t d, int64_t i) const {
    return static_cast<A>(step * d - bias < 0 ? 0 : step * d - bias - low(i) * unit) /
           static_cast<A>(unit);
  }

  // Of input i in output d.
  template <class A>
  __device__ A part(int64_t d, int64_t i) const {
    if (d < 0 || d >= 2 * size) return 0;
    const int64_t away = position(d) - i * unit;
    const int64_t rest = unit - (away < 0 ? -away : away);
    return rest > 0 ? static_cast<A>(rest) / static_cast<A>(unit) : A(0);
  }
};

// How output pixels are grouped: pixels as such, or the 2x2 windows that upsampling makes of the
// same input pixels; bilinear windows begin at an odd pixel of the upsampled map.
template <Mode M>
inline constexpr int kWindow = M == Mode::bilinear || M == Mode::nearest ? 2 : 1;
template <Mode M>
inline constexpr int kOffset = M == Mode::bilinear ? 1 : 0;

// The first window that reaches into the output, and how many there are, along one axis.
template <Mode M>
struct Windows {
  int64_t first, count;

  Windows(int64_t begin, int64_t out) {  // begin: of the resampled map within the output
    first = floor_div(kOffset<M> - begin, kWindow<M>);
    count = floor_div(out - 1 - begin + kOffset<M>, kWindow<M>) - first + 1;
  }
};

// M: none, max_pool, nearest, or bilinear for both ways of that.
template <Mode M, class T, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    resample_kernel(Source<T> s, Map<T> out, Placement place, Windows<M> down, Windows<M> across,
                    Axis vertical, Axis horizontal, Tiling t) {
  using A = acc_t<T>;
  using Vector = Values<A, V>;
  const Position at(t, V);
  if (!at.active) return;
  const Channels<T, V> channel(s, at.n, at.c);
  const auto z = [&](int64_t h, int64_t w) { return channel(load<V>(s.y.at(at.n, h, w) + at.c)); };
  const auto put = [&](int64_t h, int64_t w, const Vector& values) {
    h += place.top, w += place.left;
    if (out.has(h, w)) store<V>(out.at(at.n, h, w) + at.c, values);
  };
  const int64_t j = across.first + at.column;

  if constexpr (M == Mode::bilinear) {
    const int64_t left = horizontal.low(j), right = horizontal.high(j);
    const bool known = j >= 0 && j <= horizontal.size;
    Vector corners[2][2];  // rows low and high, columns left and right
    int64_t low_row = -1, high_row = -1;
    for (int64_t row = at.first; row < at.last; ++row) {
      const int64_t i = down.first + row;
      const bool inside = known && i >= 0 && i <= vertical.size;
      if (inside) {
        const int64_t low = vertical.low(i), high = vertical.high(i);
        if (low == high_row && low != low_row) {  // the walk goes down
          corners[0][0] = corners[1][0];
          corners[0][1] = corners[1][1];
        } else if (low != low_row) {
          corners[0][0] = z(low, left);
          corners[0][1] = z(low, right);
        }
        low_row = low;
        if (high != high_row) {
          corners[1][0] = z(high, left);
          corners[1][1] = z(high, right);
        }
        high_row = high;
      }
      for (int k = 0; k < 4; ++k) {
        const int64_t h = 2 * i - 1 + k / 2, w = 2 * j - 1 + k % 2;
        Vector value{};
        if (inside && h >= 0 && h < place.H && w >= 0 && w < place.W) {
          // Products as in PyTorch, not a + weight * (b - a): Inf - Inf would be NaN.
          const A y = vertical.weight<A>(h, i), x = horizontal.weight<A>(w, j);
#pragma unroll
          for (int v = 0; v < V; ++v)
            value[v] = (1 - y) * ((1 - x) * corners[0][0][v] + x * corners[0][1][v]) +
                       y * ((1 - x) * corners[1][0][v] + x * corners[1][1][v]);
        }
        put(h, w, value);
      }
    }
  } else {
    constexpr int unroll = M == Mode::none ? 4 : 1;  // rows whose loads run ahead
#pragma unroll unroll
    for (int64_t row = at.first; row < at.last; ++row) {
      const int64_t i = down.first + row;
      Vector value{};
      if constexpr (M == Mode::max_pool) {
        if (i >= 0 && i < place.H && j >= 0 && j < place.W) {
          value = z(2 * i, 2 * j);
#pragma unroll
          for (int k = 1; k < 4; ++k) {
            const Vector other = z(2 * i + k / 2, 2 * j + k % 2);
#pragma unroll
            for (int v = 0; v < V; ++v)
              if (other[v] > value[v] || other[v] != other[v]) value[v] = other[v];
          }
        }
      } else {
        if (s.y.has(i, j)) value = z(i, j);
      }
      for (int k = 0; k < kWindow<M> * kWindow<M>; ++k)
        put(kWindow<M> * i + k / 2, kWindow<M> * j + k % 2, value);
    }
  }
}

// One unit's gradient stored, and its part of the sums [2][V], of g * (y - center) and of g.
template <class T, int V>
__device__ void finish_grad(const Channels<T, V>& channel, const Values<acc_t<T>, V>& y,
                            Values<acc_t<T>, V> grad, T* dy, Values<acc_t<T>, 2 * V>& sums) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const acc_t<T> g = channel.act_bwd(grad[v], channel.preact(v, y[v]));
    sums[v] += g * (y[v] - channel.center[v]);
    sums[V + v] += g;
    grad[v] = channel.scale[v] * g;
  }
  store<V>(dy, grad);
}

// dz: of the resampled and placed map. z: where that map itself is wanted too, else without data;
// only where nothing is upsampled or placed. sums: [tiles][2][C], or null.
template <Mode M, class T, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    resample_bwd_kernel(Source<T> s, Map<const T> dz, Map<T> dy, Map<T> z, acc_t<T>* sums,
                        Placement place, Axis vertical, Axis horizontal, Tiling t) {
  using A = acc_t<T>;
  using Vector = Values<A, V>;
  const Position at(t, V);
  Values<A, 2 * V> mine{};
  if (at.active) {
    const Channels<T, V> channel(s, at.n, at.c);
    const int64_t j = at.column;
    const auto raw = [&](int64_t h, int64_t w) { return load<V>(s.y.at(at.n, h, w) + at.c); };
    // 0 where it is cropped away
    const auto read_grad = [&](int64_t h, int64_t w) {
      h += place.top, w += place.left;
      return dz.has(h, w) ? load<V>(dz.at(at.n, h, w) + at.c) : Vector{};
    };
    const auto finish = [&](int64_t h, int64_t w, const Vector& y, const Vector& grad) {
      finish_grad<T, V>(channel, y, grad, dy.at(at.n, h, w) + at.c, mine);
    };

    if constexpr (M == Mode::max_pool) {
      for (int64_t i = at.first; i < at.last; ++i) {
        const bool whole = i < place.H && j < place.W;
        Vector grad{};
        if (whole) grad = read_grad(i, j);
        Vector best{};
        unsigned winners = 0;  // two bits each
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int64_t h = 2 * i + k / 2, w = 2 * j + k % 2;
          if (!s.y.has(h, w)) continue;
          const Vector value = channel(raw(h, w));
#pragma unroll
          for (int v = 0; v < V; ++v) {
            // NaN wins, as in PyTorch; of equal values the first.
            if (k == 0 || value[v] > best[v] || value[v] != value[v]) {
              best[v] = value[v];
              winners = (winners & ~(3u << 2 * v)) | static_cast<unsigned>(k) << 2 * v;
            }
          }
        }
        if (whole && z.data) store<V>(z.at(at.n, i, j) + at.c, best);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int64_t h = 2 * i + k / 2, w = 2 * j + k % 2;
          if (!s.y.has(h, w)) continue;
          Vector won;
#pragma unroll
          for (int v = 0; v < V; ++v)
            won[v] = static_cast<int>(winners >> 2 * v & 3) == k ? grad[v] : A(0);
          finish(h, w, raw(h, w), won);
        }
      }
    } else if constexpr (M == Mode::bilinear) {
      A parts[4];  // of column j in the output's columns 2 j - 1 ... 2 j + 2
#pragma unroll
      for (int k = 0; k < 4; ++k) parts[k] = horizontal.part<A>(2 * j - 1 + k, j);
      // What row d of the output sends to column j.
      const auto sent = [&](int64_t d) {
        Vector sum{};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (parts[k] == 0) continue;
          const Vector grad = read_grad(d, 2 * j - 1 + k);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += parts[k] * grad[v];
        }
        return sum;
      };
      // Rows 2 i - 1 to 2 i + 2 of the output are made of row i; the last two of row i + 1 as well.
      Vector grad{}, next{};
      const auto add = [&](Vector& to, A part, const Vector& row) {
#pragma unroll
        for (int v = 0; v < V; ++v) to[v] += part * row[v];
      };
      for (int64_t i = at.first; i < at.last; ++i) {
        for (int64_t d = i == at.first ? 2 * i - 1 : 2 * i + 1; d <= 2 * i + 2; ++d) {
          if (d < 0 || d >= place.H) continue;
          const Vector row = sent(d);
          add(grad, vertical.part<A>(d, i), row);
          add(next, vertical.part<A>(d, i + 1), row);
        }
        finish(i, j, raw(i, j), grad);
        grad = next;
        next = Vector{};
      }
    } else {
      constexpr int unroll = M == Mode::none ? 4 : 1;
#pragma unroll unroll
      for (int64_t i = at.first; i < at.last; ++i) {
        const Vector y = raw(i, j);
        Vector grad{};
#pragma unroll 2
        for (int k = 0; k < kWindow<M> * kWindow<M>; ++k) {
          const Vector one = read_grad(kWindow<M> * i + k / 2, kWindow<M> * j + k % 2);
#pragma unroll
          for (int v = 0; v < V; ++v) grad[v] += one[v];
        }
        if (z.data) store<V>(z.at(at.n, i, j) + at.c, channel(y));
        finish(i, j, y, grad);
      }
    }
  }
  if (!sums) return;
  add_lanes(mine, at.lane, t.lanes(), t.width);
  if (at.lane > 0 || !at.active) return;
  const int64_t C = s.y.C;
  A* to = sums + at.tile * 2 * C + at.c;
  for (int i = 0; i < 2; ++i) {
    Vector part;
#pragma unroll
    for (int v = 0; v < V; ++v) part[v] = mine[i * V + v];
    store<V>(to + i * C, part);
  }
}

// sums: [rows * tiles][2][C] -> dscale, dshift: [rows][C]. Blocks: rows times 2 C / kSets.
inline constexpr int kSets = 8;  // columns of a block; as many lanes as remain

template <class A>
__global__ void __launch_bounds__(kThreads, kResident)
    sum_tiles_kernel(const A* sums, int64_t tiles, int64_t C, A* dscale, A* dshift) {
  const int lane = threadIdx.x / kSets, lanes = kThreads / kSets;
  const int64_t blocks = ceil_div(2 * C, kSets), row = blockIdx.x / blocks;
  const int64_t column = blockIdx.x % blocks * kSets + threadIdx.x % kSets;
  Values<A, 1> sum{};
  if (column < 2 * C)
    for (int64_t tile = lane; tile < tiles; tile += lanes)
      sum[0] += load_global(sums + (row * tiles + tile) * 2 * C + column);
  add_lanes(sum, lane, lanes, kSets);
  if (lane > 0 || column >= 2 * C) return;
  A* to = column < C ? dscale + row * C + column : dshift + row * C + column - C;
  store_global(to, sum[0]);
}

}  // namespace fastunet::cuda
