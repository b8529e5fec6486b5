// Products with weights in 8 and 4 bits, called from quantised.py through ctypes. paddlemix/quantised.py has their layout and a
// plain reference of all that is done here.
//
// Few rows (decoding) are rounded to 16 bits in the weights' groups, finer than bfloat16; codes are unpacked in registers and
// multiplied as whole numbers (rounded.h), so that reading the weights is what takes the time. Many rows (a prompt, pictures) go
// through oneDNN, with weights unpacked a panel at a time. Where activations are to have 8 bits, all rows do as few ones do.

#include "panels.h"

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define PADDLEMIX_WIDE
inline void put(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
inline void put(bf16* to, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x)); }
#endif

constexpr int64_t kMostInGroup = 256;  // inputs
constexpr int64_t kManyRows = kPanels ? 2048 : kChunk;  // for which codes are laid out once
constexpr int64_t kFewRows = 32;    // up to these, rows go through the kernel here, else through oneDNN
constexpr int64_t kStrip = 16;      // outputs that a thread computes at a time
constexpr int64_t kRows = 32;       // of many rows in 8 bits, those that a thread computes at a time, which its cache holds,
constexpr int64_t kOutputs = 256;   // and their outputs
constexpr int64_t kRowsOfPanels = 48;  // those that a thread takes at a time where codes are laid out; a multiple of six
constexpr int64_t kPanel = 1 << 20;  // values that are unpacked for a call of oneDNN

template <class F>
void for_strips(int64_t n, F body) {
#pragma omp parallel for schedule(static) if (n > kStrip)
  for (int64_t first = 0; first < n; first += kStrip) body(first, std::min(first + kStrip, n));
}

// body(rows' begin and end, outputs' first and last) for all outputs of m rows, divided among threads.
template <class F>
void for_tiles(int64_t m, int64_t n, F body) {
  if (m <= kFewRows) return for_strips(n, [&](int64_t first, int64_t last) { body(0, m, first, last); });
  const int64_t across = (n + kOutputs - 1) / kOutputs, tasks = (m + kRows - 1) / kRows * across;
  for_tasks(tasks, true, [&](int64_t task) {
    const int64_t begin = task / across * kRows, first = task % across * kOutputs;
    body(begin, std::min(begin + kRows, m), first, std::min(first + kOutputs, n));
  });
}

bool in_panels(int64_t m) { return kPanels && m > kFewRows; }

// out = x @ w + bias + add of rounded rows for panels, in float32.
void multiply_panels(const Quantised& w, const Rounded& x, int64_t m, const float* add, float* out) {
  const int64_t width = w.padded <= 4096 ? 2 * kPanelOutputs : kPanelOutputs;  // half of a second-level cache
  for_shared_tasks((w.n + width - 1) / width, m, kRowsOfPanels, [&](int64_t task, auto take) {
    thread_local Scratch room;
    const int64_t first = task * width;
    const Panels panel(w, first, std::min(first + width, w.n), room);
    for (int64_t begin, end; take(&begin, &end);)
      panel.multiply(x, begin, end, add, [&](int64_t row, int64_t at) { return out + row * w.n + at; });
  });
}

// out = activation(x @ w + bias) + add of rounded rows, in float32.
void multiply_rounded(const Quantised& w, const Rounded& x, int64_t m, int activation, const float* add, float* out) {
  const bool panels = in_panels(m);
  if (panels) multiply_panels(w, x, m, activation == kNone ? add : nullptr, out);
  if (panels && activation == kNone) return;
  for_tiles(m, w.n, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    if (!panels) outputs_of(w, x, begin, end, first, last, out, w.n);
    for (int64_t row = begin; row < end; ++row) {
      float* y = out + row * w.n;
      activate(y + first, last - first, activation);
      if (add)
        for (int64_t n = first; n < last; ++n) y[n] += add[row * w.n + n];
    }
  });
}

