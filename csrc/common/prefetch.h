// Cache lines brought into L2 while products keep the arithmetic busy: the hardware follows neither
// a stride of one line per pixel nor a row of pixels into its next page.
#pragma once

#include <algorithm>
#include <array>

#include "common/vec.h"

namespace fastunet {

inline constexpr int64_t kLine = 64;

inline void prefetch(const char* begin, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(begin + i * kLine, 0, 2);
}

// Lines that follow one another; or twice as many, the others `twin` bytes further on.
struct Stretch {
  const char* begin = nullptr;
  int64_t lines = 0, twin = 0;
};

// The same, or one stretch after another, asked for in equal shares by the steps of products: a few
// lines at a time, as fill buffers that are full hold up the loads of the products as well. Always
// two of them, of both halves.
class Ahead {
 public:
  // For so many panels of so many steps.
  Ahead(const Stretch& first, const Stretch& then, int64_t panels, int64_t steps)
      : then_(in_halves(then)) {
    const Stretch now = in_halves(first);
    const int64_t lines = now.lines + then_.lines;
    first_ = then_.lines ? (panels * now.lines + lines / 2) / lines : panels;
    then_step_ = step(then_, (panels - first_) * steps);
    start(now, step(now, first_ * steps));
  }

  // Before each panel.
  void start_panel() {
    if (first_-- == 0) start(then_, then_step_);
  }
  FASTUNET_INLINE void advance() {
    until_ += step_;
    for (; next_ < until_; next_ += kLine) {
      __builtin_prefetch(next_, 0, 2);
      __builtin_prefetch(next_ + twin_, 0, 2);
    }
  }

 private:
  static Stretch in_halves(const Stretch& s) {
    const int64_t half = ceil_div(s.lines, 2);
    return s.twin ? s : Stretch{s.begin, half, half * kLine};
  }
  static int64_t step(const Stretch& s, int64_t steps) {
    return steps > 0 ? ceil_div(s.lines * kLine, steps) : 0;
  }
  void start(const Stretch& s, int64_t step) {
    next_ = until_ = s.begin, twin_ = s.twin, step_ = step;
  }

  const char *next_, *until_;
  int64_t twin_, step_;  // bytes
  Stretch then_;
  int64_t first_, then_step_;  // panels that are left for the first stretch
};

// Lines of maps, a share at a time.
class Prefetch {
 public:
  // Pixels [h0, h1) x [w0, w1) of sample n, clipped to the map.
  template <class T>
  void add(const Map<T>& m, int64_t n, int64_t h0, int64_t h1, int64_t w0, int64_t w1) {
    h0 = std::max<int64_t>(h0, 0), h1 = std::min(h1, m.H);
    w0 = std::max<int64_t>(w0, 0), w1 = std::min(w1, m.W);
    if (h0 >= h1 || w0 >= w1 || count_ == regions_.size()) return;
    const int64_t bytes = ((w1 - w0 - 1) * m.sw + m.C) * static_cast<int64_t>(sizeof(T));
    regions_[count_++] = {reinterpret_cast<const char*>(m.at(n, h0, w0)),
                          m.sh * static_cast<int64_t>(sizeof(T)), h1 - h0, ceil_div(bytes, kLine)};
    lines_ += (h1 - h0) * ceil_div(bytes, kLine);
  }

  // The next of `parts` equal shares of all lines: asks for them,
  void advance(int64_t parts) {
    const Stretch last = next(parts);
    prefetch(last.begin, last.lines);
  }
  // or leaves what is in the last row of pixels to the caller.
  Stretch next(int64_t parts) {
    Stretch last;
    for (int64_t left = ceil_div(lines_, parts); left > 0 && region_ < count_;) {
      prefetch(last.begin, last.lines);
      const Region& r = regions_[region_];
      last = {r.begin + row_ * r.row_bytes + line_ * kLine, std::min(left, r.lines - line_)};
      left -= last.lines;
      line_ += last.lines;
      if (line_ < r.lines) break;
      line_ = 0;
      if (++row_ < r.rows) continue;
      row_ = 0;
      ++region_;
    }
    return last;
  }

 private:
  struct Region {
    const char* begin;
    int64_t row_bytes, rows, lines;
  };
  std::array<Region, 6> regions_;
  size_t count_ = 0, region_ = 0;
  int64_t lines_ = 0, row_ = 0, line_ = 0;
};

}  // namespace fastunet
