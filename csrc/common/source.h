// Views of channels-last maps, and the pending affine and activation of a source.
#pragma once

#include "common/require.h"
#include "common/vec.h"

namespace fastunet {

// [N, C, H, W] with channels adjacent; strides in elements. A map may be a channel slice of a
// wider one, so the pixel stride `sw` can exceed C.
template <class T>
struct Map {
  T* data;
  int64_t N, C, H, W;
  int64_t sn, sh, sw;

  T* at(int64_t n, int64_t h, int64_t w = 0) const { return data + n * sn + h * sh + w * sw; }
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

// The values of one group of channels of a source, in registers.
template <class A>
struct Channels {
  vec<A> center, scale, shift, slope;

  template <class T>
  FASTUNET_INLINE Channels(const Source<T>& s, int64_t n, int64_t c, int lanes)
      : center(load(s.center + n * s.row_stride + c, lanes)),
        scale(load(s.scale + n * s.row_stride + c, lanes)),
        shift(load(s.shift + n * s.row_stride + c, lanes)),
        slope(splat(s.slope)) {}

  FASTUNET_INLINE vec<A> preact(vec<A> y) const { return scale * (y - center) + shift; }

  // A zero slope gives an exact zero, also for -inf; NaN stays NaN.
  FASTUNET_INLINE vec<A> act(vec<A> t) const {
    const vec<A> negative = slope == 0 ? vec<A>{} : t * slope;
    return t < 0 ? negative : t;
  }

  FASTUNET_INLINE vec<A> operator()(vec<A> y) const { return act(preact(y)); }

  // The gradient with respect to the pre-activation t, from the one with respect to act(t).
  FASTUNET_INLINE vec<A> act_bwd(vec<A> dz, vec<A> t) const {
    return t <= 0 ? (slope == 0 ? vec<A>{} : dz * slope) : dz;
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

}  // namespace fastunet
