// From maps to Winograd's domain: which tiles belong together, and how sources are read with their
// pending work applied.
#pragma once

#include <array>
#include <cstring>
#include <utility>

#include "common/gemm.h"
#include "common/prefetch.h"
#include "conv_norm_act/winograd.h"
#include "resample/input.h"

namespace fastunet {

// The tiles of all samples in groups: rectangles of rows x columns tiles (fewer at the edges).
struct Tiling {
  int64_t N, H, W;
  int64_t tile;                       // its side in pixels
  int64_t rows, columns;              // tiles per group
  int64_t group_rows, group_columns;  // groups per sample

  // Groups of at most rows x columns tiles, equally large but for the last.
  Tiling(int64_t N, int64_t H, int64_t W, int64_t tile, int64_t rows, int64_t columns)
      : N(N), H(H), W(W), tile(tile) {
    const int64_t down = ceil_div(H, tile), across = ceil_div(W, tile);
    group_rows = ceil_div(down, rows), group_columns = ceil_div(across, columns);
    this->rows = ceil_div(down, group_rows), this->columns = ceil_div(across, group_columns);
  }

  // Groups of about `target` tiles, rows of tiles before columns.
  Tiling(int64_t N, int64_t H, int64_t W, int64_t tile, int64_t target)
      : Tiling(N, H, W, tile, 1, target) {
    *this = Tiling(N, H, W, tile, std::max<int64_t>(1, target / columns), target);
  }

  // The same for products that take kRows tiles at a time: 15 would make them read all weights
  // twice, with half of the work for each, where 11 do once. On the other hand narrow groups read
  // much of their neighbours (kHaloCost, in pixels).
  static Tiling for_products(int64_t N, int64_t H, int64_t W, int64_t tile, int64_t target) {
    constexpr int64_t kMostRows = 4, kMostSplits = 4;
    constexpr double kHaloCost = 8;
    Tiling best(N, H, W, tile, target);
    double least = 0;
    for (int64_t rows = 1; rows <= std::min(target, kMostRows); ++rows) {
      const int64_t fewest = ceil_div(ceil_div(W, tile), target / rows);
      for (int64_t across = fewest; across < fewest + kMostSplits; ++across) {
        const Tiling t(N, H, W, tile, rows, ceil_div(ceil_div(W, tile), across));
        const double tiles = static_cast<double>(t.max_tiles());
        const double cost = ceil_div(t.max_tiles(), kRows) * kRows / tiles +
                            kHaloCost / static_cast<double>(t.columns * tile);
        if (least == 0 || cost < least) least = cost, best = t;
      }
    }
    return best;
  }

  struct Group {
    int64_t n, h, w;        // the first pixel
    int64_t rows, columns;  // tiles
    int64_t height, width;  // pixels inside the map
    int64_t tiles() const { return rows * columns; }
  };

  int64_t per_sample() const { return group_rows * group_columns; }
  int64_t count() const { return N * per_sample(); }
  int64_t max_tiles() const { return rows * columns; }
  int64_t max_tiles_of_all() const { return count() * max_tiles(); }

  Group group(int64_t g) const {
    const int64_t in_sample = g % per_sample();
    Group out;
    out.n = g / per_sample();
    out.h = in_sample / group_columns * rows * tile;
    out.w = in_sample % group_columns * columns * tile;
    out.height = std::min(rows * tile, H - out.h);
    out.width = std::min(columns * tile, W - out.w);
    out.rows = ceil_div(out.height, tile);
    out.columns = ceil_div(out.width, tile);
    return out;
  }

  // Where the tiles of groups [first, last) begin, counted through; and their number.
  std::vector<int64_t> offsets(int64_t first, int64_t last) const {
    std::vector<int64_t> found{0};
    for (int64_t g = first; g < last; ++g) found.push_back(found.back() + group(g).tiles());
    return found;
  }
};

// Winograd-domain maps, [points][blocks][tiles][16]. Planes are a cache line further apart than
// they are large, so that the points of one tile do not fall into the same sets of L1, and 64 more
// where the points of one block would fall into the same sets of L2.
struct Panels {
  static constexpr int64_t kApart = 65;
  float* data;
  int64_t blocks, tiles;

