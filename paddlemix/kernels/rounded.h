// Products of rounded activations with codes of 8 and 4 bits as whole numbers; see quantised.cc. A row's sums depend on nothing
// but the row: the numbers of a group are summed exactly, and groups in one order, whoever else is there.
#pragma once

#include <type_traits>

#include "common.h"
#include "tile.h"

namespace {

constexpr int64_t kBlock = 64;      // inputs of a block of codes
constexpr int64_t kAhead = 4096;    // bytes of codes that are fetched before they are needed: processors stop at a page's end

using half = uint16_t;

// What Python hands over; it keeps the memory.
struct Quantised {
  int64_t k, n, padded, group;  // inputs, outputs, inputs with those that fill up, inputs of a group
  int64_t bits, dtype;          // of codes; of the products of many rows, unless activations have 8 bits
  int64_t activations;          // bits that they are rounded to: 16 for few rows, 8 for all
  const uint8_t* codes;
  const half *scales, *zeros;  // zeros: null in 8 bits
  const float *factors, *bias;  // bias: null for none
  const int32_t* order;         // null: as they come
  int64_t groups() const { return padded / group; }
  int64_t row_bytes() const { return padded * bits / 8; }
  // Whether activations have 8 bits: codes of 4 bits would add up what is of two groups where these are half a block.
  bool bytes() const { return activations == 8 && (bits == 8 || group >= kBlock); }
};

inline float to_float(half h) {
#ifdef PADDLEMIX_VECTORS
  return _cvtsh_ss(h);
#else
  uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude < 0x400) return from_bits(sign | bits(magnitude * 5.9604644775390625e-8f));
  return from_bits(sign | ((magnitude + (112 << 10)) << 13));
#endif
}

inline half to_half(float x) {
#ifdef PADDLEMIX_VECTORS
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t u = bits(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude >= 0x47800000) return half(sign | 0x7bff);
  if (magnitude < 0x38800000) return half(sign | uint32_t(std::nearbyint(from_bits(magnitude) * 16777216.f)));
  return half(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
#endif
}

void unpack_block(const uint8_t* codes, int64_t bits, int16_t* out) {
  uint16_t numbers[32];
  std::memcpy(numbers, codes, bits * 8);
  if (bits == 4) {
    for (int t = 0; t < 4; ++t)
      for (int j = 0; j < 16; ++j) out[t * 16 + j] = numbers[j] >> (4 * t) & 15;
  } else {
    for (int half = 0; half < 2; ++half)
      for (int j = 0; j < 16; ++j) {
        out[half * 32 + j] = int8_t(numbers[half * 16 + j] & 255);
        out[half * 32 + 16 + j] = int8_t(numbers[half * 16 + j] >> 8);
      }
  }
}

// Rows of activations in 16 or 8 bits, with a scale and the sum for each group.
struct Rounded {
  int16_t* values;     // [m, padded] in 16 bits, else null
  int8_t* bytes;       // [m, padded] in 8 bits, in the order of the inputs or of codes in their bytes, else null
  float *scale, *sum;  // [m, stride], 0 behind the groups; the sum is one of whole numbers, and times the scale for tiles
  int64_t stride, groups;
  TileRow* tiles;  // [m / 6, groups] where bytes are in the order of the inputs, else null

  void note(int64_t row, int64_t group, float scale_of_group, float total) const {
    const int64_t at = row * stride + group;
    scale[at] = scale_of_group, sum[at] = total;
    if (!tiles) return;
    TileRow& tile = tiles[row / kTileRows * groups + group];
    tile.scale[row % kTileRows] = scale_of_group, tile.begin[row % kTileRows] = -128 * int32_t(total);
    sum[at] *= scale_of_group;
  }
};

// Inputs of a block as its codes are: in 8 bits byte 2j is input j and byte 2j + 1 input 16 + j of each half; in 4 bits the low
// halves of bytes 2j and 2j + 1 are inputs j and 32 + j, the high ones 16 + j and 48 + j, and low halves come first here.
inline void interleave(const int8_t* from, int64_t bits, int8_t* to) {
  for (int part = 0; part < 2; ++part) {
    const int8_t* even = from + (bits == 4 ? 16 : 32) * part;
    const int8_t* odd = even + (bits == 4 ? 32 : 16);
    for (int j = 0; j < 16; ++j) to[32 * part + 2 * j] = even[j], to[32 * part + 2 * j + 1] = odd[j];
  }
}

// Rounds a group to whole numbers of at most `most`; returns its scale and the sum of the numbers.
template <class T>
inline float round_group(const float* from, int64_t count, int32_t most, T* to, float* total) {
  float top = 0;
#ifdef PADDLEMIX_TILE  // g++ 12 keeps what the loops below reduce in memory
  __m512 tops = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) tops = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(from + i)), tops);
  top = _mm512_reduce_max_ps(tops);
  const __m512 factor = _mm512_set1_ps(top > 0 ? most / top : 0.f);
  __m512i sums = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 shifted = _mm512_fmadd_ps(_mm512_loadu_ps(from + i), factor, _mm512_set1_ps(12582912.f));  // to the nearest
    const __m512i whole = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x4b400000));
    sums = _mm512_add_epi32(sums, whole);
    if (sizeof(T) == 1) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(whole));
    else _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(whole));
  }
  *total = _mm512_reduce_add_epi32(sums);
  return top / most;
