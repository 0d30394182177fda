// Runs programs, which src/fastunet/program.py writes: kernel calls, memory and views in a row.
//
// A program is a row of int64: how many slots (places of tensors) it has, then its instructions,
//
//   kEmpty   slot, dtype, bytes, dimensions, sizes, strides     a tensor to be written
//   kView    base, slot, offset, dimensions, sizes, strides     the same memory, seen otherwise,
//                                                               from so many elements on
//   kFree    count, slots                                       nobody reads them any more
//   kReturn  count, slots                                       the end
//   a kernel's number, count, then kind and value of each argument
//
// The first slots are filled by whoever runs it.
#include "program/program.h"

#include <bit>
#include <mutex>
#include <unordered_map>

#include "common/binding.h"
#include "maps/empty.h"

namespace fastunet {
namespace {

using torch::stable::detail::from;

enum Instruction : int64_t { kEmpty = -1, kView = -2, kFree = -3, kReturn = -4 };
enum Kind : int64_t { kNone, kTensor, kMaybeTensor, kInt, kFloat, kText, kBool };

// dimensions, sizes, strides
struct Shape {
  IntHeaderOnlyArrayRef sizes, strides;
  explicit Shape(const int64_t* words)
      : sizes(words + 1, words[0]), strides(words + 1 + words[0], words[0]) {}
  int64_t words() const { return 1 + 2 * static_cast<int64_t>(sizes.size()); }
};

Tensor view(const Tensor& base, const Shape& shape, int64_t offset) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(base.get(), static_cast<int64_t>(shape.sizes.size()),
                                     shape.sizes.data(), shape.strides.data(), offset, &made));
  return Tensor(made);
}

// Up to eight characters in a word.
std::string text(uint64_t word) {
  std::string out;
  for (; word; word >>= 8) out += static_cast<char>(word & 255);
  return out;
}

StableIValue argument(int64_t kind, int64_t value, const std::vector<MaybeTensor>& slots) {
  switch (kind) {
    case kNone:
      return from(std::nullopt);
    case kTensor:
      return from(slots.at(value).value());
    case kMaybeTensor:
      return from(slots.at(value));
    case kInt:
      return from(value);
    case kFloat:
      return from(std::bit_cast<double>(value));
    case kText:
      return from(text(value));
    case kBool:
      return from(value != 0);
    default:
      require(false, "a program has no arguments of kind ", kind);
      return 0;
  }
}

std::vector<Tensor> run(const int64_t* word, std::vector<MaybeTensor> slots) {
  slots.resize(*word++);
  std::vector<StableIValue> stack;
  for (;;) {
    const int64_t what = *word++;
    if (what == kEmpty) {
      const Shape shape(word + 3);
      slots.at(word[0]) =
          empty_kept(shape.sizes, shape.strides, static_cast<ScalarType>(word[1]), word[2]);
      word += 3 + shape.words();
    } else if (what == kView) {
      const Shape shape(word + 3);
      slots.at(word[1]) = view(slots.at(word[0]).value(), shape, word[2]);
      word += 3 + shape.words();
    } else if (what == kFree) {
      for (int64_t left = *word++; left > 0; --left) slots.at(*word++).reset();
    } else if (what == kReturn) {
      std::vector<Tensor> returned;
      for (int64_t left = *word++; left > 0; --left) returned.push_back(slots.at(*word++).value());
      return returned;
    } else {
      const int64_t count = *word++;
      stack.clear();
      for (int64_t i = 0; i < count; ++i, word += 2)
        stack.push_back(argument(word[0], word[1], slots));
      program_kernels().at(what).second(stack.data(), count, 0);
    }
  }
}

// Tensors that the next run alone shall own, so that their memory is free once they are read: as an
// argument they would be the caller's until it ends.
class Held {
 public:
  int64_t hold(std::vector<Tensor> tensors) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tensors_[++last_] = std::move(tensors);
    return last_;
  }
  std::vector<Tensor> release(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = tensors_.extract(number);
    require(!found.empty(), "nothing is held as ", number);
    return std::move(found.mapped());
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::vector<Tensor>> tensors_;
  int64_t last_ = 0;
};

Held& held() {
  static Held instance;
  return instance;
}

