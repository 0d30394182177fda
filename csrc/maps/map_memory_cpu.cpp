#include "maps/map_memory.h"

#include <array>
#include <vector>

#include "maps/empty.h"

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace fastunet {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;
// Between maps, so that equal pixels of maps of 2^n bytes do not meet in the sets of a cache.
constexpr size_t kApart = 5 * kLine;
// How often to look for what is not needed any more: after some passes.
constexpr int64_t kPeriod = 1024;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Whether memory is to be asked for map by map: limits count what is reserved, and sanitizers watch
// the bounds of what the C library hands out.
bool refused() {
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
  for (const auto what : {RLIMIT_AS, RLIMIT_DATA}) {
    rlimit limit;
    if (getrlimit(what, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY) return true;
  }
  return false;
#else
  return true;
#endif
}

}  // namespace

MapMemory& MapMemory::instance() {
  static auto* memory = new MapMemory;  // not destroyed: maps may be given back until the very end
  return *memory;
}

MapMemory::MapMemory() {
#ifdef __linux__
  if (refused()) return;
  const size_t all = round_up(
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE)),
      kHugePage);
  const size_t bytes = 2 * all + kHugePage;
  void* at = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return;
  madvise(at, bytes, MADV_HUGEPAGE);
  begin_ = end_ = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(at), kHugePage));
  limit_ = begin_ + 2 * all;
  // A process that forks while another thread is in here must not leave its child a held lock.
  pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                 [] { instance().mutex_.unlock(); });
#endif
}

void* MapMemory::take(size_t bytes) {
  bytes = round_up(bytes, kLine) + kApart;
  const std::lock_guard<std::mutex> lock(mutex_);
  auto best = blocks_.end();
  for (auto it = blocks_.begin(); it != blocks_.end(); ++it)
    if (!it->second.used && it->second.bytes >= bytes &&
        (best == blocks_.end() || it->second.bytes < best->second.bytes))
      best = it;
  if (best == blocks_.end()) best = grow(bytes);
  if (best == blocks_.end()) return nullptr;
  Block& block = best->second;
  if (block.bytes > bytes) {
    blocks_.emplace_hint(std::next(best), best->first + bytes,
                         Block{block.bytes - bytes, false, block.touched});
    block.bytes = bytes;
  }
  block.used = block.touched = true;
  used_ += bytes;
  most_used_ = std::max(most_used_, used_);
  if (++taken_ % kPeriod == 0) {
    // A loop of equal passes needs what it holds; the rest is of what was done before.
    if (used_ + free_bytes() > most_used_ + most_used_ / 2) release_free();
    most_used_ = used_;
  }
  return best->first;
}

void MapMemory::give_back(void* data) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = blocks_.find(static_cast<char*>(data));
  it->second.used = false;
  used_ -= it->second.bytes;
  merge(it);
}

// A free block at the end, of `bytes` at least; none where there is no more memory.
MapMemory::Blocks::iterator MapMemory::grow(size_t bytes) {
#ifdef __linux__
  size_t there = 0;
  if (!blocks_.empty() && !blocks_.rbegin()->second.used) there = blocks_.rbegin()->second.bytes;
  const size_t more = round_up(bytes - there, kHugePage);
  if (more > static_cast<size_t>(limit_ - end_)) return blocks_.end();
  if (mprotect(end_, more, PROT_READ | PROT_WRITE) != 0) return blocks_.end();
  const auto added = blocks_.emplace_hint(blocks_.end(), end_, Block{more, false, false});
  end_ += more;
  return merge(added);
#else
  return blocks_.end();
#endif
}

// A free block with its free neighbours.
MapMemory::Blocks::iterator MapMemory::merge(Blocks::iterator at) {
  const auto join = [&](Blocks::iterator first, Blocks::iterator second) {
    first->second.bytes += second->second.bytes;
    first->second.touched |= second->second.touched;
    blocks_.erase(second);
    return first;
  };
  const auto next = std::next(at);
  if (next != blocks_.end() && !next->second.used) at = join(at, next);
  if (at != blocks_.begin() && !std::prev(at)->second.used) at = join(std::prev(at), at);
  return at;
}

size_t MapMemory::free_bytes() const {
  size_t bytes = 0;
  for (const auto& [_, block] : blocks_)
    if (!block.used && block.touched) bytes += block.bytes;
  return bytes;
}

// Pages of what is free go back to the system, addresses behind the last map in use as well.
void MapMemory::release_free() {
#ifdef __linux__
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (auto& [at, block] : blocks_) {
    if (block.used || !block.touched) continue;
    const size_t first = round_up(reinterpret_cast<size_t>(at), page);
    const size_t last = (reinterpret_cast<size_t>(at) + block.bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    block.touched = false;
  }
  if (blocks_.empty() || blocks_.rbegin()->second.used) return;
  const auto last = std::prev(blocks_.end());
  const size_t kept = round_up(last->first - begin_, kHugePage);
  if (kept >= static_cast<size_t>(end_ - begin_)) return;
  end_ = begin_ + kept;
  last->second.bytes = end_ - last->first;
  if (last->second.bytes == 0) blocks_.erase(last);
#endif
}

size_t MapMemory::kept() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return free_bytes();
}

void MapMemory::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  release_free();
}

Tensor empty_kept(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype,
                  size_t bytes) {
  if (void* data = bytes >= kLeastKept ? MapMemory::instance().take(bytes) : nullptr)
    return torch::stable::from_blob(data, sizes, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    dtype, [](void* at) { MapMemory::instance().give_back(at); });
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), static_cast<int32_t>(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

namespace {

// A map of `like`'s samples, dtype and device.
Tensor empty_map(const Tensor like, int64_t channels, int64_t height, int64_t width) {
  require(like.dim() == 4, "like must be [N, C, H, W], got ", shape(like));
  const std::array<int64_t, 4> sizes{like.size(0), channels, height, width};
  const std::array<int64_t, 4> strides{height * width * channels, 1, width * channels, channels};
  return empty_kept(sizes, strides, like.scalar_type(),
                    like.size(0) * strides[0] * like.element_size());
}

// For the gradient of a contiguous parameter.
Tensor empty_contiguous(const Tensor like) {
  std::vector<int64_t> sizes(like.dim()), strides(like.dim());
  int64_t count = 1;
  for (int64_t d = like.dim() - 1; d >= 0; --d) {
    sizes[d] = like.size(d), strides[d] = count;
    count *= sizes[d];
  }
  return empty_kept(sizes, strides, like.scalar_type(), count * like.element_size());
}

int64_t kept_map_memory() { return static_cast<int64_t>(MapMemory::instance().kept()); }
void release_map_memory() { MapMemory::instance().release(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTUNET_LIBRARY, m) {
  m.def("empty_map(Tensor like, int channels, int height, int width) -> Tensor");
  m.def("empty_contiguous(Tensor like) -> Tensor");
  m.def("kept_map_memory() -> int");
  m.def("release_map_memory() -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(FASTUNET_LIBRARY, CPU, m) {
  m.impl("empty_map", TORCH_BOX(&empty_map));
  m.impl("empty_contiguous", TORCH_BOX(&empty_contiguous));
}
STABLE_TORCH_LIBRARY_IMPL(FASTUNET_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("kept_map_memory", TORCH_BOX(&kept_map_memory));
  m.impl("release_map_memory", TORCH_BOX(&release_map_memory));
}

}  // namespace fastunet
