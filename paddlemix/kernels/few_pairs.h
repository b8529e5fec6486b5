// Products of a few rows in bfloat16 with weights as oneDNN's matmul for such processors prefers them: for 64 outputs at a time two
// inputs of each side by side, then the next two. A step of decoding is bound by reading them, once and in order here; oneDNN's own
// kernel, made for many rows, reads at two thirds of that speed (measured on Zen 4). Each output is one sum, in the order of its inputs,
// so that it does not depend on how many rows there are.
#pragma once

#include <vector>

#include "common.h"
#include "tile.h"

#if defined(PADDLEMIX_PANELS) && defined(__AVX512BF16__)  // what has these instructions has those of VNNI, too
#define PADDLEMIX_PAIRS
#endif

namespace {

constexpr int64_t kPanelInputs = 32;  // a panel's inputs come in multiples of these, the rest zeros

// Where weight (i, j) of k inputs is.
inline int64_t place_in_pairs(int64_t k, int64_t i, int64_t j) {
  return j / kPanelOutputs * round_up(k, kPanelInputs) * kPanelOutputs + i / 2 * 2 * kPanelOutputs + j % kPanelOutputs * 2 + i % 2;
}

// Layout of weights [k, n] that oneDNN prefers for many rows, and the name of what would multiply with them.
void* preferred_layout(int64_t k, int64_t n, int dtype, char* implementation = nullptr) {
  int64_t dims[] = {k, n};
  void *any, *src = strided(kChunk, k, dtype, k), *dst = strided(kChunk, n, kF32, n), *attr, *pd, *found;
  check(dnnl_memory_desc_create_with_tag(&any, 2, dims, dtype, kAnyTag), "memory descriptor");
  check(dnnl_primitive_attr_create(&attr), "attributes");
  check(dnnl_matmul_primitive_desc_create(&pd, engine(), src, any, nullptr, dst, attr), "matmul");
  const char* info;
  check(dnnl_primitive_desc_query(pd, kQueryImplInfo, 0, &info), "query");
  if (implementation) std::strncpy(implementation, info, 63);
  check(dnnl_memory_desc_clone(&found, dnnl_primitive_desc_query_md(pd, kQueryWeights, 0)), "clone");
  dnnl_primitive_desc_destroy(pd), dnnl_primitive_attr_destroy(attr);
  dnnl_memory_desc_destroy(any), dnnl_memory_desc_destroy(src), dnnl_memory_desc_destroy(dst);
  return found;
}

void reorder(const void* from_layout, const void* from, const void* to_layout, void* to) {
  void *attr, *pd, *primitive, *source, *target;
  check(dnnl_primitive_attr_create(&attr), "attributes");
  check(dnnl_reorder_primitive_desc_create(&pd, from_layout, engine(), to_layout, engine(), attr), "reorder");
  check(dnnl_primitive_create(&primitive, pd), "reorder");
  check(dnnl_memory_create(&source, from_layout, engine(), const_cast<void*>(from)), "memory");
  check(dnnl_memory_create(&target, to_layout, engine(), to), "memory");
  dnnl_exec_arg args[] = {{kArgSrc, source}, {kArgDst, target}};
  check(dnnl_primitive_execute(primitive, stream(), 2, args), "reorder");
  dnnl_memory_destroy(source), dnnl_memory_destroy(target);
  dnnl_primitive_destroy(primitive), dnnl_primitive_desc_destroy(pd), dnnl_primitive_attr_destroy(attr);
}

// The number that this version of oneDNN gives such a layout, 0 if it prefers another: its headers, which would tell, are not there.
int pairs_tag() {
#ifdef PADDLEMIX_PAIRS
  static const int tag = [] {
    constexpr int64_t k = 96, n = 100;
    int64_t dims[] = {k, n};
    void *preferred = preferred_layout(k, n, kBF16), *md, *plain = strided(k, n, kBF16, n);
    int found = 0;
    for (int candidate = kAnyTag + 1; candidate < 4096 && !found; ++candidate) {
      if (dnnl_memory_desc_create_with_tag(&md, 2, dims, kBF16, candidate)) continue;
      if (dnnl_memory_desc_equal(md, preferred)) found = candidate;
      dnnl_memory_desc_destroy(md);
    }
    // Numbers that tell where each was.
    std::vector<bf16> numbers(k * n), moved(dnnl_memory_desc_get_size(preferred) / sizeof(bf16));
    for (int64_t i = 0; i < k * n; ++i) numbers[i] = bf16(128 + i);
    reorder(plain, numbers.data(), preferred, moved.data());
    for (int64_t i = 0; i < k * n; ++i) {
      const int64_t place = place_in_pairs(k, i / n, i % n);
      if (place >= int64_t(moved.size()) || moved[place] != numbers[i]) found = 0;
    }
    dnnl_memory_desc_destroy(preferred), dnnl_memory_desc_destroy(plain);
    return found;
  }();
  return tag;
#else
  return 0;
#endif
}

// Whether weights of this layout lie in pairs.
bool in_pairs(const void* layout, int64_t k, int64_t n, int dtype) {
  if (dtype != kBF16 || k % 2 || !pairs_tag()) return false;
  int64_t dims[] = {k, n};
  void* md;
  check(dnnl_memory_desc_create_with_tag(&md, 2, dims, kBF16, pairs_tag()), "memory descriptor");
  const bool equal = dnnl_memory_desc_equal(md, layout);
  dnnl_memory_desc_destroy(md);
  return equal;
}

#ifdef PADDLEMIX_PAIRS
// 32 numbers as 16 pairs; and 16 numbers, each in the lower half of a pair.
inline __m512i pairs_of(const bf16* x) { return _mm512_loadu_si512(x); }
inline __m512i pairs_of(const float* x) { return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x)); }
inline __m512i wide(const bf16* x) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
inline __m512i wide(const float* x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x))); }

