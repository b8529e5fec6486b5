// Fused float32/bfloat16 kernels for inference on x86 CPUs, called from cpu.py through ctypes.
//
// Every matrix product is a oneDNN matmul from the libdnnl that Paddle ships, which picks AMX, AVX512-bf16 or AVX by
// itself. This file adds what oneDNN lacks: norms and conversions in one pass, blocked attention, rotary positions, and
// the order in which rows go through several products while they are still in cache. Tensors are row-major; float32
// outside, bfloat16 or float32 inside.

#include "common.h"
#include "few_pairs.h"
#include "few_rows.h"

namespace {

// Weights [k, n] in the layout that oneDNN prefers.
struct Linear {
  int64_t k, n;
  int dtype;
  void* md = nullptr;
  void* data = nullptr;
  float* bias = nullptr;
  size_t mapped = 0;   // bytes at data that are this layer's own
  bool plain = false;  // whether they lie row by row
  bool pairs = false;  // whether they lie as few_pairs.h tells
  ~Linear() {
    if (md) dnnl_memory_desc_destroy(md);
    if (mapped) munmap(data, mapped);
    delete[] bias;
  }
  // Room for the weights, apart from what malloc has and keeps; in huge pages but for the end, of which nothing more is taken.
  void allocate(size_t size) {
    constexpr size_t kHuge = 1 << 21;
    const size_t bytes = round_up(size, 4096), whole = bytes + kHuge;
    char* base = static_cast<char*>(mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED) throw std::bad_alloc();
    char* start = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(base), kHuge));
    if (start > base) munmap(base, start - base);
    if (base + whole > start + bytes) munmap(start + bytes, base + whole - (start + bytes));
    data = start, mapped = bytes;
    madvise(data, size / kHuge * kHuge, MADV_HUGEPAGE);
  }
};

void apply(const Linear& linear, int64_t m, const void* src, int activation, const void* mul, const float* add, void* dst,
           int dst_type) {
  Product p{m, linear.k, linear.n, linear.dtype, dst_type, linear.k, linear.n};
  p.activation = activation;
  p.bias = linear.bias != nullptr;
  p.mul_stride = mul ? linear.n : 0;
  p.add_stride = add ? linear.n : 0;
  multiply(p, {src, linear.data, linear.bias, mul, add, dst}, linear.md);
}

// The same for a few rows each of which is summed up alone, where there is a kernel for the layout that oneDNN prefers.
void apply_few(const Linear& linear, int64_t m, const void* src, int activation, const void* mul, const float* add, void* dst,
               int dst_type) {
#ifdef PADDLEMIX_PAIRS
  if (linear.pairs && m <= kFewRows)
    return multiply_pairs(m, linear.k, linear.n, static_cast<const bf16*>(src), static_cast<const bf16*>(linear.data), linear.bias,
                          activation, static_cast<const bf16*>(mul), add, dst, dst_type);
#endif
  if (!linear.plain || m > kFewRows) return apply(linear, m, src, activation, mul, add, dst, dst_type);
  multiply_few(m, linear.k, linear.n, static_cast<const float*>(src), static_cast<const float*>(linear.data), linear.bias,
               activation, static_cast<const float*>(mul), add, static_cast<float*>(dst));
}

template <class F>
const char* run_linear(int threads, const Linear* linear, const float* x, int64_t m, const Norm& norm, int activation,
                       const float* residual, float* out, F product) {
  return guarded(threads, [&] {
    thread_local Scratch input;
    for_chunks(m, [&](int64_t begin, int64_t rows) {
      const void* src = prepare(x + begin * linear->k, rows, linear->k, norm, linear->dtype, input);
      const float* add = residual ? residual + begin * linear->n : nullptr;
      product(*linear, rows, src, activation, nullptr, add, out + begin * linear->n, kF32);
    });
  });
}

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

template <class T>
void rotate_rows(const float* qkv, const float* cosines, const float* sines, int64_t table_batch, int64_t batch,
                 int64_t tokens, int64_t heads, int64_t kv_heads, int64_t width, int64_t offset, int64_t capacity,
                 const float* q_norm, const float* k_norm, float eps, float* q, T* k_cache, T* v_cache) {
  const int64_t half = width / 2, all = heads + 2 * kv_heads;
#pragma omp parallel for if (batch * tokens > 16)
  for (int64_t row = 0; row < batch * tokens; ++row) {
    const int64_t b = row / tokens, n = row % tokens, cached = (b * capacity + offset + n) * kv_heads * width;
    const float* x = qkv + row * all * width;
    const float* cos = cosines + ((table_batch > 1 ? b : 0) * tokens + n) * width;
    const float* sin = sines + ((table_batch > 1 ? b : 0) * tokens + n) * width;
    thread_local Scratch head;
    auto rotate = [&](const float* from, const float* norm, auto* to) {
      if (norm) {  // each head by itself
        float* normed = head.get<float>(width);
        normalize_row(from, width, Norm{norm, nullptr, eps}, normed);
        from = normed;
      }
#pragma omp simd
      for (int64_t d = 0; d < half; ++d) {
        float low = from[d], high = from[d + half];
        store(to + d, low * cos[d] + high * sin[d]);
        store(to + d + half, high * cos[d + half] + low * sin[d + half]);
      }
    };
    for (int64_t h = 0; h < heads; ++h) rotate(x + h * width, q_norm, q + (row * heads + h) * width);
    for (int64_t h = 0; h < kv_heads; ++h) rotate(x + (heads + h) * width, k_norm, k_cache + cached + h * width);
    normalize_row(x + (heads + kv_heads) * width, kv_heads * width, Norm{}, v_cache + cached);
  }
}

}  // namespace

