// The weight's gradient of a 3x3 convolution by Winograd's algorithm.
//
// By group, for large maps of few channels: a thread adds up its groups of tiles. By stage, for
// small maps of many channels: all threads transform a batch of tiles, then each takes blocks of
// the weight.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/workspace.h"
#include "conv_norm_act/tiles.h"
#include "conv_norm_act/work_size.h"

namespace fastunet {

// The weight's gradient, [O, I, 3, 3] dense, from the input and the output's gradient.
template <int kTile, class T>
class WeightGrad {
  static constexpr int kPoints = points_of(kTile);

 public:
  WeightGrad(const Input<T>& x, const Input<T>& dy, float* dweight)
      : x_(x), dy_(dy), dweight_(dweight), read_x_(x), read_dy_(dy) {}

  void run() const {
    const int64_t inputs = blocks_of(x_.C), outputs = blocks_of(dy_.C);
    const int64_t tile_bytes = kPoints * (inputs + outputs) * kBlock * 4;
    const int64_t tiles = x_.N * ceil_div(x_.H, kTile) * ceil_div(x_.W, kTile);
    const int64_t target = l2_bytes() * 3 / 5 / tile_bytes;
    if (target >= kGradTiles && tiles >= 8 * target)
      by_group(Tiling(x_.N, x_.H, x_.W, kTile, target));
    else
      by_stage(Tiling(x_.N, x_.H, x_.W, kTile, 32));
  }

