// Runs every CPU kernel on std::thread, for ThreadSanitizer, which does not know OpenMP's threads.
//
// The kernels are cut into the same tasks once more on one thread, and the results must be the same
// bits. Prints a line for each kernel and instruction set; exits with 1 if results differ.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "domain_mixup/cpu.h"
#include "hypersphere_repulsion/cpu.h"
#include "margin_cross_entropy/cpu.h"
#include "row_update/cpu.h"
#include "sample_classes/cpu.h"
#include "simd/isa.h"
#include "simd/scalar.h"

namespace {

using namespace synface;

constexpr int kThreads = 4;

// Each thread takes the next task when it is done, as torch_runtime() has it.
Runtime threads() {
  return {kThreads, [](int tasks, const std::function<void(int)>& run) {
            std::atomic<int> next{0};
            std::vector<std::thread> all;
            for (int thread = 0; thread < std::min(tasks, kThreads); ++thread) {
              all.emplace_back([&] {
                for (int task = next++; task < tasks; task = next++) run(task);
              });
            }
            for (std::thread& thread : all) thread.join();
          }};
}

// The same tasks, one after the other.
Runtime in_turn() { return {kThreads, one_thread().parallel}; }

std::mt19937 generator(5);

template <class T>
std::vector<T> numbers(int64_t n) {
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<size_t>(n));
  for (T& value : values) {
    if constexpr (std::is_same_v<T, uint16_t>) {
      value = to_bf16(float(normal(generator)));
    } else {
      value = T(normal(generator));
    }
  }
  return values;
}

template <class T>
constexpr Dtype stored_as = std::is_same_v<T, uint16_t> ? Dtype::bf16 : dtype_of<T>;

template <class T>
Rows matrix(const std::vector<T>& values, int64_t rows, int64_t cols) {
  return {.data = values.data(), .dtype = stored_as<T>, .rows = rows, .cols = cols, .stride = cols};
}

// All results of a kernel, as bytes.
class Results {
 public:
  template <class T>
  void add(const std::vector<T>& values) {
    const auto* begin = reinterpret_cast<const char*>(values.data());
    bytes_.insert(bytes_.end(), begin, begin + values.size() * sizeof(T));
  }
  bool operator==(const Results& other) const { return bytes_ == other.bytes_; }

 private:
  std::vector<char> bytes_;
};

// T: of the arithmetic; S: of the matrices.
template <class T, class S>
Results margin(const Runtime& runtime) {
  using namespace margin_cross_entropy;
  const int64_t n = 70, d = 48, m = 2, c = 1400, k = 2;
  generator.seed(1);
  const auto x = numbers<S>(n * d), w = numbers<S>(c * m * d);
  std::vector<int64_t> labels(n * k);
  for (auto& label : labels) label = int64_t(generator() % unsigned(c)) - 1;
  const Problem problem{.input = matrix(x, n, d),
                        .weight = matrix(w, c * m, d),
                        .sub_centers = m,
                        .classes = c,
                        .labels = labels.data(),
                        .labels_per_row = k,
                        .scale = 16,
                        .limit = 0.9};
  std::vector<double> lse(n), cosine(n * k), filtered(n), sum(n), center_sum(d);
  std::vector<T> most(n), mean(n * d), saved(c * m * n);
  forward<T>(problem, runtime,
             {.negative_lse = lse.data(),
              .negative_max = most.data(),
              .target_cosine = cosine.data(),
              .filtered = filtered.data(),
              .cosine_sum = sum.data(),
              .mean_center = mean.data(),
              .center_sum = center_sum.data(),
              .saved = {.cosines = saved.data(), .stride = n, .classes = c, .embeddings = n}});
  const auto grad_lse = numbers<double>(n), grad_cosine = numbers<double>(n * k),
             grad_sum = numbers<double>(n);
  std::vector<S> grad_input(n * d), grad_rows(c * m * d), delivered(c * m * d);
  Upstream<T> upstream{
      .negative_lse = lse.data(),
      .mean_center = mean.data(),
      .center_sum = center_sum.data(),
      .grad_negative_lse = grad_lse.data(),
      .grad_target_cosine = grad_cosine.data(),
      .grad_cosine_sum = grad_sum.data(),
      .saved = {.cosines = saved.data(), .stride = n, .classes = c, .embeddings = n}};
  backward<T>(problem, runtime, upstream, {.input = grad_input.data(), .rows = grad_rows.data()});
  upstream.saved = {};
  backward<T>(problem, runtime, upstream, {.on_tile = [&](Range classes, const void* rows) {
                std::memcpy(delivered.data() + classes.begin * m * d, rows,
                            size_t(classes.size() * m * d) * sizeof(S));
              }});
  Results all;
  for (const auto& each : {lse, cosine, filtered, sum, center_sum}) all.add(each);
  for (const auto& each : {most, mean, saved}) all.add(each);
  for (const auto& each : {grad_input, grad_rows, delivered}) all.add(each);
  return all;
}

