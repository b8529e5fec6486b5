// Products with weights in 8 and 4 bits, called from quantised.py through ctypes. paddlemix/quantised.py has their layout and a
// plain reference of all that is done here.
//
// Few rows (decoding) are rounded to 16 bits in the weights' groups, finer than bfloat16; codes are unpacked in registers and
// multiplied as whole numbers, so that reading the weights is what takes the time. Many rows (prefill) go through oneDNN, with
// weights unpacked a panel at a time.

#include "common.h"

namespace {

constexpr int64_t kBlock = 64;      // inputs of a block of codes
constexpr int64_t kFewRows = 32;    // up to these, rows go through the kernel here, else through oneDNN
constexpr int64_t kStrip = 16;      // outputs that a thread computes at a time
constexpr int64_t kAhead = 4096;    // bytes of codes that are fetched before they are needed: processors stop at a page's end
constexpr int64_t kPanel = 1 << 20;  // values that are unpacked for a call of oneDNN

using half = uint16_t;

// What Python hands over; it keeps the memory.
struct Quantised {
  int64_t k, n, padded, group;  // inputs, outputs, inputs with those that fill up, inputs of a group
  int64_t bits, dtype;          // of codes; of the products of many rows
  const uint8_t* codes;
  const half *scales, *zeros;  // zeros: null in 8 bits
  const float *factors, *bias;  // bias: null for none
  const int32_t* order;         // null: as they come
  int64_t groups() const { return padded / group; }
  int64_t row_bytes() const { return padded * bits / 8; }
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

// Rows of activations in 16 bits, with a scale and the sum for each group.
struct Rounded {
  int16_t* values;     // [m, padded]
  float *scale, *sum;  // [m, stride], 0 behind the groups; the sum is one of whole numbers
  int64_t stride;
};

void round_row(const Quantised& w, const float* x, int16_t* values, float* scales, float* sums) {
  thread_local Scratch room;
  float* row = room.get<float>(w.padded);
  if (w.order)
    for (int64_t i = 0; i < w.k; ++i) row[i] = x[w.order[i]];
  else
    std::memcpy(row, x, w.k * sizeof(float));
  std::fill(row + w.k, row + w.padded, 0.f);
  for (int64_t g = 0; g < w.groups(); ++g) {
    const float* from = row + g * w.group;
    int16_t* to = values + g * w.group;
    float top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < w.group; ++i) top = std::fabs(from[i]) > top ? std::fabs(from[i]) : top;
    const float inverse = top > 0 ? 32767.f / top : 0.f;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < w.group; ++i) {
      int32_t rounded = int32_t(bits(from[i] * inverse + 12582912.f) - 0x4b400000);  // to the nearest
      to[i] = int16_t(rounded);
      sum += rounded;
    }
    scales[g] = top / 32767.f;
    sums[g] = sum;
  }
}

Rounded round_rows(const Quantised& w, const float* x, int64_t m, Scratch& values, Scratch& numbers) {
  const int64_t stride = round_up(w.groups(), 8);
  Rounded r{values.get<int16_t>(m * w.padded), numbers.get<float>(2 * m * stride), nullptr, stride};
  r.sum = r.scale + m * stride;
#pragma omp parallel for if (m * w.k > 32768)
  for (int64_t i = 0; i < m; ++i) {
    std::fill(r.scale + i * stride, r.scale + (i + 1) * stride, 0.f);
    std::fill(r.sum + i * stride, r.sum + (i + 1) * stride, 0.f);
    round_row(w, x + i * w.k, r.values + i * w.padded, r.scale + i * stride, r.sum + i * stride);
  }
  return r;
}

