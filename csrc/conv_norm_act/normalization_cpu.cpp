#include "conv_norm_act/normalization_cpu.h"

#include "common/binding.h"
#include "common/parallel.h"

namespace fastunet {
namespace {

void normalization(const Tensor y, const MaybeTensor bias, const MaybeTensor gamma,
                   const MaybeTensor beta, int64_t groups, double eps, Tensor center, Tensor scale,
                   Tensor shift, Tensor var) {
  dispatch(y.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const Map<const T> in = dense_map<const T>(y, "y");
    const int64_t pixels = in.H * in.W, C = in.C;
    const Grouping g = grouping(in.N, C, pixels, groups);
    const Normalization<A> out{
        rows<A>(center, g.rows() * C, "center"), rows<A>(scale, g.rows() * C, "scale"),
        rows<A>(shift, g.rows() * C, "shift"), rows<A>(var, g.rows() * C, "var")};
    // A chunk is read twice, so it should fit in L2 with room to spare.
    const int64_t chunk = std::max<int64_t>(64, 131072 / (C * static_cast<int64_t>(sizeof(T))));
    const Chunks chunks(in.N, pixels, 1, chunk);
    ChunkMoments<T> moments;
    moments.resize(chunks.count(), C);
    parallel_tasks(chunks.count(), [&](int64_t k) {
      A* mean = moments.values.data() + k * 2 * C;
      moments.counts[k] = chunks.end(k) - chunks.begin(k);
      chunk_moments(in.at(chunks.sample(k), 0) + chunks.begin(k) * C, moments.counts[k], C, mean,
                    mean + C);
    });
    finalize(moments, g, rows<const A>(bias, C, "bias"), rows<const A>(gamma, C, "gamma"),
             rows<const A>(beta, C, "beta"), eps, out);
  });
}

void normalization_bwd(Tensor out, Tensor dgamma, Tensor dbeta, const MaybeTensor dy,
                       const MaybeTensor dscale, const MaybeTensor dshift, const Tensor y,
                       const Tensor center, const Tensor scale, const Tensor var, int64_t groups,
                       double eps) {
  dispatch(y.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const Map<const T> in = dense_map<const T>(y, "y");
    const Map<T> to = dense_map<T>(out, "out");
    prefer_huge_pages(to.data, out.numel() * sizeof(T));
    const T* from = dy ? dense_map<const T>(*dy, "dy").data : nullptr;
    const int64_t pixels = in.H * in.W, C = in.C;
    const Grouping g = grouping(in.N, C, pixels, groups);
    require(out.numel() == y.numel() && (!dy || dy->numel() == y.numel()),
            "out and dy must have the shape of y, ", shape(y));
    const int64_t count = g.rows() * C;
    const A* m = rows<const A>(center, count, "center");
    const A* v = rows<const A>(var, count, "var");
    const A* ds = rows<const A>(dscale, count, "dscale");
    const A* db = rows<const A>(dshift, count, "dshift");
    affine_bwd(g, v, ds, db, eps, rows<A>(dgamma, C, "dgamma"), rows<A>(dbeta, C, "dbeta"));
    if (y.numel() == 0) return;
    const NormalizationBwd<A> terms(g, rows<const A>(scale, count, "scale"), v, ds, db, eps);
    const Chunks chunks(in.N, pixels, 1, 1024);
    parallel_tasks(chunks.count(), [&](int64_t k) {
      const int64_t n = chunks.sample(k), row = groups ? n * C : 0;
      const int64_t offset = n * in.sn + chunks.begin(k) * C;
      normalize_bwd_pixels(from ? from + offset : nullptr, in.data + offset, m + row,
                           terms.slope.data() + row, terms.offset.data() + row,
                           chunks.end(k) - chunks.begin(k), C, to.data + offset);
    });
  });
}

// What BatchNorm keeps for evaluation, moved by a step towards a batch's statistics.
void running_statistics(Tensor mean, Tensor var, const MaybeTensor batches, const Tensor of_mean,
                        const Tensor of_var, double unbiased, double momentum) {
  const int64_t C = mean.numel();
  const auto move = [&](Tensor& to, const Tensor& from, float factor, const char* name) {
    float* value = rows<float>(to, C, name);
    const float* target = rows<const float>(from, C, name);
    const float step = static_cast<float>(momentum);
    for (int64_t c = 0; c < C; ++c) {
      const float goal = target[c] * factor, way = goal - value[c];
      value[c] = step < 0.5f ? value[c] + step * way : goal - way * (1 - step);  // as torch.lerp
    }
  };
  move(mean, of_mean, 1, "mean");
  move(var, of_var, static_cast<float>(unbiased), "var");
  if (!batches) return;
  require(batches->numel() == 1 && batches->scalar_type() == ScalarType::Long,
          "batches must be one int64");
  ++*static_cast<int64_t*>(batches->data_ptr());
}

}  // namespace

FASTUNET_KERNEL(running_statistics,
                "running_statistics(Tensor(a!) mean, Tensor(b!) var, Tensor(c!)? batches, "
                "Tensor of_mean, Tensor of_var, float unbiased, float momentum) -> ()")
FASTUNET_KERNEL(normalization,
                "normalization(Tensor y, Tensor? bias, Tensor? gamma, Tensor? beta, int groups, "
                "float eps, Tensor(a!) center, Tensor(b!) scale, Tensor(c!) shift, "
                "Tensor(d!) var) -> ()")
FASTUNET_KERNEL(
    normalization_bwd,
    "normalization_bwd(Tensor(a!) out, Tensor(b!) dgamma, Tensor(c!) dbeta, Tensor? dy, "
    "Tensor? dscale, Tensor? dshift, Tensor y, Tensor center, Tensor scale, "
    "Tensor var, int groups, float eps) -> ()")

}  // namespace fastunet
