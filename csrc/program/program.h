// Kernels by number: what a program, a row of kernel calls without Python between them, calls.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>
#include <vector>

namespace fastunet {

// As PyTorch's dispatcher calls it: with the arguments, which it takes over. Kernels return
// nothing.
using BoxedKernel = void (*)(StableIValue* arguments, uint64_t count, uint64_t results);

// By name, in the order in which the sources' static objects are made.
inline std::vector<std::pair<std::string, BoxedKernel>>& program_kernels() {
  static std::vector<std::pair<std::string, BoxedKernel>> kernels;
  return kernels;
}

struct ProgramKernel {
  ProgramKernel(const char* name, BoxedKernel kernel) {
    program_kernels().emplace_back(name, kernel);
  }
};

}  // namespace fastunet
