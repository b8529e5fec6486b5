// All blocks of a decoder for one new token of each of some rows, in one call: a step of decoding costs the host no more than
// one operator. Products, norms and rotary positions are those of cpu.cc and quantised.cc; attention over the cache is here,
// which may be in float32, bfloat16 or 8 bits, row by row or in pages. Called from decoder.py.

#include "common.h"

extern "C" {
const char* linear_few_run(int, const void*, const float*, int64_t, const float*, const float*, float, int, const float*,
                           float*);
const char* quantised_linear_run(int, const void*, const float*, int64_t, const float*, const float*, float, int, const float*,
                                 float*);
const char* mlp_few_run(int, const void*, const void*, const void*, const float*, int64_t, const float*, const float*, float,
                        int, const float*, float*);
const char* quantised_mlp_run(int, const void*, const void*, const void*, const float*, int64_t, const float*, const float*,
                              float, int, const float*, float*);
const char* rotate_run(int, const float*, const float*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                       int64_t, int64_t, int, const float*, const float*, float, float*, void*, void*);
}

namespace {

enum CacheType { kS8 = 5 };       // dnnl_data_type_t; besides kF32 and kBF16
constexpr int64_t kSegment = 512;  // positions of a task: always as many, so that a sum does not depend on who else is there
constexpr int64_t kTile = 64;      // positions that are floats at a time

struct Matrix {
  const void* weights;
  int64_t few_bits;  // 0: of cpu.cc, 1: of quantised.cc
};

// What Python hands over; it keeps the memory.
struct Layer {
  const float *norm1, *norm2, *q_norm, *k_norm, *sinks;  // the last three may be null
  Matrix qkv, o, gate, up, down;
  float eps1, eps2, qk_eps;
};

struct Store {  // of a layer: [slots, kv_heads, width], and for 8 bits a scale for each `group` values
  void *keys, *values;
  float *key_scales, *value_scales;
};

struct Step {
  int64_t rows, heads, kv_heads, width, length, capacity, cache_type, group, table_rows;
  int64_t rounds;  // keys and values in float32 are bfloat16, which other caches have: where rows lie in pages as they are put there,
                   // else as they are read
  const float *cos, *sin;
  const int64_t *slots;   // [rows, length]; null: `capacity` slots of each row, one after the other
  const int64_t *starts;  // first position that a row sees; null: 0
  float scale;
  int64_t slot(int64_t row, int64_t position) const {
    return slots ? slots[row * length + position] : row * capacity + position;
  }
};

inline void round_to_bf16(const float* from, int64_t width, float* to) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) {
    bf16 half;
    store(&half, from[d]);
    to[d] = from_bits(uint32_t(half) << 16);
  }
}

// One head of one position as floats: where it lies, or converted into `room`.
inline const float* floats(const float* from, const float*, int64_t width, const Step& s, float* room) {
  if (!s.rounds || s.slots) return from;
  round_to_bf16(from, width, room);
  return room;
}
inline const float* floats(const bf16* from, const float*, int64_t width, const Step&, float* room) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) room[d] = from_bits(uint32_t(from[d]) << 16);
  return room;
}
inline const float* floats(const int8_t* from, const float* scales, int64_t width, const Step& s, float* room) {
  const int64_t group = s.group;
  for (int64_t g = 0; g < width / group; ++g) {
    const float scale = scales[g];
#pragma omp simd
    for (int64_t d = g * group; d < (g + 1) * group; ++d) room[d] = from[d] * scale;
  }
  return room;
}

inline void put(const Step& s, const float* x, float* to, float*) {
  if (s.rounds) round_to_bf16(x, s.width, to);
  else std::memcpy(to, x, s.width * sizeof(float));
}
inline void put(const Step& s, const float* x, bf16* to, float*) { normalize_row(x, s.width, Norm{}, to); }
inline void put(const Step& s, const float* x, int8_t* to, float* scales) {
  const int64_t width = s.width, group = s.group;
  for (int64_t g = 0; g < width / group; ++g, x += group, to += group) {
    float top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t d = 0; d < group; ++d) top = std::fabs(x[d]) > top ? std::fabs(x[d]) : top;
    scales[g] = top / 127;
    const float inverse = top > 0 ? 127 / top : 0.f;
    for (int64_t d = 0; d < group; ++d) to[d] = int8_t(std::nearbyint(x[d] * inverse));
  }
}

