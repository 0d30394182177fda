// Cache lines brought into L2 while products keep the arithmetic busy: the hardware follows neither
// a stride of one line per pixel nor a row of pixels into its next page.
#pragma once

#include <algorithm>
#include <array>

#include "common/map.h"

namespace fastunet {

inline constexpr int64_t kLine = 64;

inline void prefetch(const char* begin, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(begin + i * kLine, 0, 2);
}
inline void prefetch(const float* begin, int64_t floats) {
  prefetch(reinterpret_cast<const char*>(begin), ceil_div(floats * 4, kLine));
}

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

  // The next of `parts` equal shares of all lines.
  void advance(int64_t parts) {
    int64_t left = ceil_div(lines_, parts);
    while (left > 0 && region_ < count_) {
      const Region& r = regions_[region_];
      const int64_t end = std::min(line_ + left, r.lines);
      left -= end - line_;
      prefetch(r.begin + row_ * r.row_bytes + line_ * kLine, end - line_);
      line_ = end;
      if (line_ < r.lines) return;
      line_ = 0;
      if (++row_ < r.rows) continue;
      row_ = 0;
      ++region_;
    }
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
