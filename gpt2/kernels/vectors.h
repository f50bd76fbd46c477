// Vectors: GCC's and Clang's vector extensions. Only the products of 8-bit integers have code for each instruction set.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif
constexpr int BYTES = VECTOR_BYTES;  // 8-bit values in a vector
constexpr int LANES = BYTES / 4;     // 32-bit values in a vector
constexpr int UINT8_ZERO = 128;      // zero point of unsigned inputs
constexpr float INT8_MAX_VALUE = 127.0f;
constexpr float SMALLEST = 1e-35f;  // a row of smaller values is zero
constexpr float NORM_EPSILON = 1e-5f;

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t UInts __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint8_t Bytes __attribute__((vector_size(VECTOR_BYTES)));
typedef float Four __attribute__((vector_size(16)));
typedef uint8_t LaneBytes __attribute__((vector_size(VECTOR_BYTES / 4)));

template <class V, class T> inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}
template <class V, class T> inline void store(T* to, V v) { std::memcpy(to, &v, sizeof(V)); }

// Asks for the cache line of an address, which need not exist. The processor's own prefetching stops at pages.
template <class T> inline void fetch_ahead(const T* address) { __builtin_prefetch(address); }

inline Floats splat(float x) { return Floats{} + x; }

// a b + c, always rounded in the same way: what the compiler makes of the formula depends on what is around it.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if VECTOR_BYTES == 64
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline Floats load_floats(const float* from) { return load<Floats>(from); }
inline Floats load_floats(const uint16_t* from) {  // bf16
    return (Floats)(__builtin_convertvector(load<Halves>(from), UInts) << 16);
}
inline Floats load_floats(const int8_t* from) {
#if VECTOR_BYTES == 64
    Ints whole = (Ints)_mm512_cvtepi8_epi32(load<__m128i>(from));
#elif defined(__AVX2__)
    Ints whole = (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    typedef int8_t LaneInts __attribute__((vector_size(LANES)));
    Ints whole = __builtin_convertvector(load<LaneInts>(from), Ints);
#endif
    return __builtin_convertvector(whole, Floats);
}
inline void store_floats(float* to, Four v) { store(to, v); }
inline void store_floats(uint16_t* to, Four v) {  // rounds to the nearest, ties to even
    typedef uint32_t FourUInts __attribute__((vector_size(16)));
    typedef uint16_t FourHalves __attribute__((vector_size(8)));
    FourUInts bits = (FourUInts)v;
    store(to, __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, FourHalves));
}

// Sums of the lanes of vectors, always in the same order.
template <class V> inline auto four_lanes(V v) {
#if VECTOR_BYTES == 64
    auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    auto eight = v;
#endif
    return __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
}
template <class V> inline auto sum_lanes(V v) {
    auto four = four_lanes(v);
    return (four[0] + four[2]) + (four[1] + four[3]);
}
template <class V> inline auto sum_lanes(V v0, V v1, V v2, V v3) {  // of four vectors
    auto a = four_lanes(v0), b = four_lanes(v1), c = four_lanes(v2), d = four_lanes(v3);
    auto ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    auto cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

inline float max_lanes(Floats v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

template <class V> inline V larger(V a, V b) { return a > b ? a : b; }

// e^x to about one unit in the last place, for x <= 0 (Cody and Waite's reduction, then a polynomial).
template <class V> inline V exp_of_negative(V x) {
    typedef decltype(x > x) Whole;
    x = larger(x, V{} - 87.0f);
    V n = x * 1.44269504f;
    Whole whole = __builtin_convertvector(n - 0.5f, Whole);  // truncates: the nearest integer of a negative number
    n = __builtin_convertvector(whole, V);
    V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (V)((whole + 127) << 23);
}

// The tanh approximation of GELU: 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class V> inline V gelu(V x) {
    V u = 1.59576912f * (x + 0.044715f * x * x * x);
    V e = exp_of_negative(u > 0.0f ? -u : u);  // sigmoid(-|2u|) = e / (1 + e)
    return x * (u > 0.0f ? V{} + 1.0f : e) / (1.0f + e);
}

// acc + the products of 4 neighbouring pairs in each 32-bit lane. dot4: of inputs, with zero point INPUT_ZERO, and
// signed weights. dot4_small: of unsigned a, at most 127, and signed b.
#if defined(__AVX512VNNI__)
constexpr int INPUT_ZERO = UINT8_ZERO;
inline Ints dot4(Ints acc, Bytes input, Bytes weight) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)input, (__m512i)weight);
}
inline Ints dot4_small(Ints acc, Bytes a, Bytes b) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__) && VECTOR_BYTES == 32
constexpr int INPUT_ZERO = 0;
inline Ints dot4_small(Ints acc, Bytes a, Bytes b) {
#if defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#else
    __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
    return acc + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}
// |weight| <= 127 times input with the sign of both: two products fit 16 bits, which 255 * 127 would not
inline Ints dot4(Ints acc, Bytes input, Bytes weight) {
    __m256i w = (__m256i)weight;
    return dot4_small(acc, (Bytes)_mm256_sign_epi8(w, w), (Bytes)_mm256_sign_epi8((__m256i)input, w));
}
#else
constexpr int INPUT_ZERO = 0;
inline Ints dot4(Ints acc, Bytes input, Bytes weight) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) acc[i] += (int8_t)input[4 * i + j] * (int8_t)weight[4 * i + j];
    return acc;
}
inline Ints dot4_small(Ints acc, Bytes a, Bytes b) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) acc[i] += a[4 * i + j] * (int8_t)b[4 * i + j];
    return acc;
}
#endif

}  // namespace
