// Kernels with one fault each, and one without: faults NAME runs one of them.
#include <cstdio>
#include <map>
#include <string>

#include "common/cuda/tiling.cuh"

using namespace fastunet::cuda;

namespace {

constexpr int kBlock = 64;
alignas(16) float values[kBlock];

// Reverses the values by way of shared memory.
__global__ void correct(float* v) {
  __shared__ Shared<float, kBlock> shared;
  shared.set(threadIdx.x, load_global(v + threadIdx.x));
  __syncthreads();
  store_global(v + threadIdx.x, shared.get(kBlock - 1 - threadIdx.x));
}

__global__ void missing_barrier(float* v) {
  __shared__ Shared<float, kBlock> shared;
  shared.set(threadIdx.x, load_global(v + threadIdx.x));
  store_global(v + threadIdx.x, shared.get(kBlock - 1 - threadIdx.x));
}

// Overwrites what another thread may still have to read.
__global__ void missing_second_barrier(float* v) {
  __shared__ Shared<float, kBlock> shared;
  for (int i = 0; i < 2; ++i) {
    shared.set(threadIdx.x, load_global(v + threadIdx.x) + i);
    __syncthreads();
    store_global(v + threadIdx.x, shared.get(kBlock - 1 - threadIdx.x));
  }
}

__global__ void unset_shared_memory(float* v) {
  __shared__ Shared<float, kBlock> shared;
  if (threadIdx.x > 0) shared.set(threadIdx.x, 0);
  __syncthreads();
  store_global(v + threadIdx.x, shared.get(kBlock - 1 - threadIdx.x));
}

__global__ void beyond_shared_memory(float* v) {
  __shared__ Shared<float, kBlock> shared;
  shared.set(threadIdx.x + 1, load_global(v + threadIdx.x));
}

__global__ void beyond_the_tensor(float* v) { store_global(v + threadIdx.x + 1, 0.0f); }

__global__ void unaligned_vector(float* v) { load<4>(v + threadIdx.x % 3); }

__global__ void vector_too_long(float* v) { load<8>(v + 4 * (threadIdx.x % 16)); }

// The last of several blocks reads what only the first one has set.
__global__ void set_by_another_block(float* v) {
  __shared__ Shared<float, 1> shared;
  if (blockIdx.x == 0 && threadIdx.x == 0) shared.set(0, 1);
  __syncthreads();
  if (threadIdx.x == 0) store_global(v, shared.get(0));
}

const std::map<std::string, void (*)(float*)> kernels = {
    {"correct", &correct},
    {"missing_barrier", &missing_barrier},
    {"missing_second_barrier", &missing_second_barrier},
    {"unset_shared_memory", &unset_shared_memory},
    {"beyond_shared_memory", &beyond_shared_memory},
    {"beyond_the_tensor", &beyond_the_tensor},
    {"unaligned_vector", &unaligned_vector},
    {"vector_too_long", &vector_too_long},
    {"set_by_another_block", &set_by_another_block},
};

}  // namespace

int main(int, char** arguments) {
  for (int i = 0; i < kBlock; ++i) values[i] = static_cast<float>(i);
  FASTUNET_BEGIN_CALL();
  FASTUNET_NOTE_MEMORY(values, sizeof values);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(3);
  config.blockDim = dim3(kBlock);
  try {
    cudaLaunchKernelEx(&config, kernels.at(arguments[1]), values);
    std::printf("%g\n", values[0]);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
}
