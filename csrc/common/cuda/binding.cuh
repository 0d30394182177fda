// What the bindings of CUDA kernels share: dispatch, launches and registration.
#pragma once

#include "common/cuda/tiling.cuh"
#include "common/tensors.h"

#include <torch/csrc/stable/accelerator.h>

// The current stream. Weak, as builds of PyTorch without CUDA do not have it: there the library
// can be loaded, and its operators registered.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastunet {

template <>
inline constexpr ScalarType dtype_of<cuda::bf16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType dtype_of<cuda::f16> = ScalarType::Half;

namespace cuda {

// A kernel's launches during one call of an operator.
class Launcher {
 public:
  explicit Launcher(const Tensor& on) {
    FASTUNET_BEGIN_CALL();
    if (!on.is_cuda()) return;
    device_.emplace(on.get_device_index());
    require(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 blocks, Arguments... arguments) const {
    if (blocks.x == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = dim3(kThreads);
    config.stream = stream_;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess) cudaGetLastError();  // or PyTorch's next kernel would report it
    require(error == cudaSuccess, "a kernel could not be launched: ", cudaGetErrorString(error));
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> device_;
  cudaStream_t stream_ = nullptr;
};

inline dim3 grid(int64_t blocks) {
  require(blocks < (int64_t{1} << 31), "the map is too large for one launch: ", blocks, " blocks");
  return dim3(static_cast<unsigned>(blocks));
}

// Memory for values that live between two kernels of a call.
template <class A>
Tensor workspace(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, dtype_of<A>);
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether every vector of V channels of a map is 16 bytes at a multiple of 16.
template <int V, class T>
bool vectors_fit(const Map<T>& m) {
  if (!m.data) return true;
  const auto fits = [](int64_t size, int64_t stride) { return size <= 1 || stride % V == 0; };
  return aligned(m.data) && m.C % V == 0 && fits(m.N, m.sn) && fits(m.H, m.sh) && fits(m.W, m.sw);
}

template <int V, class T>
bool vectors_fit(const Source<T>& s) {
  return vectors_fit<V>(s.y) && aligned(s.center) && aligned(s.scale) && aligned(s.shift);
}

// Calls f(integral_constant<int, V>) with the channels that a thread handles.
template <class T, class F, class... Maps>
void dispatch_vectors(F f, const Maps&... maps) {
  constexpr int V = 16 / sizeof(T);
  if ((vectors_fit<V>(maps) && ...)) return f(std::integral_constant<int, V>{});
  return f(std::integral_constant<int, 1>{});
}

// Calls f(T*) with the storage type of `dtype`.
template <class F>
void dispatch(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<bf16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<f16*>(nullptr));
    default:
      require(false, "the dtype must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace cuda
}  // namespace fastunet

#ifdef FASTUNET_HOST_CUDA
#define FASTUNET_CUDA_KEY CPU
#else
#define FASTUNET_CUDA_KEY CUDA
#endif

// By which self_check knows these kernels again, whatever compiled them.
#define FASTUNET_STRING_(x) #x
#define FASTUNET_STRING(x) FASTUNET_STRING_(x)
#define FASTUNET_NAME_SOURCES()                        \
  __attribute__((used)) static const char kSources[] = \
      "fastunet sources " FASTUNET_STRING(FASTUNET_SOURCES);

// Registers `f` as the implementation of the schema, in the library of the CUDA kernels.
#define FASTUNET_CUDA_KERNEL(name, schema)                              \
  STABLE_TORCH_LIBRARY_FRAGMENT(FASTUNET_LIBRARY, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(FASTUNET_LIBRARY, FASTUNET_CUDA_KEY, m) {   \
    m.impl(#name, TORCH_BOX(&name));                                    \
  }
