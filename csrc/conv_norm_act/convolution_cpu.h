// 3x3 convolutions by Winograd's algorithm: forward (and, with the weight turned around, the
// input's gradient), and both gradients at once.
//
// Three orders of work. Results do not depend on which, nor on the number of threads:
// * by group: a thread takes a group of tiles through all three stages, which stay in its L2. For
//   large maps of few channels.
// * by range: a thread transforms a range of tiles, and takes all blocks of output channels through
//   products and output transform, transforming their weights on the way. For more channels.
// * by stage: all threads transform a batch of tiles; then each takes some of the blocks. For small
//   maps of many channels, whose weights are the larger part.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/workspace.h"
#include "conv_norm_act/outputs.h"
#include "conv_norm_act/weight.h"
#include "conv_norm_act/weight_grad_cpu.h"
#include "conv_norm_act/work_size.h"

namespace fastunet {

// Output: RawOutput or SourceGrads.
template <int kTile, class T, class Output>
class Convolution {
  static constexpr int kPoints = points_of(kTile);

 public:
  Convolution(const Input<T>& in, const Weight& weight, const Output& output)
      : in_(in), weight_(weight), output_(output), reader_(in) {}

  void run() const {
    const int64_t least = weight_bytes() > 2 * l2_bytes() ? kRows : kLeastRows;
    const int64_t target = std::max<int64_t>(l2_bytes() * 3 / 5 / bytes_of_tile(), least);
    if (worth_groups(target)) return by_group(Tiling(in_.N, in_.H, in_.W, kTile, target));
    // Small groups, a row of tiles where that is not too little: threads share them out.
    const int64_t across = ceil_div(in_.W, kTile), of_map = across * ceil_div(in_.H, kTile);
    const int64_t few = of_map <= 2 * kRows ? of_map : std::clamp<int64_t>(across, 8, 2 * kRows);
    const Tiling tiling(in_.N, in_.H, in_.W, kTile, few);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t tiles = tiling.count() * tiling.max_tiles();
    const int64_t most = std::min(batch_tiles(), kMostRange);
    const int64_t ranges = threads * ceil_div(tiles, threads * most);
    if (tiles >= ranges * kLeastRange)
      by_range(tiling, ranges);
    else
      by_stage(tiling);
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

  // Transformed tiles held at a time.
  int64_t batch_tiles() const {
    return std::max<int64_t>(1, kBatchBytes / (kPoints * inputs() * kBlock * 4));
  }

  void by_range(const Tiling& tiling, int64_t ranges) const {
    output_.prepare(tiling);
    const int64_t inputs = this->inputs(), outputs = this->outputs();
    torch::stable::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t range = begin; range < end; ++range) {
        const int64_t first = tiling.count() * range / ranges;
        const int64_t last = tiling.count() * (range + 1) / ranges;
        const std::vector<int64_t> offsets = tiling.offsets(first, last);
        const int64_t tiles = offsets.back(), v_floats = Panels::floats(kPoints, inputs, tiles);
        float* scratch = thread_workspace().get(
            v_floats + std::max(Reader<InputTransform<kTile>, T>::scratch_floats(tiling),
                                outputs_floats(tiles)));
        const Panels v{scratch, inputs, tiles};
        for (int64_t g = first; g < last; ++g)
          reader_.read(tiling.group(g), 0, inputs, v, offsets[g - first], scratch + v_floats);
        for (int64_t block = 0; block < outputs; block += kBlocks)
          outputs_of(tiling, v, offsets, first, 0, last - first, block,
                     std::min<int64_t>(block + kBlocks, outputs), scratch + v_floats);
      }
    });
  }

  void by_stage(const Tiling& tiling) const {
    output_.prepare(tiling);
    const int64_t inputs = this->inputs(), outputs = this->outputs();
    const int64_t batch = std::max<int64_t>(1, batch_tiles() / tiling.max_tiles());  // groups
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
      // A task: kBlocks blocks of outputs by about as many tiles as a range has.
      const int64_t per_range = std::max<int64_t>(1, kMostRange / tiling.max_tiles());
      const int64_t ranges = ceil_div(last - first, per_range);
      const int64_t columns = ceil_div(outputs, kBlocks);
      torch::stable::parallel_for(0, columns * ranges, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t block = task / ranges * kBlocks;
          const int64_t g0 = task % ranges * per_range;
          const int64_t g1 = std::min(g0 + per_range, last - first);
          outputs_of(tiling, v, offsets, first, g0, g1, block,
                     std::min<int64_t>(block + kBlocks, outputs),
                     thread_workspace().get(outputs_floats(offsets[g1] - offsets[g0])));
        }
      });
    }
  }

  // Inputs whose transformed weights are in L2 at a time.
  int64_t depth() const {
    const int64_t at_once =
        l2_bytes() * 3 / 10 / (kPoints * kBlocks * kBlock * kBlock * 4) * kBlock;
    return std::clamp<int64_t>(at_once, kBlock, std::max<int64_t>(in_.C, kBlock));
  }
  int64_t outputs_floats(int64_t tiles) const {
    return Panels::floats(kPoints, kBlocks, tiles) +
           kPoints * (kBlocks * depth() * kBlock + kBlock);
  }

  // Blocks [begin, end) of outputs of groups first + [g0, g1).
  void outputs_of(const Tiling& tiling, const Panels& v, const std::vector<int64_t>& offsets,
                  int64_t first, int64_t g0, int64_t g1, int64_t begin, int64_t end,
                  float* scratch) const {
    const int64_t tiles = offsets[g1] - offsets[g0], blocks = end - begin, depth = this->depth();
    const int64_t u_plane = blocks * depth * kBlock + kBlock;
    const Panels m{scratch, blocks, tiles};
    float* u = scratch + Panels::floats(kPoints, blocks, tiles);
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
