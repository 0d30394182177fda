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

// Measured on Zen 4 with 1 MB of L2 per core and 32 MB of L3, see docs/performance-log.md:
// transformed tiles held at a time, shared by all threads;
inline constexpr int64_t kBatchBytes = 16 << 20;
// transformed weights that groups may stream from L3;
inline constexpr int64_t kWeightBytes = 12 << 20;
// tiles in a group from which the weight's gradient, which adds up between groups, works by group.
inline constexpr int64_t kGradTiles = 20;

// Output: RawOutput or SourceGrad.
template <class T, class Output>
class Convolution {
 public:
  Convolution(const Input<T>& in, const Weight& weight, const Output& output)
      : in_(in), weight_(weight), output_(output), reader_(in) {}

  void run() {
    const int64_t inputs = blocks_of(in_.C), outputs = blocks_of(weight_.N);
    const int64_t tile_bytes = kPoints * (inputs + outputs) * kBlock * 4;
    const int64_t tiles = in_.N * ceil_div(in_.H, kTile) * ceil_div(in_.W, kTile);
    const int64_t target = std::max<int64_t>(l2_bytes() / 2 / tile_bytes, kRows);
    const int64_t weight_bytes = kPoints * inputs * outputs * kBlock * kBlock * 4;
    if (tiles >= 8 * target && weight_bytes <= kWeightBytes)
      by_group(Tiling(in_.N, in_.H, in_.W, target));
    else
      by_stage(Tiling(in_.N, in_.H, in_.W, 2 * kRows));
  }

