// Checked views of the tensors that an operator gets.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "common/map.h"
#include "common/require.h"

#ifndef FASTUNET_BEGIN_CALL  // tests/host_cuda checks that kernels stay within these
#define FASTUNET_BEGIN_CALL()
#define FASTUNET_NOTE_MEMORY(begin, bytes)
#endif

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

// From a tensor's first element to behind its last, in elements.
inline int64_t extent(const Tensor& t) {
  if (t.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return last + 1;
}

template <class T>
T* data(const Tensor& t, const char* name) {
  require(t.scalar_type() == dtype_of<std::remove_const_t<T>>, name,
          " has another dtype than this kernel expects");
  FASTUNET_NOTE_MEMORY(t.data_ptr(), extent(t) * sizeof(T));
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

// Contiguous values per row and channel, [rows, C] (or [C]); null where there is none.
template <class A>
A* rows(const MaybeTensor& t, int64_t count, const char* name) {
  if (!t) return nullptr;
  require(t->numel() == count, name, " must have ", count, " elements, got ", shape(*t));
  require(count == 0 || t->is_contiguous(), name, " must be contiguous");
  return data<A>(*t, name);
}

// Vectors are absent, and their pointers null, for a plain map.
template <class T>
Source<T> source(const Tensor& y, const MaybeTensor& center, const MaybeTensor& scale,
                 const MaybeTensor& shift, double slope) {
  using A = acc_t<T>;
  const Map<const T> m = map<const T>(y, "y");
  if (!scale) return {m, nullptr, nullptr, nullptr, 0, 1};
  const int64_t n = scale->size(0);
  require(n == 1 || n == m.N, "scale must have one row or one per sample, got ", shape(*scale));
  return {m,
          rows<const A>(center, n * m.C, "center"),
          rows<const A>(scale, n * m.C, "scale"),
          rows<const A>(shift, n * m.C, "shift"),
          n == 1 ? 0 : m.C,
          static_cast<A>(slope)};
}

}  // namespace fastunet
