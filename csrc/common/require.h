// What a kernel demands of its arguments.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastunet {

template <class... Args>
void require(bool holds, const Args&... message) {
  if (holds) return;
  std::ostringstream out;
  ((out << message), ...);
  throw std::runtime_error(out.str());
}

}  // namespace fastunet
