#include "conv_transpose/conv_transpose_cpu.h"

#include "resample/arguments.h"

namespace fastunet {
namespace {

// The input's size, as a map without data: the source's after its pending resampling.
template <class T>
Map<T> size_of(const Tensor& y, int64_t H, int64_t W) {
  return {nullptr, y.size(0), y.size(1), H, W, 0, 0, 0};
}

void conv_transpose(Tensor out, const Tensor y, const MaybeTensor center, const MaybeTensor scale,
                    const MaybeTensor shift, double slope, int64_t mode, const Tensor weight,
                    const MaybeTensor bias) {
  const MaybeTensor first = y;
  dispatch_fp32_arithmetic(out.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Map<T> to = output_map<T>(out, "out");
    const Identity<float> identity(y.size(1));
    const Input<T> in = input<T>(size_of<T>(y, to.H / 2, to.W / 2), identity,
                                 {{first, center, scale, shift, slope, mode}});
    require(weight.dim() == 4 && weight.is_contiguous() && weight.size(0) == in.C &&
                weight.size(1) == to.C && weight.numel() == in.C * to.C * kWindow,
            "weight must be contiguous [", in.C, ", ", to.C, ", 2, 2], got ", shape(weight));
    if (out.numel() == 0) return;
    ConvTranspose<T>(in, data<const float>(weight, "weight"), to.C)
        .forward(rows<const float>(bias, to.C, "bias"), to);
  });
}

void conv_transpose_bwd(MaybeTensor dweight, Tensor dbias, MaybeTensor dy0, MaybeTensor dscale0,
                        MaybeTensor dshift0, MaybeTensor dz, const Tensor dy, const Tensor y,
                        const MaybeTensor center, const MaybeTensor scale, const MaybeTensor shift,
                        double slope, int64_t mode, const Tensor weight) {
  const MaybeTensor first = y;
  dispatch_fp32_arithmetic(dy.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Map<const T> from = map<const T>(dy, "dy");
    const Identity<float> identity(y.size(1));
    const Input<T> in = input<T>(size_of<T>(y, from.H / 2, from.W / 2), identity,
                                 {{first, center, scale, shift, slope, mode}});
    require(weight.is_contiguous() && weight.numel() == in.C * from.C * kWindow,
            "weight must be contiguous [", in.C, ", ", from.C, ", 2, 2], got ", shape(weight));
    float* dw = nullptr;
    if (dweight) {
      require(dweight->is_contiguous() && dweight->numel() == weight.numel(),
              "dweight must be contiguous, of the weight's shape");
      dw = data<float>(*dweight, "dweight");
    }
    const ConvTranspose<T> kernel(in, data<const float>(weight, "weight"), from.C);
    float* db = rows<float>(dbias, from.C, "dbias");
    InputGrad<T> dx;
    if (!dy0) return kernel.backward(from, dw, db, dx);

    const Pending<T>& source = in.sources[0];
    const int64_t C = in.C, rows_of_source = scale ? scale->size(0) : 1;
    const Map<T> to = dense_output_map<T>(*dy0, "dy of the source");
    const Map<const T>& of = source.source.y;
    require(to.N == of.N && to.C == C && to.H == of.H && to.W == of.W,
            "dy of the source must have its shape, ", shape(y), ", got ", shape(*dy0));
    float* dscale = rows<float>(dscale0, rows_of_source * C, "dscale of the source");
    float* dshift = rows<float>(dshift0, rows_of_source * C, "dshift of the source");
    dx.dz = map_grad(source, to, dz, in.H, in.W);
    if (!dz) dx.source = &source.source;
    kernel.backward(from, dw, db, dx);
    if (dz)
      return resample_map_bwd<T>(source.source, source.mode, source.taps, dx.dz.read_only(), to,
                                 dscale, dshift, rows_of_source);
    sum_affine_chunks(dx.sums, C, rows_of_source, dscale, dshift);
  });
}

}  // namespace

FASTUNET_KERNEL(conv_transpose,
                "conv_transpose(Tensor(a!) out, Tensor y, Tensor? center, Tensor? scale, "
                "Tensor? shift, float slope, int mode, Tensor weight, Tensor? bias) -> ()")
FASTUNET_KERNEL(conv_transpose_bwd,
                "conv_transpose_bwd(Tensor(a!)? dweight, Tensor(b!) dbias, Tensor(c!)? dy0, "
                "Tensor(d!)? dscale, Tensor(e!)? dshift, Tensor(f!)? dz, Tensor dy, Tensor y, "
                "Tensor? center, Tensor? scale, Tensor? shift, float slope, int mode, "
                "Tensor weight) -> ()")

}  // namespace fastunet
