// 3x3 convolutions by Winograd's algorithm: forward (and, with the weight turned around, the
// input's gradient) and the weight's gradient.
//
// Two orders of work, chosen by shape and caches alone, so that results do not depend on threads:
// * by group: a thread takes a group of tiles through all three stages, which stay in its L2. For
//   large maps of few channels.
// * by stage: all threads transform a batch of tiles; then each takes blocks of output channels
//   through products and output transform, transforming their weights on the way. For small maps of
//   many channels, whose weights are the larger part.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include "common/workspace.h"
#include "conv_norm_act/tiles.h"
#include "conv_norm_act/weight.h"

namespace fastunet {

inline int64_t l2_bytes() {
  static const int64_t bytes = [] {
    int64_t size = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return size > 0 ? std::clamp<int64_t>(size, 256 << 10, 2 << 20) : 512 << 10;
  }();
  return bytes;
}

// Measured on Zen 4 and 5 with 1 MB of L2 per core and 32 MB of L3, see docs/performance-log.md:
// pixels of a map from which tiles of 6 are faster;
inline constexpr int64_t kLargeMap = 96 * 96;
// tiles in a group whose weights stay in L2;
inline constexpr int64_t kLeastRows = 8;
// transformed tiles held at a time, shared by all threads;
inline constexpr int64_t kBatchBytes = 8 << 20;
// the same of both operands of the weight's gradient, which needs no weights again for each batch;
inline constexpr int64_t kGradBatchBytes = 4 << 20;
// transformed weights that groups may stream from L3;
inline constexpr int64_t kWeightBytes = 12 << 20;
// tiles in a group from which the weight's gradient, which adds up between groups, works by group.
inline constexpr int64_t kGradTiles = 20;
// tiles in a group from which both gradients share what they read.
inline constexpr int64_t kSharedTiles = 10;

// Calls f with the side of the tiles for maps of H x W, a compile-time number: 6 on large maps
// where that saves a tenth of the products, not much of it being lost in tiles that reach beyond
// the map; elsewhere 4, whose rounding errors are a quarter, and in builds for any x86-64, which
// are slow anyway, and compile in half the time so.
template <class F>
void with_tile(int64_t H, int64_t W, F f) {
#if defined(__x86_64__) && !defined(__AVX2__)
  return f(std::integral_constant<int, 4>{});
#else
  const auto products = [&](int64_t tile) {
    return ceil_div(H, tile) * ceil_div(W, tile) * points_of(tile);
  };
  if (H * W >= kLargeMap && products(6) * 10 <= products(4) * 9)
    f(std::integral_constant<int, 6>{});
  else
    f(std::integral_constant<int, 4>{});
#endif
}

// Output: RawOutput or SourceGrad.
template <int kTile, class T, class Output>
class Convolution {
  static constexpr int kPoints = points_of(kTile);

 public:
  Convolution(const Input<T>& in, const Weight& weight, const Output& output)
      : in_(in), weight_(weight), output_(output), reader_(in) {}

  void run() const {
    const int64_t least = weight_bytes() > 2 * l2_bytes() ? kRows : kLeastRows;
    const int64_t target = std::max<int64_t>(l2_bytes() * 3 / 5 / bytes_of_tile(), least);
    if (worth_groups(target))
      by_group(Tiling(in_.N, in_.H, in_.W, kTile, target));
    else
      by_stage(Tiling(in_.N, in_.H, in_.W, kTile, 2 * kRows));
  }

  // Whether groups of `target` tiles should stay with a thread.
  bool worth_groups(int64_t target) const {
    const int64_t tiles = in_.N * ceil_div(in_.H, kTile) * ceil_div(in_.W, kTile);
    return tiles >= 8 * target && weight_bytes() <= kWeightBytes;
  }
  // What is in L2 at a time: a group's tiles, its outputs, and what the next one reads.
  int64_t bytes_of_tile() const {
    return kPoints * (inputs() + outputs()) * kBlock * 4 + reader_.bytes_of_tile() +
           output_.bytes_of_tile();
  }

