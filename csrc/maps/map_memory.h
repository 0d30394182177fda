// Memory for maps, kept for the next ones when it is given back.
//
// Maps of the same few sizes come and go with every pass. From the C library, fresh pages are
// written each time (it returns what is free at its heap's end), and glibc before 2.38 cannot use a
// freed map's place again for an aligned map of the same size, once a small block has taken the
// crumbs that alignment leaves (glibc bug 14581): inference then grew by two maps a pass, without
// end. Here neighbours that are free become one, the smallest that fits is taken, and what the last
// passes did not need goes back to the system.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace fastunet {

class MapMemory {
 public:
  static MapMemory& instance();

  // Aligned to a cache line; null where there is none (or none of it, as on other systems than
  // Linux, or for processes whose address space or data is limited).
  void* take(size_t bytes);
  void give_back(void* data);

  // Bytes held without being in use; and their return to the system.
  size_t kept();
  void release();

 private:
  struct Block {
    size_t bytes;
    bool used;
    bool touched;  // may hold pages
  };
  using Blocks = std::map<char*, Block>;

  MapMemory();
  Blocks::iterator grow(size_t bytes);
  Blocks::iterator merge(Blocks::iterator at);
  size_t free_bytes() const;
  void release_free();

  std::mutex mutex_;
  Blocks blocks_;          // side by side from begin_ to end_
  char* begin_ = nullptr;  // addresses reserved, pages only up to end_
  char* end_ = nullptr;
  char* limit_ = nullptr;
  size_t used_ = 0, most_used_ = 0;  // the most since the last look
  int64_t taken_ = 0;
};

}  // namespace fastunet
