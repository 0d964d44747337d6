// The base path of the linear layer: y = x W'^T + bias and dx = dy W', W' decoded on the way and never stored whole.
#include <vector>

#include "blockwise.h"
#include "element.h"
#include "kernels.h"
#include "parallel.h"

namespace qlora {
namespace {

constexpr int kLanes = 16;  // independent partial sums, so that the compiler may vectorize a float32 sum

float dot(const float* a, const float* b, int64_t n) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  float sum = 0.0f;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (float lane : sums) sum += lane;
  return sum;
}

// W' elements first .. first + count as float32: rounded to `dtype`, then widened, which is exact.
template <DType dtype>
void decode(const Weight4bit& weight, const Codebook& codebook, int64_t first, int64_t count,
            std::vector<typename Element<dtype>::type>& rounded, float* out) {
  rounded.resize(size_t(count));
  dequantize_run(weight, codebook, first, count, dtype, rounded.data());
  for (int64_t i = 0; i < count; ++i) out[i] = Element<dtype>::load(rounded[size_t(i)]);
}

template <DType dtype>
std::vector<float> widen(const void* x_, int64_t n) {
  auto* x = static_cast<const typename Element<dtype>::type*>(x_);
  std::vector<float> wide(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) wide[size_t(i)] = Element<dtype>::load(x[i]);
  return wide;
}

template <DType dtype>
void forward(const void* x_, int64_t m, const Weight4bit& weight, const Codebook& codebook, const void* bias_,
             void* y_) {
  using E = Element<dtype>;
  auto* bias = static_cast<const typename E::type*>(bias_);
  auto* y = static_cast<typename E::type*>(y_);
  int64_t rows = weight.rows, cols = weight.cols;
  std::vector<float> x = widen<dtype>(x_, m * cols);
  parallel_for(rows, 8, [&](int64_t begin, int64_t end) {
    std::vector<typename E::type> rounded;
    std::vector<float> row(static_cast<size_t>(cols));
    for (int64_t r = begin; r < end; ++r) {
      decode<dtype>(weight, codebook, r * cols, cols, rounded, row.data());
      float add = bias ? E::load(bias[r]) : 0.0f;
      for (int64_t i = 0; i < m; ++i) y[i * rows + r] = E::store(dot(x.data() + i * cols, row.data(), cols) + add);
    }
  });
}

template <DType dtype>
void backward(const void* dy_, int64_t m, const Weight4bit& weight, const Codebook& codebook, void* dx_) {
  using E = Element<dtype>;
  auto* dx = static_cast<typename E::type*>(dx_);
  int64_t rows = weight.rows, cols = weight.cols;
  std::vector<float> dy = widen<dtype>(dy_, m * rows);
  parallel_for(cols, 256, [&](int64_t begin, int64_t end) {
    int64_t width = end - begin;
    std::vector<typename E::type> rounded;
    std::vector<float> row(static_cast<size_t>(width)), sums(static_cast<size_t>(m * width));
    for (int64_t r = 0; r < rows; ++r) {
      decode<dtype>(weight, codebook, r * cols + begin, width, rounded, row.data());
      for (int64_t i = 0; i < m; ++i) {
        float factor = dy[size_t(i * rows + r)];
        float* sum = sums.data() + i * width;
        for (int64_t c = 0; c < width; ++c) sum[c] += factor * row[size_t(c)];
      }
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t c = 0; c < width; ++c) dx[i * cols + begin + c] = E::store(sums[size_t(i * width + c)]);
    }
  });
}

}  // namespace

void linear_4bit_forward(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                         const void* bias, void* y) {
  auto run = dtype == DType::f32 ? forward<DType::f32> : dtype == DType::bf16 ? forward<DType::bf16> : forward<DType::f16>;
  run(x, m, weight, codebook, bias, y);
}

void linear_4bit_backward(const void* dy, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                          void* dx) {
  auto run =
      dtype == DType::f32 ? backward<DType::f32> : dtype == DType::bf16 ? backward<DType::bf16> : backward<DType::f16>;
  run(dy, m, weight, codebook, dx);
}

}  // namespace qlora
