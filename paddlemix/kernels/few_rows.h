// Products of a few rows with weights that lie row by row, which are bound by reading them: each output is one sum, in the order
// of its inputs, so that it does not depend on how many rows there are. oneDNN's sgemm, which takes weights of this layout, packs
// them again in each call: two rows of it cost four to five times one (measured on Zen 3).
#pragma once

#include "common.h"

namespace {

#ifdef PADDLEMIX_VECTORS
constexpr int64_t kFewRows = 64;  // more are work enough for oneDNN
#else
constexpr int64_t kFewRows = 0;  // which has vectors where this has none
#endif

// y [R, count] += x [R, K] @ w [K, count], what comes next in each row being fetched.
template <int R, int K, bool fetch>
inline void add_products(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t count, float* y,
                         int64_t y_stride) {
  int64_t c = 0;
#ifdef PADDLEMIX_VECTORS
  __m256 factors[R][K];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < K; ++i) factors[r][i] = _mm256_broadcast_ss(x + r * x_stride + i);
  for (; c + 8 <= count; c += 8) {
    __m256 sums[R];
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) sums[r] = _mm256_loadu_ps(y + r * y_stride + c);
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      if (fetch && c % 16 == 0) _mm_prefetch(reinterpret_cast<const char*>(w + i * w_stride + c + 128), _MM_HINT_T0);
      const __m256 weights = _mm256_loadu_ps(w + i * w_stride + c);
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) sums[r] = _mm256_fmadd_ps(factors[r][i], weights, sums[r]);
    }
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) _mm256_storeu_ps(y + r * y_stride + c, sums[r]);
  }
#endif
  for (; c < count; ++c)
    for (int r = 0; r < R; ++r) {
      float sum = y[r * y_stride + c];
      for (int i = 0; i < K; ++i) sum = std::fma(x[r * x_stride + i], w[i * w_stride + c], sum);
      y[r * y_stride + c] = sum;
    }
}

// y [m, count] += x [m, K] @ w [K, count], three rows at a time: as many as the registers have room for.
template <int K>
inline void add_inputs(int64_t m, const float* x, int64_t k, const float* w, int64_t n, int64_t count, float* y) {
  if (m == 1) return add_products<1, K, true>(x, k, w, n, count, y, count);
  if (m == 2) return add_products<2, K, true>(x, k, w, n, count, y, count);
  add_products<3, K, true>(x, k, w, n, count, y, count);
  int64_t r = 3;
  for (; r + 3 <= m; r += 3) add_products<3, K, false>(x + r * k, k, w, n, count, y + r * count, count);
  if (m - r == 2) add_products<2, K, false>(x + r * k, k, w, n, count, y + r * count, count);
  if (m - r == 1) add_products<1, K, false>(x + r * k, k, w, n, count, y + r * count, count);
}

// out [m, n] = act(x [m, k] @ w [k, n] + bias) * mul + add, as Product.
void multiply_few(int64_t m, int64_t k, int64_t n, const float* x, const float* w, const float* bias, int activation,
                  const float* mul, const float* add, float* out) {
  // Blocks of columns whose sums stay in the second-level cache, and of which each thread has some.
  const int64_t share = round_up((n + 2 * omp_get_max_threads() - 1) / (2 * omp_get_max_threads()), 16);
  const int64_t block = std::min<int64_t>(m == 1 ? 4096 : 1024, share);
  for_tasks((n + block - 1) / block, m * k * n > 1 << 16, [&](int64_t task) {
    thread_local Scratch room;
    const int64_t first = task * block, count = std::min(block, n - first);
    float* y = room.get<float>(m * block);
    std::fill(y, y + m * count, 0.f);
    int64_t i = 0;
    if (m == 1)
      for (; i + 8 <= k; i += 8) add_inputs<8>(m, x + i, k, w + i * n + first, n, count, y);
    for (; i + 4 <= k; i += 4) add_inputs<4>(m, x + i, k, w + i * n + first, n, count, y);
    for (; i < k; ++i) add_inputs<1>(m, x + i, k, w + i * n + first, n, count, y);
    for (int64_t r = 0; r < m; ++r) {
      float* row = y + r * count;
      const int64_t at = r * n + first;
      if (bias)
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) row[c] += bias[first + c];
      activate(row, count, activation);
      if (mul)
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) row[c] *= mul[at + c];
      if (add)
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) row[c] += add[at + c];
      std::memcpy(out + at, row, count * sizeof(float));
    }
  });
}

}  // namespace
