// 3x3 convolutions by Winograd's algorithm: forward (and, with the weight turned around, the
// input's gradient), and both gradients at once.
//
// Two orders of work. Results depend neither on which nor on the number of threads. Cores exchange
// nothing but maps and, by group, transformed weights.
// * by group: a thread takes a group of tiles through all stages, which stay in its L2. For large
//   maps of few channels.
// * by range: a thread transforms a range of tiles, and takes some or all blocks of output channels
//   through products and output transform, transforming their weights on the way. For smaller maps
//   of more channels.
#pragma once

#include "common/parallel.h"
#include "common/workspace.h"
#include "conv_norm_act/outputs.h"
#include "conv_norm_act/weight.h"
#include "conv_norm_act/weight_grad_cpu.h"
#include "conv_norm_act/work_size.h"

namespace fastunet {

// Output: RawOutput or SourceGrads.
template <int kTile, class T, class Output>
class Convolution {
  static constexpr int kPatch = patch_of(kTile), kPoints = points_of(kTile);
  // By group, only one row of points of tiles and products is there at a time, in L1, and in L2
  // what is transformed in one dimension: less traffic, but a tile of 4 stays in registers from its
  // products to its outputs, which is better still.
  static constexpr bool kByRows = kTile > 4;

 public:
  // packed: the weight, transformed, if somebody has that.
  Convolution(const Input<T>& in, const Weight& weight, const Output& output,
              const float* packed = nullptr)
      : in_(in), weight_(weight), output_(output), packed_(packed), reader_(in) {}

  void run() const {
    // What is read from L3 serves all rows of registers.
    const bool weights_in_l2 = weight_bytes() <= l2_bytes() / 2;
    const int64_t least = weights_in_l2 ? kLeastRows : std::max<int64_t>(kRows, kLeastRows);
    int64_t target = std::min(l2_bytes() * 3 / 5, kGroupBytes) / bytes_of_tile();
    if (kByRows)
      target = std::min(target, l1_bytes() / (kPatch * (inputs() + kBlocks) * kBlock * 4));
    target = std::max(target, least);
    if (worth_groups(target))
      return by_group(Tiling::for_products(in_.N, in_.H, in_.W, kTile, target));
    // Small groups, a row of tiles where that is not too little: ranges are of whole groups.
    const int64_t across = ceil_div(in_.W, kTile), of_map = across * ceil_div(in_.H, kTile);
    const int64_t few = of_map <= 2 * kRows ? of_map : std::clamp<int64_t>(across, 8, 2 * kRows);
    by_range(Tiling(in_.N, in_.H, in_.W, kTile, few));
  }

  // Whether groups of `target` tiles should stay with a thread.
  bool worth_groups(int64_t target) const {
    const int64_t tiles = in_.N * ceil_div(in_.H, kTile) * ceil_div(in_.W, kTile);
    return tiles >= 8 * target && weight_bytes() <= streamed_bytes<kTile>();
  }
  // What is in L2 at a time: a group's tiles, its outputs, and what the next one reads.
  int64_t bytes_of_tile() const {
    return kPatch * (kByRows ? kTile : kPatch) * (inputs() + outputs()) * kBlock * 4 +
           reader_.bytes_of_tile() + output_.bytes_of_tile();
  }