#ifdef PADDLEMIX_VECTORS
inline __m256i multiply_add(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpwssd_epi32(sum, a, b);
#elif defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sum, a, b);
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

// One output for R rows of activations, without factor and bias: out[r]. `room` is for R * stride floats.
template <int kBits, int kGroup, int R>
void output(const Quantised& w, int64_t n, const Rounded& x, int64_t row, float* room, float* out) {
  constexpr int kBlocks = kGroup > kBlock ? kGroup / kBlock : 1, kVectors = kGroup / 16 / kBlocks;  // vectors of a block and group
  const int64_t groups = w.groups(), stride = x.stride, last = w.n * groups - 8;
  __m256 total[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t g = 0; g < groups; g += 8) {  // scales of codes and activations together, and what zeros take away
    half ends[16] = {};
    const int64_t at = n * groups + g;
    const half *scales = w.scales + at, *zeros = w.zeros ? w.zeros + at : ends + 8;
    if (at > last) {  // behind the end of the arrays is nothing to be read
      scales = static_cast<half*>(std::memcpy(ends, scales, (groups - g) * sizeof(half)));
      if (w.zeros) zeros = static_cast<half*>(std::memcpy(ends + 8, zeros, (groups - g) * sizeof(half)));
    }
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
    const __m256 offset = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256 both = _mm256_mul_ps(scale, _mm256_loadu_ps(x.scale + (row + r) * stride + g));
      _mm256_storeu_ps(room + r * stride + g, both);
      if (kBits == 4)
        total[r] = _mm256_fnmadd_ps(_mm256_mul_ps(both, offset), _mm256_loadu_ps(x.sum + (row + r) * stride + g), total[r]);
    }
  }
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
  _mm_storeu_ps(out, sums_of(total));
}
#else
template <int kBits, int kGroup, int R>
void output(const Quantised& w, int64_t n, const Rounded& x, int64_t row, float*, float* out) {
  const uint8_t* codes = w.codes + n * w.row_bytes();
  int16_t values[kBlock];
  std::fill(out, out + R, 0.f);
  for (int64_t at = 0; at < w.padded; at += kBlock, codes += kBlock * kBits / 8) {
    unpack_block(codes, kBits, values);
    for (int64_t part = 0; part < kBlock; part += 32) {
      const int64_t g = (at + part) / kGroup;
      const float scale = to_float(w.scales[n * w.groups() + g]), zero = w.zeros ? to_float(w.zeros[n * w.groups() + g]) : 0.f;
      for (int r = 0; r < R; ++r) {
        const int16_t* a = x.values + (row + r) * w.padded + at + part;
        int32_t sum = 0, all = 0;
        for (int i = 0; i < 32; ++i) sum += int32_t(values[part + i]) * a[i], all += a[i];
        out[r] += (sum - zero * all) * (scale * x.scale[(row + r) * x.stride + g]);
      }
    }
  }
}
#endif

inline float silu(float x) {
  float e = exp2_nonpositive(-std::fabs(x) * 1.44269504f);
  return x / (1 + e) * (x < 0 ? e : 1.f);
}

