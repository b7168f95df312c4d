// Bytes to float32, bfloat16 and float16 with AVX-512, by the float32 arithmetic of math.h, 32
// elements at a time: loads, rearranges in registers, mixes, stores. Included inside the namespace
// of each instruction set.

#if SYNFACE_VECTOR_BYTES == 64

// Bytes that the inputs are prefetched ahead. 512 to 4,096 are about the same with streaming
// stores; with ordinary ones, 512 is best.
constexpr int64_t kAhead = 512;
constexpr int64_t kPage = 4096;

// Indices that pick the upper 16 bits of 32 words.
struct UpperWords {
  constexpr UpperWords() : index() {
    for (int i = 0; i < 32; ++i) index[i] = uint16_t(2 * i + 1);
  }
  alignas(64) uint16_t index[32];
};
constexpr UpperWords kUpperWords;

// Indices that give each 128 bits four pixels of three bytes, and then the words of a channel.
struct PixelOrders {
  constexpr PixelOrders() : fours(), channel() {
    for (int i = 0; i < 16; ++i) {
      fours[i] = i / 4 * 3 + i % 4;
      for (int c = 0; c < 3; ++c) {
        for (int byte = 0; byte < 4; ++byte) {
          channel[c][4 * i + byte] = uint8_t(byte == 0 ? 3 * (i % 4) + c : 0x80);  // 0x80: zero
        }
      }
    }
  }
  alignas(64) int32_t fours[16];
  alignas(64) uint8_t channel[3][64];
};
constexpr PixelOrders kPixelOrders;

// Indices that interleave three vectors: the first two, and then the third, into each of three.
template <class Index>
struct JoinOrders {
  static constexpr int kLanes = 64 / sizeof(Index);
  constexpr JoinOrders() : two(), third() {
    for (int i = 0; i < 3 * kLanes; ++i) {
      const int channel = i % 3, pixel = i / 3, part = i / kLanes, lane = i % kLanes;
      two[part][lane] = Index(channel < 2 ? channel * kLanes + pixel : 0);
      third[part][lane] = Index(channel < 2 ? lane : kLanes + pixel);
    }
  }
  alignas(64) Index two[3][kLanes];
  alignas(64) Index third[3][kLanes];
};
template <class Index>
constexpr JoinOrders<Index> kJoinOrders;

// A sample's ψ.
struct Share {
  Share(double psi, const Geometry& g)
      : blend{psi, 1 - psi},
        high(Split(psi).high),
        low(psi - double(high)),
        exact(low == 0 && g.exact_shift) {}
  Blend blend;
  float high;
  double low;
  bool exact;  // without rests
};

// Float32 constants of 16 elements of a sample, as math.h names them: `low` is (ψ's rest)·scale,
// `minus_low` is −(shift's rest + bound)·scale, and `width` is 2·bound·scale.
struct Near {
  __m512 shift, scale, scale_rest, low, minus_low, width;
};

// The constants of 16 elements, exact ones included.
struct Lanes {
  Lanes(const Geometry& g, const Share& share, bool bounded, int64_t first, int64_t step) {
    alignas(64) float of[6][16];
    for (int i = 0; i < 16; ++i) {
      const auto [shift, scale] = g.affine[(first + step * i) % g.channels];
      const float shift_high = Split(shift).high, near_scale = float(scale);
      const double shift_low = shift - double(shift_high);
      const double bound = bounded ? error_bound(share.low, shift_low) : 0;
      of[0][i] = shift_high;
      of[1][i] = near_scale;
      of[2][i] = float(scale - double(near_scale));
      of[3][i] = float(share.low * scale);
      of[4][i] = float(-(shift_low + bound) * scale);
      of[5][i] = float(2.001 * bound * scale);
      shifts[i] = shift;
      scales[i] = scale;
    }
    near = {.shift = _mm512_load_ps(of[0]),
            .scale = _mm512_load_ps(of[1]),
            .scale_rest = _mm512_load_ps(of[2]),
            .low = _mm512_load_ps(of[3]),
            .minus_low = _mm512_load_ps(of[4]),
            .width = _mm512_load_ps(of[5])};
  }
  Near near;
  double shifts[16], scales[16];
};

// 32 bytes as floats.
struct Floats {
  __m512 at[2];
};

inline Floats load_floats(const uint8_t* from) {
  const auto* bytes = reinterpret_cast<const __m128i*>(from);
  return {{_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes))),
           _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes + 1)))}};
}

