// What the CUDA kernels share: vectors of channels in registers, and a source's affine.
//
// Kernels take maps whose channels are adjacent. A thread handles V channels of a pixel: 16 bytes
// where the layout allows that, else one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/map.h"

namespace fastunet::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

inline constexpr int kThreads = 256;  // of every block
inline constexpr int kResident = 2;   // blocks of a multiprocessor at least: up to 128 registers

#ifndef FASTUNET_HOST_CUDA  // which checks all three
// A block's memory. Every access counts: races, bounds and unset values are found on the host.
template <class T, int N>
struct Shared {
  T values[N];
  __device__ void set(int i, T value) { values[i] = value; }
  __device__ T get(int i) const { return values[i]; }
};
template <class P>
__device__ P load_global(const P* p) {
  return __ldg(p);
}
template <class P>
__device__ void store_global(P* p, const P& value) {
  __stwb(p, value);  // an assignment may be split
}
#endif

// From storage to the type of arithmetic, and back by rounding to nearest even.
template <class T>
__device__ acc_t<T> widen(T value) {
  if constexpr (std::is_same_v<T, bf16>)
    return __bfloat162float(value);
  else if constexpr (std::is_same_v<T, f16>)
    return __half2float(value);
  else
    return value;
}

template <class T>
__device__ T narrow(acc_t<T> value) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(value);
  else if constexpr (std::is_same_v<T, f16>)
    return __float2half_rn(value);
  else
    return value;
}

// V values in the type of arithmetic.
template <class A, int V>
struct Values {
  A v[V];
  __device__ A& operator[](int i) { return v[i]; }
  __device__ A operator[](int i) const { return v[i]; }
};

template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T v[V];
};

// Accesses by 16 bytes at most, and by one element where V is 1.
template <int V, class T>
__device__ Values<acc_t<T>, V> load(const T* p) {
  Values<acc_t<T>, V> out;
  constexpr int W = V * sizeof(T) <= 16 ? V : 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < V; i += W) {
    if constexpr (W == 1) {
      out[i] = widen(load_global(p + i));
    } else {
      const uint4 raw = load_global(reinterpret_cast<const uint4*>(p + i));
      const auto& pack = reinterpret_cast<const Pack<T, W>&>(raw);
#pragma unroll
      for (int j = 0; j < W; ++j) out[i + j] = widen(pack.v[j]);
    }
  }
  return out;
}

template <int V, class T>
__device__ void store(T* p, const Values<acc_t<T>, V>& values) {
  constexpr int W = V * sizeof(T) <= 16 ? V : 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < V; i += W) {
    Pack<T, W> pack;
#pragma unroll
    for (int j = 0; j < W; ++j) pack.v[j] = narrow<T>(values[i + j]);
    if constexpr (W == 1)
      store_global(p + i, pack.v[0]);
    else
      store_global(reinterpret_cast<uint4*>(p + i), reinterpret_cast<const uint4&>(pack));
  }
}

// A source's V channels from c on.
template <class T, int V>
struct Channels {
  using A = acc_t<T>;
  Values<A, V> center{}, scale, shift{};
  A slope;

  __device__ Channels(const Source<T>& s, int64_t n, int64_t c) : slope(s.slope) {
    if (s.scale) {
      center = load<V>(s.center + n * s.row_stride + c);
      scale = load<V>(s.scale + n * s.row_stride + c);
      shift = load<V>(s.shift + n * s.row_stride + c);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) scale[i] = 1;
    }
  }

  __device__ A preact(int i, A y) const { return scale[i] * (y - center[i]) + shift[i]; }

  // A zero slope gives an exact zero, also for -inf; NaN stays NaN.
  __device__ A act(A t) const { return t < 0 ? (slope == 0 ? A(0) : slope * t) : t; }

  // The gradient of the pre-activation t, from that of act(t).
  __device__ A act_bwd(A dz, A t) const { return t <= 0 ? (slope == 0 ? A(0) : slope * dz) : dz; }

  __device__ Values<A, V> operator()(Values<A, V> y) const {
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = act(preact(i, y[i]));
    return y;
  }
};

}  // namespace fastunet::cuda
