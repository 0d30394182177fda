// The weight's gradient of a 3x3 convolution by Winograd's algorithm.
//
// Tiles go in a fixed number of shares, each with a sum of its own, which are added up at last: the
// result does not depend on the number of threads.
// * by group: a group of tiles at a time, the products of all pairs of blocks staying in Winograd's
//   domain and in L2 for a share. For large maps of few channels.
// * by share: batches of tiles, pair by pair. For more channels, whose sums are few and large:
//   inputs and outputs are then divided as well, so that there is a task for each thread.
#pragma once

#include <bit>
#include <utility>

#include "common/parallel.h"
#include "common/workspace.h"
#include "conv_norm_act/tiles.h"
#include "conv_norm_act/work_size.h"

namespace fastunet {

// The weight's gradient, [O, I, 3, 3] dense, from the input and the output's gradient.
template <int kTile, class T>
class WeightGrad {
  static constexpr int kPatch = patch_of(kTile), kPoints = points_of(kTile);

 public:
  WeightGrad(const Input<T>& x, const Input<T>& dy, float* dweight)
      : x_(x), dy_(dy), dweight_(dweight), read_x_(x), read_dy_(dy) {}

  void run() const {
    const int64_t tiles = x_.N * ceil_div(x_.H, kTile) * ceil_div(x_.W, kTile);
    if (tiles == 0) return (void)std::fill_n(dweight_, dy_.C * x_.C * kTaps, 0.0f);
    const int64_t blocks = blocks_of(x_.C) + blocks_of(dy_.C);
    const int64_t target = std::min(l2_bytes() * 3 / 5 / (kPatch * kTile * blocks * kBlock * 4),
                                    l1_bytes() / (kPatch * blocks * kBlock * 4));
    if (products_bytes() <= l2_bytes() * 3 / 5 && target >= kGradTiles && tiles >= 8 * target)
      by_group(Tiling(x_.N, x_.H, x_.W, kTile, target));
    else
      by_share(Tiling(x_.N, x_.H, x_.W, kTile, 32));
  }

  // The products of all pairs, which each group reads and writes.
  int64_t products_bytes() const { return products_floats() * 4; }
  // The steps of by_group: sums over the groups of each of `shares`.
  static int64_t shares(const Tiling& tiling) {
    return shares_of(tiling.count(), tiling.max_tiles_of_all(), kGroupShareTiles);
  }
  // [blocks of outputs][inputs][taps][16]
  int64_t sum_floats() const { return blocks_of(dy_.C) * sum_block(); }
  int64_t scratch_floats(const Tiling& tiling) const {
    return products_floats() + grad_floats(tiling) + read_x_.columns_floats(tiling) +
           Panels::floats(kPatch, blocks_of(x_.C), tiling.max_tiles()) +
           Panels::floats(kPatch, blocks_of(dy_.C), tiling.max_tiles()) +
           read_x_.patch_floats(tiling);
  }
  // f(group, add) for the groups of a share, all but the first to be added; then its sum is
  // complete.
  template <class F>
  void for_share(const Tiling& tiling, int64_t share, float* scratch, float* sum, F f) const {
    const int64_t count = tiling.count(), all = shares(tiling), first = count * share / all;
    for (int64_t g = first; g < count * (share + 1) / all; ++g) f(g, g > first);
    for_pairs(
        [&](int64_t i, int64_t o, float* product) { add_transformed(product, i, o, sum, false); },
        scratch);
  }
  // Of the scratch, behind what for_share keeps: the columns of the output's gradient, then more.
  float* rest(float* scratch) const { return scratch + products_floats(); }
  int64_t grad_floats(const Tiling& tiling) const { return read_dy_.columns_floats(tiling); }
  // add: to the products; else they are written.
  void add_group(const Tiling& tiling, int64_t g, bool add, float* products, const float* grad_z,
                 float* more, Prefetch& lines) const {
    const Tiling::Group group = tiling.group(g);
    Scratch left{more};
    float* z = left.take(read_x_.columns_floats(tiling));
    const Panels v = left.panels(kPatch, blocks_of(x_.C), group.tiles());
    const Panels d = left.panels(kPatch, blocks_of(dy_.C), group.tiles());
    read_x_.read_columns(group, z, left.rest);
    for (int r = 0; r < kPatch; ++r) {
      read_x_.read_row(group, r, z, v);
      read_dy_.read_row(group, r, grad_z, d);
      for_pairs(
          [&](int64_t i, int64_t o, float* product) {
            multiply(v, d, i, o, product + r * kPatch * kProductPlane, kPatch, add, lines);
          },
          products);
    }
  }
  // The sums of all shares, to the weight's layout. They may be where that is.
  void finish(const float* sums, int64_t shares) const {
    parallel_tasks(blocks_of(dy_.C), [&](int64_t b) {
      float* total = thread_workspace().get(sum_block());
      for (int64_t c = 0; c < sum_block(); c += kLanes) {
        const float* from = sums + b * sum_block() + c;
        vfloat value = load(from);
        for (int64_t s = 1; s < shares; ++s) value += load(from + s * sum_floats());
        store(total + c, value);
      }
      store_grad(total, b, 0, blocks_of(x_.C));
    });
  }
  const Reader<InputTransform<kTile>, T>& input_reader() const { return read_x_; }