  // Enough for any number of tiles up to `tiles`.
  static int64_t floats(int64_t points, int64_t blocks, int64_t tiles) {
    return points * (blocks * tiles + kApart) * kBlock;
  }
  int64_t plane() const {
    const int64_t lines = blocks * tiles;
    return (lines + (lines % 256 == 0 ? kApart : 1)) * kBlock;
  }
  int64_t block() const { return tiles * kBlock; }
  // The same, its first block being number b.
  Panels counted_from(int64_t b) const { return {data - b * block(), blocks, tiles}; }
  float* at(int64_t point, int64_t b, int64_t tile = 0) const {
    return data + point * plane() + b * block() + tile * kBlock;
  }
  Operand<float> part(int64_t point, int64_t b) const { return {at(point, b), block(), plane()}; }
};

// Scratch memory, handed out from the front.
struct Scratch {
  float* rest;
  float* take(int64_t floats) { return std::exchange(rest, rest + floats); }
  Panels panels(int64_t points, int64_t blocks, int64_t tiles) {
    return {take(Panels::floats(points, blocks, tiles)), blocks, tiles};
  }
};

// One row of tiles: the patch of pixels [h, h + kIn) x [w, w + columns) of one block of channels,
// transformed down its columns. z: [kOut][columns][16]; with `Grad`, also what is within the halo,
// by that, to grad_z, [kOut][columns - 2 * kHalo][16].
template <class Transform, Load kLoad, class Grad, class T>
void transform_columns(const Source<T>& s, const T* raw, int64_t n, int64_t h, int64_t w,
                       int64_t columns, int64_t H, int64_t W, float* z, float* grad_z) {
  constexpr int kIn = Transform::kIn, kOut = Transform::kOut, kHalo = Transform::kHalo;
  constexpr bool kGrad = !std::is_void_v<Grad>;
  const int64_t inner = columns - 2 * kHalo;
  const Placement place(Mode::none, s.y.H, s.y.W, H, W);
  const int64_t row = columns * kBlock;
  const T* rows[kIn];
  bool inside[kIn], all = true;
  for (int i = 0; i < kIn; ++i) {
    const int64_t to = h + i, from = to - place.top;
    inside[i] = to >= 0 && to < H && from >= 0 && from < s.y.H;
    rows[i] = inside[i] ? s.y.at(n, from) : nullptr;
    all &= inside[i];
  }
  const int64_t first = std::max({int64_t{0}, -w, place.left - w});
  const int64_t last = std::min({columns, W - w, place.left + s.y.W - w});
  if (first >= last) {
    if (kGrad) zero(grad_z, kOut * inner, kBlock, kBlock);
    return zero(z, kOut * columns, kBlock, kBlock);
  }
  for (int i = 0; i < kOut; ++i) {
    zero(z + i * row, first, kBlock, kBlock);
    zero(z + i * row + last * kBlock, columns - last, kBlock, kBlock);
    if constexpr (kGrad) {
      float* to = grad_z + i * inner * kBlock;
      zero(to, first - kHalo, kBlock, kBlock);
      zero(to + (last - kHalo) * kBlock, columns - kHalo - last, kBlock, kBlock);
    }
  }
  for (int64_t c = 0; c < s.y.C; c += kLanes) {
    const auto run = [&](auto lanes, auto check) {
      const Channels<float> channel(s, n, c, lanes);
      for (int64_t x = first; x < last; ++x) {
        const int64_t offset = (w + x - place.left) * s.y.sw + c;
        vfloat d[kIn], out[kOut];
#pragma GCC unroll 8
        for (int i = 0; i < kIn; ++i) {
          if (check && !inside[i]) {
            d[i] = vfloat{};
            continue;
          }
          d[i] = load(rows[i] + offset, lanes);
          if constexpr (kLoad == Load::affine) d[i] = channel(d[i]);
          if constexpr (kLoad == Load::normalization_bwd)
            d[i] += channel.preact(load(raw + (rows[i] - s.y.data) + offset, lanes));
        }
        Transform::apply(d, out);
#pragma GCC unroll 8
        for (int i = 0; i < kOut; ++i) store(z + i * row + x * kBlock + c, out[i]);
        if constexpr (kGrad) {
          const int64_t at = x - kHalo;
          if (at < 0 || at >= inner) continue;
          Grad::apply(d + kHalo, out);
#pragma GCC unroll 8
          for (int i = 0; i < kOut; ++i) store(grad_z + (i * inner + at) * kBlock + c, out[i]);
        }
      }
    };
    const int64_t left = s.y.C - c;
    if (left < kLanes)
      run(static_cast<int>(left), std::true_type{});
    else if (all)
      run(std::integral_constant<int, kLanes>{}, std::false_type{});
    else
      run(std::integral_constant<int, kLanes>{}, std::true_type{});
  }
}

// The same of a patch that is there already, [kIn][columns][16].
template <class Transform>
void transform_columns(const float* patch, int64_t columns, float* z) {
  constexpr int kIn = Transform::kIn, kOut = Transform::kOut;
  const int64_t row = columns * kBlock;
  for (int64_t x = 0; x < row; x += kLanes) {
    vfloat d[kIn], out[kOut];
#pragma GCC unroll 8
    for (int i = 0; i < kIn; ++i) d[i] = load(patch + i * row + x);
    Transform::apply(d, out);
#pragma GCC unroll 8
    for (int i = 0; i < kOut; ++i) store(z + i * row + x, out[i]);
  }
}

// Then one of the rows that this gave, z, [columns][16], tile by tile to a row of kOut points.
template <class Transform>
void transform_row(const float* z, int64_t tiles, float* v, int64_t plane) {
  constexpr int kIn = Transform::kIn, kOut = Transform::kOut, kTile = Transform::kTile;
  for (int64_t t = 0; t < tiles; ++t)
#pragma GCC unroll 2
    for (int c = 0; c < kBlock; c += kLanes) {
      vfloat d[kIn], out[kOut];
#pragma GCC unroll 8
      for (int j = 0; j < kIn; ++j) d[j] = load(z + (t * kTile + j) * kBlock + c);
      Transform::apply(d, out);
#pragma GCC unroll 8
      for (int j = 0; j < kOut; ++j) store(v + j * plane + t * kBlock + c, out[j]);
    }
}

// Transforms sources to panels, a group of tiles at a time. With `Grad`, a map that is read for
// both gradients (one source, as it is, or its normalisation's backward) can be transformed by that
// as well, where `grad_z` is given: as that one's read_columns does.
template <class Transform, class T, class Grad = void>
class Reader {
  static constexpr int kTile = Transform::kTile, kOut = Transform::kOut;

