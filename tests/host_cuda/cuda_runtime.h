// CUDA on the host, for tests: as much of the runtime as the kernels of this project use.
//
// Blocks run one after the other. The threads of a block take turns, each until it reaches a
// barrier or ends, on stacks of their own. Checked, each as an exception that names the thread:
// - shared memory: bounds, reads of what the block has not set, and races: accesses of two threads
//   to one element, one of them a write, without a barrier between them
// - global memory: accesses outside of the call's tensors, and vectors at unaligned addresses
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using std::sqrt;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_cuda {

[[noreturn]] inline void fail(const std::string& what) {
  std::ostringstream out;
  out << what << " (thread " << threadIdx.x << " of block " << blockIdx.x << ")";
  throw std::runtime_error(out.str());
}

// The memory of the call in progress.
struct Range {
  uintptr_t begin, end;
};
inline std::vector<Range> memory;

inline void note(const void* begin, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  memory.push_back({first, first + bytes});
}

inline void check(const void* p, size_t bytes, size_t alignment) {
  const auto first = reinterpret_cast<uintptr_t>(p);
  if (first % alignment) fail("an access to global memory is not aligned");
  for (const Range& range : memory)
    if (first >= range.begin && first + bytes <= range.end) return;
  fail("an access to global memory is outside of every tensor");
}

// Runs the threads of a block.
class Scheduler {
 public:
  // Blocks and barriers so far: what lies between two barriers of a block has one epoch.
  uint64_t epoch = 0, first_epoch = 0;

  template <class F>
  void run(unsigned threads, F&& body) {
    first_epoch = ++epoch;
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    body_ = [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); };
    argument_ = &body;
    for (unsigned i = 0; i < threads; ++i) fibers_[i]->done = false;
    for (bool waiting = true; waiting; ++epoch) {
      waiting = false;
      for (unsigned i = 0; i < threads; ++i) {
        if (fibers_[i]->done) continue;
        resume(i);
        waiting |= !fibers_[i]->done;
      }
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  // Until every other thread waits or has ended.
  void barrier() {
    Fiber& fiber = *fibers_[threadIdx.x];
    if (!_setjmp(fiber.place)) _longjmp(scheduler_, 1);
  }

 private:
  struct Fiber {
    std::vector<char> stack = std::vector<char>(128 << 10);
    ucontext_t context;
    jmp_buf place;
    bool started = false, done = true;
  };

  void resume(unsigned i) {
    Fiber& fiber = *fibers_[i];
    threadIdx.x = i;
    if (_setjmp(scheduler_)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Scheduler::enter, 0);
    setcontext(&fiber.context);
  }

  static void enter();

  void loop() {
    for (;;) {  // a fiber serves every later block
      try {
        body_(argument_);
      } catch (...) {
        if (!error_) error_ = std::current_exception();
      }
      Fiber& fiber = *fibers_[threadIdx.x];
      fiber.done = true;
      if (!_setjmp(fiber.place)) _longjmp(scheduler_, 1);
    }
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  jmp_buf scheduler_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::exception_ptr error_;
};

inline Scheduler scheduler;
inline std::mutex in_use;

inline void Scheduler::enter() { scheduler.loop(); }

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::scheduler.barrier(); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const std::lock_guard lock(host_cuda::in_use);
  const dim3 blocks = config->gridDim, threads = config->blockDim;
  if (threads.x > 1024 || threads.y * threads.z * blocks.y * blocks.z != 1)
    return cudaErrorInvalidConfiguration;
  gridDim = blocks;
  blockDim = threads;
  for (unsigned x = 0; x < blocks.x; ++x) {
    blockIdx = dim3(x);
    host_cuda::scheduler.run(threads.x, [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}

#define FASTUNET_BEGIN_CALL() host_cuda::memory.clear()
#define FASTUNET_NOTE_MEMORY(begin, bytes) host_cuda::note(begin, bytes)

namespace fastunet::cuda {

template <class T, int N>
class Shared {
 public:
  void set(int i, T value) {
    Element& e = at(i);
    if (conflicts(e.written, e.writer) || conflicts(e.read, e.reader))
      host_cuda::fail("a race in shared memory: a write");
    e.value = value;
    e.written = host_cuda::scheduler.epoch;
    e.writer = threadIdx.x;
  }

  T get(int i) {
    Element& e = at(i);
    if (e.written < host_cuda::scheduler.first_epoch)
      host_cuda::fail("a read of shared memory that the block has not set");
    if (conflicts(e.written, e.writer)) host_cuda::fail("a race in shared memory: a read");
    const bool several = e.read == host_cuda::scheduler.epoch && e.reader != threadIdx.x;
    e.read = host_cuda::scheduler.epoch;
    e.reader = several ? kSeveral : threadIdx.x;
    return e.value;
  }

 private:
  static constexpr unsigned kSeveral = ~0u;
  struct Element {
    T value;
    uint64_t written = 0, read = 0;  // epochs
    unsigned writer, reader;
  };

  Element& at(int i) {
    if (i < 0 || i >= N) host_cuda::fail("an access beyond the bounds of shared memory");
    return elements_[i];
  }

  static bool conflicts(uint64_t epoch, unsigned thread) {
    return epoch == host_cuda::scheduler.epoch && thread != threadIdx.x;
  }

  std::vector<Element> elements_ = std::vector<Element>(N);
};

template <class P>
P load_global(const P* p) {
  host_cuda::check(p, sizeof(P), alignof(P));
  return *p;
}

template <class P>
void store_global(P* p, const P& value) {
  host_cuda::check(p, sizeof(P), alignof(P));
  *p = value;
}

}  // namespace fastunet::cuda