// Weights [k, n] of which one stride is 1, as place_in_pairs() tells, many times as fast as oneDNN's reorder: training packs them at
// each step.
template <class T>
void pack_pairs(const T* from, int64_t k, int64_t n, int64_t row_stride, int64_t column_stride, bf16* to) {
  const int64_t padded = round_up(k, kPanelInputs), panels = (n + kPanelOutputs - 1) / kPanelOutputs;
  // What follows `x`, of which `left` numbers are there and zeros behind them.
  auto whole = [](const T* x, int64_t left, int64_t count, T* edge) {
    if (left >= count) return x;
    std::fill(edge, edge + count, T(0));
    if (left > 0) std::copy(x, x + left, edge);
    return static_cast<const T*>(edge);
  };
  if (row_stride == 1) {  // each output's inputs lie side by side
    for_tasks(panels, true, [&](int64_t task) {
      T edge[kPanelInputs];
      for (int64_t i = 0; i < padded; i += kPanelInputs)
        for (int64_t j = 0; j < kPanelOutputs; j += 16) {
          __m512i rows[16];
          for (int64_t c = 0; c < 16; ++c) {
            const int64_t output = task * kPanelOutputs + j + c;
            rows[c] = output < n ? pairs_of(whole(from + output * column_stride + i, k - i, kPanelInputs, edge)) : _mm512_setzero_si512();
          }
          store_turned(rows, reinterpret_cast<uint8_t*>(to + (task * padded + i) * kPanelOutputs + 2 * j), 4 * kPanelOutputs);
        }
    });
    return;
  }
  for_tasks(padded / kPanelInputs, true, [&](int64_t task) {
    T edge[16];
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t i = task * kPanelInputs; i < (task + 1) * kPanelInputs; i += 2)
        for (int64_t j = panel * kPanelOutputs; j < (panel + 1) * kPanelOutputs; j += 16) {
          const T* row = from + i * row_stride + j;
          __m512i both = i < k ? wide(whole(row, n - j, 16, edge)) : _mm512_setzero_si512();
          if (i + 1 < k) both = _mm512_or_si512(both, _mm512_slli_epi32(wide(whole(row + row_stride, n - j, 16, edge)), 16));
          _mm512_storeu_si512(to + (panel * padded + i) * kPanelOutputs + 2 * (j % kPanelOutputs), both);
        }
  });
}