// 32 pixels of three interleaved channels, four in each 128 bits.
struct Pixels {
  explicit Pixels(const uint8_t* from) {
    const __m512i fours = _mm512_load_si512(kPixelOrders.fours);
    for (int half = 0; half < 2; ++half) {
      const __m512i bytes = _mm512_maskz_loadu_epi8((1ull << 48) - 1, from + 48 * half);
      at[half] = _mm512_permutexvar_epi32(fours, bytes);
    }
  }
  Floats channel(int c) const {
    const __m512i order = _mm512_load_si512(kPixelOrders.channel[c]);
    return {{_mm512_cvtepi32_ps(_mm512_shuffle_epi8(at[0], order)),
             _mm512_cvtepi32_ps(_mm512_shuffle_epi8(at[1], order))}};
  }
  __m512i at[2];
};

// 32 results.
template <class Out>
struct Mixed {
  static constexpr int kVectors = sizeof(typename Out::Storage) / 2;
  __m512i at[kVectors];
};

// Mixes in float64; returns words, of which 16-bit results take the upper halves. All by value:
// what is passed by address would be stored in every round of the loops.
template <class Out>
[[gnu::noinline, gnu::cold]] __m512i mix_exactly(__m512 synthetic, __m512 real, Blend blend,
                                                 const Lanes* lanes) {
  alignas(64) float s[16], r[16];
  alignas(64) typename Out::Storage results[16];
  _mm512_store_ps(s, synthetic);
  _mm512_store_ps(r, real);
  mix_exactly<Out>(
      s, r, blend, [=](int64_t i) { return Affine{lanes->shifts[i], lanes->scales[i]}; }, results,
      16);
  if constexpr (Mixed<Out>::kVectors == 2) {
    return _mm512_load_si512(results);
  } else {
    const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(results));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
  }
}

// Mixes 32 elements, those in float64 whose rounding float32 does not determine. `least`: the least
// magnitude of `high` for which 16 bits are determined.
template <class Out>
inline Mixed<Out> mix32(const Floats& synthetic, const Floats& real, const Share& share,
                        const Near (&near)[2], float least, const Lanes* const (&exact)[2]) {
  const __m512 psi = _mm512_set1_ps(share.high);
  __m512 high[2], low[2];
  for (int half = 0; half < 2; ++half) {
    const __m512 minus = _mm512_sub_ps(synthetic.at[half], real.at[half]);
    high[half] = _mm512_fmadd_ps(psi, minus, _mm512_sub_ps(real.at[half], near[half].shift));
    low[half] = _mm512_fmadd_ps(near[half].low, minus, near[half].minus_low);
  }
  const auto exactly = [&](int half) {
    return mix_exactly<Out>(synthetic.at[half], real.at[half], share.blend, exact[half]);
  };
  Mixed<Out> mixed;
  if constexpr (std::is_same_v<Out, Float32>) {
    __mmask16 unsure[2];
    for (int half = 0; half < 2; ++half) {
      const __m512 scale = near[half].scale;
      const __m512 rest = _mm512_fmadd_ps(high[half], near[half].scale_rest, low[half]);
      const __m512 least_result = _mm512_fmadd_ps(high[half], scale, rest);
      const __m512 most_result =
          _mm512_fmadd_ps(high[half], scale, _mm512_add_ps(rest, near[half].width));
      mixed.at[half] = _mm512_castps_si512(least_result);
      unsure[half] = _mm512_cmpneq_epi32_mask(mixed.at[half], _mm512_castps_si512(most_result));
    }
    if (!_kortestz_mask16_u8(unsure[0], unsure[1])) [[unlikely]] {
      for (int half = 0; half < 2; ++half) {
        if (share.exact) {
          const __mmask16 some = _mm512_cmp_ps_mask(high[half], _mm512_setzero_ps(), _CMP_NEQ_OQ);
          mixed.at[half] = _mm512_maskz_mov_epi32(some, mixed.at[half]);
          unsure[half] &= some;
        }
        if (unsure[half]) mixed.at[half] = exactly(half);
      }
    }
  } else {
    constexpr bool kBrain = std::is_same_v<Out, Bfloat16>;
    // Half a unit of the result's last place; float16's exponents are 112 less, and three bits
    // shorter.
    constexpr uint32_t kRound = kBrain ? 0x8000 : 0x1000 - (112u << 23);
    constexpr int kUnused = kBrain ? 0 : 3;
    __m512i outward[2];  // the upper half-words are results, the lower ones what rounding drops
    for (int half = 0; half < 2; ++half) {
      const __m512i bits =
          _mm512_castps_si512(_mm512_fmadd_ps(high[half], near[half].scale, low[half]));
      outward[half] = _mm512_add_epi32(bits, _mm512_set1_epi32(int32_t(kRound + kOffBytes)));
      if constexpr (!kBrain) {
        constexpr int kSelect = 0xca;
        outward[half] =
            _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x7fffffff),
                                      _mm512_slli_epi32(outward[half], kUnused), bits, kSelect);
      }
    }
    constexpr __mmask32 kLower = 0x55555555;
    constexpr int kLeastMagnitude = 10;
    const __m512i limit = _mm512_set1_epi32(int32_t(2 * kOffBytes << kUnused));
    const __m512 least_high = _mm512_set1_ps(least);
    const __m512i dropped = _mm512_min_epu16(outward[0], outward[1]);
    const __m512 magnitude = _mm512_range_ps(high[0], high[1], kLeastMagnitude);
    if (!_kortestz_mask32_u8(_mm512_mask_cmplt_epu16_mask(kLower, dropped, limit),
                             _mm512_cmp_ps_mask(magnitude, least_high, _CMP_LT_OQ))) [[unlikely]] {
      for (int half = 0; half < 2; ++half) {
        if (_mm512_mask_cmplt_epu16_mask(kLower, outward[half], limit) ||
            _mm512_cmp_ps_mask(_mm512_abs_ps(high[half]), least_high, _CMP_LT_OQ)) {
          outward[half] = exactly(half);
        }
      }
    }
    mixed.at[0] =
        _mm512_permutex2var_epi16(outward[0], _mm512_load_si512(kUpperWords.index), outward[1]);
  }
  return mixed;
}

