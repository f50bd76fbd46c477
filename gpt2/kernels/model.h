// A model as Python passes it (gpt2/kernels/compiled.py has the same structures), and how its numbers are stored.

#pragma once

#include <cstdint>
#include <type_traits>

enum DType : int32_t { FP32, BF16, INT8, INT4 };

constexpr int BLOCK = 16;       // channels of 8-bit and 4-bit weights that lie together
constexpr int INT4_ZERO = 8;    // zero point of 4-bit weights
constexpr int INT4_GROUP = 64;  // inputs with one scale

extern "C" {

// A linear layer. 8-bit and 4-bit weights lie in blocks, as gpt2/kernels/blocks.py describes: blocks = out / BLOCK,
// rounded up.
struct Matrix {
    const void* weight;   // fp32, bf16: (out, in); 8-bit: (blocks, in / 4, BLOCK, 4); 4-bit: (blocks, in / 8, BLOCK, 4)
    const float* scale;   // 8-bit: (blocks, BLOCK); 4-bit: (blocks, in / INT4_GROUP, BLOCK)
    const int32_t* sums;  // 8-bit: (blocks, BLOCK): the sum of a channel's weights
    const float* bias;    // (out) or null
    int32_t out, in;
};

struct Norm { const float *weight, *bias; };

struct Layer {
    Norm norm_1;
    Matrix attention, attention_projection;
    Norm norm_2;
    Matrix expansion, projection;
};

struct Model {
    int32_t weight_dtype, embedding_dtype;
    int32_t n_layer, n_head, n_embd, vocab_size, context_length;
    const void *wte, *wpe;
    const Layer* layers;
    Norm norm;
    Matrix head;
};

struct Row {
    int32_t token, position;
    void* cache;  // of its sequence: see HeadCache
};

}

// Keys and values: fp32 if the weights are, bf16 for bf16. For weights of fewer bits, 8-bit integers with one scale for
// each token in each head.
template <int D>
using Cached = std::conditional_t<D == FP32, float, std::conditional_t<D == BF16, uint16_t, int8_t>>;

// The keys (part 0) or values (part 1) of one head; a sequence's cache is (n_layer, 2, n_head) of these.
//
// rows: (context_length, head_size). 8-bit ones lie as the instructions for four products at once want them: keys as
// words of four channels, (tokens / LANES, head_size / 4, LANES), with the zero point of unsigned inputs; values as
// words of four tokens, (tokens / 4, head_size). scale: of 8-bit ones, (tokens).
template <class T> struct HeadCache {
    T* rows;
    float* scale;

    static constexpr bool is_int8 = sizeof(T) == 1;
    static int64_t padded(int64_t value) { return (value + 63) / 64 * 64; }
    static int64_t tokens(const Model& m) { return is_int8 ? padded(m.context_length) : m.context_length; }
    static int64_t rows_bytes(const Model& m) { return padded(tokens(m) * (m.n_embd / m.n_head) * sizeof(T)); }
    static int64_t bytes(const Model& m) { return rows_bytes(m) + (is_int8 ? tokens(m) * sizeof(float) : 0); }

    HeadCache(const Model& m, void* sequence, int layer, int part, int head) {
        char* start = (char*)sequence + (((int64_t)layer * 2 + part) * m.n_head + head) * bytes(m);
        rows = (T*)start, scale = (float*)(start + rows_bytes(m));
    }
};

// Offsets of channels in 8-bit keys and values.
inline int64_t key_word(int token, int channel, int head_size, int lanes) {
    return ((int64_t)(token / lanes * (head_size / 4) + channel / 4) * lanes + token % lanes) * 4;
}
inline int64_t value_byte(int token, int channel, int head_size) {
    return ((int64_t)token / 4 * head_size + channel) * 4 + token % 4;
}