 public:
  explicit Reader(const Input<T>& input) : in_(input) {}

  static int64_t scratch_floats(const Tiling& tiling) {
    return kOut * row_floats(tiling.columns) + patch_floats(tiling);
  }

  // Block b of channels of a group, to tiles [tile, tile + group.tiles()) of v.
  void read(const Tiling::Group& g, int64_t b, const Panels& v, int64_t tile, float* scratch,
            float* grad_z = nullptr) const {
    const int64_t row = row_floats(g.columns);
    float* z = scratch;
    transform_block(
        g, b, scratch + kOut * row, grad_z, [&](int64_t) { return z; },
        [&](int64_t r) {
          for (int i = 0; i < kOut; ++i)
            transform_row<Transform>(z + i * row, g.columns,
                                     v.at(i * kOut, b, tile + r * g.columns), v.plane());
        });
  }

  // Blocks [begin, end) of it, each with one of `parts` equal shares of `lines`.
  void read(const Tiling::Group& g, int64_t begin, int64_t end, const Panels& v, int64_t tile,
            float* scratch, Prefetch& lines, int64_t parts) const {
    for (int64_t b = begin; b < end; ++b) {
      lines.ask(parts);
      read(g, b, v, tile, scratch);
    }
  }

  // The same in two steps, so that only a row of the points is there at a time. All channels of a
  // group down their columns, to z, [blocks][rows of tiles][kOut][columns][16]; `scratch`:
  // patch_floats.
  int64_t columns_floats(const Tiling& tiling) const {
    return blocks_of(in_.C) * tiling.rows * kOut * row_floats(tiling.columns);
  }
  static int64_t patch_floats(const Tiling& tiling) {
    return Transform::kIn * row_floats(tiling.columns);
  }
  void read_columns(const Tiling::Group& g, float* z, float* scratch,
                    float* grad_z = nullptr) const {
    const int64_t rows = kOut * row_floats(g.columns);
    for (int64_t b = 0; b < blocks_of(in_.C); ++b, z += g.rows * rows)
      transform_block(
          g, b, scratch, grad_z, [&](int64_t r) { return z + r * rows; }, [](int64_t) {});
  }
  // Then row i of the points, to v's kOut points.
  void read_row(const Tiling::Group& g, int i, const float* z, const Panels& v) const {
    const int64_t row = row_floats(g.columns);
    z += i * row;
    for (int64_t b = 0; b < blocks_of(in_.C); ++b)
      for (int64_t r = 0; r < g.rows; ++r, z += kOut * row)
        transform_row<Transform>(z, g.columns, v.at(0, b, r * g.columns), v.plane());
  }

  // Of the sources, for a tile in a row of tiles.
  int64_t bytes_of_tile() const {
    int64_t values = 0;
    for (const Pending<T>& p : in_.sources) {
      const auto [times, over] = stride_of(p.mode);
      values +=
          p.source.y.C * (p.raw ? 2 : 1) * Transform::kIn * kTile * times * times / (over * over);
    }
    return values * static_cast<int64_t>(sizeof(T));
  }