// q [width] . k [count] rows -> out [count].
void scores_of(const float* q, const float* const* k, int64_t count, int64_t width, float* out) {
  int64_t j = 0;
#ifdef PADDLEMIX_VECTORS
  for (; j + 4 <= count && width % 8 == 0; j += 4) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t d = 0; d < width; d += 8) {
      const __m256 left = _mm256_loadu_ps(q + d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] = _mm256_fmadd_ps(left, _mm256_loadu_ps(k[j + i] + d), sum[i]);
    }
    _mm_storeu_ps(out + j, sums_of(sum));
  }
#endif
  for (; j < count; ++j) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; ++d) sum += q[d] * k[j][d];
    out[j] = sum;
  }
}

// out [width] += weights [count] . v [count] rows.
void add_weighted(const float* weights, const float* const* v, int64_t count, int64_t width, float* out) {
  int64_t d = 0;
#ifdef PADDLEMIX_VECTORS
  for (; d + 32 <= width; d += 32) {
    __m256 sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = _mm256_loadu_ps(out + d + 8 * i);
    for (int64_t j = 0; j < count; ++j) {
      const __m256 weight = _mm256_broadcast_ss(weights + j);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(v[j] + d + 8 * i), sum[i]);
    }
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + d + 8 * i, sum[i]);
  }
#endif
  for (int64_t j = 0; j < count && d < width; ++j)
#pragma omp simd
    for (int64_t i = d; i < width; ++i) out[i] += weights[j] * v[j][i];
}

// What the query heads of one key head get from the positions first to last of a row: out [group, width], not divided yet, and the
// largest score and the sum of each head, behind it (online softmax, arXiv 2205.14135).
template <class T>
void attend(const Step& s, const Store& store, const float* queries, int64_t row, int64_t kv, int64_t first, int64_t last,
            float* out) {
  thread_local Scratch query_room, float_room, score_room;
  const int64_t together = s.heads / s.kv_heads, width = s.width, groups = width / s.group;
  float* q = query_room.get<float>(together * width);
  float* room = float_room.get<float>(kTile * width);
  float* scores = score_room.get<float>(together * kTile);
  float *peak = out + together * width, *total = peak + together;
  const float* from = queries + (row * s.heads + kv * together) * width;
  for (int64_t i = 0; i < together * width; ++i) q[i] = from[i] * (s.scale * 1.44269504f);  // softmax in powers of 2
  std::fill(out, peak, 0.f), std::fill(peak, total, -INFINITY), std::fill(total, total + together, 0.f);
  const float* rows[kTile];
  auto read = [&](const void* values, const float* scales, int64_t at, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t place = s.slot(row, at + j) * s.kv_heads + kv;
      rows[j] = floats(static_cast<const T*>(values) + place * width, scales ? scales + place * groups : nullptr, width, s,
                       room + j * width);
    }
  };
  for (int64_t at = first; at < last; at += kTile) {
    const int64_t count = std::min(kTile, last - at);
    read(store.keys, store.key_scales, at, count);
    for (int64_t h = 0; h < together; ++h) scores_of(q + h * width, rows, count, width, scores + h * kTile);
    read(store.values, store.value_scales, at, count);
    for (int64_t h = 0; h < together; ++h) {
      float *p = scores + h * kTile, top = peak[h], sum = 0;
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < count; ++j) top = p[j] > top ? p[j] : top;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < count; ++j) p[j] = exp2_nonpositive(p[j] - top), sum += p[j];
      const float shrink = total[h] > 0 ? exp2_nonpositive(peak[h] - top) : 0.f;
      float* o = out + h * width;
      if (shrink != 1)
        for (int64_t d = 0; d < width; ++d) o[d] *= shrink;
      total[h] = total[h] * shrink + sum, peak[h] = top;
      add_weighted(p, rows, count, width, o);
    }
  }
}

