// Threads are independent of one another: no shared memory, no synchronization, no atomics. So the
// same source also runs on a host, one thread after the other, where a test compares it bitwise
// with the CPU kernel (tests/cuda/emulated.cpp, which defines SYNFACE_LAUNCH).
#include "domain_mixup/cuda.h"

#include <type_traits>

#ifndef SYNFACE_LAUNCH
#include <cuda_runtime.h>
#define SYNFACE_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace synface::domain_mixup {
namespace {

constexpr int kThreads = 128;
constexpr int kGroup = 16;             // pixels of a thread where all images are aligned
constexpr int64_t kPsiThreads = 1024;  // partial sums of each sample

struct alignas(16) Vector {
  uint32_t words[4];
};

// (B, C, H, W) by strides, in elements.
struct View {
  const void* data;
  Dtype dtype;
  int64_t sample, channel, pixel;
};

struct Sides {
  View synthetic, real;
  const double* psi;
  const Affine* affine;
  const bool *flip_synthetic, *flip_real;
  int64_t batch, channels, width, pixels;
};

__device__ double load(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::u8:
      return static_cast<const uint8_t*>(data)[i];
    case Dtype::bf16:
      return from_bf16(static_cast<const uint16_t*>(data)[i]);
    case Dtype::f16:
      return from_f16(static_cast<const uint16_t*>(data)[i]);
    case Dtype::f64:
      return static_cast<const double*>(data)[i];
    default:
      return static_cast<const float*>(data)[i];
  }
}

__device__ void store(void* data, Dtype dtype, int64_t i, double x) {
  switch (dtype) {
    case Dtype::bf16:
      static_cast<uint16_t*>(data)[i] = Bfloat16::rounded(x);
      return;
    case Dtype::f16:
      static_cast<uint16_t*>(data)[i] = Float16::rounded(x);
      return;
    case Dtype::f64:
      static_cast<double*>(data)[i] = x;
      return;
    default:
      static_cast<float*>(data)[i] = float(x);
  }
}

__device__ bool flips(const bool* flip, int64_t sample) { return flip && flip[sample]; }

// Returns the pixel of an image that a pixel of the result comes from.
__device__ int64_t source(const Sides& p, bool flip, int64_t pixel) {
  return flip ? pixel + p.width - 1 - 2 * (pixel % p.width) : pixel;
}

struct Element {
  int64_t sample, channel, pixel;
};

// Returns the i-th element in the order of the result's memory, so that writes are coalesced.
__device__ Element element(const Sides& p, bool interleaved, int64_t i) {
  const int64_t size = p.channels * p.pixels, sample = i / size, rest = i % size;
  if (interleaved) return {sample, rest % p.channels, rest / p.channels};
  return {sample, rest / p.pixels, rest % p.pixels};
}

__device__ int64_t offset(const View& view, const Element& e, int64_t pixel) {
  return e.sample * view.sample + e.channel * view.channel + pixel * view.pixel;
}

__device__ double of_side(const Sides& p, const View& view, const bool* flip, const Element& e) {
  const int64_t pixel = source(p, flips(flip, e.sample), e.pixel);
  return load(view.data, view.dtype, offset(view, e, pixel));
}

// Mixes images of any types, orders and alignments: an element per thread and iteration.
__global__ void mix_elements(Sides p, View out, bool interleaved) {
  const int64_t count = p.batch * p.channels * p.pixels;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x) {
    const Element e = element(p, interleaved, i);
    const Blend blend{p.psi[e.sample], 1 - p.psi[e.sample]};
    const double x = mix(of_side(p, p.synthetic, p.flip_synthetic, e),
                         of_side(p, p.real, p.flip_real, e), blend, p.affine[e.channel]);
    store(const_cast<void*>(out.data), out.dtype, offset(out, e, e.pixel), x);
  }
}

// The bytes of 16 interleaved pixels, loaded 16 bytes at a time, and turned if they are flipped.
// They stay in registers, as all indices are constant once the loops are unrolled.
template <int kChannels>
struct Group {
  __device__ Group(const uint8_t* from, bool flip) {
    static_assert(sizeof(Vector) == kGroup);
#pragma unroll
    for (int part = 0; part < kChannels; ++part) {
      vectors[part] = reinterpret_cast<const Vector*>(from)[part];
    }
    if (flip) turn();
  }
  __device__ void turn() {
    Vector turned[kChannels] = {};
#pragma unroll
    for (int i = 0; i < kGroup * kChannels; ++i) {
      const uint32_t value = at(kGroup - 1 - i / kChannels, i % kChannels);
      turned[i / 16].words[i % 16 / 4] |= value << (i % 4 * 8);
    }
#pragma unroll
    for (int part = 0; part < kChannels; ++part) vectors[part] = turned[part];
  }
  __device__ uint32_t at(int pixel, int channel) const {
    const int i = pixel * kChannels + channel;
    return vectors[i / 16].words[i % 16 / 4] >> (i % 4 * 8) & 255u;
  }
  Vector vectors[kChannels];
};

