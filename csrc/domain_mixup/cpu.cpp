#include "domain_mixup/cpu.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "simd/isa.h"
#include "simd/scalar.h"

#if SYNFACE_X86
#include <immintrin.h>
#endif

namespace synface::domain_mixup {
namespace {

// Elements of a chunk: few, so that the arranging of one overlaps with the arithmetic of another.
constexpr int64_t kChunkElements = 1536;
// Loops over bytes do so many at a time with the widest vectors.
constexpr int64_t kVector = 64;
// Elements that are rounded, and where need be rounded again with more care, together.
constexpr int64_t kBlock = 128;
// Elements that are worth a task of their own.
constexpr int64_t kTaskElements = 32768;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
};

struct Strides {
  int64_t pixel, channel;
};

// Pixels of one sample.
struct Chunk {
  int64_t sample, begin, end;
};

// The result's order, and how its samples are cut into chunks. The cut depends on the shape alone,
// so that sums do not depend on the number of threads.
struct Geometry {
  Geometry(const Problem& p, bool interleaved)
      : channels(p.channels), height(p.height), width(p.width), interleaved(interleaved) {
    const int64_t most = std::max(kVector, kChunkElements / channels);
    chunks = std::max<int64_t>(1, ceil_div(pixels(), most));
    chunk_pixels = ceil_div(ceil_div(pixels(), chunks), kVector) * kVector;
    chunks = std::max<int64_t>(1, ceil_div(pixels(), chunk_pixels));
    const bool uniform = std::all_of(p.affine, p.affine + channels, [&](const Affine& affine) {
      return affine.shift == p.affine->shift && affine.scale == p.affine->scale;
    });
    // Interleaved channels that differ: their constants as often as fills vectors.
    const int64_t whole = std::lcm(channels, kVector);
    period = uniform || !interleaved   ? 1
             : whole <= kChunkElements ? whole
                                       : channels * ceil_div(kVector, channels);
    for (int64_t i = 0; i < std::max(period, channels); ++i) {
      shift.push_back(p.affine[i % channels].shift);
      scale.push_back(p.affine[i % channels].scale);
    }
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
  int64_t chunks, chunk_pixels, period;  // chunks of a sample, each of at most chunk_pixels
  std::vector<double> shift, scale;
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

// Which bytes of three vectors (48 bytes, 16 pixels) make up one of three channels: byte shuffles,
// where 0x80 gives 0.
struct ThreeMasks {
  constexpr ThreeMasks() : bytes() {
    for (int flip = 0; flip < 2; ++flip) {
      for (int channel = 0; channel < 3; ++channel) {
        for (int i = 0; i < 16; ++i) {
          const int source = 3 * (flip ? 15 - i : i) + channel;
          for (int part = 0; part < 3; ++part) {
            bytes[flip][channel][part][i] =
                source / 16 == part ? uint8_t(source % 16) : uint8_t(0x80);
          }
        }
      }
    }
  }
  alignas(16) uint8_t bytes[2][3][3][16];
};
[[maybe_unused]] constexpr ThreeMasks kThreeMasks;

}  // namespace
}  // namespace synface::domain_mixup

#define SYNFACE_ISA_SOURCE "domain_mixup/cpu-inl.h"
#include "simd/foreach_isa.h"

namespace synface::domain_mixup {
namespace {

// run(range) over all chunks, in parallel.
template <class F>
void for_chunks(const Problem& p, const Runtime<double>& runtime, const Geometry& g, F&& run) {
  const int64_t count = p.batch * g.chunks;
  const int64_t worth = ceil_div(p.batch * g.pixels() * p.channels, kTaskElements);
  const int64_t tasks = std::min({count, worth, kTasksPerThread * runtime.threads});
  runtime.parallel(int(tasks),
                   [&](int task) { run(Range{count * task / tasks, count * (task + 1) / tasks}); });
}

}  // namespace

void forward(const Problem& p, const Runtime<double>& runtime, const MutableImages& out) {
  if (p.batch * p.channels * p.height * p.width == 0) return;
  const Geometry g(p, out.interleaved);
  const auto range = SYNFACE_PICK(forward_range);
  for_chunks(p, runtime, g, [&](Range chunks) { range(p, out, g, chunks); });
}

void backward(const Problem& p, const Runtime<double>& runtime, const Images& gradient,
              const MutableImages& grad_synthetic, const MutableImages& grad_real,
              double* grad_psi) {
  if (grad_psi) std::fill_n(grad_psi, p.batch, 0.0);
  if (p.batch * p.channels * p.height * p.width == 0) return;
  const Geometry g(p, gradient.interleaved);
  std::vector<double> psi_parts(grad_psi ? size_t(p.batch * g.chunks) : 0);
  const auto range = SYNFACE_PICK(backward_range);
  for_chunks(p, runtime, g, [&](Range chunks) {
    range(p, gradient, grad_synthetic, grad_real, grad_psi ? psi_parts.data() : nullptr, g, chunks);
  });
  for (size_t i = 0; i < psi_parts.size(); ++i) grad_psi[i / size_t(g.chunks)] += psi_parts[i];
}

}  // namespace synface::domain_mixup
