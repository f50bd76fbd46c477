// Prefill of GPT-2 on the CPU: the keys and values of a part of a prompt.
//
// Tokens are processed in panels. A vector holds one channel of LANES tokens, and a panel lists its values channel
// after channel, (channels, PANEL): LayerNorm, softmax and quantization are then the same operations in every lane.
//
// Weights, (out, in), keys and transposed values are the first operand of all products, `multiply`. The second is a
// panel whose channels are packed into words of 32 bits: one channel in fp32, two in bf16, or four in 8 bits. So the
// same loop serves all dtypes, and with AMX a panel is a tile as it is. 8-bit and 4-bit weights leave their blocks.
//
// A token's result does not depend on the other tokens in its panel, nor on how a prompt is divided into parts.

#include <utility>
#include <omp.h>

#include "amx.h"
#include "model.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 2 * LANES;                // tokens in a panel
constexpr int CHANNELS = 32;                    // output channels computed together
constexpr int TILE = VECTOR_BYTES == 64 ? 8 : 4;  // of them in registers, without AMX
constexpr int PART = 512;                       // tokens that pass through a layer together

template <int D> constexpr int BYTES_OF = D == FP32 ? 4 : D == BF16 ? 2 : 1;

typedef int16_t Shorts __attribute__((vector_size(VECTOR_BYTES)));

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// acc + the products of the channels in each word.
template <int D> inline auto dot(std::conditional_t<D == INT8, Ints, Floats> acc, UInts x, UInts weight) {
    if constexpr (D == FP32) return acc + (Floats)x * (Floats)weight;
    if constexpr (D == INT8) return dot4(acc, (Bytes)x, (Bytes)weight);
    if constexpr (D == BF16) {
#if defined(__AVX512BF16__) && VECTOR_BYTES == 64
        return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)weight);
#else
        acc += (Floats)(x << 16) * (Floats)(weight << 16);
        return acc + (Floats)(x & 0xffff0000u) * (Floats)(weight & 0xffff0000u);
#endif
    }
}

#ifdef HAS_AMX
template <int D>
void multiply_amx(const char* rows, int64_t stride, const uint32_t* panel, int words, void* out) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int word = 0; word < words; word += 16, rows += STEP, panel += 16 * PANEL) {
        _tile_loadd(4, rows, stride);
        _tile_loadd(5, rows + 16 * stride, stride);
        _tile_loadd(6, panel, 4 * PANEL);
        _tile_loadd(7, panel + LANES, 4 * PANEL);
        if constexpr (D == INT8) {
            _tile_dpbsud(0, 4, 6); _tile_dpbsud(1, 4, 7); _tile_dpbsud(2, 5, 6); _tile_dpbsud(3, 5, 7);
        } else {
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
    }
    float* to = (float*)out;
    _tile_stored(0, to, 4 * PANEL);
    _tile_stored(1, to + LANES, 4 * PANEL);
    _tile_stored(2, to + 16 * PANEL, 4 * PANEL);
    _tile_stored(3, to + 16 * PANEL + LANES, 4 * PANEL);
}
#endif

// CHANNELS rows, stride bytes apart, times a panel of words: (CHANNELS, PANEL), 32-bit integers if D is INT8.
template <int D> void multiply(const void* first_row, int64_t stride, const uint32_t* panel, int words, void* out) {
    const char* rows = (const char*)first_row;
#ifdef HAS_AMX
    if (D != FP32 && USES_AMX) return multiply_amx<D>(rows, stride, panel, words, out);
#endif
    for (int first = 0; first < CHANNELS; first += TILE) {
        std::conditional_t<D == INT8, Ints, Floats> sums[TILE][2] = {};
        for (int word = 0; word < words; word++) {
            UInts left = load<UInts>(panel + word * PANEL), right = load<UInts>(panel + word * PANEL + LANES);
            for (int c = 0; c < TILE; c++) {
                UInts weight = UInts{} + load<uint32_t>(rows + (first + c) * stride + 4 * word);
                sums[c][0] = dot<D>(sums[c][0], left, weight);
                sums[c][1] = dot<D>(sums[c][1], right, weight);
            }
        }
        for (int c = 0; c < TILE; c++)
            for (int half = 0; half < 2; half++)
                store((uint32_t*)out + (first + c) * PANEL + half * LANES, (UInts)sums[c][half]);
    }
}

