#include "resample/resample_cpu.h"

#include "common/binding.h"

namespace fastunet {
namespace {

void resample(Tensor out, const Tensor y, const MaybeTensor center, const MaybeTensor scale,
              const MaybeTensor shift, double slope, int64_t mode_number) {
  const Mode mode = checked_mode(mode_number);
  dispatch(y.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Identity<acc_t<T>> identity(y.size(1));
    const Source<T> s = identity.fill(source<T>(y, center, scale, shift, slope));
    const Map<T> to = output_map<T>(out, "out");
    require(to.N == s.y.N && to.C == s.y.C, "out must have the source's samples and channels, got ",
            shape(out), " for ", shape(y));
    if (out.numel() == 0) return;
    const UpsampleTaps<acc_t<T>> taps(mode, s.y.H, s.y.W);
    const Resample<T> kernel(s, to.H, to.W, mode, taps, !scale);
    const int64_t grain = ceil_div(8192, to.W * to.C);
    torch::stable::parallel_for(0, to.N * to.H, grain, [&](int64_t begin, int64_t end) {
      typename Resample<T>::Rows rows;
      for (int64_t row = begin; row < end; ++row) {
        const int64_t n = row / to.H, h = row % to.H;
        if (h == 0) rows.low_row = rows.high_row = -1;
        kernel.row(n, h, 0, to.W, to.at(n, h), to.sw, rows);
      }
    });
  });
}

void resample_bwd(Tensor dy, MaybeTensor dscale, MaybeTensor dshift, const Tensor dz,
                  const Tensor y, const MaybeTensor center, const MaybeTensor scale,
                  const MaybeTensor shift, double slope, int64_t mode_number) {
  const Mode mode = checked_mode(mode_number);
  dispatch(y.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const Identity<acc_t<T>> identity(y.size(1));
    const Source<T> s = identity.fill(source<T>(y, center, scale, shift, slope));
    const Map<T> to = output_map<T>(dy, "dy");
    const Map<const T> from = map<const T>(dz, "dz");
    require(to.N == s.y.N && to.C == s.y.C && to.H == s.y.H && to.W == s.y.W,
            "dy must have the shape of y, got ", shape(dy), " for ", shape(y));
    require(from.N == s.y.N && from.C == s.y.C, "dz must have the source's samples and channels, ",
            "got ", shape(dz), " for ", shape(y));
    const int64_t C = s.y.C, rows_out = scale ? scale->size(0) : 0;
    A* dscale_out = rows<A>(dscale, rows_out * C, "dscale");
    A* dshift_out = rows<A>(dshift, rows_out * C, "dshift");
    resample_map_bwd<T>(s, mode, UpsampleTaps<A>(mode, s.y.H, s.y.W), from, to, dscale_out,
                        dshift_out, rows_out);
  });
}

}  // namespace

FASTUNET_KERNEL(resample,
                "resample(Tensor(a!) out, Tensor y, Tensor? center, Tensor? scale, Tensor? shift, "
                "float slope, int mode) -> ()")
FASTUNET_KERNEL(
    resample_bwd,
    "resample_bwd(Tensor(a!) dy, Tensor(b!)? dscale, Tensor(c!)? dshift, Tensor dz, "
    "Tensor y, Tensor? center, Tensor? scale, Tensor? shift, float slope, int mode) -> ()")

}  // namespace fastunet
