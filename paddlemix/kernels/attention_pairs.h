// Attention of many queries in bfloat16 where the processor multiplies pairs of such numbers. Keys and values are laid out once for
// all queries; then six queries at a time go over them, and their scores stay in the first-level cache. What a query gives depends on
// no other query.
#pragma once

#include "attention.h"
#include "few_pairs.h"
#include "rounded.h"

namespace {

#ifdef PADDLEMIX_PAIRS
constexpr int64_t kTileKeys = 64, kBlockKeys = 512;   // keys of a panel, and of a block, whose scores are there at once,
constexpr int64_t kScores = kBlockKeys + kTileKeys;   // or with a panel that would be a block of its own
constexpr int64_t kFewestRows = 32, kTaskTiles = 16;  // rows for which laying out pays; tiles of a thread's task

bool suits_pairs(const Attention& a) {
  return a.width % kTileOutputs == 0 && a.queries * (a.heads / a.kv_heads) >= kFewestRows;
}

// Keys [heads, panels of 64, width / 2, 64, 2] and values [heads, width / 64, keys / 2, 64, 2] in bfloat16, zeros behind the last.
// Rounded keys instead are [heads, panels, width / 4, 64, 4] bytes with 128 added, and have a scale each, [heads, keys].
struct LaidOut {
  int64_t padded, size;  // keys of a head with those that fill up, and numbers
  bf16 *keys = nullptr, *values;
  uint8_t* codes = nullptr;
  float* scales = nullptr;

  LaidOut(const Attention& a, Scratch& key_room, Scratch& value_room, Scratch& scale_room)
      : padded(round_up(a.length, kTileKeys)), size(padded * a.width),
        values(value_room.get<bf16>(a.batch * a.kv_heads * size)) {
    const int64_t heads = a.batch * a.kv_heads;
    if (a.rounded) codes = key_room.get<uint8_t>(heads * size), scales = scale_room.get<float>(heads * padded);
    else keys = key_room.get<bf16>(heads * size);
  }

  // The keys from `first` on that are a panel of a head, k its first.
  void round_keys(const Attention& a, const float* k, int64_t head, int64_t first) const {
    thread_local Scratch room;
    int8_t* rounded = room.get<int8_t>(16 * a.width);
    float total, *scale = scales + head * padded + first;
    for (int64_t j = 0; j < kTileKeys; j += 16) {
      for (int64_t i = 0; i < 16; ++i) {
        const bool there = first + j + i < a.length;
        if (!there) std::fill_n(rounded + i * a.width, a.width, int8_t(0));
        scale[j + i] = there ? round_group(k + (first + j + i) * a.k_stride[1], a.width, 127, rounded + i * a.width, &total) : 0.f;
      }
      lay_out(rounded, a.width, a.width, codes + head * size + first * a.width + 4 * j, 0x80);
    }
  }

  // The same in bfloat16.
  template <class T>
  void lay_keys(const Attention& a, const T* k, int64_t head, int64_t first) const {
    bf16* to = keys + head * size + first * a.width;
    for (int64_t d = 0; d < a.width; d += 32)
      for (int64_t j = 0; j < kTileKeys; j += 16) {
        __m512i rows[16];
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t key = first + j + i;
          rows[i] = key < a.length ? pairs_of(k + key * a.k_stride[1] + d) : _mm512_setzero_si512();
        }
        store_turned(rows, reinterpret_cast<uint8_t*>(to + d * kTileKeys + 2 * j), 4 * kTileKeys);
      }
  }

  template <class T>
  void lay_values(const Attention& a, const T* v, int64_t head, int64_t first) const {
    bf16* to = values + head * size + first * kTileOutputs;
    for (int64_t j = 0; j < kTileKeys; j += 2)
      for (int64_t d = 0; d < a.width; d += 16) {
        const int64_t key = first + j;
        const T* row = v + key * a.v_stride[1] + d;
        __m512i both = key < a.length ? wide(row) : _mm512_setzero_si512();
        if (key + 1 < a.length) both = _mm512_or_si512(both, _mm512_slli_epi32(wide(row + a.v_stride[1]), 16));
        _mm512_store_si512(to + d / kTileOutputs * padded * kTileOutputs + j * kTileOutputs + d % kTileOutputs * 2, both);
      }
  }

  template <class T>
  void fill(const Attention& a) const {
    const int64_t panels = padded / kTileKeys;
    for_tasks(a.batch * panels * a.kv_heads, true, [&](int64_t task) {  // heads of a token lie side by side
      const int64_t kv = task % a.kv_heads, b = task / a.kv_heads / panels, head = b * a.kv_heads + kv;
      const int64_t first = task / a.kv_heads % panels * kTileKeys;
      const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + kv * a.k_stride[2];
      if constexpr (sizeof(T) == sizeof(float)) codes ? round_keys(a, k, head, first) : lay_keys(a, k, head, first);
      else lay_keys(a, k, head, first);
      lay_values(a, static_cast<const T*>(a.v) + b * a.v_stride[0] + kv * a.v_stride[2], head, first);
    });
  }
};

