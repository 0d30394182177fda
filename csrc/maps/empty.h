// Tensors to be written: large ones in memory for maps, others as PyTorch allocates.
#pragma once

#include "common/tensors.h"

namespace fastunet {

using torch::headeronly::IntHeaderOnlyArrayRef;

// Bytes from which memory for maps serves, as in src/fastunet/maps.py.
inline constexpr size_t kLeastKept = 64 << 10;

// bytes: of all elements, between which there are no gaps.
Tensor empty_kept(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype,
                  size_t bytes);

}  // namespace fastunet
