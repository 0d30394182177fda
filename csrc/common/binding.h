// What the bindings share: checked views of tensors, and dispatch over dtypes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "common/huge_pages.h"
#include "common/source.h"

namespace fastunet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string shape(const Tensor& t) {
  std::string out = "[";
  for (int64_t d = 0; d < t.dim(); ++d) out += (d ? ", " : "") + std::to_string(t.size(d));
  return out + "]";
}

template <class T>
inline constexpr ScalarType dtype_of = ScalarType::Undefined;
template <>
inline constexpr ScalarType dtype_of<float> = ScalarType::Float;
template <>
inline constexpr ScalarType dtype_of<double> = ScalarType::Double;
template <>
inline constexpr ScalarType dtype_of<bf16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType dtype_of<f16> = ScalarType::Half;

template <class T>
T* data(const Tensor& t, const char* name) {
  require(t.scalar_type() == dtype_of<std::remove_const_t<T>>, name,
          " has another dtype than this kernel expects");
  return static_cast<T*>(t.data_ptr());
}

// A map whose channels are adjacent in memory.
template <class T>
Map<T> map(const Tensor& t, const char* name) {
  require(t.dim() == 4, name, " must be [N, C, H, W], got ", shape(t));
  require(t.numel() == 0 || t.size(1) == 1 || t.stride(1) == 1, name,
          " must be channels_last (channel stride 1), got channel stride ", t.stride(1));
  return {data<T>(t, name), t.size(0),   t.size(1),   t.size(2),
          t.size(3),        t.stride(0), t.stride(2), t.stride(3)};
}

// The same, without gaps between pixels.
template <class T>
Map<T> dense_map(const Tensor& t, const char* name) {
  const Map<T> m = map<T>(t, name);
  require(t.numel() == 0 || ((m.W == 1 || m.sw == m.C) && (m.H == 1 || m.sh == m.W * m.C) &&
                             (m.N == 1 || m.sn == m.H * m.W * m.C)),
          name, " must be channels_last without gaps");
  return dense(m.data, m.N, m.C, m.H, m.W);
}

// A map that is about to be written, and may have been allocated just now.
template <class T>
Map<T> output_map(const Tensor& t, const char* name) {
  const Map<T> m = map<T>(t, name);
  prefer_huge_pages(m.data, m.N * m.sn * sizeof(T));
  return m;
}

// Contiguous values per row and channel, [rows, C] (or [C]); null where there is none.
template <class A>
A* rows(const MaybeTensor& t, int64_t count, const char* name) {
  if (!t) return nullptr;
  require(t->numel() == count, name, " must have ", count, " elements, got ", shape(*t));
  require(count == 0 || t->is_contiguous(), name, " must be contiguous");
  return data<A>(*t, name);
}

template <class T>
Source<T> source(const Tensor& y, const Tensor& center, const Tensor& scale, const Tensor& shift,
                 double slope) {
  using A = acc_t<T>;
  const Map<const T> m = map<const T>(y, "y");
  const int64_t n = center.size(0);
  require(n == 1 || n == m.N, "center must have one row or one per sample, got ", shape(center));
  return {m,
          rows<const A>(center, n * m.C, "center"),
          rows<const A>(scale, n * m.C, "scale"),
          rows<const A>(shift, n * m.C, "shift"),
          n == 1 ? 0 : m.C,
          static_cast<A>(slope)};
}

// Calls f(T{}) with the storage type of `dtype`.
template <class F>
void dispatch(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(f16{});
    default:
      require(false, "the dtype must be float32, float64, bfloat16 or float16");
  }
}

// The same for kernels that compute in fp32.
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

// Registers `f` as the CPU implementation of the schema, in this build's own library.
#define FASTUNET_KERNEL(name, schema)                                   \
  STABLE_TORCH_LIBRARY_FRAGMENT(FASTUNET_LIBRARY, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(FASTUNET_LIBRARY, CPU, m) { m.impl(#name, TORCH_BOX(&name)); }

}  // namespace fastunet
