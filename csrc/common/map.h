// Views of channels-last maps and of sources: plain structures, for kernels on any device.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define FASTUNET_HOST_DEVICE __host__ __device__
#else
#define FASTUNET_HOST_DEVICE
#endif

namespace fastunet {

// The type of arithmetic and of values per channel, for maps of T.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// [N, C, H, W] with channels adjacent; strides in elements. A map may be a channel slice of a
// wider one, so the pixel stride `sw` can exceed C.
template <class T>
struct Map {
  T* data;
  int64_t N, C, H, W;
  int64_t sn, sh, sw;

  FASTUNET_HOST_DEVICE T* at(int64_t n, int64_t h, int64_t w = 0) const {
    return data + n * sn + h * sh + w * sw;
  }
  FASTUNET_HOST_DEVICE bool has(int64_t h, int64_t w) const {
    return h >= 0 && h < H && w >= 0 && w < W;
  }
  Map<const T> read_only() const { return {data, N, C, H, W, sn, sh, sw}; }
};

// A map without gaps between pixels.
template <class T>
Map<T> dense(T* data, int64_t N, int64_t C, int64_t H, int64_t W) {
  return {data, N, C, H, W, H * W * C, W * C, C};
}

// z = act(scale * (y - center) + shift), one row of C values per sample or one for all;
// the activation multiplies negative values by `slope` (0: ReLU, 1: none).
template <class T>
struct Source {
  using A = acc_t<T>;
  Map<const T> y;
  const A* center;
  const A* scale;
  const A* shift;
  int64_t row_stride;  // 0: one row for all samples
  A slope;
};

FASTUNET_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTUNET_HOST_DEVICE inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

}  // namespace fastunet
