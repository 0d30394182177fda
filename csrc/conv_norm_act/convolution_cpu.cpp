#include "conv_norm_act/convolution_cpu.h"

#include "common/binding.h"

namespace fastunet {
namespace {

// One source as an operator carries it; vectors are absent for a plain map.
struct SourceArguments {
  const MaybeTensor &y, &center, &scale, &shift;
  double slope;
  int64_t mode;
};

// An identity affine, for plain maps.
template <class A>
struct Identity {
  std::vector<A> zeros, ones;
  explicit Identity(int64_t C) : zeros(C, A(0)), ones(C, A(1)) {}
};

template <class T, class Size>
Input<T> input(const Map<Size>& size, const Identity<acc_t<T>>& identity,
               std::initializer_list<SourceArguments> arguments) {
  Input<T> in{{}, size.N, size.H, size.W, 0};
  for (const SourceArguments& a : arguments) {
    if (!a.y) continue;
    const Mode mode = checked_mode(a.mode);
    const auto m = map<const T>(*a.y, "y");
    require(m.N == size.N, "sources must have the samples of the output, ", size.N, ", got ", m.N);
    Source<T> s{m, identity.zeros.data(), identity.ones.data(), identity.zeros.data(), 0, 1};
    if (a.scale) s = source<T>(*a.y, *a.center, *a.scale, *a.shift, a.slope);
    in.sources.push_back({s, mode, !a.scale, {mode, m.H, m.W}});
    in.C += m.C;
  }
  return in;
}

// Weights [O, I, 3, 3] whose inputs and taps are adjacent (a slice of the inputs has that).
Weight weight_view(const Tensor& weight, bool turned) {
  require(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
          "weight must be [O, I, 3, 3], got ", shape(weight));
  require(weight.stride(3) == 1 && weight.stride(2) == 3 &&
              (weight.stride(1) == kTaps || weight.size(1) == 1),
          "weight must be contiguous but for its first dimension");
  const float* from = data<const float>(weight, "weight");
  const int64_t O = weight.size(0), I = weight.size(1), row = weight.stride(0);
  if (turned) return {from, O, I, row, kTaps, true};
  return {from, I, O, kTaps, row, false};
}

template <class F>
void dispatch_fp32_arithmetic(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(f16{});
    default:
      require(false, "the dtype must be float32, bfloat16 or float16");
  }
}

// What normalises the output, as values per row and channel.
struct Vectors {
  Tensor &center, &scale, &shift, &var;

  Normalization<float> of(int64_t count) const {
    return {rows<float>(center, count, "center"), rows<float>(scale, count, "scale"),
            rows<float>(shift, count, "shift"), rows<float>(var, count, "var")};
  }
};

void conv_norm_act(Tensor out, const Tensor y0, const MaybeTensor center0, const MaybeTensor scale0,
                   const MaybeTensor shift0, double slope0, int64_t mode0, const MaybeTensor y1,
                   const MaybeTensor center1, const MaybeTensor scale1, const MaybeTensor shift1,
                   double slope1, int64_t mode1, const Tensor weight, std::string norm,
                   const MaybeTensor bias, const MaybeTensor gamma, const MaybeTensor beta,
                   const MaybeTensor mean, const MaybeTensor variance, int64_t groups, double eps,
                   Tensor center, Tensor scale, Tensor shift, Tensor var) {
  const MaybeTensor first = y0;
  dispatch_fp32_arithmetic(out.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Map<T> to = output_map<T>(out, "out");
    const Weight w = weight_view(weight, false);
    const Identity<float> identity(w.K);
    const Input<T> in = input<T>(to, identity,
                                 {{first, center0, scale0, shift0, slope0, mode0},
                                  {y1, center1, scale1, shift1, slope1, mode1}});
    require(in.C == w.K && to.C == w.N, "weight must fit ", in.C, " input and ", to.C,
            " output channels, got ", shape(weight));
    const bool statistics = norm == "batch" || norm == "group";
    const Grouping g = grouping(to.N, to.C, to.H * to.W, norm == "group" ? groups : 0);
    const Normalization<float> vectors = Vectors{center, scale, shift, var}.of(g.rows() * to.C);
    const float* b = rows<const float>(bias, to.C, "bias");
    const float* ga = rows<const float>(gamma, to.C, "gamma");
    const float* be = rows<const float>(beta, to.C, "beta");
    ChunkMoments<T> moments;
    if (out.numel() > 0) Convolution<T>(in, w, to, statistics ? &moments : nullptr).run();
    if (statistics) return finalize(moments, g, b, ga, be, eps, vectors);
    const float* m = rows<const float>(mean, to.C, "running_mean");
    const float* v = rows<const float>(variance, to.C, "running_var");
    require(norm == "none" || (m && v), "a frozen norm must have running_mean and running_var");
    fixed_normalization(to.C, b, ga, be, norm == "none" ? nullptr : m, v, eps, vectors);
  });
}