inline UInts rounded_to_bf16(Floats x) {  // to the nearest, ties to even; the upper halves count
    UInts bits = (UInts)x;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

template <int SIZE, bool UPPER, int... LANE>
inline UInts exchange(UInts a, UInts b, std::integer_sequence<int, LANE...>) {
    if constexpr (UPPER) return __builtin_shufflevector(a, b, (LANE & SIZE ? LANES + LANE : LANE + SIZE)...);
    else return __builtin_shufflevector(a, b, (LANE & SIZE ? LANES + LANE - SIZE : LANE)...);
}

// Transposes a square of 32-bit values: exchanges ever larger blocks next to the diagonal.
template <int SIZE = 1> inline void transpose(UInts (&rows)[LANES]) {
    if constexpr (SIZE < LANES) {
        constexpr auto all = std::make_integer_sequence<int, LANES>();
        for (int i = 0; i < LANES; i++)
            if (!(i & SIZE)) {
                UInts a = rows[i], b = rows[i + SIZE];
                rows[i] = exchange<SIZE, false>(a, b, all), rows[i + SIZE] = exchange<SIZE, true>(a, b, all);
            }
        transpose<2 * SIZE>(rows);
    }
}

// What products take keys and values in.
template <class T> using Wide = std::conditional_t<sizeof(T) == 4, float, uint16_t>;

inline void store_all(float* to, Floats v) { store(to, v); }
inline void store_all(uint16_t* to, Floats v) { store(to, __builtin_convertvector(rounded_to_bf16(v) >> 16, Halves)); }

// Values, (tokens, head_size), to (head_size, stride), with zeros after the last token.
template <class T> void transpose_values(const T* values, int tokens, int head_size, int stride, T* out) {
    constexpr int IN_WORD = 4 / sizeof(T);
    for (int first = 0; first < stride; first += LANES)
        for (int channel = 0; channel < head_size; channel += LANES * IN_WORD) {
            UInts rows[LANES];
            for (int i = 0; i < LANES; i++) {
                const T* row = values + (int64_t)(first + i) * head_size + channel;
                rows[i] = first + i < tokens ? load<UInts>(row) : UInts{};
            }
            transpose(rows);
            for (int i = 0; i < LANES; i++) {
                T* to = out + (int64_t)(channel + i * IN_WORD) * stride + first;
                if constexpr (IN_WORD == 1) {
                    store(to, rows[i]);
                } else {
                    store(to, __builtin_convertvector(rows[i] & 0xffffu, Halves));
                    store(to + stride, __builtin_convertvector(rows[i] >> 16, Halves));
                }
            }
        }
}

// Values of some channels, (CHANNELS, PANEL), to one row for each token, stride values apart.
template <class T> void store_tokens(const float* values, int tokens, T* out, int stride) {
    for (int first = 0; first < tokens; first += LANES)
        for (int channel = 0; channel < CHANNELS; channel += LANES) {
            UInts rows[LANES];
            for (int i = 0; i < LANES; i++) rows[i] = load<UInts>(values + (channel + i) * PANEL + first);
            transpose(rows);
            for (int i = 0; i < std::min(LANES, tokens - first); i++)
                store_all(out + (int64_t)(first + i) * stride + channel, (Floats)rows[i]);
        }
}

inline UInts packed_bf16(Floats low, Floats high) {
    return rounded_to_bf16(low) >> 16 | (rounded_to_bf16(high) & 0xffff0000u);
}

// Packs a panel, (width, PANEL), into words. 8 bits: quantizes each token with one scale.
template <int D> void pack(const float* panel, int width, uint32_t* words, float* scale) {
    if constexpr (D == FP32) std::memmove(words, panel, sizeof(float) * width * PANEL);
    for (int half = 0; half < PANEL && D != FP32; half += LANES) {
        const float* x = panel + half;
        uint32_t* to = words + half;
        if constexpr (D == BF16)
            for (int i = 0; i < width; i += 2, to += PANEL)
                store(to, packed_bf16(load<Floats>(x + i * PANEL), load<Floats>(x + (i + 1) * PANEL)));
        if constexpr (D == INT8) {
            Floats largest = {}, zero_or_nan = {};
            for (int i = 0; i < width; i++) {
                Floats v = load<Floats>(x + i * PANEL);
                largest = larger(largest, larger(v, -v));
                zero_or_nan += v * 0.0f;  // NaN for a value that is not finite
            }
            store(scale + half, largest / INT8_MAX_VALUE + zero_or_nan);
            Floats factor = largest > SMALLEST ? INT8_MAX_VALUE / largest : splat(0.0f);
            for (int i = 0; i < width; i += 4, to += PANEL) {
                UInts word = {};
                for (int j = 0; j < 4; j++) {
                    Floats scaled = load<Floats>(x + (i + j) * PANEL) * factor;
                    // adding the zero point and a half before truncating rounds
                    Ints whole = __builtin_convertvector(scaled + (UINT8_ZERO + 0.5f), Ints);
                    word |= (UInts)((whole + (INPUT_ZERO - UINT8_ZERO)) & 255) << (8 * j);
                }
                store(to, word);
            }
        }
    }
}

void normalise(const float* panel, const Norm& norm, int width, float* out) {
    for (int half = 0; half < PANEL; half += LANES) {
        const float* x = panel + half;
        Floats sums[4] = {}, squares[4] = {};
        for (int i = 0; i < width; i++) sums[i % 4] += load<Floats>(x + i * PANEL);
        Floats mean = (sums[0] + sums[1] + sums[2] + sums[3]) / (float)width;
        for (int i = 0; i < width; i++) {
            Floats v = load<Floats>(x + i * PANEL) - mean;
            squares[i % 4] += v * v;
        }
        Floats variance = (squares[0] + squares[1] + squares[2] + squares[3]) / (float)width, factor;
        for (int lane = 0; lane < LANES; lane++) factor[lane] = 1.0f / std::sqrt(variance[lane] + NORM_EPSILON);
        for (int i = 0; i < width; i++) {
            Floats normalised = (load<Floats>(x + i * PANEL) - mean) * factor;
            store(out + half + i * PANEL, normalised * norm.weight[i] + norm.bias[i]);
        }
    }
}

// The packed input of a linear layer: words, (width * bytes of a channel / 4, PANEL) for each panel, and 8-bit scales.
struct Operand {
    uint32_t* words;
    float* scale;
};

// Memory of one thread.
struct Own {
    float* values;    // (n_embd, PANEL)
    float* scores;    // (context_length, PANEL)
    uint32_t* query;  // (head_size, PANEL)
    int8_t* weights;  // (CHANNELS, 4 n_embd)
};

// Rows of a weight matrix, as `multiply` takes them.
struct Weights {
    const void* rows;
    const float* scale;
    const int32_t* sums;
};

template <int D> Weights rows_of(const Matrix& m, int channel, const Own&, float*, int32_t*) {
    return {(const char*)m.weight + (int64_t)channel * m.in * BYTES_OF<D>, nullptr, nullptr};
}

// The words of LANES channels from `channel` on, in a block of weights of which a channel takes `bytes`.
inline const char* words_of(const Matrix& m, int channel, int64_t bytes) {
    return (const char*)m.weight + channel / BLOCK * BLOCK * bytes + channel % BLOCK * 4;
}

template <> Weights rows_of<INT8>(const Matrix& m, int channel, const Own& own, float*, int32_t*) {
    for (int c = 0; c < CHANNELS; c += LANES)
        for (int first = 0; first < m.in; first += 4 * LANES) {
            const char* words = words_of(m, channel + c, m.in) + first * BLOCK;
            UInts rows[LANES];
            for (int i = 0; i < LANES; i++) rows[i] = load<UInts>(words + i * 4 * BLOCK);
            transpose(rows);
            for (int i = 0; i < LANES; i++) store(own.weights + (c + i) * m.in + first, rows[i]);
        }
    return {own.weights, m.scale + channel, m.sums + channel};
}

// 4-bit weights, one in each byte, times the factors of their channels, as 8-bit integers.
inline UInts scaled(UInts numbers, Ints factors) {
    constexpr uint32_t LOW_BYTES = 0x00ff00ffu;
    constexpr int SHIFT = 8, HALF = 1 << (SHIFT - 1);
    const Shorts both = (Shorts)(((UInts)factors & 0xffffu) | (UInts)factors << 16);
    const Shorts even = (Shorts)(numbers & LOW_BYTES) - (int16_t)INT4_ZERO;
    const Shorts odd = (Shorts)(numbers >> 8 & LOW_BYTES) - (int16_t)INT4_ZERO;
    const UInts low = (UInts)((even * both + (int16_t)HALF) >> SHIFT);
    const UInts high = (UInts)((odd * both + (int16_t)HALF) >> SHIFT);
    return (low & LOW_BYTES) | (high & LOW_BYTES) << 8;
}

// 4-bit weights become 8-bit ones, with one scale for each output channel.
template <> Weights rows_of<INT4>(const Matrix& m, int channel, const Own& own, float* scale, int32_t* sums) {
    const int groups = m.in / INT4_GROUP;
    for (int c = 0; c < CHANNELS; c += LANES) {
        const char* words = words_of(m, channel + c, m.in / 2);
        const float* group_scale = m.scale + (channel + c) / BLOCK * BLOCK * groups + (channel + c) % BLOCK;
        Floats largest = {};
        for (int g = 0; g < groups; g++) {
            const Floats s = load<Floats>(group_scale + g * BLOCK);
            largest = larger(largest, larger(s, -s));
        }
        const Floats unit = largest * (INT4_ZERO / INT8_MAX_VALUE);
        const Floats factor = largest > 0.0f ? 256.0f / unit : splat(0.0f);
        Ints total = {};
        for (int first = 0; first < m.in; first += 4 * LANES, words += 2 * LANES * BLOCK) {
            const Floats f = load<Floats>(group_scale + first / INT4_GROUP * BLOCK) * factor;
            const Ints factors = __builtin_convertvector(f + (f < 0.0f ? splat(-0.5f) : splat(0.5f)), Ints);
            UInts rows[LANES];
            for (int i = 0; i < LANES; i += 2) {
                const UInts both = load<UInts>(words + i * 2 * BLOCK);
                rows[i] = scaled(both & 0x0f0f0f0fu, factors), rows[i + 1] = scaled(both >> 4 & 0x0f0f0f0fu, factors);
                total = dot4_small(dot4_small(total, Bytes{} + 1, (Bytes)rows[i]), Bytes{} + 1, (Bytes)rows[i + 1]);
            }
            transpose(rows);
            for (int i = 0; i < LANES; i++) store(own.weights + (c + i) * m.in + first, rows[i]);
        }
        store(scale + c, unit), store(sums + c, total);
    }
    return {own.weights, scale, sums};
}

// A linear layer from output channel `first` on: use(panel, channel, values), with values (CHANNELS, PANEL).
template <int D, class Use>
void linear(const Matrix& m, const Operand& input, int panels, int first, const Own& own, Use use) {
    constexpr int E = D == INT4 ? INT8 : D;
    const int words = m.in * BYTES_OF<E> / 4;
#pragma omp for schedule(dynamic)
    for (int channel = first; channel < m.out; channel += CHANNELS) {
        alignas(64) float values[CHANNELS * PANEL];
        float scale[CHANNELS];
        int32_t sums[CHANNELS];
        const Weights weights = rows_of<D>(m, channel, own, scale, sums);
        for (int panel = 0; panel < panels; panel++) {
            multiply<E>(weights.rows, m.in * BYTES_OF<E>, input.words + (int64_t)panel * words * PANEL, words, values);
            for (int c = 0; c < CHANNELS; c++)
                for (int half = 0; half < PANEL; half += LANES) {
                    float* at = values + c * PANEL + half;
                    Floats value = load<Floats>(at);
                    if constexpr (E == INT8)
                        value = __builtin_convertvector((Ints)value - INPUT_ZERO * weights.sums[c], Floats) *
                                (weights.scale[c] * load<Floats>(input.scale + panel * PANEL + half));
                    store(at, value + (m.bias ? m.bias[channel + c] : 0.0f));
                }
            use(panel, channel, values);
        }
    }
}

constexpr uint32_t ZEROS = INPUT_ZERO * 0x01010101u;  // added to four 8-bit integers, or taken away

// Quantizes the keys (part 0) or values of one head, (head_size, PANEL), from position `first` on.
void quantize_tokens(const float* values, int tokens, int head_size, int first, int part, HeadCache<int8_t> cache,
                     const Own& own) {
    alignas(64) float scale[PANEL];
    pack<INT8>(values, head_size, own.query, scale);
    std::memcpy(cache.scale + first, scale, sizeof(float) * tokens);
    for (int i = 0; i < head_size; i += 4)
        for (int token = 0; token < tokens; token++) {
            const uint32_t word = own.query[i / 4 * PANEL + token], plain = word ^ ZEROS;
            if (part == 0) {
                std::memcpy(cache.rows + key_word(first + token, i, head_size, LANES), &word, 4);
            } else {
                int8_t* to = cache.rows + value_byte(first + token, i, head_size);
                for (int j = 0; j < 4; j++) to[4 * j] = (int8_t)(plain >> 8 * j);
            }
        }
}

// The bytes of some words as bf16, 4 LANES of them.
inline void widen(UInts words, uint16_t* out) {
    int8_t bytes[BYTES];
    store(bytes, words);
    for (int i = 0; i < BYTES; i += LANES) store_all(out + i, load_floats(bytes + i));
}

// 8-bit keys to (tokens, head_size).
void widen_keys(const int8_t* keys, int tokens, int head_size, uint16_t* out) {
    for (int first = 0; first < tokens; first += LANES)
        for (int channel = 0; channel < head_size; channel += BYTES) {
            const int words = std::min(LANES, (head_size - channel) / 4);
            UInts rows[LANES] = {};
            for (int i = 0; i < words; i++)
                rows[i] = load<UInts>(keys + key_word(first, channel + 4 * i, head_size, LANES)) ^ ZEROS;
            transpose(rows);
            for (int i = 0; i < LANES; i++) {
                alignas(64) uint16_t row[BYTES];
                widen(rows[i], row);
                std::memcpy(out + (int64_t)(first + i) * head_size + channel, row, 2 * 4 * words);
            }
        }
}

// 8-bit values to (head_size, stride), transposed. stride: a multiple of BYTES.
void widen_values(const int8_t* values, int head_size, int stride, uint16_t* out) {
    for (int first = 0; first < stride; first += BYTES)
        for (int channel = 0; channel < head_size; channel += LANES) {
            UInts rows[LANES];
            for (int i = 0; i < LANES; i++)
                rows[i] = load<UInts>(values + value_byte(first + 4 * i, channel, head_size));
            transpose(rows);
            for (int i = 0; i < LANES; i++) widen(rows[i], out + (int64_t)(channel + i) * stride + first);
        }
}

// The keys and values of one head, as products take them. keys: (tokens, head_size). values: (head_size, stride),
// transposed; finite after the last token. scales: of 8-bit ones.
template <class T> struct Head {
    const Wide<T> *keys, *values;
    const float *key_scale, *value_scale;
    int stride;
};

// Attention of the tokens of one panel to their sequence, in one head.
//
// query, out: (head_size, PANEL). first: the position of the panel's first token. length: tokens in the sequence.
template <class T>
void attend(const float* query, const Head<T>& head, int first, int length, int head_size, const Own& own, float* out) {
    constexpr int D = sizeof(T) == 4 ? FP32 : BF16;
    constexpr bool is_int8 = sizeof(T) == 1;
    const int visible = std::min(first + PANEL, length), padded = round_up(visible, CHANNELS);
    const float factor = 1.0f / std::sqrt((float)head_size);
    float* scores = own.scores;
    for (int i = 0; i < head_size * PANEL; i += LANES) store(own.values + i, load<Floats>(query + i) * factor);
    pack<D>(own.values, head_size, own.query, nullptr);
    for (int key = 0; key < padded; key += CHANNELS)  // may read beyond the last key, never beyond the cache
        multiply<D>(head.keys + key * head_size, head_size * BYTES_OF<D>, own.query, head_size * BYTES_OF<D> / 4,
                    scores + key * PANEL);
    Floats total[2];
    for (int half = 0; half < 2; half++) {
        float* s = scores + half * LANES;
        for (int key = 0; is_int8 && key < visible; key++)
            store(s + key * PANEL, load<Floats>(s + key * PANEL) * head.key_scale[key]);
        for (int key = first; key < padded; key++)
            for (int lane = 0; lane < LANES; lane++)
                if (key > first + half * LANES + lane) s[key * PANEL + lane] = -INFINITY;
        Floats largest[2] = {splat(-INFINITY), splat(-INFINITY)}, sums[2] = {};
        for (int key = 0; key < padded; key++)
            largest[key % 2] = larger(largest[key % 2], load<Floats>(s + key * PANEL));
        largest[0] = larger(largest[0], largest[1]);
        for (int key = 0; key < padded; key += 2) {  // overwrites the scores with packed probabilities
            Floats e[2];
            for (int i = 0; i < 2; i++) {
                Floats score = load<Floats>(s + (key + i) * PANEL);
                e[i] = score == -INFINITY ? splat(0.0f) : exp_of_negative(score - largest[0]);
                sums[i] += e[i];
                if (is_int8) e[i] *= key + i < visible ? head.value_scale[key + i] : 0.0f;
            }
            if constexpr (D == BF16) store(s + key / 2 * PANEL, packed_bf16(e[0], e[1]));
            else store(s + key * PANEL, e[0]), store(s + (key + 1) * PANEL, e[1]);
        }
        total[half] = sums[0] + sums[1];
    }
    for (int i = 0; i < head_size; i += CHANNELS) {
        multiply<D>(head.values + (int64_t)i * head.stride, head.stride * BYTES_OF<D>, (uint32_t*)scores,
                    padded * BYTES_OF<D> / 4, out + i * PANEL);
        for (int at = i * PANEL; at < (i + CHANNELS) * PANEL; at += LANES)
            store(out + at, load<Floats>(out + at) / total[at / LANES % 2]);
    }
}

// Memory that threads share: x the residual stream, q the queries, mixed the attention's output, hidden the MLP's, each
// (PART, width) in panels; keys and values: those of a layer, for each head as `Head` has them.
struct Shared {
    float *x, *q, *mixed, *hidden;
    Operand input;
    void *keys, *values;
};

template <class T> void embed(const Model& model, const int32_t* tokens, int position, int count, float* panel) {
    for (int lane = 0; lane < PANEL; lane++) {
        const T* token = (const T*)model.wte + (int64_t)tokens[std::min(lane, count - 1)] * model.n_embd;
        const T* at = (const T*)model.wpe + (int64_t)(position + std::min(lane, count - 1)) * model.n_embd;
        for (int i = 0; i < model.n_embd; i += LANES) {
            Floats sum = load_floats(token + i) + load_floats(at + i);
            for (int j = 0; j < LANES; j++) panel[(i + j) * PANEL + lane] = sum[j];
        }
    }
}

// Passes at most PART tokens through the model. Their keys and values are all that is left of them.
template <int D>
void process(const Model& model, const int32_t* tokens, int start, int count, void* cache, const Shared& shared,
             const Own& own) {
    typedef Cached<D> T;
    constexpr int E = D == INT4 ? INT8 : D;
    const int width = model.n_embd, heads = model.n_head, head_size = width / heads;
    const int panels = (count + PANEL - 1) / PANEL, length = start + count, stride = round_up(length, 64);
    const Operand& input = shared.input;
    auto pack_panel = [&](const float* values, int panel, int channels) {
        uint32_t* words = input.words + (int64_t)panel * channels * BYTES_OF<E> / 4 * PANEL;
        pack<E>(values, channels, words, input.scale + panel * PANEL);
    };
    auto take_normalised = [&](const Norm& norm) {
#pragma omp for schedule(static)
        for (int panel = 0; panel < panels; panel++) {
            normalise(shared.x + (int64_t)panel * width * PANEL, norm, width, own.values);
            pack_panel(own.values, panel, width);
        }
    };
    auto take = [&](const float* from, int channels) {
#pragma omp for schedule(static)
        for (int panel = 0; panel < panels; panel++)
            pack_panel(from + (int64_t)panel * channels * PANEL, panel, channels);
    };
    auto add = [&](int panel, int channel, const float* values) {
        float* x = shared.x + ((int64_t)panel * width + channel) * PANEL;
        for (int i = 0; i < CHANNELS * PANEL; i += LANES) store(x + i, load<Floats>(x + i) + load<Floats>(values + i));
    };
#pragma omp for schedule(static)
    for (int panel = 0; panel < panels; panel++) {
        const int first = panel * PANEL;
        float* x = shared.x + (int64_t)first * width;
        if (model.embedding_dtype == FP32) embed<float>(model, tokens + first, start + first, count - first, x);
        else embed<uint16_t>(model, tokens + first, start + first, count - first, x);
    }
    for (int layer = 0; layer < model.n_layer; layer++) {
        const Layer& block = model.layers[layer];
        const bool is_last = layer == model.n_layer - 1;
        take_normalised(block.norm_1);
        auto store_qkv = [&](int panel, int channel, const float* values) {
            constexpr size_t BLOCK_BYTES = sizeof(float) * CHANNELS * PANEL;
            if (channel < width) {
                std::memcpy(shared.q + ((int64_t)panel * width + channel) * PANEL, values, BLOCK_BYTES);
            } else if constexpr (sizeof(T) == 1) {  // quantized below, a head as a whole
                float* to = shared.hidden + ((int64_t)panel * 2 * width + channel - width) * PANEL;
                std::memcpy(to, values, BLOCK_BYTES);
            } else {
                const int part = channel / width - 1, within = channel % width, head = within / head_size;
                T* rows = HeadCache<T>(model, cache, layer, part, head).rows + within % head_size;
                rows += (int64_t)(start + panel * PANEL) * head_size;
                store_tokens(values, std::min(PANEL, count - panel * PANEL), rows, head_size);
            }
        };
        linear<D>(block.attention, input, panels, is_last ? width : 0, own, store_qkv);
        if constexpr (sizeof(T) == 1) {
#pragma omp for schedule(static)
            for (int task = 0; task < panels * 2 * heads; task++) {
                const int first = task / (2 * heads) * PANEL, part = task / heads % 2;
                HeadCache<T> head(model, cache, layer, part, task % heads);
                quantize_tokens(shared.hidden + (int64_t)task * head_size * PANEL, std::min(PANEL, count - first),
                                head_size, start + first, part, head, own);
            }
        }
        if (is_last) break;
#pragma omp for schedule(dynamic)
        for (int head = 0; head < heads; head++) {
            const HeadCache<T> keys(model, cache, layer, 0, head), values(model, cache, layer, 1, head);
            const int64_t at = (int64_t)head * head_size * stride;
            if constexpr (sizeof(T) == 1) {
                widen_keys(keys.rows, length, head_size, (uint16_t*)shared.keys + at);
                widen_values(values.rows, head_size, stride, (uint16_t*)shared.values + at);
            } else {
                transpose_values(values.rows, length, head_size, stride, (T*)shared.values + at);
            }
        }
#pragma omp for schedule(dynamic)
        for (int task = 0; task < panels * heads; task++) {  // the longest first
            const int panel = panels - 1 - task / heads, number = task % heads;
            const HeadCache<T> keys(model, cache, layer, 0, number), values(model, cache, layer, 1, number);
            const int64_t at = ((int64_t)panel * width + number * head_size) * PANEL;
            const int64_t in_layer = (int64_t)number * head_size * stride;
            Head<T> head{(Wide<T>*)shared.keys + in_layer, (Wide<T>*)shared.values + in_layer,
                         keys.scale, values.scale, stride};
            if constexpr (sizeof(T) != 1) head.keys = keys.rows;
            attend(shared.q + at, head, start + panel * PANEL, length, head_size, own, shared.mixed + at);
        }
        take(shared.mixed, width);
        linear<D>(block.attention_projection, input, panels, 0, own, add);
        take_normalised(block.norm_2);
        linear<D>(block.expansion, input, panels, 0, own, [&](int panel, int channel, const float* values) {
            float* hidden = shared.hidden + ((int64_t)panel * 4 * width + channel) * PANEL;
            for (int i = 0; i < CHANNELS * PANEL; i += LANES) store(hidden + i, gelu(load<Floats>(values + i)));
        });
        take(shared.hidden, 4 * width);
        linear<D>(block.projection, input, panels, 0, own, add);
    }
}

// Divides memory into aligned arrays.
struct Divider {
    char* next;
    template <class P> void take(P*& array, int64_t bytes) {
        array = (P*)next;
        next += (bytes + 63) / 64 * 64;
    }
};

Shared shared_memory(const Model& m, Divider& memory) {
    Shared shared;
    const int64_t activations = (int64_t)PART * m.n_embd * sizeof(float);
    memory.take(shared.x, activations);
    memory.take(shared.q, activations);
    memory.take(shared.mixed, activations);
    memory.take(shared.hidden, 4 * activations);
    memory.take(shared.input.words, 4 * activations);
    memory.take(shared.input.scale, PART * sizeof(float));
    const int64_t layer = (int64_t)m.n_embd * round_up(m.context_length, 64) * sizeof(float);
    memory.take(shared.keys, layer);
    memory.take(shared.values, layer);
    return shared;
}

Own own_memory(const Model& m, Divider& memory) {
    Own own;
    memory.take(own.values, (int64_t)m.n_embd * PANEL * sizeof(float));
    memory.take(own.scores, (int64_t)round_up(m.context_length, CHANNELS) * PANEL * sizeof(float));
    memory.take(own.query, (int64_t)m.n_embd * PANEL * sizeof(float));
    memory.take(own.weights, (int64_t)CHANNELS * 4 * m.n_embd);
    return own;
}

template <int D>
void process_all(const Model& model, const int32_t* tokens, int start, int count, void* cache, char* scratch,
                 int threads) {
#pragma omp parallel num_threads(threads)
    {
        Divider memory{(char*)(((uintptr_t)scratch + 63) / 64 * 64)};
        const Shared shared = shared_memory(model, memory);
        Own own;
        for (int thread = 0; thread <= omp_get_thread_num(); thread++) own = own_memory(model, memory);
#ifdef HAS_AMX
        if (USES_AMX) configure_amx(16);
#endif
        for (int done = 0; done < count; done += PART)
            process<D>(model, tokens + done, start + done, std::min(PART, count - done), cache, shared, own);
#ifdef HAS_AMX
        if (USES_AMX) _tile_release();
#endif
    }
}

typedef void (*Process)(const Model&, const int32_t*, int, int, void*, char*, int);
constexpr Process PROCESS[4] = {process_all<FP32>, process_all<BF16>, process_all<INT8>, process_all<INT4>};

}  // namespace

extern "C" {

int64_t prefill_scratch_bytes(const Model* model, int32_t threads) {
    Divider memory{nullptr};
    shared_memory(*model, memory);
    for (int thread = 0; thread < threads; thread++) own_memory(*model, memory);
    return (int64_t)memory.next + 64;
}

// Appends tokens to the `start` ones of a sequence. cache: its keys and values.
void prefill(const Model* model, const int32_t* tokens, int32_t start, int32_t count, void* cache, void* scratch,
             int32_t threads) {
    PROCESS[model->weight_dtype](*model, tokens, start, count, cache, (char*)scratch, threads);
}

}
