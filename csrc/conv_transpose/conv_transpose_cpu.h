// The 2x2 stride 2 transposed convolution as matrix products: its windows do not overlap, so each
// input pixel gives 2x2 outputs of its own.
//
//   y[2h + i][2w + j][o] = bias[o] + sum over k of x[h][w][k] * weight[k][o][i][j]
//
// Pixels go in groups, rectangles of one sample. Forward a thread takes a group, or some blocks of
// its outputs. Two orders of work for the gradients, by the number of channels; results do not
// depend on the number of threads.
// * by group: a thread takes a group through all of it, and what it reads stays in its L2. For few
//   channels.
// * by batch: all threads bring some groups into blocks of channels, then each takes pairs of
//   blocks. For more channels, whose weight's gradient is too large for each thread to have one.
#pragma once

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/transpose.h"
#include "common/workspace.h"
#include "conv_norm_act/tiles.h"
#include "conv_norm_act/work_size.h"

namespace fastunet {

inline constexpr int kWindow = 4;  // taps

// to[t][i] = from[i * stride + t] for `count` channels i, zeros for the rest of the block.
FASTUNET_INLINE void pack_taps(const float* from, int64_t stride, int64_t count, float* to,
                               int64_t plane) {
  if (count >= kBlock) {
    for (int i = 0; i < kBlock; i += 4) transpose_4x4(from + i * stride, stride, to + i, plane);
    return;
  }
  for (int t = 0; t < kWindow; ++t)
    for (int i = 0; i < kBlock; ++i) to[t * plane + i] = i < count ? from[i * stride + t] : 0.0f;
}

// And back, to[i][t] (+)= taps[t][i].
FASTUNET_INLINE void unpack_taps(const float* taps, int64_t count, float* to, bool add) {
  alignas(64) float turned[kBlock * kWindow];
  for (int i = 0; i < kBlock; i += 4)
    transpose_4x4(taps + i, kBlock, turned + i * kWindow, kWindow);
  const int64_t values = std::min<int64_t>(count, kBlock) * kWindow;
  for (int64_t i = 0; i < values; i += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, values - i));
    const vfloat value = load(turned + i);
    store(to + i, add ? value + load(to + i, lanes) : value, lanes);
  }
}

// Where the input's gradient goes: to dz; or, if `source` is given, that of its raw map, with sums
// [groups][2][C] for its scale and shift.
template <class T>
struct InputGrad {
  Map<T> dz{};
  const Source<T>* source = nullptr;
  std::vector<float> sums{};
};

template <class T>
class ConvTranspose {
  using Group = Tiling::Group;

 public:
  // weight: [I, O, 2, 2] dense.
  ConvTranspose(const Input<T>& in, const float* weight, int64_t O)
      : in_(in), weight_(weight), I_(in.C), O_(O), ib_(blocks_of(I_)), ob_(blocks_of(O)) {}

  void forward(const float* bias, const Map<T>& y) const {
    // Of which each packs the weights for itself: at least 512, though they leave L2.
    const int64_t pixels = std::clamp<int64_t>(l2_bytes() / 2 / (ib_ * kBlock * 4), 512, 1024);
    const Tiling tiling = groups_of(pixels);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t parts = std::min(ob_, ceil_div(threads, tiling.count()));
    const int64_t v_floats = ib_ * block_floats(tiling.max_tiles());
    parallel_tasks(tiling.count() * parts, [&](int64_t task) {
      const Group g = tiling.group(task / parts);
      const int64_t part = task % parts;
      float* v = thread_workspace().get(v_floats + kWindow * I_ * kBlock);
      float* u = v + v_floats;
      for (int64_t b = 0; b < ib_; ++b) read_input(g, b, v + b * block_floats(g.tiles()));
      Prefetch lines;
      if (parts == 1 && task + 1 < tiling.count()) prefetch_input(tiling.group(task + 1), lines);
      for (int64_t b = ob_ * part / parts; b < ob_ * (part + 1) / parts; ++b) {
        for (int64_t k = 0; k < I_; ++k)
          pack_taps(weight_ + (k * O_ + b * kBlock) * kWindow, kWindow, O_ - b * kBlock,
                    u + k * kBlock, I_ * kBlock);
        for (int64_t r = 0; r < g.rows; ++r) write_outputs(g, r, b, v, u, bias, y, lines);
      }
    });
  }