// Makes the compiler forget where a pointer points to, so that it loads from there only now.
template <class T>
__device__ void hide(T*& pointer) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(pointer));
#endif
}

// Returns a byte as a float, above 2^23: the difference of two is that of the bytes, without the
// slow conversions of integers.
__device__ float above_2_23(uint32_t byte) { return std::bit_cast<float>(0x4b000000u | byte); }

// A channel's constants for estimates in float32, for a share ψ.
struct Near {
  __device__ Near(Split psi, Affine affine)
      : shift(affine.shift), scale(float(affine.scale)), least(0x7fffffff) {
    // What the proof covers; all else is computed exactly, as nothing reaches that least.
    const bool estimable = psi.high >= 0 && psi.high <= 1 && shift.high >= 0 && shift.high <= 255 &&
                           scale > 0x1p-59f && scale < 0x1p59f;
    if (!estimable) return;
    const bool exact = psi.low == 0 && shift.low == 0;
    least = exact ? 0 : std::bit_cast<int32_t>(0x1p-6f * scale) + int32_t(kOff);
  }
  Split shift;
  float scale;
  int32_t least;  // the bits of the least |x| for which an estimate is valid
};

template <int kChannels>
struct Nears {
  __device__ Nears(Split psi, const Affine* affine)
      : first(psi, affine[0]), rest(psi, affine + 1) {}
  __device__ const Near& operator[](int channel) const {
    return channel == 0 ? first : rest[channel - 1];
  }
  Near first;
  Nears<kChannels - 1> rest;
};
template <>
struct Nears<1> {
  __device__ Nears(Split psi, const Affine* affine) : first(psi, affine[0]) {}
  __device__ const Near& operator[](int) const { return first; }
  Near first;
};

// Returns the bfloat16 of an element, and sets bits of `unsure` where float32 does not determine
// it.
__device__ uint16_t estimate(uint32_t synthetic, uint32_t real, Split psi, const Near& near,
                             uint32_t& unsure) {
  const float minus = above_2_23(synthetic) - above_2_23(real);
  const float plus = above_2_23(real) - 0x1p23f;
  const float high = psi.high * minus + (plus - near.shift.high);
  const float low = psi.low * minus - near.shift.low;
  const uint32_t bits = std::bit_cast<uint32_t>((high + low) * near.scale);
  const int32_t above_least = int32_t(bits & 0x7fffffffu) - near.least;
  const uint32_t inward = bits + 0x8000u - kOff, outward = bits + 0x8000u + kOff;
  unsure |= (inward ^ outward) >> 16 | uint32_t(above_least) >> 31;
  return uint16_t(inward >> 16);
}

// Stores 16 bytes at an aligned address at once; of plain stores, the compiler splits some.
__device__ void store_vector(void* to, const Vector& vector) {
#ifdef __CUDA_ARCH__
  const auto [a, b, c, d] = vector.words;
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c),
               "r"(d));
#else
  *static_cast<Vector*>(to) = vector;
#endif
}

// Returns the 16 bytes of an array, word by word.
template <class Storage, int kCount>
__device__ Vector packed(const Storage (&part)[kCount]) {
  static_assert(sizeof(part) == sizeof(Vector));
  Vector vector;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    if constexpr (sizeof(Storage) == 2) {
      vector.words[word] = part[2 * word] | uint32_t(part[2 * word + 1]) << 16;
    } else if constexpr (sizeof(Storage) == 4) {
      vector.words[word] = std::bit_cast<uint32_t>(part[word]);
    } else {
      const uint64_t bits = std::bit_cast<uint64_t>(part[word / 2]);
      vector.words[word] = uint32_t(bits >> (word % 2 * 32));
    }
  }
  return vector;
}

