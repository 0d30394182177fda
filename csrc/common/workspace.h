// Scratch memory that a thread keeps between calls: its size depends on channels and caches, not
// on images, and fresh memory would cost a page fault per page each time.
#pragma once

#include <cstdlib>
#include <new>

#include "common/huge_pages.h"

namespace fastunet {

class Workspace {
 public:
  ~Workspace() { std::free(data_); }

  // At least `floats`, aligned to a cache line; contents are lost when it grows.
  float* get(size_t floats) {
    if (floats > size_) {
      constexpr size_t kHuge = size_t{2} << 20;
      const size_t bytes = (floats * sizeof(float) + kHuge - 1) / kHuge * kHuge;
      std::free(data_);
      size_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(kHuge, bytes));
      if (!data_) throw std::bad_alloc();
      prefer_huge_pages(data_, bytes);
      size_ = bytes / sizeof(float);
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

// Scratch of one thread, and what the calling thread shares with the others.
inline Workspace& thread_workspace() {
  thread_local Workspace workspace;
  return workspace;
}
inline Workspace& shared_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

}  // namespace fastunet
