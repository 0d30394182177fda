#include "resample/resample_cuda.cuh"

#include "common/cuda/binding.cuh"

namespace fastunet::cuda {
namespace {

// Calls f(integral_constant<Mode, M>) with the mode that the kernels are compiled for.
template <class F>
void dispatch_mode(Mode mode, F f) {
  switch (mode) {
    case Mode::none:
      return f(std::integral_constant<Mode, Mode::none>{});
    case Mode::max_pool:
      return f(std::integral_constant<Mode, Mode::max_pool>{});
    case Mode::nearest:
      return f(std::integral_constant<Mode, Mode::nearest>{});
    case Mode::bilinear:
    case Mode::bilinear_align_corners:
      return f(std::integral_constant<Mode, Mode::bilinear>{});
  }
}

void resample(Tensor out, const Tensor y, const MaybeTensor center, const MaybeTensor scale,
              const MaybeTensor shift, double slope, int64_t mode_number) {
  const Mode mode = checked_mode(mode_number);
  const Launcher launch(y);
  dispatch(y.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Source<T> s = source<T>(y, center, scale, shift, slope);
    const Map<T> to = map<T>(out, "out");
    require(to.N == s.y.N && to.C == s.y.C, "out must have the source's samples and channels, got ",
            shape(out), " for ", shape(y));
    if (out.numel() == 0) return;
    const Placement place(mode, s.y.H, s.y.W, to.H, to.W);
    const Axis vertical = Axis::of(mode, s.y.H), horizontal = Axis::of(mode, s.y.W);
    dispatch_mode(mode, [&](auto m) {
      constexpr Mode M = m;
      const Windows<M> down(place.top, to.H), across(place.left, to.W);
      dispatch_vectors<T>(
          [&](auto v) {
            constexpr int V = v;
            const Tiling t = tiling(to.N, down.count, across.count, to.C, V);
            launch(&resample_kernel<M, T, V>, grid(t.blocks(to.N)), s, to, place, down, across,
                   vertical, horizontal, t);
          },
          s, to);
    });
  });
}

void resample_bwd(Tensor dy, MaybeTensor dscale, MaybeTensor dshift, const Tensor dz,
                  const Tensor y, const MaybeTensor center, const MaybeTensor scale,
                  const MaybeTensor shift, double slope, int64_t mode_number, MaybeTensor z) {
  const Mode mode = checked_mode(mode_number);
  const Launcher launch(y);
  dispatch(y.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const Source<T> s = source<T>(y, center, scale, shift, slope);
    const Map<T> to = map<T>(dy, "dy");
    const Map<const T> from = map<const T>(dz, "dz");
    const auto [N, C] = std::pair(s.y.N, s.y.C);
    require(to.N == N && to.C == C && to.H == s.y.H && to.W == s.y.W,
            "dy must have the shape of y, got ", shape(dy), " for ", shape(y));
    require(from.N == N && from.C == C, "dz must have the source's samples and channels, got ",
            shape(dz), " for ", shape(y));
    const Placement place(mode, s.y.H, s.y.W, from.H, from.W);
    Map<T> also{};
    if (z) {
      also = map<T>(*z, "z");
      require(mode == Mode::none || mode == Mode::max_pool, "z cannot be had where y is upsampled");
      require(also.N == N && also.C == C && also.H == place.H && also.W == place.W &&
                  from.H == place.H && from.W == place.W,
              "z and dz must have the shape of the resampled map, got ", shape(*z), " and ",
              shape(dz));
    }
    require(bool(scale) == bool(dscale) && bool(scale) == bool(dshift),
            "dscale and dshift must be given where there is a scale, and only there");
    const int64_t rows_out = scale ? scale->size(0) : 0;
    A* const of_scale = rows<A>(dscale, rows_out * C, "dscale");
    A* const of_shift = rows<A>(dshift, rows_out * C, "dshift");
    const int64_t window = mode == Mode::max_pool ? 2 : 1;
    const int64_t height = ceil_div(s.y.H, window), width = ceil_div(s.y.W, window);
    const Axis vertical = Axis::of(mode, s.y.H), horizontal = Axis::of(mode, s.y.W);
    dispatch_vectors<T>(
        [&](auto v) {
          constexpr int V = v;
          Tiling t{};
          if (y.numel()) t = tiling(N, height, width, C, V);
          MaybeTensor sums;
          if (scale) sums = workspace<A>(y, N * t.tiles * 2 * C);
          A* const partial = sums ? data<A>(*sums, "sums") : nullptr;
          dispatch_mode(mode, [&](auto m) {
            launch(&resample_bwd_kernel<m, T, V>, grid(t.blocks(N)), s, from, to, also, partial,
                   place, vertical, horizontal, t);
          });
          if (scale)
            launch(&sum_tiles_kernel<A>, grid(ceil_div(2 * C, kSets) * rows_out), partial,
                   rows_out ? N * t.tiles / rows_out : 0, C, of_scale, of_shift);
        },
        s, from, to, also);
  });
}

}  // namespace

FASTUNET_NAME_SOURCES()

FASTUNET_CUDA_KERNEL(resample,
                     "resample(Tensor(a!) out, Tensor y, Tensor? center, Tensor? scale, "
                     "Tensor? shift, float slope, int mode) -> ()")
FASTUNET_CUDA_KERNEL(resample_bwd,
                     "resample_bwd(Tensor(a!) dy, Tensor(b!)? dscale, Tensor(c!)? dshift, "
                     "Tensor dz, Tensor y, Tensor? center, Tensor? scale, Tensor? shift, "
                     "float slope, int mode, Tensor(d!)? z=None) -> ()")

}  // namespace fastunet::cuda
