// A convolution's input gradient is a convolution of the output's gradient with the weight turned
// around: input and output channels exchanged, taps in reverse order.
#include <algorithm>

#include "common/binding.h"

namespace fastunet {
namespace {

// out[i][taps - 1 - t][o] = weight[o][i][t], both dense: out is channels_last [in, out, kh, kw].
template <class W>
void turn(const W* weight, int64_t out_channels, int64_t in_channels, int64_t taps, W* out) {
  constexpr int64_t kBlock = 16;  // a cache line of outputs per tap
  const int64_t blocks = ceil_div(out_channels, kBlock);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, last = std::min(first + kBlock, out_channels);
      for (int64_t i = 0; i < in_channels; ++i)
        for (int64_t t = 0; t < taps; ++t) {
          W* to = out + (i * taps + taps - 1 - t) * out_channels;
          for (int64_t o = first; o < last; ++o) to[o] = weight[(o * in_channels + i) * taps + t];
        }
    }
  });
}

void turn_weight(Tensor out, const Tensor weight) {
  require(weight.dim() == 4 && weight.is_contiguous(), "weight must be contiguous [O, I, kh, kw]");
  require(out.numel() == weight.numel() && out.scalar_type() == weight.scalar_type(),
          "out must be the weight's size and dtype");
  const int64_t O = weight.size(0), I = weight.size(1), taps = weight.size(2) * weight.size(3);
  dispatch(weight.scalar_type(), [&](auto t) {
    using W = decltype(t);
    turn(data<const W>(weight, "weight"), O, I, taps, data<W>(out, "out"));
  });
}

}  // namespace

FASTUNET_KERNEL(turn_weight, "turn_weight(Tensor(a!) out, Tensor weight) -> ()")

}  // namespace fastunet
