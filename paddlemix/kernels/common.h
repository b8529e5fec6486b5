// What the CPU kernels share: oneDNN's matrix products, memory that threads reuse, norms. Everything is of the file that includes it.
#pragma once

#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>
#include <sys/mman.h>

#if defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#include <immintrin.h>
#define PADDLEMIX_VECTORS
#endif

// The part of oneDNN's C interface (stable within version 3) that is used here; Paddle ships the library without headers.
extern "C" {
struct dnnl_exec_arg { int arg; void* memory; };
int dnnl_engine_create(void** engine, int kind, size_t index);
int dnnl_stream_create(void** stream, void* engine, unsigned flags);
int dnnl_memory_desc_create_with_strides(void** md, int ndims, const int64_t* dims, int dtype, const int64_t* strides);
int dnnl_memory_desc_create_with_tag(void** md, int ndims, const int64_t* dims, int dtype, int tag);
int dnnl_memory_desc_clone(void** md, const void* existing);
int dnnl_memory_desc_destroy(void* md);
int dnnl_memory_desc_equal(const void* left, const void* right);
size_t dnnl_memory_desc_get_size(const void* md);
int dnnl_memory_create(void** memory, const void* md, void* engine, void* handle);
int dnnl_memory_set_data_handle(void* memory, void* handle);
int dnnl_memory_destroy(void* memory);
int dnnl_post_ops_create(void** ops);
int dnnl_post_ops_destroy(void* ops);
int dnnl_post_ops_append_sum(void* ops, float scale, int32_t zero_point, int dtype);
int dnnl_post_ops_append_eltwise(void* ops, int algorithm, float alpha, float beta);
int dnnl_post_ops_append_binary(void* ops, int algorithm, const void* md);
int dnnl_primitive_attr_create(void** attr);
int dnnl_primitive_attr_destroy(void* attr);
int dnnl_primitive_attr_set_post_ops(void* attr, const void* ops);
int dnnl_primitive_attr_set_scratchpad_mode(void* attr, int mode);
int dnnl_matmul_primitive_desc_create(void** pd, void* engine, const void* src, const void* weights, const void* bias,
                                      const void* dst, const void* attr);
int dnnl_reorder_primitive_desc_create(void** pd, const void* src, void* src_engine, const void* dst, void* dst_engine,
                                       const void* attr);
int dnnl_primitive_desc_query(const void* pd, int what, int index, void* result);
const void* dnnl_primitive_desc_query_md(const void* pd, int what, int index);
int dnnl_primitive_desc_destroy(void* pd);
int dnnl_primitive_create(void** primitive, const void* pd);
int dnnl_primitive_execute(const void* primitive, void* stream, int count, const dnnl_exec_arg* args);
int dnnl_primitive_destroy(void* primitive);
}

inline std::atomic<int64_t> scratch_bytes{0};  // of all threads and files

