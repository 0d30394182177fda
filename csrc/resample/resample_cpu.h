// resample: materialises one source's pending work (affine, activation, then max-pool, upsample,
// placement) into a plain map, and its gather-style backward. One pass each over memory.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "common/prefetch.h"
#include "common/reduction.h"
#include "resample/mode.h"

namespace fastunet {

// One axis of x2 upsampling: output i reads (1 - weight) * in[low] + weight * in[high]. Positions
// in fp64, so closer to the exact value than fp32 positions are.
template <class A>
struct Taps {
  struct Tap {
    int64_t low, high;
    A weight;
  };
  // Outputs [first, first + count) read an input: those less than one input away, of which there
  // are at most 4.
  struct Adjoint {
    int64_t first = 0, count = 0;
    std::array<A, 4> weights{};
  };
  std::vector<Tap> taps;         // per output
  std::vector<Adjoint> adjoint;  // per input

  Taps(Mode mode, int64_t in) : taps(2 * in), adjoint(in) {
    for (int64_t i = 0; i < 2 * in; ++i) {
      double at;
      if (mode == Mode::nearest)
        at = static_cast<double>(i / 2);
      else if (mode == Mode::bilinear)
        at = std::max(0.0, 0.5 * i - 0.25);
      else
        at = static_cast<double>(in - 1) / (2 * in - 1) * i;
      const int64_t low = std::min(static_cast<int64_t>(at), in - 1);
      const int64_t high = std::min(low + 1, in - 1);
      const A weight = static_cast<A>(at - low);
      taps[i] = {low, high, weight};
      add(low, i, 1 - weight);
      add(high, i, weight);
    }
  }

 private:
  void add(int64_t in, int64_t out, A weight) {
    if (weight == 0) return;
    Adjoint& to = adjoint[in];
    if (to.count == 0) to.first = out;
    to.count = out + 1 - to.first;
    to.weights.at(out - to.first) += weight;
  }
};

// The tables of an upsampling; none for the other modes.
template <class A>
struct UpsampleTaps {
  std::unique_ptr<Taps<A>> vertical, horizontal;

  UpsampleTaps(Mode mode, int64_t h, int64_t w) {
    if (mode == Mode::none || mode == Mode::max_pool) return;
    vertical = std::make_unique<Taps<A>>(mode, h);
    horizontal = std::make_unique<Taps<A>>(mode, w);
  }
};

template <class T>
FASTUNET_INLINE void zero(T* p, int64_t pixels, int64_t stride, int64_t C) {
  for (int64_t i = 0; i < pixels; ++i) std::memset(p + i * stride, 0, C * sizeof(T));
}

// NaN wins, as in PyTorch; of equal values the first.
template <class V>
FASTUNET_INLINE auto replaces(V candidate, V best) {
  return (candidate > best) | (candidate != candidate);
}

// The best of four by that rule. `b > a ? b : a` is one instruction, which keeps a NaN in a alone.
template <class V>
FASTUNET_INLINE V best_of(V a, V b, V c, V d) {
  V best = b > a ? b : a;
  best = c > best ? c : best;
  best = d > best ? d : best;
  return (b != b) | (c != c) | (d != d) ? b + c + d : best;
}

// The map that a source stands for, one row of pixels at a time.
template <class T>
class Resample {
  using A = acc_t<T>;
  using V = vec<A>;

 public:
  // as_is: nothing but that is pending.
  Resample(const Source<T>& s, int64_t H, int64_t W, Mode mode, const UpsampleTaps<A>& taps,
           bool as_is)
      : s_(s),
        H_(H),
        W_(W),
        mode_(mode),
        place_(mode, s.y.H, s.y.W, H, W),
        taps_(taps),
        as_is_(as_is) {}

  // Activated source rows, kept from one output row to the next as interpolation reads them twice.
  struct Rows {
    std::vector<A> low, high, between;
    int64_t low_row = -1, high_row = -1;
  };