  // Any of dweight [I, O, 2, 2] and the input's gradient (without data where not needed), and dbias
  // [O].
  void backward(const Map<const T>& dy, float* dweight, float* dbias, InputGrad<T>& dx) const {
    if (in_.N * in_.H * in_.W == 0) {
      if (dweight) std::fill_n(dweight, I_ * O_ * kWindow, 0.0f);
      return (void)std::fill_n(dbias, O_, 0.0f);
    }
    const bool by_group = sum_floats() * 4 <= l2_bytes() * 3 / 5;
    const Tiling tiling = groups_of(by_group ? kGroupPixels : 4 * kGroupPixels);
    if (dx.source) dx.sums.resize(tiling.count() * 2 * I_);
    std::vector<float> bias_sums(tiling.count() * O_);
    if (by_group)
      backward_by_group(tiling, dy, dweight, bias_sums.data(), dx);
    else
      backward_by_batch(tiling, dy, dweight, bias_sums.data(), dx);
    sum_chunks(bias_sums.data(), tiling.count(), O_, O_, 1, dbias);
  }

 private:
  // Of gradients by group: so few that lines for the next are asked for between short products.
  static constexpr int64_t kGroupPixels = 64, kSharePixels = 2048;
  // Of operands by batch, in L3.
  static constexpr int64_t kOperandBytes = 8 << 20, kBatchPixels = 2048;

  Tiling groups_of(int64_t pixels) const { return {in_.N, in_.H, in_.W, 1, pixels}; }
  // Blocks are a line further apart than they are large.
  static int64_t block_floats(int64_t pixels) { return (pixels + 1) * kBlock; }
  // The weight's gradient, [ib][ob][16 inputs][taps][16 outputs].
  static constexpr int64_t kPair = kBlock * kWindow * kBlock;
  int64_t sum_floats() const { return ib_ * ob_ * kPair; }
  int64_t grad_blocks() const { return kWindow * ob_; }
  // Inputs of the product that gives the input's gradient: [taps][ob][16].
  int64_t grad_inputs() const { return grad_blocks() * kBlock; }