#endif
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < count; ++i) top = std::fabs(from[i]) > top ? std::fabs(from[i]) : top;
  const float inverse = top > 0 ? most / top : 0.f;
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    int32_t rounded = int32_t(bits(from[i] * inverse + 12582912.f) - 0x4b400000);  // to the nearest
    to[i] = T(rounded);
    sum += rounded;
  }
  *total = sum;
  return top / most;
}

void round_row(const Quantised& w, const float* x, const Norm& norm, const Rounded& r, int64_t row) {
  thread_local Scratch room, small, normed;
  if (norm.weight) {
    float* to = normed.get<float>(w.k);
    normalize_row(x, w.k, norm, to);
    x = to;
  }
  const float* from = x;
  if (w.order || w.padded != w.k) {
    float* sorted = room.get<float>(w.padded);
    if (w.order)
      for (int64_t i = 0; i < w.k; ++i) sorted[i] = x[w.order[i]];
    else
      std::memcpy(sorted, x, w.k * sizeof(float));
    std::fill(sorted + w.k, sorted + w.padded, 0.f);
    from = sorted;
  }
  int8_t* bytes = !r.bytes ? nullptr : r.tiles ? r.bytes + row * w.padded : small.get<int8_t>(w.padded);
  for (int64_t g = 0, at = 0; g < w.groups(); ++g, at += w.group) {
    float total;
    const float scale = bytes ? round_group(from + at, w.group, 127, bytes + at, &total)
                              : round_group(from + at, w.group, 32767, r.values + row * w.padded + at, &total);
    r.note(row, g, scale, total);
  }
  if (bytes && !r.tiles)
    for (int64_t at = 0; at < w.padded; at += kBlock) interleave(bytes + at, w.bits, r.bytes + row * w.padded + at);
}

// Room for m rows; what lies behind the groups of a row is 0. `tiles`: for panels.h.
Rounded rounded_room(const Quantised& w, int64_t m, bool tiles, Scratch& values, Scratch& numbers) {
  const int64_t groups = w.groups(), stride = round_up(groups, 8), all = m * w.padded, count = (m + kTileRows - 1) / kTileRows * groups;
  float* floats = numbers.get<float>(2 * m * stride + (tiles ? count * sizeof(TileRow) / sizeof(float) : 0));
  Rounded r{w.bytes() ? nullptr : values.get<int16_t>(all), w.bytes() ? values.get<int8_t>(all) : nullptr, floats,
            floats + m * stride, stride, groups, tiles ? reinterpret_cast<TileRow*>(floats + 2 * m * stride) : nullptr};
  for (int64_t i = 0; i < 2 * m; ++i) std::fill(floats + i * stride + groups, floats + (i + 1) * stride, 0.f);
  if (tiles) std::fill(r.tiles + count - groups, r.tiles + count, TileRow{});
  return r;
}