 private:
  static int64_t reader_floats(const Tiling& tiling) {
    return Reader<InputTransform<kTile>, T>::scratch_floats(tiling);
  }

  // What the group behind g reads.
  Prefetch next_lines(const Tiling& tiling, int64_t g) const {
    Prefetch lines;
    read_x_.prefetch_next(tiling, g, lines);
    read_dy_.prefetch_next(tiling, g, lines);
    return lines;
  }

  void by_group(const Tiling& tiling) const {
    float* sums = shared_workspace().get(shares(tiling) * sum_floats());
    parallel_tasks(shares(tiling), [&](int64_t share) {
      float* scratch = thread_workspace().get(scratch_floats(tiling));
      for_share(tiling, share, scratch, sums + share * sum_floats(), [&](int64_t g, bool add) {
        Prefetch next = next_lines(tiling, g);
        float* grad_z = rest(scratch);
        float* more = grad_z + grad_floats(tiling);
        read_dy_.read_columns(tiling.group(g), grad_z, more);
        add_group(tiling, g, add, scratch, grad_z, more, next);
      });
    });
    finish(sums, shares(tiling));
  }

  void by_share(const Tiling& tiling) const {
    const int64_t inputs = blocks_of(x_.C), outputs = blocks_of(dy_.C);
    const int64_t columns = ceil_div(outputs, kBlocks);
    const int64_t most =
        std::min(kSumBytes / (sum_floats() * 4), tiling.max_tiles_of_all() / kShareTiles);
    const int64_t shares = std::bit_floor<uint64_t>(std::clamp<int64_t>(most, 1, kMostShares));
    // Parts of what is more: each part reads all of the other.
    const int64_t wanted = ceil_div(torch::stable::get_num_threads(), shares);
    int64_t i_parts = inputs > outputs ? std::min(wanted, inputs) : 1;
    const int64_t o_parts = std::min(ceil_div(wanted, i_parts), columns);
    i_parts = std::min(ceil_div(wanted, o_parts), inputs);
    const int64_t parts = i_parts * o_parts;
    // A single sum, as large as the weight, is complete at once, or added up where it goes.
    const bool at_once = shares == 1 && batch_groups(tiling) >= tiling.count();
    const bool in_place = shares == 1 && dy_.C % kBlock == 0;
    float* sums = at_once    ? nullptr
                  : in_place ? dweight_
                             : shared_workspace().get(shares * sum_floats());
    parallel_tasks(shares * parts, [&](int64_t task) {
      const int64_t share = task / parts, i = task % parts / o_parts, o = task % o_parts;
      const auto part = [](int64_t count, int64_t index, int64_t of) {
        return Range{count * index / of, count * (index + 1) / of};
      };
      const auto [o0, o1] = part(columns, o, o_parts);
      add_groups(tiling, part(tiling.count(), share, shares), part(inputs, i, i_parts),
                 {o0 * kBlocks, std::min<int64_t>(o1 * kBlocks, outputs)},
                 at_once ? nullptr : sums + share * sum_floats());
    });
    if (!at_once) finish(sums, shares);
  }

  // Groups whose tiles are there at a time: more where sums are large, which each batch reads and
  // writes. By whole inputs and outputs: the order of sums shall not depend on the number of parts.
  int64_t batch_groups(const Tiling& tiling) const {
    const int64_t tile_bytes = kPoints * (blocks_of(x_.C) + blocks_of(dy_.C)) * kBlock * 4;
    const int64_t fit = std::max(kGradBatchBytes, sum_floats() * 4) / tile_bytes;
    return std::max<int64_t>(1, fit / tiling.max_tiles());
  }

