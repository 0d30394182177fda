// How much of a convolution is done at a time, by caches and shapes.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <type_traits>

#include "common/map.h"
#include "conv_norm_act/winograd.h"

namespace fastunet {

// Names by which the system tells the sizes of caches; it knows none elsewhere.
#ifdef _SC_LEVEL2_CACHE_SIZE
inline constexpr int kL1Name = _SC_LEVEL1_DCACHE_SIZE, kL2Name = _SC_LEVEL2_CACHE_SIZE;
#else
inline constexpr int kL1Name = -1, kL2Name = -1;
#endif

// The size that the system tells, within bounds, or a usual one where it tells none.
template <int kName>
int64_t cache_bytes(int64_t least, int64_t most, int64_t usual) {
  static const int64_t told = sysconf(kName);
  return told > 0 ? std::clamp(told, least, most) : usual;
}
inline int64_t l1_bytes() { return cache_bytes<kL1Name>(32 << 10, 128 << 10, 32 << 10); }
inline int64_t l2_bytes() { return cache_bytes<kL2Name>(256 << 10, 2 << 20, 512 << 10); }

// Measured on Zen 4 and 5 with 1 MB of L2 per core and 32 MB of L3, see docs/performance-log.md:
// pixels of a map from which tiles of 6 are faster;
inline constexpr int64_t kLargeMap = 96 * 96;
// the same with AVX2, where products take twice as long beside transforms (Zen 3),
// up to so many bytes of their weights;
inline constexpr int64_t kLargeMapAvx2 = 48 * 48, kLargeMapBytes = 8 << 20;
// bytes of their weights from which tiles of 4 are faster forward where L2 has 2 MB, with AVX-512;
inline constexpr int64_t kLargeTileBytes = 1 << 20;
// tiles in a group whose weights stay in L2;
inline constexpr int64_t kLeastRows = 8;
// tiles in a range: of so many, two blocks of outputs stay in L2;
inline constexpr int64_t kMostRange = 128;
// for each block of inputs, cycles to transform a tile, or the weights of a block of outputs;
inline constexpr double kTileCycles = 600, kWeightCycles = 130 * 16;
// transformed tiles that a thread holds at a time;
inline constexpr int64_t kBatchBytes = 10 << 20;
// the same of both operands of the weight's gradient, which needs no weights again for each batch;
inline constexpr int64_t kGradBatchBytes = 4 << 20;
// sums of shares of the weight's gradient, tiles that are worth a share, and the most shares;
inline constexpr int64_t kSumBytes = 8 << 20, kShareTiles = 64, kMostShares = 16;
// the same by group, where a share's products stay in Winograd's domain, and the fewest shares, so
// that the threads of most machines have work;
inline constexpr int64_t kGroupShareTiles = 128, kLeastShares = 8;
// transformed weights that groups may stream from L3, and of tiles of 4 where L2 has 2 MB, as on
// Intel's servers (Emerald Rapids), whose L3 is slow;
inline constexpr int64_t kWeightBytes = 12 << 20, kFewerWeightBytes = 4 << 20;
// tiles in a group from which the weight's gradient, which adds up between groups, works by group.
inline constexpr int64_t kGradTiles = 20;
// tiles in a group from which both gradients share what they read, and so many at least if they
// fit;
inline constexpr int64_t kSharedTiles = 12, kSharedTarget = 24;
// what is in L2 for a group, on Emerald Rapids (forward).
inline constexpr int64_t kGroupBytes = 400 << 10;

template <int kTile>
int64_t streamed_bytes() {
  return kTile == 4 && l2_bytes() >= 2 << 20 ? kFewerWeightBytes : kWeightBytes;
}

// Into how many shares by group something goes whose sums are large: `units` of work, so many of
// which are worth a share.
inline int64_t shares_of(int64_t groups, int64_t units, int64_t worth) {
  const int64_t wanted = std::bit_ceil<uint64_t>(units / worth);
  return std::min(groups, std::clamp(wanted, kLeastShares, kMostShares));
}

// Of the weights of so many pairs of channels, transformed for tiles of 6.
inline int64_t large_tile_bytes(int64_t pairs) {
  return pairs * points_of(6) * static_cast<int64_t>(sizeof(float));
}

// Whether tiles of 6 may be faster than tiles of 4 forward: not where their weights, for so many
// pairs of channels, come from an L3 that is slow beside the products, which with AVX2 take twice
// as long.
inline bool few_weights(int64_t pairs) {
  return kLanes < 16 || l2_bytes() < 2 << 20 || large_tile_bytes(pairs) < kLargeTileBytes;
}

// Pixels from which maps are large, for so many pairs of channels.
inline int64_t large_map(int64_t pairs) {
  const bool small = kLanes < 16 && large_tile_bytes(pairs) <= kLargeMapBytes;
  return small ? kLargeMapAvx2 : kLargeMap;
}

// Calls f with the side of the tiles for `pairs` of channels of maps of H x W, a compile-time
// number: 6, if they may be large, on large maps where that saves a tenth of the products, not much
// of it being lost in tiles that reach beyond the map; elsewhere 4, whose rounding errors are a
// quarter, and in builds for any x86-64, which are slow anyway, and compile in half the time so.
template <class F>
void with_tile(int64_t H, int64_t W, int64_t pairs, bool large, F f) {
#if defined(__x86_64__) && !defined(__AVX2__)
  return f(std::integral_constant<int, 4>{});
#else
  const auto products = [&](int64_t tile) {
    return ceil_div(H, tile) * ceil_div(W, tile) * points_of(tile);
  };
  if (large && H * W >= large_map(pairs) && products(6) * 10 <= products(4) * 9)
    f(std::integral_constant<int, 6>{});
  else
    f(std::integral_constant<int, 4>{});
#endif
}

}  // namespace fastunet
