// A decode step of GPT-2 on the CPU: from token ids to logits, in one parallel region.
//
// Decoding one token reads every weight once, so the memory limits its speed. What else costs time here is what each
// call of a framework costs, hundreds of times per token; so the whole step is one function. Weights are read once for
// all rows of the batch.
//
// Each row of the batch is summed in the same order whatever the number of rows, threads and other rows' values: the
// logits of a sequence are the same to the bit alone and in company.

#include <type_traits>
#include <omp.h>

#include "amx.h"
#include "model.h"
#include "vectors.h"

namespace {

constexpr int CHANNELS = 4;                             // output channels computed together, in fp32 and bf16
constexpr int ROWS = 4;                                 // rows of the batch computed together, in fp32 and bf16
constexpr int BLOCK_ROWS = VECTOR_BYTES == 64 ? 8 : 4;  // the same, of 8-bit and 4-bit weights
constexpr int AMX_ROWS = 3;                             // with fewer, 8-bit products do without AMX
constexpr int BYTES_AHEAD = 8192;                       // of a block's weights that are prefetched
constexpr int VECTORS = BLOCK / LANES;                  // 32-bit vectors in a block of channels
constexpr int MAX_ROWS = 16;                            // rows of the batch in one call
constexpr int PARTS = 32;                               // of the vocabulary, for the sum of probabilities
constexpr int TOKENS_AHEAD = 64;                        // of keys and values that are prefetched

// The rows of an input, as the products of a dtype need them. Each thread has its own.
struct Input {
    float* values;     // (rows, width)
    uint8_t* bytes;    // (rows, width): quantized
    float* scale;      // (rows)
    int32_t* offsets;  // (rows, width / INT4_GROUP): what the zero point of 4-bit weights adds
    int width;
};

template <int R>
inline void tile_of_fp32(const Matrix& m, int channel, const Input& input, int row, Four* out) {
    const float* weight = (const float*)m.weight + (int64_t)channel * m.in;
    Floats sums[CHANNELS][R] = {};
    for (int i = 0; i < m.in; i += LANES)
        for (int c = 0; c < CHANNELS; c++) {
            fetch_ahead(weight + (CHANNELS + c) * m.in + i);
            Floats w = load<Floats>(weight + c * m.in + i);
            for (int r = 0; r < R; r++) sums[c][r] += w * load<Floats>(input.values + (row + r) * m.in + i);
        }
    for (int r = 0; r < R; r++) out[r] = sum_lanes(sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
}

// A 32-bit lane holds two weights; the inputs lie in the same order (see `split_pairs`).
template <int R>
inline void tile_of_bf16(const Matrix& m, int channel, const Input& input, int row, Four* out) {
    const uint16_t* weight = (const uint16_t*)m.weight + (int64_t)channel * m.in;
    Floats sums[CHANNELS][R] = {};
    for (int i = 0; i < m.in; i += 2 * LANES)
        for (int c = 0; c < CHANNELS; c++) {
            fetch_ahead(weight + (CHANNELS + c) * m.in + i);
            UInts pairs = load<UInts>(weight + c * m.in + i);
            Floats even = (Floats)(pairs << 16), odd = (Floats)(pairs & 0xffff0000u);
            for (int r = 0; r < R; r++) {
                const float* x = input.values + (row + r) * m.in + i;
                sums[c][r] += even * load<Floats>(x);
                sums[c][r] += odd * load<Floats>(x + LANES);
            }
        }
    for (int r = 0; r < R; r++) out[r] = sum_lanes(sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
}

template <int D, int R, class Use>
inline void tile(const Matrix& m, int channel, const Input& input, int row, Use use) {
    Four out[R];
    if constexpr (D == FP32) tile_of_fp32<R>(m, channel, input, row, out);
    if constexpr (D == BF16) tile_of_bf16<R>(m, channel, input, row, out);
    Four bias = m.bias ? load<Four>(m.bias + channel) : Four{};
    for (int r = 0; r < R; r++) use(row + r, channel, out[r] + bias);
}

// Products of a block of channels.
typedef Floats Results[MAX_ROWS][VECTORS];

// Four inputs of a row in each lane.
inline Bytes word_of(const Input& input, int row, int first) {
    return (Bytes)(UInts{} + load<uint32_t>(input.bytes + row * input.width + first));
}

// What an 8-bit product is, given its sums.
inline Floats product_of_int8(const Matrix& m, int channel, Ints sum, float input_scale) {
    const Ints zeros = INPUT_ZERO * load<Ints>(m.sums + channel);
    const Floats bias = m.bias ? load<Floats>(m.bias + channel) : Floats{};
    const Floats scale = load<Floats>(m.scale + channel) * input_scale;
    return multiply_add(__builtin_convertvector(sum - zeros, Floats), scale, bias);
}

// A block of channels, for R rows from `row` on. Lanes are channels.
template <int R> void block_of_int8(const Matrix& m, int block, const Input& input, int row, Results& out) {
    constexpr int CHAINS = R == 1 ? 4 / VECTORS : 1;  // additions that do not wait for each other
    const char* weight = (const char*)m.weight + (int64_t)block * BLOCK * m.in;
    Ints sums[CHAINS][R][VECTORS] = {};
    for (int word = 0; word < m.in / 4; word += CHAINS)
        for (int chain = 0; chain < CHAINS; chain++) {
            const char* words = weight + (word + chain) * 4 * BLOCK;
            fetch_ahead(words + BYTES_AHEAD);
            for (int v = 0; v < VECTORS; v++) {
                const Bytes w = load<Bytes>(words + v * BYTES);
                for (int r = 0; r < R; r++)
                    sums[chain][r][v] = dot4(sums[chain][r][v], word_of(input, row + r, 4 * (word + chain)), w);
            }
        }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) {
            for (int chain = 1; chain < CHAINS; chain++) sums[0][r][v] += sums[chain][r][v];
            const int channel = block * BLOCK + v * LANES;
            out[row + r][v] = product_of_int8(m, channel, sums[0][r][v], input.scale[row + r]);
        }
}

#ifdef HAS_AMX
// The same for all rows: a block holds its second operands as they are.
void block_with_amx(const Matrix& m, int block, const Input& input, int rows, Results& out) {
    const char* weight = (const char*)m.weight + (int64_t)block * BLOCK * m.in;
    _tile_zero(0); _tile_zero(1);
    for (int i = 0; i < m.in; i += 2 * STEP) {
        _tile_loadd(2, input.bytes + i, m.in);
        _tile_loadd(6, weight + i * BLOCK, STEP);
        for (int j = 0; j < 2 * STEP * BLOCK; j += 64) fetch_ahead(weight + i * BLOCK + j + BYTES_AHEAD);
        _tile_dpbusd(0, 2, 6);
        if (i + STEP == m.in) break;
        _tile_loadd(3, input.bytes + i + STEP, m.in);
        _tile_loadd(7, weight + (i + STEP) * BLOCK, STEP);
        _tile_dpbusd(1, 3, 7);
    }
    alignas(64) int32_t sums[2][MAX_ROWS * BLOCK];
    _tile_stored(0, sums[0], STEP);
    _tile_stored(1, sums[1], STEP);
    for (int r = 0; r < rows; r++) {
        const Ints sum = load<Ints>(sums[0] + r * BLOCK) + load<Ints>(sums[1] + r * BLOCK);
        out[r][0] = product_of_int8(m, block * BLOCK, sum, input.scale[r]);
    }
}
#endif

template <int R> void block_of_int4(const Matrix& m, int block, const Input& input, int row, Results& out) {
    const int groups = m.in / INT4_GROUP;
    const char* weight = (const char*)m.weight + (int64_t)block * BLOCK * m.in / 2;
    const float* scale = m.scale + (int64_t)block * BLOCK * groups;
    Floats sums[R][VECTORS] = {};
    for (int group = 0; group < groups; group++, scale += BLOCK) {
        Ints parts[R][VECTORS] = {};
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECTORS; v++) parts[r][v] += input.offsets[(row + r) * groups + group];
        fetch_ahead((const char*)scale + BYTES_AHEAD / 8);
        for (int i = 0; i < INT4_GROUP; i += 8, weight += 4 * BLOCK) {
            fetch_ahead(weight + BYTES_AHEAD);
            for (int v = 0; v < VECTORS; v++) {
                const Bytes both = load<Bytes>(weight + v * BYTES);
                const Bytes low = both & 15, high = (Bytes)((UInts)both >> 4) & 15;
                const int first = group * INT4_GROUP + i;
                for (int r = 0; r < R; r++) {
                    parts[r][v] = dot4_small(parts[r][v], low, word_of(input, row + r, first));
                    parts[r][v] = dot4_small(parts[r][v], high, word_of(input, row + r, first + 4));
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECTORS; v++) {
                const Floats part = __builtin_convertvector(parts[r][v], Floats);
                sums[r][v] = multiply_add(part, load<Floats>(scale + v * LANES), sums[r][v]);
            }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) {
            const int channel = block * BLOCK + v * LANES;
            const Floats bias = m.bias ? load<Floats>(m.bias + channel) : Floats{};
            out[row + r][v] = multiply_add(sums[r][v], splat(input.scale[row + r]), bias);
        }
}

template <int D, int R>
void block_of_rows(const Matrix& m, int block, const Input& input, int row, int rows, Results& out) {
    if constexpr (R > 1)
        if (rows < R) return block_of_rows<D, R - 1>(m, block, input, row, rows, out);
    if constexpr (D == INT8) block_of_int8<R>(m, block, input, row, out);
    if constexpr (D == INT4) block_of_int4<R>(m, block, input, row, out);
}

template <int D> void block_of_channels(const Matrix& m, int block, const Input& input, int rows, Results& out) {
#ifdef HAS_AMX
    if (D == INT8 && USES_AMX && rows >= AMX_ROWS) return block_with_amx(m, block, input, rows, out);
#endif
    for (int row = 0; row < rows; row += BLOCK_ROWS)
        block_of_rows<D, BLOCK_ROWS>(m, block, input, row, std::min(rows - row, BLOCK_ROWS), out);
}

// This thread's part of a linear layer: use(row, channel, values) for each vector of output channels.
template <int D, class Use>
void product(const Matrix& m, const Input& input, int rows, int thread, int threads, Use use) {
    constexpr bool in_blocks = D == INT8 || D == INT4;
    const int tile_size = in_blocks ? BLOCK : CHANNELS, tiles = (m.out + tile_size - 1) / tile_size;
    const int first = (int)((int64_t)tiles * thread / threads), last = (int)((int64_t)tiles * (thread + 1) / threads);
    for (int number = first; number < last; number++) {
        if constexpr (in_blocks) {
            Results out;
            block_of_channels<D>(m, number, input, rows, out);
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < VECTORS; v++) use(r, number * BLOCK + v * LANES, out[r][v]);
            continue;
        }
        const int channel = std::min(number * CHANNELS, m.out - CHANNELS);  // the last tile may overlap
        int row = 0;
        for (; row + ROWS <= rows; row += ROWS) tile<D, ROWS>(m, channel, input, row, use);
        if (rows - row == 3) tile<D, 3>(m, channel, input, row, use);
        if (rows - row == 2) tile<D, 2>(m, channel, input, row, use);
        if (rows - row == 1) tile<D, 1>(m, channel, input, row, use);
    }
}

// Sorts each 2 * LANES values into the even and the odd ones.
inline void split_pairs(float* x, int width) {
    for (int i = 0; i < width; i += 2 * LANES) {
        float even[LANES], odd[LANES];
        for (int lane = 0; lane < LANES; lane++) even[lane] = x[i + 2 * lane], odd[lane] = x[i + 2 * lane + 1];
        std::memcpy(x + i, even, sizeof even);
        std::memcpy(x + i + LANES, odd, sizeof odd);
    }
}

// The reverse.
inline void join_pairs(float* x, int width) {
    for (int i = 0; i < width; i += 2 * LANES) {
        float both[2 * LANES];
        for (int lane = 0; lane < LANES; lane++) both[2 * lane] = x[i + lane], both[2 * lane + 1] = x[i + LANES + lane];
        std::memcpy(x + i, both, sizeof both);
    }
}

// One scale for some values, and their 8-bit integers, as bytes with a zero point. Returns the scale.
inline float quantize(const float* x, int width, int zero, uint8_t* out) {
    Floats most = {}, zero_or_nan = {};
    for (int i = 0; i < width; i += LANES) {
        Floats v = load<Floats>(x + i);
        most = larger(most, larger(v, -v));
        zero_or_nan += v * 0.0f;  // NaN for a value that is not finite
    }
    const float largest = max_lanes(most), factor = largest > SMALLEST ? INT8_MAX_VALUE / largest : 0.0f;
    for (int i = 0; i < width; i += LANES) {
        // adding the zero point and a half before truncating rounds
        Ints whole = __builtin_convertvector(load<Floats>(x + i) * factor + (UINT8_ZERO + 0.5f), Ints);
        store(out + i, __builtin_convertvector(whole + (zero - UINT8_ZERO), LaneBytes));
    }
    return largest / INT8_MAX_VALUE + sum_lanes(zero_or_nan);
}

// Prepares the values of a row for products. 8 and 4 bits: quantizes them with one scale, as Int8Prepacked does.
template <int D> void prepare_row(Input& input, int row) {
    if constexpr (D == BF16) split_pairs(input.values + row * input.width, input.width);
    if constexpr (D == FP32 || D == BF16) return;
    uint8_t* q = input.bytes + row * input.width;
    input.scale[row] = quantize(input.values + row * input.width, input.width, D == INT8 ? INPUT_ZERO : 0, q);
    if constexpr (D == INT4) {
        for (int i = 0; i < input.width; i += INT4_GROUP) {
            const Bytes zeros = Bytes{} + INT4_ZERO;
            Ints sum = {};
            for (int j = i; j < i + INT4_GROUP; j += BYTES) sum = dot4_small(sum, zeros, load<Bytes>(q + j));
            input.offsets[(row * input.width + i) / INT4_GROUP] = -sum_lanes(sum);
        }
    }
}

template <int D> void take_input(Input& input, const float* x, int rows, int width) {
    input.width = width;
    std::memcpy(input.values, x, sizeof(float) * rows * width);
    for (int row = 0; row < rows; row++) prepare_row<D>(input, row);
}

template <int D> void take_normalised(Input& input, const float* x, const Norm& norm, int rows, int width) {
    input.width = width;
    for (int row = 0; row < rows; row++, x += width) {
        float* y = input.values + row * width;
        Floats sum = {}, squares = {};
        for (int i = 0; i < width; i += LANES) sum += load<Floats>(x + i);
        float mean = sum_lanes(sum) / width;
        for (int i = 0; i < width; i += LANES) {
            Floats v = load<Floats>(x + i) - mean;
            squares += v * v;
        }
        float factor = 1.0f / std::sqrt(sum_lanes(squares) / width + NORM_EPSILON);
        for (int i = 0; i < width; i += LANES)
            store(y + i, (load<Floats>(x + i) - mean) * factor * load<Floats>(norm.weight + i) +
                             load<Floats>(norm.bias + i));
        prepare_row<D>(input, row);
    }
}

// Keys or values: V vectors of them at a time, as floats. Of bf16 the even ones come first, then the odd ones (see
// `split_pairs`).
template <int V, class T> inline void load_vectors(const T* from, Floats (&to)[V]) {
    for (int v = 0; v < V; v++) to[v] = load_floats(from + v * LANES);
}
template <int V> inline void load_vectors(const uint16_t* from, Floats (&to)[V]) {
    for (int v = 0; v < V; v += 2) {
        UInts pairs = load<UInts>(from + v * LANES);
        to[v] = (Floats)(pairs << 16), to[v + 1] = (Floats)(pairs & 0xffff0000u);
    }
}

template <int V, class T> inline void fetch_ahead_vectors(const T* from) {
    for (int i = 0; i < V * LANES; i += 64 / sizeof(T)) fetch_ahead(from + i);
}

// scores[t] += q * keys[t] for V vectors of each key.
template <int V, class T>
void add_scores(const float* q, const T* keys, int length, int stride, float* scores) {
    Floats query[V];
    for (int v = 0; v < V; v++) query[v] = load<Floats>(q + v * LANES);
    for (int t = 0; t < length; t += 4) {  // may read beyond the last token: the cache is padded
        Floats sums[4];
        for (int i = 0; i < 4; i++) {
            Floats key[V];
            if (t + i + TOKENS_AHEAD < length) fetch_ahead_vectors<V>(keys + (int64_t)(t + i + TOKENS_AHEAD) * stride);
            load_vectors<V>(keys + (int64_t)(t + i) * stride, key);
            sums[i] = query[0] * key[0];
            for (int v = 1; v < V; v++) sums[i] += query[v] * key[v];
        }
        store(scores + t, load<Four>(scores + t) + sum_lanes(sums[0], sums[1], sums[2], sums[3]));
    }
}

// The sum of weights[t] * values[t] for V vectors of each value.
template <int V, class T>
void weighted_sum(const float* weights, const T* values, int length, int stride, float factor, float* out) {
    Floats sums[V] = {};
    for (int t = 0; t < length; t++) {
        Floats value[V];
        if (t + TOKENS_AHEAD < length) fetch_ahead_vectors<V>(values + (int64_t)(t + TOKENS_AHEAD) * stride);
        load_vectors<V>(values + (int64_t)t * stride, value);
        for (int v = 0; v < V; v++) sums[v] += weights[t] * value[v];
    }
    for (int v = 0; v < V; v++) store(out + v * LANES, sums[v] * factor);
}

// Scores become e^(score - largest score), and zero from `length` to the end of its vector. Returns their sum.
float softmax(float* scores, int length) {
    const int padded = (length + LANES - 1) / LANES * LANES;
    for (int t = length; t < padded; t++) scores[t] = -INFINITY;
    Floats most = splat(-INFINITY), total = {};
    for (int t = 0; t < padded; t += LANES) most = larger(most, load<Floats>(scores + t));
    const float largest = max_lanes(most);
    for (int t = 0; t < padded; t += LANES) {
        Floats e = exp_of_negative(load<Floats>(scores + t) - largest);
        store(scores + t, e);
        total += e;
    }
    for (int t = length; t < padded; t++) scores[t] = 0;
    return sum_lanes(total);
}

// Attention of one head of one row to its sequence up to its own position. scores, bytes: scratch of this thread.
template <class T>
void attend(float* q, HeadCache<T> keys, HeadCache<T> values, int length, int head_size, float* scores, uint8_t*,
            float* out) {
    constexpr bool is_bf16 = std::is_same_v<T, uint16_t>;
    constexpr int V = BYTES == 64 ? 4 : 8;
    const float scale = 1.0f / std::sqrt((float)head_size);
    const int padded = (length + LANES - 1) / LANES * LANES;
    for (int i = 0; i < head_size; i++) q[i] *= scale;
    if (is_bf16) split_pairs(q, head_size);
    for (int t = 0; t < padded; t++) scores[t] = 0;
    int i = 0;
    for (; i + V * LANES <= head_size; i += V * LANES) add_scores<V>(q + i, keys.rows + i, length, head_size, scores);
    for (; i < head_size; i += 2 * LANES) add_scores<2>(q + i, keys.rows + i, length, head_size, scores);
    const float factor = 1.0f / softmax(scores, length);
    for (i = 0; i + V * LANES <= head_size; i += V * LANES)
        weighted_sum<V>(scores, values.rows + i, length, head_size, factor, out + i);
    for (; i < head_size; i += 2 * LANES) weighted_sum<2>(scores, values.rows + i, length, head_size, factor, out + i);
    if (is_bf16) join_pairs(out, head_size);
}

inline void store_key(const float* key, int position, int head_size, HeadCache<int8_t> cache, uint8_t* bytes) {
    cache.scale[position] = quantize(key, head_size, INPUT_ZERO, bytes);
    for (int i = 0; i < head_size; i += 4)
        std::memcpy(cache.rows + key_word(position, i, head_size, LANES), bytes + i, 4);
}

inline void store_value(const float* value, int position, int head_size, HeadCache<int8_t> cache, uint8_t* bytes) {
    cache.scale[position] = quantize(value, head_size, 0, bytes);
    for (int i = 0; i < head_size; i++) cache.rows[value_byte(position, i, head_size)] = (int8_t)bytes[i];
}

// The sum of weights[t] * values[t] for V vectors of each value, with weights in two parts: 128 high + low.
template <int V>
void weighted_sum_of_int8(const uint8_t* high, const uint8_t* low, const int8_t* values, int length, int head_size,
                          float factor, float* out) {
    Ints sums[V][2] = {};
    for (int t = 0; t < length; t += 4) {
        const int8_t* words = values + (int64_t)t * head_size;
        const Bytes h = (Bytes)(UInts{} + load<uint32_t>(high + t)), l = (Bytes)(UInts{} + load<uint32_t>(low + t));
        for (int v = 0; v < V; v++) {
            if (t + TOKENS_AHEAD < length) fetch_ahead(words + TOKENS_AHEAD * head_size + v * BYTES);
            const Bytes value = load<Bytes>(words + v * BYTES);
            sums[v][0] = dot4_small(sums[v][0], h, value);
            sums[v][1] = dot4_small(sums[v][1], l, value);
        }
    }
    for (int v = 0; v < V; v++) {
        const Floats h = __builtin_convertvector(sums[v][0], Floats), l = __builtin_convertvector(sums[v][1], Floats);
        store(out + v * LANES, (h * 128.0f + l) * factor);
    }
}

// Attention in 8 bits: the query gets one scale, and the weights of the values 14 bits, in two parts of 7.
inline void attend(float* q, HeadCache<int8_t> keys, HeadCache<int8_t> values, int length, int head_size, float* scores,
                   uint8_t* bytes, float* out) {
    constexpr int V = BYTES == 64 ? 4 : 2, HALF = 32 / LANES;
    constexpr float LARGEST = 16383.0f;
    const float q_scale = quantize(q, head_size, 0, bytes) / std::sqrt((float)head_size);
    int sum = 0;
    for (int i = 0; i < head_size; i++) sum += (int8_t)bytes[i];
    for (int t = 0; t < length; t += LANES) {
        const int8_t* words = keys.rows + (int64_t)t * head_size;
        Ints sums[2] = {Ints{} - INPUT_ZERO * sum, Ints{}};
        for (int i = 0; i < head_size; i += 8)
            for (int j = 0; j < 2; j++) {
                const int word = i + 4 * j;
                if (t + TOKENS_AHEAD < length) fetch_ahead(words + TOKENS_AHEAD * head_size + word * LANES);
                const Bytes query = (Bytes)(UInts{} + load<uint32_t>(bytes + word));
                sums[j] = dot4(sums[j], load<Bytes>(words + word * LANES), query);
            }
        store(scores + t, __builtin_convertvector(sums[0] + sums[1], Floats) * q_scale * load<Floats>(keys.scale + t));
    }
    const float total = softmax(scores, length);
    Floats most = {}, zero_or_nan = {};
    for (int t = 0; t < length; t++) scores[t] *= values.scale[t];
    for (int t = 0; t < length; t += LANES) {
        most = larger(most, load<Floats>(scores + t));
        zero_or_nan += load<Floats>(scores + t) * 0.0f;
    }
    const float largest = max_lanes(most), factor = largest > SMALLEST ? LARGEST / largest : 0.0f;
    uint8_t *high = bytes, *low = bytes + (length + LANES - 1) / LANES * LANES;
    for (int t = 0; t < length; t += LANES) {
        const Ints whole = __builtin_convertvector(load<Floats>(scores + t) * factor + 0.5f, Ints);
        store(high + t, __builtin_convertvector(whole >> 7, LaneBytes));
        store(low + t, __builtin_convertvector(whole & 127, LaneBytes));
    }
    const float back = (largest / LARGEST + sum_lanes(zero_or_nan)) / total;
    int i = 0;
    for (; i + V * LANES <= head_size; i += V * LANES)
        weighted_sum_of_int8<V>(high, low, values.rows + 4 * i, length, head_size, back, out + i);
    for (; i < head_size; i += HALF * LANES)
        weighted_sum_of_int8<HALF>(high, low, values.rows + 4 * i, length, head_size, back, out + i);
}

// Stores at most `count` values: the last block may have more channels than its layer.
template <class V> inline void store_first(float* to, V values, int count) {
    if (count >= (int)(sizeof(V) / sizeof(float))) store(to, values);
    else if (count > 0) std::memcpy(to, &values, sizeof(float) * count);
}

// Memory that threads share: x the residual stream, q the queries, mixed the attention's output, hidden the MLP's.
struct Shared { float *x, *q, *mixed, *hidden; };

// Largest value of a row's part, and the sum of e^(value - largest). NaN if a value is not finite.
inline void sum_exponentials(const float* x, int count, float* out) {
    Floats most = splat(-INFINITY), total = {}, zero_or_nan = {};
    auto vector = [&](int i) {
        float last[LANES];
        if (i + LANES <= count) return load<Floats>(x + i);
        for (int lane = 0; lane < LANES; lane++) last[lane] = x[std::min(i + lane, count - 1)];
        return load<Floats>(last);
    };
    for (int i = 0; i < count; i += LANES) most = larger(most, vector(i)), zero_or_nan += vector(i) * 0.0f;
    out[0] = max_lanes(most);
    for (int i = 0; i < count; i += LANES) {
        Floats e = exp_of_negative(vector(i) - out[0]);
        for (int lane = count - i; lane < LANES; lane++) e[lane] = 0;
        total += e;
    }
    out[1] = sum_lanes(total) + sum_lanes(zero_or_nan);
}

template <int D>
void step(const Model& model, const Row* row, int rows, float* logits, float* totals, Shared shared, Input input,
          float* scores, int thread, int threads) {
    typedef Cached<D> T;
    const int width = model.n_embd, heads = model.n_head, head_size = width / heads;
    for (int layer = 0; layer < model.n_layer; layer++) {
        const Layer& block = model.layers[layer];
        take_normalised<D>(input, shared.x, block.norm_1, rows, width);
        product<D>(block.attention, input, rows, thread, threads, [&](int r, int channel, auto values) {
            if (channel < width) {
                store(shared.q + r * width + channel, values);
            } else if constexpr (sizeof(T) == 1) {
                store(shared.hidden + r * 2 * width + channel - width, values);  // quantized below, a head as a whole
            } else {
                const int part = channel < 2 * width ? 0 : 1, within = channel - (part + 1) * width;
                const int head = within / head_size;
                HeadCache<T> cache(model, row[r].cache, layer, part, head);
                store_floats(cache.rows + (int64_t)row[r].position * head_size + (within - head * head_size), values);
            }
        });
#pragma omp barrier
        if constexpr (sizeof(T) == 1) {
            for (int task = thread; task < rows * 2 * heads; task += threads) {
                const int r = task / (2 * heads), part = task / heads % 2;
                HeadCache<T> cache(model, row[r].cache, layer, part, task % heads);
                const float* from = shared.hidden + task * head_size;
                if (part == 0) store_key(from, row[r].position, head_size, cache, input.bytes);
                else store_value(from, row[r].position, head_size, cache, input.bytes);
            }
#pragma omp barrier
        }
        const int tasks = rows * heads;  // neighbouring heads lie side by side
        for (int task = tasks * thread / threads; task < tasks * (thread + 1) / threads; task++) {
            int r = task / heads, head = task % heads;
            HeadCache<T> keys(model, row[r].cache, layer, 0, head), values(model, row[r].cache, layer, 1, head);
            attend(shared.q + r * width + head * head_size, keys, values, row[r].position + 1, head_size, scores,
                   input.bytes, shared.mixed + r * width + head * head_size);
        }
#pragma omp barrier
        take_input<D>(input, shared.mixed, rows, width);
        auto add = [&](int r, int channel, auto values) {
            float* x = shared.x + r * width + channel;
            store(x, load<decltype(values)>(x) + values);
        };
        product<D>(block.attention_projection, input, rows, thread, threads, add);
#pragma omp barrier
        take_normalised<D>(input, shared.x, block.norm_2, rows, width);
        product<D>(block.expansion, input, rows, thread, threads, [&](int r, int channel, auto values) {
            store(shared.hidden + r * 4 * width + channel, gelu(values));
        });
#pragma omp barrier
        take_input<D>(input, shared.hidden, rows, 4 * width);
        product<D>(block.projection, input, rows, thread, threads, add);
#pragma omp barrier
    }
    constexpr int HEAD = D == INT4 ? INT8 : D;
    take_normalised<HEAD>(input, shared.x, model.norm, rows, width);
    product<HEAD>(model.head, input, rows, thread, threads, [&](int r, int channel, auto values) {
        store_first(logits + (int64_t)r * model.vocab_size + channel, values, model.vocab_size - channel);
    });
#pragma omp barrier
    const int size = (model.vocab_size + PARTS - 1) / PARTS;
    for (int task = thread; task < rows * PARTS; task += threads) {
        const int first = task % PARTS * size;  // the last parts may be empty
        const float* part = logits + (int64_t)(task / PARTS) * model.vocab_size + first;
        sum_exponentials(part, std::min(size, model.vocab_size - first), shared.hidden + 2 * task);
    }
#pragma omp barrier
    for (int r = thread; r < rows; r += threads) {
        const float* parts = shared.hidden + 2 * PARTS * r;
        float largest = parts[0];
        double total = 0;
        for (int i = 1; i < PARTS; i++) largest = std::max(largest, parts[2 * i]);
        for (int i = 0; i < PARTS; i++) total += std::exp((double)(parts[2 * i] - largest)) * parts[2 * i + 1];
        totals[r] = (float)(largest + std::log(total));
    }
}

// The products of a step and nothing else, to measure what part of a step they take.
template <int D> void multiply_all(const Model& model, int rows, float* logits, Shared shared, Input input, int thread,
                                   int threads) {
    constexpr int HEAD = D == INT4 ? INT8 : D;
    const int width = model.n_embd;
    auto multiply = [&](auto dtype, const Matrix& m, float* out) {
        input.width = m.in;
        product<decltype(dtype)::value>(m, input, rows, thread, threads, [&](int r, int channel, auto values) {
            store_first(out + (int64_t)r * m.out + channel, values, m.out - channel);
        });
#pragma omp barrier
    };
    std::memset(input.values, 0, sizeof(float) * rows * 4 * width);
    std::memset(input.bytes, 0, (size_t)rows * 4 * width);
    std::memset(input.offsets, 0, sizeof(int32_t) * rows * width / 16);
    for (int r = 0; r < rows; r++) input.scale[r] = 1;
    for (int layer = 0; layer < model.n_layer; layer++) {
        const Layer& block = model.layers[layer];
        multiply(std::integral_constant<int, D>{}, block.attention, shared.hidden);
        multiply(std::integral_constant<int, D>{}, block.attention_projection, shared.q);
        multiply(std::integral_constant<int, D>{}, block.expansion, shared.hidden);
        multiply(std::integral_constant<int, D>{}, block.projection, shared.q);
    }
    multiply(std::integral_constant<int, HEAD>{}, model.head, logits);
}

template <class T> void embed(const Model& model, const Row& row, float* x) {
    const T* token = (const T*)model.wte + (int64_t)row.token * model.n_embd;
    const T* position = (const T*)model.wpe + (int64_t)row.position * model.n_embd;
    for (int i = 0; i < model.n_embd; i += LANES) store(x + i, load_floats(token + i) + load_floats(position + i));
}

typedef void (*Step)(const Model&, const Row*, int, float*, float*, Shared, Input, float*, int, int);
constexpr Step STEPS[4] = {step<FP32>, step<BF16>, step<INT8>, step<INT4>};
typedef void (*Multiply)(const Model&, int, float*, Shared, Input, int, int);
constexpr Multiply MULTIPLY[4] = {multiply_all<FP32>, multiply_all<BF16>, multiply_all<INT8>, multiply_all<INT4>};

int64_t shared_floats(const Model& m) { return (int64_t)MAX_ROWS * m.n_embd * 7; }
int64_t bytes_floats(const Model& m) { return std::max(MAX_ROWS * m.n_embd, (m.context_length + LANES) / 2); }
int64_t input_floats(const Model& m) {  // values, bytes, offsets, scales, scores
    return (int64_t)MAX_ROWS * 5 * m.n_embd + bytes_floats(m) + MAX_ROWS + (m.context_length + 2 * LANES);
}

}  // namespace

extern "C" {

int32_t max_rows() { return MAX_ROWS; }

int64_t cache_bytes(const Model* model) {  // of a sequence
    const int64_t bytes = model->weight_dtype == FP32   ? HeadCache<float>::bytes(*model)
                          : model->weight_dtype == BF16 ? HeadCache<uint16_t>::bytes(*model)
                                                        : HeadCache<int8_t>::bytes(*model);
    return bytes * model->n_layer * 2 * model->n_head;
}

int64_t decode_scratch_bytes(const Model* model, int32_t threads) {
    return 4 * (shared_floats(*model) + threads * (input_floats(*model) + 3 * BYTES));
}

// Appends one token to each row's sequence and writes its logits, (rows, vocab_size), and the logarithms of their
// summed exponentials, (rows). If `row` is null, it computes the
// products of a step and nothing else.
void decode(const Model* model, const Row* row, int32_t rows, float* logits, float* totals, float* scratch,
            int32_t threads) {
    const int width = model->n_embd;
    Shared shared{scratch, scratch + MAX_ROWS * width, scratch + 2 * MAX_ROWS * width, scratch + 3 * MAX_ROWS * width};
    for (int r = 0; row && r < rows; r++) {
        if (model->embedding_dtype == FP32) embed<float>(*model, row[r], shared.x + r * width);
        else embed<uint16_t>(*model, row[r], shared.x + r * width);
    }
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        float* own = scratch + shared_floats(*model) + thread * (input_floats(*model) + 3 * BYTES);
        Input input;
        input.values = own, own += MAX_ROWS * 4 * width;
        input.bytes = (uint8_t*)own, own += bytes_floats(*model);
        input.offsets = (int32_t*)own, own += MAX_ROWS * width;
        input.scale = own, own += MAX_ROWS;
        const int present = omp_get_num_threads();
#ifdef HAS_AMX
        if (USES_AMX) configure_amx(rows);
#endif
        if (row)
            STEPS[model->weight_dtype](*model, row, rows, logits, totals, shared, input, own, thread, present);
        else
            MULTIPLY[model->weight_dtype](*model, rows, logits, shared, input, thread, present);
#ifdef HAS_AMX
        if (USES_AMX) _tile_release();
#endif
    }
}

}
