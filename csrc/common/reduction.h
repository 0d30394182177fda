// Per-channel sums over pixels in two stages: partial sums over chunks whose bounds depend on the
// shape alone, then the chunks in order. So results do not depend on the number of threads.
#pragma once

#include <vector>

#include "common/source.h"

namespace fastunet {

// Splits `units` (rows, row pairs, pixels) of every sample into chunks of `per_chunk` units.
struct Chunks {
  int64_t samples, units, per_chunk;

  Chunks(int64_t samples, int64_t units, int64_t unit_pixels, int64_t chunk_pixels)
      : samples(samples), units(units), per_chunk(chunk_pixels / (unit_pixels ? unit_pixels : 1)) {
    if (per_chunk < 1) per_chunk = 1;
  }

  int64_t per_sample() const { return ceil_div(units, per_chunk); }
  int64_t count() const { return samples * per_sample(); }
  int64_t sample(int64_t chunk) const { return chunk / per_sample(); }
  int64_t begin(int64_t chunk) const { return chunk % per_sample() * per_chunk; }
  int64_t end(int64_t chunk) const {
    const int64_t e = begin(chunk) + per_chunk;
    return e < units ? e : units;
  }
};

// sums[row, c] = sum over the chunks of `row` (all chunks for a single row) of
// partials[chunk * stride + c]; chunks of a row lie side by side. add: to what is in sums.
template <class A>
void sum_chunks(const A* partials, int64_t chunks, int64_t stride, int64_t C, int64_t rows, A* sums,
                bool add = false) {
  const int64_t per_row = rows ? chunks / rows : 0;
  std::vector<double> total(C);
  for (int64_t row = 0; row < rows; ++row) {
    total.assign(C, 0.0);
    for (int64_t k = row * per_row; k < (row + 1) * per_row; ++k)
      for (int64_t c = 0; c < C; ++c) total[c] += partials[k * stride + c];
    for (int64_t c = 0; c < C; ++c) {
      A& sum = sums[row * C + c];
      sum = add ? sum + static_cast<A>(total[c]) : static_cast<A>(total[c]);
    }
  }
}

// Of partials [chunks][2][C], to dscale and dshift, where there are such.
template <class A>
void sum_affine_chunks(const std::vector<A>& partials, int64_t C, int64_t rows, A* dscale,
                       A* dshift, bool add = false) {
  const int64_t chunks = static_cast<int64_t>(partials.size()) / (2 * C);
  if (dscale) sum_chunks(partials.data(), chunks, 2 * C, C, rows, dscale, add);
  if (dshift) sum_chunks(partials.data() + C, chunks, 2 * C, C, rows, dshift, add);
}

}  // namespace fastunet
