// From Winograd's domain to maps: where a convolution's output goes. write(): blocks [begin, end)
// of output channels of a group, from tiles [tile, ...) of m, whose first block is `begin`: Panels
// or RowPanels.
#pragma once

#include <optional>
#include <vector>

#include "conv_norm_act/normalization_cpu.h"
#include "conv_norm_act/tiles.h"

namespace fastunet {

// Products whose rows are transformed: of each row of points kTile columns.
struct RowPanels : Panels {};

// A row of points of the products of `blocks` blocks along the row, to kTile planes of `to`.
template <int kTile>
void transform_products(const Panels& m, int64_t blocks, float* to, int64_t plane) {
  constexpr int kPatch = patch_of(kTile);
  const int64_t m_plane = m.plane(), count = blocks * m.block();
  for (int64_t x = 0; x < count; x += kLanes) {
    vfloat row[kPatch], out[kTile];
#pragma GCC unroll 8
    for (int j = 0; j < kPatch; ++j) row[j] = load(m.data + j * m_plane + x);
    OutputTransform<kTile>::apply(row, out);
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) store(to + j * plane + x, out[j]);
  }
}

// One vector of channels of one tile, from `from` on in m, handed on as to(row, column, value).
template <int kTile, class To>
FASTUNET_INLINE void transform_tile(const Panels& m, const float* from, To to) {
  const int64_t plane = m.plane();
  transform_square<OutputTransform<kTile>>(
      [&](int i, int j) { return load(from + (i * patch_of(kTile) + j) * plane); }, to);
}
template <int kTile, class To>
FASTUNET_INLINE void transform_tile(const RowPanels& m, const float* from, To to) {
  constexpr int kPatch = patch_of(kTile);
  const int64_t plane = m.plane();
  for (int j = 0; j < kTile; ++j) {
    vfloat column[kPatch], out[kTile];
#pragma GCC unroll 8
    for (int i = 0; i < kPatch; ++i) column[i] = load(from + (i * kTile + j) * plane);
    OutputTransform<kTile>::apply(column, out);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) to(i, j, out[i]);
  }
}

// The same for a tile of which [height, width] pixels are inside the map.
template <int kTile, class P, class To>
FASTUNET_INLINE void transform_tile(const P& m, const float* from, int64_t height, int64_t width,
                                    To to) {
  const auto run = [&](auto to) { transform_tile<kTile>(m, from, to); };
  if (height >= kTile && width >= kTile)
    run(to);
  else
    run([&](int i, int j, vfloat value) {
      if (i < height && j < width) to(i, j, value);
    });
}

// f(first channel, its address in m, lanes) for blocks [begin, end) of C channels.
template <class F>
FASTUNET_INLINE void for_vectors(int64_t begin, int64_t end, int64_t C, const Panels& m, F f) {
  for (int64_t b = begin; b < end; ++b)
    for (int i = 0; i < kBlock; i += kLanes) {
      const int64_t c = b * kBlock + i;
      const float* from = m.at(0, b - begin) + i;
      if (C - c >= kLanes)
        f(c, from, std::integral_constant<int, kLanes>{});
      else if (C > c)
        f(c, from, static_cast<int>(C - c));
    }
}

// f(tile of m, its first pixel) for the tiles of a group, `side` pixels wide and high.
template <class F>
FASTUNET_INLINE void for_tiles_of(const Tiling::Group& g, int64_t side, int64_t tile, F f) {
  for (int64_t r = 0; r < g.rows; ++r)
    for (int64_t s = 0; s < g.columns; ++s, ++tile) f(tile, g.h + r * side, g.w + s * side);
}

// Sums of one vector of channels, several that do not wait for each other, of deviations from the
// mean of a part of the values: no cancellation that counts, whatever the mean.
template <int kSums>
struct Deviations {
  vfloat center{}, sums[kSums] = {}, squares[kSums] = {};

  FASTUNET_INLINE void add(int i, vfloat value) {
    const vfloat deviation = value - center;
    sums[i % kSums] += deviation;
    squares[i % kSums] += deviation * deviation;
  }
  // The mean so far as the center of what is added from now on.
  FASTUNET_INLINE void start(int64_t count) {
    const vfloat mean = center + total(sums) / static_cast<float>(count);
    *this = {mean};
  }
  FASTUNET_INLINE vfloat mean(float count) const { return center + total(sums) / count; }
  FASTUNET_INLINE vfloat m2(float count) const {
    const vfloat sum = total(sums), found = total(squares) - sum * sum / count;
    return found > 0 ? found : vfloat{};
  }

