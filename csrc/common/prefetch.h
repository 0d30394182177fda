// Cache lines brought into L2 while products keep the arithmetic busy: the hardware follows neither
// a stride of one line per pixel nor a row of pixels into its next page.
#pragma once

#include <algorithm>
#include <array>

#include "common/vec.h"

namespace fastunet {

inline constexpr int64_t kLine = 64;

// Must be inlined: to the compiler it has no effect, and its calls go.
FASTUNET_INLINE void prefetch(const char* begin, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(begin + i * kLine, 0, 2);
}

// Two stretches of lines, asked for step by step between products: a few at a time, as fill buffers
// that are full hold up the loads of the products as well.
class Ahead {
 public:
  // The second `twin` bytes behind the first; a step is of so many bytes of each.
  void start(const char* begin, int64_t twin, int64_t step) {
    next_ = until_ = begin, twin_ = twin, step_ = step;
  }
  FASTUNET_INLINE void advance() {
    until_ += step_;
    for (; next_ < until_; next_ += kLine) {
      __builtin_prefetch(next_, 0, 2);
      __builtin_prefetch(next_ + twin_, 0, 2);
    }
  }

 private:
  const char *next_ = nullptr, *until_ = nullptr;
  int64_t twin_ = 0, step_ = 0;  // bytes
};

// Rows of maps, or others, of which products ask for a share: two rows side by side, as two streams
// are faster than one, or both halves of a last one.
class Prefetch {
 public:
  // Pixels [h0, h1) x [w0, w1) of sample n, clipped to the map.
  template <class T>
  void add(const Map<T>& m, int64_t n, int64_t h0, int64_t h1, int64_t w0, int64_t w1) {
    h0 = std::max<int64_t>(h0, 0), h1 = std::min(h1, m.H);
    w0 = std::max<int64_t>(w0, 0), w1 = std::min(w1, m.W);
    if (h0 < h1 && w0 < w1) add(m.at(n, h0, w0), h1 - h0, m.sh, (w1 - w0 - 1) * m.sw + m.C);
  }
  // Rows of `length` values, `stride` apart.
  template <class T>
  void add(const T* begin, int64_t rows, int64_t stride, int64_t length) {
    if (count_ == regions_.size() || rows * length == 0) return;
    constexpr int64_t kSize = sizeof(T);
    const int64_t lines = ceil_div(length * kSize, kLine);
    regions_[count_++] = {reinterpret_cast<const char*>(begin), rows, stride * kSize, lines};
    lines_ += rows * lines;
  }

  // Asks for the next of `parts` equal shares.
  void ask(int64_t parts) {
    for (int64_t left = ceil_div(lines_, 2 * parts); left > 0 && in_region();) {
      const int64_t count = std::min(left, length_ - line_);
      prefetch(next(), count);
      prefetch(next() + twin_, count);
      left -= count;
      move(count);
    }
  }
  // The same, but that it is left to so many panels of products, of so many steps: each asks for a
  // part of two rows, not less than its share, so that some have nothing left.
  void share(int64_t parts, int64_t panels, int64_t steps) {
    share_ = lines_ ? ceil_div(lines_, 2 * parts * panels) : 0;
    steps_ = steps;
    divide();
  }
  // What the next panel asks for.
  const Ahead& panel() {
    ahead_.start(nullptr, 0, 0);
    if (share_ == 0) return ahead_;
    for (int64_t left = share_; in_region(); left -= length_) {
      if (left <= length_ || rows_ <= 2) {
        ahead_.start(next(), twin_, step_);
        move(part_);
        break;
      }
      prefetch(next(), length_);
      prefetch(next() + twin_, length_);
      move(length_);
    }
    return ahead_;
  }

 private:
  struct Region {
    const char* begin;
    int64_t rows, stride, length;  // lines, but for the stride
  };

  const char* next() const { return row_ + line_ * kLine; }
  // Whether something is left.
  bool in_region() {
    if (rows_ > 0) return true;
    if (region_ == count_) return false;
    const Region& r = regions_[region_++];
    row_ = r.begin, rows_ = r.rows, twin_ = r.stride, length_ = r.length;
    halve();
    divide();
    return true;
  }
  // A last row.
  void halve() {
    if (rows_ == 1) length_ = ceil_div(length_, 2), twin_ = length_ * kLine;
  }
  // Into equal parts.
  void divide() {
    if (share_ == 0 || rows_ <= 0) return;
    part_ = ceil_div(length_, std::max<int64_t>(1, length_ / share_));
    step_ = ceil_div(part_ * kLine, steps_);
  }
  void move(int64_t lines) {
    line_ += lines;
    if (line_ < length_) return;
    line_ = 0, rows_ -= 2, row_ += 2 * twin_;
    if (rows_ == 1) halve(), divide();
  }

  std::array<Region, 6> regions_;
  Ahead ahead_;
  size_t count_ = 0, region_ = 0;
  int64_t lines_ = 0;
  // Two rows and where it is in them, and how many are left of the region.
  const char* row_ = nullptr;
  int64_t twin_ = 0, length_ = 0, line_ = 0, rows_ = 0;
  int64_t share_ = 0, part_ = 0, steps_ = 0, step_ = 0;
};

}  // namespace fastunet
