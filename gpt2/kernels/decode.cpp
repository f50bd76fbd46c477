// A decode step of GPT-2 on the CPU: from token ids to logits, in one parallel region.
//
// Decoding one token reads every weight once, so the memory limits its speed. What else costs time here is what each
// call of a framework costs, hundreds of times per token; so the whole step is one function. Weights stay in the layout
// of nn.Linear, (out, in), row after row, and are read once for all rows of the batch.
//
// Each row of the batch is summed in the same order whatever the number of rows, threads and other rows' values: the
// logits of a sequence are the same to the bit alone and in company.

#include <type_traits>
#include <omp.h>

#include "model.h"
#include "vectors.h"

namespace {

constexpr int CHANNELS = 4;      // output channels computed together
constexpr int ROWS = 4;          // rows of the batch computed together
constexpr int MAX_ROWS = 16;     // rows of the batch in one call
constexpr int TOKENS_AHEAD = 16;  // of keys and values that are prefetched

// The rows of an input, as the products of a dtype need them. Each thread has its own.
struct Input {
    float* values;     // (rows, width)
    uint8_t* bytes;    // (rows, width): quantized
    float* scale;      // (rows)
    int32_t* offsets;  // (rows, width / 4): what the zero point of 4-bit weights adds to each lane
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

template <int R>
inline void tile_of_int8(const Matrix& m, int channel, const Input& input, int row, Four* out) {
    const uint8_t* weight = (const uint8_t*)m.weight + (int64_t)channel * m.in;
    Ints sums[CHANNELS][R] = {};
    for (int i = 0; i < m.in; i += BYTES) {
        Bytes x[R];
        for (int r = 0; r < R; r++) x[r] = load<Bytes>(input.bytes + (row + r) * m.in + i);
        for (int c = 0; c < CHANNELS; c++) {
            fetch_ahead(weight + (CHANNELS + c) * m.in + i);
            Bytes w = load<Bytes>(weight + c * m.in + i);
            for (int r = 0; r < R; r++) sums[c][r] = dot4(sums[c][r], x[r], w);
        }
    }
    for (int r = 0; r < R; r++) {
        FourInts sum = sum_lanes(sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
        sum -= INPUT_ZERO * load<FourInts>(m.sums + channel);
        out[r] = __builtin_convertvector(sum, Four) * (load<Four>(m.scale + channel) * input.scale[row + r]);
    }
}

template <int R>
inline void tile_of_int4(const Matrix& m, int channel, const Input& input, int row, Four* out) {
    const uint8_t* weight = (const uint8_t*)m.weight + (int64_t)channel * (m.in / 2);
    const float* scale = m.scale + (int64_t)channel * (m.in / m.group);
    Floats sums[CHANNELS][R] = {};
    for (int i = 0; i < m.in / 2; i += BYTES) {
        for (int c = 0; c < CHANNELS; c++) {
            fetch_ahead(weight + (CHANNELS + c) * (m.in / 2) + i);
            Bytes packed = load<Bytes>(weight + c * (m.in / 2) + i);
            Bytes w[2] = {packed & 15, (Bytes)((UInts)packed >> 4) & 15};
            for (int half = 0; half < 2; half++) {
                int first = i / (INT4_BLOCK / 2) * INT4_BLOCK + i % (INT4_BLOCK / 2) + half * (INT4_BLOCK / 2);
                Floats s = splat(scale[c * (m.in / m.group) + first / m.group]);
                for (int r = 0; r < R; r++) {
                    Bytes x = load<Bytes>(input.bytes + (row + r) * m.in + first);
                    Ints start = load<Ints>(input.offsets + ((row + r) * m.in + first) / 4);
                    sums[c][r] += __builtin_convertvector(dot4_int4(start, w[half], x), Floats) * s;
                }
            }
        }
    }
    for (int r = 0; r < R; r++)
        out[r] = sum_lanes(sums[0][r], sums[1][r], sums[2][r], sums[3][r]) * input.scale[row + r];
}

template <int D, int R, class Use>
inline void tile(const Matrix& m, int channel, const Input& input, int row, Use use) {
    Four out[R];
    if constexpr (D == FP32) tile_of_fp32<R>(m, channel, input, row, out);
    if constexpr (D == BF16) tile_of_bf16<R>(m, channel, input, row, out);
    if constexpr (D == INT8) tile_of_int8<R>(m, channel, input, row, out);
    if constexpr (D == INT4) tile_of_int4<R>(m, channel, input, row, out);
    Four bias = m.bias ? load<Four>(m.bias + channel) : Four{};
    for (int r = 0; r < R; r++) use(row + r, channel, out[r] + bias);
}

// This thread's part of a linear layer: use(row, channel, values) for each four output channels.
template <int D, class Use>
void product(const Matrix& m, const Input& input, int rows, int thread, int threads, Use use) {
    const int tiles = (m.out + CHANNELS - 1) / CHANNELS;
    const int first = (int)((int64_t)tiles * thread / threads), last = (int)((int64_t)tiles * (thread + 1) / threads);
    for (int number = first; number < last; number++) {
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

// Prepares the values of a row for products. 8 and 4 bits: quantizes them with one scale, as Int8Prepacked does.
template <int D> void prepare_row(Input& input, int row) {
    if constexpr (D == BF16) split_pairs(input.values + row * input.width, input.width);
    if constexpr (D == FP32 || D == BF16) return;
    const float* x = input.values + row * input.width;
    uint8_t* q = input.bytes + row * input.width;
    Floats most = {}, zero_or_nan = {};
    for (int i = 0; i < input.width; i += LANES) {
        Floats v = load<Floats>(x + i);
        most = larger(most, larger(v, -v));
        zero_or_nan += v * 0.0f;  // NaN for a value that is not finite
    }
    float largest = max_lanes(most);
    input.scale[row] = largest / INT8_MAX_VALUE + sum_lanes(zero_or_nan);
    float factor = largest > SMALLEST ? INT8_MAX_VALUE / largest : 0.0f;
    constexpr int zero = D == INT8 ? INPUT_ZERO : 0;
    for (int i = 0; i < input.width; i += LANES) {
        // adding the zero point and a half before truncating rounds
        Ints whole = __builtin_convertvector(load<Floats>(x + i) * factor + (UINT8_ZERO + 0.5f), Ints);
        store(q + i, __builtin_convertvector(whole + (zero - UINT8_ZERO), LaneBytes));
    }
    if constexpr (D == INT4) {
        int32_t* offsets = input.offsets + row * input.width / 4;
        Bytes zeros = Bytes{} + INT4_ZERO;
        for (int i = 0; i < input.width; i += BYTES)
            store(offsets + i / 4, Ints{} - dot4_int4(Ints{}, zeros, load<Bytes>(q + i)));
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
            store(y + i, (load<Floats>(x + i) - mean) * factor * load<Floats>(norm.weight + i) + load<Floats>(norm.bias + i));
        prepare_row<D>(input, row);
    }
}

// Keys and values in fp32 or bf16: V vectors of them at a time, as floats. Of bf16 the even ones come first, then the
// odd ones (see `split_pairs`).
template <int V> inline void load_vectors(const float* from, Floats (&to)[V]) {
    for (int v = 0; v < V; v++) to[v] = load<Floats>(from + v * LANES);
}
template <int V> inline void load_vectors(const uint16_t* from, Floats (&to)[V]) {
    for (int v = 0; v < V; v += 2) {
        UInts pairs = load<UInts>(from + v * LANES);
        to[v] = (Floats)(pairs << 16), to[v + 1] = (Floats)(pairs & 0xffff0000u);
    }
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
            fetch_ahead(keys + (int64_t)(t + i + TOKENS_AHEAD) * stride);
            fetch_ahead(keys + (int64_t)(t + i + TOKENS_AHEAD) * stride + 64 / sizeof(T));
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
        fetch_ahead(values + (int64_t)(t + TOKENS_AHEAD) * stride);
        fetch_ahead(values + (int64_t)(t + TOKENS_AHEAD) * stride + 64 / sizeof(T));
        load_vectors<V>(values + (int64_t)t * stride, value);
        for (int v = 0; v < V; v++) sums[v] += weights[t] * value[v];
    }
    for (int v = 0; v < V; v++) store(out + v * LANES, sums[v] * factor);
}

// Attention of one head of one row to its sequence up to its own position. scores: scratch of this thread.
template <class T>
void attend(float* q, const T* keys, const T* values, int length, int head_size, float* scores, float* out) {
    constexpr bool is_bf16 = std::is_same_v<T, uint16_t>;
    constexpr int V = BYTES == 64 ? 4 : 8;
    const float scale = 1.0f / std::sqrt((float)head_size);
    const int padded = (length + LANES - 1) / LANES * LANES;
    for (int i = 0; i < head_size; i++) q[i] *= scale;
    if (is_bf16) split_pairs(q, head_size);
    for (int t = 0; t < padded; t++) scores[t] = 0;
    int i = 0;
    for (; i + V * LANES <= head_size; i += V * LANES) add_scores<V>(q + i, keys + i, length, head_size, scores);
    for (; i < head_size; i += 2 * LANES) add_scores<2>(q + i, keys + i, length, head_size, scores);
    for (int t = length; t < padded; t++) scores[t] = -INFINITY;
    Floats most = splat(-INFINITY), total = {};
    for (int t = 0; t < padded; t += LANES) most = larger(most, load<Floats>(scores + t));
    const float largest = max_lanes(most);
    for (int t = 0; t < padded; t += LANES) {
        Floats e = exp_of_negative(load<Floats>(scores + t) - largest);
        store(scores + t, e);
        total += e;
    }
    const float factor = 1.0f / sum_lanes(total);
    for (i = 0; i + V * LANES <= head_size; i += V * LANES)
        weighted_sum<V>(scores, values + i, length, head_size, factor, out + i);
    for (; i < head_size; i += 2 * LANES) weighted_sum<2>(scores, values + i, length, head_size, factor, out + i);
    if (is_bf16) join_pairs(out, head_size);
}

// Memory that threads share: x the residual stream, q the queries, mixed the attention's output, hidden the MLP's.
struct Shared { float *x, *q, *mixed, *hidden; };

template <int D>
void step(const Model& model, const Row* row, int rows, float* logits, Shared shared, Input input, float* scores,
          int thread, int threads) {
    typedef Cached<D> T;
    const int width = model.n_embd, heads = model.n_head, head_size = width / heads;
    const int64_t per_head = (int64_t)model.context_length * head_size, per_part = heads * per_head;
    for (int layer = 0; layer < model.n_layer; layer++) {
        const Layer& block = model.layers[layer];
        take_normalised<D>(input, shared.x, block.norm_1, rows, width);
        product<D>(block.attention, input, rows, thread, threads, [&](int r, int channel, Four values) {
            if (channel < width) {
                store(shared.q + r * width + channel, values);
            } else {
                const int part = channel < 2 * width ? 0 : 1, within = channel - (part + 1) * width;
                const int head = within / head_size;
                T* cache = (T*)row[r].cache + (layer * 2 + part) * per_part + head * per_head;
                store_floats(cache + (int64_t)row[r].position * head_size + (within - head * head_size), values);
            }
        });
#pragma omp barrier
        for (int task = thread; task < rows * heads; task += threads) {
            int r = task / heads, head = task % heads;
            const T* keys = (const T*)row[r].cache + layer * 2 * per_part + head * per_head;
            attend(shared.q + r * width + head * head_size, keys, keys + per_part, row[r].position + 1, head_size,
                   scores, shared.mixed + r * width + head * head_size);
        }
#pragma omp barrier
        take_input<D>(input, shared.mixed, rows, width);
        auto add = [&](int r, int channel, Four values) {
            float* x = shared.x + r * width + channel;
            store(x, load<Four>(x) + values);
        };
        product<D>(block.attention_projection, input, rows, thread, threads, add);
#pragma omp barrier
        take_normalised<D>(input, shared.x, block.norm_2, rows, width);
        product<D>(block.expansion, input, rows, thread, threads,
                   [&](int r, int channel, Four values) { store(shared.hidden + r * 4 * width + channel, values); });
#pragma omp barrier
        input.width = 4 * width;
        for (int r = 0; r < rows; r++) {
            for (int i = 0; i < 4 * width; i += LANES)
                store(input.values + r * 4 * width + i, gelu(load<Floats>(shared.hidden + r * 4 * width + i)));
            prepare_row<D>(input, r);
        }
        product<D>(block.projection, input, rows, thread, threads, add);
#pragma omp barrier
    }
    constexpr int HEAD = D == INT4 ? INT8 : D;
    take_normalised<HEAD>(input, shared.x, model.norm, rows, width);
    product<HEAD>(model.head, input, rows, thread, threads, [&](int r, int channel, Four values) {
        store(logits + (int64_t)r * model.vocab_size + channel, values);
    });
}

// The products of a step and nothing else, to measure what part of a step they take.
template <int D> void multiply_all(const Model& model, int rows, float* logits, Shared shared, Input input, int thread,
                                   int threads) {
    constexpr int HEAD = D == INT4 ? INT8 : D;
    const int width = model.n_embd;
    auto multiply = [&](auto dtype, const Matrix& m, float* out) {
        input.width = m.in;
        product<decltype(dtype)::value>(m, input, rows, thread, threads, [&](int r, int channel, Four values) {
            store(out + (int64_t)r * m.out + channel, values);
        });
#pragma omp barrier
    };
    std::memset(input.values, 0, sizeof(float) * rows * 4 * width);
    std::memset(input.bytes, 0, (size_t)rows * 4 * width);
    std::memset(input.offsets, 0, sizeof(int32_t) * rows * width);
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

typedef void (*Step)(const Model&, const Row*, int, float*, Shared, Input, float*, int, int);
constexpr Step STEPS[4] = {step<FP32>, step<BF16>, step<INT8>, step<INT4>};
typedef void (*Multiply)(const Model&, int, float*, Shared, Input, int, int);
constexpr Multiply MULTIPLY[4] = {multiply_all<FP32>, multiply_all<BF16>, multiply_all<INT8>, multiply_all<INT4>};

int64_t shared_floats(const Model& m) { return (int64_t)MAX_ROWS * m.n_embd * 7; }
int64_t input_floats(const Model& m) {  // values, bytes, offsets, scales, scores
    return (int64_t)MAX_ROWS * 4 * m.n_embd * 3 / 2 + MAX_ROWS + (m.context_length + 2 * LANES);
}

}  // namespace

extern "C" {

int32_t max_rows() { return MAX_ROWS; }

int64_t decode_scratch_bytes(const Model* model, int32_t threads) {
    return 4 * (shared_floats(*model) + threads * (input_floats(*model) + 3 * BYTES));
}

// Appends one token to each row's sequence and writes its logits, (rows, vocab_size). If `row` is null, it computes the
// products of a step and nothing else.
void decode(const Model* model, const Row* row, int32_t rows, float* logits, float* scratch, int32_t threads) {
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
        input.bytes = (uint8_t*)own, own += MAX_ROWS * width;
        input.offsets = (int32_t*)own, own += MAX_ROWS * width;
        input.scale = own, own += MAX_ROWS;
        const int present = omp_get_num_threads();
        if (row)
            STEPS[model->weight_dtype](*model, row, rows, logits, shared, input, own, thread, present);
        else
            MULTIPLY[model->weight_dtype](*model, rows, logits, shared, input, thread, present);
    }
}

}