int64_t hold(std::vector<Tensor> tensors) { return held().hold(std::move(tensors)); }

// inputs, then what is held as `more` (0: nothing), are the first slots.
std::vector<Tensor> run_program(const Tensor program, std::vector<Tensor> inputs, int64_t more) {
  std::vector<MaybeTensor> slots(inputs.begin(), inputs.end());
  if (more)
    for (Tensor& t : held().release(more)) slots.emplace_back(std::move(t));
  require(program.is_contiguous() && program.scalar_type() == ScalarType::Long,
          "a program must be int64 in a row");
  return run(static_cast<const int64_t*>(program.data_ptr()), std::move(slots));
}

// -1 where there is none.
int64_t kernel_number(std::string name) {
  const auto& kernels = program_kernels();
  for (size_t i = 0; i < kernels.size(); ++i)
    if (kernels[i].first == name) return static_cast<int64_t>(i);
  return -1;
}

// What PyTorch does between kernels.

// out = one + other, all alike and without gaps; out may be one of them.
void add(Tensor out, const Tensor one, const Tensor other) {
  const int64_t count = out.numel();
  require(one.numel() == count && other.numel() == count, "all must be of one shape, got ",
          shape(one), " + ", shape(other), " to ", shape(out));
  dispatch(out.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T *a = data<const T>(one, "one"), *b = data<const T>(other, "other");
    T* to = data<T>(out, "out");
    const int64_t vectors = ceil_div(count, kLanes);
    torch::stable::parallel_for(0, vectors, 1 << 11, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kLanes; i < std::min(end * kLanes, count); i += kLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count - i));
        store(to + i, load(a + i, lanes) + load(b + i, lanes), lanes);
      }
    });
  });
}

// Whether `one` is a few planes for each sample, whose pixels `out` has side by side.
bool interleaves(const Tensor& out, const Tensor& one) {
  const ScalarType dtype = one.scalar_type();
  if (one.dim() != 4 || out.dim() != 4 || out.numel() != one.numel() ||
      out.scalar_type() != dtype || dtype == ScalarType::Long)
    return false;
  const int64_t C = one.size(1), W = one.size(3);
  return C >= 2 && C <= 4 && one.is_contiguous() && out.stride(1) == 1 && out.stride(3) == C &&
         out.stride(2) == C * W && out.stride(0) == C * W * one.size(2);
}

// PyTorch takes four times as long for an image.
template <int C, class T>
void interleave(const T* planes, int64_t samples, int64_t pixels, T* to) {
  for (int64_t n = 0; n < samples; ++n)
    torch::stable::parallel_for(0, pixels, 1 << 12, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int c = 0; c < C; ++c) to[(n * pixels + p) * C + c] = planes[(n * C + c) * pixels + p];
    });
}

void copy(Tensor out, const Tensor one) {
  if (!interleaves(out, one)) return (void)torch::stable::copy_(out, one);
  dispatch(out.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const int64_t C = one.size(1), pixels = one.size(2) * one.size(3);
    const auto run = C == 2 ? interleave<2, T> : C == 3 ? interleave<3, T> : interleave<4, T>;
    run(data<const T>(one, "one"), one.size(0), pixels, data<T>(out, "out"));
  });
}
void zero(Tensor out) { torch::stable::zero_(out); }

}  // namespace

FASTUNET_KERNEL(add, "add(Tensor(a!) out, Tensor one, Tensor other) -> ()")
FASTUNET_KERNEL(copy, "copy(Tensor(a!) out, Tensor one) -> ()")
FASTUNET_KERNEL(zero, "zero(Tensor(a!) out) -> ()")

STABLE_TORCH_LIBRARY_FRAGMENT(FASTUNET_LIBRARY, m) {
  m.def("hold(Tensor[] tensors) -> int");
  m.def("run_program(Tensor program, Tensor[] inputs, int more) -> Tensor[]");
  m.def("kernel_number(str name) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(FASTUNET_LIBRARY, CPU, m) {
  m.impl("hold", TORCH_BOX(&hold));
  m.impl("run_program", TORCH_BOX(&run_program));
}
STABLE_TORCH_LIBRARY_IMPL(FASTUNET_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("kernel_number", TORCH_BOX(&kernel_number));
}

}  // namespace fastunet