void convolution_input_grad(Tensor dx, const Tensor dy, const Tensor weight) {
  const MaybeTensor none, grad = dy;
  dispatch_fp32_arithmetic(dx.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Map<T> to = output_map<T>(dx, "dx");
    const Weight w = weight_view(weight, true);
    const Identity<float> identity(w.K);
    const Input<T> in = input<T>(to, identity, {{grad, none, none, none, 1, 0}});
    require(in.C == w.K && to.C == w.N, "weight must fit ", in.C, " output and ", to.C,
            " input channels, got ", shape(weight));
    if (dx.numel() > 0) Convolution<T>(in, w, to, nullptr).run();
  });
}

void convolution_weight_grad(Tensor dweight, const Tensor dy, const Tensor y0,
                             const MaybeTensor center0, const MaybeTensor scale0,
                             const MaybeTensor shift0, double slope0, int64_t mode0,
                             const MaybeTensor y1, const MaybeTensor center1,
                             const MaybeTensor scale1, const MaybeTensor shift1, double slope1,
                             int64_t mode1) {
  const MaybeTensor first = y0, none, grad = dy;
  dispatch_fp32_arithmetic(dy.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Map<const T> from = map<const T>(dy, "dy");
    require(dweight.is_contiguous(), "dweight must be contiguous");
    const Identity<float> identity(std::max(dweight.size(0), dweight.size(1)));
    const Input<T> x = input<T>(from, identity,
                                {{first, center0, scale0, shift0, slope0, mode0},
                                 {y1, center1, scale1, shift1, slope1, mode1}});
    const Input<T> of_y = input<T>(from, identity, {{grad, none, none, none, 1, 0}});
    require(dweight.dim() == 4 && dweight.size(0) == from.C && dweight.size(1) == x.C,
            "dweight must be [", from.C, ", ", x.C, ", 3, 3], got ", shape(dweight));
    WeightGrad<T>(x, of_y, data<float>(dweight, "dweight")).run();
  });
}

}  // namespace

#define FASTUNET_SOURCES                                                                  \
  "Tensor y0, Tensor? center0, Tensor? scale0, Tensor? shift0, float slope0, int mode0, " \
  "Tensor? y1, Tensor? center1, Tensor? scale1, Tensor? shift1, float slope1, int mode1"

FASTUNET_KERNEL(conv_norm_act,
                "conv_norm_act(Tensor(a!) out, " FASTUNET_SOURCES
                ", Tensor weight, str norm, Tensor? bias, Tensor? gamma, Tensor? beta, "
                "Tensor? running_mean, Tensor? running_var, int groups, float eps, "
                "Tensor(b!) center, Tensor(c!) scale, Tensor(d!) shift, Tensor(e!) var) -> ()")
FASTUNET_KERNEL(convolution_input_grad,
                "convolution_input_grad(Tensor(a!) dx, Tensor dy, Tensor weight) -> ()")
FASTUNET_KERNEL(convolution_weight_grad,
                "convolution_weight_grad(Tensor(a!) dweight, Tensor dy, " FASTUNET_SOURCES
                ") -> ()")

}  // namespace fastunet