  // The steps of by_group: the transformed weights, then group by group.
  int64_t weight_floats() const { return kPoints * u_plane(); }
  void transform_weights(float* u) const {
    torch::stable::parallel_for(0, outputs(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        transform_weight<kTile>(weight_, 0, in_.C, b, u + b * in_.C * kBlock, u_plane());
    });
  }
  int64_t scratch_floats(const Tiling& tiling) const {
    return Panels::floats(kPoints, inputs(), tiling.max_tiles()) +
           Panels::floats(kPoints, outputs(), tiling.max_tiles()) +
           Reader<InputTransform<kTile>, T>::scratch_floats(tiling);
  }
  void convolve_group(const Tiling& tiling, int64_t g, const float* u, float* scratch,
                      Prefetch& lines) const {
    const Tiling::Group group = tiling.group(g);
    const Panels v{scratch, inputs(), group.tiles()};
    const Panels m{scratch + Panels::floats(kPoints, inputs(), group.tiles()), outputs(),
                   group.tiles()};
    reader_.read(group, 0, inputs(), v, 0,
                 m.data + Panels::floats(kPoints, outputs(), group.tiles()));
    for (int p = 0; p < kPoints; ++p) {
      lines.advance(kPoints);
      multiply(v.at(p, 0), v.block(), u + p * u_plane(), in_.C, m.at(p, 0), m.block(), outputs(),
               group.tiles(), false);
    }
    output_.write(group, g, 0, outputs(), m, 0);
  }
  void prefetch_input(const Tiling::Group& group, Prefetch& lines) const {
    reader_.prefetch(group, lines);
  }

 private:
  int64_t inputs() const { return blocks_of(in_.C); }
  int64_t outputs() const { return blocks_of(weight_.N); }
  int64_t weight_bytes() const { return kPoints * inputs() * outputs() * kBlock * kBlock * 4; }
  int64_t u_plane() const { return outputs() * in_.C * kBlock + kBlock; }

  void by_group(const Tiling& tiling) const {
    output_.prepare(tiling);
    float* u = shared_workspace().get(weight_floats());
    transform_weights(u);
    torch::stable::parallel_for(0, tiling.count(), 1, [&](int64_t begin, int64_t end) {
      float* scratch = thread_workspace().get(scratch_floats(tiling));
      for (int64_t g = begin; g < end; ++g) {
        Prefetch lines;
        output_.prefetch_read(tiling.group(g), lines);
        output_.prefetch_written(tiling.group(g), lines);
        if (g + 1 < end) prefetch_input(tiling.group(g + 1), lines);
        convolve_group(tiling, g, u, scratch, lines);
      }
    });
  }