Rounded round_rows(const Quantised& w, const float* x, int64_t m, const Norm& norm, bool tiles, Scratch& values,
                   Scratch& numbers) {
  const Rounded r = rounded_room(w, m, tiles, values, numbers);
#pragma omp parallel for if (m * w.k > 32768)
  for (int64_t i = 0; i < m; ++i) round_row(w, x + i * w.k, norm, r, i);
  return r;
}

#ifdef PADDLEMIX_VECTORS
// VNNI's products that are summed in 32 bits, under whichever of its two names the processor has them.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define PADDLEMIX_VNNI(name) _mm256_##name##_epi32
#elif defined(__AVXVNNI__)
#define PADDLEMIX_VNNI(name) _mm256_##name##_avx_epi32
#endif

inline __m256i multiply_add(__m256i sum, __m256i a, __m256i b) {
#ifdef PADDLEMIX_VNNI
  return PADDLEMIX_VNNI(dpwssd)(sum, a, b);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

// Codes of a block as 16-bit numbers, in the order of the inputs.
template <int kBits>
inline void block_of(const uint8_t* codes, __m256i* out) {
  const __m256i* from = reinterpret_cast<const __m256i*>(codes);
  if (kBits == 4) {
    const __m256i nibble = _mm256_set1_epi16(15), v = _mm256_loadu_si256(from);
    out[0] = _mm256_and_si256(v, nibble), out[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    out[2] = _mm256_and_si256(_mm256_srli_epi16(v, 8), nibble), out[3] = _mm256_srli_epi16(v, 12);
  } else {
    for (int i = 0; i < 2; ++i) {
      const __m256i v = _mm256_loadu_si256(from + i);
      out[2 * i] = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), out[2 * i + 1] = _mm256_srai_epi16(v, 8);
    }
  }
}

// Scales of codes and activations together, room [R, stride], and what zeros take away from the sums of R rows.
template <int kBits, int R>
inline void scale_rows(const Quantised& w, int64_t n, const Rounded& x, int64_t row, float* room, __m256* total) {
  const int64_t groups = w.groups(), stride = x.stride, last = w.n * groups - 8;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) total[r] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; g += 8) {
    half ends[16] = {};
    const int64_t at = n * groups + g;
    const half *scales = w.scales + at, *zeros = w.zeros ? w.zeros + at : ends + 8;
    if (at > last) {  // behind the end of the arrays is nothing to be read
      scales = static_cast<half*>(std::memcpy(ends, scales, (groups - g) * sizeof(half)));
      if (w.zeros) zeros = static_cast<half*>(std::memcpy(ends + 8, zeros, (groups - g) * sizeof(half)));
    }
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
    const __m256 offset = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 both = _mm256_mul_ps(scale, _mm256_loadu_ps(x.scale + (row + r) * stride + g));
      _mm256_storeu_ps(room + r * stride + g, both);
      if (kBits == 4)
        total[r] = _mm256_fnmadd_ps(_mm256_mul_ps(both, offset), _mm256_loadu_ps(x.sum + (row + r) * stride + g), total[r]);
    }
  }
}

template <int R>
inline void store_sums(__m256* total, float* out) {
  for (int r = R; r < (R + 3) / 4 * 4; ++r) total[r] = _mm256_setzero_ps();
  for (int r = 0; r < R; r += 4) _mm_storeu_ps(out + r, sums_of(total + r));
}

// One output for R rows of activations, without factor and bias: out[r], of which a multiple of four is written. `room` is for
// R * stride floats.
template <int kBits, int kGroup, int R>
void output(const Quantised& w, int64_t n, const Rounded& x, int64_t row, float* room, float* out) {
  constexpr int kBlocks = kGroup > kBlock ? kGroup / kBlock : 1, kVectors = kGroup / 16 / kBlocks;  // vectors of a block and group
  const int64_t stride = x.stride;
  __m256 total[(R + 3) / 4 * 4];
  scale_rows<kBits, R>(w, n, x, row, room, total);
  const uint8_t* codes = w.codes + n * w.row_bytes();
  const int16_t* values = x.values + row * w.padded;
  for (int64_t at = 0, g = 0; at < w.padded; at += kBlocks * kBlock, g += 4 / kVectors) {
    __m256i sum[R];
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      __m256i c[4];
      const uint8_t* from = codes + (at + b * kBlock) * kBits / 8;
      _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
      block_of<kBits>(from, c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m256i* a = reinterpret_cast<const __m256i*>(values + r * w.padded + at + b * kBlock);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m256i part = _mm256_loadu_si256(a + i);
          const bool fresh = i % kVectors == 0 && b == 0;
          sum[r] = fresh ? _mm256_madd_epi16(c[i], part) : multiply_add(sum[r], c[i], part);
          if (i % kVectors != kVectors - 1 || b != kBlocks - 1) continue;
          const __m256 scale = _mm256_broadcast_ss(room + r * stride + g + i / kVectors);
          total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r]), scale, total[r]);
        }
      }
    }
  }
  store_sums<R>(total, out);
}

