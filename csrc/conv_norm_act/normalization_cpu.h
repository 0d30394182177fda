// What stands around a convolution: its output's statistics, and the normalisation's backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/reduction.h"
#include "common/require.h"

namespace fastunet {

// Per-channel mean and squared deviations of pixels, in two sweeps over values that stay in cache:
// no cancellation, whatever the mean.
template <class T>
void chunk_moments(const T* y, int64_t pixels, int64_t C, acc_t<T>* mean, acc_t<T>* m2) {
  using A = acc_t<T>;
  const auto accumulate = [&](A* sums, auto term) {
    std::fill_n(sums, C, A(0));
    for_tiles(pixels, C, [&](int64_t p, int64_t end, int64_t c, auto lanes) {
      const vec<A> m = load(mean + c, lanes);
      vec<A> part[4] = {};  // one sum would wait for each addition before the next
      for (; p + 4 <= end; p += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) part[i] += term(load(y + (p + i) * C + c, lanes), m);
      for (; p < end; ++p) part[0] += term(load(y + p * C + c, lanes), m);
      const vec<A> sum = (part[0] + part[1]) + (part[2] + part[3]);
      store(sums + c, load(sums + c, lanes) + sum, lanes);
    });
  };
  accumulate(mean, [](vec<A> value, vec<A>) { return value; });
  for (int64_t c = 0; c < C; ++c) mean[c] /= static_cast<A>(pixels);
  accumulate(m2, [](vec<A> value, vec<A> m) { return (value - m) * (value - m); });
}

// The moments of chunks of pixels: values [chunks][2][C] (mean, squared deviations), and how many
// pixels each has. Chunks of a sample lie side by side.
template <class T>
struct ChunkMoments {
  std::vector<acc_t<T>> values;
  std::vector<int64_t> counts;

  void resize(int64_t chunks, int64_t C) {
    values.resize(chunks * 2 * C);
    counts.resize(chunks);
  }
};

// A statistic is taken over all samples per channel (groups == 0), or per sample over groups of
// adjacent channels.
struct Grouping {
  int64_t N, C, pixels, groups;

  int64_t rows() const { return groups ? N : 1; }
  int64_t width() const { return groups ? C / groups : 1; }  // channels that share statistics
  double count() const { return static_cast<double>(groups ? pixels * width() : N * pixels); }
};

inline Grouping grouping(int64_t N, int64_t C, int64_t pixels, int64_t groups) {
  require(groups == 0 || (groups > 0 && C % groups == 0), "groups must divide the channels, got ",
          groups, " groups of ", C, " channels");
  return {N, C, pixels, groups};
}

// Values per channel of a convolution's output y and what normalisation makes of them:
// z = scale * (y - center) + shift, with the convolution's bias inside center.
template <class A>
struct Normalization {
  A *center, *scale, *shift, *var;  // [rows, C]
};

// From the moments of all chunks: their mean first, then the squared deviations from that, without
// cancellation.
template <class T>
void finalize(const ChunkMoments<T>& chunks, const Grouping& g, const acc_t<T>* bias,
              const acc_t<T>* gamma, const acc_t<T>* beta, double eps,
              const Normalization<acc_t<T>>& out) {
  using A = acc_t<T>;
  const int64_t count = static_cast<int64_t>(chunks.counts.size());
  const int64_t per_row = g.rows() ? count / g.rows() : 0, width = g.width();
  // Between channels of a group the bias matters; within one it moves the mean alone.
  const auto bias_of = [&](int64_t c) { return bias && width > 1 ? bias[c] : A(0); };
  std::vector<double> mean(g.C), m2(g.C);
  for (int64_t row = 0; row < g.rows(); ++row) {
    double pixels = 0;
    const auto add_up = [&](std::vector<double>& sums, auto term) {
      sums.assign(g.C, 0.0);
      pixels = 0;
      for (int64_t k = row * per_row; k < (row + 1) * per_row; ++k) {
        const A* values = chunks.values.data() + k * 2 * g.C;
        const auto n = static_cast<double>(chunks.counts[k]);
        pixels += n;
        for (int64_t c = 0; c < g.C; ++c) sums[c] += term(n, c, values[c], values[g.C + c]);
      }
    };
    add_up(mean, [](double n, int64_t, double m, double) { return n * m; });
    for (int64_t c = 0; c < g.C; ++c) mean[c] /= std::max(pixels, 1.0);
    add_up(m2, [&](double n, int64_t c, double m, double squares) {
      return squares + n * (m - mean[c]) * (m - mean[c]);
    });
    for (int64_t first = 0; first < g.C; first += width) {
      double center = 0, squares = 0;
      for (int64_t c = first; c < first + width; ++c) center += (mean[c] + bias_of(c)) / width;
      for (int64_t c = first; c < first + width; ++c) {
        const double apart = mean[c] + bias_of(c) - center;
        squares += m2[c] + pixels * apart * apart;
      }
      const double var = squares / std::max(pixels * width, 1.0), rstd = 1 / std::sqrt(var + eps);
      for (int64_t c = first; c < first + width; ++c) {
        const int64_t i = row * g.C + c;
        out.var[i] = static_cast<A>(var);
        out.center[i] = static_cast<A>(center - bias_of(c));
        out.scale[i] = static_cast<A>(rstd * (gamma ? gamma[c] : 1));
        out.shift[i] = beta ? beta[c] : 0;
      }
    }
  }
}

// Without statistics of the batch: by running ones, or (mean null) none at all.
template <class A>
void fixed_normalization(int64_t C, const A* bias, const A* gamma, const A* beta, const A* mean,
                         const A* var, double eps, const Normalization<A>& out) {
  for (int64_t c = 0; c < C; ++c) {
    const A b = bias ? bias[c] : 0;
    out.center[c] = mean ? mean[c] - b : 0;
    out.scale[c] = mean ? static_cast<A>((gamma ? gamma[c] : 1) / std::sqrt(var[c] + eps)) : 1;
    out.shift[c] = mean ? (beta ? beta[c] : 0) : b;
    out.var[c] = mean ? var[c] : 1;
  }
}

// dy_total = dy + slope * (y - center) + offset, per row and channel, from the sums that the
// readers formed:
//   slope = -rstd^2 * sum(scale * dscale) / M,  offset = -sum(scale * dshift) / M
// with the sums over the channels that share statistics and M values in a statistic.
//   dgamma = sum over rows of rstd * dscale,  dbeta = sum over rows of dshift
template <class A>
struct NormalizationBwd {
  std::vector<A> slope, offset;

