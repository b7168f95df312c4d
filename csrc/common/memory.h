// Aligned scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace synface {

// Uninitialized, aligned for the widest vectors.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(size > 0 ? static_cast<T*>(::operator new(size_t(size) * sizeof(T), kAlign))
                       : nullptr) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace synface
