// One decode step of a model: one new token for each of B rows, from its embedding to its logits.
//
// A step reads every weight once and does little with it, so its time is that of reading memory. Weights are read as
// they are stored and unpacked in registers; activations and sums are float32.
//
//     y[b][n] = sum over k of w[n][k] x[b][k]
//
// Each y[b][n] is computed by one thread and added up in one order. So a row's results depend neither on the other rows
// nor on the number of threads. Threads meet at a barrier where one needs what another has computed; the residual
// stream x, which all need, is kept by each thread for itself.
//
// Letters: B rows, d hidden size, H query heads, K key/value heads, D head dimension, V vocabulary, S cached tokens.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "blocks.h"
#include "exponential.h"

#include <omp.h>

namespace {

// Products -------------------------------------------------------------------------------------------------------------

#ifdef __AVX512F__
constexpr int MOST_ROWS = 5;  // 4 outputs x 5 rows of sums stay in 32 registers
#else
constexpr int MOST_ROWS = 2;
#endif
constexpr int OUTPUTS = 4;  // at a time

typedef float eight __attribute__((vector_size(32)));

// The sums of four vectors; each is added up in the same order, by halves.
inline four quartered(vec v) {
#ifdef __AVX512F__
    eight half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    eight half = v;
#endif
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}
inline four totals(vec a, vec b, vec c, vec d) {
    four f = quartered(a), g = quartered(b), h = quartered(c), i = quartered(d);
    four fg = __builtin_shufflevector(f, g, 0, 4, 1, 5) + __builtin_shufflevector(f, g, 2, 6, 3, 7);
    four hi = __builtin_shufflevector(h, i, 0, 4, 1, 5) + __builtin_shufflevector(h, i, 2, 6, 3, 7);
    return __builtin_shufflevector(fg, hi, 0, 1, 4, 5) + __builtin_shufflevector(fg, hi, 2, 3, 6, 7);
}
inline float total(vec v) {
    four f = quartered(v);
    return (f[0] + f[2]) + (f[1] + f[3]);
}

struct Span {
    int64_t begin, end;
};

// This thread's part of n, in whole groups.
inline Span share(int64_t n, int64_t group = OUTPUTS) {
    int64_t groups = (n + group - 1) / group, t = omp_get_thread_num(), threads = omp_get_num_threads();
    return {std::min(n, groups * t / threads * group), std::min(n, groups * (t + 1) / threads * group)};
}

// Ask for chunk c of a row that is read later: the processor does not foresee rows that are read side by side.
inline void prefetch(const uint8_t *row, int64_t row_bytes, int64_t c, int64_t whole) {
    for (int64_t at = 0; at < row_bytes / whole; at += 64) __builtin_prefetch(row + c * row_bytes / whole + at);
}

// The columns of a row, padded to whole chunks: use(c, the weights) for each.
template <class F, class Use>
inline void each_chunk(const uint8_t *row, int64_t columns, const Use &use, int64_t row_bytes = 0) {
    vec w[PARTS];
    const int64_t whole = columns / CHUNK;
    for (int64_t c = 0; c < whole; c++) {
        if (row_bytes) prefetch(row + OUTPUTS * row_bytes, row_bytes, c, whole);
        F::unpack(row, c, w);
        use(c, w);
    }
    if (whole * CHUNK < columns) unpack_end<F>(row, columns, whole, w), use(whole, w);
}

// y[b * y_stride + n] = sum of w[n] x[b] for N rows of w and B rows of x, which is padded with zeros to whole chunks.
// ahead: whether to ask for the next N rows of w.
template <class F, int N, int B>
void tile(const uint8_t *w, int64_t row_bytes, int64_t columns, const float *x, int64_t x_stride, float *y,
          int64_t y_stride, bool ahead) {
    vec sums[N][B] = {};
    auto add = [&](int64_t c, auto unpack) {
        vec parts[N][PARTS];
        for (int n = 0; n < N; n++) unpack(w + n * row_bytes, parts[n]);
        for (int p = 0; p < PARTS; p++)
            for (int b = 0; b < B; b++) {
                const vec v = load<vec>(x + b * x_stride + c * CHUNK + p * LANES);
                for (int n = 0; n < N; n++) sums[n][b] = multiply_add(parts[n][p], v, sums[n][b]);
            }
    };
    const int64_t whole = columns / CHUNK;
    for (int64_t c = 0; c < whole; c++) {
        if (ahead)
            for (int n = 0; n < N; n++) prefetch(w + (N + n) * row_bytes, row_bytes, c, whole);
        add(c, [&](const uint8_t *row, vec *parts) { F::unpack(row, c, parts); });
    }
    if (whole * CHUNK < columns)
        add(whole, [&](const uint8_t *row, vec *parts) { unpack_end<F>(row, columns, whole, parts); });
    for (int b = 0; b < B; b++)
        if constexpr (N == 4) {
            four found = totals(sums[0][b], sums[1][b], sums[2][b], sums[3][b]);
            std::memcpy(y + b * y_stride, &found, sizeof found);
        } else {
            for (int n = 0; n < N; n++) y[b * y_stride + n] = total(sums[n][b]);
        }
}

struct Rows {  // B vectors, one after another
    float *data;
    int64_t count, stride;
    float *operator[](int64_t b) const { return data + b * stride; }
};

// N outputs, from the n-th on, of all rows of x, MOST_ROWS at a time; `first` is the first that is left.
template <class F, int N, int B = MOST_ROWS>
void tiles(const uint8_t *w, int64_t row_bytes, int64_t columns, const Rows &x, const Rows &y, int64_t n, bool ahead,
           int64_t first = 0) {
    if (x.count - first >= B) {
        tile<F, N, B>(w, row_bytes, columns, x[first], x.stride, y[first] + n, y.stride, ahead);
        if (x.count - first > B) tiles<F, N, B>(w, row_bytes, columns, x, y, n, false, first + B);
    } else if constexpr (B > 1) {
        tiles<F, N, B - 1>(w, row_bytes, columns, x, y, n, ahead, first);
    }
}

// y = w x for some rows of w. For few rows of x the weights are used as they are unpacked, twice at the most; for more
// they are kept in `unpacked`, OUTPUTS rows of floats.
template <class F>
void product(const Matrix &w, Span rows, const Rows &x, const Rows &y, float *unpacked) {
    const bool as_stored = std::is_same<F, F32>::value || x.count <= 2 * MOST_ROWS;
    for (int64_t n = rows.begin; n < rows.end; n += OUTPUTS) {
        const int64_t count = std::min<int64_t>(OUTPUTS, rows.end - n), width = padded(w.columns);
        const uint8_t *from = w.data + n * w.row_bytes;
        if (as_stored && count == OUTPUTS) {
            tiles<F, OUTPUTS>(from, w.row_bytes, w.columns, x, y, n, true);
            continue;
        }
        for (int64_t i = 0; i < count; i++) {
            float *to = unpacked + i * width;
            auto keep = [&](int64_t c, const vec *parts) {
                for (int p = 0; p < PARTS; p++) store(to + c * CHUNK + p * LANES, parts[p]);
            };
            each_chunk<F>(from + i * w.row_bytes, w.columns, keep, w.row_bytes);
        }
        from = (const uint8_t *)unpacked;
        if (count == OUTPUTS)
            tiles<F32, OUTPUTS>(from, width * 4, width, x, y, n, false);
        else
            for (int64_t i = 0; i < count; i++) tiles<F32, 1>(from + i * width * 4, width * 4, width, x, y, n + i, false);
    }
}

void multiply(const Matrix &w, Span rows, const Rows &x, const Rows &y, float *unpacked) {
    with_format(w.format, [&](auto format) { product<decltype(format)>(w, rows, x, y, unpacked); });
}

// The model ------------------------------------------------------------------------------------------------------------
//
// decode_kernels.py fills these in; the order of fields is the same there.

struct Norm {
    const float *weight, *bias;
    int64_t kind;  // 0: none, 1: RMS, 2: layer norm
    double eps;
};

struct Linear {
    Matrix weight;
    const float *bias;
    Matrix a, b;  // low-rank update b (a x) of adapter 0; the others follow at these distances in bytes
    int64_t a_distance, b_distance;
};

struct Layer {
    Norm norm1, post_norm1, norm2, post_norm2, q_norm, k_norm;
    Linear q, k, v, o, gate, up, down;
    const float *sinks;
    int64_t rope, window, norm_of_heads, activation, gated, parallel, single_norm;  // rope -1: none; window 0: none
    double scale, softcap, residual;                                                // softcap 0: none
};

struct Model {
    const Layer *layers;
    int64_t count, width, heads, kv_heads, head_dim, inner, wide_cache;
    Norm norm;
    Linear head;
    double logits_multiplier, logits_softcap;
};

struct Segment {  // keys and values of earlier tokens: pointers by layer; strides in elements
    const void *const *keys, *const *values;
    const int64_t *lengths;  // by row
    int64_t row_stride, head_stride, token_stride;
};

struct Step {
    const float *embedded;  // [B, d]
    float *logits;          // [B, V]
    const int64_t *positions, *adapters;  // by row; adapter -1: none
    const float *const *cosines, *const *sines;  // by rope: [positions, D/2]
    const Segment *segments;  // the last one takes the new keys and values
    int64_t rows, segment_count, adapted;
    float *scratch;
};

// A step ---------------------------------------------------------------------------------------------------------------

struct Memory {  // consecutive parts of one block; without a block it counts how much is needed
    float *base;
    int64_t used;
    float *floats(int64_t n) {
        used += padded(n);
        return base ? base + used - padded(n) : nullptr;
    }
    Rows rows(int64_t count, int64_t width) { return {floats(count * padded(width)), count, padded(width)}; }
};

struct Shared {  // what some threads write and others read, each between two barriers
    Rows q, k, v, mixed, branch, inner, up, low_rank;
    Shared(const Model &m, int64_t rows, int64_t ranks, Memory &memory)
        : q(memory.rows(rows, m.heads * m.head_dim)), k(memory.rows(rows, m.kv_heads * m.head_dim)),
          v(memory.rows(rows, m.kv_heads * m.head_dim)), mixed(memory.rows(rows, m.heads * m.head_dim)),
          branch(memory.rows(rows, m.width)), inner(memory.rows(rows, m.inner)), up(memory.rows(rows, m.inner)),
          low_rank(memory.rows(rows, ranks)) {}
};

struct Own {  // of one thread
    Rows x, h, h2;
    float *unpacked, *update, *scores, *query, *value, *q_row, *k_row;
    uint8_t *key_value;
    Own(const Model &m, int64_t rows, int64_t ranks, int64_t tokens, Memory &memory)
        : x(memory.rows(rows, m.width)), h(memory.rows(rows, m.width)), h2(memory.rows(rows, m.width)) {
        const int64_t attended = m.heads * m.head_dim, most = std::max({m.width, m.inner, attended, ranks});
        unpacked = memory.floats(OUTPUTS * padded(most));
        update = memory.floats(std::max(most, m.head.weight.rows));
        scores = memory.floats(tokens + 1);
        query = memory.floats(m.head_dim);
        value = memory.floats(m.head_dim);
        q_row = memory.floats(attended);
        k_row = memory.floats(m.kv_heads * m.head_dim);
        key_value = (uint8_t *)memory.floats(2 * m.head_dim);
    }
};

float sum_of_squares(const float *x, int64_t n, float mean = 0) {
    vec sum = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec v = load<vec>(x + i) - mean;
        sum = multiply_add(v, v, sum);
    }
    float rest = total(sum);
    for (; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
    return rest;
}

// w x / sqrt(mean(x^2) + eps), or w (x - mean(x)) / sqrt(variance(x) + eps) + b; y may be x.
void normalize(const Norm &norm, const float *x, int64_t n, float *y) {
    float mean = 0;
    if (norm.kind == 2) {
        double sum = 0;
        for (int64_t i = 0; i < n; i++) sum += x[i];
        mean = float(sum / n);
    }
    const float s = norm.kind ? 1 / std::sqrt(sum_of_squares(x, n, mean) / n + float(norm.eps)) : 1;
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * s * (norm.weight ? norm.weight[i] : 1);
    if (norm.bias)
        for (int64_t i = 0; i < n; i++) y[i] += norm.bias[i];
}

void normalize(const Norm &norm, const Rows &x, int64_t n, const Rows &y) {
    for (int64_t b = 0; b < x.count; b++) normalize(norm, x[b], n, y[b]);
}

Matrix of_adapter(Matrix m, int64_t distance, int64_t adapter) {
    m.data += distance * adapter;
    return m;
}

// low_rank = a x for each row's adapter, of linears with the same x; ends with a barrier if there is one.
void low_ranks(const Step &s, std::initializer_list<const Linear *> linears, const Rows &x, const Shared &shared,
               const Own &own) {
    int64_t start = 0;
    if (!s.adapted) return;
    for (const Linear *linear : linears) {
        if (!linear->a.data) continue;
        const Span rows = share(linear->a.rows);
        for (int64_t b = 0; b < x.count; b++) {
            if (s.adapters[b] < 0) continue;
            float *to = shared.low_rank[b] + start;
            multiply(of_adapter(linear->a, linear->a_distance, s.adapters[b]), rows, {x[b], 1, 0}, {to, 1, 0},
                     own.unpacked);
            if (rows.end == linear->a.rows) std::fill(to + rows.end, to + padded(rows.end), 0.0f);
        }
        start += padded(linear->a.rows);
    }
    if (start) {
#pragma omp barrier
    }
}

// y = weight x + bias + b low_rank for some outputs; start: of this linear's part of low_rank, moved to the next one's.
void apply(const Step &s, const Linear &linear, Span rows, const Rows &x, const Rows &y, const Shared &shared,
           const Own &own, int64_t &start) {
    multiply(linear.weight, rows, x, y, own.unpacked);
    for (int64_t b = 0; b < x.count; b++) {
        float *to = y[b];
        if (linear.bias)
            for (int64_t n = rows.begin; n < rows.end; n++) to[n] += linear.bias[n];
        if (!s.adapted || !linear.a.data || s.adapters[b] < 0) continue;
        multiply(of_adapter(linear.b, linear.b_distance, s.adapters[b]), rows, {shared.low_rank[b] + start, 1, 0},
                 {own.update, 1, 0}, own.unpacked);
        for (int64_t n = rows.begin; n < rows.end; n++) to[n] += own.update[n];
    }
    if (linear.a.data) start += padded(linear.a.rows);
}

void apply(const Step &s, const Linear &linear, const Rows &x, const Rows &y, const Shared &shared, const Own &own,
           int64_t &start) {
    apply(s, linear, share(linear.weight.rows), x, y, shared, own, start);
}

void put(float *to, float x) { *to = x; }
void put(uint16_t *to, float x) {  // bfloat16, to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *to = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Rotates the pairs (x_i, x_{i + D/2}) by the angles of a position.
void rotate(float *x, const float *cosine, const float *sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float one = x[i], two = x[half + i];
        x[i] = one * cosine[i] - two * sine[i];
        x[half + i] = two * cosine[i] + one * sine[i];
    }
}

// softmax(q K^T scale) V of one row and head. C: the cache's format, T its type.
template <class C, class T>
struct Attention {
    const Model &m;
    const Step &s;
    const Layer &layer;
    int64_t index;  // of the layer
    const Own &own;

