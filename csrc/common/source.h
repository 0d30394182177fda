// The pending affine and activation of a source, by vectors of channels.
#pragma once

#include "common/map.h"
#include "common/vec.h"

namespace fastunet {

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

}  // namespace fastunet