// Mixes bytes into any type, 16 aligned pixels per thread, of kChannels interleaved channels or of
// one plane. Reads and writes 16 bytes at a time.
template <class Out, int kChannels, bool kInterleavedOut>
__global__ void __launch_bounds__(kThreads, 5) mix_groups(Sides p, View out) {
  using Storage = typename Out::Storage;
  constexpr int kPerVector = sizeof(Vector) / sizeof(Storage);
  const int64_t planes = kChannels == 1 ? p.channels : 1;
  const int64_t groups = p.pixels / kGroup, count = p.batch * planes * groups;
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < count;
       index += int64_t(gridDim.x) * blockDim.x) {
    const Element e{index / (planes * groups), index / groups % planes, index % groups * kGroup};
    const bool flip_synthetic = flips(p.flip_synthetic, e.sample);
    const bool flip_real = flips(p.flip_real, e.sample);
    // A flip takes an aligned group to an aligned group, its pixels backwards.
    const auto start = [&](const View& view, bool flip) {
      const int64_t pixel = source(p, flip, e.pixel) - (flip ? kGroup - 1 : 0);
      return static_cast<const uint8_t*>(view.data) + offset(view, e, pixel);
    };
    const Group<kChannels> synthetic(start(p.synthetic, flip_synthetic), flip_synthetic);
    const Group<kChannels> real(start(p.real, flip_real), flip_real);
    const auto value = [&](int channel, int pixel, const double* psi, const Affine* affine) {
      return Out::rounded(mix(double(synthetic.at(pixel, channel)), double(real.at(pixel, channel)),
                              Blend{*psi, 1 - *psi}, affine[channel]));
    };
    const double* exact_psi = p.psi + e.sample;
    const Affine* exact_affine = p.affine + e.channel;
    const Split psi(*exact_psi);
    const Nears<kChannels> near(psi, exact_affine);
    Storage* target = static_cast<Storage*>(const_cast<void*>(out.data)) + offset(out, e, e.pixel);
#pragma unroll
    for (int first = 0; first < kGroup * kChannels; first += kPerVector) {
      Storage part[kPerVector];
      const auto for_part = [&](auto&& visit) {
#pragma unroll
        for (int i = 0; i < kPerVector; ++i) {
          const int at = first + i;
          kInterleavedOut ? visit(i, at % kChannels, at / kChannels)
                          : visit(i, at / kGroup, at % kGroup);
        }
      };
      const auto exactly = [&](int i, int channel, int pixel) {
        part[i] = value(channel, pixel, exact_psi, exact_affine);
      };
      if constexpr (std::is_same_v<Out, Bfloat16>) {
        uint32_t unsure = 0;
        for_part([&](int i, int channel, int pixel) {
          part[i] = estimate(synthetic.at(pixel, channel), real.at(pixel, channel), psi,
                             near[channel], unsure);
        });
        if (unsure) {  // seldom: its constants should take no registers otherwise
          hide(exact_psi);
          hide(exact_affine);
          for_part(exactly);
        }
      } else {
        for_part(exactly);
      }
      const int channel = kInterleavedOut ? 0 : first / kGroup;
      const int rest = kInterleavedOut ? first : first % kGroup;
      store_vector(target + channel * out.channel + rest, packed(part));
    }
  }
}

__global__ void image_gradients(Sides p, View gradient, bool interleaved, View grad_synthetic,
                                View grad_real) {
  const int64_t count = p.batch * p.channels * p.pixels;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x) {
    const Element e = element(p, interleaved, i);
    const double psi = p.psi[e.sample];
    const double mixed = mixed_gradient(
        load(gradient.data, gradient.dtype, offset(gradient, e, e.pixel)), p.affine[e.channel]);
    const auto give = [&](const View& view, const bool* flip, double share) {
      if (!view.data) return;
      const int64_t pixel = source(p, flips(flip, e.sample), e.pixel);
      store(const_cast<void*>(view.data), view.dtype, offset(view, e, pixel),
            multiply(share, mixed));
    };
    give(grad_synthetic, p.flip_synthetic, psi);
    give(grad_real, p.flip_real, 1 - psi);
  }
}

// Computes a partial sum of a sample's gradient of ψ per thread.
__global__ void psi_parts(Sides p, View gradient, bool interleaved, double* parts) {
  const int64_t size = p.channels * p.pixels;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.batch * kPsiThreads;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t sample = i / kPsiThreads;
    double sum = 0;
    for (int64_t at = i % kPsiThreads; at < size; at += kPsiThreads) {
      const Element e = element(p, interleaved, sample * size + at);
      const double mixed = mixed_gradient(
          load(gradient.data, gradient.dtype, offset(gradient, e, e.pixel)), p.affine[e.channel]);
      sum += multiply(
          mixed, of_side(p, p.synthetic, p.flip_synthetic, e) - of_side(p, p.real, p.flip_real, e));
    }
    parts[i] = sum;
  }
}

__global__ void psi_sums(const double* parts, int64_t batch, double* grad_psi) {
  for (int64_t b = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; b < batch;
       b += int64_t(gridDim.x) * blockDim.x) {
    double sum = 0;
    for (int64_t i = 0; i < kPsiThreads; ++i) sum += parts[b * kPsiThreads + i];
    grad_psi[b] = sum;
  }
}