// What goes into `down`, hidden[row * stride]: act(gate) * up, or without a gate act(up), in place.
void combine(float* gate, float* up, int64_t begin, int64_t end, int64_t stride, int64_t count, int activation) {
  for (int64_t row = begin; row < end; ++row) {
    float* y = up + row * stride;
    activate(gate ? gate + row * stride : y, count, activation);
    if (gate)
#pragma omp simd
      for (int64_t n = 0; n < count; ++n) y[n] *= gate[row * stride + n];
  }
}

// out = act(x @ gate) * (x @ up) @ down + residual of rounded rows; without a gate act(x @ up) @ down + residual.
void rounded_mlp(const Quantised* gate, const Quantised& up, const Quantised& down, const float* x, int64_t m, const Norm& norm,
                 int activation, const float* residual, float* out) {
  thread_local Scratch gates, hidden, values, numbers, gate_values, gate_numbers, down_values, down_numbers;
  const bool panels = in_panels(m);
  const Rounded rounded = round_rows(up, x, m, norm, panels, values, numbers);
  // The gate's inputs are the same, but may come in another order, in other groups, or for codes of other bits.
  const bool same = !gate || (gate->group == up.group && gate->bits == up.bits && gate->bytes() == up.bytes() && !gate->order &&
                              !up.order);
  const Rounded for_gate = same ? rounded : round_rows(*gate, x, m, norm, panels, gate_values, gate_numbers);
  if (panels && down.bytes() && !down.order && up.n == down.k) {
    // What comes out of some outputs for some rows is rounded at once, before it leaves the cache.
    const Rounded next = rounded_room(down, m, true, down_values, down_numbers);
    const int64_t width = std::max(kPanelOutputs, down.group), tasks = (down.padded + width - 1) / width;
    for_shared_tasks(tasks, m, kRowsOfPanels, [&](int64_t task, auto take) {
      thread_local Scratch up_room, gate_room, of_up, of_gate;
      const int64_t first = task * width, count = std::max<int64_t>(0, std::min(width, up.n - first));
      const int64_t groups = (std::min(width, down.padded - first) + down.group - 1) / down.group;
      float *y = up_room.get<float>(kRowsOfPanels * width), *g = gate ? gate_room.get<float>(kRowsOfPanels * width) : nullptr;
      std::fill(y, y + kRowsOfPanels * width, 0.f);  // those behind the outputs stay so
      auto into = [&](float* to, int64_t begin) {
        return [=](int64_t row, int64_t at) { return to + (row - begin) * width + at - first; };
      };
      const Panels ups(up, first, first + count, of_up);
      const Panels gates(gate ? *gate : up, first, gate ? first + count : first, of_gate);
      for (int64_t begin, end; take(&begin, &end);) {
        ups.multiply(rounded, begin, end, nullptr, into(y, begin));
        if (gate) gates.multiply(for_gate, begin, end, nullptr, into(g, begin));
        combine(g, y, 0, end - begin, width, count, activation);
        for (int64_t row = begin; row < end; ++row)
          for (int64_t group = 0; group < groups; ++group) {
            float total;
            const float* from = y + (row - begin) * width + group * down.group;
            int8_t* bytes = next.bytes + row * down.padded + first + group * down.group;
            const float scale = round_group(from, down.group, 127, bytes, &total);
            next.note(row, first / down.group + group, scale, total);
          }
      }
    });
    return multiply_rounded(down, next, m, kNone, residual, out);
  }
  float* h = hidden.get<float>(m * up.n);
  float* g = gate ? gates.get<float>(m * up.n) : nullptr;
  if (panels) multiply_panels(up, rounded, m, nullptr, h);
  if (panels && gate) multiply_panels(*gate, for_gate, m, nullptr, g);
  for_tiles(m, up.n, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    if (!panels) outputs_of(up, rounded, begin, end, first, last, h, up.n);
    if (!panels && gate) outputs_of(*gate, for_gate, begin, end, first, last, g, up.n);
    combine(g ? g + first : nullptr, h + first, begin, end, up.n, last - first, activation);
  });
  multiply_rounded(down, round_rows(down, h, m, Norm{}, panels, down_values, down_numbers), m, kNone, residual, out);
}

