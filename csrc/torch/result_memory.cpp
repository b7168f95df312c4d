#include "torch/result_memory.h"

#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace synface {
namespace {

constexpr size_t kHuge = size_t(2) << 20;  // size of a huge page
constexpr int64_t kDefaultMiB = 512;

#ifdef __linux__

void advise(void* begin, size_t size) { madvise(begin, size, MADV_HUGEPAGE); }

struct Block {
  void* data;
  size_t size;  // a multiple of kHuge, to which data is aligned
};

Block* map(size_t size) {
  // Maps one huge page more, so that an aligned range is inside, and unmaps the rest.
  void* all =
      mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(all);
  const uintptr_t aligned = (begin + kHuge - 1) / kHuge * kHuge;
  if (aligned > begin) munmap(all, aligned - begin);
  munmap(reinterpret_cast<void*>(aligned + size), begin + kHuge - aligned);
  auto* data = reinterpret_cast<void*>(aligned);
  advise(data, size);
  return new Block{data, size};
}

void unmap(Block* block) {
  munmap(block->data, block->size);
  delete block;
}

// The cached blocks, a ring: a new block displaces the oldest. Whoever exchanges a slot for null
// owns its block exclusively, so there is no lock that a fork could leave locked. Nothing is
// destroyed at exit, as tensors may be freed later.
constexpr unsigned kSlots = 16;
std::atomic<Block*> slots[kSlots];
std::atomic<unsigned> next{0};
std::atomic<int64_t> cached{0}, limit{kDefaultMiB << 20};

Block* take(std::atomic<Block*>& slot) {
  Block* block = slot.load(std::memory_order_relaxed) ? slot.exchange(nullptr) : nullptr;
  if (block) cached -= int64_t(block->size);
  return block;
}

// Unmaps blocks, oldest first, until at most this many bytes are cached.
void shrink(int64_t most) {
  const unsigned first = next;
  for (unsigned i = 0; i < kSlots && cached > most; ++i) {
    if (Block* block = take(slots[(first + i) % kSlots])) unmap(block);
  }
}

// Caches the block, in place of older ones; unmaps it if it is larger than the cache.
void cache(Block* block) {
  const int64_t size = int64_t(block->size), most = limit;
  if (size > most) return unmap(block);
  shrink(most - size);
  if ((cached += size) > most) {  // another thread was faster
    cached -= size;
    return unmap(block);
  }
  if (Block* older = slots[next++ % kSlots].exchange(block)) {
    cached -= int64_t(older->size);
    unmap(older);
  }
}

// Returns a block to the slot it was taken from; unmaps it if another thread has filled the slot.
void put_back(std::atomic<Block*>& slot, Block* block) {
  cached += int64_t(block->size);
  Block* none = nullptr;
  if (slot.compare_exchange_strong(none, block)) return;
  cached -= int64_t(block->size);
  unmap(block);
}

// Takes the smallest cached block of at least `size` and at most twice that, or returns null.
Block* find(size_t size) {
  Block* best = nullptr;
  std::atomic<Block*>* home = nullptr;
  for (auto& slot : slots) {
    Block* block = take(slot);
    if (!block) continue;
    const bool fits = block->size >= size && block->size <= 2 * size;
    if (!fits || (best && best->size <= block->size)) {
      put_back(slot, block);
      continue;
    }
    if (best) put_back(*home, best);
    best = block;
    home = &slot;
  }
  return best;
}

int64_t limit_from_environment() {
  const char* text = std::getenv("SYNFACE_CACHE_MIB");
  if (!text || !*text) return kDefaultMiB << 20;
  const char* end = text + std::strlen(text);
  int64_t mib = 0;
  const auto [parsed, error] = std::from_chars(text, end, mib);
  TORCH_CHECK_VALUE(error == std::errc() && parsed == end && mib >= 0 && mib <= int64_t(1) << 40,
                    "SYNFACE_CACHE_MIB must be a whole number of MiB, 0 or more, got ", text);
  return mib << 20;
}

void give_back(void* block) { cache(static_cast<Block*>(block)); }

struct ResultAllocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    if (bytes < kHuge) return c10::GetCPUAllocator()->allocate(bytes);  // resize_ calls this too
    limit = limit_from_environment();
    shrink(limit);
    const size_t size = (bytes + kHuge - 1) / kHuge * kHuge;
    Block* block = find(size);
    if (!block) block = map(size);
    if (!block) {
      shrink(0);
      block = map(size);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, block, "no memory for a result of ", bytes, " bytes");
    return {block->data, block, give_back, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

at::Allocator* allocator() {
  static auto* const forever = new ResultAllocator;  // tensors hold it as long as they live
  return forever;
}

#else

at::Allocator* allocator() { return c10::GetCPUAllocator(); }

#endif

}  // namespace

at::Tensor empty_result(at::IntArrayRef size, at::ScalarType dtype, bool channels_last) {
  return at::detail::empty_generic(
      size, allocator(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
      channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

void empty_cache() {
#ifdef __linux__
  for (auto& slot : slots) {
    if (Block* block = take(slot)) unmap(block);
  }
#endif
}

int64_t cached_bytes() {
#ifdef __linux__
  return cached;
#else
  return 0;
#endif
}

void advise_huge_pages(const at::Tensor& memory) {
#ifdef __linux__
  const auto begin = (reinterpret_cast<uintptr_t>(memory.const_data_ptr()) + kHuge - 1) / kHuge;
  const auto end = (reinterpret_cast<uintptr_t>(memory.const_data_ptr()) + memory.nbytes()) / kHuge;
  if (end > begin) advise(reinterpret_cast<void*>(begin * kHuge), (end - begin) * kHuge);
#endif
}

}  // namespace synface
