#include "conv_norm_act/convolution_cpu.h"

#include "maps/empty.h"
#include "resample/arguments.h"

namespace fastunet {
namespace {

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

// In training rounding decides over masks and pooling winners: the smaller error there. Where a
// skip connection comes in as well, little of the network is left to go wrong from it.
template <class F>
void with_tile_forward(const Weight& weight, int64_t H, int64_t W, bool exact, F f) {
  const int64_t pairs = weight.K * weight.N;
  with_tile(H, W, pairs, !exact && few_weights(pairs), f);
}

template <class T>
void convolve(const Input<T>& in, const Weight& weight, const Map<T>& to, ChunkMoments<T>* moments,
              const Source<T>* done = nullptr, const MaybeTensor& packed = {}) {
  require(in.C == weight.K && to.C == weight.N, "weight must be [", to.C, ", ", in.C,
          ", 3, 3], got ", weight.N, " output and ", weight.K, " input channels");
  if (to.N * to.H * to.W == 0) return;
  const auto run = [&](auto tile) {
    const RawOutput<T, tile> output{to, moments, done};
    const int64_t floats = PackedWeight<tile, float>::floats(weight.K, weight.blocks());
    require(!packed || packed->numel() == floats, "packed must be what pack_weight makes of the ",
            "weight for this map, got ", packed ? packed->numel() : 0, " values");
    const float* u = packed ? data<const float>(*packed, "packed") : nullptr;
    Convolution<tile, T, RawOutput<T, tile>>(in, weight, output, u).run();
  };
  with_tile_forward(weight, to.H, to.W, !done && in.sources.size() < 2, run);
}

// Where the norm has no statistics.
void fixed_vectors(int64_t C, const std::string& norm, const float* bias, const float* gamma,
                   const float* beta, const MaybeTensor& mean, const MaybeTensor& variance,
                   double eps, const Normalization<float>& vectors) {
  const float* m = rows<const float>(mean, C, "running_mean");
  const float* v = rows<const float>(variance, C, "running_var");
  require(norm == "none" || (norm == "frozen" && m && v),
          "norm must be none, or frozen with running_mean and running_var, got ", norm);
  fixed_normalization(C, bias, gamma, beta, norm == "none" ? nullptr : m, v, eps, vectors);
}

void conv_norm_act(Tensor out, FASTUNET_SOURCE_PARAMETERS, const Tensor weight, std::string norm,
                   const MaybeTensor bias, const MaybeTensor gamma, const MaybeTensor beta,
                   const MaybeTensor mean, const MaybeTensor variance, int64_t groups, double eps,
                   Tensor center, Tensor scale, Tensor shift, Tensor var) {
  dispatch_fp32_arithmetic(out.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Map<T> to = output_map<T>(out, "out");
    const Weight w = weight_view(weight, false);
    const Identity<float> identity(w.K);
    const Input<T> in = input<T>(to, identity, {FASTUNET_SOURCE_ARGUMENTS});
    const bool statistics = norm == "batch" || norm == "group";
    const Grouping g = grouping(to.N, to.C, to.H * to.W, norm == "group" ? groups : 0);
    const int64_t count = g.rows() * to.C;
    const Normalization<float> vectors{
        rows<float>(center, count, "center"), rows<float>(scale, count, "scale"),
        rows<float>(shift, count, "shift"), rows<float>(var, count, "var")};
    const float* b = rows<const float>(bias, to.C, "bias");
    const float* ga = rows<const float>(gamma, to.C, "gamma");
    const float* be = rows<const float>(beta, to.C, "beta");
    ChunkMoments<T> moments;
    convolve(in, w, to, statistics ? &moments : nullptr);
    if (statistics) return finalize(moments, g, b, ga, be, eps, vectors);
    fixed_vectors(to.C, norm, b, ga, be, mean, variance, eps, vectors);
  });
}

// For inference: the output with its normalisation, none or frozen, and activation done.
void conv_norm_act_folded(Tensor out, FASTUNET_SOURCE_PARAMETERS, const Tensor weight,
                          const MaybeTensor packed, std::string norm, const MaybeTensor bias,
                          const MaybeTensor gamma, const MaybeTensor beta, const MaybeTensor mean,
                          const MaybeTensor variance, double eps, double slope) {
  dispatch_fp32_arithmetic(out.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Map<T> to = output_map<T>(out, "out");
    const Weight w = weight_view(weight, false);
    const Identity<float> identity(w.K);
    const Input<T> in = input<T>(to, identity, {FASTUNET_SOURCE_ARGUMENTS});
    std::vector<float> values(4 * to.C);
    const auto vector = [&](int i) { return values.data() + i * to.C; };
    fixed_vectors(to.C, norm, rows<const float>(bias, to.C, "bias"),
                  rows<const float>(gamma, to.C, "gamma"), rows<const float>(beta, to.C, "beta"),
                  mean, variance, eps, {vector(0), vector(1), vector(2), vector(3)});
    const Source<T> done{to.read_only(), vector(0), vector(1),
                         vector(2),      0,         static_cast<float>(slope)};
    convolve<T>(in, w, to, nullptr, &done, packed);
  });
}