namespace {

enum DataType { kBF16 = 2, kF32 = 3 };                                  // dnnl_data_type_t
enum Activation { kNone = 0, kGeluTanh = 43, kSilu = 44, kGelu = 49 };  // dnnl_alg_kind_t
enum { kAnyTag = 1, kCPU = 1, kInOrder = 1, kScratchpadUser = 1, kBinaryAdd = 0x1fff0, kBinaryMul = 0x1fff1 };
enum { kQueryImplInfo = 8, kQueryWeights = 131, kQueryScratchpad = 136 };
enum { kArgSrc = 1, kArgDst = 17, kArgWeights = 33, kArgBias = 41, kArgScratchpad = 80 };
int post_op_arg(int index) { return (32768 * (index + 1)) | 2; }

void check(int status, const char* what) {
  if (status) throw std::runtime_error(std::string("oneDNN: ") + what + " failed with status " + std::to_string(status));
}

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
int64_t size_of(int dtype) { return dtype == kBF16 ? 2 : 4; }

using bf16 = uint16_t;
inline uint32_t bits(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float from_bits(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }
inline void store(float* out, float x) { *out = x; }
inline void store(bf16* out, float x) {  // rounds to nearest even
  uint32_t u = bits(x);
  *out = bf16((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// 2^x, x <= 0, to 2 units in the last place. Branch-free so that loops over it vectorise.
inline float exp2_nonpositive(float x) {
  x = x > -126.f ? x : -126.f;
  float shifted = x + 12582912.f;  // 1.5 * 2^23: the integer nearest to x is now in the low bits
  float r = x - (shifted - 12582912.f);
  float p = 1.5403530e-4f;
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.f;
  return from_bits(bits(p) + (bits(shifted) << 23));
}

inline float silu(float x) {
  float e = exp2_nonpositive(-std::fabs(x) * 1.44269504f);
  return x / (1 + e) * (x < 0 ? e : 1.f);
}

// Abramowitz and Stegun 7.1.26: erf to 1.5e-7.
inline float gelu(float x) {
  const float z = std::fabs(x) * 0.70710678f, t = 1 / (1 + 0.3275911f * z);
  const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const float tail = 0.5f * p * exp2_nonpositive(-z * z * 1.44269504f);  // the normal distribution's, beyond |x|
  return x * (x < 0 ? tail : 1 - tail);
}

inline void activate(float* x, int64_t count, int activation) {
  switch (activation) {
    case kSilu:
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x[i] = silu(x[i]);
      break;
    case kGelu:
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x[i] = gelu(x[i]);
      break;
    case kGeluTanh:  // half of 1 + tanh(u) is the logistic function of 2u
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const float u = 1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]), e = exp2_nonpositive(-std::fabs(u) * 1.44269504f);
        x[i] *= u < 0 ? e / (1 + e) : 1 / (1 + e);
      }
      break;
  }
}

#ifdef PADDLEMIX_VECTORS
// Sums of four vectors.
inline __m128 sums_of(const __m256* v) {
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}
#endif

// Memory that grows and is reused, one set for each thread.
struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  template <class T>
  T* get(size_t count) {
    size_t bytes = round_up(count * sizeof(T), 4096);
    if (bytes > size) {
      std::free(data);
      data = std::aligned_alloc(4096, bytes);
      scratch_bytes += int64_t(data ? bytes : 0) - int64_t(size);
      size = data ? bytes : 0;
      if (!data) throw std::bad_alloc();
    }
    return static_cast<T*>(data);
  }
  ~Scratch() {
    std::free(data);
    scratch_bytes -= int64_t(size);
  }
};

void* engine() {
  static void* e = [] {
    void* created;
    check(dnnl_engine_create(&created, kCPU, 0), "engine");
    return created;
  }();
  return e;
}

void* stream() {
  thread_local void* s = [] {
    void* created;
    check(dnnl_stream_create(&created, engine(), kInOrder), "stream");
    return created;
  }();
  return s;
}

void* strided(int64_t rows, int64_t columns, int dtype, int64_t row_stride, int64_t column_stride = 1) {
  int64_t dims[] = {rows, columns}, strides[] = {row_stride, column_stride};
  void* md;
  check(dnnl_memory_desc_create_with_strides(&md, 2, dims, dtype, strides), "memory descriptor");
  return md;
}

// dst = act(src @ weights + bias) * mul + add, or dst += src @ weights.
struct Product {
  int64_t m, k, n;
  int64_t src_type, dst_type;                  // weights are of src_type
  int64_t src_stride, dst_stride;              // between rows
  int64_t weights_row = 0, weights_column = 0;  // strides; both 0: packed
  int64_t activation = kNone, bias = 0, mul_stride = 0, add_stride = 0, accumulate = 0;
  bool operator<(const Product& other) const { return std::memcmp(this, &other, sizeof(Product)) < 0; }
};

struct Operands {
  const void *src, *weights, *bias = nullptr, *mul = nullptr, *add = nullptr;
  void* dst;
};

// A primitive with its memory objects. Each thread has its own, because a memory object holds one address at a time;
// oneDNN shares the generated code.
class Matmul {
 public:
  Matmul(const Product& p, const void* packed) {
    void* attr;
    void* ops;
    check(dnnl_primitive_attr_create(&attr), "attributes");
    check(dnnl_primitive_attr_set_scratchpad_mode(attr, kScratchpadUser), "scratchpad mode");
    check(dnnl_post_ops_create(&ops), "post-ops");
    int count = 0;
    if (p.accumulate) check(dnnl_post_ops_append_sum(ops, 1.f, 0, 0), "sum"), ++count;
    if (p.activation) check(dnnl_post_ops_append_eltwise(ops, p.activation, 1.f, 0.f), "activation"), ++count;
    if (p.mul_stride) {
      void* md = strided(p.m, p.n, p.src_type, p.mul_stride);
      check(dnnl_post_ops_append_binary(ops, kBinaryMul, md), "multiplication");
      add(post_op_arg(count++), md);
      dnnl_memory_desc_destroy(md);
    }
    if (p.add_stride) {
      void* md = strided(p.m, p.n, kF32, p.add_stride);
      check(dnnl_post_ops_append_binary(ops, kBinaryAdd, md), "addition");
      add(post_op_arg(count++), md);
      dnnl_memory_desc_destroy(md);
    }
    check(dnnl_primitive_attr_set_post_ops(attr, ops), "post-ops");
    void* src = strided(p.m, p.k, p.src_type, p.src_stride);
    void* weights;
    if (packed) check(dnnl_memory_desc_clone(&weights, packed), "memory descriptor");
    else weights = strided(p.k, p.n, p.src_type, p.weights_row, p.weights_column);
    void* bias = p.bias ? strided(1, p.n, kF32, p.n) : nullptr;
    void* dst = strided(p.m, p.n, p.dst_type, p.dst_stride);
    void* pd;
    check(dnnl_matmul_primitive_desc_create(&pd, engine(), src, weights, bias, dst, attr), "matmul");
    check(dnnl_primitive_create(&primitive_, pd), "matmul");
    const void* scratchpad = dnnl_primitive_desc_query_md(pd, kQueryScratchpad, 0);
    scratchpad_size_ = dnnl_memory_desc_get_size(scratchpad);
    add(kArgSrc, src), add(kArgWeights, weights), add(kArgDst, dst), add(kArgScratchpad, scratchpad);
    if (bias) add(kArgBias, bias), dnnl_memory_desc_destroy(bias);
    dnnl_memory_desc_destroy(src), dnnl_memory_desc_destroy(weights), dnnl_memory_desc_destroy(dst);
    dnnl_primitive_desc_destroy(pd), dnnl_post_ops_destroy(ops), dnnl_primitive_attr_destroy(attr);
  }
  Matmul(const Matmul&) = delete;
  ~Matmul() {
    for (int i = 0; i < count_; ++i) dnnl_memory_destroy(args_[i].memory);
    dnnl_primitive_destroy(primitive_);
  }