 private:
  static FASTUNET_INLINE vfloat total(const vfloat* sums) {
    vfloat sum = sums[0];
    for (int i = 1; i < kSums; ++i) sum += sums[i];
    return sum;
  }
};

// A raw map and, if wanted, its moments; or with an affine and activation done to it.
template <class T, int kTile>
struct RawOutput {
  Map<T> y;
  ChunkMoments<T>* moments;
  const Source<T>* done = nullptr;  // by the values per channel of this

  void prepare(const Tiling& tiling) const {
    if (moments) moments->resize(tiling.count(), y.C);
  }
  int64_t bytes_of_tile() const { return kTile * kTile * y.C * static_cast<int64_t>(sizeof(T)); }
  void prefetch_read(const Tiling::Group&, Prefetch&) const {}
  // A store that misses waits for its line.
  void prefetch_written(const Tiling::Group& g, Prefetch& lines) const {
    lines.add(y.read_only(), g.n, g.h, g.h + g.height, g.w, g.w + g.width);
  }

  template <class P>
  void write(const Tiling::Group& g, int64_t index, int64_t begin, int64_t end, const P& m,
             int64_t first) const {
    if (moments) moments->counts[index] = g.height * g.width;
    for_vectors(begin, end, y.C, m, [&](int64_t c, const float* from, auto lanes) {
      if (moments) return write_moments(g, index, c, from, lanes, m, first);
      const auto write_tiles = [&](auto value_of) {
        for_tiles_of(g, kTile, first, [&](int64_t tile, int64_t h, int64_t w) {
          T* to = y.at(g.n, h, w) + c;
          transform_tile<kTile>(m, from + tile * kBlock, y.H - h, y.W - w,
                                [&](int i, int j, vfloat value) {
                                  store(to + i * y.sh + j * y.sw, value_of(value), lanes);
                                });
        });
      };
      if (done)
        write_tiles(Channels<float>(*done, g.n, c, lanes));
      else
        write_tiles([](vfloat value) { return value; });
    });
  }

 private:
  // One vector of channels, and its moments.
  template <class P, class Lanes>
  void write_moments(const Tiling::Group& g, int64_t index, int64_t c, const float* from,
                     Lanes lanes, const P& m, int64_t first) const {
    Deviations<2> deviations;
    for_tiles_of(g, kTile, first, [&](int64_t tile, int64_t h, int64_t w) {
      T* const to = y.at(g.n, h, w) + c;
      const int64_t height = y.H - h, width = y.W - w, sh = y.sh, sw = y.sw;
      auto of_tile = deviations;  // in registers
      transform_tile<kTile>(
          m, from + tile * kBlock, height, width, [&](int i, int j, vfloat value) {
            T* const at = to + i * sh + j * sw;
            store(at, value, lanes);
            of_tile.add(i, std::is_same_v<T, float> ? value : load(at, lanes));  // as it is stored
          });
      if (tile == first) {  // now that there is a mean
        const int64_t rows = std::min<int64_t>(height, kTile);
        const int64_t columns = std::min<int64_t>(width, kTile);
        of_tile.start(rows * columns);
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < columns; ++j) of_tile.add(i, load(to + i * sh + j * sw, lanes));
      }
      deviations = of_tile;
    });
    const int64_t count = g.height * g.width;
    auto* mean = moments->values.data() + index * 2 * y.C + c;
    store(mean, deviations.mean(count), lanes);
    store(mean + y.C, deviations.m2(count), lanes);
  }
};

// The gradient of a source that is read in place: of its raw map, dy = scale * act'(t) * dz, and
// the sums of act'(t) * dz * (y - center) and of act'(t) * dz, per group: [groups][2][C].
template <class T, int kTile>
struct SourceGrad {
  Source<T> source;
  Map<T> dy;
  std::vector<float>& sums;

  void prepare(const Tiling& tiling) const { sums.assign(tiling.count() * 2 * dy.C, 0.0f); }
  int64_t bytes_of_tile() const {
    return 2 * kTile * kTile * dy.C * static_cast<int64_t>(sizeof(T));
  }
  void prefetch_read(const Tiling::Group& g, Prefetch& lines) const {
    lines.add(source.y, g.n, g.h, g.h + g.height, g.w, g.w + g.width);
  }