template <class T>
void attend_all(const Step& s, const Layer& layer, const Store& store, const float* q, float* out) {
  thread_local Scratch room;
  const int64_t together = s.heads / s.kv_heads, part = together * (s.width + 2);
  const int64_t segments = (s.length + kSegment - 1) / kSegment, tasks = s.rows * s.kv_heads * segments;
  float* parts = room.get<float>(tasks * part);
  auto start = [&](int64_t row) { return s.starts ? s.starts[row] : 0; };
  // A row's segments are counted from its own beginning.
  auto of_row = [&](int64_t row) { return (s.length - start(row) + kSegment - 1) / kSegment; };
  for_tasks(tasks, s.length * s.rows > 64, [&](int64_t task) {
    const int64_t segment = task % segments, kv = task / segments % s.kv_heads, row = task / segments / s.kv_heads;
    const int64_t first = start(row) + segment * kSegment;
    if (first < s.length)
      attend<T>(s, store, q, row, kv, first, std::min(first + kSegment, s.length), parts + task * part);
  });
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t head = 0; head < s.heads; ++head) {
      const float* from = parts + (row * s.kv_heads + head / together) * segments * part;
      const int64_t h = head % together, count = of_row(row);
      float top = layer.sinks ? layer.sinks[head] * 1.44269504f : -INFINITY;
      for (int64_t i = 0; i < count; ++i) top = std::max(top, from[i * part + together * s.width + h]);
      float total = layer.sinks ? exp2_nonpositive(layer.sinks[head] * 1.44269504f - top) : 0.f;
      float* to = out + (row * s.heads + head) * s.width;
      std::fill(to, to + s.width, 0.f);
      for (int64_t i = 0; i < count; ++i) {
        const float *piece = from + i * part, shrink = exp2_nonpositive(piece[together * s.width + h] - top);
        total += piece[together * s.width + together + h] * shrink;
        for (int64_t d = 0; d < s.width; ++d) to[d] += piece[h * s.width + d] * shrink;
      }
      for (int64_t d = 0; d < s.width; ++d) to[d] /= total;
    }
}

template <class T>
void store_and_attend(const Step& s, const Layer& layer, const Store& store, const float* q, const float* k, const float* v,
                      float* out) {
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t kv = 0; kv < s.kv_heads; ++kv) {
      const int64_t from = (row * s.kv_heads + kv) * s.width, place = s.slot(row, s.length - 1) * s.kv_heads + kv;
      const int64_t scale = place * (s.width / s.group);
      put(s, k + from, static_cast<T*>(store.keys) + place * s.width, store.key_scales + scale);
      put(s, v + from, static_cast<T*>(store.values) + place * s.width, store.value_scales + scale);
    }
  attend_all<T>(s, layer, store, q, out);
}

void require(const char* error) {
  if (error) throw std::runtime_error(error);
}

}  // namespace

extern "C" {

// x [rows, n] -> out [rows, n], where n are the outputs of `o`; keys and values of the new tokens are put into the stores.
const char* decoder_run(int threads, const Layer* layers, int64_t count, const Store* stores, const Step* step, int64_t n,
                        const float* x, float* out) {
  return guarded(threads, [&] {
    thread_local Scratch products, queries, keys, values, mixed, middle;
    const Step& s = *step;
    const int64_t kv = s.kv_heads * s.width, all = s.heads * s.width;
    float* qkv = products.get<float>(s.rows * (all + 2 * kv));
    float *q = queries.get<float>(s.rows * all), *seen = mixed.get<float>(s.rows * all);
    float *k = keys.get<float>(s.rows * kv), *v = values.get<float>(s.rows * kv), *between = middle.get<float>(s.rows * n);
    std::memcpy(out, x, s.rows * n * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      const Layer& layer = layers[i];
      auto linear = [&](const Matrix& m) { return m.few_bits ? quantised_linear_run : linear_few_run; };
      require(linear(layer.qkv)(threads, layer.qkv.weights, out, s.rows, layer.norm1, nullptr, layer.eps1, kNone, nullptr, qkv));
      require(rotate_run(threads, qkv, s.cos, s.sin, s.table_rows, s.rows, 1, s.heads, s.kv_heads, s.width, 0, 1, kF32,
                         layer.q_norm, layer.k_norm, layer.qk_eps, q, k, v));
      if (s.cache_type == kF32) store_and_attend<float>(s, layer, stores[i], q, k, v, seen);
      else if (s.cache_type == kBF16) store_and_attend<bf16>(s, layer, stores[i], q, k, v, seen);
      else store_and_attend<int8_t>(s, layer, stores[i], q, k, v, seen);
      require(linear(layer.o)(threads, layer.o.weights, seen, s.rows, nullptr, nullptr, 0, kNone, out, between));
      auto mlp = layer.down.few_bits ? quantised_mlp_run : mlp_few_run;
      require(mlp(threads, layer.gate.weights, layer.up.weights, layer.down.weights, between, s.rows, layer.norm2, nullptr,
                  layer.eps2, kSilu, between, out));
    }
  });
}
}
