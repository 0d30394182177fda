// head: the 1x1 convolution to the classes over one source, read and activated on the fly, and its
// backward in one pass; kClasses at a time, while the source's pixels stay in L1. More of them are
// products (many_classes.h), but in float64.
#pragma once

#include <algorithm>
#include <vector>

#include "common/reduction.h"

namespace fastunet {

inline constexpr int kClasses = 4;  // at a time, at most
inline constexpr int kPixels = 4;   // at a time, forward

// One value, through the vector conversions, so that rounding is the same everywhere.
template <class T>
FASTUNET_INLINE acc_t<T> load_one(const T& value) {
  return load(&value, 1)[0];
}
template <class T>
FASTUNET_INLINE void store_one(T& to, acc_t<T> value) {
  store(&to, splat(value), 1);
}

// Logits [N, K, H, W] with any strides.
template <class T>
struct Logits {
  T* data;
  int64_t sn, sk, sh, sw;
  T& at(int64_t n, int64_t k, int64_t h, int64_t w) const {
    return data[n * sn + k * sk + h * sh + w * sw];
  }
  // The first `count` of a class, for the pixels from w on.
  FASTUNET_INLINE void put(int64_t n, int64_t k, int64_t h, int64_t w, vec<acc_t<T>> logits,
                           int count) const {
    T* to = &at(n, k, h, w);
    if (sw == 1) return store(to, logits, count);
    for (int i = 0; i < count; ++i) store_one(to[i * sw], logits[i]);
  }
};

// K: the classes at a time; kernels are compiled for powers of two.

// The products of pixels [first, first + kPixels) with weight, [classes, C], to to[k][pixel]; y:
// the channels of pixel 0. The last pixel and class take the places of those that are not there.
template <int K, class T>
FASTUNET_INLINE void head_pixels(const Source<T>& s, const acc_t<T>* weight, int64_t classes,
                                 int64_t n, const T* y, int first, int count,
                                 acc_t<T> (*to)[kLanes]) {
  using A = acc_t<T>;
  const T* pixels[kPixels];
  for (int p = 0; p < kPixels; ++p) pixels[p] = y + std::min(first + p, count - 1) * s.y.sw;
  const A* row[K];
  for (int k = 0; k < K; ++k) row[k] = weight + std::min<int64_t>(k, classes - 1) * s.y.C;
  vec<A> sum[K][kPixels] = {};
  for_tiles(1, s.y.C, [&](int64_t, int64_t, int64_t c, auto lanes) {
    const Channels<A> channel(s, n, c, lanes);
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) {
      const vec<A> z = channel(load(pixels[p] + c, lanes));
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) sum[k][p] += z * load(row[k] + c, lanes);
    }
  });
  for (int k = 0; k < K; ++k)
    for (int p = 0; p < kPixels; ++p) to[k][first + p] = sum_lanes<A>(sum[k][p]);
}

// Row h of sample n. weight: [classes, C], bias: [classes] or null.
template <int K, class T>
void head_row(const Source<T>& s, const acc_t<T>* weight, const acc_t<T>* bias, int64_t classes,
              Logits<T> out, int64_t n, int64_t h) {
  using A = acc_t<T>;
  for (int64_t w = 0; w < s.y.W; w += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, s.y.W - w));
    const T* y = s.y.at(n, h, w);
    for (int64_t first = 0; first < classes; first += K) {
      const int64_t most = std::min<int64_t>(K, classes - first);
      A values[K][kLanes] = {};
      for (int p = 0; p < count; p += kPixels)
        head_pixels<K>(s, weight + first * s.y.C, most, n, y, p, count, values);
      for (int k = 0; k < most; ++k)
        out.put(n, first + k, h, w, load(values[k]) + splat(bias ? bias[first + k] : A(0)), count);
    }
  }
}

// Row h of sample n: writes dy and adds to sums, [2 + classes, C] (dscale, dshift, dweight) then
// [classes] (dbias). A null dy.data skips what only the source's gradient needs.
template <int K, class T>
void head_bwd_row(const Source<T>& s, const acc_t<T>* weight, int64_t classes,
                  Logits<const T> dlogits, Map<T> dy, int64_t n, int64_t h, acc_t<T>* sums) {
  using A = acc_t<T>;
  using V = vec<A>;
  const int64_t C = s.y.C, W = s.y.W, padded = ceil_div(classes, K) * K;
  A* dweight = sums + 2 * C;
  A* dbias = dweight + classes * C;
  std::vector<A> grads(W * padded);
  for (int64_t w = 0; w < W; ++w)
    for (int k = 0; k < classes; ++k)
      dbias[k] += grads[w * padded + k] = load_one(dlogits.at(n, k, h, w));
  const T* y = s.y.at(n, h);
  for_tiles(W, C, [&](int64_t begin, int64_t end, int64_t c, auto lanes) {
    const Channels<A> channel(s, n, c, lanes);
    const auto add = [&](A* to, V sum) { store(to + c, load(to + c, lanes) + sum, lanes); };
    V dzs[kTilePixels];  // of the classes so far
    V dscale{}, dshift{};
    for (int64_t first = 0; first < classes; first += K) {
      const int64_t most = std::min<int64_t>(K, classes - first);
      V column[K] = {}, dcolumn[K] = {};
      for (int k = 0; k < most; ++k) column[k] = load(weight + (first + k) * C + c, lanes);
      for (int64_t p = begin; p < end; ++p) {
        const A* grad = grads.data() + p * padded + first;
        const V value = load(y + p * s.y.sw + c, lanes), t = channel.preact(value);
        const V z = channel.act(t);
        V dz{};
        if (first) dz = dzs[p - begin];
        for (int k = 0; k < K; ++k) {
          dz += column[k] * grad[k];
          dcolumn[k] += z * grad[k];
        }
        if (!dy.data) continue;
        if (first + K < classes) {
          dzs[p - begin] = dz;
          continue;
        }
        const V g = channel.act_bwd(dz, t);
        store(dy.at(n, h, p) + c, channel.scale * g, lanes);
        dscale += g * (value - channel.center);
        dshift += g;
      }
      for (int k = 0; k < most; ++k) add(dweight + (first + k) * C, dcolumn[k]);
    }
    add(sums, dscale);
    add(sums + C, dshift);
  });
}

}  // namespace fastunet