template <class T, class S>
Results repulsion(const Runtime& runtime, bool two_sets) {
  using namespace hypersphere_repulsion;
  const int64_t n = 700, others = two_sets ? 300 : n, d = 24, k = 3;
  generator.seed(2);
  const auto x = numbers<S>(n * d), y = numbers<S>(others * d);
  std::vector<double> inverse_x(n), inverse_y(others);
  inverse_norms<T>(matrix(x, n, d), runtime, inverse_x.data());
  inverse_norms<T>(matrix(y, others, d), runtime, inverse_y.data());
  const Points of_y{.rows = matrix(y, others, d), .inverse = inverse_y.data()};
  const Problem problem{.x = {.rows = matrix(x, n, d), .inverse = inverse_x.data()},
                        .y = two_sets ? &of_y : nullptr};
  Results all;
  for (const Kind kind : {Kind::log_sum_exp, Kind::riesz, Kind::log, Kind::hinge}) {
    std::vector<T> grad_x(n * d), grad_y(others * d);
    const double energy =
        pairs<T>(problem,
                 {.kind = kind,
                  .a = kind == Kind::hinge ? 0.2 : 2,
                  .power = 1,
                  .r_min = 1e-3,
                  .split_bf16 = true},
                 runtime, {.x = grad_x.data(), .y = two_sets ? grad_y.data() : nullptr});
    all.add(std::vector<double>{energy});
    all.add(grad_x);
    all.add(grad_y);
  }
  std::vector<double> square(n * k);
  std::vector<int64_t> index(n * k);
  nearest<T>(problem, k, runtime, {.square = square.data(), .index = index.data()});
  const auto grad_square = numbers<double>(n * k);
  std::vector<S> grad_x(n * d), grad_y(others * d);
  nearest_backward<T>(
      problem, {.k = k, .index = index.data(), .grad_square = grad_square.data(), .r_min = 1e-3},
      runtime, {.x = grad_x.data(), .y = two_sets ? grad_y.data() : nullptr});
  all.add(square);
  all.add(index);
  all.add(grad_x);
  all.add(grad_y);
  return all;
}

Results mixup(const Runtime& runtime, bool interleaved) {
  using namespace domain_mixup;
  const int64_t batch = 5, channels = 3, height = 90, width = 70,
                sample = channels * height * width;
  generator.seed(3);
  std::vector<uint8_t> bytes[2] = {std::vector<uint8_t>(batch * sample),
                                   std::vector<uint8_t>(batch * sample)};
  for (auto& side : bytes) {
    for (auto& value : side) value = uint8_t(generator());
  }
  const auto synthetic = numbers<float>(batch * sample), real = numbers<float>(batch * sample);
  const auto gradient = numbers<float>(batch * sample);
  const std::vector<double> psi{0, 0.25, 0.5, 0.9, 1};
  const std::vector<Affine> affine(channels, {127.5, 1 / 127.5});
  const bool flips[5] = {true, false, true, false, true};
  const auto images = [&](const auto& values, Dtype dtype, bool of_interleaved) {
    return Images{.data = values.data(),
                  .dtype = dtype,
                  .interleaved = of_interleaved,
                  .sample_stride = sample};
  };
  Problem problem{.synthetic = images(bytes[0], Dtype::u8, true),
                  .real = images(bytes[1], Dtype::u8, true),
                  .psi = psi.data(),
                  .affine = affine.data(),
                  .flip_synthetic = flips,
                  .batch = batch,
                  .channels = channels,
                  .height = height,
                  .width = width};
  Results all;
  std::vector<float> out(batch * sample), grad_synthetic(batch * sample), grad_real(batch * sample);
  std::vector<uint16_t> half(batch * sample);
  std::vector<double> grad_psi(batch);
  const auto target = [&](auto& values, Dtype dtype) {
    return MutableImages{
        .data = values.data(), .dtype = dtype, .interleaved = interleaved, .sample_stride = sample};
  };
  forward(problem, runtime, target(out, Dtype::f32));
  forward(problem, runtime, target(half, Dtype::bf16));
  problem.synthetic = images(synthetic, Dtype::f32, false);
  problem.real = images(real, Dtype::f32, interleaved);
  backward(problem, runtime, images(gradient, Dtype::f32, interleaved),
           {.synthetic = target(grad_synthetic, Dtype::f32),
            .real = target(grad_real, Dtype::f32),
            .psi = grad_psi.data()});
  for (const auto& each : {out, grad_synthetic, grad_real}) all.add(each);
  all.add(half);
  all.add(grad_psi);
  return all;
}