  // The pixels that read() needs of a group.
  void prefetch(const Tiling::Group& g, Prefetch& lines) const {
    const int64_t h0 = g.h - Transform::kHalo, h1 = g.h + g.rows * kTile + Transform::kHalo;
    const int64_t w0 = g.w - Transform::kHalo, w1 = g.w + g.columns * kTile + Transform::kHalo;
    for (const Pending<T>& p : in_.sources) {
      const Map<const T>& y = p.source.y;
      const Placement place(p.mode, y.H, y.W, in_.H, in_.W);
      const int64_t times = stride_of(p.mode).times, over = stride_of(p.mode).over;
      const auto from = [&](int64_t i, int64_t start) { return (i - start) * times / over; };
      const auto add = [&](const Map<const T>& m) {
        lines.add(m, g.n, from(h0, place.top), from(h1, place.top) + (over > 1),
                  from(w0, place.left), from(w1, place.left) + (over > 1));
      };
      add(y);
      if (!p.raw) continue;
      Map<const T> raw = y;
      raw.data = p.raw;
      add(raw);
    }
  }

  // The same of the group behind g, if there is one.
  void prefetch_next(const Tiling& tiling, int64_t g, Prefetch& lines) const {
    if (g + 1 < tiling.count()) prefetch(tiling.group(g + 1), lines);
  }

 private:
  // A row of tiles of one block of channels, resampled, [kIn][columns][16]. The last rows of one
  // row of tiles are the first ones of the next, where there is a halo: `made` of them.
  struct Patch {
    float* data;
    std::array<typename Resample<T>::Rows, 2> rows;  // of each source
    int made;
  };

  // Of a row of tiles, one block of channels.
  static int64_t row_floats(int64_t columns) {
    return (columns * kTile + 2 * Transform::kHalo) * kBlock;
  }

  // Block b of a group down its columns, row of tiles by row of tiles: of row r to z_of(r), then
  // done(r).
  template <class Z, class Done>
  void transform_block(const Tiling::Group& g, int64_t b, float* scratch, float* grad_z, Z z_of,
                       Done done) const {
    Patch patch{scratch, {}, 0};
    for (int64_t r = 0; r < g.rows; ++r) {
      patch.made = r == 0 ? 0 : Transform::kIn - kTile;
      float* of_row =
          grad_z ? grad_z + (b * g.rows + r) * kOut * g.columns * kTile * kBlock : nullptr;
      transform_block(b * kBlock, g.n, g.h + r * kTile - Transform::kHalo, g.w - Transform::kHalo,
                      row_floats(g.columns) / kBlock, z_of(r), of_row, patch);
      done(r);
    }
  }

  void transform_block(int64_t first, int64_t n, int64_t h, int64_t w, int64_t columns, float* z,
                       float* grad_z, Patch& patch) const {
    const int64_t row = columns * kBlock;
    const int64_t last = std::min(first + kBlock, in_.C);
    bool patched = false;
    int64_t begin = 0;  // of the source's channels
    for (const Pending<T>& p : in_.sources) {
      const int64_t end = begin + p.source.y.C;
      const int64_t c0 = std::max(first, begin), c1 = std::min(last, end);
      if (c0 < c1) {
        const Source<T> part = channels(p.source, c0 - begin, c1 - c0);
        if (p.mode == Mode::none && c0 == first && c1 == last) {
          if (c1 - c0 < kBlock) {
            zero(z, kOut * columns, kBlock, kBlock);
            if (grad_z) zero(grad_z, kOut * (columns - 2 * Transform::kHalo), kBlock, kBlock);
          }
          const T* raw = p.raw ? p.raw + (c0 - begin) : nullptr;
          const auto run = [&](auto load) {
            constexpr Load kLoad = load.value;
            if constexpr (!std::is_void_v<Grad> && kLoad != Load::affine)
              if (grad_z)
                return transform_columns<Transform, kLoad, Grad>(part, raw, n, h, w, columns, in_.H,
                                                                 in_.W, z, grad_z);
            transform_columns<Transform, kLoad, void>(part, raw, n, h, w, columns, in_.H, in_.W, z,
                                                      nullptr);
          };
          if (p.load == Load::affine) return run(std::integral_constant<Load, Load::affine>{});
          if (p.load == Load::plain) return run(std::integral_constant<Load, Load::plain>{});
          return run(std::integral_constant<Load, Load::normalization_bwd>{});
        }
        if (!patched && patch.made)
          std::memmove(patch.data, patch.data + kTile * row, patch.made * row * sizeof(float));
        else if (!patched && last - first < kBlock)
          zero(patch.data, Transform::kIn * columns, kBlock, kBlock);
        patched = true;
        const Resample<T> resample = resample_of(p, part, in_.H, in_.W);
        for (int i = patch.made; i < Transform::kIn; ++i)
          resample.row(n, h + i, w, w + columns, patch.data + i * row + c0 - first, kBlock,
                       patch.rows.at(&p - in_.sources.data()));
      }
      begin = end;
    }
    transform_columns<Transform>(patch.data, columns, z);
  }

  const Input<T>& in_;
};

}  // namespace fastunet