// Returns the grid size; beyond its limit threads take several iterations.
unsigned blocks_for(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return unsigned(blocks < 65536 ? blocks : 65536);
}

template <class Data>
View view_of(const ImagesOf<Data>& images, const Problem& p) {
  const int64_t pixels = p.height * p.width;
  return {.data = images.data,
          .dtype = images.dtype,
          .sample = images.sample_stride,
          .channel = images.interleaved ? 1 : pixels,
          .pixel = images.interleaved ? p.channels : 1};
}

Sides sides_of(const Problem& p) {
  return {.synthetic = view_of(p.synthetic, p),
          .real = view_of(p.real, p),
          .psi = p.psi,
          .affine = p.affine,
          .flip_synthetic = p.flip_synthetic,
          .flip_real = p.flip_real,
          .batch = p.batch,
          .channels = p.channels,
          .width = p.width,
          .pixels = p.height * p.width};
}

template <class Data>
bool aligned(const ImagesOf<Data>& images, int64_t element) {
  return reinterpret_cast<uintptr_t>(images.data) % sizeof(Vector) == 0 &&
         images.sample_stride * element % int64_t(sizeof(Vector)) == 0;
}

template <class Out>
bool launch_groups(const Problem& p, const MutableImages& out, void* stream) {
  const bool both = p.synthetic.interleaved == p.real.interleaved;
  const bool by_row = !p.flip_synthetic && !p.flip_real;
  if (p.synthetic.dtype != Dtype::u8 || !both || !aligned(p.synthetic, 1) || !aligned(p.real, 1) ||
      !aligned(out, sizeof(typename Out::Storage)) ||
      (by_row ? p.height * p.width : p.width) % kGroup != 0) {
    return false;
  }
  const Sides sides = sides_of(p);
  const View target = view_of(out, p);
  const int64_t groups = p.batch * (p.height * p.width / kGroup);
  const bool planar = !p.synthetic.interleaved;
  if (p.channels == 3 && !planar && out.interleaved) {
    SYNFACE_LAUNCH((mix_groups<Out, 3, true>), blocks_for(groups), kThreads, stream, sides, target);
  } else if (p.channels == 3 && !planar) {
    SYNFACE_LAUNCH((mix_groups<Out, 3, false>), blocks_for(groups), kThreads, stream, sides,
                   target);
  } else if (planar && !out.interleaved) {
    SYNFACE_LAUNCH((mix_groups<Out, 1, false>), blocks_for(groups * p.channels), kThreads, stream,
                   sides, target);
  } else {
    return false;
  }
  return true;
}

bool launch_groups(const Problem& p, const MutableImages& out, void* stream) {
  switch (out.dtype) {
    case Dtype::bf16:
      return launch_groups<Bfloat16>(p, out, stream);
    case Dtype::f16:
      return launch_groups<Float16>(p, out, stream);
    case Dtype::f64:
      return launch_groups<Float64>(p, out, stream);
    default:
      return launch_groups<Float32>(p, out, stream);
  }
}

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* forward_cuda(const Problem& p, const MutableImages& out, void* stream) {
  const int64_t count = p.batch * p.channels * p.height * p.width;
  if (count == 0) return nullptr;
  if (!launch_groups(p, out, stream)) {
    SYNFACE_LAUNCH(mix_elements, blocks_for(count), kThreads, stream, sides_of(p), view_of(out, p),
                   out.interleaved);
  }
  return last_error();
}

int64_t psi_workspace(const Problem& p) { return p.batch * kPsiThreads; }

const char* backward_cuda(const Problem& p, const Images& gradient, const Gradients& to,
                          double* workspace, void* stream) {
  if (p.batch == 0) return nullptr;
  const Sides sides = sides_of(p);
  const View from = view_of(gradient, p);
  const int64_t count = p.batch * p.channels * p.height * p.width;
  if (count && (to.synthetic.data || to.real.data)) {
    SYNFACE_LAUNCH(image_gradients, blocks_for(count), kThreads, stream, sides, from,
                   gradient.interleaved, view_of(to.synthetic, p), view_of(to.real, p));
  }
  if (to.psi) {
    SYNFACE_LAUNCH(psi_parts, blocks_for(p.batch * kPsiThreads), kThreads, stream, sides, from,
                   gradient.interleaved, workspace);
    SYNFACE_LAUNCH(psi_sums, blocks_for(p.batch), kThreads, stream,
                   static_cast<const double*>(workspace), p.batch, to.psi);
  }
  return last_error();
}

}  // namespace synface::domain_mixup