// sum + the products of four neighbours each, u not negative: at most 128 * 127 * 2 in 16 bits, which cannot overflow.
inline __m256i add_bytes(__m256i sum, __m256i u, __m256i s) {
#ifdef PADDLEMIX_VNNI
  return PADDLEMIX_VNNI(dpbusd)(sum, u, s);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}

#ifdef PADDLEMIX_VNNI
constexpr bool kFourAtOnce = true;
#else
constexpr bool kFourAtOnce = false;
#endif

// As output(), for activations in 8 bits. Without VNNI the products of a group's codes of 4 bits are added in 16 bits, at most
// 8 * 2 * 15 * 127 of them, before they become 32.
template <int kBits, int kGroup, int R>
void output_of_bytes(const Quantised& w, int64_t n, const Rounded& x, int64_t row, float* room, float* out) {
  constexpr int kBlocks = kGroup > kBlock ? kGroup / kBlock : 1;
  constexpr bool kShort = kBits == 4 && !kFourAtOnce, kHalves = kGroup < kBlock;  // two groups a block
  const int64_t stride = x.stride;
  const __m256i none = _mm256_setzero_si256(), nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
  __m256 total[(R + 3) / 4 * 4];
  scale_rows<kBits, R>(w, n, x, row, room, total);
  const uint8_t* codes = w.codes + n * w.row_bytes();
  const int8_t* values = x.bytes + row * w.padded;
  for (int64_t at = 0, g = 0; at < w.padded; at += kBlocks * kBlock, g += kHalves ? 2 : 1) {
    __m256i sum[R];
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      const uint8_t* from = codes + (at + b * kBlock) * kBits / 8;
      _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
      const __m256i* vectors = reinterpret_cast<const __m256i*>(from);
      __m256i c[2], u[2];
      c[0] = _mm256_loadu_si256(vectors);
      if (kBits == 4) {
        u[1] = _mm256_and_si256(_mm256_srli_epi16(c[0], 4), nibble), u[0] = _mm256_and_si256(c[0], nibble);
      } else {
        c[1] = _mm256_loadu_si256(vectors + 1);
        u[0] = _mm256_abs_epi8(c[0]), u[1] = _mm256_abs_epi8(c[1]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256i* a = reinterpret_cast<const __m256i*>(values + r * w.padded + at + b * kBlock);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          __m256i s = _mm256_loadu_si256(a + i);
          if (kBits == 8) s = _mm256_sign_epi8(s, c[i]);
          const bool fresh = b == 0 && (i == 0 || kHalves), done = b == kBlocks - 1 && (i == 1 || kHalves);
          if (kShort) {
            const __m256i products = _mm256_maddubs_epi16(u[i], s);
            sum[r] = fresh ? products : _mm256_add_epi16(sum[r], products);
          } else {
            sum[r] = add_bytes(fresh ? none : sum[r], u[i], s);
          }
          if (!done) continue;
          const __m256i whole = kShort ? _mm256_madd_epi16(sum[r], one) : sum[r];
          const __m256 scale = _mm256_broadcast_ss(room + r * stride + g + (kHalves ? i : 0));
          total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), scale, total[r]);
        }
      }
    }
  }
  store_sums<R>(total, out);
}
#else
template <int kBits, int kGroup, int R, class T>
void plain_output(const Quantised& w, int64_t n, const Rounded& x, int64_t row, const T* activations, float* out) {
  const uint8_t* codes = w.codes + n * w.row_bytes();
  int16_t values[kBlock], sorted[kBlock];
  int8_t places[kBlock], byte_places[kBlock];
  for (int i = 0; i < kBlock; ++i) byte_places[i] = places[i] = int8_t(i);
  if (sizeof(T) == 1) interleave(byte_places, kBits, places);
  std::fill(out, out + R, 0.f);
  for (int64_t at = 0; at < w.padded; at += kBlock, codes += kBlock * kBits / 8) {
    unpack_block(codes, kBits, values);
    for (int r = 0; r < R; ++r) {
      const T* a = activations + (row + r) * w.padded + at;
      for (int i = 0; i < kBlock; ++i) sorted[places[i]] = a[i];
      for (int64_t part = 0; part < kBlock; part += 32) {
        const int64_t g = (at + part) / kGroup;
        const float scale = to_float(w.scales[n * w.groups() + g]), zero = w.zeros ? to_float(w.zeros[n * w.groups() + g]) : 0.f;
        int32_t sum = 0, all = 0;
        for (int64_t i = part; i < part + 32; ++i) sum += int32_t(values[i]) * sorted[i], all += sorted[i];
        out[r] += (sum - zero * all) * (scale * x.scale[(row + r) * x.stride + g]);
      }
    }
  }
}
template <int kBits, int kGroup, int R>
void output(const Quantised& w, int64_t n, const Rounded& x, int64_t row, float*, float* out) {
  plain_output<kBits, kGroup, R>(w, n, x, row, x.values, out);
}
template <int kBits, int kGroup, int R>
void output_of_bytes(const Quantised& w, int64_t n, const Rounded& x, int64_t row, float*, float* out) {
  plain_output<kBits, kGroup, R>(w, n, x, row, x.bytes, out);
}
#endif