  // A range of groups to a range of blocks of inputs and outputs of a sum; or, without one, of all
  // groups, which are one batch, to the weight's gradient.
  using Range = std::pair<int64_t, int64_t>;
  void add_groups(const Tiling& tiling, Range groups, Range inputs, Range outputs,
                  float* sum) const {
    const auto [i0, i1] = inputs;
    const auto [o0, o1] = outputs;
    const int64_t batch = batch_groups(tiling);
    const int64_t most = std::min(batch, groups.second - groups.first) * tiling.max_tiles();
    // Outputs whose tiles stay in L2, so that the inputs' are read less often.
    const int64_t fit = l2_bytes() / 2 / (kPoints * kBlocks * most * kBlock * 4);
    const int64_t set = std::clamp<int64_t>(fit, 1, 4) * kBlocks;
    const int64_t v_floats = Panels::floats(kPoints, i1 - i0, most);
    const int64_t d_floats = Panels::floats(kPoints, o1 - o0, most);
    const int64_t set_floats = sum ? 0 : set * sum_block();
    Scratch left{thread_workspace().get(product_floats() + v_floats + d_floats + set_floats +
                                        read_x_.scratch_floats(tiling))};
    float* product = left.take(product_floats());
    float* const v_data = left.take(v_floats);
    float* const d_data = left.take(d_floats);
    float* const set_sum = left.take(set_floats);
    Prefetch none;
    for (int64_t first = groups.first; first < groups.second; first += batch) {
      const std::vector<int64_t> offsets =
          tiling.offsets(first, std::min(first + batch, groups.second));
      const int64_t tiles = offsets.back();
      const Panels v = Panels{v_data, i1 - i0, tiles}.counted_from(i0);
      const Panels d = Panels{d_data, o1 - o0, tiles}.counted_from(o0);
      for (size_t g = 0; g + 1 < offsets.size(); ++g) {
        const Tiling::Group group = tiling.group(first + g);
        Prefetch next = next_lines(tiling, first + g);
        const int64_t parts = i1 - i0 + o1 - o0;
        read_x_.read(group, i0, i1, v, offsets[g], left.rest, next, parts);
        read_dy_.read(group, o0, o1, d, offsets[g], left.rest, next, parts);
      }
      for (int64_t begin = o0; begin < o1; begin += set) {
        const int64_t end = std::min(begin + set, o1);
        float* to = sum ? sum : set_sum - begin * sum_block();
        for (int64_t i = i0; i < i1; ++i)
          for (int64_t o = begin; o < end; o += kBlocks) {
            multiply(v, d, i, o, product, kPoints, false, none);
            add_transformed(product, i, o, to, first > groups.first);
          }
        if (!sum)
          for (int64_t o = begin; o < end; ++o) store_grad(to + o * sum_block(), o, i0, i1);
      }
    }
  }

  // A block of outputs' sum for blocks [i0, i1) of inputs, to the weight's layout.
  void store_grad(const float* sum, int64_t o, int64_t i0, int64_t i1) const {
    const int64_t row = x_.C * kTaps, first = i0 * kBlock * kTaps;
    scatter_taps(sum + first * kBlock, std::min(i1 * kBlock * kTaps, row) - first, row,
                 dy_.C - o * kBlock, dweight_ + o * kBlock * row + first);
  }

  static constexpr int64_t kProductRow = kBlocks * kBlock;
  static constexpr int64_t kProductPlane = kBlock * kProductRow + kBlock;
  static constexpr int64_t product_floats() { return kPoints * kProductPlane; }

  // One block of inputs by kBlocks blocks of outputs is a pair.
  int64_t pairs() const { return blocks_of(x_.C) * ceil_div(blocks_of(dy_.C), kBlocks); }
  int64_t products_floats() const { return pairs() * product_floats(); }
  // f(block of inputs, first block of outputs, the pair's products).
  template <class F>
  void for_pairs(F f, float* products) const {
    for (int64_t i = 0; i < blocks_of(x_.C); ++i)
      for (int64_t o = 0; o < blocks_of(dy_.C); o += kBlocks, products += product_floats())
        f(i, o, products);
  }

  // product (+)= v's block i by d's blocks from o on, at `points` points.
  void multiply(const Panels& v, const Panels& d, int64_t i, int64_t o, float* product, int points,
                bool add, Prefetch& lines) const {
    const int64_t count = std::min<int64_t>(kBlocks, blocks_of(dy_.C) - o);
    const int64_t inputs = std::min<int64_t>(kBlock, x_.C - i * kBlock);
    correlate(v.part(0, i), inputs, d.part(0, o), count, points, v.tiles,
              {product, kProductRow, kProductPlane}, add, lines, kPoints / points * pairs());
  }

  int64_t sum_block() const { return x_.C * kTaps * kBlock; }

  // The sum of input block i and outputs from block o on (+)= product, transformed.
  void add_transformed(const float* product, int64_t i, int64_t o, float* sum, bool add) const {
    const int64_t count = std::min<int64_t>(kBlocks, blocks_of(dy_.C) - o);
    for (int64_t b = 0; b < count; ++b)
      for (int64_t k = 0; k < std::min<int64_t>(kBlock, x_.C - i * kBlock); ++k)
        for (int64_t c = 0; c < kBlock; c += kLanes) {
          const float* from = product + k * kProductRow + b * kBlock + c;
          float* to = sum + (o + b) * sum_block() + (i * kBlock + k) * kTaps * kBlock + c;
          transform_square<WeightGradTransform<kTile>>(
              [&](int r, int s) { return load(from + (r * patch_of(kTile) + s) * kProductPlane); },
              [&](int r, int s, vfloat value) {
                float* tap = to + (r * 3 + s) * kBlock;
                store(tap, add ? load(tap) + value : value);
              });
        }
  }

  const Input<T>&x_, &dy_;
  float* dweight_;
  Reader<InputTransform<kTile>, T> read_x_;
  Reader<GradTransform<kTile>, T> read_dy_;
};

}  // namespace fastunet