  // Writes pixels [begin, end) of row h of sample n, `stride` apart; pixels outside the map are
  // zero. `rows` serves one sample and one range of pixels.
  template <class Out>
  void row(int64_t n, int64_t h, int64_t begin, int64_t end, Out* out, int64_t stride,
           Rows& rows) const {
    const int64_t from = h - place_.top;
    const int64_t w0 = std::max({begin, int64_t{0}, place_.left});
    const int64_t w1 = std::min({end, W_, place_.left + place_.W});
    if (h < 0 || h >= H_ || from < 0 || from >= place_.H || w0 >= w1)
      return zero(out, end - begin, stride, s_.y.C);
    zero(out, w0 - begin, stride, s_.y.C);
    zero(out + (w1 - begin) * stride, end - w1, stride, s_.y.C);
    out += (w0 - begin) * stride;
    const int64_t first = w0 - place_.left, last = w1 - place_.left;
    if (mode_ == Mode::none)
      activate(n, from, first, last, out, stride);
    else if (mode_ == Mode::max_pool)
      max_pool(n, from, first, last, out, stride);
    else
      upsample(n, from, first, last, out, stride, rows);
  }

 private:
  // f(first pixel, last, c, lanes, values), as for_tiles, `values` being what the raw ones stand
  // for.
  template <class F>
  void for_values(int64_t n, int64_t pixels, F f) const {
    for_tiles(pixels, s_.y.C, [&](int64_t p, int64_t end, int64_t c, auto lanes) {
      if (as_is_)
        f(p, end, c, lanes, [](V raw) { return raw; });
      else
        f(p, end, c, lanes, Channels<A>(s_, n, c, lanes));
    });
  }

  template <class Out>
  void activate(int64_t n, int64_t h, int64_t w0, int64_t w1, Out* out, int64_t stride) const {
    const T* in = s_.y.at(n, h, w0);
    for_values(n, w1 - w0, [&](int64_t p, int64_t end, int64_t c, auto lanes, auto value) {
      for (; p < end; ++p)
        store(out + p * stride + c, value(load(in + p * s_.y.sw + c, lanes)), lanes);
    });
  }

  template <class Out>
  void max_pool(int64_t n, int64_t h, int64_t w0, int64_t w1, Out* out, int64_t stride) const {
    const int64_t sw = s_.y.sw;
    const T* top = s_.y.at(n, 2 * h, 2 * w0);
    const T* bottom = s_.y.at(n, 2 * h + 1, 2 * w0);
    for_values(n, w1 - w0, [&](int64_t p, int64_t end, int64_t c, auto lanes, auto value) {
      for (; p < end; ++p) {
        const T* a = top + 2 * p * sw + c;
        const T* b = bottom + 2 * p * sw + c;
        const V best = best_of(value(load(a, lanes)), value(load(a + sw, lanes)),
                               value(load(b, lanes)), value(load(b + sw, lanes)));
        store(out + p * stride + c, best, lanes);
      }
    });
  }

  template <class Out>
  void upsample(int64_t n, int64_t h, int64_t w0, int64_t w1, Out* out, int64_t stride,
                Rows& rows) const {
    const auto tap = taps_.vertical->taps[h];
    const int64_t first = taps_.horizontal->taps[w0].low;
    const int64_t last = taps_.horizontal->taps[w1 - 1].high + 1;
    const auto fill = [&](std::vector<A>& row, int64_t& holds, int64_t from) {
      if (holds == from) return;
      row.resize((last - first) * s_.y.C);
      activate(n, from, first, last, row.data(), s_.y.C);
      holds = from;
    };
    if (rows.high_row == tap.low && rows.low_row != tap.low) {
      rows.low.swap(rows.high);
      std::swap(rows.low_row, rows.high_row);
    }
    fill(rows.low, rows.low_row, tap.low);
    if (mode_ == Mode::nearest) return spread(rows.low.data(), first, w0, w1, out, stride);
    fill(rows.high, rows.high_row, tap.high);
    const A *low = rows.low.data(), *high = rows.high.data();
    const A above = 1 - tap.weight, below = tap.weight;
    rows.between.resize((last - first) * s_.y.C);
    // Products as in PyTorch, not a + weight * (b - a): Inf - Inf would be NaN.
    for_tiles(1, (last - first) * s_.y.C, [&](int64_t, int64_t, int64_t i, auto lanes) {
      store(rows.between.data() + i, above * load(low + i, lanes) + below * load(high + i, lanes),
            lanes);
    });
    spread(rows.between.data(), first, w0, w1, out, stride);
  }