    // use(key or value, how many tokens precede it) for each token that the window shows, the row's new one last.
    template <class Use>
    void each_token(bool values, int64_t b, int64_t kv, const Use &use) const {
        const int64_t first = layer.window ? std::max<int64_t>(0, s.positions[b] + 1 - layer.window) : 0;
        int64_t before = 0;
        for (int64_t i = 0; i < s.segment_count; i++) {
            const Segment &segment = s.segments[i];
            const T *at = (const T *)(values ? segment.values : segment.keys)[index] + b * segment.row_stride +
                          kv * segment.head_stride;
            for (int64_t t = std::max<int64_t>(0, first - before); t < segment.lengths[b]; t++)
                use((const uint8_t *)(at + t * segment.token_stride), before + t - first);
            before += segment.lengths[b];
        }
        use(own.key_value + (values ? m.head_dim * 4 : 0), before - first);
    }

    // The row's new key, normalised and rotated, and its new value, in the cache's format; also into the cache.
    void take(int64_t b, int64_t kv, const float *key, const float *value, bool write) const {
        const Segment &last = s.segments[s.segment_count - 1];
        const int64_t d = m.head_dim, at = b * last.row_stride + kv * last.head_stride +
                                           last.lengths[b] * last.token_stride;
        std::copy(key + kv * d, key + (kv + 1) * d, own.query);
        turn(layer.k_norm, b);
        T *k = (T *)own.key_value, *v = (T *)(own.key_value + d * 4);
        for (int64_t i = 0; i < d; i++) put(k + i, own.query[i]), put(v + i, value[kv * d + i]);
        if (write) {
            std::copy(k, k + d, (T *)const_cast<void *>(last.keys[index]) + at);
            std::copy(v, v + d, (T *)const_cast<void *>(last.values[index]) + at);
        }
    }

