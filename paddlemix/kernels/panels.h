// Products of many rows of activations in 8 bits with codes of 8 and 4 bits, where the processor has VNNI of 512 bits: codes of 64
// outputs at a time are laid out so that each lane of a vector is one output, for all rows. The numbers are those of rounded.h.
#pragma once

#include "rounded.h"

#if defined(PADDLEMIX_TILE) && defined(__AVX512VNNI__)
#define PADDLEMIX_PANELS
#endif

namespace {

#ifdef PADDLEMIX_PANELS
constexpr bool kPanels = true;
#else
constexpr bool kPanels = false;
#endif
constexpr int64_t kPanelOutputs = 64;

#ifdef PADDLEMIX_PANELS
struct Panel {
  const uint8_t* codes;          // [padded / 4, 64, 4], of 8 bits with 128 added
  const float *scales, *zeros;  // [groups, 64]; zeros, of 4 bits alone, times scales
};

// Codes of a block in the order of the inputs, those of 8 bits with 128 added.
inline __m512i unsigned_block(const uint8_t* codes, int64_t bits) {
  auto packed = [](__m256i low, __m256i high) { return _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8); };
  const __m256i* from = reinterpret_cast<const __m256i*>(codes);
  __m256i half[2];
  if (bits == 4) {
    const __m256i v = _mm256_loadu_si256(from), nibble = _mm256_set1_epi16(15);
    half[0] = packed(_mm256_and_si256(v, nibble), _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble));
    half[1] = packed(_mm256_and_si256(_mm256_srli_epi16(v, 8), nibble), _mm256_srli_epi16(v, 12));
  } else {
    for (int i = 0; i < 2; ++i) {
      const __m256i v = _mm256_xor_si256(_mm256_loadu_si256(from + i), _mm256_set1_epi8(char(0x80)));
      half[i] = packed(_mm256_and_si256(v, _mm256_set1_epi16(255)), _mm256_srli_epi16(v, 8));
    }
  }
  return _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
}

// Outputs first to last, at most 64, into memory that the thread keeps; those that lack are zeros.
Panel make_panel(const Quantised& w, int64_t first, int64_t last) {
  thread_local Scratch code_room, scale_room;
  const int64_t count = last - first, groups = w.groups();
  uint8_t* codes = code_room.get<uint8_t>(w.padded * kPanelOutputs);
  float* scales = scale_room.get<float>(2 * groups * kPanelOutputs);
  float* zeros = scales + groups * kPanelOutputs;
  if (count < kPanelOutputs) std::fill(scales, scales + 2 * groups * kPanelOutputs, 0.f);
  for (int64_t j = 0; j < kPanelOutputs; j += 16)
    for (int64_t at = 0; at < w.padded; at += kBlock) {
      __m512i blocks[16];
      for (int64_t i = 0; i < 16; ++i)
        blocks[i] = first + j + i < last ? unsigned_block(w.codes + (first + j + i) * w.row_bytes() + at * w.bits / 8, w.bits)
                                         : _mm512_setzero_si512();
      store_turned(blocks, codes + at * kPanelOutputs + 4 * j, 4 * kPanelOutputs);
    }
  for (int64_t j = 0; j < count; ++j)
    for (int64_t g = 0, from = (first + j) * groups; g < groups; ++g) {
      const float scale = to_float(w.scales[from + g]);
      scales[g * kPanelOutputs + j] = scale;
      zeros[g * kPanelOutputs + j] = w.zeros ? scale * to_float(w.zeros[from + g]) : 0.f;
    }
  return {codes, scales, zeros};
}

// y [6, 64] = up to six rows from `row` on times a panel, without factors and bias.
template <int kBits, int kGroup>
inline void multiply_panel(const Quantised& w, const Panel& panel, const Rounded& x, int64_t row, int64_t rows, float* y) {
  const TileRow* of_rows = x.tiles + row / kTileRows * w.groups();
  if (kBits == 8) {
    std::fill(y, y + kTileRows * kTileOutputs, 0.f);
  } else {  // what zeros take away
    const TileRows sums = tile_rows(x.sum + row * x.stride, x.stride * sizeof(float), rows);
    PADDLEMIX_MULTIPLY_TILE("vfnmadd231ps", PADDLEMIX_CLEAR, "", PADDLEMIX_EACH_ROW(PADDLEMIX_STORE, ""), sums, panel.zeros, 1,
                            w.groups(), panel.scales, of_rows, y);
  }
  const TileRows values = tile_rows(x.bytes + row * w.padded, w.padded, rows);
  if (kBits == 8)
    PADDLEMIX_MULTIPLY_TILE("vpdpbusd", PADDLEMIX_BEGIN, "", PADDLEMIX_SCALES PADDLEMIX_EACH_ROW(PADDLEMIX_SCALE, ""), values,
                            panel.codes, w.groups(), kGroup / 4, panel.scales, of_rows, y);
  else
    PADDLEMIX_MULTIPLY_TILE("vpdpbusd", PADDLEMIX_CLEAR, "", PADDLEMIX_SCALES PADDLEMIX_EACH_ROW(PADDLEMIX_SCALE, ""), values,
                            panel.codes, w.groups(), kGroup / 4, panel.scales, of_rows, y);
}

template <int kBits, int kGroup>
void panel_in(const Quantised& w, const Rounded& x, int64_t begin, int64_t end, int64_t first, int64_t last, float* out,
              int64_t stride) {
  const Panel panel = make_panel(w, first, last);
  alignas(64) float sums[kTileRows * kTileOutputs];
  for (int64_t row = begin, rows; row < end; row += rows) {
    rows = std::min<int64_t>(kTileRows, end - row);
    multiply_panel<kBits, kGroup>(w, panel, x, row, rows, sums);
    for (int64_t r = 0; r < rows; ++r) {
      float *to = out + (row + r) * stride, *from = sums + r * kPanelOutputs;
#pragma omp simd
      for (int64_t n = 0; n < last - first; ++n) to[n] = from[n] * w.factors[first + n];
      if (w.bias)
#pragma omp simd
        for (int64_t n = 0; n < last - first; ++n) to[n] += w.bias[first + n];
    }
  }
}
#endif

// Outputs first to last, at most 64, of rows whose bytes are in the order of the inputs: out[row * stride + output - first].
void panel_of(const Quantised& w, const Rounded& x, int64_t begin, int64_t end, int64_t first, int64_t last, float* out,
              int64_t stride) {
#ifdef PADDLEMIX_PANELS
  auto run = [&](auto of4, auto of8) { (w.bits == 4 ? of4 : of8)(w, x, begin, end, first, last, out, stride); };
  if (w.group == 32) run(panel_in<4, 32>, panel_in<8, 32>);
  else if (w.group == 64) run(panel_in<4, 64>, panel_in<8, 64>);
  else run(panel_in<4, 128>, panel_in<8, 128>);
#endif
}

}  // namespace
