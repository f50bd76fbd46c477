// AMX: products of tiles, of 16 rows of 64 bytes.

#pragma once

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VNNI__) && defined(__linux__)
#define HAS_AMX
#include <cstdint>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef HAS_AMX
constexpr int STEP = 64;  // bytes of a row that are multiplied at once

// Whether the system lets this process use AMX.
bool may_use_amx() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
const bool USES_AMX = may_use_amx();

// Tiles 0 to 5 get this many rows, for results and first operands; 6 and 7 get 16, for second operands.
void configure_amx(int rows) {
    struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } tiles;
    for (int i = 0; i < 8; i++) tiles.bytes[i] = STEP, tiles.rows[i] = (uint8_t)(i < 6 ? rows : 16);
    _tile_loadconfig(&tiles);
}
#else
constexpr bool USES_AMX = false;
#endif

}  // namespace
