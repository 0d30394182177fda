// Matrix products of values in blocks of 16 channels, v: [blocks][t][16], where t counts tiles (of
// one point of Winograd's algorithm) or pixels:
//
//   multiply     m[n][t] (+)= sum over k of v[k][t] * u[n][k]
//   correlate    du[i][n] (+)= sum over t of v[i][t] * d[n][t]
//
// and the same for each of some points. `lines` of maps are asked for on the way: one of so many
// equal `parts`.
#pragma once

#include <type_traits>
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

// Blocks of values, `block` apart, of points that are `plane` apart.
template <class T>
struct Operand {
  T* data;
  int64_t block, plane = 0;
  Operand at(int64_t point) const { return {data + point * plane, block, plane}; }
  operator Operand<const T>() const
    requires(!std::is_const_v<T>)
  {
    return {data, block, plane};
  }
};

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
                                    int64_t u_block, int64_t K, const Ahead& ahead) {
    Ahead lines = ahead;  // in registers
    Values x = values_at(v);
    do {
      in_steps(K < kBlock ? K : kBlock, lines, [&](int64_t k) __attribute__((always_inline)) {
        add_product(x + k, kBlock, u + k * kBlock, u_block);
      });
      K -= kBlock, x = x + v_block, u += kBlock * kBlock;
    } while (K > 0);
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

// R tiles, B blocks of outputs. Not inlined, so that each is there once.
template <int R, int B>
__attribute__((noinline)) void multiply_tile(const float* v, int64_t v_block, const float* u,
                                             int64_t u_block, int64_t K, float* m, int64_t m_block,
                                             bool add, const Ahead& ahead) {
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

// B blocks of u and m, all tiles of v, in panels as equal as possible.
template <int B>
void multiply_blocks(const Operand<const float>& v, const Operand<const float>& u, int64_t K,
                     const Operand<float>& m, int64_t points, int64_t tiles, bool add,
                     Prefetch& lines, int64_t parts) {
  constexpr int kMost = kRows * kBlocks / B;
  if (tiles == 0) return;
  const int64_t panels = ceil_div(tiles, kMost);
  lines.share(parts, points * panels, ceil_div(K, kStep));
  // So many rows, or one less. What depends on their number is decided once, not for each panel:
  // products of 16 inputs take a hundred cycles.
  with_rows<kMost>(ceil_div(tiles, panels), [&](auto rows) {
    const auto panel = [&](auto rows, int64_t p, int64_t t) {
      multiply_tile<rows, B>(v.data + p * v.plane + t * kBlock, v.block, u.data + p * u.plane,
                             u.block, K, m.data + p * m.plane + t * kBlock, m.block, add,
                             lines.panel());
    };
    const int64_t less = panels * rows - tiles;
    for (int64_t p = 0; p < points; ++p) {
      int64_t t = 0;
      if constexpr (rows > 1)
        for (; t < less * (rows - 1); t += rows - 1)
          panel(std::integral_constant<int, rows - 1>{}, p, t);
      for (; t < tiles; t += rows) panel(rows, p, t);
    }
  });
}

// Up to kBlocks blocks of u, each [K][16], and of m.
inline void multiply(const Operand<const float>& v, const Operand<const float>& u, int64_t K,
                     const Operand<float>& m, int64_t blocks, int64_t points, int64_t tiles,
                     bool add, Prefetch& lines, int64_t parts) {
  if (blocks == kBlocks)
    return multiply_blocks<kBlocks>(v, u, K, m, points, tiles, add, lines, parts);
  if constexpr (kBlocks > 1) multiply_blocks<1>(v, u, K, m, points, tiles, add, lines, parts);
}

// R inputs from v on by B blocks of outputs; du: rows of inputs, `du_row` apart.
template <int R, int B>
FASTUNET_INLINE void correlate_tile(const float* v, const float* d, int64_t d_block, int64_t tiles,
                                    float* du, int64_t du_row, bool add, const Ahead& ahead) {
  Sums<R, B> sums;
  if (add) sums.load_from(du, du_row, kBlock);
  Ahead lines = ahead;  // in registers
  const Values x = values_at(v);
  in_steps(tiles, lines, [&](int64_t t) __attribute__((always_inline)) {
    sums.add_product(x + t * kBlock, 1, d + t * kBlock, d_block);
  });
  sums.store_to(du, du_row, kBlock);
}

// `inputs` of one block (or some more) by `blocks` blocks of outputs; du: [16 inputs][du.block].
inline void correlate(const Operand<const float>& v, int64_t inputs, const Operand<const float>& d,
                      int64_t blocks, int64_t points, int64_t tiles, const Operand<float>& du,
                      bool add, Prefetch& lines, int64_t parts) {
  const int64_t panels = ceil_div(blocks, kBlocks) * ceil_div(inputs, kGradRows);
  lines.share(parts, points * panels, ceil_div(tiles, kStep));
  const auto tile = [&](auto rows, auto count, int64_t p, int64_t i, int64_t n) {
    correlate_tile<rows, count>(v.at(p).data + i, d.at(p).data + n * d.block, d.block, tiles,
                                du.at(p).data + i * du.block + n * kBlock, du.block, add,
                                lines.panel());
  };
  constexpr auto kOne = std::integral_constant<int, 1>{};
  constexpr auto kFew = std::integral_constant<int, kGradRows>{};
  for (int64_t p = 0; p < points; ++p) {
    int64_t n = 0;
    for (; n + kBlocks <= blocks; n += kBlocks)
      for (int64_t i = 0; i < inputs; i += kGradRows)
        tile(kFew, std::integral_constant<int, kBlocks>{}, p, i, n);
    if constexpr (kBlocks > 1) {
      if (n == blocks) continue;
      // More rows instead of more blocks.
      int64_t i = 0;
      for (; i + kGradRows < inputs; i += 2 * kGradRows)
        tile(std::integral_constant<int, 2 * kGradRows>{}, kOne, p, i, n);
      if (i < inputs) tile(kFew, kOne, p, i, n);
    }
  }
}

}  // namespace fastunet