// The weight as conv_norm_act_folded reads it for maps of height x width.
Tensor pack_weight(const Tensor weight, int64_t height, int64_t width) {
  const Weight w = weight_view(weight, false);
  Tensor made;
  with_tile_forward(w, height, width, false, [&](auto tile) {
    const std::array<int64_t, 1> size{PackedWeight<tile, float>::floats(w.K, w.blocks())};
    made = empty_kept(size, std::array<int64_t, 1>{1}, ScalarType::Float, size[0] * 4);
    float* to = data<float>(made, "packed");
    prefer_huge_pages(to, size[0] * 4);
    transform_whole<tile>(w, {to, w.K, w.blocks()});
  });
  return made;
}

struct SourceGradTensors {
  MaybeTensor &dy, &dscale, &dshift, &dz;
};

// What flows back to one source.
template <class T>
class SourceBwd {
 public:
  // H, W: of the map that the source stands for. add: to what is in dy, dscale and dshift.
  SourceBwd(const Pending<T>& source, const MaybeTensor& scale, const SourceGradTensors& to,
            int64_t H, int64_t W, bool add)
      : source_(source), rows_(scale ? scale->size(0) : 1), add_(add) {
    const Map<const T>& y = source.source.y;
    dy_ = output_map<T>(*to.dy, "dy of a source");
    require(dy_.N == y.N && dy_.C == y.C && dy_.H == y.H && dy_.W == y.W,
            "dy of a source must have its shape");
    dscale_ = rows<float>(to.dscale, rows_ * y.C, "dscale of a source");
    dshift_ = rows<float>(to.dshift, rows_ * y.C, "dshift of a source");
    dz_ = map_grad(source, dy_, to.dz, H, W);
    pooled_ = source.mode == Mode::max_pool && H == dy_.H / 2 && W == dy_.W / 2 && H * W > 0;
    resampled_ = to.dz.has_value() && !pooled_;
    require(!add || pooled_, "only what is pooled, by 2 and without padding, can be added to");
  }

  template <int kTile>
  typename SourceGrads<T, kTile>::Part part() {
    const bool masked = !resampled_ && (source_.load == Load::affine || pooled_);
    return {source_.source, dz_, masked ? &sums_ : nullptr,
            pooled_ ? std::optional(dy_) : std::nullopt, add_};
  }

  void finish() const {
    if (resampled_)
      return resample_map_bwd<T>(source_.source, source_.mode, source_.taps, dz_.read_only(), dy_,
                                 dscale_, dshift_, rows_);
    sum_affine_chunks(sums_, dy_.C, rows_, dscale_, dshift_, add_);
  }

 private:
  const Pending<T>& source_;
  int64_t rows_;
  Map<T> dy_{}, dz_{};
  float *dscale_, *dshift_;
  bool pooled_, resampled_, add_;
  std::vector<float> sums_;
};

// Of one source or two. weight: turned around, the outputs being their channels.
template <class T>
void source_grads(const Input<T>& x, const Input<T>& grad, const Weight& weight, float* dweight,
                  std::vector<SourceBwd<T>>& of) {
  with_tile(x.H, x.W, x.C * grad.C, true, [&](auto tile) {
    SourceGrads<T, tile> output;
    for (SourceBwd<T>& source : of) output.parts.push_back(source.template part<tile>());
    convolution_bwd<tile>(x, grad, weight, dweight, output);
  });
  for (const SourceBwd<T>& source : of) source.finish();
}