  void backward_by_group(const Tiling& tiling, const Map<const T>& dy, float* dweight,
                         float* bias_sums, InputGrad<T>& dx) const {
    const int64_t count = tiling.count(), most = tiling.max_tiles();
    const int64_t shares = shares_of(count, tiling.max_tiles_of_all(), kSharePixels);
    const int64_t u_floats = ib_ * grad_inputs() * kBlock;
    float* u = shared_workspace().get(u_floats + shares * sum_floats());
    float* sums = u + u_floats;
    if (dx.dz.data)
      parallel_tasks(ib_, [&](int64_t b) { pack_inputs(b, u + b * grad_inputs() * kBlock); });
    parallel_tasks(shares, [&](int64_t share) {
      float* d = thread_workspace().get((grad_blocks() + ib_ + kBlocks) * block_floats(most));
      const int64_t first = count * share / shares;
      for (int64_t index = first; index < count * (share + 1) / shares; ++index) {
        const Group g = tiling.group(index);
        const int64_t block = block_floats(g.tiles());
        float* v = d + grad_blocks() * block;
        float* m = v + ib_ * block;
        Prefetch lines;
        if (index + 1 < count) prefetch_read(dy, tiling.group(index + 1), lines);
        if (dx.dz.data) lines.add(dx.dz.read_only(), g.n, g.h, g.h + g.rows, g.w, g.w + g.columns);
        const int64_t parts =
            (dweight ? ib_ * ob_ : 0) + (dx.dz.data ? ceil_div(ib_, int64_t{kBlocks}) : 0);
        for (int64_t b = 0; b < grad_blocks(); ++b) read_grad(dy, g, b, d + b * block);
        for (int64_t o = 0; o < ob_; ++o)
          sum_bias_grad(d, block, o, g.tiles(), bias_sums + index * O_);
        if (dweight) {
          for (int64_t i = 0; i < ib_; ++i) read_input(g, i, v + i * block);
          for (int64_t o = 0; o < ob_; ++o)
            for (int64_t i = 0; i < ib_; ++i)
              correlate_pair(v + i * block, i, d + o * block, block, g.tiles(),
                             sums + share * sum_floats() + (i * ob_ + o) * kPair, index > first,
                             lines, parts);
        }
        if (!dx.dz.data) continue;
        for (int64_t b = 0; b < ib_; b += kBlocks) {
          const int64_t blocks = std::min<int64_t>(kBlocks, ib_ - b);
          multiply({d, block}, {u + b * grad_inputs() * kBlock, grad_inputs() * kBlock},
                   grad_inputs(), {m, block}, blocks, 1, g.tiles(), false, lines, parts);
          for (int64_t i = 0; i < blocks; ++i) write_input_grad(g, index, b + i, m + i * block, dx);
        }
      }
    });
    if (!dweight) return;
    parallel_tasks(ib_ * ob_, [&](int64_t pair) {
      float* sum = sums + pair * kPair;
      for (int64_t s = 1; s < shares; ++s)
        for (int64_t i = 0; i < kPair; i += kLanes)
          store(sum + i, load(sum + i) + load(sum + s * sum_floats() + i));
      write_weight_grad(sum, pair / ob_, pair % ob_, dweight, false);
    });
  }

  void backward_by_batch(const Tiling& tiling, const Map<const T>& dy, float* dweight,
                         float* bias_sums, InputGrad<T>& dx) const {
    const int64_t blocks = grad_blocks() + (dweight ? ib_ : 0), most = tiling.max_tiles();
    const int64_t fit = std::min(kOperandBytes / (blocks * kBlock * 4), kBatchPixels);
    const int64_t groups = std::max<int64_t>(1, fit / most);
    const int64_t threads = torch::stable::get_num_threads();
    // Of the inputs, so that there is a task for each thread.
    const int64_t parts = std::min(ib_, ceil_div(4 * threads, ob_));
    const int64_t pairs = ceil_div(ib_, int64_t{kBlocks});
    float* d = shared_workspace().get(blocks * block_floats(groups * most));
    for (int64_t first = 0; first < tiling.count(); first += groups) {
      const int64_t last = std::min(first + groups, tiling.count());
      const std::vector<int64_t> offsets = tiling.offsets(first, last);
      const int64_t pixels = offsets.back(), block = block_floats(pixels);
      float* v = d + grad_blocks() * block;
      parallel_tasks((last - first) * blocks, [&](int64_t task) {
        const int64_t g = task / blocks, b = task % blocks;
        float* to = d + b * block + offsets[g] * kBlock;
        if (b < grad_blocks())
          read_grad(dy, tiling.group(first + g), b, to);
        else
          read_input(tiling.group(first + g), b - grad_blocks(), to);
      });
      const int64_t of_weight = ob_ * parts, of_input = dx.dz.data ? pairs : 0;
      parallel_tasks(of_weight + of_input, [&](int64_t task) {
        if (task < of_weight) {
          const int64_t o = task / parts, part = task % parts;
          if (part == 0)
            for (int64_t g = first; g < last; ++g)
              sum_bias_grad(d + offsets[g - first] * kBlock, block, o,
                            offsets[g - first + 1] - offsets[g - first], bias_sums + g * O_);
          if (!dweight) return;
          for (int64_t i = ib_ * part / parts; i < ib_ * (part + 1) / parts; ++i) {
            alignas(64) float sum[kPair];
            Prefetch none;
            correlate_pair(v + i * block, i, d + o * block, block, pixels, sum, false, none, 1);
            write_weight_grad(sum, i, o, dweight, first > 0);
          }
          return;
        }
        const int64_t b = (task - of_weight) * kBlocks;
        const int64_t count = std::min<int64_t>(kBlocks, ib_ - b), K = grad_inputs();
        float* u = thread_workspace().get(kBlocks * (K * kBlock + block));
        float* m = u + kBlocks * K * kBlock;
        for (int64_t i = 0; i < count; ++i) pack_inputs(b + i, u + i * K * kBlock);
        Prefetch none;
        multiply({d, block}, {u, K * kBlock}, K, {m, block}, count, 1, pixels, false, none, 1);
        for (int64_t g = first; g < last; ++g)
          for (int64_t i = 0; i < count; ++i)
            write_input_grad(tiling.group(g), g, b + i, m + i * block + offsets[g - first] * kBlock,
                             dx);
      });
    }
  }

