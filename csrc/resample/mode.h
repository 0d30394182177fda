// The pending resampling of a source, and where its result lies.
#pragma once

#include <algorithm>

#include "common/map.h"
#include "common/require.h"

namespace fastunet {

enum class Mode : int64_t { none, max_pool, bilinear, bilinear_align_corners, nearest };

inline Mode checked_mode(int64_t mode) {
  require(mode >= 0 && mode <= static_cast<int64_t>(Mode::nearest), "unknown resample mode ", mode);
  return static_cast<Mode>(mode);
}

// Pixel i of an axis of the resampled map reads pixels of the source around i * times / over.
struct Stride {
  int64_t times, over;
};
inline Stride stride_of(Mode mode) {
  return {mode == Mode::max_pool ? 2 : 1, mode == Mode::none || mode == Mode::max_pool ? 1 : 2};
}

// Where the resampled map lies within the output: centred, padded with zeros or cropped.
// `H`, `W` is the resampled size; pixel (h, w) of it is output pixel (h + top, w + left).
struct Placement {
  int64_t H, W, top, left;

  Placement(Mode mode, int64_t h, int64_t w, int64_t out_h, int64_t out_w) {
    H = mode == Mode::none ? h : mode == Mode::max_pool ? h / 2 : 2 * h;
    W = mode == Mode::none ? w : mode == Mode::max_pool ? w / 2 : 2 * w;
    top = floor_div(out_h - H, 2);
    left = floor_div(out_w - W, 2);
  }
  // The part of the resampled map that is inside the output.
  int64_t w_begin() const { return std::max<int64_t>(0, -left); }
  int64_t w_end(int64_t out_w) const { return std::clamp<int64_t>(out_w - left, w_begin(), W); }
  bool has_row(int64_t h, int64_t out_h) const { return h + top >= 0 && h + top < out_h; }
};

}  // namespace fastunet
