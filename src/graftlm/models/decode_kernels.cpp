// One pass of a model: the next tokens of some texts, from their embeddings to the logits after each text's last one. A
// decode step has one token of each text, and where a text begins it has those of its prompt.
//
// A step reads every weight once and does little with it, so its time is that of reading memory. Weights are read as
// they are stored and unpacked in registers; activations and sums are float32.
//
//     y[b][n] = sum over k of w[n][k] x[b][k]
//
// Each y[b][n] is computed by one thread and added up in one order, for few tokens along the columns in lanes, for more
// one column after another (panels.h). So the results do not depend on the number of threads, nor those of a few tokens
// on the others. Threads meet at a barrier where one needs what another has computed; the residual stream x, which all
// need, is kept by each thread for itself.
//
// Letters: N tokens, d hidden size, H query heads, K key/value heads, D head dimension, V vocabulary, S cached tokens.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "exponential.h"
#include "panels.h"

#include <omp.h>

namespace {

// Products -------------------------------------------------------------------------------------------------------------

#ifdef __AVX512F__
constexpr int MOST_ROWS = 5, FEW = 8;  // 4 outputs x 5 rows of sums stay in 32 registers
#else
constexpr int MOST_ROWS = 2, FEW = 4;
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

// Ask for chunk c of a row that is read later: the processor does not foresee rows that are read side by side.
inline void prefetch(const uint8_t *row, int64_t row_bytes, int64_t c, int64_t whole) {
    for (int64_t at = 0; at < row_bytes / whole; at += 64) __builtin_prefetch(row + c * row_bytes / whole + at);
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

// y = w x for some rows of w. The weights are used as they are unpacked, for FEW rows of x; for more in panels.
template <class F>
void product(const Matrix &w, Span rows, const Rows &x, const Rows &y) {
    if (x.count > FEW) return panel_product<F>(w, rows, x, y);
    for (int64_t n = rows.begin; n < rows.end; n += OUTPUTS) {
        const uint8_t *from = w.data + n * w.row_bytes;
        if (rows.end - n >= OUTPUTS)
            tiles<F, OUTPUTS>(from, w.row_bytes, w.columns, x, y, n, true);
        else
            for (int64_t i = 0; i < rows.end - n; i++)
                tiles<F, 1>(from + i * w.row_bytes, w.row_bytes, w.columns, x, y, n + i, false);
    }
}

void multiply(const Matrix &w, Span rows, const Rows &x, const Rows &y) {
    with_format(w.format, [&](auto format) { product<decltype(format)>(w, rows, x, y); });
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
    int64_t length, text_stride, head_stride, token_stride;  // length: the capacity of the last segment
};

struct Step {
    const float *embedded;  // [N, d]
    float *logits;          // [outputs, V]
    const int64_t *positions, *texts, *adapters;  // by token; adapter -1: none
    const int64_t *last;                          // the tokens after which there are logits
    const float *const *cosines, *const *sines;   // by rope: [positions, D/2]
    const Segment *segments;                      // the last one, which has each text's own tokens, takes the new ones
    int64_t tokens, outputs, segment_count, before, adapted;  // before: the tokens of the other segments
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
    Shared(const Model &m, int64_t tokens, int64_t ranks, Memory &memory)
        : q(memory.rows(tokens, m.heads * m.head_dim)), k(memory.rows(tokens, m.kv_heads * m.head_dim)),
          v(memory.rows(tokens, m.kv_heads * m.head_dim)), mixed(memory.rows(tokens, m.heads * m.head_dim)),
          branch(memory.rows(tokens, m.width)), inner(memory.rows(tokens, m.inner)), up(memory.rows(tokens, m.inner)),
          low_rank(memory.rows(tokens, ranks)) {}
};

struct Own {  // of one thread
    Rows x, h, h2, update, scores, query, value;
    Own(const Model &m, int64_t tokens, int64_t ranks, int64_t context, Memory &memory)
        : x(memory.rows(tokens, m.width)), h(memory.rows(tokens, m.width)), h2(memory.rows(tokens, m.width)),
          update(memory.rows(MOST_ROWS, std::max({m.width, m.inner, m.heads * m.head_dim, m.head.weight.rows}))),
          scores(memory.rows(m.heads / m.kv_heads, context)), query(memory.rows(m.heads / m.kv_heads, m.head_dim)),
          value(memory.rows(m.heads / m.kv_heads, m.head_dim)) {}
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

// use(the adapter, the first token, how many follow each other) for the tokens of the same adapter, `most` at a time.
template <class Use>
void each_adapter(const Step &s, int64_t count, int64_t most, const Use &use) {
    for (int64_t b = 0, end; b < count; b = end) {
        for (end = b + 1; end < count && end - b < most && s.adapters[end] == s.adapters[b];) end++;
        if (s.adapters[b] >= 0) use(s.adapters[b], b, end - b);
    }
}

// low_rank = a x for each token's adapter, of linears with the same x; ends with a barrier if there is one.
void low_ranks(const Step &s, std::initializer_list<const Linear *> linears, const Rows &x, const Shared &shared) {
    int64_t start = 0;
    if (!s.adapted) return;
    for (const Linear *linear : linears) {
        if (!linear->a.data) continue;
        const Span rows = share(linear->a.rows, OUTPUTS);
        each_adapter(s, x.count, x.count, [&](int64_t adapter, int64_t b, int64_t count) {
            const Rows to = {shared.low_rank[b] + start, count, shared.low_rank.stride};
            multiply(of_adapter(linear->a, linear->a_distance, adapter), rows, {x[b], count, x.stride}, to);
            for (int64_t i = 0; rows.end == linear->a.rows && i < count; i++)
                std::fill(to[i] + rows.end, to[i] + padded(rows.end), 0.0f);
        });
        start += padded(linear->a.rows);
    }
    if (start) {
#pragma omp barrier
    }
}

// y = weight x + bias + b low_rank for some outputs; start: of this linear's part of low_rank, moved to the next one's.
void apply(const Step &s, const Linear &linear, Span rows, const Rows &x, const Rows &y, const Shared &shared,
           const Own &own, int64_t &start) {
    multiply(linear.weight, rows, x, y);
    for (int64_t b = 0; linear.bias && b < x.count; b++)
        for (int64_t n = rows.begin; n < rows.end; n++) y[b][n] += linear.bias[n];
    if (!linear.a.data) return;
    if (s.adapted)
        each_adapter(s, x.count, own.update.count, [&](int64_t adapter, int64_t b, int64_t count) {
            const Rows from = {shared.low_rank[b] + start, count, shared.low_rank.stride};
            const Rows update = {own.update.data, count, own.update.stride};
            multiply(of_adapter(linear.b, linear.b_distance, adapter), rows, from, update);
            for (int64_t i = 0; i < count; i++)
                for (int64_t n = rows.begin; n < rows.end; n++) y[b + i][n] += update[i][n];
        });
    start += padded(linear.a.rows);
}

void apply(const Step &s, const Linear &linear, const Rows &x, const Rows &y, const Shared &shared, const Own &own,
           int64_t &start) {
    apply(s, linear, share(linear.weight.rows, OUTPUTS), x, y, shared, own, start);
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

// y[g] += sum over t of weights[g][t] v[t], for G rows of weights.
template <class C, int G>
void mix(const Matrix &v, const float *weights, int64_t weights_stride, float *y, int64_t y_stride) {
    for (int64_t c = 0; c < padded(v.columns) / CHUNK; c++) {
        const bool whole = (c + 1) * CHUNK <= v.columns;
        vec sums[G][PARTS], parts[PARTS];
        for (int g = 0; g < G; g++)
            for (int p = 0; p < PARTS; p++) sums[g][p] = load<vec>(y + g * y_stride + c * CHUNK + p * LANES);
        for (int64_t t = 0; t < v.rows; t++) {
            whole ? C::unpack(v.data + t * v.row_bytes, c, parts)
                  : unpack_end<C>(v.data + t * v.row_bytes, v.columns, c, parts);
            for (int g = 0; g < G; g++)
                for (int p = 0; p < PARTS; p++)
                    sums[g][p] = multiply_add(parts[p], all(weights[g * weights_stride + t]), sums[g][p]);
        }
        for (int g = 0; g < G; g++)
            for (int p = 0; p < PARTS; p++) store(y + g * y_stride + c * CHUNK + p * LANES, sums[g][p]);
    }
}

template <class C, int G = 8 / PARTS>
void mixes(const Matrix &v, const Rows &weights, const Rows &y, int64_t first = 0) {
    if (y.count - first >= G) {
        mix<C, G>(v, weights[first], weights.stride, y[first], y.stride);
        if (y.count - first > G) mixes<C, G>(v, weights, y, first + G);
    } else if constexpr (G > 1) {
        mixes<C, G - 1>(v, weights, y, first);
    }
}

// softmax(q K^T scale) V. C: the cache's format, T its type.
template <class C, class T>
struct Attention {
    const Model &m;
    const Step &s;
    const Layer &layer;
    int64_t index;  // of the layer
    const Shared &shared;
    const Own &own;

    // This thread's part of the new queries, keys and values, normalised and rotated; keys and values into the cache.
    void place() const {
        const Segment &last = s.segments[s.segment_count - 1];
        const int64_t d = m.head_dim;
        const Span part = share(s.tokens, 1);
        for (int64_t b = part.begin; b < part.end; b++) {
            float *q = shared.q[b], *k = shared.k[b], *v = shared.v[b];
            turn(layer.q_norm, q, m.heads, b);
            turn(layer.k_norm, k, m.kv_heads, b);
            for (int64_t i = 0; i < m.heads * d; i++) q[i] *= float(layer.scale);
            for (int64_t kv = 0; kv < m.kv_heads; kv++) {
                const int64_t at = s.texts[b] * last.text_stride + kv * last.head_stride +
                                   (s.positions[b] - s.before) * last.token_stride;
                T *keys = (T *)last.keys[index] + at, *values = (T *)last.values[index] + at;
                for (int64_t i = 0; i < d; i++) put(keys + i, k[kv * d + i]), put(values + i, v[kv * d + i]);
            }
        }
    }

    void turn(const Norm &norm, float *x, int64_t heads, int64_t b) const {
        const int64_t d = m.head_dim, at = s.positions[b] * (d / 2);
        if (layer.norm_of_heads == 2) normalize(norm, x, heads * d, x);
        for (int64_t h = 0; h < heads; h++) {
            if (layer.norm_of_heads == 1) normalize(norm, x + h * d, d, x + h * d);
            if (layer.rope >= 0) rotate(x + h * d, s.cosines[layer.rope] + at, s.sines[layer.rope] + at, d / 2);
        }
    }

    // use(keys or values, how many precede them) for those that the window shows to a token, its own last.
    template <class Use>
    int64_t each_segment(bool values, int64_t b, int64_t kv, const Use &use) const {
        const int64_t first = layer.window ? std::max<int64_t>(0, s.positions[b] + 1 - layer.window) : 0;
        int64_t start = 0, seen = 0;
        for (int64_t i = 0; i < s.segment_count; i++) {
            const Segment &segment = s.segments[i];
            const int64_t own_length = s.positions[b] + 1 - s.before;
            const int64_t length = i + 1 < s.segment_count ? segment.length : own_length;
            const int64_t skipped = std::min(length, std::max<int64_t>(0, first - start));
            const T *at = (const T *)(values ? segment.values : segment.keys)[index] + s.texts[b] * segment.text_stride +
                          kv * segment.head_stride + skipped * segment.token_stride;
            const int64_t bytes = segment.token_stride * int64_t(sizeof(T));
            if (length > skipped) use(Matrix{(const uint8_t *)at, 0, length - skipped, m.head_dim, bytes}, seen);
            start += length, seen += length - skipped;
        }
        return seen;
    }

    // The heads of one key/value head, of one token.
    void attend(int64_t b, int64_t kv) const {
        const int64_t d = m.head_dim, group = m.heads / m.kv_heads, from = kv * group * d;
        for (int64_t g = 0; g < group; g++) {
            std::copy_n(shared.q[b] + from + g * d, d, own.query[g]);
            std::fill_n(own.value[g], own.value.stride, 0.0f);
        }
        const int64_t tokens = each_segment(false, b, kv, [&](const Matrix &keys, int64_t seen) {
            product<C>(keys, {0, keys.rows}, own.query, {own.scores.data + seen, group, own.scores.stride});
        });
        for (int64_t g = 0; g < group; g++) softmax(own.scores[g], tokens, kv * group + g);
        each_segment(true, b, kv, [&](const Matrix &values, int64_t seen) {
            mixes<C>(values, {own.scores.data + seen, group, own.scores.stride}, own.value);
        });
        for (int64_t g = 0; g < group; g++) std::copy_n(own.value[g], d, shared.mixed[b] + from + g * d);
    }

    void softmax(float *x, int64_t tokens, int64_t h) const {
        const float cap = float(layer.softcap);
        for (int64_t t = 0; cap && t < tokens; t++) x[t] = cap * std::tanh(x[t] / cap);
        float most = layer.sinks ? layer.sinks[h] : -INFINITY, sum = 0;
        for (int64_t t = 0; t < tokens; t++) most = std::max(most, x[t]);
        for (int64_t t = 0; t < tokens; t++) x[t] = exponential(x[t] - most);
        for (int64_t t = 0; t < tokens; t++) sum += x[t];
        if (layer.sinks) sum += exponential(layer.sinks[h] - most);
        for (int64_t t = 0; t < tokens; t++) x[t] /= sum;
    }

    void run() const {
        place();
#pragma omp barrier
        // In turn, since later tokens of a text attend to more than earlier ones.
        for (int64_t i = omp_get_thread_num(); i < s.tokens * m.kv_heads; i += omp_get_num_threads())
            attend(i / m.kv_heads, i % m.kv_heads);
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
        if (post.kind) normalize(post, y, m.width, own.update.data), y = own.update.data;
        for (int64_t i = 0; i < m.width; i++) x[i] += y[i] * float(layer.residual);
    }
}

void run_layer(const Model &m, const Step &s, int64_t index, const Shared &shared, const Own &own) {
    const Layer &layer = m.layers[index];
    int64_t start = 0;
    normalize(layer.norm1, own.x, m.width, own.h);
    low_ranks(s, {&layer.q, &layer.k, &layer.v}, own.h, shared);
    apply(s, layer.q, own.h, shared.q, shared, own, start);
    apply(s, layer.k, own.h, shared.k, shared, own, start);
    apply(s, layer.v, own.h, shared.v, shared, own, start);
#pragma omp barrier
    if (m.wide_cache)
        Attention<F32, float>{m, s, layer, index, shared, own}.run();
    else
        Attention<BF16, uint16_t>{m, s, layer, index, shared, own}.run();
#pragma omp barrier
    low_ranks(s, {&layer.o}, shared.mixed, shared);
    start = 0;
    apply(s, layer.o, shared.mixed, shared.branch, shared, own, start);
#pragma omp barrier
    if (layer.parallel && !layer.single_norm) normalize(layer.norm2, own.x, m.width, own.h2);
    add_branch(m, layer, layer.post_norm1, shared, own);
    if (!layer.parallel && !layer.single_norm) normalize(layer.norm2, own.x, m.width, own.h2);
    const Rows &h = layer.single_norm ? own.h : own.h2;
    const Span part = share(layer.up.weight.rows, OUTPUTS);
    low_ranks(s, {&layer.gate, &layer.up}, h, shared);
    start = 0;
    if (layer.gated) apply(s, layer.gate, part, h, shared.inner, shared, own, start);
    apply(s, layer.up, part, h, layer.gated ? shared.up : shared.inner, shared, own, start);
    for (int64_t b = 0; b < s.tokens; b++) activate(layer, shared.inner[b], shared.up[b], part);
#pragma omp barrier
    low_ranks(s, {&layer.down}, shared.inner, shared);
    start = 0;
    apply(s, layer.down, shared.inner, shared.branch, shared, own, start);
#pragma omp barrier
    add_branch(m, layer, layer.post_norm2, shared, own);
}

void run(const Model &m, const Step &s, const Shared &shared, const Own &own) {
    for (int64_t b = 0; b < s.tokens; b++) std::copy_n(s.embedded + b * m.width, m.width, own.x[b]);
    for (int64_t index = 0; index < m.count; index++) run_layer(m, s, index, shared, own);
    const Rows h = {own.h.data, s.outputs, own.h.stride};
    for (int64_t b = 0; b < s.outputs; b++) normalize(m.norm, own.x[s.last[b]], m.width, h[b]);
    for (int64_t i = 0; m.logits_multiplier != 1 && i < s.outputs * h.stride; i++)
        h.data[i] *= float(m.logits_multiplier);
    const int64_t vocabulary = m.head.weight.rows;
    const Span part = share(vocabulary, OUTPUTS);
    const Rows logits = {s.logits, s.outputs, vocabulary};
    int64_t start = 0;
    apply(s, m.head, part, h, logits, shared, own, start);
    const float cap = float(m.logits_softcap);
    for (int64_t b = 0; cap && b < s.outputs; b++)
        for (int64_t n = part.begin; n < part.end; n++) logits[b][n] = cap * std::tanh(logits[b][n] / cap);
}

}  // namespace

extern "C" {

// The floats of scratch memory that a step needs. ranks: the most that linears with the same input have together;
// context: the most tokens that one attends to.
int64_t decode_scratch(const Model *m, int64_t tokens, int64_t ranks, int64_t context, int64_t threads) {
    Memory shared = {nullptr, 0}, own = {nullptr, 0};
    Shared(*m, tokens, ranks, shared);
    Own(*m, tokens, ranks, context, own);
    return shared.used + threads * own.used;
}

void decode_step(const Model *m, const Step *s, int64_t ranks, int64_t context, int64_t threads) {
    Memory memory = {s->scratch, 0};
    const Shared shared(*m, s->tokens, ranks, memory);
    std::fill(s->scratch, s->scratch + memory.used, 0.0f);  // the padding of rows is read
#pragma omp parallel num_threads(threads)
    {
        Memory counted = {nullptr, 0};
        Own(*m, s->tokens, ranks, context, counted);
        Memory mine = {s->scratch + memory.used + omp_get_thread_num() * counted.used, 0};
        const Own own(*m, s->tokens, ranks, context, mine);
        std::fill(mine.base, mine.base + mine.used, 0.0f);
        run(*m, *s, shared, own);
    }
}

// y [B, N] = x [B, K] w^T, with K padded with zeros to a multiple of 32.
void decode_product(const Matrix *w, const float *x, int64_t rows, float *y, int64_t threads) {
#pragma omp parallel num_threads(threads)
    multiply(*w, share(w->rows, OUTPUTS), {const_cast<float *>(x), rows, padded(w->columns)}, {y, rows, w->rows});
}

}  // extern "C"