  // Block b of the input's channels.
  void read_input(const Group& g, int64_t b, float* to) const {
    const Pending<T>& p = in_.sources[0];
    const int64_t count = std::min<int64_t>(kBlock, I_ - b * kBlock);
    if (count < kBlock) zero(to, g.tiles(), kBlock, kBlock);
    const Resample<T> resample =
        resample_of(p, channels(p.source, b * kBlock, count), in_.H, in_.W);
    typename Resample<T>::Rows rows;
    for (int64_t r = 0; r < g.rows; ++r)
      resample.row(g.n, g.h + r, g.w, g.w + g.columns, to + r * g.columns * kBlock, kBlock, rows);
  }

  // Of the gradients of each pixel's 2x2 outputs, block b of [taps][ob].
  void read_grad(const Map<const T>& dy, const Group& g, int64_t b, float* to) const {
    const int64_t t = b / ob_, c = b % ob_ * kBlock;
    for (int64_t r = 0; r < g.rows; ++r)
      for (int i = 0; i < kBlock; i += kLanes) {
        const int lanes = static_cast<int>(std::clamp<int64_t>(O_ - c - i, 0, kLanes));
        const T* from = dy.at(g.n, 2 * (g.h + r) + t / 2, 2 * g.w + t % 2) + c + i;
        float* out = to + r * g.columns * kBlock + i;
        for (int64_t w = 0; w < g.columns; ++w, from += 2 * dy.sw, out += kBlock)
          store(out, lanes ? load(from, lanes) : vfloat{});
      }
  }

