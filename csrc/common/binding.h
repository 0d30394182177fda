// What the bindings of CPU kernels share: dispatch over dtypes, and identities.
#pragma once

#include <vector>

#include "common/huge_pages.h"
#include "common/source.h"
#include "common/tensors.h"
#include "program/program.h"

namespace fastunet {

template <>
inline constexpr ScalarType dtype_of<bf16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType dtype_of<f16> = ScalarType::Half;

// A map that is about to be written, and may have been allocated just now.
template <class T>
Map<T> output_map(const Tensor& t, const char* name) {
  const Map<T> m = map<T>(t, name);
  prefer_huge_pages(m.data, m.N * m.sn * sizeof(T));
  return m;
}

// The same, without gaps between pixels.
template <class T>
Map<T> dense_output_map(const Tensor& t, const char* name) {
  const Map<T> m = dense_map<T>(t, name);
  prefer_huge_pages(m.data, t.numel() * sizeof(T));
  return m;
}

// An identity affine, for plain maps of up to C channels.
template <class A>
struct Identity {
  std::vector<A> zeros, ones;
  explicit Identity(int64_t C) : zeros(C, A(0)), ones(C, A(1)) {}

  template <class T>
  Source<T> of(const Map<const T>& y) const {
    return {y, zeros.data(), ones.data(), zeros.data(), 0, 1};
  }
  template <class T>
  Source<T> fill(const Source<T>& s) const {
    return s.scale ? s : of<T>(s.y);
  }
};

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

// Registers `name` as the CPU implementation of the schema, in this build's own library, and for
// programs.
#define FASTUNET_KERNEL(name, schema)                                                      \
  STABLE_TORCH_LIBRARY_FRAGMENT(FASTUNET_LIBRARY, m) { m.def(schema); }                    \
  STABLE_TORCH_LIBRARY_IMPL(FASTUNET_LIBRARY, CPU, m) { m.impl(#name, TORCH_BOX(&name)); } \
  static const ProgramKernel program_kernel_##name(#name, TORCH_BOX(&name));

}  // namespace fastunet
