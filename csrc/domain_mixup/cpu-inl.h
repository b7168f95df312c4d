// Loops over chunks of samples. Included once per instruction set by simd/foreach_isa.h; plain
// loops, which the compiler vectorizes for that set, except for the bytes of three channels. With
// AVX-512 bytes take those of bytes-inl.h.

namespace synface::domain_mixup {
namespace {
namespace SYNFACE_ISA_NAMESPACE {

// Splits three interleaved channels of bytes into three planes; backwards through the pixels for a
// flip. Returns how many pixels it has done; fewer than 32 are left.
#if SYNFACE_FMA
inline __m256i load_lanes(const uint8_t* low, const uint8_t* high) {
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}
inline __m256i load_twice(const uint8_t* mask) { return load_lanes(mask, mask); }

// Each lane holds 16 pixels, so that no byte crosses lanes.
template <bool kFlip>
int64_t split_three(uint8_t* to, int64_t plane, const uint8_t* from, int64_t pixels) {
  int64_t done = 0;
  for (; done + 32 <= pixels; done += 32) {
    const uint8_t* lane0 = kFlip ? from - 3 * (done + 15) : from + 3 * done;
    const uint8_t* lane1 = lane0 + (kFlip ? -48 : 48);
    const __m256i a = load_lanes(lane0, lane1), b = load_lanes(lane0 + 16, lane1 + 16),
                  c = load_lanes(lane0 + 32, lane1 + 32);
    for (int channel = 0; channel < 3; ++channel) {
      const __m256i ab = _mm256_blendv_epi8(a, b, load_twice(kThreeMasks.part[1][channel]));
      const __m256i abc = _mm256_blendv_epi8(ab, c, load_twice(kThreeMasks.part[2][channel]));
      const __m256i plane_bytes =
          _mm256_shuffle_epi8(abc, load_twice(kThreeMasks.order[kFlip][channel]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + channel * plane + done), plane_bytes);
    }
  }
  return done;
}
#else
template <bool kFlip>
int64_t split_three(uint8_t*, int64_t, const uint8_t*, int64_t) {
  return 0;
}
#endif

template <class To, class From, class Convert>
void transfer(To* to, int64_t to_pixel, int64_t to_channel, const From* from, int64_t from_pixel,
              int64_t from_channel, int64_t pixels, int64_t channels, Convert convert) {
  if (to_pixel == 1 || from_pixel == 1) {
    for (int64_t c = 0; c < channels; ++c, to += to_channel, from += from_channel) {
      if (to_pixel == 1 && from_pixel == 1) {
#pragma omp simd
        for (int64_t i = 0; i < pixels; ++i) to[i] = convert(from[i]);
      } else if (to_pixel == 1 && from_pixel == -1) {
#pragma omp simd
        for (int64_t i = 0; i < pixels; ++i) to[i] = convert(from[-i]);
      } else {
        for (int64_t i = 0; i < pixels; ++i) to[i * to_pixel] = convert(from[i * from_pixel]);
      }
    }
    return;
  }
  for (int64_t i = 0; i < pixels; ++i, to += to_pixel, from += from_pixel) {
    for (int64_t c = 0; c < channels; ++c) to[c * to_channel] = convert(from[c * from_channel]);
  }
}

// A chunk's elements in the result's memory order; channel c begins at data + c·plane.
template <class T>
struct Arranged {
  const T* data;
  int64_t plane;
};

template <class From, class To, class Convert>
Arranged<To> arrange(const Images& image, bool flip, const Geometry& g, const Chunk& chunk,
                     To* buffer, Convert convert) {
  const From* sample = static_cast<const From*>(image.data) + chunk.sample * image.sample_stride;
  const int64_t pixels = chunk.end - chunk.begin;
  const Strides from = g.strides(image.interleaved);
  if constexpr (std::is_same_v<From, To>) {
    if (!flip && image.interleaved == g.interleaved) {
      return {sample + chunk.begin * from.pixel, from.channel};
    }
  }
  const Strides to = g.interleaved ? Strides{g.channels, 1} : Strides{1, pixels};
  for_segments(g, chunk, flip, [&](int64_t at, int64_t pixel, int64_t count, int64_t step) {
    int64_t done = 0;
    if constexpr (std::is_same_v<From, uint8_t>) {
      if (from.pixel == 3 && to.pixel == 1) {
        const auto split = flip ? split_three<true> : split_three<false>;
        done = split(buffer + at, to.channel, sample + pixel * 3, count);
      }
    }
    transfer(buffer + (at + done) * to.pixel, to.pixel, to.channel,
             sample + (pixel + done * step) * from.pixel, from.pixel * step, from.channel,
             count - done, g.channels, convert);
  });
  return {buffer, to.channel};
}

template <class T>
Arranged<T> arrange(const Images& image, bool flip, const Geometry& g, const Chunk& chunk,
                    T* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    if (image.dtype == Dtype::bf16) {
      return arrange<uint16_t>(image, flip, g, chunk, buffer, from_bf16);
    }
    if (image.dtype == Dtype::f16) {
      return arrange<uint16_t>(image, flip, g, chunk, buffer, from_f16);
    }
  }
  return arrange<T>(image, flip, g, chunk, buffer, [](T x) { return x; });
}

// `affine(i)` gives the i-th element's normalization.
template <class Out, class In, class AffineAt>
void mix_exactly(const In* __restrict synthetic, const In* __restrict real, Blend blend,
                 const AffineAt& affine, typename Out::Storage* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = Out::rounded(mix(double(synthetic[i]), double(real[i]), blend, affine(i)));
  }
}

// Rounds to 16 bits; returns whether there may be a tie.
template <class Out>
bool round_on(const float* __restrict from, uint16_t* __restrict to, int64_t n) {
  uint32_t ties = 0;
#pragma omp simd reduction(| : ties)
  for (int64_t i = 0; i < n; ++i) {
    to[i] = Out::round(from[i]);
    ties |= uint32_t(Out::tie(from[i]));
  }
  return ties != 0;
}

#if SYNFACE_VECTOR_BYTES < 64
// Mixes kGroup bytes to bfloat16 by float32 arithmetic; returns false where that does not determine
// how one rounds.
template <bool kUniform>
bool estimate(const uint8_t* __restrict synthetic, const uint8_t* __restrict real, Split psi,
              const Constants& constants, bool exact, uint16_t* __restrict to) {
  const float* __restrict shift_high = constants.shift_high;
  const float* __restrict shift_low = constants.shift_low;
  const float* __restrict scale = constants.near_scale;
  const int32_t* __restrict least = constants.least;
  const float high0 = *shift_high, low0 = *shift_low, scale0 = *scale;
  const int32_t any = exact ? 0 : -1, least0 = *least & any;
  uint32_t unsure = 0;
#pragma omp simd reduction(| : unsure)
  for (int64_t i = 0; i < kGroup; ++i) {
    const float minus = float(int32_t(synthetic[i]) - int32_t(real[i])), plus = float(real[i]);
    const float high = psi.high * minus + plus - (kUniform ? high0 : shift_high[i]);
    const float low = psi.low * minus - (kUniform ? low0 : shift_low[i]);
    const float x = (high + low) * (kUniform ? scale0 : scale[i]);
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const int32_t above_least = int32_t(bits & 0x7fffffffu) - (kUniform ? least0 : least[i] & any);
    const uint32_t inward = bits + 0x8000u - kOff, outward = bits + 0x8000u + kOff;
    to[i] = uint16_t(inward >> 16);
    unsure |= (inward ^ outward) >> 16 | uint32_t(above_least) >> 31;
  }
  return unsure == 0;
}
#endif

template <class Out, class In, bool kUniform>
void mix_block(const In* synthetic, const In* real, Blend blend, const Constants& constants,
               typename Out::Storage* to, int64_t n) {
  const auto exactly = [&](auto type, int64_t at, int64_t count, auto* target) {
    using To = decltype(type);
    if constexpr (kUniform) {
      const Affine affine{constants.shift[0], constants.scale[0]};
      mix_exactly<To>(
          synthetic + at, real + at, blend, [affine](int64_t) { return affine; }, target, count);
    } else {
      const double* __restrict shift = constants.shift + at;
      const double* __restrict scale = constants.scale + at;
      mix_exactly<To>(
          synthetic + at, real + at, blend,
          [shift, scale](int64_t i) { return Affine{shift[i], scale[i]}; }, target, count);
    }
  };
  int64_t done = 0;
  if constexpr (sizeof(typename Out::Storage) == 2) {
#if SYNFACE_VECTOR_BYTES < 64
    if constexpr (std::is_same_v<In, uint8_t> && std::is_same_v<Out, Bfloat16>) {
      const Split psi(blend.psi);
      const bool exact = psi.low == 0 && constants.exact_shift;
      for (; constants.estimable && done + kGroup <= n; done += kGroup) {
        if (!estimate<kUniform>(synthetic + done, real + done, psi,
                                constants.from(kUniform ? 0 : done), exact, to + done)) {
          exactly(Out(), done, kGroup, to + done);
        }
      }
    }
#endif
    float wide[kGroup];
    for (; done < n; done += kGroup) {
      const int64_t count = std::min(kGroup, n - done);
      exactly(Float32(), done, count, wide);
      if (round_on<Out>(wide, to + done, count)) exactly(Out(), done, count, to + done);
    }
  } else {
    exactly(Out(), 0, n, to);
  }
}

// Mixes elements whose constants repeat after `period` of them; 1: they are the same for all.
template <class Out, class In>
void mix_run(const In* synthetic, const In* real, Blend blend, const Constants& constants,
             int64_t period, typename Out::Storage* to, int64_t n) {
  if (period == 1) return mix_block<Out, In, true>(synthetic, real, blend, constants, to, n);
  for (int64_t start = 0; start < n; start += period) {
    mix_block<Out, In, false>(synthetic + start, real + start, blend, constants, to + start,
                              std::min(period, n - start));
  }
}

template <class Out, class In>
void forward_as(const Problem& p, const MutableImages& out, const Geometry& g, Range range) {
  using Storage = typename Out::Storage;
  const int64_t size = g.chunk_pixels * g.channels;
  const int64_t runs = g.interleaved ? 1 : g.channels;
  std::vector<In> synthetic_buffer(size), real_buffer(size);
  for (int64_t index = range.begin; index < range.end; ++index) {
    const Chunk chunk = g.chunk(index);
    const int64_t b = chunk.sample, n = (chunk.end - chunk.begin) * g.channels / runs;
    const Blend blend{p.psi[b], 1 - p.psi[b]};
    const auto synthetic = arrange(p.synthetic, p.flip_synthetic && p.flip_synthetic[b], g, chunk,
                                   synthetic_buffer.data());
    const auto real = arrange(p.real, p.flip_real && p.flip_real[b], g, chunk, real_buffer.data());
    const Strides to = g.strides(g.interleaved);
    Storage* result =
        static_cast<Storage*>(out.data) + b * out.sample_stride + chunk.begin * to.pixel;
    for (int64_t c = 0; c < runs; ++c, result += to.channel) {
      mix_run<Out>(synthetic.data + c * synthetic.plane, real.data + c * real.plane, blend,
                   g.constants().from(c), g.period, result, n);
    }
  }
}

#include "domain_mixup/bytes-inl.h"

template <class Out>
void forward_to(const Problem& p, const MutableImages& out, const Geometry& g, Range range) {
#if SYNFACE_VECTOR_BYTES == 64
  if constexpr (!std::is_same_v<Out, Float64>) {
    if (fits_bytes<Out>(p, g)) {
      return g.streams ? forward_bytes<Out, true>(p, out, g, range)
                       : forward_bytes<Out, false>(p, out, g, range);
    }
  }
#endif
  switch (p.synthetic.dtype) {
    case Dtype::u8:
      return forward_as<Out, uint8_t>(p, out, g, range);
    case Dtype::f64:
      return forward_as<Out, double>(p, out, g, range);
    default:
      return forward_as<Out, float>(p, out, g, range);
  }
}

void forward_range(const Problem& p, const MutableImages& out, const Geometry& g, Range range) {
  switch (out.dtype) {
    case Dtype::f64:
      return forward_to<Float64>(p, out, g, range);
    case Dtype::bf16:
      return forward_to<Bfloat16>(p, out, g, range);
    case Dtype::f16:
      return forward_to<Float16>(p, out, g, range);
    default:
      return forward_to<Float32>(p, out, g, range);
  }
}

// Writes gradients (double, in the order of the chunk) to an image, rounded once.
template <class Out>
void scatter(const double* gradient, const MutableImages& image, bool flip, const Geometry& g,
             const Chunk& chunk) {
  using Storage = typename Out::Storage;
  Storage* sample = static_cast<Storage*>(image.data) + chunk.sample * image.sample_stride;
  const Strides to = g.strides(image.interleaved);
  const Strides from = g.interleaved ? Strides{g.channels, 1} : Strides{1, chunk.end - chunk.begin};
  for_segments(g, chunk, flip, [&](int64_t at, int64_t pixel, int64_t count, int64_t step) {
    transfer(sample + pixel * to.pixel, to.pixel * step, to.channel, gradient + at * from.pixel,
             from.pixel, from.channel, count, g.channels, Out::rounded);
  });
}

void scatter(const double* gradient, const MutableImages& image, bool flip, const Geometry& g,
             const Chunk& chunk) {
  switch (image.dtype) {
    case Dtype::f64:
      return scatter<Float64>(gradient, image, flip, g, chunk);
    case Dtype::bf16:
      return scatter<Bfloat16>(gradient, image, flip, g, chunk);
    case Dtype::f16:
      return scatter<Float16>(gradient, image, flip, g, chunk);
    default:
      return scatter<Float32>(gradient, image, flip, g, chunk);
  }
}

template <class Grad, class In>
void backward_as(const BackwardTask& task, Range range) {
  const auto& p = task.p;
  const auto& g = task.g;
  const auto& gradient = task.gradient;
  constexpr int kLanes = 8;  // fixed, so that the sum's order is the same on every instruction set
  const int64_t size = g.chunk_pixels * g.channels;
  std::vector<In> synthetic_buffer(size), real_buffer(size);
  std::vector<double> grad_mixed(size), share(size);
  for (int64_t index = range.begin; index < range.end; ++index) {
    const Chunk chunk = g.chunk(index);
    const int64_t b = chunk.sample, pixels = chunk.end - chunk.begin;
    const Blend blend{p.psi[b], 1 - p.psi[b]};
    const bool flip_synthetic = p.flip_synthetic && p.flip_synthetic[b];
    const bool flip_real = p.flip_real && p.flip_real[b];
    const int64_t runs = g.interleaved ? 1 : g.channels, n = pixels * g.channels / runs;
    const Strides strides = g.strides(g.interleaved);
    const auto* from = static_cast<const typename Grad::Storage*>(gradient.data) +
                       b * gradient.sample_stride + chunk.begin * strides.pixel;
    for (int64_t c = 0; c < runs; ++c) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t channel = c + i % g.period;
        grad_mixed[c * n + i] = mixed_gradient(Grad::load(from[c * strides.channel + i]),
                                               {g.shifts[channel], g.scales[channel]});
      }
    }
    const auto give = [&](const MutableImages& image, double factor, bool flip) {
      if (!image.data) return;
      for (int64_t i = 0; i < pixels * g.channels; ++i) {
        share[i] = multiply(factor, grad_mixed[i]);
      }
      scatter(share.data(), image, flip, g, chunk);
    };
    give(task.to.synthetic, blend.psi, flip_synthetic);
    give(task.to.real, blend.rest, flip_real);
    if (!task.psi_parts) continue;
    const auto synthetic = arrange(p.synthetic, flip_synthetic, g, chunk, synthetic_buffer.data());
    const auto real = arrange(p.real, flip_real, g, chunk, real_buffer.data());
    double sums[kLanes] = {};
    for (int64_t c = 0; c < runs; ++c) {
      const In *s = synthetic.data + c * synthetic.plane, *r = real.data + c * real.plane;
      const double* mixed = grad_mixed.data() + c * n;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) {
          sums[lane] += mixed[i + lane] * (double(s[i + lane]) - double(r[i + lane]));
        }
      }
      for (; i < n; ++i) sums[i % kLanes] += mixed[i] * (double(s[i]) - double(r[i]));
    }
    double sum = 0;
    for (double part : sums) sum += part;
    task.psi_parts[index] = sum;
  }
}

template <class Grad>
void backward_from(const BackwardTask& task, Range range) {
  switch (task.p.synthetic.dtype) {
    case Dtype::u8:
      return backward_as<Grad, uint8_t>(task, range);
    case Dtype::f64:
      return backward_as<Grad, double>(task, range);
    default:
      return backward_as<Grad, float>(task, range);
  }
}

void backward_range(const BackwardTask& task, Range range) {
  switch (task.gradient.dtype) {
    case Dtype::f64:
      return backward_from<Float64>(task, range);
    case Dtype::bf16:
      return backward_from<Bfloat16>(task, range);
    case Dtype::f16:
      return backward_from<Float16>(task, range);
    default:
      return backward_from<Float32>(task, range);
  }
}

}  // namespace SYNFACE_ISA_NAMESPACE
}  // namespace
}  // namespace synface::domain_mixup