// Outputs first to last of the rows begin to end: out[row * stride + output]. Codes become numbers once for some rows.
template <int kBits, int kGroup>
void outputs_in(const Quantised& w, const Rounded& x, int64_t begin, int64_t end, int64_t first, int64_t last, float* out,
                int64_t stride) {
  thread_local Scratch scratch;
  float *room = scratch.get<float>(8 * x.stride), sums[8];
  for (int64_t n = first; n < last; ++n)
    for (int64_t row = begin, count; row < end; row += count) {
      const int64_t left = end - row;
      if (x.bytes) {
        count = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        auto run = count == 8   ? output_of_bytes<kBits, kGroup, 8>
                   : count == 4 ? output_of_bytes<kBits, kGroup, 4>
                   : count == 2 ? output_of_bytes<kBits, kGroup, 2>
                                : output_of_bytes<kBits, kGroup, 1>;
        run(w, n, x, row, room, sums);
      } else {
        count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        auto run = count == 4 ? output<kBits, kGroup, 4> : count == 2 ? output<kBits, kGroup, 2> : output<kBits, kGroup, 1>;
        run(w, n, x, row, room, sums);
      }
      for (int64_t r = 0; r < count; ++r)
        out[(row + r) * stride + n] = sums[r] * w.factors[n] + (w.bias ? w.bias[n] : 0.f);
    }
}

// body(bits, group) with those of the weight as types, whose values are constants.
template <class F>
void with_form(const Quantised& w, F body) {
  auto with_bits = [&](auto group) {
    if (w.bits == 4) body(std::integral_constant<int, 4>{}, group);
    else body(std::integral_constant<int, 8>{}, group);
  };
  if (w.group == 32) with_bits(std::integral_constant<int, 32>{});
  else if (w.group == 64) with_bits(std::integral_constant<int, 64>{});
  else if (w.group == 128) with_bits(std::integral_constant<int, 128>{});
  else with_bits(std::integral_constant<int, 256>{});
}

void outputs_of(const Quantised& w, const Rounded& x, int64_t begin, int64_t end, int64_t first, int64_t last, float* out,
                int64_t stride) {
  with_form(w, [&](auto bits, auto group) {
    outputs_in<decltype(bits)::value, decltype(group)::value>(w, x, begin, end, first, last, out, stride);
  });
}

}  // namespace