    void turn(const Norm &norm, int64_t b) const {
        if (layer.norm_of_heads == 1) normalize(norm, own.query, m.head_dim, own.query);
        const int64_t half = m.head_dim / 2, at = s.positions[b] * half;
        if (layer.rope >= 0) rotate(own.query, s.cosines[layer.rope] + at, s.sines[layer.rope] + at, half);
    }

    void attend(int64_t b, int64_t h, const float *q, float *out) const {
        const int64_t d = m.head_dim, kv = h / (m.heads / m.kv_heads);
        std::copy(q + h * d, q + (h + 1) * d, own.query);
        turn(layer.q_norm, b);
        for (int64_t i = 0; i < d; i++) own.query[i] *= float(layer.scale);
        float most = layer.sinks ? layer.sinks[h] : -INFINITY, sum = 0;
        int64_t tokens = 0;
        each_token(false, b, kv, [&](const uint8_t *key, int64_t t) {
            vec sums = {};
            each_chunk<C>(key, d, [&](int64_t c, const vec *parts) {
                for (int p = 0; p < PARTS; p++)
                    sums = multiply_add(parts[p], load<vec>(own.query + c * CHUNK + p * LANES), sums);
            });
            float score = total(sums);
            if (layer.softcap) score = float(layer.softcap) * std::tanh(score / float(layer.softcap));
            own.scores[t] = score;
            most = std::max(most, score);
            tokens = t + 1;
        });
        for (int64_t t = 0; t < tokens; t++) sum += own.scores[t] = exponential(own.scores[t] - most);
        if (layer.sinks) sum += exponential(layer.sinks[h] - most);
        std::fill(own.value, own.value + padded(d), 0.0f);
        each_token(true, b, kv, [&](const uint8_t *value, int64_t t) {
            const float weight = own.scores[t] / sum;
            each_chunk<C>(value, d, [&](int64_t c, const vec *parts) {
                for (int p = 0; p < PARTS; p++) {
                    float *to = own.value + c * CHUNK + p * LANES;
                    store(to, multiply_add(parts[p], vec{} + weight, load<vec>(to)));
                }
            });
        });
        std::copy(own.value, own.value + d, out + h * d);
    }

