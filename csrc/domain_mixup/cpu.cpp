#include "domain_mixup/cpu.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#include "common/memory.h"
#include "simd/isa.h"
#include "simd/scalar.h"

#if SYNFACE_X86
#include <immintrin.h>
#endif

namespace synface::domain_mixup {
namespace {

// Elements of a chunk: few, so that rearranging one overlaps with the arithmetic of another.
constexpr int64_t kChunkElements = 1536;
// Bytes that a loop handles at a time with the widest vectors.
constexpr int64_t kVector = 64;
// Elements estimated together in float32, and recomputed exactly where the estimate is
// inconclusive.
constexpr int64_t kGroup = 64;
// Bytes of a result whose stores bypass the caches, as the reader of a larger one would hardly find
// it there: a quarter of a third-level cache of 32 MiB.
constexpr int64_t kStreamBytes = 8 << 20;
// Elements of the smallest task.
constexpr int64_t kTaskElements = 32768;

struct Strides {
  int64_t pixel, channel;
};

// Pixels of one sample.
struct Chunk {
  int64_t sample, begin, end;
};

// Normalization constants of elements: exact ones, and those of estimates.
struct Constants {
  const double *shift, *scale;
  const float *shift_high, *shift_low, *near_scale;
  const int32_t* least;  // the bits of the least |x| for which an estimate is valid
  bool estimable;        // whether estimates are allowed
  bool exact_shift;      // whether no shift has a rest
  Constants from(int64_t i) const {
    return {.shift = shift + i,
            .scale = scale + i,
            .shift_high = shift_high + i,
            .shift_low = shift_low + i,
            .near_scale = near_scale + i,
            .least = least + i,
            .estimable = estimable,
            .exact_shift = exact_shift};
  }
};

// The result's memory order, and how its samples are cut into chunks. The cut depends only on the
// shape, so that sums do not depend on the number of threads.
struct Geometry {
  Geometry(const Problem& p, bool interleaved)
      : channels(p.channels),
        height(p.height),
        width(p.width),
        interleaved(interleaved),
        affine(p.affine) {
    const int64_t most = std::max(kVector, kChunkElements / channels);
    chunks = std::max<int64_t>(1, ceil_div(pixels(), most));
    chunk_pixels = ceil_div(ceil_div(pixels(), chunks), kVector) * kVector;
    chunks = std::max<int64_t>(1, ceil_div(pixels(), chunk_pixels));
    uniform = std::all_of(p.affine, p.affine + channels, [&](const Affine& affine) {
      return affine.shift == p.affine->shift && affine.scale == p.affine->scale;
    });
    // Interleaved channels that differ repeat their constants as often as fills vectors.
    const int64_t whole = std::lcm(channels, kVector);
    period = uniform || !interleaved   ? 1
             : whole <= kChunkElements ? whole
                                       : channels * ceil_div(kVector, channels);
    for (int64_t i = 0; i < std::max(period, channels); ++i) {
      const auto [shift, scale] = p.affine[i % channels];
      shifts.push_back(shift);
      scales.push_back(scale);
      const Split split(shift);
      shift_highs.push_back(split.high);
      shift_lows.push_back(split.low);
      exact_shift = exact_shift && split.low == 0;
      near_scales.push_back(float(scale));
      least.push_back(std::bit_cast<int32_t>(float(0x1p-6 * scale)) + int32_t(kOff));
      least_scale = std::min(least_scale, scale);
      greatest_scale = std::max(greatest_scale, scale);
      estimable = estimable && shift >= 0 && shift <= 255 && scale > 0x1p-60 && scale < 0x1p60;
    }
    for (int64_t b = 0; b < p.batch; ++b) estimable = estimable && p.psi[b] >= 0 && p.psi[b] <= 1;
  }
  Constants constants() const {
    return {.shift = shifts.data(),
            .scale = scales.data(),
            .shift_high = shift_highs.data(),
            .shift_low = shift_lows.data(),
            .near_scale = near_scales.data(),
            .least = least.data(),
            .estimable = estimable,
            .exact_shift = exact_shift};
  }
  int64_t pixels() const { return height * width; }
  Chunk chunk(int64_t index) const {
    const int64_t begin = index % chunks * chunk_pixels;
    return {index / chunks, begin, std::min(begin + chunk_pixels, pixels())};
  }
  Strides strides(bool of_interleaved) const {
    return of_interleaved ? Strides{channels, 1} : Strides{1, pixels()};
  }
  int64_t channels, height, width;
  bool interleaved;
  const Affine* affine;
  bool uniform;  // whether all channels have the same constants
  double least_scale = HUGE_VAL, greatest_scale = 0;
  int64_t chunks, chunk_pixels, period;  // chunks of a sample, each of at most chunk_pixels
  std::vector<double> shifts, scales;
  std::vector<float> shift_highs, shift_lows, near_scales;
  std::vector<int32_t> least;
  bool estimable = true, exact_shift = true;
  bool streams = false;  // whether stores bypass the caches
};

// Inputs of the backward pass, shared by its tasks.
struct BackwardTask {
  const Problem& p;
  const Geometry& g;
  const Images& gradient;
  const Gradients& to;
  double* psi_parts;  // of each chunk, or null
};

// Calls visit(offset in the chunk, pixel of the image, count, step) for runs of the image's pixels.
template <class F>
void for_segments(const Geometry& g, const Chunk& chunk, bool flip, F&& visit) {
  if (!flip) return visit(0, chunk.begin, chunk.end - chunk.begin, 1);
  for (int64_t pixel = chunk.begin; pixel < chunk.end;) {
    const int64_t row = pixel / g.width, column = pixel % g.width;
    const int64_t count = std::min(g.width - column, chunk.end - pixel);
    visit(pixel - chunk.begin, row * g.width + g.width - 1 - column, count, -1);
    pixel += count;
  }
}

// Masks that pick one of three channels from 48 bytes (three vectors, 16 pixels): no two vectors
// have a byte of it at the same position, so they are blended (0x80: from this part) and then
// permuted.
struct ThreeMasks {
  constexpr ThreeMasks() : part(), order() {
    for (int channel = 0; channel < 3; ++channel) {
      for (int i = 0; i < 16; ++i) {
        const int source = 3 * i + channel;
        part[source / 16][channel][source % 16] = 0x80;
        order[0][channel][i] = order[1][channel][15 - i] = uint8_t(source % 16);
      }
    }
  }
  alignas(16) uint8_t part[3][3][16];
  alignas(16) uint8_t order[2][3][16];  // [1]: backwards
};
[[maybe_unused]] constexpr ThreeMasks kThreeMasks;

}  // namespace
}  // namespace synface::domain_mixup