  // The steps of by_group: sums over the groups of each of a fixed number of shares, added up at
  // last.
  static int64_t shares(const Tiling& tiling) { return std::min<int64_t>(tiling.count(), 16); }
  // [blocks of outputs][inputs][taps][16]
  int64_t sum_floats() const { return blocks_of(dy_.C) * sum_block(); }
  int64_t scratch_floats(const Tiling& tiling) const {
    return Panels::floats(kPoints, blocks_of(x_.C), tiling.max_tiles()) +
           Panels::floats(kPoints, blocks_of(dy_.C), tiling.max_tiles()) + kept_floats() +
           reader_floats(tiling);
  }
  // f(group) for the groups of a share, whose sum is zero before and complete behind it.
  template <class F>
  void for_share(const Tiling& tiling, int64_t share, float* scratch, float* sum, F f) const {
    std::fill_n(sum, sum_floats(), 0.0f);
    if (keeps_products()) std::fill_n(scratch, kept_floats(), 0.0f);
    const int64_t count = tiling.count(), all = shares(tiling);
    for (int64_t g = count * share / all; g < count * (share + 1) / all; ++g) f(g);
    if (keeps_products())
      for_pairs([&](int64_t i, int64_t o, int64_t pair) {
        add_transformed(scratch + pair * product_floats(), i, o, sum);
      });
  }
  // `rest`: of the scratch, behind what for_share keeps.
  float* rest(float* scratch) const { return scratch + kept_floats(); }
  void add_group(const Tiling& tiling, int64_t g, float* scratch, float* sum,
                 Prefetch& lines) const {
    const int64_t inputs = blocks_of(x_.C), outputs = blocks_of(dy_.C);
    const Tiling::Group group = tiling.group(g);
    const Panels v{rest(scratch), inputs, group.tiles()};
    const Panels d{v.data + Panels::floats(kPoints, inputs, group.tiles()), outputs, group.tiles()};
    float* reading = d.data + Panels::floats(kPoints, outputs, group.tiles());
    read_x_.read(group, 0, inputs, v, 0, reading);
    read_dy_.read(group, 0, outputs, d, 0, reading);
    for_pairs([&](int64_t i, int64_t o, int64_t pair) {
      const bool keep = keeps_products();
      float* product = scratch + (keep ? pair * product_floats() : 0);
      multiply(v, d, i, o, product, keep, lines);
      if (!keep) add_transformed(product, i, o, sum);
    });
  }
  // The sums of all shares, to the weight's layout. They may be where that is.
  void finish(const float* sums, int64_t shares) const {
    const int64_t I = x_.C, O = dy_.C;
    torch::stable::parallel_for(0, blocks_of(O), 1, [&](int64_t begin, int64_t end) {
      float* total = thread_workspace().get(sum_block());
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t c = 0; c < sum_block(); c += kLanes) {
          const float* from = sums + b * sum_block() + c;
          vfloat value = load(from);
          for (int64_t s = 1; s < shares; ++s) value += load(from + s * sum_floats());
          store(total + c, value);
        }
        for (int64_t i = 0; i < I; ++i)
          scatter_taps(total + i * kTaps * kBlock, I * kTaps, O - b * kBlock,
                       dweight_ + (b * kBlock * I + i) * kTaps);
      }
    });
  }
  const Reader<InputTransform<kTile>, T>& input_reader() const { return read_x_; }

 private:
  static int64_t reader_floats(const Tiling& tiling) {
    return Reader<InputTransform<kTile>, T>::scratch_floats(tiling);
  }

  void by_group(const Tiling& tiling) const {
    float* sums = shared_workspace().get(shares(tiling) * sum_floats());
    torch::stable::parallel_for(0, shares(tiling), 1, [&](int64_t begin, int64_t end) {
      float* scratch = thread_workspace().get(scratch_floats(tiling));
      for (int64_t share = begin; share < end; ++share) {
        float* sum = sums + share * sum_floats();
        for_share(tiling, share, scratch, sum, [&](int64_t g) {
          Prefetch none;
          add_group(tiling, g, scratch, sum, none);
        });
      }
    });
    finish(sums, shares(tiling));
  }

  void by_stage(const Tiling& tiling) const {
    const int64_t inputs = blocks_of(x_.C), outputs = blocks_of(dy_.C);
    const int64_t fit = kGradBatchBytes / (kPoints * (inputs + outputs) * kBlock * 4);
    const int64_t batch = std::max<int64_t>(1, fit / tiling.max_tiles());
    const int64_t most = std::min(batch, tiling.count()) * tiling.max_tiles();
    // The sum, as large as the weight, is added up where its end result goes.
    const bool in_place = dy_.C % kBlock == 0;
    float* panels = shared_workspace().get((in_place ? 0 : sum_floats()) +
                                           Panels::floats(kPoints, inputs, most) +
                                           Panels::floats(kPoints, outputs, most));
    float* sums = dweight_;
    if (!in_place) sums = panels, panels += sum_floats();
    std::fill_n(sums, sum_floats(), 0.0f);
    for (int64_t first = 0; first < tiling.count(); first += batch) {
      const int64_t last = std::min(first + batch, tiling.count());
      const std::vector<int64_t> offsets = tiling.offsets(first, last);
      const int64_t tiles = offsets.back();
      const Panels v{panels, inputs, tiles};
      const Panels d{v.data + Panels::floats(kPoints, inputs, tiles), outputs, tiles};
      const int64_t blocks = inputs + outputs;
      torch::stable::parallel_for(0, (last - first) * blocks, 1, [&](int64_t begin, int64_t end) {
        float* scratch = thread_workspace().get(reader_floats(tiling));
        for (int64_t task = begin; task < end; ++task) {
          const Tiling::Group group = tiling.group(first + task / blocks);
          const int64_t b = task % blocks, offset = offsets[task / blocks];
          if (b < inputs)
            read_x_.read(group, b, b + 1, v, offset, scratch);
          else
            read_dy_.read(group, b - inputs, b - inputs + 1, d, offset, scratch);
        }
      });
      const int64_t columns = ceil_div(outputs, kBlocks);
      torch::stable::parallel_for(0, inputs * columns, 1, [&](int64_t begin, int64_t end) {
        float* product = thread_workspace().get(product_floats());
        Prefetch none;
        for (int64_t task = begin; task < end; ++task) {
          const int64_t i = task / columns, o = task % columns * kBlocks;
          multiply(v, d, i, o, product, false, none);
          add_transformed(product, i, o, sums);
        }
      });
    }
    finish(sums, 1);
  }

  static constexpr int64_t kProductRow = kBlocks * kBlock;
  static constexpr int64_t kProductPlane = kBlock * kProductRow + kBlock;
  static constexpr int64_t product_floats() { return kPoints * kProductPlane; }

  // One block of inputs by kBlocks blocks of outputs is a pair.
  int64_t pairs() const { return blocks_of(x_.C) * ceil_div(blocks_of(dy_.C), kBlocks); }
  template <class F>
  void for_pairs(F f) const {
    int64_t pair = 0;
    for (int64_t i = 0; i < blocks_of(x_.C); ++i)
      for (int64_t o = 0; o < blocks_of(dy_.C); o += kBlocks) f(i, o, pair++);
  }
  // Whether by group the products of all pairs stay in Winograd's domain, and in L2, for a share.
  bool keeps_products() const { return pairs() * product_floats() * 4 <= l2_bytes() * 3 / 10; }
  int64_t kept_floats() const { return (keeps_products() ? pairs() : 1) * product_floats(); }

  // product (+)= v's block i by d's blocks from o on, at all points.
  void multiply(const Panels& v, const Panels& d, int64_t i, int64_t o, float* product, bool add,
                Prefetch& lines) const {
    const int64_t count = std::min<int64_t>(kBlocks, d.blocks - o);
    const int64_t inputs = std::min<int64_t>(kBlock, x_.C - i * kBlock);
    for (int p = 0; p < kPoints; ++p) {
      lines.advance(kPoints * pairs());
      correlate(v.at(p, i), inputs, d.at(p, o), d.block(), count, v.tiles,
                product + p * kProductPlane, kProductRow, add);
    }
  }

  int64_t sum_block() const { return x_.C * kTaps * kBlock; }

  // The sum of input block i and outputs from block o on += product, transformed.
  void add_transformed(const float* product, int64_t i, int64_t o, float* sum) const {
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
                store(tap, load(tap) + value);
              });
        }
  }

  const Input<T>&x_, &dy_;
  float* dweight_;
  Reader<InputTransform<kTile>, T> read_x_;
  Reader<GradTransform<kTile>, T> read_dy_;
};

}  // namespace fastunet