    // This thread's part of the B times H heads.
    void run(const Shared &shared) const {
        const Span part = share(s.rows * m.heads, 1);
        const int64_t group = m.heads / m.kv_heads;
        for (int64_t i = part.begin; i < part.end; i++) {
            const int64_t b = i / m.heads, h = i % m.heads;
            const float *q = shared.q[b], *k = shared.k[b];
            if (layer.norm_of_heads == 2) {
                if (i == part.begin || h == 0) {
                    normalize(layer.q_norm, q, m.heads * m.head_dim, own.q_row);
                    normalize(layer.k_norm, k, m.kv_heads * m.head_dim, own.k_row);
                }
                q = own.q_row, k = own.k_row;
            }
            if (i == part.begin || h % group == 0) take(b, h / group, k, shared.v[b], h % group == 0);
            attend(b, h, q, shared.mixed[b]);
        }
    }
};

enum Activation { SILU, GELU, GELU_TANH, RELU, CLAMPED_SWIGLU };

inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

float activated(int64_t kind, float x) {
    switch (kind) {
        case SILU: return x * sigmoid(x);
        case GELU: return 0.5f * x * (1 + std::erf(x * 0.70710678f));
        case GELU_TANH: return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));  // tanh(u) = 2 sigmoid(2u) - 1
        default: return x > 0 ? x : x == x ? 0 : x;
    }
}

