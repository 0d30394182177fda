// Matrix products of values in blocks of 16 channels, v: [blocks][t][16], where t counts tiles (of
// one point of Winograd's algorithm) or pixels:
//
//   multiply     m[n][t] (+)= sum over k of v[k][t] * u[n][k]
//   correlate    du[i][n] (+)= sum over t of v[i][t] * d[n][t]
#pragma once

#include <utility>

#include "common/prefetch.h"
#include "common/source.h"

namespace fastunet {

inline constexpr int kBlock = 16;              // channels: one cache line of floats
inline constexpr int kVecs = kBlock / kLanes;  // vectors per block

// Register tiles: as many accumulators as the registers leave beside one row of operands.
#if defined(__AVX512F__)
inline constexpr int kRows = 12, kBlocks = 2, kGradRows = 8;
#elif defined(__AVX2__)
inline constexpr int kRows = 6, kBlocks = 1, kGradRows = 4;
#else
inline constexpr int kRows = 2, kBlocks = 1, kGradRows = 2;
#endif

inline int64_t blocks_of(int64_t channels) { return ceil_div(channels, kBlock); }

inline constexpr int kStep = 4;  // inputs (tiles) that products take at a time

// f(k) for k in [0, count), a step at a time, with each of which more of `ahead` is asked for. f
// must be inlined, or its sums are in memory.
template <class F>
FASTUNET_INLINE void in_steps(int64_t count, Ahead& ahead, F f) {
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep) {
    ahead.advance();
#pragma GCC unroll 4
    for (int i = 0; i < kStep; ++i) f(k + i);
  }
  if (k < count) ahead.advance();
  for (; k < count; ++k) f(k);
}

// Values that products read: twice the same pointer, which the compiler takes for two.
struct Values {
  const float *at, *again;
  FASTUNET_INLINE Values operator+(int64_t floats) const { return {at + floats, again + floats}; }
};
// An address that the compiler does not see the origin of.
template <class T>
FASTUNET_INLINE T* hidden(T* address) {
  asm("" : "+r"(address));
  return address;
}
FASTUNET_INLINE Values values_at(const float* x) { return {x, hidden(x)}; }

// R rows by B blocks of sums, in registers.
template <int R, int B>
struct Sums {
  vfloat at[R][B][kVecs] = {};

  // f(row, block, offset in the block, sum)
  template <class F>
  FASTUNET_INLINE void each(F f) {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i) f(r, b, i * kLanes, at[r][b][i]);
  }

  // Rows whose values are read for each block: with AVX-512, which alone has two of them, that is
  // one instruction with their multiplication, so fewer for the front end, which two threads may
  // share. The other rows' are read once, or there would be more loads than multiplications.
  static constexpr int kFolded = B > 1 ? R * 2 / 3 : 0;

  // at[r][b] += x[r * row] * w[b * block]: one value per row by a block of values
  FASTUNET_INLINE void add_product(Values x, int64_t row, const float* w, int64_t block) {
    vfloat factors[B][kVecs];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) factors[b][i] = load(w + b * block + i * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const vfloat value = splat(x.at[r * row]);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i)
          at[r][b][i] += (b == 1 && r < kFolded ? splat(x.again[r * row]) : value) * factors[b][i];
    }
  }

  // at[r][b] += v[...][r] * u[b], over K inputs, of which there is one at least: a loop that may
  // not run at all would have sums on the stack. v: blocks of 16 inputs v_block apart; u: blocks
  // u_block apart.
  FASTUNET_INLINE void add_products(const float* v, int64_t v_block, const float* u,
                                    int64_t u_block, int64_t K, Ahead& ahead) {
    Ahead lines = ahead;  // in registers
    Values x = values_at(v);
    do {
      in_steps(K < kBlock ? K : kBlock, lines, [&](int64_t k) __attribute__((always_inline)) {
        add_product(x + k, kBlock, u + k * kBlock, u_block);
      });
      K -= kBlock, x = x + v_block, u += kBlock * kBlock;
    } while (K > 0);
    ahead = lines;
  }

  FASTUNET_INLINE void load_from(const float* from, int64_t row, int64_t block) {
    const Blocks<const float> blocks(from, block);
    each([&](int r, int b, int c, vfloat& sum) { sum = load(blocks.at[b] + r * row + c); });
  }

  FASTUNET_INLINE void store_to(float* to, int64_t row, int64_t block) {
    const Blocks<float> blocks(to, block);
    each([&](int r, int b, int c, vfloat sum) { store(blocks.at[b] + r * row + c, sum); });
  }

 private:
  // Where blocks begin: hidden, or the addresses of all rows would be on the stack meanwhile.
  template <class T>
  struct Blocks {
    T* at[B];
    FASTUNET_INLINE Blocks(T* first, int64_t block) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) at[b] = hidden(first + b * block);
    }
  };
};

