// head for more classes than registers hold the sums of (head_cpu.h): matrix products, over pieces
// of a row of pixels whose channels and logits stay in L1 or L2.
#pragma once

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "head/head_cpu.h"

namespace fastunet {

template <class T>
class ManyClasses {
 public:
  // weight: [classes, C].
  ManyClasses(const Source<T>& s, const float* weight, int64_t classes)
      : s_(s), weight_(weight), C_(s.y.C), K_(classes), cb_(blocks_of(C_)), kb_(blocks_of(K_)) {}

  // bias: [classes] or null.
  void forward(const float* bias, const Logits<T>& out) const {
    std::vector<float> biases(kb_ * kBlock);
    if (bias) std::copy_n(bias, K_, biases.data());
    const float* u = packed(K_, C_, C_, 1);
    parallel_tasks(s_.y.N * s_.y.H, [&](int64_t row) {
      float* z = thread_workspace().get((cb_ + kBlocks) * kPlane);
      float* m = z + cb_ * kPlane;
      for_pieces(row / s_.y.H, row % s_.y.H, [&](const Piece& at) {
        read_source(at, z);
        for (int64_t k = 0; k < kb_; k += kBlocks) {
          const int64_t blocks = std::min<int64_t>(kBlocks, kb_ - k);
          product(z, u + k * C_ * kBlock, C_, m, blocks, at.count);
          for (int64_t i = 0; i < blocks; ++i)
            write_logits(at, k + i, m + i * kPlane, biases.data() + (k + i) * kBlock, out);
        }
      });
    });
  }

  // What backward sums up over pixels: dscale, dshift and classes' rows of dweight, `row()` floats
  // each, then dbias.
  int64_t row() const { return cb_ * kBlock; }
  int64_t dbias() const { return (2 + kb_ * kBlock) * row(); }
  int64_t sums() const { return dbias() + kb_ * kBlock; }

  // Writes dy, where it has data, and adds to partials, [chunks][sums()].
  void backward(const Logits<const T>& dlogits, const Map<T>& dy, const Chunks& chunks,
                float* partials) const {
    const float* u = packed(C_, K_, 1, C_);  // turned around
    parallel_tasks(chunks.count(), [&](int64_t chunk) {
      float* z = thread_workspace().get((cb_ + kb_ + kBlocks) * kPlane);
      float* d = z + cb_ * kPlane;
      float* m = d + kb_ * kPlane;
      float* sums = partials + chunk * this->sums();
      for (int64_t h = chunks.begin(chunk); h < chunks.end(chunk); ++h)
        for_pieces(chunks.sample(chunk), h, [&](const Piece& at) {
          read_source(at, z);
          read_grads(at, dlogits, d, sums + dbias());
          Prefetch none;
          for (int64_t k = 0; k < kb_; ++k)
            correlate({d + k * kPlane, kPlane}, kBlock, {z, kPlane}, cb_, 1, at.count,
                      {sums + (2 + k * kBlock) * row(), row()}, true, none, 1);
          if (!dy.data) return;
          for (int64_t c = 0; c < cb_; c += kBlocks) {
            const int64_t blocks = std::min<int64_t>(kBlocks, cb_ - c);
            product(d, u + c * K_ * kBlock, K_, m, blocks, at.count);
            write_source_grad(at, c * kBlock, blocks * kBlock, m, dy, sums);
          }
        });
    });
  }

 private:
  static constexpr int64_t kPixels = 128;  // of a piece
  // Of a block of channels; a line further apart than it is large.
  static constexpr int64_t kPlane = (kPixels + 1) * kBlock;
  struct Piece {
    int64_t n, h, w, count;
  };

  template <class F>
  void for_pieces(int64_t n, int64_t h, F f) const {
    for (int64_t w = 0; w < s_.y.W; w += kPixels) f(Piece{n, h, w, std::min(kPixels, s_.y.W - w)});
  }

  // The weight as a product reads it: [blocks of outputs][inputs][16].
  const float* packed(int64_t outputs, int64_t inputs, int64_t output, int64_t input) const {
    float* u = shared_workspace().get(blocks_of(outputs) * inputs * kBlock);
    for (int64_t o = 0; o < blocks_of(outputs) * kBlock; ++o)
      for (int64_t i = 0; i < inputs; ++i)
        u[(o / kBlock * inputs + i) * kBlock + o % kBlock] =
            o < outputs ? weight_[o * output + i * input] : 0;
    return u;
  }

