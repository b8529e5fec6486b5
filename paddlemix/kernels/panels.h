// Products of many rows of activations in 8 bits with codes of 8 and 4 bits, where the processor has VNNI of 512 bits: codes of 64
// outputs at a time are laid out so that each lane of a vector is one output, for all rows. The numbers are those of rounded.h.
#pragma once

#include "rounded.h"

namespace {

struct Panel {
  const uint8_t* codes;         // [padded / 4, 64, 4], of 8 bits with 128 added
  const float *scales, *zeros;  // [groups, 64]; zeros, of 4 bits alone, times scales
};

#ifdef PADDLEMIX_PANELS
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

// Outputs first to last, at most 64, into `codes` [padded, 64] and `scales` [2, groups, 64]; those that lack are zeros.
Panel make_panel(const Quantised& w, int64_t first, int64_t last, uint8_t* codes, float* scales) {
  const int64_t count = last - first, groups = w.groups();
  float* zeros = scales + groups * kPanelOutputs;
  if (count < kPanelOutputs) std::fill(scales, scales + 2 * groups * kPanelOutputs, 0.f);
  constexpr int64_t kInputs = 1024;  // that are read of an output before the next, for processors fetch ahead what is read in order
  alignas(64) uint8_t rows[16][kInputs];
  for (int64_t j = 0; j < kPanelOutputs; j += 16)
    for (int64_t begin = 0, inputs; begin < w.padded; begin += inputs) {
      inputs = std::min(kInputs, w.padded - begin);
      for (int64_t i = 0; i < 16; ++i)
        for (int64_t at = 0; at < inputs; at += kBlock) {
          const uint8_t* from = w.codes + (first + j + i) * w.row_bytes() + (begin + at) * w.bits / 8;
          _mm512_store_si512(rows[i] + at, first + j + i < last ? unsigned_block(from, w.bits) : _mm512_setzero_si512());
        }
      lay_out(rows[0], kInputs, inputs, codes + begin * kPanelOutputs + 4 * j);
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
  TileRows values = tile_rows(x.bytes + row * w.padded, w.padded, rows);
  if (kBits == 8) {
    PADDLEMIX_MULTIPLY_TILE("vpdpbusd", PADDLEMIX_BEGIN, "", PADDLEMIX_SCALES PADDLEMIX_EACH_ROW(PADDLEMIX_FIRST_SCALE, ""), values,
                            panel.codes, 1, kGroup / 4, panel.scales, of_rows, y);
    if (w.groups() == 1) return;
    for (const char*& at : values) at += kGroup;
    PADDLEMIX_MULTIPLY_TILE("vpdpbusd", PADDLEMIX_BEGIN, "", PADDLEMIX_SCALES PADDLEMIX_EACH_ROW(PADDLEMIX_SCALE, ""), values,
                            panel.codes + kGroup * kPanelOutputs, w.groups() - 1, kGroup / 4, panel.scales + kPanelOutputs,
                            of_rows + 1, y);
    return;
  }
  // What zeros take away, then the products.
  const TileRows sums = tile_rows(x.sum + row * x.stride, x.stride * sizeof(float), rows);
  PADDLEMIX_MULTIPLY_TILE("vfnmadd231ps", PADDLEMIX_CLEAR, "", PADDLEMIX_EACH_ROW(PADDLEMIX_STORE, ""), sums, panel.zeros, 1,
                          w.groups(), panel.scales, of_rows, y);
  PADDLEMIX_MULTIPLY_TILE("vpdpbusd", PADDLEMIX_CLEAR, "", PADDLEMIX_SCALES PADDLEMIX_EACH_ROW(PADDLEMIX_SCALE, ""), values,
                          panel.codes, w.groups(), kGroup / 4, panel.scales, of_rows, y);
}

// What sums of a panel become, 64 or fewer outputs of a row: y = sums * factors + bias + add, which may be null.
inline void finish_row(const float* sums, const float* factors, const float* bias, const float* add, int64_t count, float* y) {
  for (int64_t n = 0; n < count; n += 16) {
    const __mmask16 mask = count - n < 16 ? (1 << (count - n)) - 1 : 0xffff;
    __m512 v = _mm512_fmadd_ps(_mm512_load_ps(sums + n), _mm512_load_ps(factors + n), _mm512_load_ps(bias + n));
    if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, add + n));
    _mm512_mask_storeu_ps(y + n, mask, v);
  }
}

// The rows begin to end times the outputs first to last, in the panels from `made` on, plus add [rows, n] if it is not null. A
// row's outputs from `output` on go where to(row, output) says.
template <int kBits, int kGroup, class F>
void panels_in(const Quantised& w, const Panel* made, const Rounded& x, int64_t begin, int64_t end, int64_t first, int64_t last,
               const float* add, F to) {
  alignas(64) float sums[kTileRows * kTileOutputs], factors[kPanelOutputs] = {}, bias[kPanelOutputs] = {};
  for (int64_t at = first; at < last; at += kPanelOutputs, ++made) {
    const int64_t outputs = std::min(kPanelOutputs, last - at);
    std::copy_n(w.factors + at, outputs, factors);
    if (w.bias) std::copy_n(w.bias + at, outputs, bias);
    for (int64_t row = begin, rows; row < end; row += rows) {
      rows = std::min<int64_t>(kTileRows, end - row);
      multiply_panel<kBits, kGroup>(w, *made, x, row, rows, sums);
      for (int64_t r = 0; r < rows; ++r)
        finish_row(sums + r * kPanelOutputs, factors, bias, add ? add + (row + r) * w.n + at : nullptr, outputs, to(row + r, at));
    }
  }
}
#endif

// Panels of the outputs first to last, in `room`.
struct Panels {
  const Quantised& w;
  int64_t first, last;
  Panel* made = nullptr;

  Panels(const Quantised& weight, int64_t from, int64_t to, Scratch& room) : w(weight), first(from), last(to) {
#ifdef PADDLEMIX_PANELS
    const int64_t count = (last - first + kPanelOutputs - 1) / kPanelOutputs, scales = 2 * w.groups() * kPanelOutputs;
    const int64_t one = w.padded * kPanelOutputs + scales * sizeof(float);  // a multiple of 64
    uint8_t* at = room.get<uint8_t>(count * (one + sizeof(Panel)));
    made = reinterpret_cast<Panel*>(at + count * one);
    for (int64_t i = 0; i < count; ++i, at += one)
      made[i] = make_panel(w, first + i * kPanelOutputs, std::min(first + (i + 1) * kPanelOutputs, last), at,
                           reinterpret_cast<float*>(at + w.padded * kPanelOutputs));
#endif
  }

  // As panels_in, of rows whose bytes are in the order of the inputs.
  template <class F>
  void multiply(const Rounded& x, int64_t begin, int64_t end, const float* add, F to) const {
#ifdef PADDLEMIX_PANELS
    with_form(w, [&](auto bits, auto group) {
      panels_in<decltype(bits)::value, decltype(group)::value>(w, made, x, begin, end, first, last, add, to);
    });
#endif
  }
};

}  // namespace