  // One row of source pixels, from `first` on, to pixels [w0, w1).
  template <class Out>
  void spread(const A* row, int64_t first, int64_t w0, int64_t w1, Out* out, int64_t stride) const {
    const int64_t C = s_.y.C;
    const auto* taps = taps_.horizontal->taps.data() + w0;
    const bool copies = mode_ == Mode::nearest;
    for_tiles(w1 - w0, C, [&](int64_t p, int64_t end, int64_t c, auto lanes) {
      const A* from = row + c - first * C;
      for (; p < end; ++p) {
        const auto& tap = taps[p];
        const V left = load(from + tap.low * C, lanes);
        // Nearest reads one pixel, so 0 * Inf of its neighbours must not come in.
        const V value =
            copies ? left : (1 - tap.weight) * left + tap.weight * load(from + tap.high * C, lanes);
        store(out + p * stride + c, value, lanes);
      }
    });
  }

  Source<T> s_;
  int64_t H_, W_;
  Mode mode_;
  Placement place_;
  const UpsampleTaps<A>& taps_;
  bool as_is_;
};

// dz: the gradient of the resampled map (a channel slice of the reader's input gradient).
// dy = scale * g with g = act'(t) * (what dz sends to the pixel); partial sums of g * (y - center)
// and of g per chunk. Every source pixel gathers; nothing is scattered. What max_pool sends back
// can be added to what dy is (`add`).
template <class T>
class ResampleBwd {
  using A = acc_t<T>;
  using V = vec<A>;

 public:
  ResampleBwd(const Source<T>& s, Map<const T> dz, Map<T> dy, Mode mode, bool add = false)
      : s_(s), dz_(dz), dy_(dy), mode_(mode), add_(add), place_(mode, s.y.H, s.y.W, dz.H, dz.W) {}

  static int64_t unit_rows(Mode mode) { return mode == Mode::max_pool ? 2 : 1; }

  // Source rows of units [begin, end) of sample n; sums: [2][C], zeroed by the caller.
  void units(int64_t n, int64_t begin, int64_t end, const Taps<A>* vertical,
             const Taps<A>* horizontal, A* sums) const {
    const int64_t C = s_.y.C, W = s_.y.W;
    std::vector<A> gathered(vertical ? W * C : 0), columns(vertical ? place_.W * C : 0);
    for (int64_t unit = begin; unit < end; ++unit) {
      if (mode_ == Mode::max_pool) {
        max_pool(n, unit, 0, dz_.W, sums, C);
      } else if (mode_ == Mode::none) {
        const int64_t w0 = place_.w_begin(), w1 = place_.w_end(dz_.W);
        if (!place_.has_row(unit, dz_.H) || w0 >= w1) {
          zero(dy_.at(n, unit), W, dy_.sw, C);
          continue;
        }
        zero(dy_.at(n, unit), w0, dy_.sw, C);
        zero(dy_.at(n, unit, w1), W - w1, dy_.sw, C);
        row(n, unit, w0, w1, dz_.at(n, unit + place_.top, w0 + place_.left), dz_.sw, sums, C);
      } else {
        const auto& rows = vertical->adjoint[unit];
        Prefetch next;
        if (unit + 1 < s_.y.H) {
          const auto& more = vertical->adjoint[unit + 1];
          next.add(dz_, n, rows.first + rows.count + place_.top,
                   more.first + more.count + place_.top, 0, dz_.W);
          next.add(s_.y, n, unit + 1, unit + 2, 0, W);
          next.add(dy_.read_only(), n, unit + 1, unit + 2, 0, W);
        }
        gather(n, rows, *horizontal, columns.data(), gathered.data(), next);
        row(n, unit, 0, W, gathered.data(), C, sums, C);
      }
    }
  }

  // What a part of a pooled map sends back, pixels [h0, h1) x [w0, w1) of dz, which is all of it.
  // sums: as above, of other channels as well, its rows `row` apart.
  void max_pool(int64_t n, int64_t h0, int64_t h1, int64_t w0, int64_t w1, A* sums,
                int64_t row) const {
    for (int64_t h = h0; h < h1; ++h) max_pool(n, h, w0, w1, sums, row);
    if (h1 == dz_.H && 2 * h1 < s_.y.H)  // a last row without a partner
      max_pool_nothing(dy_.at(n, 2 * h1, 2 * w0), (w1 == dz_.W ? s_.y.W : 2 * w1) - 2 * w0);
  }