  template <class P>
  void write(const Tiling::Group& g, int64_t index, int64_t begin, int64_t end, const P& m,
             int64_t first) const {
    const Map<const T>& y = source.y;
    for_vectors(begin, end, dy.C, m, [&](int64_t c, const float* from, auto lanes) {
      const Channels<float> channel(source, g.n, c, lanes);
      vfloat dscale{}, dshift{};
      for_tiles_of(g, kTile, first, [&](int64_t tile, int64_t h, int64_t w) {
        const T* raw = y.at(g.n, h, w) + c;
        T* to = dy.at(g.n, h, w) + c;
        transform_tile<kTile>(m, from + tile * kBlock, dy.H - h, dy.W - w,
                              [&](int i, int j, vfloat dz) {
                                const vfloat value = load(raw + i * y.sh + j * y.sw, lanes);
                                const vfloat d = channel.act_bwd(dz, channel.preact(value));
                                store(to + i * dy.sh + j * dy.sw, channel.scale * d, lanes);
                                dscale += d * (value - channel.center);
                                dshift += d;
                              });
      });
      float* sum = sums.data() + index * 2 * dy.C + c;
      store(sum, dscale, lanes);
      store(sum + dy.C, dshift, lanes);
    });
  }
};

// The gradients of one source or of two side by side: of the map that a source stands for; where
// that is its raw output with an affine and activation, of the raw output (`sums` given); where it
// is pooled from that, of both (`pooled_from` given as well), while what is read is in cache;
// `add`: the latter is added to what is there.
template <class T, int kTile>
struct SourceGrads {
  struct Part {
    Source<T> source;
    Map<T> to;
    std::vector<float>* sums;
    std::optional<Map<T>> pooled_from;
    bool add;
  };
  std::vector<Part> parts;  // each beginning with a block of its own

  void prepare(const Tiling& tiling) const {
    for (const Part& part : parts)
      if (part.sums) masked(part).prepare(tiling);
  }
  int64_t bytes_of_tile() const {
    int64_t bytes = 0;
    for (const Part& part : parts)
      bytes += (part.sums ? masked(part).bytes_of_tile() : raw(part).bytes_of_tile()) *
               (part.pooled_from ? 4 : 1);
    return bytes;
  }
  void prefetch_read(const Tiling::Group& g, Prefetch& lines) const {
    for (const Part& part : parts)
      if (part.pooled_from)
        prefetch_windows(part.source.y, g, lines);
      else if (part.sums)
        masked(part).prefetch_read(g, lines);
  }
  void prefetch_written(const Tiling::Group& g, Prefetch& lines) const {
    for (const Part& part : parts) {
      raw(part).prefetch_written(g, lines);
      if (part.pooled_from) prefetch_windows(part.pooled_from->read_only(), g, lines);
    }
  }

  template <class P>
  void write(const Tiling::Group& g, int64_t index, int64_t begin, int64_t end, const P& m,
             int64_t tile) const {
    int64_t first = 0;
    for (const Part& part : parts) {
      const int64_t last = first + blocks_of(part.to.C);
      const int64_t from = std::max(begin, first), to = std::min(end, last);
      if (from < to) {
        const P of_part{Panels{m.data + (from - begin) * m.block(), m.blocks, m.tiles}};
        if (part.pooled_from) {
          raw(part).write(g, index, from - first, to - first, of_part, tile);
          write_windows(part, g, index, from - first, to - first);
        } else if (part.sums)
          masked(part).write(g, index, from - first, to - first, of_part, tile);
        else
          raw(part).write(g, index, from - first, to - first, of_part, tile);
      }
      first = last;
    }
  }

 private:
  static void prefetch_windows(const Map<const T>& m, const Tiling::Group& g, Prefetch& lines) {
    lines.add(m, g.n, 2 * g.h, 2 * (g.h + g.height), 2 * g.w, 2 * (g.w + g.width));
  }
  static void write_windows(const Part& p, const Tiling::Group& g, int64_t index, int64_t begin,
                            int64_t end) {
    const int64_t C = p.to.C, c = begin * kBlock, count = std::min(end * kBlock, C) - c;
    const ResampleBwd<T> pool(channels(p.source, c, count), channels(p.to, c, count).read_only(),
                              channels(*p.pooled_from, c, count), Mode::max_pool, p.add);
    pool.max_pool(g.n, g.h, g.h + g.height, g.w, g.w + g.width, p.sums->data() + index * 2 * C + c,
                  C);
  }
  static SourceGrad<T, kTile> masked(const Part& p) { return {p.source, p.to, *p.sums}; }
  static RawOutput<T, kTile> raw(const Part& p) { return {p.to, nullptr}; }
};

}  // namespace fastunet
