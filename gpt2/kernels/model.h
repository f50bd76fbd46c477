// A model as Python passes it (gpt2/kernels/decoder.py has the same structures), and how its numbers are stored.

#pragma once

#include <cstdint>
#include <type_traits>

enum DType : int32_t { FP32, BF16, INT8, INT4 };

// Keys and values: fp32 if the weights are, otherwise bf16.
template <int D> using Cached = std::conditional_t<D == FP32, float, uint16_t>;

constexpr int INT4_BLOCK = 128;  // 4-bit weights that are packed together
constexpr int INT4_ZERO = 8;     // their zero point

extern "C" {

struct Matrix {           // a linear layer
    const void* weight;   // (out, in); 4-bit: (out, in / 2), in blocks of 128 inputs, first halves in the low bits
    const float* scale;   // 8-bit: (out); 4-bit: (out, in / group), with a group of at least 64
    const int32_t* sums;  // 8-bit: (out): the sum of a channel's weights
    const float* bias;    // (out) or null
    int32_t out, in, group;
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
    void* cache;  // of its sequence: (n_layer, 2, n_head, context_length, head_size)
};

}