// Each function returns null, or what went wrong.
extern "C" {

// weight [k, n]; or, where `packed` bytes are not 0, what linear_memory() told of the same shape on such a machine, which stays
// where it is.
const char* linear_create(int threads, const void* weight, int weight_type, int64_t k, int64_t n, int64_t row_stride,
                          int64_t column_stride, const float* bias, int dtype, int64_t packed, Linear** result,
                          char* implementation) {
  return guarded(threads, [&] {
    Linear* linear = new Linear{k, n, dtype};
    *result = linear;
    linear->md = preferred_layout(k, n, dtype, implementation);
    void* row_by_row = strided(k, n, kF32, n);
    linear->plain = dnnl_memory_desc_equal(linear->md, row_by_row);
    dnnl_memory_desc_destroy(row_by_row);
    linear->pairs = in_pairs(linear->md, k, n, dtype);
    const size_t size = dnnl_memory_desc_get_size(linear->md);
    if (bias) linear->bias = static_cast<float*>(std::memcpy(new float[n], bias, n * sizeof(float)));
    if (packed) {
      if (size_t(packed) != size) throw std::runtime_error("packed weights of another size");
      linear->data = const_cast<void*>(weight);
      return;
    }
    linear->allocate(size);
    void* given = strided(k, n, weight_type, row_stride, column_stride);
    reorder(given, weight, linear->md, linear->data);
    dnnl_memory_desc_destroy(given);
  });
}

void linear_memory(const Linear* linear, const void** data, int64_t* size) {
  *data = linear->data, *size = int64_t(dnnl_memory_desc_get_size(linear->md));
}

int64_t scratch_memory() { return scratch_bytes; }

void linear_destroy(Linear* linear) { delete linear; }

const char* linear_run(int threads, const Linear* linear, const float* x, int64_t m, const float* norm_weight,
                       const float* norm_bias, float eps, int activation, const float* residual, float* out) {
  return run_linear(threads, linear, x, m, {norm_weight, norm_bias, eps}, activation, residual, out, apply);
}

// As linear_run(), where no output depends on how many rows there are, if linear_few() says so, up to kFewRows.
const char* linear_few_run(int threads, const Linear* linear, const float* x, int64_t m, const float* norm_weight,
                           const float* norm_bias, float eps, int activation, const float* residual, float* out) {
  return run_linear(threads, linear, x, m, {norm_weight, norm_bias, eps}, activation, residual, out, apply_few);
}

int linear_few(const Linear* linear) { return (linear->plain || linear->pairs) && kFewRows; }

const char* mlp_run(int threads, const Linear* gate, const Linear* up, const Linear* down, const float* x, int64_t m,
                    const float* norm_weight, const float* norm_bias, float eps, int activation, const float* residual,
                    float* out) {
  return guarded(threads, [&] {
    mlp_of_chunks(gate, *up, *down, x, m, {norm_weight, norm_bias, eps}, activation, residual, out, up->dtype, apply);
  });
}

const char* mlp_few_run(int threads, const Linear* gate, const Linear* up, const Linear* down, const float* x, int64_t m,
                        const float* norm_weight, const float* norm_bias, float eps, int activation, const float* residual,
                        float* out) {
  return guarded(threads, [&] {
    mlp_of_chunks(gate, *up, *down, x, m, {norm_weight, norm_bias, eps}, activation, residual, out, up->dtype, apply_few);
  });
}

const char* norm_run(int threads, const float* x, int64_t rows, int64_t width, int64_t stride, const float* weight,
                     const float* bias, float eps, float* out) {
  return guarded(threads, [&] { normalize(x, rows, width, stride, {weight, bias, eps}, out); });
}

const char* attention_run(int threads, const Attention* shapes, int kv_type, int dtype) {
  return guarded(threads, [&] {
    Attention a = *shapes;
    if (dtype == kF32) return attend_all<float>(a);
    thread_local Scratch keys, values;
    if (kv_type == kF32) {
      a.keys = round_up(a.length, kKeyStep);
      const size_t count = a.batch * a.kv_heads * a.keys * a.width;
      bf16 *k = keys.get<bf16>(count), *v = values.get<bf16>(count);
      to_bf16(a.k, a, a.keys, a.k_stride, k), to_bf16(a.v, a, a.keys, a.v_stride, v);
      a.k = k, a.v = v;
    }
    attend_all<bf16>(a);
  });
}

const char* rotate_run(int threads, const float* qkv, const float* cos, const float* sin, int64_t table_batch, int64_t batch,
                       int64_t tokens, int64_t heads, int64_t kv_heads, int64_t width, int64_t offset, int64_t capacity,
                       int cache_type, const float* q_norm, const float* k_norm, float eps, float* q, void* k_cache,
                       void* v_cache) {
  return guarded(threads, [&] {
    if (cache_type == kF32)
      rotate_rows(qkv, cos, sin, table_batch, batch, tokens, heads, kv_heads, width, offset, capacity, q_norm, k_norm, eps, q,
                  static_cast<float*>(k_cache), static_cast<float*>(v_cache));
    else
      rotate_rows(qkv, cos, sin, table_batch, batch, tokens, heads, kv_heads, width, offset, capacity, q_norm, k_norm, eps, q,
                  static_cast<bf16*>(k_cache), static_cast<bf16*>(v_cache));
  });
}
}
