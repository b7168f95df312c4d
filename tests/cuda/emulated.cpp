// Runs csrc/domain_mixup/cuda.cu on the host, one thread after the other, and compares its results
// bitwise with the CPU kernel's. Its threads are independent of one another, so that a GPU computes
// the same.
#include <cstdint>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

struct Index {
  unsigned x;
};
thread_local Index blockIdx, blockDim, threadIdx, gridDim;

using cudaError_t = int;
constexpr int cudaSuccess = 0;
int cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(int) { return ""; }

#define __device__
#define __global__
#define __launch_bounds__(...)
int launches;
template <class Kernel, class... Args>
void launch(Kernel kernel, unsigned blocks, int threads, Args... args) {
  ++launches;
  gridDim.x = blocks;
  blockDim.x = unsigned(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(args...);
  }
}
#define SYNFACE_LAUNCH(kernel, blocks, threads, stream, ...) \
  launch([](auto... args) { (kernel)(args...); }, blocks, threads, __VA_ARGS__)

#include "domain_mixup/cuda.cu"

using namespace synface;
using namespace synface::domain_mixup;

namespace {

std::mt19937 rng(0);

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::u8 ? 1 : dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

// Values in [0, 1], or bytes. Aligned to 64 bytes, plus `shift` elements.
struct Array {
  Array(int64_t n, Dtype dtype, int shift) : store(size_t((n + shift) * size_of(dtype) + 64)) {
    const auto address = reinterpret_cast<uintptr_t>(store.data());
    data = store.data() + (-address & 63) + shift * size_of(dtype);
    std::uniform_real_distribution<float> uniform;
    for (int64_t i = 0; i < n; ++i) {
      const float x = uniform(rng);
      if (dtype == Dtype::u8) static_cast<uint8_t*>(data)[i] = uint8_t(rng());
      if (dtype == Dtype::bf16) static_cast<uint16_t*>(data)[i] = to_bf16(x);
      if (dtype == Dtype::f16) static_cast<uint16_t*>(data)[i] = to_f16(x);
      if (dtype == Dtype::f32) static_cast<float*>(data)[i] = x;
      if (dtype == Dtype::f64) static_cast<double*>(data)[i] = x;
    }
  }
  std::vector<char> store;
  void* data;
};

struct Case {
  int64_t batch, channels, height, width;
  bool in_interleaved, out_interleaved, flip;
  int shift;
};

int failures = 0, groups = 0;

void check(const Case& c, Dtype in, Dtype out) {
  const int64_t sample = c.channels * c.height * c.width, n = c.batch * sample;
  const Array synthetic(n, in, c.shift), real(n, in, c.shift), gradient(n, out, 0);
  std::vector<double> psi(size_t(c.batch), 0);
  std::vector<Affine> affine;
  const double unit = in == Dtype::u8 ? 255 : 1;
  for (int64_t i = 0; i < c.channels; ++i) {
    affine.push_back(
        {unit * (0.4 + 0.03 * double(i % 7)), 1 / (unit * (0.2 + 0.01 * double(i % 5)))});
  }
  bool flips[2][64] = {};
  for (int64_t b = 0; b < c.batch; ++b) {
    psi[size_t(b)] = double(rng() % 21) / 20;
    flips[0][b] = rng() & 1;
    flips[1][b] = rng() & 1;
  }
  const Problem p{.synthetic = {synthetic.data, in, c.in_interleaved, sample},
                  .real = {real.data, in, c.in_interleaved, sample},
                  .psi = psi.data(),
                  .affine = affine.data(),
                  .flip_synthetic = c.flip ? flips[0] : nullptr,
                  .flip_real = c.flip ? flips[1] : nullptr,
                  .batch = c.batch,
                  .channels = c.channels,
                  .height = c.height,
                  .width = c.width};
  const auto fail = [&](const char* what) {
    ++failures;
    std::printf("%s differs: (%d, %d, %d, %d) in %d %d out %d %d flip %d shift %d\n", what,
                int(c.batch), int(c.channels), int(c.height), int(c.width), int(in),
                c.in_interleaved, int(out), c.out_interleaved, c.flip, c.shift);
  };

  Array expected(n, out, 0), got(n, out, 0);
  forward(p, one_thread(), {expected.data, out, c.out_interleaved, sample});
  groups += launch_groups(p, {got.data, out, c.out_interleaved, sample}, nullptr);
  forward_cuda(p, {got.data, out, c.out_interleaved, sample}, nullptr);
  if (std::memcmp(expected.data, got.data, size_t(n * size_of(out)))) fail("result");

  if (in == Dtype::u8) return;
  Array e_s(n, in, 0), e_r(n, in, 0), g_s(n, in, 0), g_r(n, in, 0);
  std::vector<double> e_psi(psi.size()), g_psi(psi.size()), workspace(size_t(psi_workspace(p)));
  const Images from{gradient.data, out, c.out_interleaved, sample};
  const auto image = [&](Array& a) { return MutableImages{a.data, in, c.in_interleaved, sample}; };
  backward(p, one_thread(), from,
           {.synthetic = image(e_s), .real = image(e_r), .psi = e_psi.data()});
  backward_cuda(p, from, {.synthetic = image(g_s), .real = image(g_r), .psi = g_psi.data()},
                workspace.data(), nullptr);
  if (std::memcmp(e_s.data, g_s.data, size_t(n * size_of(in)))) fail("grad_synthetic");
  if (std::memcmp(e_r.data, g_r.data, size_t(n * size_of(in)))) fail("grad_real");
  for (size_t b = 0; b < psi.size(); ++b) {  // another order of the sum
    if (std::abs(e_psi[b] - g_psi[b]) > 1e-12 * double(sample) * 10) fail("grad_psi");
  }
}

}  // namespace

int main() {
  const Dtype floats[] = {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16};
  const Case shapes[] = {{3, 3, 6, 16, 0, 0, 0, 0}, {2, 3, 5, 32, 0, 0, 0, 0},
                         {2, 3, 7, 5, 0, 0, 0, 0},  {2, 1, 4, 16, 0, 0, 0, 0},
                         {3, 5, 4, 8, 0, 0, 0, 0},  {2, 3, 4, 16, 0, 0, 0, 1}};
  for (const Case& shape : shapes) {
    for (int bits = 0; bits < 8; ++bits) {
      Case c = shape;
      c.in_interleaved = bits & 1;
      c.out_interleaved = bits & 2;
      c.flip = bits & 4;
      for (Dtype out : floats) {
        check(c, Dtype::u8, out);
        check(c, out, Dtype::f32);
        check(c, Dtype::f32, out);
      }
    }
  }
  if (groups < 50) {
    std::printf("only %d launches read 16 bytes at a time\n", groups);
    ++failures;
  }
  std::printf("%d launches, %d failures\n", launches, failures);
  return failures != 0;
}