void activate(const Layer &layer, float *inner, const float *up, Span part) {
    for (int64_t i = part.begin; i < part.end; i++) {
        if (layer.activation == CLAMPED_SWIGLU) {
            const float g = inner[i] > 7 ? 7 : inner[i], u = up[i] > 7 ? 7 : up[i] < -7 ? -7 : up[i];
            inner[i] = (u + 1) * g * sigmoid(1.702f * g);
        } else {
            inner[i] = activated(layer.activation, inner[i]) * (layer.gated ? up[i] : 1);
        }
    }
}

// x += residual times post_norm(branch), by every thread in its own x.
void add_branch(const Model &m, const Layer &layer, const Norm &post, const Shared &shared, const Own &own) {
    for (int64_t b = 0; b < own.x.count; b++) {
        const float *y = shared.branch[b];
        float *x = own.x[b];
        if (post.kind) normalize(post, y, m.width, own.update), y = own.update;
        for (int64_t i = 0; i < m.width; i++) x[i] += y[i] * float(layer.residual);
    }
}

void run_layer(const Model &m, const Step &s, int64_t index, const Shared &shared, const Own &own) {
    const Layer &layer = m.layers[index];
    int64_t start = 0;
    normalize(layer.norm1, own.x, m.width, own.h);
    low_ranks(s, {&layer.q, &layer.k, &layer.v}, own.h, shared, own);
    apply(s, layer.q, own.h, shared.q, shared, own, start);
    apply(s, layer.k, own.h, shared.k, shared, own, start);
    apply(s, layer.v, own.h, shared.v, shared, own, start);
#pragma omp barrier
    if (m.wide_cache)
        Attention<F32, float>{m, s, layer, index, own}.run(shared);
    else
        Attention<BF16, uint16_t>{m, s, layer, index, own}.run(shared);
#pragma omp barrier
    low_ranks(s, {&layer.o}, shared.mixed, shared, own);
    start = 0;
    apply(s, layer.o, shared.mixed, shared.branch, shared, own, start);
#pragma omp barrier
    if (layer.parallel && !layer.single_norm) normalize(layer.norm2, own.x, m.width, own.h2);
    add_branch(m, layer, layer.post_norm1, shared, own);
    if (!layer.parallel && !layer.single_norm) normalize(layer.norm2, own.x, m.width, own.h2);
    const Rows &h = layer.single_norm ? own.h : own.h2;
    const Span part = share(layer.up.weight.rows);
    low_ranks(s, {&layer.gate, &layer.up}, h, shared, own);
    start = 0;
    if (layer.gated) apply(s, layer.gate, part, h, shared.inner, shared, own, start);
    apply(s, layer.up, part, h, layer.gated ? shared.up : shared.inner, shared, own, start);
    for (int64_t b = 0; b < s.rows; b++) activate(layer, shared.inner[b], shared.up[b], part);
#pragma omp barrier
    low_ranks(s, {&layer.down}, shared.inner, shared, own);
    start = 0;
    apply(s, layer.down, shared.inner, shared.branch, shared, own, start);
#pragma omp barrier
    add_branch(m, layer, layer.post_norm2, shared, own);
}