  void run(const Operands& o) {
    thread_local Scratch scratchpad;
    for (int i = 0; i < count_; ++i) {
      const void* address;
      switch (args_[i].arg) {
        case kArgSrc: address = o.src; break;
        case kArgWeights: address = o.weights; break;
        case kArgBias: address = o.bias; break;
        case kArgDst: address = o.dst; break;
        case kArgScratchpad: address = scratchpad.get<char>(scratchpad_size_); break;
        default: address = o.mul && args_[i].arg == first_post_op_ ? o.mul : o.add;
      }
      dnnl_memory_set_data_handle(args_[i].memory, const_cast<void*>(address));
    }
    check(dnnl_primitive_execute(primitive_, stream(), count_, args_.data()), "execution");
  }

 private:
  void add(int arg, const void* md) {
    if (arg > kArgScratchpad && !first_post_op_) first_post_op_ = arg;
    args_[count_].arg = arg;
    check(dnnl_memory_create(&args_[count_++].memory, md, engine(), nullptr), "memory");
  }

  void* primitive_ = nullptr;
  size_t scratchpad_size_ = 0;
  std::array<dnnl_exec_arg, 7> args_;
  int count_ = 0, first_post_op_ = 0;
};

void multiply(const Product& p, const Operands& o, const void* packed = nullptr) {
  thread_local std::map<Product, Matmul> plans;
  auto plan = plans.find(p);
  if (plan == plans.end()) {
    if (plans.size() >= 512) plans.clear();  // prompts of ever new lengths must not fill the memory
    plan = plans.try_emplace(p, p, packed).first;
  }
  plan->second.run(o);
}

struct Norm {
  const float* weight;  // null: none of the kind
  const float* bias;    // null: root-mean-square norm
  float eps;
};

template <class T>
void normalize_row(const float* x, int64_t width, const Norm& norm, T* out) {
  if (!norm.weight) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(out + i, x[i]);
    return;
  }
  float mean = 0, square = 0;
  if (norm.bias) {
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < width; ++i) mean += x[i];
    mean /= width;
  }
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
  float scale = 1.f / std::sqrt(square / width + norm.eps);
  if (norm.bias) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(out + i, (x[i] - mean) * scale * norm.weight[i] + norm.bias[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(out + i, x[i] * scale * norm.weight[i]);
  }
}

