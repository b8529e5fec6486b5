// A tile of six rows and 64 outputs, whose sums stay in registers over a group of inputs. g++ 12 writes such sums to memory and back at
// each step, which takes two thirds of the time, so that this loop is in assembly.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PADDLEMIX_TILE
#endif

namespace {

constexpr int kTileRows = 6, kTileOutputs = 64;
constexpr int64_t kPanelOutputs = kTileOutputs;  // of weights that are laid out for tiles

#if defined(PADDLEMIX_TILE) && defined(__AVX512VNNI__)
#define PADDLEMIX_PANELS  // and of bytes
constexpr bool kPanels = true;
#else
constexpr bool kPanels = false;
#endif

struct TileRow {  // of a group of each of six rows, and of two more
  float scale[8];
  int32_t begin[8];
};

}  // namespace

#ifdef PADDLEMIX_TILE
#include <immintrin.h>

namespace {

using TileRows = std::array<const char*, kTileRows>;

// The addresses of up to six rows; those that lack are the last again.
inline TileRows tile_rows(const void* first, int64_t bytes, int64_t count) {
  TileRows rows;
  for (int64_t r = 0; r < kTileRows; ++r) rows[r] = static_cast<const char*>(first) + std::min(r, count - 1) * bytes;
  return rows;
}

// out[row][j] = in[j][row] of sixteen vectors of sixteen numbers, `stride` bytes from one row to the next.
inline void store_turned(__m512i* v, uint8_t* out, int64_t stride) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88), t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_store_si512(out + i * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_store_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
}

// Sixteen rows of `width` bytes, a multiple of 64, as columns 4 * j to 4 * j + 63 of a panel [width / 4, 64, 4] that begins at
// to - 4 * j; `flip` is what every bit of each byte is changed by.
inline void lay_out(const void* rows, int64_t stride, int64_t width, uint8_t* to, uint8_t flip = 0) {
  for (int64_t at = 0; at < width; at += 64) {
    __m512i blocks[16];
    for (int64_t i = 0; i < 16; ++i)
      blocks[i] = _mm512_xor_si512(_mm512_loadu_si512(static_cast<const char*>(rows) + i * stride + at), _mm512_set1_epi8(char(flip)));
    store_turned(blocks, to + at * kPanelOutputs, 4 * kPanelOutputs);
  }
}

// clang-format off
#define PADDLEMIX_EACH_ROW(macro, more) \
  macro(more, "0", "28", "0", "1", "2", "3") macro(more, "1", "29", "4", "5", "6", "7") macro(more, "2", "30", "8", "9", "10", "11") \
  macro(more, "3", "31", "12", "13", "14", "15") macro(more, "4", "28", "16", "17", "18", "19") \
  macro(more, "5", "29", "20", "21", "22", "23")
// How a group begins: with zeros,
#define PADDLEMIX_CLEAR(more, row, factor, a, b, c, d) \
  "vpxord %%zmm" a ", %%zmm" a ", %%zmm" a "\nvpxord %%zmm" b ", %%zmm" b ", %%zmm" b "\n" \
  "vpxord %%zmm" c ", %%zmm" c ", %%zmm" c "\nvpxord %%zmm" d ", %%zmm" d ", %%zmm" d "\n"
// with sums that are there,
#define PADDLEMIX_LOAD(more, row, factor, a, b, c, d) \
  "vmovups 256*" row "(%[out]), %%zmm" a "\nvmovups 64+256*" row "(%[out]), %%zmm" b "\n" \
  "vmovups 128+256*" row "(%[out]), %%zmm" c "\nvmovups 192+256*" row "(%[out]), %%zmm" d "\n"
// or with a whole number of the row.
#define PADDLEMIX_BEGIN(more, row, factor, a, b, c, d) \
  "vpbroadcastd 32+4*" row "(%[of_rows]), %%zmm" a "\nvmovdqa64 %%zmm" a ", %%zmm" b "\n" \
  "vmovdqa64 %%zmm" a ", %%zmm" c "\nvmovdqa64 %%zmm" a ", %%zmm" d "\n"
#define PADDLEMIX_ADD(instruction, row, factor, a, b, c, d) \
  "vpbroadcastd (%[r" row "],%[at]), %%zmm" factor "\n" \
  instruction " %%zmm" factor ", %%zmm24, %%zmm" a "\n" instruction " %%zmm" factor ", %%zmm25, %%zmm" b "\n" \
  instruction " %%zmm" factor ", %%zmm26, %%zmm" c "\n" instruction " %%zmm" factor ", %%zmm27, %%zmm" d "\n"