constexpr int64_t kFetched = 4096;  // bytes of weights that are fetched before they are needed

// x [R, k] @ a panel of weights -> y [R, 64], for one or two rows.
template <int R>
inline void add_pairs(int64_t k, const bf16* x, const bf16* w, float* y) {
  __m512 sums[R][4] = {};
  for (int64_t i = 0; i < k; i += 2, w += 2 * kPanelOutputs)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(w + 32 * j) + kFetched, _MM_HINT_T0);
      const __m512bh weights = (__m512bh)_mm512_loadu_si512(w + 32 * j);
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, x + r * k + i, sizeof pair);
        sums[r][j] = _mm512_dpbf16_ps(sums[r][j], (__m512bh)_mm512_set1_epi32(pair), weights);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(y + r * kPanelOutputs + 16 * j, sums[r][j]);
}

// The same for up to six rows; what comes next of the weights is fetched the first time.
inline void add_tile_of_pairs(int64_t k, const bf16* x, int64_t rows, const bf16* w, bool fetch, float* y) {
  const TileRows values = tile_rows(x, k * sizeof(bf16), rows);
  if (fetch)
    PADDLEMIX_MULTIPLY_TILE("vdpbf16ps", PADDLEMIX_CLEAR,
                            "prefetcht0 4096(%[w])\nprefetcht0 4160(%[w])\nprefetcht0 4224(%[w])\nprefetcht0 4288(%[w])\n",
                            PADDLEMIX_EACH_ROW(PADDLEMIX_STORE, ""), values, w, 1, k / 2, nullptr, nullptr, y);
  else
    PADDLEMIX_MULTIPLY_TILE("vdpbf16ps", PADDLEMIX_CLEAR, "", PADDLEMIX_EACH_ROW(PADDLEMIX_STORE, ""), values, w, 1, k / 2, nullptr,
                            nullptr, y);
}

// out [m, n] = act(x [m, k] @ w + bias) * mul + add, as Product, for w in pairs.
void multiply_pairs(int64_t m, int64_t k, int64_t n, const bf16* x, const bf16* w, const float* bias, int activation,
                    const bf16* mul, const float* add, void* out, int out_type) {
  for_tasks((n + kPanelOutputs - 1) / kPanelOutputs, m * k * n > 1 << 16, [&](int64_t task) {
    const int64_t first = task * kPanelOutputs, count = std::min(kPanelOutputs, n - first);
    const bf16* panel = w + first * round_up(k, kPanelInputs);
    alignas(64) float sums[kTileRows * kPanelOutputs];
    for (int64_t row = 0, rows; row < m; row += rows) {
      rows = std::min<int64_t>(kTileRows, m - row);
      if (rows == 1) add_pairs<1>(k, x + row * k, panel, sums);
      else if (rows == 2) add_pairs<2>(k, x + row * k, panel, sums);
      else add_tile_of_pairs(k, x + row * k, rows, panel, row == 0, sums);
      for (int64_t r = 0; r < rows; ++r) {
        float* y = sums + r * kPanelOutputs;
        const int64_t at = (row + r) * n + first;
        if (bias)
#pragma omp simd
          for (int64_t c = 0; c < count; ++c) y[c] += bias[first + c];
        activate(y, count, activation);
        if (mul)
#pragma omp simd
          for (int64_t c = 0; c < count; ++c) y[c] *= from_bits(uint32_t(mul[at + c]) << 16);
        if (add)
#pragma omp simd
          for (int64_t c = 0; c < count; ++c) y[c] += add[at + c];
        if (out_type == kF32) std::memcpy(static_cast<float*>(out) + at, y, count * sizeof(float));
        else normalize_row(y, count, Norm{}, static_cast<bf16*>(out) + at);
      }
    }
  });
}
#endif

}  // namespace
