// Tasks over PyTorch's threads, taken in turn: where one of them is held up, by the system or by
// more work than others have, the others go on. What a task computes must not depend on who does
// it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "common/map.h"

namespace fastunet {

// f(begin, end) for ranges, of `least` tasks or more, that make up [0, count).
template <class F>
void parallel_tasks(int64_t count, F f, int64_t least = 1) {
  if (count <= 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  constexpr int64_t kTurns = 8;
  const int64_t turn = std::max(ceil_div(count, threads * kTurns), least);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, ceil_div(count, turn)), 1,
                              [&](int64_t, int64_t) {
                                for (int64_t i; (i = next.fetch_add(turn)) < count;)
                                  f(i, std::min(i + turn, count));
                              });
}

}  // namespace fastunet