template <bool kStream>
void store(void* to, __m512i value) {
  if constexpr (kStream) {
    _mm512_stream_si512(static_cast<__m512i*>(to), value);
  } else {
    _mm512_storeu_si512(to, value);
  }
}
template <bool kStream, class Out>
void store(typename Out::Storage* to, const Mixed<Out>& mixed) {
  for (int i = 0; i < Mixed<Out>::kVectors; ++i) {
    store<kStream>(to + i * (64 / sizeof(*to)), mixed.at[i]);
  }
}

inline void prefetch(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead + i, _MM_HINT_T0);
  }
}

// Has the address of the next page translated before it is stored to: a store that misses the TLB
// stalls all that follow.
template <class T>
void prefetch_page(const T* to, int64_t count) {
  if (reinterpret_cast<uintptr_t>(to) % kPage < uintptr_t(count) * sizeof(T)) {
    _mm_prefetch(reinterpret_cast<const char*>(to) + kPage, _MM_HINT_T0);
  }
}

// A sample's loops; kStream: stores bypass the caches.
template <class Out, bool kStream>
struct Mixer {
  using Storage = typename Out::Storage;
  Share share;
  const Lanes* lanes;
  int64_t period;  // of lanes
  float least;

  Mixed<Out> mix(const Floats& s, const Floats& r, const Near& near0, const Near& near1,
                 int64_t lanes0, int64_t lanes1) const {
    return mix32<Out>(s, r, share, {near0, near1}, least, {&lanes[lanes0], &lanes[lanes1]});
  }