  // Block b of the outputs of row r.
  void write_outputs(const Group& g, int64_t r, int64_t b, const float* v, const float* u,
                     const float* bias, const Map<T>& y, Prefetch& lines) const {
    const int64_t c = b * kBlock, panels = ceil_div(g.columns, int64_t{kRows});
    alignas(64) float add[kBlock] = {};
    for (int64_t i = 0; bias && i < std::min<int64_t>(kBlock, O_ - c); ++i) add[i] = bias[c + i];
    v += r * g.columns * kBlock;
    lines.share(ob_ * g.rows, panels * (kWindow / kBlocks), ceil_div(I_, kStep));
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t w = g.columns * p / panels, count = g.columns * (p + 1) / panels - w;
      with_rows<kRows>(count, [&](auto rows) {
        for (int t = 0; t < kWindow; t += kBlocks) {
          Sums<rows, kBlocks> sums;
          sums.add_products(v + w * kBlock, block_floats(g.tiles()), u + t * I_ * kBlock,
                            I_ * kBlock, I_, lines.panel());
          T* to = y.at(g.n, 2 * (g.h + r) + t / 2, 2 * (g.w + w) + t % 2) + c;
          sums.each([&](int pixel, int tap, int i, vfloat sum) {
            const int lanes = static_cast<int>(std::clamp<int64_t>(O_ - c - i, 0, kLanes));
            if (lanes) store(to + (2 * pixel + tap) * y.sw + i, sum + load(add + i), lanes);
          });
        }
      });
    }
  }

  // The weights of block b of the inputs, as their gradient's product takes them.
  void pack_inputs(int64_t b, float* u) const {
    if (O_ % kBlock) std::fill_n(u, grad_inputs() * kBlock, 0.0f);
    for (int64_t o = 0; o < O_; ++o)
      pack_taps(weight_ + (b * kBlock * O_ + o) * kWindow, O_ * kWindow, I_ - b * kBlock,
                u + o * kBlock, ob_ * kBlock * kBlock);
  }

  // m: [pixels][16], block b of the input's gradient.
  void write_input_grad(const Group& g, int64_t index, int64_t b, const float* m,
                        InputGrad<T>& dx) const {
    const int64_t c = b * kBlock, count = std::min<int64_t>(kBlock, I_ - c);
    const Map<T> to = channels(dx.dz, c, count);
    if (dx.source) {
      const ResampleBwd<T> mask(channels(*dx.source, c, count), to.read_only(), to, Mode::none);
      float* sums = dx.sums.data() + index * 2 * I_ + c;
      for (int64_t r = 0; r < g.rows; ++r, m += g.columns * kBlock)
        mask.row(g.n, g.h + r, g.w, g.w + g.columns, m, kBlock, sums, I_);
      return;
    }
    for (int i = 0; i < count; i += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count - i));
      const float* from = m + i;
      for (int64_t r = 0; r < g.rows; ++r) {
        T* out = to.at(g.n, g.h + r, g.w) + i;
        for (int64_t w = 0; w < g.columns; ++w, from += kBlock, out += to.sw)
          store(out, load(from), lanes);
      }
    }
  }

  // v: block i of the inputs, d: a block of the outputs' gradients of the first tap.
  void correlate_pair(const float* v, int64_t i, const float* d, int64_t block, int64_t pixels,
                      float* sum, bool add, Prefetch& lines, int64_t parts) const {
    const int64_t inputs = std::min<int64_t>(kBlock, I_ - i * kBlock);
    correlate({v, block}, inputs, {d, ob_ * block}, kWindow, 1, pixels, {sum, kWindow * kBlock},
              add, lines, parts);
  }

  // What a group reads.
  void prefetch_read(const Map<const T>& dy, const Group& g, Prefetch& lines) const {
    lines.add(dy, g.n, 2 * g.h, 2 * (g.h + g.rows), 2 * g.w, 2 * (g.w + g.columns));
    prefetch_input(g, lines);
  }
  void prefetch_input(const Group& g, Prefetch& lines) const {
    const Pending<T>& p = in_.sources[0];
    if (p.mode == Mode::none) lines.add(p.source.y, g.n, g.h, g.h + g.rows, g.w, g.w + g.columns);
  }

  void write_weight_grad(const float* sum, int64_t i, int64_t o, float* dweight, bool add) const {
    for (int64_t k = 0; k < std::min<int64_t>(kBlock, I_ - i * kBlock); ++k)
      unpack_taps(sum + k * kWindow * kBlock, O_ - o * kBlock,
                  dweight + ((i * kBlock + k) * O_ + o * kBlock) * kWindow, add);
  }

  // Of block o of the outputs.
  void sum_bias_grad(const float* d, int64_t block, int64_t o, int64_t pixels, float* sums) const {
    for (int64_t c = o * kBlock; c < std::min((o + 1) * kBlock, O_); c += kLanes) {
      vfloat sum[kWindow] = {};
      const float* from = d + o * block + c % kBlock;
      for (int64_t p = 0; p < pixels; ++p)
        for (int t = 0; t < kWindow; ++t) sum[t] += load(from + t * ob_ * block + p * kBlock);
      store(sums + c, (sum[0] + sum[1]) + (sum[2] + sum[3]),
            static_cast<int>(std::min<int64_t>(kLanes, O_ - c)));
    }
  }

  const Input<T>& in_;
  const float* weight_;
  int64_t I_, O_, ib_, ob_;
};

}  // namespace fastunet