void activate(float* x, int64_t count, int activation) {
  switch (activation) {
    case kSilu:
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x[i] = silu(x[i]);
      break;
    case kGelu:
      for (int64_t i = 0; i < count; ++i) x[i] = 0.5f * x[i] * (1 + std::erf(x[i] * 0.70710678f));
      break;
    case kGeluTanh:
      for (int64_t i = 0; i < count; ++i)
        x[i] = 0.5f * x[i] * (1 + std::tanh(0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
      break;
  }
}

// Outputs first to last of a few rows: out[row * stride + output]; codes become numbers once for four rows.
template <int kBits, int kGroup>
void few_outputs(const Quantised& w, const Rounded& x, int64_t m, int64_t first, int64_t last, float* out, int64_t stride) {
  thread_local Scratch scratch;
  float *room = scratch.get<float>(4 * x.stride), sums[4];
  for (int64_t n = first; n < last; ++n)
    for (int64_t row = 0, count; row < m; row += count) {
      count = m - row >= 4 ? 4 : m - row >= 2 ? 2 : 1;
      auto run = count == 4 ? output<kBits, kGroup, 4> : count == 2 ? output<kBits, kGroup, 2> : output<kBits, kGroup, 1>;
      run(w, n, x, row, room, sums);
      for (int64_t r = 0; r < count; ++r)
        out[(row + r) * stride + n] = sums[r] * w.factors[n] + (w.bias ? w.bias[n] : 0.f);
    }
}

void outputs_of(const Quantised& w, const Rounded& x, int64_t m, int64_t first, int64_t last, float* out, int64_t stride) {
  auto run = [&](auto of4, auto of8) { (w.bits == 4 ? of4 : of8)(w, x, m, first, last, out, stride); };
  if (w.group == 32) run(few_outputs<4, 32>, few_outputs<8, 32>);
  else if (w.group == 64) run(few_outputs<4, 64>, few_outputs<8, 64>);
  else run(few_outputs<4, 128>, few_outputs<8, 128>);
}

template <class F>
void for_strips(int64_t n, F body) {
#pragma omp parallel for schedule(static) if (n > kStrip)
  for (int64_t first = 0; first < n; first += kStrip) body(first, std::min(first + kStrip, n));
}

// out = activation(x @ w + bias) + add, of a few rows in float32.
void few(const Quantised& w, const float* x, int64_t m, int activation, const float* add, float* out) {
  thread_local Scratch values, numbers;
  Rounded rounded = round_rows(w, x, m, values, numbers);
  for_strips(w.n, [&](int64_t first, int64_t last) {
    outputs_of(w, rounded, m, first, last, out, w.n);
    for (int64_t row = 0; row < m; ++row) {
      float* y = out + row * w.n;
      activate(y + first, last - first, activation);
      if (add)
        for (int64_t n = first; n < last; ++n) y[n] += add[row * w.n + n];
    }
  });
}

// Outputs from `first` on as rows [count, k] in T.
template <class T>
void unpack_panel(const Quantised& w, int64_t first, int64_t count, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t n = first; n < first + count; ++n) {
    thread_local Scratch room;
    T* row = w.order ? room.get<T>(w.padded) : out + (n - first) * w.k;
    int16_t codes[kBlock];
    float values[kBlock];
    for (int64_t at = 0; at < w.padded; at += kBlock) {
      unpack_block(w.codes + n * w.row_bytes() + at * w.bits / 8, w.bits, codes);
      for (int64_t part = 0; part < kBlock; part += 32) {
        int64_t g = n * w.groups() + (at + part) / w.group;
        float scale = to_float(w.scales[g]) * w.factors[n], zero = w.zeros ? to_float(w.zeros[g]) : 0.f;
#pragma omp simd
        for (int64_t i = 0; i < 32; ++i) values[part + i] = (codes[part + i] - zero) * scale;
      }
      const int64_t left = std::min(kBlock, w.k - at);
      for (int64_t i = 0; i < left; ++i) store(row + at + i, values[i]);
    }
    if (w.order)
      for (int64_t i = 0; i < w.k; ++i) out[(n - first) * w.k + w.order[i]] = row[i];
  }
}

// dst = activation(src @ w + bias) * mul + add for many rows, src and mul in w.dtype.
void many(const Quantised& w, int64_t m, const void* src, int activation, const void* mul, const float* add, void* dst,
          int dst_type) {
  thread_local Scratch panel;
  const int64_t most = std::max<int64_t>(64, kPanel / w.k / 64 * 64), size = size_of(dst_type);
  for (int64_t first = 0; first < w.n; first += most) {
    const int64_t count = std::min(most, w.n - first);
    void* weights = panel.get<char>(count * w.k * size_of(w.dtype));
    if (w.dtype == kF32) unpack_panel(w, first, count, static_cast<float*>(weights));
    else unpack_panel(w, first, count, static_cast<bf16*>(weights));
    Product p{m, w.k, count, w.dtype, dst_type, w.k, w.n, 1, w.k};
    p.activation = activation;
    p.bias = w.bias != nullptr;
    p.mul_stride = mul ? w.n : 0;
    p.add_stride = add ? w.n : 0;
    const void* factor = mul ? static_cast<const char*>(mul) + first * size_of(w.dtype) : nullptr;
    multiply(p, {src, weights, w.bias ? w.bias + first : nullptr, factor, add ? add + first : nullptr,
                 static_cast<char*>(dst) + first * size});
  }
}

// Scale and zero of a group of values by least squares; see quantise() of paddlemix/quantised.py.
void fit_group(const float* values, int64_t count, int64_t bits, int16_t* codes, half* scale_out, half* zero_out) {
  const half least = to_half(2e-7f);
  auto halved = [&](float scale) { return std::max(to_half(scale), least); };  // scales are positive: bits compare as numbers do
  float low = values[0], high = values[0];
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < count; ++i) low = values[i] < low ? values[i] : low, high = values[i] > high ? values[i] : high;
  if (bits == 8) {
    float top = std::max(-low, high), scale = top > 0 ? top / 127 : 1.f, product = 0, square = 0;
    for (int64_t i = 0; i < count; ++i) {
      float code = std::nearbyint(values[i] / scale);
      product += code * values[i], square += code * code;
    }
    if (square > 0) scale = product / square;
    *scale_out = halved(scale);
    scale = to_float(*scale_out);
    for (int64_t i = 0; i < count; ++i) codes[i] = int16_t(std::min(127.f, std::max(-127.f, std::nearbyint(values[i] / scale))));
    return;
  }
  float best = INFINITY, code[128];
  for (float shrink : {1.0f, 0.9f, 0.8f}) {
    const float middle = (low + high) / 2, width = high - low;
    float scale = width > 0 ? width * shrink / 15 : middle != 0 ? std::fabs(middle) : 1.f;
    float zero = (width > 0 ? 7.5f : 7.f) - middle / scale;
    for (int pass = 0;; ++pass) {
      const half hs = halved(scale), hz = to_half(std::min(60000.f, std::max(-60000.f, zero)));
      const float s = to_float(hs), z = to_float(hz), inverse = 1 / s;
      float sum = 0, square = 0, total = 0, product = 0, error = 0;
#pragma omp simd reduction(+ : sum, square, total, product, error)
      for (int64_t i = 0; i < count; ++i) {
        float c = std::nearbyint(values[i] * inverse + z);
        c = c > 0 ? c : 0, c = c < 15 ? c : 15;
        code[i] = c;
        float off = s * (c - z) - values[i];
        sum += c, square += c * c, total += values[i], product += c * values[i], error += off * off;
      }
      if (pass == 2) {
        if (error < best) {
          best = error, *scale_out = hs, *zero_out = hz;
          for (int64_t i = 0; i < count; ++i) codes[i] = int16_t(code[i]);
        }
        break;
      }
      const float spread = square - sum * sum / count, slope = (product - sum * total / count) / std::max(spread, 1e-9f);
      const bool fits = spread > 0 && slope > 0;
      scale = fits ? slope : s;
      zero = fits ? (sum - total / scale) / count : z;
    }
  }
}

}  // namespace