  // Mixes elements in the order of the result's memory; kPeriod: that of lanes, or 0.
  template <int kPeriod>
  void dense(const uint8_t* synthetic, const uint8_t* real, Storage* to, int64_t n) const {
    constexpr int64_t kStep = kPeriod == 3 ? 96 : 64;
    const Mixer own = *this;  // no store can change it
    Near nears[kPeriod == 0 ? 1 : kPeriod];
    for (int v = 0; v < kPeriod; ++v) nears[v] = lanes[v].near;
    int64_t i = 0, v = 0;
    for (; i + kStep <= n; i += kStep) {
      prefetch(synthetic + i, kStep);
      prefetch(real + i, kStep);
      prefetch_page(to + i, kStep);
#pragma GCC unroll 3
      for (int64_t at = i; at < i + kStep; at += 32) {
        const Floats s = load_floats(synthetic + at), r = load_floats(real + at);
        if constexpr (kPeriod == 0) {
          const int64_t next = v + 1 == own.period ? 0 : v + 1;
          store<kStream, Out>(to + at,
                              own.mix(s, r, own.lanes[v].near, own.lanes[next].near, v, next));
          v = next + 1 == own.period ? 0 : next + 1;
        } else {
          const int64_t first = (at - i) / 16 % kPeriod, second = ((at - i) / 16 + 1) % kPeriod;
          store<kStream, Out>(to + at, own.mix(s, r, nears[first], nears[second], first, second));
        }
      }
    }
    for (; i < n; i += 32) {
      const int64_t count = std::min<int64_t>(32, n - i);
      const int64_t first = i / 16 % period, second = (i / 16 + 1) % period;
      uint8_t s[32] = {}, r[32] = {};
      std::memcpy(s, synthetic + i, size_t(count));
      std::memcpy(r, real + i, size_t(count));
      const auto mixed =
          mix(load_floats(s), load_floats(r), lanes[first].near, lanes[second].near, first, second);
      std::memcpy(to + i, &mixed, size_t(count) * sizeof(Storage));
    }
  }
  void dense(const uint8_t* synthetic, const uint8_t* real, Storage* to, int64_t n) const {
    period == 1   ? dense<1>(synthetic, real, to, n)
    : period == 3 ? dense<3>(synthetic, real, to, n)
                  : dense<0>(synthetic, real, to, n);
  }

  // Mixes three interleaved channels into planes; pixels: a multiple of 32.
  void split(const uint8_t* synthetic, const uint8_t* real, Storage* to, int64_t plane,
             int64_t pixels) const {
    const Mixer own = *this;
    const Near nears[3] = {lanes[0].near, lanes[1].near, lanes[2].near};
    for (int64_t i = 0; i < pixels; i += 32, synthetic += 96, real += 96) {
      prefetch(synthetic, 96);
      prefetch(real, 96);
      const Pixels s(synthetic), r(real);
#pragma GCC unroll 3
      for (int c = 0; c < 3; ++c) {
        Storage* target = to + c * plane + i;
        prefetch_page(target, 32);
        store<kStream, Out>(target, own.mix(s.channel(c), r.channel(c), nears[c], nears[c], c, c));
      }
    }
  }

  // Mixes three planes into interleaved channels; pixels: a multiple of 32. `next`: from the end of
  // a plane to its continuation in the next sample.
  void join(const uint8_t* synthetic, const uint8_t* real, int64_t plane, int64_t next, Storage* to,
            int64_t pixels) const {
    using Index = std::conditional_t<sizeof(Storage) == 4, uint32_t, uint16_t>;
    constexpr int64_t kLanes = JoinOrders<Index>::kLanes;
    const Mixer own = *this;
    const Near nears[3] = {lanes[0].near, lanes[1].near, lanes[2].near};
    for (int64_t i = 0; i < pixels; i += 32, synthetic += 32, real += 32, to += 96) {
      Mixed<Out> mixed[3];
      const int64_t skip = i + kAhead < pixels ? 0 : next;
      prefetch_page(to, 96);
#pragma GCC unroll 3
      for (int c = 0; c < 3; ++c) {
        const uint8_t *s = synthetic + c * plane, *r = real + c * plane;
        prefetch(s + skip, 32);
        prefetch(r + skip, 32);
        mixed[c] = own.mix(load_floats(s), load_floats(r), nears[c], nears[c], c, c);
      }
#pragma GCC unroll 2
      for (int v = 0; v < Mixed<Out>::kVectors; ++v) {
        const __m512i a = mixed[0].at[v], b = mixed[1].at[v], c = mixed[2].at[v];
#pragma GCC unroll 3
        for (int part = 0; part < 3; ++part) {
          const __m512i two = _mm512_load_si512(kJoinOrders<Index>.two[part]);
          const __m512i third = _mm512_load_si512(kJoinOrders<Index>.third[part]);
          Storage* target = to + (3 * v + part) * kLanes;
          if constexpr (sizeof(Storage) == 4) {
            const __m512i ab = _mm512_permutex2var_epi32(a, two, b);
            store<kStream>(target, _mm512_permutex2var_epi32(ab, third, c));
          } else {
            const __m512i ab = _mm512_permutex2var_epi16(a, two, b);
            store<kStream>(target, _mm512_permutex2var_epi16(ab, third, c));
          }
        }
      }
    }
  }
};

