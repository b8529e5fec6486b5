// Fused float32/bfloat16 kernels for inference on x86 CPUs, called from cpu.py through ctypes.
//
// Every matrix product is a oneDNN matmul from the libdnnl that Paddle ships, which picks AMX, AVX512-bf16 or AVX by
// itself. This file adds what oneDNN lacks: norms and conversions in one pass, blocked attention, rotary positions, and
// the order in which rows go through several products while they are still in cache. Tensors are row-major; float32
// outside, bfloat16 or float32 inside.

#include "attention.h"
#include "attention_pairs.h"
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

// Packs weights into the memory that is there.
void fill(const Linear& linear, const void* weight, int weight_type, int64_t row_stride, int64_t column_stride) {
#ifdef PADDLEMIX_PAIRS
  if (linear.pairs && (row_stride == 1 || column_stride == 1)) {
    auto pack = [&](auto* from) {
      pack_pairs(from, linear.k, linear.n, row_stride, column_stride, static_cast<bf16*>(linear.data));
    };
    return weight_type == kF32 ? pack(static_cast<const float*>(weight)) : pack(static_cast<const bf16*>(weight));
  }
#endif
  void* given = strided(linear.k, linear.n, weight_type, row_stride, column_stride);
  reorder(given, weight, linear.md, linear.data);
  dnnl_memory_desc_destroy(given);
}

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
    fill(*linear, weight, weight_type, row_stride, column_stride);
  });
}

// Other weights of the same shape in the place of those that are there.
const char* linear_fill_run(int threads, const Linear* linear, const void* weight, int weight_type, int64_t row_stride,
                            int64_t column_stride) {
  return guarded(threads, [&] {
    if (!linear->mapped) throw std::runtime_error("packed weights of others cannot be replaced");
    fill(*linear, weight, weight_type, row_stride, column_stride);
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
    thread_local Scratch keys, values, scales;
#ifdef PADDLEMIX_PAIRS
    if (suits_pairs(a)) {
      a.rounded = a.rounded && kv_type == kF32;
      const LaidOut heads{a, keys, values, scales};
      kv_type == kF32 ? heads.fill<float>(a) : heads.fill<bf16>(a);
      return attend_pairs(a, heads);
    }
#endif
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