void run(const Model &m, const Step &s, const Shared &shared, const Own &own) {
    for (int64_t b = 0; b < s.rows; b++) std::copy(s.embedded + b * m.width, s.embedded + (b + 1) * m.width, own.x[b]);
    for (int64_t index = 0; index < m.count; index++) run_layer(m, s, index, shared, own);
    normalize(m.norm, own.x, m.width, own.h);
    for (int64_t i = 0; m.logits_multiplier != 1 && i < s.rows * own.h.stride; i++)
        own.h.data[i] *= float(m.logits_multiplier);
    const int64_t vocabulary = m.head.weight.rows;
    const Span part = share(vocabulary);
    const Rows logits = {s.logits, s.rows, vocabulary};
    int64_t start = 0;
    apply(s, m.head, part, own.h, logits, shared, own, start);
    const float cap = float(m.logits_softcap);
    for (int64_t b = 0; cap && b < s.rows; b++)
        for (int64_t n = part.begin; n < part.end; n++) logits[b][n] = cap * std::tanh(logits[b][n] / cap);
}

}  // namespace

extern "C" {

// The floats of scratch memory that a step needs. ranks: the most that linears with the same input have together.
int64_t decode_scratch(const Model *m, int64_t rows, int64_t ranks, int64_t tokens, int64_t threads) {
    Memory shared = {nullptr, 0}, own = {nullptr, 0};
    Shared(*m, rows, ranks, shared);
    Own(*m, rows, ranks, tokens, own);
    return shared.used + threads * own.used;
}

void decode_step(const Model *m, const Step *s, int64_t ranks, int64_t tokens, int64_t threads) {
    Memory memory = {s->scratch, 0};
    const Shared shared(*m, s->rows, ranks, memory);
    std::fill(s->scratch, s->scratch + memory.used, 0.0f);  // the padding of rows is read
#pragma omp parallel num_threads(threads)
    {
        Memory counted = {nullptr, 0};
        Own(*m, s->rows, ranks, tokens, counted);
        Memory mine = {s->scratch + memory.used + omp_get_thread_num() * counted.used, 0};
        const Own own(*m, s->rows, ranks, tokens, mine);
        std::fill(mine.base, mine.base + mine.used, 0.0f);
        run(*m, *s, shared, own);
    }
}

// y [B, N] = x [B, K] w^T, with K padded with zeros to a multiple of 32; unpacked: 4 K floats for each thread.
void decode_product(const Matrix *w, const float *x, int64_t rows, float *y, float *unpacked, int64_t threads) {
    const int64_t width = padded(w->columns);
#pragma omp parallel num_threads(threads)
    multiply(*w, share(w->rows), {const_cast<float *>(x), rows, width}, {y, rows, w->rows},
             unpacked + omp_get_thread_num() * OUTPUTS * width);
}

}  // extern "C"