 private:
  void by_group(const Tiling& tiling) {
    output_.prepare(tiling);
    const int64_t inputs = blocks_of(in_.C), outputs = blocks_of(weight_.N), K = in_.C;
    const int64_t u_plane = outputs * K * kBlock + kBlock;
    float* u = shared_workspace().get(kPoints * u_plane);
    torch::stable::parallel_for(0, outputs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        transform_weight(weight_, 0, K, b, u + b * K * kBlock, u_plane);
    });
    torch::stable::parallel_for(0, tiling.count(), 1, [&](int64_t begin, int64_t end) {
      const int64_t tiles = tiling.max_tiles();
      const int64_t v_floats = Panels::floats(inputs, tiles);
      const int64_t m_floats = Panels::floats(outputs, tiles);
      float* scratch = thread_workspace().get(v_floats + m_floats +
                                              Reader<InputTransform, T>::scratch_floats(tiling));
      for (int64_t g = begin; g < end; ++g) {
        const Tiling::Group group = tiling.group(g);
        const Panels v{scratch, inputs, group.tiles()};
        const Panels m{scratch + v_floats, outputs, group.tiles()};
        reader_.read(group, 0, inputs, v, 0, scratch + v_floats + m_floats);
        for (int p = 0; p < kPoints; ++p)
          multiply(v.at(p, 0), v.block(), u + p * u_plane, K, m.at(p, 0), m.block(), outputs,
                   group.tiles(), false);
        output_.write(group, g, 0, outputs, m, 0);
      }
    });
  }

  void by_stage(const Tiling& tiling) {
    output_.prepare(tiling);
    const int64_t inputs = blocks_of(in_.C), outputs = blocks_of(weight_.N);
    const int64_t fit = kBatchBytes / (kPoints * inputs * kBlock * 4);
    const int64_t batch = std::max<int64_t>(1, fit / tiling.max_tiles());  // groups
    for (int64_t first = 0; first < tiling.count(); first += batch) {
      const int64_t last = std::min(first + batch, tiling.count());
      const std::vector<int64_t> offsets = tiling.offsets(first, last);
      const int64_t tiles = offsets.back();
      const Panels v{shared_workspace().get(Panels::floats(inputs, tiles)), inputs, tiles};
      torch::stable::parallel_for(0, (last - first) * inputs, 1, [&](int64_t begin, int64_t end) {
        float* scratch = thread_workspace().get(Reader<InputTransform, T>::scratch_floats(tiling));
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
                  int64_t first, int64_t g0, int64_t g1, int64_t begin, int64_t end) {
    const int64_t tiles = offsets[g1] - offsets[g0], blocks = end - begin;
    const int64_t at_once =
        std::max<int64_t>(1, l2_bytes() * 3 / 10 / (kPoints * kBlocks * kBlock * kBlock * 4)) *
        kBlock;
    const int64_t depth = std::min(at_once, in_.C);
    const int64_t u_plane = blocks * depth * kBlock + kBlock;
    const int64_t m_floats = Panels::floats(blocks, tiles);
    float* scratch = thread_workspace().get(m_floats + kPoints * u_plane);
    float* u = scratch + m_floats;
    const Panels m{scratch, blocks, tiles};
    for (int64_t k = 0; k < in_.C; k += depth) {
      const int64_t count = std::min(depth, in_.C - k);
      for (int64_t b = 0; b < blocks; ++b)
        transform_weight(weight_, k, k + count, begin + b, u + b * count * kBlock, u_plane);
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
  Reader<InputTransform, T> reader_;
};

// The weight's gradient, [O, I, 3, 3] dense, from the input and the output's gradient.
template <class T>
class WeightGrad {
 public:
  WeightGrad(const Input<T>& x, const Input<T>& dy, float* dweight)
      : x_(x), dy_(dy), dweight_(dweight), read_x_(x), read_dy_(dy) {}

  void run() {
    const int64_t inputs = blocks_of(x_.C), outputs = blocks_of(dy_.C);
    const int64_t tile_bytes = kPoints * (inputs + outputs) * kBlock * 4;
    const int64_t tiles = x_.N * ceil_div(x_.H, kTile) * ceil_div(x_.W, kTile);
    const int64_t target = l2_bytes() * 3 / 5 / tile_bytes;
    if (target >= kGradTiles && tiles >= 8 * target)
      by_group(Tiling(x_.N, x_.H, x_.W, target));
    else
      by_stage(Tiling(x_.N, x_.H, x_.W, 32));
  }

 private:
  static int64_t scratch_floats(const Tiling& tiling) {
    return Reader<InputTransform, T>::scratch_floats(tiling);
  }
  int64_t sum_floats() const {
    return blocks_of(x_.C) * kBlock * kTaps * blocks_of(dy_.C) * kBlock;
  }

  void by_group(const Tiling& tiling) {
    const int64_t inputs = blocks_of(x_.C), outputs = blocks_of(dy_.C);
    // Partial sums over a fixed number of shares of the groups.
    const int64_t shares = std::min<int64_t>(tiling.count(), 16);
    float* sums = shared_workspace().get(shares * sum_floats());
    torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
      const int64_t tiles = tiling.max_tiles();
      const int64_t v_floats = Panels::floats(inputs, tiles);
      const int64_t d_floats = Panels::floats(outputs, tiles);
      float* scratch =
          thread_workspace().get(v_floats + d_floats + product_floats() + scratch_floats(tiling));
      float* product = scratch + v_floats + d_floats;
      for (int64_t share = begin; share < end; ++share) {
        float* sum = sums + share * sum_floats();
        std::fill_n(sum, sum_floats(), 0.0f);
        for (int64_t g = tiling.count() * share / shares; g < tiling.count() * (share + 1) / shares;
             ++g) {
          const Tiling::Group group = tiling.group(g);
          const Panels v{scratch, inputs, group.tiles()};
          const Panels d{scratch + v_floats, outputs, group.tiles()};
          read_x_.read(group, 0, inputs, v, 0, product + product_floats());
          read_dy_.read(group, 0, outputs, d, 0, product + product_floats());
          for (int64_t i = 0; i < inputs; ++i)
            for (int64_t o = 0; o < outputs; o += kBlocks) add_product(v, d, i, o, product, sum);
        }
      }
    });
    finish(sums, shares);
  }

  void by_stage(const Tiling& tiling) {
    const int64_t inputs = blocks_of(x_.C), outputs = blocks_of(dy_.C);
    const int64_t fit = kBatchBytes / (kPoints * (inputs + outputs) * kBlock * 4);
    const int64_t batch = std::max<int64_t>(1, fit / tiling.max_tiles());
    const int64_t most = std::min(batch, tiling.count()) * tiling.max_tiles();
    float* sums = shared_workspace().get(sum_floats() + Panels::floats(inputs, most) +
                                         Panels::floats(outputs, most));
    std::fill_n(sums, sum_floats(), 0.0f);
    for (int64_t first = 0; first < tiling.count(); first += batch) {
      const int64_t last = std::min(first + batch, tiling.count());
      const std::vector<int64_t> offsets = tiling.offsets(first, last);
      const int64_t tiles = offsets.back();
      const Panels v{sums + sum_floats(), inputs, tiles};
      const Panels d{v.data + Panels::floats(inputs, tiles), outputs, tiles};
      const int64_t blocks = inputs + outputs;
      torch::stable::parallel_for(0, (last - first) * blocks, 1, [&](int64_t begin, int64_t end) {
        float* scratch = thread_workspace().get(scratch_floats(tiling));
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
        for (int64_t task = begin; task < end; ++task)
          add_product(v, d, task / columns, task % columns * kBlocks, product, sums);
      });
    }
    finish(sums, 1);
  }

  static constexpr int64_t kProductRow = kBlocks * kBlock;
  static constexpr int64_t kProductPlane = kBlock * kProductRow + kBlock;
  static constexpr int64_t product_floats() { return kPoints * kProductPlane; }

  // sum[i][tap][o] += one block of inputs by kBlocks blocks of outputs.
  void add_product(const Panels& v, const Panels& d, int64_t i, int64_t o, float* product,
                   float* sum) const {
    const int64_t count = std::min<int64_t>(kBlocks, d.blocks - o);
    for (int p = 0; p < kPoints; ++p)
      correlate(v.at(p, i), d.at(p, o), d.block(), count, v.tiles, product + p * kProductPlane,
                kProductRow);
    const int64_t row = d.blocks * kBlock;
    for (int64_t k = 0; k < std::min<int64_t>(kBlock, x_.C - i * kBlock); ++k) {
      float* to = sum + (i * kBlock + k) * kTaps * row + o * kBlock;
      for (int64_t c = 0; c < count * kBlock; c += kLanes)
        transform_square<WeightGradTransform>(
            [&](int r, int s) {
              return load(product + (r * kPatch + s) * kProductPlane + k * kProductRow + c);
            },
            [&](int r, int s, vfloat value) {
              float* tap = to + (r * 3 + s) * row + c;
              store(tap, load(tap) + value);
            });
    }
  }

  void finish(const float* sums, int64_t shares) const {
    const int64_t I = x_.C, O = dy_.C, row = blocks_of(O) * kBlock;
    torch::stable::parallel_for(0, blocks_of(O), 1, [&](int64_t begin, int64_t end) {
      alignas(64) float taps[kTaps * kBlock];
      for (int64_t b = begin; b < end; ++b)
        for (int64_t i = 0; i < I; ++i) {
          for (int t = 0; t < kTaps; ++t)
            for (int c = 0; c < kBlock; c += kLanes) {
              const float* from = sums + (i * kTaps + t) * row + b * kBlock + c;
              vfloat total = load(from);
              for (int64_t s = 1; s < shares; ++s) total += load(from + s * sum_floats());
              store(taps + t * kBlock + c, total);
            }
          scatter_taps(taps, I * kTaps, O - b * kBlock, dweight_ + (b * kBlock * I + i) * kTaps);
        }
    });
  }

  const Input<T>&x_, &dy_;
  float* dweight_;
  Reader<InputTransform, T> read_x_;
  Reader<GradTransform, T> read_dy_;
};

}  // namespace fastunet