  void by_stage(const Tiling& tiling) const {
    output_.prepare(tiling);
    const int64_t inputs = this->inputs(), outputs = this->outputs();
    const int64_t fit = kBatchBytes / (kPoints * inputs * kBlock * 4);
    const int64_t batch = std::max<int64_t>(1, fit / tiling.max_tiles());  // groups
    for (int64_t first = 0; first < tiling.count(); first += batch) {
      const int64_t last = std::min(first + batch, tiling.count());
      const std::vector<int64_t> offsets = tiling.offsets(first, last);
      const int64_t tiles = offsets.back();
      const Panels v{shared_workspace().get(Panels::floats(kPoints, inputs, tiles)), inputs, tiles};
      torch::stable::parallel_for(0, (last - first) * inputs, 1, [&](int64_t begin, int64_t end) {
        float* scratch =
            thread_workspace().get(Reader<InputTransform<kTile>, T>::scratch_floats(tiling));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t g = task / inputs, b = task % inputs;
          reader_.read(tiling.group(first + g), b, b + 1, v, offsets[g], scratch);
        }
      });
      // A task: kBlocks blocks of outputs by about 128 tiles.
      const int64_t per_range = std::max<int64_t>(1, 128 / tiling.max_tiles());
      const int64_t ranges = ceil_div(last - first, per_range);
      const int64_t columns = ceil_div(outputs, kBlocks);
      torch::stable::parallel_for(0, columns * ranges, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t block = task / ranges * kBlocks;
          const int64_t g0 = task % ranges * per_range;
          const int64_t g1 = std::min(g0 + per_range, last - first);
          outputs_of(tiling, v, offsets, first, g0, g1, block,
                     std::min<int64_t>(block + kBlocks, outputs));
        }
      });
    }
  }

  // Blocks [begin, end) of outputs of groups first + [g0, g1).
  void outputs_of(const Tiling& tiling, const Panels& v, const std::vector<int64_t>& offsets,
                  int64_t first, int64_t g0, int64_t g1, int64_t begin, int64_t end) const {
    const int64_t tiles = offsets[g1] - offsets[g0], blocks = end - begin;
    const int64_t at_once =
        std::max<int64_t>(1, l2_bytes() * 3 / 10 / (kPoints * kBlocks * kBlock * kBlock * 4)) *
        kBlock;
    const int64_t depth = std::min(at_once, in_.C);
    const int64_t u_plane = blocks * depth * kBlock + kBlock;
    const int64_t m_floats = Panels::floats(kPoints, blocks, tiles);
    float* scratch = thread_workspace().get(m_floats + kPoints * u_plane);
    float* u = scratch + m_floats;
    const Panels m{scratch, blocks, tiles};
    for (int64_t k = 0; k < in_.C; k += depth) {
      const int64_t count = std::min(depth, in_.C - k);
      for (int64_t b = 0; b < blocks; ++b)
        transform_weight<kTile>(weight_, k, k + count, begin + b, u + b * count * kBlock, u_plane);
      for (int p = 0; p < kPoints; ++p)
        multiply(v.at(p, k / kBlock, offsets[g0]), v.block(), u + p * u_plane, count, m.at(p, 0),
                 m.block(), blocks, tiles, k > 0);
    }
    for (int64_t g = g0; g < g1; ++g) {
      const Tiling::Group group = tiling.group(first + g);
      output_.write(group, first + g, begin, end, m, offsets[g] - offsets[g0]);
    }
  }

  const Input<T>& in_;
  const Weight& weight_;
  const Output& output_;
  Reader<InputTransform<kTile>, T> reader_;
};

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
           Panels::floats(kPoints, blocks_of(dy_.C), tiling.max_tiles()) +
           (keeps_products() ? pairs() : 1) * product_floats() + reader_floats(tiling);
  }
  // f(group) for the groups of a share, whose sum is zero before and complete behind it.
  template <class F>
  void for_share(const Tiling& tiling, int64_t share, float* scratch, float* sum, F f) const {
    std::fill_n(sum, sum_floats(), 0.0f);
    if (keeps_products()) std::fill_n(scratch, pairs() * product_floats(), 0.0f);
    const int64_t count = tiling.count(), all = shares(tiling);
    for (int64_t g = count * share / all; g < count * (share + 1) / all; ++g) f(g);
    if (keeps_products())
      for_pairs([&](int64_t i, int64_t o, int64_t pair) {
        add_transformed(scratch + pair * product_floats(), i, o, sum);
      });
  }
  // `rest`: of the scratch, behind what for_share keeps.
  float* rest(float* scratch) const {
    return scratch + (keeps_products() ? pairs() : 1) * product_floats();
  }
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

// Both gradients: of the weight, where `dweight` is given, and of the input, to `output`. Where
// maps are large and channels few, memory is the limit: then a thread takes a group of tiles
// through both, and what they have in common is read once.
template <int kTile, class T, class Output>
void convolution_bwd(const Input<T>& x, const Input<T>& dy, const Weight& weight, float* dweight,
                     const Output& output) {
  const Convolution<kTile, T, Output> of_input(dy, weight, output);
  if (!dweight) return of_input.run();
  const WeightGrad<kTile, T> of_weight(x, dy, dweight);
  const int64_t tile_bytes = of_input.bytes_of_tile() + of_weight.input_reader().bytes_of_tile();
  const int64_t target = l2_bytes() * 3 / 5 / tile_bytes;
  if (target < kSharedTiles || !of_input.worth_groups(target)) {
    of_weight.run();
    return of_input.run();
  }
  const Tiling tiling(dy.N, dy.H, dy.W, kTile, target);
  output.prepare(tiling);
  const int64_t shares = of_weight.shares(tiling);
  float* u = shared_workspace().get(of_input.weight_floats() + shares * of_weight.sum_floats());
  float* sums = u + of_input.weight_floats();
  of_input.transform_weights(u);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    float* scratch =
        thread_workspace().get(of_input.scratch_floats(tiling) + of_weight.scratch_floats(tiling));
    for (int64_t share = begin; share < end; ++share) {
      float* sum = sums + share * of_weight.sum_floats();
      of_weight.for_share(tiling, share, scratch, sum, [&](int64_t g) {
        Prefetch here, next;
        output.prefetch_written(tiling.group(g), here);
        of_weight.input_reader().prefetch(tiling.group(g), here);
        of_input.convolve_group(tiling, g, u, of_weight.rest(scratch), here);
        if (g + 1 < tiling.count()) of_input.prefetch_input(tiling.group(g + 1), next);
        of_weight.add_group(tiling, g, scratch, sum, next);
      });
    }
  });
  of_weight.finish(sums, shares);
}

}  // namespace fastunet