// 2^x to 8e-5, a fiftieth of what bfloat16 sees; 0 of minus infinity.
inline __m512 power_of_two(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  __m512 p = _mm512_set1_ps(0.07802455f);  // a polynomial whose largest relative error between 0 and 1 is least
  for (const float c : {0.22606718f, 0.69583349f, 0.99992523f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, x);
}

// Scores of a query, 64 in every 6 * 64, of which those from `low` to `visible` count -> what they weigh, in powers of 2 above
// `top`, and their sum. `top` grows to the largest.
inline float weigh(float* scores, int64_t panels, int64_t low, int64_t visible, bf16* weights, float* top) {
  constexpr int64_t kStride = kTileRows * kTileKeys;
  auto hide = [&](int64_t from, int64_t to) {
    for (int64_t next; from < to; from = next) {
      next = std::min(to, (from / kTileKeys + 1) * kTileKeys);
      std::fill_n(scores + from / kTileKeys * kStride + from % kTileKeys, next - from, -INFINITY);
    }
  };
  hide(0, low), hide(visible, panels * kTileKeys);
  __m512 peaks = _mm512_set1_ps(*top), sum = _mm512_setzero_ps();
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t c = 0; c < kTileKeys; c += 16) peaks = _mm512_max_ps(peaks, _mm512_loadu_ps(scores + p * kStride + c));
  *top = _mm512_reduce_max_ps(peaks);
  const __m512 peak = _mm512_set1_ps(*top);
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t c = 0; c < kTileKeys; c += 32) {
      const float* s = scores + p * kStride + c;
      const __m512 first = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(s), peak));
      const __m512 second = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(s + 16), peak));
      sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
      _mm512_storeu_si512(weights + p * kTileKeys + c, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
  return _mm512_reduce_add_ps(sum);
}

// Scores of six rows with the keys of a panel, `count` of which are needed: y [6, 64].
inline void score(int64_t width, const TileRows& queries, const bf16* panel, int64_t count, float* y) {
  if (count > 16) {
    PADDLEMIX_MULTIPLY_TILE("vdpbf16ps", PADDLEMIX_CLEAR, "", PADDLEMIX_EACH_ROW(PADDLEMIX_STORE, ""), queries, panel, 1, width / 2,
                            nullptr, nullptr, y);
    return;
  }
  __m512 sums[kTileRows] = {};
  for (int64_t d = 0; d < width; d += 2) {
    const __m512bh keys = (__m512bh)_mm512_loadu_si512(panel + d * kTileKeys);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, queries[r] + d * sizeof(bf16), sizeof pair);
      sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)_mm512_set1_epi32(pair), keys);
    }
  }
  for (int r = 0; r < kTileRows; ++r) _mm512_storeu_ps(y + r * kTileKeys, sums[r]);
}

// The same of rounded rows and keys.
inline void score_bytes(int64_t width, const TileRows& queries, const uint8_t* panel, const float* scales, const TileRow* of_rows,
                        float* y) {
  PADDLEMIX_MULTIPLY_TILE("vpdpbusd", PADDLEMIX_BEGIN, "", PADDLEMIX_SCALES PADDLEMIX_EACH_ROW(PADDLEMIX_FIRST_SCALE, ""), queries,
                          panel, 1, width / 4, scales, of_rows, y);
}