  NormalizationBwd(const Grouping& g, const A* scale, const A* var, const A* dscale,
                   const A* dshift, double eps)
      : slope(g.rows() * g.C), offset(g.rows() * g.C) {
    for (int64_t first = 0; first < g.rows() * g.C; first += g.width()) {
      double s = 0, o = 0;
      for (int64_t i = first; i < first + g.width(); ++i) {
        if (dscale) s -= static_cast<double>(scale[i]) * dscale[i];
        if (dshift) o -= static_cast<double>(scale[i]) * dshift[i];
      }
      for (int64_t i = first; i < first + g.width(); ++i) {
        slope[i] = static_cast<A>(s / ((var[i] + eps) * g.count()));
        offset[i] = static_cast<A>(o / g.count());
      }
    }
  }
};

template <class A>
void affine_bwd(const Grouping& g, const A* var, const A* dscale, const A* dshift, double eps,
                A* dgamma, A* dbeta) {
  for (int64_t c = 0; c < g.C; ++c) {
    double gamma = 0, beta = 0;
    for (int64_t i = c; i < g.rows() * g.C; i += g.C) {
      if (dscale) gamma += dscale[i] / std::sqrt(var[i] + eps);
      if (dshift) beta += dshift[i];
    }
    dgamma[c] = static_cast<A>(gamma);
    dbeta[c] = static_cast<A>(beta);
  }
}

template <class T>
void normalize_bwd_pixels(const T* dy, const T* y, const acc_t<T>* center, const acc_t<T>* slope,
                          const acc_t<T>* offset, int64_t pixels, int64_t C, T* out) {
  using A = acc_t<T>;
  for_tiles(pixels, C, [&](int64_t p, int64_t end, int64_t c, auto lanes) {
    const vec<A> m = load(center + c, lanes), b = load(slope + c, lanes);
    const vec<A> o = load(offset + c, lanes);
    for (; p < end; ++p) {
      vec<A> total = b * (load(y + p * C + c, lanes) - m) + o;
      if (dy) total += load(dy + p * C + c, lanes);
      store(out + p * C + c, total, lanes);
    }
  });
}

}  // namespace fastunet