  // The steps of by_group: the transformed weights, then group by group.
  int64_t weight_floats() const { return PackedWeight<kTile, float>::floats(in_.C, outputs()); }
  void transform_weights(float* u) const { transform_whole<kTile>(weight_, {u, in_.C, outputs()}); }
  int64_t scratch_floats(const Tiling& tiling) const {
    const int64_t tiles = tiling.max_tiles();
    if (kByRows)
      return reader_.columns_floats(tiling) + Panels::floats(kPatch * kTile, outputs(), tiles) +
             Panels::floats(kPatch, inputs(), tiles) + Panels::floats(kPatch, kBlocks, tiles) +
             reader_.patch_floats(tiling);
    return Panels::floats(kPoints, inputs(), tiles) + Panels::floats(kPoints, outputs(), tiles) +
           reader_.scratch_floats(tiling);
  }
  // grad_z: if given, the input's columns for the weight's gradient.
  void convolve_group(const Tiling& tiling, int64_t g, const float* weights, float* scratch,
                      Prefetch& lines, float* grad_z = nullptr) const {
    const Tiling::Group group = tiling.group(g);
    const int64_t inputs = this->inputs(), outputs = this->outputs(), tiles = group.tiles();
    const auto u = packed(weights);
    Scratch left{scratch};
    if constexpr (kByRows) {
      float* z = left.take(reader_.columns_floats(tiling));
      const RowPanels rows{left.panels(kPatch * kTile, outputs, tiles)};
      const Panels v = left.panels(kPatch, inputs, tiles);
      const Panels m = left.panels(kPatch, kBlocks, tiles);
      reader_.read_columns(group, z, left.rest, grad_z);
      for (int i = 0; i < kPatch; ++i) {
        reader_.read_row(group, i, z, v);
        for (int64_t n = 0; n < outputs; n += kBlocks) {
          const int64_t count = std::min<int64_t>(kBlocks, outputs - n);
          multiply(v.part(0, 0), u.part(n, 0).at(i * kPatch), in_.C, m.part(0, 0), count, kPatch,
                   tiles, false, lines, kPatch * ceil_div(outputs, kBlocks));
          transform_products<kTile>(m, count, rows.at(i * kTile, n), rows.plane());
        }
      }
      output_.write(group, g, 0, outputs, rows, 0);
    } else {
      const Panels v = left.panels(kPoints, inputs, tiles);
      const Panels m = left.panels(kPoints, outputs, tiles);
      for (int64_t b = 0; b < inputs; ++b) reader_.read(group, b, v, 0, left.rest, grad_z);
      // Tiles are in L1 for all outputs of a point.
      const int64_t points = outputs <= kBlocks ? kPoints : 1;
      for (int64_t p = 0; p < kPoints; p += points)
        for (int64_t n = 0; n < outputs; n += kBlocks)
          multiply(v.part(p, 0), u.part(n, 0).at(p), in_.C, m.part(p, n),
                   std::min<int64_t>(kBlocks, outputs - n), points, tiles, false, lines,
                   kPoints / points * ceil_div(outputs, kBlocks));
      output_.write(group, g, 0, outputs, m, 0);
    }
  }
  void prefetch_next(const Tiling& tiling, int64_t g, Prefetch& lines) const {
    reader_.prefetch_next(tiling, g, lines);
  }

 private:
  int64_t inputs() const { return blocks_of(in_.C); }
  int64_t outputs() const { return weight_.blocks(); }
  int64_t weight_bytes() const { return kPoints * inputs() * outputs() * kBlock * kBlock * 4; }
  PackedWeight<kTile, const float> packed(const float* data) const {
    return {data, in_.C, outputs()};
  }

  void by_group(const Tiling& tiling) const {
    output_.prepare(tiling);
    const float* u = packed_;
    if (!u) {
      float* made = shared_workspace().get(weight_floats());
      transform_weights(made);
      u = made;
    }
    parallel_tasks(tiling.count(), [&](int64_t g) {
      Prefetch lines;
      output_.prefetch_read(tiling.group(g), lines);
      output_.prefetch_written(tiling.group(g), lines);
      prefetch_next(tiling, g, lines);
      convolve_group(tiling, g, u, thread_workspace().get(scratch_floats(tiling)), lines);
    });
  }

  // Ranges of tiles, and into how many parts the outputs go for each, so that there is a task for
  // each thread. A task transforms tiles and weights for itself: what takes least.
  struct Tasks {
    int64_t ranges, parts;
  };
  Tasks tasks(int64_t tiles) const {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t fit = kBatchBytes / (kPoints * inputs() * kBlock * 4);
    const int64_t most = std::clamp<int64_t>(fit, 1, kMostRange);
    const int64_t fewest = std::max<int64_t>(1, ceil_div(tiles, most));
    Tasks best{};
    double least = 0;
    for (int64_t ranges = fewest; ranges <= fewest + threads; ++ranges) {
      const int64_t parts = std::min(ceil_div(threads, ranges), ceil_div(outputs(), kBlocks));
      const double of_tiles = static_cast<double>(tiles) / ranges;
      const double of_outputs = static_cast<double>(outputs()) / parts;
      const double products = of_tiles * of_outputs * kPoints * kBlock / 2;
      const double cost = ceil_div(ranges * parts, threads) *
                          (products + of_tiles * kTileCycles + of_outputs * kWeightCycles);
      if (best.ranges == 0 || cost < least) least = cost, best = {ranges, parts};
    }
    return best;
  }

  void by_range(const Tiling& tiling) const {
    output_.prepare(tiling);
    const int64_t inputs = this->inputs(), columns = ceil_div(outputs(), kBlocks);
    const auto [ranges, parts] = tasks(tiling.max_tiles_of_all());
    parallel_tasks(ranges * parts, [&](int64_t task) {
      const int64_t range = task / parts, part = task % parts;
      const int64_t first = tiling.count() * range / ranges;
      const std::vector<int64_t> offsets =
          tiling.offsets(first, tiling.count() * (range + 1) / ranges);
      const int64_t tiles = offsets.back();
      Scratch left{
          thread_workspace().get(Panels::floats(kPoints, inputs, tiles) +
                                 std::max(reader_.scratch_floats(tiling), outputs_floats(tiles)))};
      const Panels v = left.panels(kPoints, inputs, tiles);
      for (size_t g = 0; g + 1 < offsets.size(); ++g) {
        Prefetch next;
        prefetch_next(tiling, first + g, next);
        reader_.read(tiling.group(first + g), 0, inputs, v, offsets[g], left.rest, next, inputs);
      }
      for (int64_t c = columns * part / parts; c < columns * (part + 1) / parts; ++c)
        outputs_of(tiling, v, offsets, first, c * kBlocks,
                   std::min<int64_t>((c + 1) * kBlocks, outputs()), left.rest);
    });
  }