// Float16's normal numbers begin at 2^-14: below, the number of dropped bits varies.
template <class Out>
float least_high(const Geometry& g, const Share& share) {
  if (std::is_same_v<Out, Float16>) {
    return float(std::max(0x1p-6, 0x1.01p-14 / g.least_scale + 0x1p-8));
  }
  return share.exact ? 0 : 0x1p-6f;
}

template <class Out>
bool fits_bytes(const Problem& p, const Geometry& g) {
  return p.synthetic.dtype == Dtype::u8 && g.estimable &&
         (!std::is_same_v<Out, Float16> || g.greatest_scale <= 256);  // 255·256: below infinity
}

template <class Out, bool kStream>
void forward_bytes(const Problem& p, const MutableImages& out, const Geometry& g, Range range) {
  using Storage = typename Out::Storage;
  constexpr bool kBounded = std::is_same_v<Out, Float32>;
  const int64_t size = g.chunk_pixels * g.channels;
  const Buffer<uint8_t> synthetic_buffer(size), real_buffer(size);
  const bool alike = p.synthetic.interleaved == p.real.interleaved;
  const bool turns = alike && p.real.interleaved != g.interleaved && g.channels == 3;
  const bool direct = turns || (alike && p.real.interleaved == g.interleaved);
  // By channel for planes, by element for interleaved channels, and both where planes are joined.
  const int64_t channels = !g.interleaved || turns ? g.channels : 0;
  const int64_t period = g.uniform ? 1 : g.channels / std::gcd(g.channels, int64_t(16));
  const int64_t elements = g.interleaved ? period : 0;
  const Buffer<Lanes> of_channels(channels), of_elements(elements);
  const Strides to = g.strides(g.interleaved), from = g.strides(p.real.interleaved);
  for (int64_t index = range.begin; index < range.end;) {
    const int64_t b = g.chunk(index).sample, end = std::min(range.end, (b + 1) * g.chunks);
    const Share share(p.psi[b], g);
    for (int64_t c = 0; c < channels; ++c) {
      new (&of_channels[c]) Lanes(g, share, kBounded, c, 0);
    }
    for (int64_t i = 0; i < elements; ++i) {
      new (&of_elements[i]) Lanes(g, share, kBounded, 16 * i, 1);
    }
    const float least = least_high<Out>(g, share);
    const bool flip_synthetic = p.flip_synthetic && p.flip_synthetic[b];
    const bool flip_real = p.flip_real && p.flip_real[b];
    auto* sample = static_cast<Storage*>(out.data) + b * out.sample_stride;
    const auto mix_arranged = [&](const Chunk& chunk) {
      const auto synthetic = arrange(p.synthetic, flip_synthetic, g, chunk, synthetic_buffer.get());
      const auto real = arrange(p.real, flip_real, g, chunk, real_buffer.get());
      const int64_t pixels = chunk.end - chunk.begin;
      Storage* target = sample + chunk.begin * to.pixel;
      if (g.interleaved) {
        const Mixer<Out, kStream> mixer{share, of_elements.get(), period, least};
        mixer.dense(synthetic.data, real.data, target, pixels * g.channels);
        return;
      }
      for (int64_t c = 0; c < g.channels; ++c) {
        const Mixer<Out, kStream> mixer{share, &of_channels[c], 1, least};
        mixer.dense(synthetic.data + c * synthetic.plane, real.data + c * real.plane,
                    target + c * to.channel, pixels);
      }
    };
    if (!direct || flip_synthetic || flip_real) {
      for (; index < end; ++index) mix_arranged(g.chunk(index));
      continue;
    }
    Chunk chunk{b, g.chunk(index).begin, g.chunk(end - 1).end};
    index = end;
    if (turns) {
      const auto at = [&](const Images& images) {
        return static_cast<const uint8_t*>(images.data) + b * images.sample_stride +
               chunk.begin * from.pixel;
      };
      const int64_t pixels = (chunk.end - chunk.begin) / 32 * 32;
      const Mixer<Out, kStream> mixer{share, of_channels.get(), 1, least};
      Storage* target = sample + chunk.begin * to.pixel;
      if (g.interleaved) {
        mixer.join(at(p.synthetic), at(p.real), from.channel, p.real.sample_stride - g.pixels(),
                   target, pixels);
      } else {
        mixer.split(at(p.synthetic), at(p.real), target, to.channel, pixels);
      }
      chunk.begin += pixels;
    }
    mix_arranged(chunk);
  }
  if (kStream) _mm_sfence();
}

#endif
