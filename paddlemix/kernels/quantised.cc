// Products with weights in 8 and 4 bits, called from quantised.py through ctypes. paddlemix/quantised.py has their layout and a
// plain reference of all that is done here.
//
// Few rows (decoding) are rounded to 16 bits in the weights' groups, finer than bfloat16; codes are unpacked in registers and
// multiplied as whole numbers (rounded.h), so that reading the weights is what takes the time. Many rows (a prompt, pictures) go
// through oneDNN, with weights unpacked a panel at a time. Where activations are to have 8 bits, all rows do as few ones do.

#include "rounded.h"

namespace {

constexpr int64_t kFewRows = 32;    // up to these, rows go through the kernel here, else through oneDNN
constexpr int64_t kStrip = 16;      // outputs that a thread computes at a time
constexpr int64_t kRows = 32;       // of many rows in 8 bits, those that a thread computes at a time, which its cache holds,
constexpr int64_t kOutputs = 256;   // and their outputs
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

// out = activation(x @ w + bias) + add of rounded rows, in float32.
void few(const Quantised& w, const float* x, int64_t m, int activation, const float* add, float* out) {
  thread_local Scratch values, numbers;
  Rounded rounded = round_rows(w, x, m, values, numbers);
  for_tiles(m, w.n, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    outputs_of(w, rounded, begin, end, first, last, out, w.n);
    for (int64_t row = begin; row < end; ++row) {
      float* y = out + row * w.n;
      activate(y + first, last - first, activation);
      if (add)
        for (int64_t n = first; n < last; ++n) y[n] += add[row * w.n + n];
    }
  });
}

// out = act(x @ gate) * (x @ up) @ down + residual of rounded rows; without a gate act(x @ up) @ down + residual.
void few_mlp(const Quantised* gate, const Quantised& up, const Quantised& down, const float* x, int64_t m, int activation,
             const float* residual, float* out) {
  thread_local Scratch gates, hidden, values, numbers, gate_values, gate_numbers;
  const Rounded rounded = round_rows(up, x, m, values, numbers);
  // The gate's inputs are the same, but may come in another order, in other groups, or for codes of other bits.
  const bool same = !gate || (gate->group == up.group && gate->bits == up.bits && gate->bytes() == up.bytes() && !gate->order &&
                              !up.order);
  const Rounded for_gate = same ? rounded : round_rows(*gate, x, m, gate_values, gate_numbers);
  float* h = hidden.get<float>(m * up.n);
  float* g = gate ? gates.get<float>(m * up.n) : nullptr;
  for_tiles(m, up.n, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    outputs_of(up, rounded, begin, end, first, last, h, up.n);
    if (gate) outputs_of(*gate, for_gate, begin, end, first, last, g, up.n);
    for (int64_t row = begin; row < end; ++row) {
      float* y = h + row * up.n;
      if (!gate) {
        activate(y + first, last - first, activation);
        continue;
      }
      float* factor = g + row * up.n;
      activate(factor + first, last - first, activation);
#pragma omp simd
      for (int64_t n = first; n < last; ++n) y[n] *= factor[n];
    }
  });
  few(down, h, m, kNone, residual, out);
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
    for_chunks(m, [&](int64_t begin, int64_t rows) {
      const bool rounds = m <= kFewRows || w->bytes();
      const void* src = prepare(x + begin * w->k, rows, w->k, norm, rounds ? int64_t(kF32) : w->dtype, input);
      const float* add = residual ? residual + begin * w->n : nullptr;
      if (rounds) few(*w, static_cast<const float*>(src), rows, activation, add, out + begin * w->n);
      else many(*w, rows, src, activation, nullptr, add, out + begin * w->n, kF32);
    });
  });
}

const char* quantised_mlp_run(int threads, const Quantised* gate, const Quantised* up, const Quantised* down, const float* x,
                              int64_t m, const float* norm_weight, const float* norm_bias, float eps, int activation,
                              const float* residual, float* out) {
  return guarded(threads, [&] {
    thread_local Scratch input;
    const Norm norm{norm_weight, norm_bias, eps};
    if (m > kFewRows && !(up->bytes() && down->bytes() && (!gate || gate->bytes())))
      return mlp_of_chunks(gate, *up, *down, x, m, norm, activation, residual, out, up->dtype, many);
    for_chunks(m, [&](int64_t begin, int64_t rows) {
      const float* src = static_cast<const float*>(prepare(x + begin * up->k, rows, up->k, norm, kF32, input));
      few_mlp(gate, *up, *down, src, rows, activation, residual ? residual + begin * down->n : nullptr, out + begin * down->n);
    });
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
