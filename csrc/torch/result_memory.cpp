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

// The last block that was too large for the ring, usually the gradient of a weight, which the next
// step needs again. The system takes its pages where memory is short.
std::atomic<Block*> large{nullptr};
std::atomic<int64_t> large_bytes{0};
std::atomic<bool> keeps_large{true};

// Leaves the block's pages to the system, until they are written again.
bool offer(const Block& block) {
#ifdef MADV_FREE
  return madvise(block.data, block.size, MADV_FREE) == 0;
#else
  return false;
#endif
}

// Keeps the block in place of the one before; null keeps none.
void keep_large(Block* block) {
  if (block && !offer(*block)) return unmap(block);
  large_bytes += block ? int64_t(block->size) : 0;
  Block* older = large.exchange(block);
  if (!older) return;
  large_bytes -= int64_t(older->size);
  unmap(older);
}

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

// Caches the block, in place of older ones.
void cache(Block* block) {
  const int64_t size = int64_t(block->size), most = limit;
  if (size > most) return keeps_large ? keep_large(block) : unmap(block);
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

bool fits(const Block& block, size_t size) { return block.size >= size && block.size <= 2 * size; }

// Takes the large block if it fits, or returns null.
Block* find_large(size_t size) {
  Block* block = large.exchange(nullptr);
  if (!block) return nullptr;
  large_bytes -= int64_t(block->size);
  if (fits(*block, size)) return block;
  Block* none = nullptr;
  large_bytes += int64_t(block->size);
  if (large.compare_exchange_strong(none, block)) return nullptr;
  large_bytes -= int64_t(block->size);  // another thread's is newer
  unmap(block);
  return nullptr;
}

// Takes the smallest cached block of at least `size` and at most twice that, or returns null.
Block* find(size_t size) {
  if (int64_t(size) > limit) return find_large(size);
  Block* best = nullptr;
  std::atomic<Block*>* home = nullptr;
  for (auto& slot : slots) {
    Block* block = take(slot);
    if (!block) continue;
    if (!fits(*block, size) || (best && best->size <= block->size)) {
      put_back(slot, block);
      continue;
    }
    if (best) put_back(*home, best);
    best = block;
    home = &slot;
  }
  return best;
}

// Reads the limit; only the default one leaves room for the large block.
void read_environment() {
  const char* text = std::getenv("SYNFACE_CACHE_MIB");
  const bool is_default = !text || !*text;
  keeps_large = is_default;
  if (is_default) {
    limit = kDefaultMiB << 20;
    return;
  }
  const char* end = text + std::strlen(text);
  int64_t mib = 0;
  const auto [parsed, error] = std::from_chars(text, end, mib);
  TORCH_CHECK_VALUE(error == std::errc() && parsed == end && mib >= 0 && mib <= int64_t(1) << 40,
                    "SYNFACE_CACHE_MIB must be a whole number of MiB, 0 or more, got ", text);
  limit = mib << 20;
  keep_large(nullptr);
}

void give_back(void* block) { cache(static_cast<Block*>(block)); }

struct ResultAllocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    if (bytes < kHuge) return c10::GetCPUAllocator()->allocate(bytes);  // resize_ calls this too
    read_environment();
    shrink(limit);
    const size_t size = (bytes + kHuge - 1) / kHuge * kHuge;
    Block* block = find(size);
    if (!block) block = map(size);
    if (!block) {
      shrink(0);
      keep_large(nullptr);
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
  keep_large(nullptr);
#endif
}

int64_t cached_bytes() {
#ifdef __linux__
  return cached + large_bytes;
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
