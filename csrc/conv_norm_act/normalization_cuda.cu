#include "conv_norm_act/normalization_cuda.cuh"

#include "common/cuda/binding.cuh"

namespace fastunet::cuda {
namespace {

struct Rows {
  Groups groups;
  int64_t count;  // of rows of statistics
};

// groups == 0: statistics over the batch, per channel; else per sample over groups of channels.
Rows rows_of(int64_t N, int64_t C, int64_t groups) {
  require(groups == 0 || (groups > 0 && C % groups == 0), "groups must divide the channels, got ",
          groups, " groups of ", C, " channels");
  const int64_t width = groups ? C / groups : 1;
  return {{C / width, width, width == 1 ? 8 : 1}, groups ? N : 1};
}

void normalization(const Tensor y, const MaybeTensor bias, const MaybeTensor gamma,
                   const MaybeTensor beta, int64_t groups, double eps, Tensor center, Tensor scale,
                   Tensor shift, Tensor var) {
  const Launcher launch(y);
  dispatch(y.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const Map<const T> in = map<const T>(y, "y");
    const Rows r = rows_of(in.N, in.C, groups);
    const int64_t count = r.count * in.C;
    const Vectors<A> vectors{rows<const A>(bias, in.C, "bias"), rows<const A>(gamma, in.C, "gamma"),
                             rows<const A>(beta, in.C, "beta"), rows<A>(center, count, "center"),
                             rows<A>(scale, count, "scale"),    rows<A>(shift, count, "shift"),
                             rows<A>(var, count, "var")};
    dispatch_vectors<T>(
        [&](auto v) {
          constexpr int V = v;
          Tiling t{};
          if (y.numel()) t = tiling(in.N, in.H, in.W, in.C, V);
          const Tensor moments = workspace<A>(y, in.N * t.tiles * 2 * in.C);
          const Tensor counts = workspace<A>(y, in.N * t.tiles);
          A* const of_tiles = data<A>(moments, "moments");
          A* const pixels = data<A>(counts, "counts");
          launch(&tile_moments_kernel<T, V>, grid(t.blocks(in.N)), in, t, of_tiles, pixels);
          launch(&finish_statistics_kernel<A>, grid(r.groups.blocks() * r.count), of_tiles, pixels,
                 r.count ? in.N * t.tiles / r.count : 0, r.groups, A(eps), vectors);
        },
        in);
  });
}

void normalization_bwd(Tensor out, Tensor dgamma, Tensor dbeta, const MaybeTensor dy,
                       const MaybeTensor dscale, const MaybeTensor dshift, const Tensor y,
                       const Tensor center, const Tensor scale, const Tensor var, int64_t groups,
                       double eps) {
  const Launcher launch(y);
  dispatch(y.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const Map<T> to = map<T>(out, "out");
    Map<const T> from{};
    if (dy) from = map<const T>(*dy, "dy");
    require(out.numel() == y.numel() && (!dy || dy->numel() == y.numel()),
            "out and dy must have the shape of y, ", shape(y));
    const int64_t C = to.C;
    const Rows r = rows_of(to.N, C, groups);
    const int64_t count = r.count * C;
    const Tensor slope = workspace<A>(y, count), offset = workspace<A>(y, count);
    const BackwardVectors<A> vectors{rows<const A>(dscale, count, "dscale"),
                                     rows<const A>(dshift, count, "dshift"),
                                     rows<const A>(scale, count, "scale"),
                                     rows<const A>(var, count, "var"),
                                     data<A>(slope, "slope"),
                                     data<A>(offset, "offset"),
                                     rows<A>(dgamma, C, "dgamma"),
                                     rows<A>(dbeta, C, "dbeta")};
    const int64_t values = to.H * to.W * (groups ? r.groups.width : to.N);
    launch(&normalization_bwd_terms_kernel<A>,
           grid(ceil_div(r.count * r.groups.count + C, kThreads)), vectors, r.groups, r.count,
           A(std::max<int64_t>(1, values)), A(eps));
    if (y.numel() == 0) return;
    const Source<T> terms{map<const T>(y, "y"), rows<const A>(center, count, "center"),
                          vectors.slope,        vectors.offset,
                          groups ? C : 0,       A(1)};
    dispatch_vectors<T>(
        [&](auto v) {
          constexpr int V = v;
          const Tiling t = tiling(to.N, to.H, to.W, C, V);
          launch(&normalization_bwd_apply_kernel<T, V>, grid(t.blocks(to.N)), terms, from, to, t);
        },
        terms, from, to);
  });
}

}  // namespace

FASTUNET_CUDA_KERNEL(normalization,
                     "normalization(Tensor y, Tensor? bias, Tensor? gamma, Tensor? beta, "
                     "int groups, float eps, Tensor(a!) center, Tensor(b!) scale, "
                     "Tensor(c!) shift, Tensor(d!) var) -> ()")
FASTUNET_CUDA_KERNEL(
    normalization_bwd,
    "normalization_bwd(Tensor(a!) out, Tensor(b!) dgamma, Tensor(c!) dbeta, Tensor? dy, "
    "Tensor? dscale, Tensor? dshift, Tensor y, Tensor center, Tensor scale, "
    "Tensor var, int groups, float eps) -> ()")

}  // namespace fastunet::cuda
