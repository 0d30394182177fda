// The 2x2 stride 2 transposed convolution as matrix products: its windows do not overlap, so each
// input pixel gives 2x2 outputs of its own.
//
//   y[2h + i][2w + j][o] = bias[o] + sum over k of x[h][w][k] * weight[k][o][i][j]
//
// Pixels are worked on in batches of whole rows: first all threads bring the operands into blocks
// of 16 channels, then each takes blocks of results, packing their weights on the way.
#pragma once

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/transpose.h"
#include "common/workspace.h"
#include "resample/input.h"

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

template <class T>
class ConvTranspose {
 public:
  // weight: [I, O, 2, 2] dense.
  ConvTranspose(const Input<T>& in, const float* weight, int64_t O)
      : in_(in), weight_(weight), I_(in.C), O_(O), ib_(blocks_of(I_)), ob_(blocks_of(O)) {}

  void forward(const float* bias, const Map<T>& y) const {
    for_batches(ib_, [&](int64_t first, int64_t last, float* v, int64_t stride) {
      read_input(first, last, v, stride);
      for_ranges(last - first, ob_, [&](int64_t begin, int64_t end, int64_t b) {
        const int64_t pixels = (end - begin) * in_.W, u_block = I_ * kBlock;
        float* u = thread_workspace().get(kWindow * (u_block + pixels * kBlock));
        float* m = u + kWindow * u_block;
        for (int64_t k = 0; k < I_; ++k)
          pack_taps(weight_ + (k * O_ + b * kBlock) * kWindow, kWindow, O_ - b * kBlock,
                    u + k * kBlock, u_block);
        multiply(v + begin * in_.W * kBlock, stride, u, I_, m, pixels * kBlock, kWindow, pixels,
                 false);
        for (int t = 0; t < kWindow; ++t)
          write_output(first + begin, first + end, t, b, m + t * pixels * kBlock, bias, y);
      });
    });
  }

  // Any of dweight [I, O, 2, 2] and the input's gradient dz (without data where not needed), and
  // dbias [O].
  void backward(const Map<const T>& dy, float* dweight, float* dbias, const Map<T>& dz) const {
    const int64_t dy_blocks = kWindow * ob_;
    std::vector<double> bias_sums(O_);
    if (dweight) std::fill_n(dweight, I_ * O_ * kWindow, 0.0f);
    for_batches(dy_blocks + ib_, [&](int64_t first, int64_t last, float* d, int64_t stride) {
      const int64_t pixels = (last - first) * in_.W;
      read_grad(dy, first, last, d, stride);
      add_bias_grad(d, stride, pixels, bias_sums.data());
      if (dweight) {
        float* v = d + dy_blocks * stride;
        read_input(first, last, v, stride);
        add_weight_grad(v, d, stride, pixels, dweight);
      }
      if (!dz.data) return;
      for_ranges(last - first, ib_, [&](int64_t begin, int64_t end, int64_t b) {
        const int64_t count = (end - begin) * in_.W, K = dy_blocks * kBlock;
        float* u = thread_workspace().get((K + count) * kBlock);
        float* m = u + K * kBlock;
        std::fill_n(u, K * kBlock, 0.0f);
        for (int64_t o = 0; o < O_; ++o)
          pack_taps(weight_ + (b * kBlock * O_ + o) * kWindow, O_ * kWindow, I_ - b * kBlock,
                    u + o * kBlock, ob_ * kBlock * kBlock);
        multiply(d + begin * in_.W * kBlock, stride, u, K, m, count * kBlock, 1, count, false);
        write_input_grad(first + begin, count, b, m, dz);
      });
    });
    for (int64_t o = 0; o < O_; ++o) dbias[o] = static_cast<float>(bias_sums[o]);
  }

 private:
  static constexpr int64_t kBatchBytes = 8 << 20;

  int64_t all_rows() const { return in_.N * in_.H; }
  // At most 2048 pixels, also to keep sums over them short.
  int64_t batch_rows(int64_t blocks) const {
    const int64_t pixels = std::min<int64_t>(kBatchBytes / (blocks * kBlock * 4), 2048);
    return std::max<int64_t>(1, pixels / in_.W);
  }
  int64_t rows_per_range() const { return std::max<int64_t>(1, 256 / in_.W); }

  // f(first row, last row, operands [blocks][stride]) over all rows of all samples.
  template <class F>
  void for_batches(int64_t blocks, F f) const {
    const int64_t rows = batch_rows(blocks);
    const int64_t stride = (std::min(rows, all_rows()) * in_.W + 1) * kBlock;
    float* operands = shared_workspace().get(blocks * stride);
    for (int64_t first = 0; first < all_rows(); first += rows)
      f(first, std::min(first + rows, all_rows()), operands, stride);
  }

  // f(begin, end, block) in parallel, for ranges of rows by blocks of results.
  template <class F>
  void for_ranges(int64_t rows, int64_t blocks, F f) const {
    const int64_t per_range = rows_per_range(), ranges = ceil_div(rows, per_range);
    parallel_tasks(ranges * blocks, [&](int64_t task) {
      const int64_t begin = task % ranges * per_range;
      f(begin, std::min(begin + per_range, rows), task / ranges);
    });
  }