  // m[n][pixel] = sum over `inputs` k of v[k][pixel] * u[n][k]
  static void product(const float* v, const float* u, int64_t inputs, float* m, int64_t blocks,
                      int64_t pixels) {
    Prefetch none;
    multiply({v, kPlane}, {u, inputs * kBlock}, inputs, {m, kPlane}, blocks, 1, pixels, false, none,
             1);
  }

  // Channel c's vector of a pixel in blocks.
  static int64_t offset(int64_t pixel, int64_t c) {
    return c / kBlock * kPlane + pixel * kBlock + c % kBlock;
  }

  void read_source(const Piece& at, float* z) const {
    const T* y = s_.y.at(at.n, at.h, at.w);
    for_tiles(at.count, C_, [&](int64_t p, int64_t end, int64_t c, auto lanes) {
      const Channels<float> channel(s_, at.n, c, lanes);
      for (; p < end; ++p) store(z + offset(p, c), channel(load(y + p * s_.y.sw + c, lanes)));
    });
  }

  void write_logits(const Piece& at, int64_t block, const float* m, const float* bias,
                    const Logits<T>& out) const {
    const int64_t first = block * kBlock, most = std::min<int64_t>(kBlock, K_ - first);
    if (out.sk == 1) {
      for (int64_t p = 0; p < at.count; ++p)
        for (int64_t k = 0; k < most; k += kLanes)
          store(&out.at(at.n, first + k, at.h, at.w + p), load(m + p * kBlock + k) + load(bias + k),
                lanes_of(most - k));
      return;
    }
    for (int64_t k = 0; k < most; ++k)
      for (int64_t p = 0; p < at.count; p += kLanes) {
        const int count = lanes_of(at.count - p);
        float logits[kLanes] = {};
        for (int i = 0; i < count; ++i) logits[i] = m[(p + i) * kBlock + k] + bias[k];
        out.put(at.n, first + k, at.h, at.w + p, load(logits), count);
      }
  }

  void read_grads(const Piece& at, const Logits<const T>& dlogits, float* d, float* dbias) const {
    for (int64_t k = 0; k < kb_ * kBlock; k += kLanes) {
      const int lanes = lanes_of(K_ - k);
      vfloat sum{};
      for (int64_t p = 0; p < at.count; ++p) {
        vfloat grad{};
        if (lanes > 0 && dlogits.sk == 1)
          grad = load(&dlogits.at(at.n, k, at.h, at.w + p), lanes);
        else
          for (int i = 0; i < lanes; ++i)
            grad[i] = load_one(dlogits.at(at.n, k + i, at.h, at.w + p));
        store(d + offset(p, k), grad);
        sum += grad;
      }
      store(dbias + k, load(dbias + k) + sum);
    }
  }

  // m: the gradient of `count` activated channels from c0 on, of which some may not be there.
  void write_source_grad(const Piece& at, int64_t c0, int64_t count, const float* m,
                         const Map<T>& dy, float* sums) const {
    const T* y = s_.y.at(at.n, at.h, at.w);
    T* to = dy.at(at.n, at.h, at.w);
    for_tiles(at.count, std::min(count, C_ - c0),
              [&](int64_t p, int64_t end, int64_t i, auto lanes) {
                const int64_t c = c0 + i;
                const Channels<float> channel(s_, at.n, c, lanes);
                vfloat dscale{}, dshift{};
                for (; p < end; ++p) {
                  const vfloat value = load(y + p * s_.y.sw + c, lanes);
                  const vfloat g = channel.act_bwd(load(m + offset(p, i)), channel.preact(value));
                  store(to + p * dy.sw + c, channel.scale * g, lanes);
                  dscale += g * (value - channel.center);
                  dshift += g;
                }
                store(sums + c, load(sums + c) + dscale);
                store(sums + row() + c, load(sums + row() + c) + dshift);
              });
  }

  static int lanes_of(int64_t left) {
    return static_cast<int>(std::clamp<int64_t>(left, 0, kLanes));
  }

  const Source<T>& s_;
  const float* weight_;
  int64_t C_, K_, cb_, kb_;
};

}  // namespace fastunet