  // One row of source pixels [w0, w1) whose gradient with respect to z is dz, `stride` apart.
  template <class D>
  void row(int64_t n, int64_t h, int64_t w0, int64_t w1, const D* dz, int64_t stride, A* sums,
           int64_t sums_row) const {
    const T* y = s_.y.at(n, h, w0);
    T* dy = dy_.at(n, h, w0);
    for_tiles(w1 - w0, s_.y.C, [&](int64_t p, int64_t end, int64_t c, auto lanes) {
      const Channels<A> channel(s_, n, c, lanes);
      Sums sum;
      for (; p < end; ++p) {
        const V value = load(y + p * s_.y.sw + c, lanes);
        const V g = channel.act_bwd(load(dz + p * stride + c, lanes), channel.preact(value));
        store(dy + p * dy_.sw + c, channel.scale * g, lanes);
        sum.add(g, value - channel.center);
      }
      sum.add_to(sums, sums_row, c, lanes);
    });
  }

 private:
  // Two rows of source pixels, from pixels [begin, end) of a row of dz.
  void max_pool(int64_t n, int64_t unit, int64_t begin, int64_t end, A* sums,
                int64_t sums_row) const {
    const int64_t C = s_.y.C, W = s_.y.W, sw = s_.y.sw, dw = dy_.sw;
    const int64_t w0 = std::max(begin - place_.left, place_.w_begin());
    const int64_t w1 = std::min(end - place_.left, place_.w_end(dz_.W));
    const bool has_bottom = 2 * unit + 1 < s_.y.H;
    if (unit >= place_.H || !place_.has_row(unit, dz_.H) || w0 >= w1) {
      max_pool_nothing(dy_.at(n, 2 * unit), W);
      if (has_bottom) max_pool_nothing(dy_.at(n, 2 * unit + 1), W);
      return;
    }
    for (int64_t h : {2 * unit, 2 * unit + 1}) {
      if (begin == 0) max_pool_nothing(dy_.at(n, h), 2 * w0);
      if (end == dz_.W) max_pool_nothing(dy_.at(n, h, 2 * w1), W - 2 * w1);
    }
    const T* y[2] = {s_.y.at(n, 2 * unit, 2 * w0), s_.y.at(n, 2 * unit + 1, 2 * w0)};
    T* dy[2] = {dy_.at(n, 2 * unit, 2 * w0), dy_.at(n, 2 * unit + 1, 2 * w0)};
    const T* dz = dz_.at(n, unit + place_.top, w0 + place_.left);
    for_tiles(w1 - w0, C, [&](int64_t p, int64_t end, int64_t c, auto lanes) {
      const Channels<A> channel(s_, n, c, lanes);
      Sums sum;
      for (; p < end; ++p) {
        V value[4], t[4];
        for (int k = 0; k < 4; ++k) {
          value[k] = load(y[k / 2] + (2 * p + k % 2) * sw + c, lanes);
          t[k] = channel.preact(value[k]);
        }
        // wins[k]: k replaced the best of those before it; the last to do so is the maximum.
        V best = channel.act(t[0]);
        decltype(best > best) wins[4] = {best == best, {}, {}, {}};
        wins[0] |= ~wins[0];
        for (int k = 1; k < 4; ++k) {
          const V z = channel.act(t[k]);
          wins[k] = replaces(z, best);
          best = wins[k] ? z : best;
          for (int j = 0; j < k; ++j) wins[j] &= ~wins[k];
        }
        const V grad = load(dz + p * dz_.sw + c, lanes);
        for (int k = 0; k < 4; ++k) {
          const V g = channel.act_bwd(wins[k] ? grad : V{}, t[k]);
          T* to = dy[k / 2] + (2 * p + k % 2) * dw + c;
          const V back = channel.scale * g;
          store(to, add_ ? load(to, lanes) + back : back, lanes);
          sum.add(g, value[k] - channel.center);
        }
      }
      sum.add_to(sums, sums_row, c, lanes);
    });
  }