// R tiles, B blocks of outputs.
template <int R, int B>
void multiply_tile(const float* v, int64_t v_block, const float* u, int64_t u_block, int64_t K,
                   float* m, int64_t m_block, bool add, Ahead& ahead) {
  Sums<R, B> sums;
  if (add) sums.load_from(m, kBlock, m_block);
  sums.add_products(v, v_block, u, u_block, K, ahead);
  sums.store_to(m, kBlock, m_block);
}

// Calls f with `rows` as a compile-time number in 1 ... kMost.
template <int kMost, class F>
FASTUNET_INLINE void with_rows(int64_t rows, F f) {
  [&]<int... R>(std::integer_sequence<int, R...>) {
    (void)((rows == R + 1 && (f(std::integral_constant<int, R + 1>{}), true)) || ...);
  }(std::make_integer_sequence<int, kMost>{});
}

// B blocks of u and m, all tiles of v.
template <int B>
void multiply_blocks(const float* v, int64_t v_block, const float* u, int64_t u_block, int64_t K,
                     float* m, int64_t m_block, int64_t tiles, bool add, const Stretch& ahead,
                     const Stretch& more) {
  constexpr int kMost = kRows * kBlocks / B;
  const int64_t panels = ceil_div(tiles, kMost);
  Ahead lines(ahead, more, panels, ceil_div(K, kStep));
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t t = tiles * p / panels, rows = tiles * (p + 1) / panels - t;
    lines.start_panel();
    with_rows<kMost>(rows, [&](auto R) {
      multiply_tile<R, B>(v + t * kBlock, v_block, u, u_block, K, m + t * kBlock, m_block, add,
                          lines);
    });
  }
}

// Up to kBlocks blocks of u, each [K][16], and of m. `ahead`, then `more`, is asked for on the way.
inline void multiply(const float* v, int64_t v_block, const float* u, int64_t u_block, int64_t K,
                     float* m, int64_t m_block, int64_t blocks, int64_t tiles, bool add,
                     const Stretch& ahead = {}, const Stretch& more = {}) {
  if (blocks == kBlocks)
    return multiply_blocks<kBlocks>(v, v_block, u, u_block, K, m, m_block, tiles, add, ahead, more);
  if constexpr (kBlocks > 1)
    multiply_blocks<1>(v, v_block, u, u_block, K, m, m_block, tiles, add, ahead, more);
}

// `inputs` of one block (or some more) by B blocks of outputs; du: [16 inputs][du_row].
template <int B>
void correlate_blocks(const float* v, int64_t inputs, const float* d, int64_t d_block,
                      int64_t tiles, float* du, int64_t du_row, bool add, Ahead& ahead) {
  for (int64_t i = 0; i < inputs; i += kGradRows) {
    Sums<kGradRows, B> sums;
    if (add) sums.load_from(du + i * du_row, du_row, kBlock);
    const Values x = values_at(v + i);
    in_steps(tiles, ahead, [&](int64_t t) __attribute__((always_inline)) {
      sums.add_product(x + t * kBlock, 1, d + t * kBlock, d_block);
    });
    sums.store_to(du + i * du_row, du_row, kBlock);
  }
}

inline void correlate(const float* v, int64_t inputs, const float* d, int64_t d_block,
                      int64_t blocks, int64_t tiles, float* du, int64_t du_row, bool add,
                      const Stretch& ahead = {}) {
  Ahead lines(ahead, {}, ceil_div(blocks, kBlocks) * ceil_div(inputs, kGradRows),
              ceil_div(tiles, kStep));
  int64_t n = 0;
  for (; n + kBlocks <= blocks; n += kBlocks)
    correlate_blocks<kBlocks>(v, inputs, d + n * d_block, d_block, tiles, du + n * kBlock, du_row,
                              add, lines);
  if constexpr (kBlocks > 1)
    if (n < blocks)
      correlate_blocks<1>(v, inputs, d + n * d_block, d_block, tiles, du + n * kBlock, du_row, add,
                          lines);
}

}  // namespace fastunet
