// What a convolution reads: sources with their pending work.
#pragma once

#include "resample/resample_cpu.h"

namespace fastunet {

// What the values of a source's map are: themselves; raw outputs with a pending affine and
// activation; or the gradient of a raw output without the normalisation's part, `raw` being the
// output and the source's affine that part: value + (scale * (raw - center) + shift).
enum class Load { plain, affine, normalization_bwd };

// A source and its pending resampling.
template <class T>
struct Pending {
  Source<T> source;
  Mode mode;
  Load load;
  const T* raw;  // laid out as the source's map; null but for normalization_bwd
  UpsampleTaps<acc_t<T>> taps;

  Pending(const Source<T>& s, Mode mode, Load load, const T* raw = nullptr)
      : source(s), mode(mode), load(load), raw(raw), taps(mode, s.y.H, s.y.W) {}
};

// What a convolution reads: sources side by side in the channels, each resampled to H x W.
template <class T>
struct Input {
  std::vector<Pending<T>> sources;
  int64_t N, H, W, C;
};

// What reads a pending source, or channels of it (`part`), as an H x W map.
template <class T>
Resample<T> resample_of(const Pending<T>& p, const Source<T>& part, int64_t H, int64_t W) {
  return {part, H, W, p.mode, p.taps, p.load == Load::plain};
}

// Channels [c, c + count) of a source or a map.
template <class T>
Source<T> channels(Source<T> s, int64_t c, int64_t count) {
  s.y.data += c;
  s.y.C = count;
  s.center += c;
  s.scale += c;
  s.shift += c;
  return s;
}

template <class T>
Map<T> channels(Map<T> m, int64_t c, int64_t count) {
  m.data += c;
  m.C = count;
  return m;
}

}  // namespace fastunet