  // Pixels of a row that no window has: their gradient is 0, which may turn what is -0 into 0.
  void max_pool_nothing(T* dy, int64_t pixels) const {
    if (!add_) return zero(dy, pixels, dy_.sw, s_.y.C);
    for_tiles(pixels, s_.y.C, [&](int64_t p, int64_t end, int64_t c, auto lanes) {
      for (T* to = dy + p * dy_.sw + c; p < end; ++p, to += dy_.sw)
        store(to, load(to, lanes) + V{}, lanes);
    });
  }

  // out[w] = the adjoint of interpolation at one source row: first over rows, then over columns.
  void gather(int64_t n, const typename Taps<A>::Adjoint& rows, const Taps<A>& horizontal,
              A* columns, A* out, Prefetch& lines) const {
    const int64_t C = s_.y.C, W = s_.y.W;
    const int64_t w0 = place_.w_begin(), w1 = place_.w_end(dz_.W);
    const int64_t first = std::max(rows.first, -place_.top);
    const int64_t last = std::min(rows.first + rows.count, dz_.H - place_.top);
    std::fill_n(columns, w0 * C, A(0));
    std::fill_n(columns + w1 * C, (place_.W - w1) * C, A(0));
    const int64_t parts = ceil_div(w1 - w0, tile_pixels(C)) * ceil_div(C, kLanes);
    for_tiles(w1 - w0, C, [&](int64_t p, int64_t end, int64_t c, auto lanes) {
      lines.ask(parts);
      const T* from = dz_.at(n, first + place_.top, w0 + place_.left) + c;
      const A* weights = rows.weights.data() + (first - rows.first);
      for (; p < end; ++p) {
        V sum{};
        for (int64_t i = 0; i < last - first; ++i)
          sum += weights[i] * load(from + i * dz_.sh + p * dz_.sw, lanes);
        store(columns + (w0 + p) * C + c, sum, lanes);
      }
    });
    for_tiles(W, C, [&](int64_t w, int64_t end, int64_t c, auto lanes) {
      for (; w < end; ++w) {
        const auto& terms = horizontal.adjoint[w];
        const A* from = columns + terms.first * C + c;
        V sum{};
        for (int64_t i = 0; i < terms.count; ++i)
          sum += terms.weights[i] * load(from + i * C, lanes);
        store(out + w * C + c, sum, lanes);
      }
    });
  }

  struct Sums {
    V scale{}, shift{};
    FASTUNET_INLINE void add(V g, V centred) {
      scale += g * centred;
      shift += g;
    }
    FASTUNET_INLINE void add_to(A* sums, int64_t row, int64_t c, int lanes) const {
      store(sums + c, load(sums + c, lanes) + scale, lanes);
      store(sums + row + c, load(sums + row + c, lanes) + shift, lanes);
    }
  };

  Source<T> s_;
  Map<const T> dz_;
  Map<T> dy_;
  Mode mode_;
  bool add_;
  Placement place_;
};

// The whole map by all threads; dscale, dshift: [rows][C] or null. Where the source is neither
// resampled nor placed, dz may be dy itself: a pixel's gradient is read before it is written.
template <class T>
void resample_map_bwd(const Source<T>& s, Mode mode, const UpsampleTaps<acc_t<T>>& taps,
                      const Map<const T>& dz, const Map<T>& dy, acc_t<T>* dscale, acc_t<T>* dshift,
                      int64_t rows) {
  const int64_t C = s.y.C;
  const ResampleBwd<T> kernel(s, dz, dy, mode);
  const int64_t unit = ResampleBwd<T>::unit_rows(mode);
  const Chunks chunks(s.y.N, ceil_div(s.y.H, unit), unit * s.y.W, 1024);
  std::vector<acc_t<T>> partials(chunks.count() * 2 * C);
  parallel_tasks(chunks.count(), [&](int64_t k) {
    kernel.units(chunks.sample(k), chunks.begin(k), chunks.end(k), taps.vertical.get(),
                 taps.horizontal.get(), partials.data() + k * 2 * C);
  });
  sum_affine_chunks(partials, C, rows, dscale, dshift);
}

}  // namespace fastunet
