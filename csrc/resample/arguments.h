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

// Where the gradient of the H x W map that a source stands for is formed: in dy, the source's own,
// if it is read pixel for pixel; else in the scratch map dz, from which dy is gathered.
template <class T>
Map<T> map_grad(const Pending<T>& source, const Map<T>& dy, const MaybeTensor& dz, int64_t H,
                int64_t W) {
  const bool in_place = source.mode == Mode::none && dy.H == H && dy.W == W;
  require(dz.has_value() != in_place, "dz must be given where a source is resampled or placed, ",
          "and there alone");
  if (in_place) return dy;
  const Map<T> map = dense_output_map<T>(*dz, "dz");
  require(map.N == dy.N && map.C == dy.C && map.H == H && map.W == W, "dz must be [", dy.N, ", ",
          dy.C, ", ", H, ", ", W, "], got ", shape(*dz));
  return map;
}

}  // namespace fastunet
