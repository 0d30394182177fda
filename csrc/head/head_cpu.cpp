#include "head/head_cpu.h"

#include "common/binding.h"
#include "common/parallel.h"
#include "head/many_classes.h"

namespace fastunet {
namespace {

// Calls f with the number of classes, rounded up to a power of two and at most kClasses, as a
// compile-time number; in float64, for which speed is nothing, one at a time.
template <class A, class F>
void dispatch_classes(int64_t classes, F f) {
  require(classes >= 1, "the head must have at least one class, got ", classes);
  if constexpr (std::is_same_v<A, float>) {
    if (classes > 2) return f(std::integral_constant<int, kClasses>{});
    if (classes == 2) return f(std::integral_constant<int, 2>{});
  }
  f(std::integral_constant<int, 1>{});
}

template <class T>
Logits<T> logits_view(const Tensor& t, const Map<const std::remove_const_t<T>>& y, int64_t K) {
  require(
      t.dim() == 4 && t.size(0) == y.N && t.size(1) == K && t.size(2) == y.H && t.size(3) == y.W,
      "logits must be [", y.N, ", ", K, ", ", y.H, ", ", y.W, "], got ", shape(t));
  return {data<T>(t, "logits"), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

void head(Tensor out, const Tensor y, const MaybeTensor center, const MaybeTensor scale,
          const MaybeTensor shift, double slope, const Tensor weight, const MaybeTensor bias) {
  dispatch(y.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const Identity<acc_t<T>> identity(y.size(1));
    const Source<T> s = identity.fill(source<T>(y, center, scale, shift, slope));
    const int64_t K = weight.size(0);
    const A* w = rows<const A>(weight, K * s.y.C, "weight");
    const A* b = rows<const A>(bias, K, "bias");
    const Logits<T> to = logits_view<T>(out, s.y, K);
    if constexpr (std::is_same_v<A, float>)
      if (K > kClasses && s.y.C) return ManyClasses<T>(s, w, K).forward(b, to);
    dispatch_classes<A>(K, [&](auto most) {
      parallel_tasks(s.y.N * s.y.H, [&](int64_t row) {
        head_row<most>(s, w, b, K, to, row / s.y.H, row % s.y.H);
      });
    });
  });
}

void head_bwd(MaybeTensor dy, MaybeTensor dscale, MaybeTensor dshift, Tensor dweight, Tensor dbias,
              const Tensor dlogits, const Tensor y, const MaybeTensor center,
              const MaybeTensor scale, const MaybeTensor shift, double slope, const Tensor weight) {
  dispatch(y.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const Identity<acc_t<T>> identity(y.size(1));
    const Source<T> s = identity.fill(source<T>(y, center, scale, shift, slope));
    const int64_t C = s.y.C, K = weight.size(0), rows_out = scale ? scale->size(0) : 0;
    const A* w = rows<const A>(weight, K * C, "weight");
    const Logits<const T> from = logits_view<const T>(dlogits, s.y, K);
    Map<T> to{};
    if (dy) {
      to = output_map<T>(*dy, "dy");
      require(to.N == s.y.N && to.C == C && to.H == s.y.H && to.W == s.y.W,
              "dy must have the shape of y, got ", shape(*dy), " for ", shape(y));
    }
    A* dscale_out = rows<A>(dscale, rows_out * C, "dscale");
    A* dshift_out = rows<A>(dshift, rows_out * C, "dshift");
    A* dweight_out = rows<A>(dweight, K * C, "dweight");
    A* dbias_out = rows<A>(dbias, K, "dbias");
    const Chunks chunks(s.y.N, s.y.H, s.y.W, 1024);
    // Of each chunk [stride]: rows of dscale, dshift and dweight, then dbias.
    std::vector<A> partials;
    const auto write = [&](int64_t stride, int64_t row, int64_t dbias) {
      const auto sum = [&](int64_t at, int64_t count, int64_t rows, A* to) {
        if (to) sum_chunks(partials.data() + at, chunks.count(), stride, count, rows, to);
      };
      sum(0, C, rows_out, dscale_out);
      sum(row, C, rows_out, dshift_out);
      for (int64_t k = 0; k < K; ++k) sum((2 + k) * row, C, 1, dweight_out + k * C);
      sum(dbias, K, 1, dbias_out);
    };
    if constexpr (std::is_same_v<A, float>)
      if (K > kClasses && C) {
        const ManyClasses<T> many(s, w, K);
        partials.resize(chunks.count() * many.sums());
        many.backward(from, to, chunks, partials.data());
        return write(many.sums(), many.row(), many.dbias());
      }
    const int64_t dbias_at = (2 + K) * C, stride = dbias_at + K;
    partials.resize(chunks.count() * stride);
    dispatch_classes<A>(K, [&](auto most) {
      parallel_tasks(chunks.count(), [&](int64_t k) {
        for (int64_t h = chunks.begin(k); h < chunks.end(k); ++h)
          head_bwd_row<most>(s, w, K, from, to, chunks.sample(k), h, partials.data() + k * stride);
      });
    });
    write(stride, C, dbias_at);
  });
}

}  // namespace

FASTUNET_KERNEL(head,
                "head(Tensor(a!) out, Tensor y, Tensor? center, Tensor? scale, Tensor? shift, "
                "float slope, Tensor weight, Tensor? bias) -> ()")
FASTUNET_KERNEL(head_bwd,
                "head_bwd(Tensor(a!)? dy, Tensor(b!)? dscale, Tensor(c!)? dshift, "
                "Tensor(d!) dweight, Tensor(e!) dbias, Tensor dlogits, Tensor y, Tensor? center, "
                "Tensor? scale, Tensor? shift, float slope, Tensor weight) -> ()")

}  // namespace fastunet
