// The loops over chunks of samples. Included once per instruction set by simd/foreach_isa.h; plain
// loops, which the compiler turns into that set's vectors, but for the bytes of three channels.

namespace synface::domain_mixup {
namespace {
namespace SYNFACE_ISA_NAMESPACE {

// Three channels' bytes, interleaved, into three planes; backwards through the pixels for a flip.
// Returns how many pixels it did, the rest being fewer than 16.
#if SYNFACE_FMA
template <bool kFlip>
int64_t split_three(uint8_t* to, int64_t plane, const uint8_t* from, int64_t pixels) {
  const auto load = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
  int64_t done = 0;
  for (; done + 16 <= pixels; done += 16) {
    const uint8_t* source = kFlip ? from - 3 * (done + 15) : from + 3 * done;
    const __m128i a = load(source), b = load(source + 16), c = load(source + 32);
    for (int channel = 0; channel < 3; ++channel) {
      const auto* masks = kThreeMasks.bytes[kFlip][channel];
      const __m128i picked = _mm_or_si128(
          _mm_or_si128(_mm_shuffle_epi8(a, load(masks[0])), _mm_shuffle_epi8(b, load(masks[1]))),
          _mm_shuffle_epi8(c, load(masks[2])));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + channel * plane + done), picked);
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

// Elements of a chunk in the result's order: channel c's begin at data + c·plane.
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

// One block of elements, all of one channel, or with shift and scale element by element.
template <class In, class Wide>
void mix_block(const In* __restrict synthetic, const In* __restrict real, Blend blend,
               Affine affine, Wide* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = Wide(mix(double(synthetic[i]), double(real[i]), blend, affine));
  }
}
template <class In, class Wide>
void mix_block(const In* __restrict synthetic, const In* __restrict real, Blend blend,
               const double* __restrict shift, const double* __restrict scale, Wide* __restrict to,
               int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = Wide(mix(double(synthetic[i]), double(real[i]), blend, {shift[i], scale[i]}));
  }
}

// Rounds a block; whether a tie is among it.
template <class Out>
uint32_t round_block(const typename Out::Wide* __restrict wide,
                     typename Out::Storage* __restrict to, int64_t n) {
  uint32_t ties = 0;
#pragma omp simd reduction(| : ties)
  for (int64_t i = 0; i < n; ++i) {
    to[i] = Out::round(wide[i]);
    ties |= uint32_t(Out::tie(wide[i]));
  }
  return ties;
}

// `period` elements at a time have shift[0], shift[1] …; a period of 1: all have shift[0].
template <class Out, class In>
void mix_run(const In* synthetic, const In* real, Blend blend, const double* shift,
             const double* scale, int64_t period, typename Out::Wide* wide,
             typename Out::Storage* to, int64_t n) {
  const bool uniform = period == 1;
  const int64_t block = uniform ? kBlock : period;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t count = std::min(block, n - start);
    const In *s = synthetic + start, *r = real + start;
    if constexpr (std::is_same_v<typename Out::Wide, typename Out::Storage>) wide = to + start;
    if (uniform) {
      mix_block(s, r, blend, {shift[0], scale[0]}, wide, count);
    } else {
      mix_block(s, r, blend, shift, scale, wide, count);
    }
    if constexpr (std::is_same_v<typename Out::Wide, typename Out::Storage>) continue;
    if (!round_block<Out>(wide, to + start, count)) continue;
    for (int64_t i = 0; i < count; ++i) {
      const Affine affine{shift[uniform ? 0 : i], scale[uniform ? 0 : i]};
      to[start + i] = rounded<Out>(mix(double(s[i]), double(r[i]), blend, affine));
    }
  }
}

template <class Out, class In>
void forward_as(const Problem& p, const MutableImages& out, const Geometry& g, Range range) {
  using Storage = typename Out::Storage;
  const int64_t size = g.chunk_pixels * g.channels;
  const int64_t runs = g.interleaved ? 1 : g.channels;
  std::vector<In> synthetic_buffer(size), real_buffer(size);
  std::vector<typename Out::Wide> wide(std::max(kBlock, g.period));
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
    for (int64_t c = 0; c < runs; ++c) {
      mix_run<Out>(synthetic.data + c * synthetic.plane, real.data + c * real.plane, blend,
                   g.shift.data() + c, g.scale.data() + c, g.period, wide.data(),
                   result + c * to.channel, n);
    }
  }
}