template <class T, class S>
Results update(const Runtime& runtime) {
  using namespace row_update;
  const int64_t c = 3000, d = 33, s = c / 2;
  generator.seed(4);
  auto weight = numbers<S>(c * d);
  const auto gradient = numbers<T>(s * d);
  std::vector<S> first(c * d), second(c * d);
  std::vector<int64_t> ids(s), last(c);
  for (int64_t i = 0; i < s; ++i) ids[i] = 2 * i + i % 2;
  const auto state = [&](std::vector<S>& values) {
    return State{.data = values.data(), .dtype = stored_as<S>, .stride = d};
  };
  Problem problem{.weight = state(weight),
                  .gradient = matrix(gradient, s, d),
                  .class_ids = ids.data(),
                  .count = s,
                  .cols = d,
                  .step = 7,
                  .last_step = last.data(),
                  .long_steps = true,
                  .stochastic = true,
                  .seed = 5};
  sgd<T>(problem, state(first),
         {.lr = 0.1, .momentum = 0.9, .weight_decay = 0.01, .dampening = 0, .nesterov = true},
         runtime);
  std::fill(first.begin(), first.end(), S(0));
  problem.step = 9;
  adamw<T>(problem, state(first), state(second),
           {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8, .weight_decay = 0.1}, runtime);
  Results all;
  for (const auto& each : {weight, first, second}) all.add(each);
  all.add(last);
  return all;
}

Results sample(const Runtime& runtime) {
  const int64_t classes = 1 << 20, wanted = classes / 3;
  std::vector<int64_t> labels(500);
  generator.seed(5);
  for (auto& label : labels) label = int64_t(generator() % unsigned(classes));
  const sample_classes::Sample drawn({.labels = labels.data(),
                                      .count = int64_t(labels.size()),
                                      .classes = classes,
                                      .wanted = wanted,
                                      .ignore = -100,
                                      .seed = 6});
  std::vector<int64_t> ids(size_t(drawn.size())), remapped(labels.size());
  drawn.write(runtime, ids.data(), remapped.data());
  Results all;
  all.add(ids);
  all.add(remapped);
  return all;
}

}  // namespace

int main() {
  const std::vector<std::pair<const char*, std::function<Results(const Runtime&)>>> kernels{
      {"margin_cross_entropy float32", margin<float, float>},
      {"margin_cross_entropy float64", margin<double, double>},
      {"margin_cross_entropy bfloat16", margin<float, uint16_t>},
      {"hypersphere_repulsion float32", [](auto& r) { return repulsion<float, float>(r, false); }},
      {"hypersphere_repulsion float64, y",
       [](auto& r) { return repulsion<double, double>(r, true); }},
      {"hypersphere_repulsion bfloat16, y",
       [](auto& r) { return repulsion<float, uint16_t>(r, true); }},
      {"domain_mixup planar", [](auto& r) { return mixup(r, false); }},
      {"domain_mixup interleaved", [](auto& r) { return mixup(r, true); }},
      {"row_update float32", update<float, float>},
      {"row_update bfloat16", update<float, uint16_t>},
      {"sample_classes", sample}};
  bool same = true;
  for (const Isa isa : isas()) {
    setenv("SYNFACE_CPU_ISA", name(isa), 1);  // no other thread runs now
    for (const auto& [kernel, run] : kernels) {
      const bool equal = run(threads()) == run(in_turn());
      same = same && equal;
      std::printf("%s, %s: %s\n", kernel, name(isa), equal ? "the same bits" : "DIFFERENT");
      std::fflush(stdout);
    }
  }
  return same ? 0 : 1;
}
