// Tasks in parallel, on PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>

namespace fastunet {

// f(task) for tasks [0, count), each once. A thread goes through a range of its own from the front,
// then through the others' from the back: cores are not equally fast where something else runs too.
template <class F>
void parallel_tasks(int64_t count, F f) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  if (threads <= 1) {
    for (int64_t task = 0; task < count; ++task) f(task);
    return;
  }
  struct alignas(64) Range {
    std::atomic<uint64_t> left;  // the first task and the one behind the last, 32 bits each
  };
  constexpr uint64_t kFirst = uint64_t{1} << 32;
  const std::unique_ptr<Range[]> ranges(new Range[threads]);
  for (int64_t t = 0; t < threads; ++t)
    ranges[t].left = count * t / threads * kFirst + count * (t + 1) / threads;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own)
      for (int64_t t = 0; t < threads; ++t) {
        std::atomic<uint64_t>& range = ranges[(own + t) % threads].left;
        uint64_t left = range.load();
        while (left / kFirst < left % kFirst) {
          const uint64_t rest = t == 0 ? left + kFirst : left - 1;
          const uint64_t task = t == 0 ? left / kFirst : rest % kFirst;
          if (range.compare_exchange_weak(left, rest)) f(task), left = rest;
        }
      }
  });
}

}  // namespace fastunet