template <class Out>
void forward_to(const Problem& p, const MutableImages& out, const Geometry& g, Range range) {
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

// gradients (double, in the order of the chunk) into an image, rounded once
template <class Out>
void scatter(const double* gradient, const MutableImages& image, bool flip, const Geometry& g,
             const Chunk& chunk) {
  using Storage = typename Out::Storage;
  Storage* sample = static_cast<Storage*>(image.data) + chunk.sample * image.sample_stride;
  const Strides to = g.strides(image.interleaved);
  const Strides from = g.interleaved ? Strides{g.channels, 1} : Strides{1, chunk.end - chunk.begin};
  for_segments(g, chunk, flip, [&](int64_t at, int64_t pixel, int64_t count, int64_t step) {
    transfer(sample + pixel * to.pixel, to.pixel * step, to.channel, gradient + at * from.pixel,
             from.pixel, from.channel, count, g.channels, rounded<Out>);
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
void backward_as(const Problem& p, const Images& gradient, const MutableImages& grad_synthetic,
                 const MutableImages& grad_real, double* psi_parts, const Geometry& g,
                 Range range) {
  constexpr int kLanes = 8;  // of the sum, so that its order is the same everywhere
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
                                               {g.shift[channel], g.scale[channel]});
      }
    }
    const auto give = [&](const MutableImages& image, double factor, bool flip) {
      if (!image.data) return;
      for (int64_t i = 0; i < pixels * g.channels; ++i) {
        share[i] = multiply(factor, grad_mixed[i]);
      }
      scatter(share.data(), image, flip, g, chunk);
    };
    give(grad_synthetic, blend.psi, flip_synthetic);
    give(grad_real, blend.rest, flip_real);
    if (!psi_parts) continue;
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
    psi_parts[index] = sum;
  }
}

template <class Grad>
void backward_from(const Problem& p, const Images& gradient, const MutableImages& grad_synthetic,
                   const MutableImages& grad_real, double* psi_parts, const Geometry& g,
                   Range range) {
  switch (p.synthetic.dtype) {
    case Dtype::u8:
      return backward_as<Grad, uint8_t>(p, gradient, grad_synthetic, grad_real, psi_parts, g,
                                        range);
    case Dtype::f64:
      return backward_as<Grad, double>(p, gradient, grad_synthetic, grad_real, psi_parts, g, range);
    default:
      return backward_as<Grad, float>(p, gradient, grad_synthetic, grad_real, psi_parts, g, range);
  }
}

void backward_range(const Problem& p, const Images& gradient, const MutableImages& grad_synthetic,
                    const MutableImages& grad_real, double* psi_parts, const Geometry& g,
                    Range range) {
  switch (gradient.dtype) {
    case Dtype::f64:
      return backward_from<Float64>(p, gradient, grad_synthetic, grad_real, psi_parts, g, range);
    case Dtype::bf16:
      return backward_from<Bfloat16>(p, gradient, grad_synthetic, grad_real, psi_parts, g, range);
    case Dtype::f16:
      return backward_from<Float16>(p, gradient, grad_synthetic, grad_real, psi_parts, g, range);
    default:
      return backward_from<Float32>(p, gradient, grad_synthetic, grad_real, psi_parts, g, range);
  }
}

}  // namespace SYNFACE_ISA_NAMESPACE
}  // namespace
}  // namespace synface::domain_mixup