// A block of codes, less zero[2], times scale[2] of each half, as numbers.
template <class T>
inline void numbers_of(const uint8_t* from, int64_t bits, const float* zero, const float* scale, T* to) {
#ifdef PADDLEMIX_WIDE
  __m256i codes[4];
  if (bits == 4) block_of<4>(from, codes);
  else block_of<8>(from, codes);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 whole = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(codes[i]));
    put(to + 16 * i, _mm512_mul_ps(_mm512_sub_ps(whole, _mm512_set1_ps(zero[i / 2])), _mm512_set1_ps(scale[i / 2])));
  }
#else
  int16_t codes[kBlock];
  float values[kBlock];
  unpack_block(from, bits, codes);
#pragma omp simd
  for (int64_t i = 0; i < kBlock; ++i) values[i] = (codes[i] - zero[i / 32]) * scale[i / 32];
  for (int64_t i = 0; i < kBlock; ++i) store(to + i, values[i]);
#endif
}

// Outputs from `first` on as rows [count, k] in T.
template <class T>
void unpack_panel(const Quantised& w, int64_t first, int64_t count, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t n = first; n < first + count; ++n) {
    thread_local Scratch room;
    T* row = w.order ? room.get<T>(w.padded) : out + (n - first) * w.k;
    T rest[kBlock];
    for (int64_t at = 0; at < w.padded; at += kBlock) {
      float scale[2], zero[2];
      for (int part = 0; part < 2; ++part) {
        const int64_t g = n * w.groups() + (at + 32 * part) / w.group;
        scale[part] = to_float(w.scales[g]) * w.factors[n], zero[part] = w.zeros ? to_float(w.zeros[g]) : 0.f;
      }
      const int64_t left = w.k - at;
      numbers_of(w.codes + n * w.row_bytes() + at * w.bits / 8, w.bits, zero, scale, left < kBlock ? rest : row + at);
      if (left < kBlock) std::copy(rest, rest + std::max<int64_t>(left, 0), row + at);
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
  float best = INFINITY, code[kMostInGroup];
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
    thread_local Scratch input, values, numbers;
    const Norm norm{norm_weight, norm_bias, eps};
    for_chunks(m, [&](int64_t begin, int64_t rows) {
      const float *from = x + begin * w->k, *add = residual ? residual + begin * w->n : nullptr;
      float* to = out + begin * w->n;
      if (m > kFewRows && !w->bytes())
        return many(*w, rows, prepare(from, rows, w->k, norm, w->dtype, input), activation, nullptr, add, to, kF32);
      multiply_rounded(*w, round_rows(*w, from, rows, norm, in_panels(rows), values, numbers), rows, activation, add, to);
    }, w->bytes() ? kManyRows : kChunk);
  });
}

const char* quantised_mlp_run(int threads, const Quantised* gate, const Quantised* up, const Quantised* down, const float* x,
                              int64_t m, const float* norm_weight, const float* norm_bias, float eps, int activation,
                              const float* residual, float* out) {
  return guarded(threads, [&] {
    const Norm norm{norm_weight, norm_bias, eps};
    if (m > kFewRows && !(up->bytes() && down->bytes() && (!gate || gate->bytes())))
      return mlp_of_chunks(gate, *up, *down, x, m, norm, activation, residual, out, up->dtype, many);
    for_chunks(m, [&](int64_t begin, int64_t rows) {
      rounded_mlp(gate, *up, *down, x + begin * up->k, rows, norm, activation, residual ? residual + begin * down->n : nullptr,
                  out + begin * down->n);
    }, kManyRows);
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