void conv_norm_act_bwd(MaybeTensor dweight, MaybeTensor dgamma, MaybeTensor dbeta, MaybeTensor dy0,
                       MaybeTensor dscale0, MaybeTensor dshift0, MaybeTensor dz0, MaybeTensor dy1,
                       MaybeTensor dscale1, MaybeTensor dshift1, MaybeTensor dz1, const Tensor dy,
                       const MaybeTensor dscale, const MaybeTensor dshift,
                       FASTUNET_SOURCE_PARAMETERS, const Tensor weight, std::string norm,
                       int64_t groups, double eps, const MaybeTensor y, const Tensor center,
                       const Tensor scale, const Tensor var, bool add) {
  dispatch_fp32_arithmetic(dy.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Map<const T> from = dense_map<const T>(dy, "dy");
    const Identity<float> identity(std::max(weight.size(0), weight.size(1)));
    const Input<T> x = input<T>(from, identity, {FASTUNET_SOURCE_ARGUMENTS});
    require(weight.size(0) == from.C && weight.size(1) == x.C, "weight must be [", from.C, ", ",
            x.C, ", 3, 3], got ", shape(weight));

    // The gradient of the raw output, formed wherever it is read.
    const Grouping g = grouping(from.N, from.C, from.H * from.W, norm == "group" ? groups : 0);
    const int64_t count = g.rows() * from.C;
    const float* s = rows<const float>(scale, count, "scale");
    const float* v = rows<const float>(var, count, "var");
    const float* ds = rows<const float>(dscale, count, "dscale");
    const float* db = rows<const float>(dshift, count, "dshift");
    if (dgamma && dbeta)
      affine_bwd(g, v, ds, db, eps, rows<float>(dgamma, from.C, "dgamma"),
                 rows<float>(dbeta, from.C, "dbeta"));
    Input<T> grad{{}, from.N, from.H, from.W, from.C};
    Source<T> of_y = identity.of<T>(from);
    const bool statistics = norm == "batch" || norm == "group";
    const NormalizationBwd<float> terms(g, s, v, ds, db, eps);
    if (statistics && (ds || db)) {
      require(y && y->numel() == dy.numel(), "y must have the shape of dy, ", shape(dy));
      const Map<const T> raw = dense_map<const T>(*y, "y");
      of_y.center = rows<const float>(center, count, "center");
      of_y.scale = terms.slope.data();
      of_y.shift = terms.offset.data();
      of_y.row_stride = norm == "group" ? from.C : 0;
      grad.sources.emplace_back(of_y, Mode::none, Load::normalization_bwd, raw.data);
    } else {
      grad.sources.emplace_back(of_y, Mode::none, Load::plain);
    }

    float* to = nullptr;
    if (dweight) {
      require(dweight->is_contiguous() && dweight->numel() == weight.numel(),
              "dweight must be contiguous, of the weight's shape");
      to = data<float>(*dweight, "dweight");
    }
    std::vector<SourceBwd<T>> of;
    if (dy0)
      of.emplace_back(x.sources[0], scale0, SourceGradTensors{dy0, dscale0, dshift0, dz0}, x.H, x.W,
                      add);
    if (dy1) {
      require(x.sources.size() == 2, "there is no second source");
      of.emplace_back(x.sources[1], scale1, SourceGradTensors{dy1, dscale1, dshift1, dz1}, x.H, x.W,
                      false);
    }
    if (of.empty()) {
      if (to)
        with_tile(x.H, x.W, x.C * grad.C, true,
                  [&](auto tile) { WeightGrad<tile, T>(x, grad, to).run(); });
      return;
    }
    Weight turned = weight_view(weight, true);
    const int64_t channels = x.sources[0].source.y.C;
    if (of.size() == 2)
      turned.split = channels;
    else if (dy0)
      turned.N = channels;
    else
      turned.data += channels * turned.n_stride, turned.N -= channels;
    source_grads<T>(x, grad, turned, to, of);
  });
}

}  // namespace

FASTUNET_KERNEL(conv_norm_act,
                "conv_norm_act(Tensor(a!) out, " FASTUNET_SOURCES
                ", Tensor weight, str norm, Tensor? bias, Tensor? gamma, Tensor? beta, "
                "Tensor? running_mean, Tensor? running_var, int groups, float eps, "
                "Tensor(b!) center, Tensor(c!) scale, Tensor(d!) shift, Tensor(e!) var) -> ()")
FASTUNET_KERNEL(conv_norm_act_folded,
                "conv_norm_act_folded(Tensor(a!) out, " FASTUNET_SOURCES
                ", Tensor weight, Tensor? packed, str norm, Tensor? bias, Tensor? gamma, "
                "Tensor? beta, Tensor? running_mean, Tensor? running_var, float eps, "
                "float slope) -> ()")
FASTUNET_KERNEL(conv_norm_act_bwd,
                "conv_norm_act_bwd(Tensor(a!)? dweight, Tensor(b!)? dgamma, Tensor(c!)? dbeta, "
                "Tensor(d!)? dy0, Tensor(e!)? dscale0, Tensor(f!)? dshift0, Tensor(g!)? dz0, "
                "Tensor(h!)? dy1, Tensor(i!)? dscale1, Tensor(j!)? dshift1, Tensor(k!)? dz1, "
                "Tensor dy, Tensor? dscale, Tensor? dshift, " FASTUNET_SOURCES
                ", Tensor weight, str norm, int groups, float eps, Tensor? y, Tensor center, "
                "Tensor scale, Tensor var, bool add) -> ()")

STABLE_TORCH_LIBRARY_FRAGMENT(FASTUNET_LIBRARY, m) {
  m.def("pack_weight(Tensor weight, int height, int width) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(FASTUNET_LIBRARY, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
}

}  // namespace fastunet