  // Inputs whose transformed weights are in L2 at a time, and those of a point in L1.
  int64_t depth() const {
    const int64_t at_once =
        l2_bytes() * 3 / 10 / (kPoints * kBlocks * kBlock * kBlock * 4) * kBlock;
    return std::clamp<int64_t>(at_once, kBlock, std::max<int64_t>(in_.C, kBlock));
  }
  int64_t outputs_floats(int64_t tiles) const {
    return Panels::floats(kPoints, kBlocks, tiles) +
           (packed_ ? 0 : PackedWeight<kTile, float>::floats(depth(), kBlocks));
  }

  // Blocks [begin, end) of outputs of a range of groups from `first` on.
  void outputs_of(const Tiling& tiling, const Panels& v, const std::vector<int64_t>& offsets,
                  int64_t first, int64_t begin, int64_t end, float* scratch) const {
    const int64_t blocks = end - begin, depth = this->depth();
    const Panels m{scratch, blocks, v.tiles};
    float* const made = scratch + Panels::floats(kPoints, blocks, v.tiles);
    for (int64_t k = 0; k < in_.C; k += depth) {
      const int64_t count = std::min(depth, in_.C - k), b = k / kBlock;
      if (!packed_)
        for (int64_t n = 0; n < blocks; ++n)
          transform_block<kTile>(weight_, k, begin, n, {made, count, blocks});
      using Packed = PackedWeight<kTile, const float>;
      const auto u =
          packed_ ? packed(packed_).part(begin, k) : Packed{made, count, blocks}.part(0, 0);
      for (int p = 0; p < kPoints; ++p) {
        // The tiles of all channels are in L3, and a packed weight is in memory, from where they
        // come a point ahead.
        Prefetch next;
        if (p + 1 < kPoints) {
          next.add(v.at(p + 1, b), 1, 0, blocks_of(count) * v.block());
          if (packed_) next.add(u.at(p + 1).data, blocks, u.block, count * kBlock);
        }
        multiply(v.part(p, b), u.at(p), count, m.part(p, 0), blocks, 1, v.tiles, k > 0, next, 1);
      }
    }
    for (size_t g = 0; g + 1 < offsets.size(); ++g)
      output_.write(tiling.group(first + g), first + g, begin, end, m, offsets[g]);
  }

  const Input<T>& in_;
  const Weight& weight_;
  const Output& output_;
  const float* packed_;
  Reader<InputTransform<kTile>, T, GradTransform<kTile>> reader_;
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
  const Reader<InputTransform<kTile>, T>& x_reader = of_weight.input_reader();
  const int64_t tile_bytes = of_input.bytes_of_tile() + x_reader.bytes_of_tile();
  // To read the maps only once is worth more than to have everything in L2: the weight's products
  // may come from L3, if each time serves enough tiles.
  const int64_t target = std::max(l2_bytes() * 3 / 5 / tile_bytes,
                                  std::min(kSharedTarget, l2_bytes() * 5 / 4 / tile_bytes));
  if (target < kSharedTiles || of_weight.products_bytes() > l2_bytes() * 6 / 5 ||
      !of_input.worth_groups(target)) {
    of_weight.run();
    return of_input.run();
  }
  const Tiling tiling = Tiling::for_products(dy.N, dy.H, dy.W, kTile, target);
  output.prepare(tiling);
  const int64_t shares = of_weight.shares(tiling);
  float* u = shared_workspace().get(of_input.weight_floats() + shares * of_weight.sum_floats());
  float* sums = u + of_input.weight_floats();
  of_input.transform_weights(u);
  parallel_tasks(shares, [&](int64_t share) {
    float* scratch =
        thread_workspace().get(of_input.scratch_floats(tiling) + of_weight.scratch_floats(tiling));
    float* sum = sums + share * of_weight.sum_floats();
    of_weight.for_share(tiling, share, scratch, sum, [&](int64_t g, bool add) {
      Prefetch here, next;
      output.prefetch_written(tiling.group(g), here);
      x_reader.prefetch(tiling.group(g), here);
      of_input.prefetch_next(tiling, g, next);
      float* grad_z = of_weight.rest(scratch);
      float* rest = grad_z + of_weight.grad_floats(tiling);
      of_input.convolve_group(tiling, g, u, rest, here, grad_z);
      of_weight.add_group(tiling, g, add, scratch, grad_z, rest, next);
    });
  });
  of_weight.finish(sums, shares);
}

}  // namespace fastunet