// Each function returns null, or what went wrong.
extern "C" {

const char* quantised_linear_run(int threads, const Quantised* w, const float* x, int64_t m, const float* norm_weight,
                                 const float* norm_bias, float eps, int activation, const float* residual, float* out) {
  return guarded(threads, [&] {
    thread_local Scratch input;
    const Norm norm{norm_weight, norm_bias, eps};
    if (m <= kFewRows)
      return few(*w, static_cast<const float*>(prepare(x, m, w->k, norm, kF32, input)), m, activation, residual, out);
    for_chunks(m, [&](int64_t begin, int64_t rows) {
      const void* src = prepare(x + begin * w->k, rows, w->k, norm, w->dtype, input);
      many(*w, rows, src, activation, nullptr, residual ? residual + begin * w->n : nullptr, out + begin * w->n, kF32);
    });
  });
}

const char* quantised_mlp_run(int threads, const Quantised* gate, const Quantised* up, const Quantised* down, const float* x,
                              int64_t m, const float* norm_weight, const float* norm_bias, float eps, int activation,
                              const float* residual, float* out) {
  return guarded(threads, [&] {
    thread_local Scratch input, gates, hidden, values, numbers, gate_values, gate_numbers;
    const Norm norm{norm_weight, norm_bias, eps};
    if (m <= kFewRows) {
      const float* src = static_cast<const float*>(prepare(x, m, up->k, norm, kF32, input));
      const Rounded rounded = round_rows(*up, src, m, values, numbers);
      // The gate's inputs are the same, but may come in another order or in other groups.
      const bool same = !gate || (gate->group == up->group && !gate->order && !up->order);
      const Rounded for_gate = same ? rounded : round_rows(*gate, src, m, gate_values, gate_numbers);
      float* h = hidden.get<float>(m * up->n);
      float* g = gate ? gates.get<float>(m * up->n) : nullptr;
      for_strips(up->n, [&](int64_t first, int64_t last) {
        outputs_of(*up, rounded, m, first, last, h, up->n);
        if (gate) outputs_of(*gate, for_gate, m, first, last, g, up->n);
        for (int64_t row = 0; row < m; ++row) {
          float* y = h + row * up->n;
          if (!gate) {
            activate(y + first, last - first, activation);
            continue;
          }
          float* factor = g + row * up->n;
          activate(factor + first, last - first, activation);
          for (int64_t n = first; n < last; ++n) y[n] *= factor[n];
        }
      });
      return few(*down, h, m, kNone, residual, out);
    }
    mlp_of_chunks(gate, *up, *down, x, m, norm, activation, residual, out, up->dtype, many);
  });
}

// weight [n, k] float32, or bfloat16, row by row -> the arrays of paddlemix/quantised.py.
const char* quantise_run(int threads, const void* weight, int type, int64_t n, int64_t k, int64_t group, int64_t bits,
                         uint8_t* codes, half* scales, half* zeros, float* factors) {
  return guarded(threads, [&] {
    const int64_t step = std::max(group, kBlock), padded = round_up(k, step), groups = padded / group;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; ++row) {
      thread_local Scratch room, whole;
      float* values = room.get<float>(padded);
      int16_t* numbers = whole.get<int16_t>(padded);
      if (type == kF32) std::memcpy(values, static_cast<const float*>(weight) + row * k, k * sizeof(float));
      else
        for (int64_t i = 0; i < k; ++i) values[i] = from_bits(uint32_t(static_cast<const bf16*>(weight)[row * k + i]) << 16);
      float span = 0;
#pragma omp simd reduction(max : span)
      for (int64_t i = 0; i < k; ++i) span = std::fabs(values[i]) > span ? std::fabs(values[i]) : span;
      const float factor = span > 0 ? span / (bits == 8 ? 127 : 15) : 1.f, inverse = 1 / factor;
      for (int64_t i = 0; i < k; ++i) values[i] *= inverse;
      for (int64_t i = k; i < padded; ++i) values[i] = i % group ? values[i - i % group] : 0.f;
      factors[row] = factor;
      for (int64_t g = 0; g < groups; ++g)
        fit_group(values + g * group, group, bits, numbers + g * group, scales + row * groups + g,
                  zeros ? zeros + row * groups + g : nullptr);
      for (int64_t i = k; i < padded; ++i) numbers[i] = 0;
      uint8_t* to = codes + row * padded * bits / 8;
      for (int64_t at = 0; at < padded; at += kBlock, to += kBlock * bits / 8) {
        const int16_t* c = numbers + at;
        uint16_t block[32];
        if (bits == 4)
          for (int j = 0; j < 16; ++j) block[j] = uint16_t(c[j] | c[16 + j] << 4 | c[32 + j] << 8 | c[48 + j] << 12);
        else
          for (int part = 0; part < 2; ++part)
            for (int j = 0; j < 16; ++j)
              block[part * 16 + j] = uint16_t((c[part * 32 + j] & 255) | (c[part * 32 + 16 + j] & 255) << 8);
        std::memcpy(to, block, bits * 8);
      }
    }
  });
}
}
