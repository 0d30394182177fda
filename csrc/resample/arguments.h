// Sources as operators carry them.
#pragma once

#include "common/binding.h"
#include "resample/input.h"

namespace fastunet {

// One source as an operator carries it; vectors are absent for a plain map.
struct SourceArguments {
  const MaybeTensor &y, &center, &scale, &shift;
  double slope;
  int64_t mode;
};

#define FASTUNET_SOURCES                                                                   \
  "Tensor? y0, Tensor? center0, Tensor? scale0, Tensor? shift0, float slope0, int mode0, " \
  "Tensor? y1, Tensor? center1, Tensor? scale1, Tensor? shift1, float slope1, int mode1"
#define FASTUNET_SOURCE_PARAMETERS                                                   \
  const MaybeTensor y0, const MaybeTensor center0, const MaybeTensor scale0,         \
      const MaybeTensor shift0, double slope0, int64_t mode0, const MaybeTensor y1,  \
      const MaybeTensor center1, const MaybeTensor scale1, const MaybeTensor shift1, \
      double slope1, int64_t mode1
#define FASTUNET_SOURCE_ARGUMENTS \
  {y0, center0, scale0, shift0, slope0, mode0}, { y1, center1, scale1, shift1, slope1, mode1 }

template <class T, class Size>
Input<T> input(const Map<Size>& size, const Identity<float>& identity,
               std::initializer_list<SourceArguments> arguments) {
  Input<T> in{{}, size.N, size.H, size.W, 0};
  for (const SourceArguments& a : arguments) {
    if (!a.y) continue;
    const Mode mode = checked_mode(a.mode);
    const Source<T> s = identity.fill(source<T>(*a.y, a.center, a.scale, a.shift, a.slope));
    require(s.y.N == size.N, "sources must have the samples of the output, ", size.N, ", got ",
            s.y.N);
    in.sources.emplace_back(s, mode, a.scale ? Load::affine : Load::plain);
    in.C += s.y.C;
  }
  return in;
}

}  // namespace fastunet