  void read_input(int64_t first, int64_t last, float* v, int64_t stride) const {
    const Pending<T>& p = in_.sources[0];
    parallel_tasks((last - first) * ib_, [&](int64_t task) {
      const int64_t row = first + task / ib_, b = task % ib_;
      const int64_t count = std::min<int64_t>(kBlock, I_ - b * kBlock);
      float* to = v + b * stride + (row - first) * in_.W * kBlock;
      if (count < kBlock) zero(to, in_.W, kBlock, kBlock);
      const Resample<T> resample =
          resample_of(p, channels(p.source, b * kBlock, count), in_.H, in_.W);
      typename Resample<T>::Rows rows;
      resample.row(row / in_.H, row % in_.H, 0, in_.W, to, kBlock, rows);
    });
  }

  // The gradients of the 2x2 outputs of each pixel: blocks [taps][ob].
  void read_grad(const Map<const T>& dy, int64_t first, int64_t last, float* d,
                 int64_t stride) const {
    parallel_tasks((last - first) * kWindow * ob_, [&](int64_t task) {
      const int64_t row = first + task / (kWindow * ob_), block = task % (kWindow * ob_);
      const int64_t t = block / ob_, c = block % ob_ * kBlock;
      const T* from = dy.at(row / in_.H, 2 * (row % in_.H) + t / 2, t % 2) + c;
      float* to = d + block * stride + (row - first) * in_.W * kBlock;
      for (int i = 0; i < kBlock; i += kLanes) {
        const int lanes = static_cast<int>(std::clamp<int64_t>(O_ - c - i, 0, kLanes));
        for (int64_t w = 0; w < in_.W; ++w)
          store(to + w * kBlock + i, lanes ? load(from + 2 * w * dy.sw + i, lanes) : vfloat{});
      }
    });
  }

  void write_output(int64_t first, int64_t last, int t, int64_t b, const float* m,
                    const float* bias, const Map<T>& y) const {
    for (int i = 0; i < kBlock; i += kLanes) {
      const int64_t c = b * kBlock + i;
      const int lanes = static_cast<int>(std::clamp<int64_t>(O_ - c, 0, kLanes));
      if (lanes == 0) return;
      const vfloat add = bias ? load(bias + c, lanes) : vfloat{};
      const float* from = m + i;
      for (int64_t row = first; row < last; ++row) {
        T* to = y.at(row / in_.H, 2 * (row % in_.H) + t / 2, t % 2) + c;
        for (int64_t w = 0; w < in_.W; ++w, from += kBlock, to += 2 * y.sw)
          store(to, load(from) + add, lanes);
      }
    }
  }

  // dz is dense.
  void write_input_grad(int64_t first_row, int64_t pixels, int64_t b, const float* m,
                        const Map<T>& dz) const {
    T* to = dz.data + first_row * in_.W * I_ + b * kBlock;
    for (int i = 0; i < kBlock; i += kLanes) {
      const int lanes = static_cast<int>(std::clamp<int64_t>(I_ - b * kBlock - i, 0, kLanes));
      if (lanes == 0) return;
      for (int64_t p = 0; p < pixels; ++p) store(to + p * I_ + i, load(m + p * kBlock + i), lanes);
    }
  }

  void add_weight_grad(const float* v, const float* d, int64_t stride, int64_t pixels,
                       float* dweight) const {
    parallel_tasks(ib_ * ob_, [&](int64_t task) {
      constexpr int64_t kRow = kWindow * kBlock;
      alignas(64) float du[kBlock * kRow];
      const int64_t i = task / ob_, o = task % ob_;
      const int64_t inputs = std::min<int64_t>(kBlock, I_ - i * kBlock);
      correlate(v + i * stride, inputs, d + o * stride, ob_ * stride, kWindow, pixels, du, kRow,
                false);
      for (int64_t k = 0; k < inputs; ++k)
        for (int64_t c = 0; c < std::min<int64_t>(kBlock, O_ - o * kBlock); ++c)
          for (int t = 0; t < kWindow; ++t)
            dweight[((i * kBlock + k) * O_ + o * kBlock + c) * kWindow + t] +=
                du[k * kRow + t * kBlock + c];
    });
  }

  void add_bias_grad(const float* d, int64_t stride, int64_t pixels, double* sums) const {
    parallel_tasks(ob_, [&](int64_t b) {
      for (int64_t o = b * kBlock; o < std::min((b + 1) * kBlock, O_); o += kLanes) {
        vfloat sum{};
        for (int t = 0; t < kWindow; ++t) {
          const float* from = d + (t * ob_ + b) * stride + o % kBlock;
          for (int64_t p = 0; p < pixels; ++p) sum += load(from + p * kBlock);
        }
        for (int64_t c = o; c < std::min<int64_t>(o + kLanes, O_); ++c) sums[c] += sum[c - o];
      }
    });
  }

  const Input<T>& in_;
  const float* weight_;
  int64_t I_, O_, ib_, ob_;
};

}  // namespace fastunet
