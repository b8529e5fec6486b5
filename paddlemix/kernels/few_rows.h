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

// y [R, width] += x [R, inputs] @ w [inputs, width], where there is no whole vector.
template <int R>
inline void add_scalars(int64_t inputs, const float* x, int64_t k, const float* w, int64_t n, int64_t width, float* y,
                        int64_t stride) {
  for (int r = 0; r < R; ++r)
    for (int64_t c = 0; c < width; ++c)
      for (int64_t i = 0; i < inputs; ++i) y[r * stride + c] = std::fma(x[r * k + i], w[i * n + c], y[r * stride + c]);
}

// y [R, count] += x [R, K] @ w [K, count], for one or two rows: what is read of the weights is all that counts, so that each row of
// them is read in one go, and what comes next of it fetched.
template <int R, int K>
inline void add_inputs(const float* x, int64_t k, const float* w, int64_t n, int64_t count, float* y) {
  int64_t c = 0;
#ifdef PADDLEMIX_VECTORS
  __m256 factors[R][K];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < K; ++i) factors[r][i] = _mm256_broadcast_ss(x + r * k + i);
  for (; c + 8 <= count; c += 8) {
    __m256 sums[R];
    for (int r = 0; r < R; ++r) sums[r] = _mm256_loadu_ps(y + r * count + c);
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      if (c % 16 == 0) _mm_prefetch(reinterpret_cast<const char*>(w + i * n + c + 128), _MM_HINT_T0);
      const __m256 weights = _mm256_loadu_ps(w + i * n + c);
      for (int r = 0; r < R; ++r) sums[r] = _mm256_fmadd_ps(factors[r][i], weights, sums[r]);
    }
    for (int r = 0; r < R; ++r) _mm256_storeu_ps(y + r * count + c, sums[r]);
  }
#endif
  add_scalars<R>(K, x, k, w + c, n, count - c, y + c, count);
}

template <int R>
void add_rows(const float* x, int64_t k, const float* w, int64_t n, int64_t count, float* y) {
  constexpr int K = R == 1 ? 8 : 4;
  int64_t i = 0;
  for (; i + K <= k; i += K) add_inputs<R, K>(x + i, k, w + i * n, n, count, y);
  for (; i < k; ++i) add_inputs<R, 1>(x + i, k, w + i * n, n, count, y);
}

constexpr int64_t kInputs = 16, kColumns = 16;  // of a tile: weights in the first-level cache, sums in registers
constexpr int kTogether = 6;  // rows of a tile at most

// y [R, width] += x [R, inputs] @ w [inputs, width], for width up to kColumns.
template <int R>
inline void add_tile(int64_t inputs, const float* x, int64_t k, const float* w, int64_t n, int64_t width, float* y,
                     int64_t stride) {
#ifdef PADDLEMIX_VECTORS
  if (width == kColumns) {
    __m256 sums[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 2; ++j) sums[r][j] = _mm256_loadu_ps(y + r * stride + 8 * j);
    for (int64_t i = 0; i < inputs; ++i) {
      const __m256 left = _mm256_loadu_ps(w + i * n), right = _mm256_loadu_ps(w + i * n + 8);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m256 factor = _mm256_broadcast_ss(x + r * k + i);
        sums[r][0] = _mm256_fmadd_ps(factor, left, sums[r][0]);
        sums[r][1] = _mm256_fmadd_ps(factor, right, sums[r][1]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 2; ++j) _mm256_storeu_ps(y + r * stride + 8 * j, sums[r][j]);
    return;
  }
#endif
  add_scalars<R>(inputs, x, k, w, n, width, y, stride);
}

// y [m, count] += x [m, k] @ w [k, count], tile by tile, the weights of the next inputs being fetched.
void add_tiles(int64_t m, int64_t k, const float* x, const float* w, int64_t n, int64_t count, float* y) {
  for (int64_t i = 0; i < k; i += kInputs) {
    const int64_t inputs = std::min(kInputs, k - i), next = std::min(kInputs, k - i - inputs);
    for (int64_t c = 0; c < count; c += kColumns) {
      const int64_t width = std::min(kColumns, count - c);
      const float* from = w + i * n + c;
#ifdef PADDLEMIX_VECTORS
      for (int64_t j = 0; j < next; ++j)
        _mm_prefetch(reinterpret_cast<const char*>(from + (inputs + j) * n), _MM_HINT_T0);
#endif
      int64_t r = 0;
      auto some = [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        add_tile<R>(inputs, x + r * k + i, k, from, n, width, y + r * count + c, count);
        r += R;
      };
      while (r + kTogether <= m) some(std::integral_constant<int, kTogether>());
      switch (m - r) {
        case 5: some(std::integral_constant<int, 5>()); break;
        case 4: some(std::integral_constant<int, 4>()); break;
        case 3: some(std::integral_constant<int, 3>()); break;
        case 2: some(std::integral_constant<int, 2>()); break;
        case 1: some(std::integral_constant<int, 1>()); break;
      }
    }
  }
}

// out [m, n] = act(x [m, k] @ w [k, n] + bias) * mul + add, as Product.
void multiply_few(int64_t m, int64_t k, int64_t n, const float* x, const float* w, const float* bias, int activation,
                  const float* mul, const float* add, float* out) {
  // Blocks of columns whose sums stay in the second-level cache, and of which each thread has some.
  const int64_t share = round_up((n + 2 * omp_get_max_threads() - 1) / (2 * omp_get_max_threads()), 16);
  const int64_t block = std::min<int64_t>(m == 1 ? 4096 : m == 2 ? 1024 : 512, share);
  for_tasks((n + block - 1) / block, m * k * n > 1 << 16, [&](int64_t task) {
    thread_local Scratch room;
    const int64_t first = task * block, count = std::min(block, n - first);
    float* y = room.get<float>(m * block);
    std::fill(y, y + m * count, 0.f);
    if (m == 1) add_rows<1>(x, k, w + first, n, count, y);
    else if (m == 2) add_rows<2>(x, k, w + first, n, count, y);
    else add_tiles(m, k, x, w + first, n, count, y);
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