// How a group ends: with sums as they are,
#define PADDLEMIX_STORE(more, row, factor, a, b, c, d) \
  "vmovups %%zmm" a ", 256*" row "(%[out])\nvmovups %%zmm" b ", 64+256*" row "(%[out])\n" \
  "vmovups %%zmm" c ", 128+256*" row "(%[out])\nvmovups %%zmm" d ", 192+256*" row "(%[out])\n"
// or with sums of whole numbers that are added, times scales of outputs and rows.
#define PADDLEMIX_SCALES \
  "vmovups (%[scales]), %%zmm24\nvmovups 64(%[scales]), %%zmm25\nvmovups 128(%[scales]), %%zmm26\nvmovups 192(%[scales]), %%zmm27\n"
#define PADDLEMIX_FRACTION(factor, a) "vcvtdq2ps %%zmm" a ", %%zmm" a "\nvmulps %%zmm" factor ", %%zmm" a ", %%zmm" a "\n"
#define PADDLEMIX_SCALED(row, factor, place, scale, a) \
  PADDLEMIX_FRACTION(factor, a) "vfmadd213ps " place "+256*" row "(%[out]), %%zmm" scale ", %%zmm" a "\n" \
  "vmovups %%zmm" a ", " place "+256*" row "(%[out])\n"
#define PADDLEMIX_SCALE(more, row, factor, a, b, c, d) \
  "vbroadcastss 4*" row "(%[of_rows]), %%zmm" factor "\n" PADDLEMIX_SCALED(row, factor, "0", "24", a) \
  PADDLEMIX_SCALED(row, factor, "64", "25", b) PADDLEMIX_SCALED(row, factor, "128", "26", c) PADDLEMIX_SCALED(row, factor, "192", "27", d)
// The same where nothing is to be added to.
#define PADDLEMIX_FIRST_SCALED(row, factor, place, scale, a) \
  PADDLEMIX_FRACTION(factor, a) "vmulps %%zmm" scale ", %%zmm" a ", %%zmm" a "\nvmovups %%zmm" a ", " place "+256*" row "(%[out])\n"
#define PADDLEMIX_FIRST_SCALE(more, row, factor, a, b, c, d) \
  "vbroadcastss 4*" row "(%[of_rows]), %%zmm" factor "\n" PADDLEMIX_FIRST_SCALED(row, factor, "0", "24", a) \
  PADDLEMIX_FIRST_SCALED(row, factor, "64", "25", b) PADDLEMIX_FIRST_SCALED(row, factor, "128", "26", c) \
  PADDLEMIX_FIRST_SCALED(row, factor, "192", "27", d)

// For each group `begin`, then `step_count` times what `instruction` adds of four bytes of each of six rows and four of each of 64
// outputs, then `finish`; `fetch` is what else is done in a step. weights [groups * steps, 64, 4 bytes], scales [groups, 64] floats,
// of_rows [groups] TileRow.
#define PADDLEMIX_MULTIPLY_TILE(instruction, begin, fetch, finish, rows, weights, group_count, step_count, scales_, of_rows_, out_) do { \
  const void *w_ = weights, *s_ = scales_, *f_ = of_rows_; \
  int64_t at_ = 0, groups_ = group_count, left_; \
  asm volatile( \
      "2:\nmov %[steps], %[left]\n" PADDLEMIX_EACH_ROW(begin, "") \
      ".p2align 4\n1:\n" \
      "vmovdqu64 (%[w]), %%zmm24\nvmovdqu64 64(%[w]), %%zmm25\nvmovdqu64 128(%[w]), %%zmm26\nvmovdqu64 192(%[w]), %%zmm27\n" \
      fetch PADDLEMIX_EACH_ROW(PADDLEMIX_ADD, instruction) \
      "add $256, %[w]\nadd $4, %[at]\ndec %[left]\njnz 1b\n" \
      finish \
      "add $256, %[scales]\nadd $64, %[of_rows]\ndec %[groups_left]\njnz 2b\n" \
      : [w] "+r"(w_), [at] "+r"(at_), [scales] "+r"(s_), [of_rows] "+r"(f_), [groups_left] "+r"(groups_), [left] "=&r"(left_) \
      : [r0] "r"(rows[0]), [r1] "r"(rows[1]), [r2] "r"(rows[2]), [r3] "r"(rows[3]), [r4] "r"(rows[4]), [r5] "r"(rows[5]), \
        [out] "r"(out_), [steps] "ri"(int64_t(step_count)) \
      : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
        "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", \
        "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"); \
} while (false)
// clang-format on

}  // namespace
#endif