template <class T>
void normalize(const float* x, int64_t rows, int64_t width, int64_t stride, const Norm& norm, T* out) {
#pragma omp parallel for if (rows * width > 32768)
  for (int64_t row = 0; row < rows; ++row) normalize_row(x + row * stride, width, norm, out + row * width);
}

// Rows [m, k] as the source of a product: x itself where nothing has to be done to it.
const void* prepare(const float* x, int64_t rows, int64_t width, const Norm& norm, int dtype, Scratch& scratch) {
  if (dtype == kF32 && !norm.weight) return x;
  if (dtype == kF32) {
    float* out = scratch.get<float>(rows * width);
    normalize(x, rows, width, width, norm, out);
    return out;
  }
  bf16* out = scratch.get<bf16>(rows * width);
  normalize(x, rows, width, width, norm, out);
  return out;
}

// Rows that go through a chain of products together: few enough that they stay in cache between them, many enough that
// reading the weights again costs little.
constexpr int64_t kChunk = 512;

template <class F>
void for_chunks(int64_t rows, F body, int64_t chunk = kChunk) {
  for (int64_t begin = 0; begin < rows;) {
    int64_t left = rows - begin, count = left <= chunk + chunk / 4 ? left : chunk;
    body(begin, count);
    begin += count;
  }
}

// body(task) for all tasks, each thread taking the next when it is done with one. Not schedule(dynamic): libiomp5 now and then
// gives all iterations of such a loop, as g++ compiles it, to each thread.
template <class F>
void for_tasks(int64_t tasks, bool threaded, F body) {
  std::atomic<int64_t> next{0};
#pragma omp parallel if (threaded && tasks > 1)
  for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task);
}

// body(task, take) for all tasks, each of all rows: take(&begin, &end) gives the next `step` of them that no thread has taken, or
// false. Threads begin tasks as in for_tasks; when all are begun, they join those that have rows left.
template <class F>
void for_shared_tasks(int64_t tasks, int64_t rows, int64_t step, F body) {
  std::vector<std::atomic<int64_t>> taken(tasks);
  std::atomic<int64_t> next{0};
#pragma omp parallel
  {
    auto run = [&](int64_t task) {
      body(task, [&](int64_t* begin, int64_t* end) {
        *begin = taken[task].fetch_add(step), *end = std::min(*begin + step, rows);
        return *begin < rows;
      });
    };
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) run(task);
    for (int64_t task = tasks; task-- > 0;)
      if (rows - taken[task] > step) run(task);  // for less it does not pay
  }
}

// Runs the body with the asked number of threads and gives Paddle its own number back.
template <class F>
const char* guarded(int threads, F body) {
  static thread_local std::string message;
  const int before = omp_get_max_threads();
  omp_set_num_threads(threads);
  const char* error = nullptr;
  try {
    body();
  } catch (const std::exception& e) {
    message = e.what();
    error = message.c_str();
  }
  omp_set_num_threads(before);
  return error;
}

// act(x @ gate) * (x @ up) @ down of many rows: `product(linear, rows, src, activation, factor, add, dst, dtype)` is what
// multiplies with a linear layer of the kind L, which has `k` inputs and `n` outputs. Without a gate: act(x @ up) @ down.
template <class L, class F>
void mlp_of_chunks(const L* gate, const L& up, const L& down, const float* x, int64_t m, const Norm& norm, int activation,
                   const float* residual, float* out, int dtype, F product) {
  thread_local Scratch input, gates, hidden;
  for_chunks(m, [&](int64_t begin, int64_t rows) {
    const void* src = prepare(x + begin * up.k, rows, up.k, norm, dtype, input);
    void* h = hidden.get<char>(rows * up.n * size_of(dtype));
    void* g = nullptr;
    if (gate) {
      g = gates.get<char>(rows * up.n * size_of(dtype));
      product(*gate, rows, src, activation, nullptr, nullptr, g, dtype);
    }
    product(up, rows, src, gate ? kNone : activation, g, nullptr, h, dtype);
    const float* add = residual ? residual + begin * down.n : nullptr;
    product(down, rows, h, kNone, nullptr, add, out + begin * down.n, kF32);
  });
}

}  // namespace