#define SYNFACE_ISA_SOURCE "domain_mixup/cpu-inl.h"
#include "simd/foreach_isa.h"

namespace synface::domain_mixup {
namespace {

// Whether stores may bypass the caches: all vectors of all samples are aligned.
bool streams(const Problem& p, const MutableImages& out) {
  const int64_t item = int64_t(bytes(out.dtype)), plane = p.height * p.width * item;
  return p.batch * p.channels * plane >= kStreamBytes &&
         reinterpret_cast<uintptr_t>(out.data) % kVector == 0 &&
         out.sample_stride * item % kVector == 0 && (out.interleaved || plane % kVector == 0);
}

// Calls run(range) on ranges of all chunks, in parallel.
template <class F>
void for_chunks(const Problem& p, const Runtime& runtime, const Geometry& g, F&& run) {
  const int64_t count = p.batch * g.chunks;
  const int64_t worth = ceil_div(p.batch * g.pixels() * p.channels, kTaskElements);
  const int64_t tasks = std::min({count, worth, kTasksPerThread * runtime.threads});
  runtime.parallel(int(tasks), [&](int task) { run(part_of(count, tasks, task)); });
}

}  // namespace

void forward(const Problem& p, const Runtime& runtime, const MutableImages& out) {
  if (p.batch * p.channels * p.height * p.width == 0) return;
  Geometry g(p, out.interleaved);
  g.streams = streams(p, out);
  const auto range = SYNFACE_DISPATCH(forward_range);
  for_chunks(p, runtime, g, [&](Range chunks) { range(p, out, g, chunks); });
}

void backward(const Problem& p, const Runtime& runtime, const Images& gradient,
              const Gradients& to) {
  if (to.psi) std::fill_n(to.psi, p.batch, 0.0);
  if (p.batch * p.channels * p.height * p.width == 0) return;
  const Geometry g(p, gradient.interleaved);
  std::vector<double> psi_parts(to.psi ? size_t(p.batch * g.chunks) : 0);
  const BackwardTask task{.p = p,
                          .g = g,
                          .gradient = gradient,
                          .to = to,
                          .psi_parts = to.psi ? psi_parts.data() : nullptr};
  const auto range = SYNFACE_DISPATCH(backward_range);
  for_chunks(p, runtime, g, [&](Range chunks) { range(task, chunks); });
  for (size_t i = 0; i < psi_parts.size(); ++i) to.psi[i / size_t(g.chunks)] += psi_parts[i];
}

}  // namespace synface::domain_mixup
