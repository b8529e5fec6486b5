// Attention of blocks of queries with online softmax over oneDNN's products, which needs no copy of keys and values.
#pragma once

#include "common.h"

namespace {

// What threads share in one attention call. Strides count elements.
struct Attention {
  int64_t batch, queries, heads, keys, kv_heads, width, length;
  int64_t q_stride[3], k_stride[3], v_stride[3];  // batch, token, head
  const float* q;
  const void *k, *v;
  float* out;
  const int64_t* starts;  // null: every row starts at 0
  const float* sinks;     // null: none; else one more logit for each head
  int64_t window;         // keys that a query sees, its own included; 0: all
  int64_t causal;
  int64_t rounded;  // whether queries and keys may have 8 bits, each token's of a head by themselves
  float scale;
};

// Blocks of queries and keys whose scores fit the second-level cache. A last block takes up to a quarter more so that
// none is tiny, and keys come in whole steps so that growing lengths share a few compiled shapes.
constexpr int64_t kQueryBlock = 256, kKeyBlock = 512, kKeyStep = 32;

// Attention of one block of query rows (token-major, then the heads that share a key head) with online softmax
// (arXiv 2205.14135). T: type of the products' operands.
template <class T>
void attend(const Attention& a, int64_t b, int64_t kv, int64_t first, int64_t rows) {
  constexpr int dtype = sizeof(T) == 2 ? kBF16 : kF32;
  thread_local Scratch q_scratch, score_scratch, p_scratch, out_scratch, state_scratch;
  const int64_t group = a.heads / a.kv_heads, width = a.width;
  T* q = q_scratch.get<T>(rows * width);
  float* out = out_scratch.get<float>(rows * width);
  float* peak = state_scratch.get<float>(2 * rows);
  float* total = peak + rows;
  const float scale = a.scale * 1.44269504f;  // the softmax below is in powers of 2
  auto q_row = [&](int64_t i) {
    int64_t row = first + i;
    return a.q + b * a.q_stride[0] + row / group * a.q_stride[1] + (kv * group + row % group) * a.q_stride[2];
  };
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = q_row(i);
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) store(q + i * width + d, from[d] * scale);
    peak[i] = -INFINITY, total[i] = 0;
    if (a.sinks) peak[i] = a.sinks[kv * group + (first + i) % group] * 1.44269504f, total[i] = 1;
  }
  std::fill(out, out + rows * width, 0.f);

  const int64_t past = a.length - a.queries;
  int64_t start = a.starts ? a.starts[b] : 0;
  if (a.window) start = std::max(start, past + first / group - a.window + 1);
  const int64_t end = a.causal ? past + (first + rows - 1) / group + 1 : a.length;
  for (int64_t j = start; j < end;) {
    bool last = end - j <= kKeyBlock + kKeyBlock / 4;
    int64_t columns = last ? std::min(round_up(end - j, kKeyStep), a.keys - j) : kKeyBlock;
    int64_t stride = round_up(columns, 32);
    float* scores = score_scratch.get<float>(rows * stride);
    T* p = p_scratch.get<T>(rows * stride);
    const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + j * a.k_stride[1] + kv * a.k_stride[2];
    const T* v = static_cast<const T*>(a.v) + b * a.v_stride[0] + j * a.v_stride[1] + kv * a.v_stride[2];
    multiply({rows, width, columns, dtype, kF32, width, stride, 1, a.k_stride[1]}, {q, k, 0, 0, 0, scores});
    for (int64_t i = 0; i < rows; ++i) {
      int64_t visible = std::min(columns, (a.causal ? past + (first + i) / group + 1 : a.length) - j);
      visible = std::max<int64_t>(visible, 0);
      int64_t low = a.window ? std::max<int64_t>(past + (first + i) / group - a.window + 1 - j, 0) : 0;
      low = std::min(low, visible);
      const float* s = scores + i * stride;
      T* to = p + i * stride;
      float top = peak[i];
#pragma omp simd reduction(max : top)
      for (int64_t c = low; c < visible; ++c) top = s[c] > top ? s[c] : top;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = low; c < visible; ++c) {
        float e = exp2_nonpositive(s[c] - top);
        store(to + c, e);
        sum += e;
      }
      std::fill(to, to + low, T(0));
      std::fill(to + visible, to + columns, T(0));
      if (visible > low && top > peak[i]) {
        float shrink = exp2_nonpositive(peak[i] - top);
        total[i] *= shrink;
        float* o = out + i * width;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) o[d] *= shrink;
        peak[i] = top;
      }
      total[i] += sum;
    }
    Product weigh{rows, columns, width, dtype, kF32, stride, width, a.v_stride[1], 1};
    weigh.accumulate = 1;
    multiply(weigh, {p, v, 0, 0, 0, out});
    j += columns;
  }
  for (int64_t i = 0; i < rows; ++i) {
    int64_t row = first + i;
    float* to = a.out + ((b * a.queries + row / group) * a.heads + kv * group + row % group) * width;
    float inverse = total[i] > 0 ? 1.f / total[i] : 0.f;  // a padding query sees no key
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) to[d] = out[i * width + d] * inverse;
  }
}

template <class T>
void attend_all(const Attention& a) {
  const int64_t rows = a.queries * (a.heads / a.kv_heads);
  const int64_t blocks = std::max<int64_t>(1, (rows - kQueryBlock / 4 + kQueryBlock - 1) / kQueryBlock);
  const int64_t tasks = a.batch * a.kv_heads * blocks;
  std::atomic<bool> failed{false};
  for_tasks(tasks, true, [&](int64_t task) {
    int64_t block = a.causal ? blocks - 1 - task / (a.batch * a.kv_heads) : task % blocks;  // long rows first
    int64_t head = a.causal ? task % (a.batch * a.kv_heads) : task / blocks;
    int64_t first = block * kQueryBlock, count = block == blocks - 1 ? rows - first : kQueryBlock;
    try {
      attend<T>(a, head / a.kv_heads, head % a.kv_heads, first, count);
    } catch (...) {
      failed = true;  // an exception must not leave the parallel region
    }
  });
  if (failed) throw std::runtime_error("attention failed");
}

// Keys or values as contiguous bfloat16 [batch, kv_heads, keys, width], zeros from a.length on.
void to_bf16(const void* x, const Attention& a, int64_t keys, int64_t* stride, bf16* out) {
  const float* from = static_cast<const float*>(x);
#pragma omp parallel for
  for (int64_t head = 0; head < a.batch * a.kv_heads; ++head) {
    const float* rows = from + head / a.kv_heads * stride[0] + head % a.kv_heads * stride[2];
    bf16* to = out + head * keys * a.width;
    for (int64_t s = 0; s < a.length; ++s) normalize_row(rows + s * stride[1], a.width, Norm{}, to + s * a.width);
    std::fill(to + a.length * a.width, to + keys * a.width, bf16(0));
  }
  stride[0] = a.kv_heads * keys * a.width, stride[1] = a.width, stride[2] = keys * a.width;
}

}  // namespace