// Up to six rows (queries, then the heads that share a key head).
void attend_tile(const Attention& a, const LaidOut& laid, int64_t b, int64_t kv, int64_t first, int64_t rows) {
  thread_local Scratch query_room, out_room;
  const int64_t at_head = (b * a.kv_heads + kv) * laid.size, padded = laid.padded;
  const bf16* values = laid.values + at_head;
  alignas(64) float scores[kTileRows * kScores];
  alignas(64) bf16 weights[kTileRows * kScores];
  const int64_t group = a.heads / a.kv_heads, width = a.width, past = a.length - a.queries;
  bf16* q = query_room.get<bf16>(kTileRows * width);
  int8_t* bytes = reinterpret_cast<int8_t*>(q);
  TileRow of_rows{};
  float *out = out_room.get<float>(kTileRows * width), top[kTileRows], total[kTileRows];  // out [width / 64, 6, 64]
  const float scale = a.scale * 1.44269504f;  // softmax in powers of 2
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first + r, head = kv * group + row % group;
    const float* from = a.q + b * a.q_stride[0] + row / group * a.q_stride[1] + head * a.q_stride[2];
    if (laid.codes) {
      float sum;
      of_rows.scale[r] = round_group(from, width, 127, bytes + r * width, &sum) * scale;
      of_rows.begin[r] = -128 * int32_t(sum);
    } else {
      const __m512 factor = _mm512_set1_ps(scale);
      for (int64_t d = 0; d < width; d += 32) {
        const __m512 one = _mm512_mul_ps(_mm512_loadu_ps(from + d), factor);
        const __m512 two = _mm512_mul_ps(_mm512_loadu_ps(from + d + 16), factor);
        _mm512_storeu_si512(q + r * width + d, (__m512i)_mm512_cvtne2ps_pbh(two, one));
      }
    }
    top[r] = a.sinks ? a.sinks[head] * 1.44269504f : -INFINITY, total[r] = a.sinks ? 1.f : 0.f;
  }
  std::fill(out, out + kTileRows * width, 0.f);

  const TileRows queries = tile_rows(q, width * (laid.codes ? 1 : sizeof(bf16)), rows);
  const TileRows weighed = tile_rows(weights, kScores * sizeof(bf16), rows);
  const int64_t start = a.starts ? a.starts[b] : 0;
  auto seen = [&](int64_t r, int64_t* low, int64_t* end) {
    const int64_t place = past + (first + r) / group;
    *end = a.causal ? place + 1 : a.length, *low = a.window ? std::max(start, place - a.window + 1) : start;
  };
  int64_t begin, none, end;
  seen(0, &begin, &none), seen(rows - 1, &none, &end);
  for (int64_t at = begin / kTileKeys * kTileKeys, next; at < end; at = next) {
    next = (at / kBlockKeys + 1) * kBlockKeys;  // where blocks end is the same for all queries,
    if (!a.causal && padded - next <= kTileKeys) next = padded;  // who may go on after them or not
    const int64_t panels = (std::min(next, round_up(end, kTileKeys)) - at) / kTileKeys;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t key = at + p * kTileKeys, place = at_head + key * width;
      float* y = scores + p * kTileRows * kTileKeys;
      if (laid.codes) score_bytes(width, queries, laid.codes + place, laid.scales + at_head / width + key, &of_rows, y);
      else score(width, queries, laid.keys + place, end - key, y);
    }
    for (int64_t r = 0; r < rows; ++r) {
      int64_t low, last;
      seen(r, &low, &last);
      low = std::max<int64_t>(low - at, 0), last = std::min(last - at, panels * kTileKeys);
      const float before = top[r];
      if (low >= last) {
        std::fill(weights + r * kScores, weights + r * kScores + panels * kTileKeys, bf16(0));
        continue;
      }
      const float sum = weigh(scores + r * kTileKeys, panels, low, last, weights + r * kScores, top + r);
      const float shrink = total[r] > 0 ? exp2_nonpositive(before - top[r]) : 0.f;
      total[r] = total[r] * shrink + sum;
      if (shrink < 1)
        for (int64_t w = 0; w < width / kTileOutputs; ++w)
#pragma omp simd
          for (int64_t d = 0; d < kTileOutputs; ++d) out[(w * kTileRows + r) * kTileOutputs + d] *= shrink;
    }
    for (int64_t w = 0; w < width / kTileOutputs; ++w)
      PADDLEMIX_MULTIPLY_TILE("vdpbf16ps", PADDLEMIX_LOAD, "", PADDLEMIX_EACH_ROW(PADDLEMIX_STORE, ""), weighed,
                              values + (w * padded + at) * kTileOutputs, 1, (std::min(next, end) - at + 1) / 2, nullptr, nullptr,
                              out + w * kTileRows * kTileOutputs);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first + r;
    float* to = a.out + ((b * a.queries + row / group) * a.heads + kv * group + row % group) * width;
    const float inverse = total[r] > 0 ? 1.f / total[r] : 0.f;  // a padding query sees no key
    for (int64_t w = 0; w < width / kTileOutputs; ++w)
#pragma omp simd
      for (int64_t d = 0; d < kTileOutputs; ++d)
        to[w * kTileOutputs + d] = out[(w * kTileRows + r) * kTileOutputs + d] * inverse;
  }
}

void attend_pairs(const Attention& a, const LaidOut& heads) {
  constexpr int64_t kRows = kTaskTiles * kTileRows;
  const int64_t rows = a.queries * (a.heads / a.kv_heads), blocks = (rows + kRows - 1) / kRows, count = a.batch * a.kv_heads;
  for_tasks(count * blocks, true, [&](int64_t task) {
    const int64_t block = a.causal ? blocks - 1 - task / count : task % blocks;  // long rows first
    const int64_t head = a.causal ? task % count : task / blocks;
    for (int64_t row = block * kRows, end = std::min(rows, row + kRows); row < end; row += kTileRows)
      attend_tile(a, heads, head / a.kv_heads, head % a.kv_heads, row, std::min<int64_t>(kTileRows, end - row));
  });
}
#endif

}  // namespace
