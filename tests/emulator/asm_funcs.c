/* Functions for test_emulator.py, using the real instructions through gcc's intrinsics and inline
 * assembly.  Compiled with -mamx-tile -mamx-int8 -mavxvnni. */
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Asks Linux for the tile registers; only matters (and only succeeds) on a CPU that has AMX. */
void request_amx(void) { syscall(SYS_arch_prctl, 0x1023, 18); }

struct config {
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
};

/* gcc 12's _tile_loadconfig tells the compiler that 8 bytes are read, not 64: stores to the rest of a
 * local configuration would be dropped. */
static void load_tile_config(const void *p) {
  __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])p));
}

static void shape(struct config *c, int t, int rows, int colsb) {
  c->rows[t] = (uint8_t)rows;
  c->colsb[t] = (uint16_t)colsb;
}

/* c += a * b on tiles 0, 1, 2; m x k bytes times k/4 x 4n bytes.  signs: bit 1 for a, bit 0 for b. */
void dot(int32_t *c, const uint8_t *a, const uint8_t *b, int m, int n, int k, int signs) {
  struct config cfg = {.palette = 1};
  shape(&cfg, 0, m, 4 * n);
  shape(&cfg, 1, m, k);
  shape(&cfg, 2, k / 4, 4 * n);
  load_tile_config(&cfg);
  _tile_loadd(0, c, 4 * n);
  _tile_loadd(1, a, k);
  _tile_stream_loadd(2, b, 4 * n);
  switch (signs) {
    case 0: _tile_dpbuud(0, 1, 2); break;
    case 1: _tile_dpbusd(0, 1, 2); break;
    case 2: _tile_dpbsud(0, 1, 2); break;
    default: _tile_dpbssd(0, 1, 2); break;
  }
  _tile_stored(0, c, 4 * n);
  _tile_release();
}

/* Like dot with full 16x16x64 tiles and all eight tile registers, repeatedly: for speed. */
void dot_many(int32_t *c, const uint8_t *a, const uint8_t *b, int times) {
  struct config cfg = {.palette = 1};
  for (int t = 0; t < 8; ++t) shape(&cfg, t, 16, 64);
  load_tile_config(&cfg);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, a, 64);
  _tile_loadd(5, a, 64);
  _tile_loadd(6, b, 64);
  _tile_loadd(7, b, 64);
  for (int i = 0; i < times; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
  _tile_release();
}

/* Loads and stores a rows x colsb tile; what lies beyond it in out must stay as it was. */
void copy_tile(uint8_t *out, int64_t out_stride, const uint8_t *in, int64_t in_stride, int rows,
               int colsb) {
  struct config cfg = {.palette = 1};
  shape(&cfg, 3, rows, colsb);
  load_tile_config(&cfg);
  _tile_loadd(3, in, in_stride);
  _tile_stored(3, out, out_stride);
  _tile_release();
}

/* Round trip of a configuration. */
void config_round_trip(const uint8_t *in, uint8_t *out) {
  load_tile_config(in);
  _tile_storeconfig(out);
  _tile_release();
}

void store_config_after_release(uint8_t *out) {
  _tile_release();
  _tile_storeconfig(out);
}

/* The addressing forms: each loads an 16x64 tile from in with stride 64 and stores it to out.
 * `in` and `out` are pinned to the registers that select another encoding. */
static const struct config full7 = {
    .palette = 1, .colsb = {0, 0, 0, 0, 0, 0, 0, 64}, .rows = {0, 0, 0, 0, 0, 0, 0, 16}};

#define FORM(name, load, store, in_reg, in_off, idx_reg, idx, out_reg)             \
  void name(uint8_t *out, const uint8_t *in) {                                     \
    register uint64_t i_ __asm__(in_reg) = (uint64_t)in - (uint64_t)(in_off);      \
    register uint64_t x_ __asm__(idx_reg) = (uint64_t)(idx);                       \
    register uint64_t o_ __asm__(out_reg) = (uint64_t)out;                         \
    load_tile_config(&full7);                                                      \
    __asm__ volatile(load "\n\t" store : : "r"(i_), "r"(x_), "r"(o_) : "memory"); \
    _tile_release();                                                               \
  }
FORM(form_plain, "tileloadd (%0,%1,1), %%tmm7", "tilestored %%tmm7, (%2,%1,1)", "rax", 0, "rcx", 64,
     "rdx")
FORM(form_scale2_disp8, "tileloadd 16(%0,%1,2), %%tmm7", "tilestored %%tmm7, (%2,%1,2)", "rbx", 16,
     "rsi", 32, "rdi")
FORM(form_scale4_negative_disp8, "tileloaddt1 -128(%0,%1,4), %%tmm7",
     "tilestored %%tmm7, (%2,%1,4)", "r8", -128, "r9", 16, "r10")
FORM(form_scale8_disp32, "tileloadd 4096(%0,%1,8), %%tmm7", "tilestored %%tmm7, (%2,%1,8)", "r11",
     4096, "r14", 8, "r15")
FORM(form_negative_disp32, "tileloadd -70000(%0,%1,1), %%tmm7", "tilestored %%tmm7, (%2,%1,1)",
     "rax", -70000, "r12", 64, "rdx")
/* r12 as base has the low bits of rsp and r13 those of rbp: both have special encodings */
FORM(form_r12_base, "tileloadd (%0,%1,1), %%tmm7", "tilestored %%tmm7, (%2,%1,1)", "r12", 0, "rcx",
     64, "r13")
FORM(form_r13_base, "tileloadd (%0,%1,1), %%tmm7", "tilestored %%tmm7, (%2,%1,1)", "r13", 0, "r8",
     64, "r9")
/* no index register: the stride is 0 and all rows are the first one */
FORM(form_no_index, "tileloadd (%0), %%tmm7", "tilestored %%tmm7, (%2,%1,1)", "rax", 0, "rcx", 64,
     "rdx")

/* rsp as base; the frame's copy is inside the red-zone-free area reserved here. */
void form_rsp_base(uint8_t *out, const uint8_t *in) {
  load_tile_config(&full7);
  __asm__ volatile(
      "mov %%rsp, %%rbx\n\t"
      "sub $1280, %%rsp\n\t"
      "and $-64, %%rsp\n\t"
      "lea 64(%%rsp), %%rdi\n\t"
      "mov $1024, %%ecx\n\t"
      "rep movsb\n\t"
      "mov $64, %%ecx\n\t"
      "tileloadd 64(%%rsp,%%rcx,1), %%tmm7\n\t"
      "mov %%rbx, %%rsp\n\t"
      "tilestored %%tmm7, (%%rdx,%%rcx,1)\n\t"
      : "+S"(in)
      : "d"(out)
      : "rbx", "rcx", "rdi", "memory", "cc");
  _tile_release();
}

/* ldtilecfg with rip-relative, disp8 and SIB operands. */
static const struct config rip_config = {.palette = 1, .colsb = {64}, .rows = {16}};
void config_forms(uint8_t *out) {
  uint64_t base = (uint64_t)&rip_config - 8;
  uint64_t index = 2;
  __asm__ volatile(
      "ldtilecfg %3\n\t"
      "sttilecfg (%0)\n\t"
      "tilerelease\n\t"
      "ldtilecfg 8(%1)\n\t"
      "sttilecfg 64(%0)\n\t"
      "tilerelease\n\t"
      "ldtilecfg -8(%1,%2,8)\n\t"
      "sttilecfg 128(%0)\n\t"
      "tilerelease"
      :
      : "r"(out), "r"(base), "r"(index), "m"(rip_config)
      : "memory");
}

/* ---- AVX-VNNI.  256-bit values come as unaligned memory. */

static __m256i load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

void vnni(uint8_t *c, const uint8_t *a, const uint8_t *b, int op, int bits) {
  __m256i x = load(c), y = load(a), z = load(b);
  if (bits == 256) {
    switch (op) {
      case 0: x = _mm256_dpbusd_avx_epi32(x, y, z); break;
      case 1: x = _mm256_dpbusds_avx_epi32(x, y, z); break;
      case 2: x = _mm256_dpwssd_avx_epi32(x, y, z); break;
      default: x = _mm256_dpwssds_avx_epi32(x, y, z); break;
    }
  } else {
    __m128i u = _mm256_castsi256_si128(x), v = _mm256_castsi256_si128(y),
            w = _mm256_castsi256_si128(z);
    switch (op) {
      case 0: u = _mm_dpbusd_avx_epi32(u, v, w); break;
      case 1: u = _mm_dpbusds_avx_epi32(u, v, w); break;
      case 2: u = _mm_dpwssd_avx_epi32(u, v, w); break;
      default: u = _mm_dpwssds_avx_epi32(u, v, w); break;
    }
    x = _mm256_zextsi128_si256(u);
  }
  _mm256_storeu_si256((__m256i *)c, x);
}

/* One vpdpbusd per choice of registers, low and high (8 to 15), and of memory operand. */
#define VNNI_FORM(name, d, s, t, insn)                                             \
  void name(uint8_t *c, const uint8_t *a, const uint8_t *b) {                      \
    __asm__ volatile("vmovdqu (%0), %%ymm" d "\n\t"                                \
                     "vmovdqu (%1), %%ymm" s "\n\t"                                \
                     "vmovdqu (%2), %%ymm" t "\n\t" insn "\n\t"                    \
                     "vmovdqu %%ymm" d ", (%0)\n\tvzeroupper"                      \
                     :                                                             \
                     : "r"(c), "r"(a), "r"(b), "r"((const char *)b - 1000),        \
                       "r"((uint64_t)125)                                          \
                     : "memory", "xmm" d, "xmm" s, "xmm" t);                       \
  }
VNNI_FORM(vnni_ymm_low, "1", "2", "3", "%{vex%} vpdpbusd %%ymm3, %%ymm2, %%ymm1")
VNNI_FORM(vnni_ymm_high_dst, "9", "2", "3", "%{vex%} vpdpbusd %%ymm3, %%ymm2, %%ymm9")
VNNI_FORM(vnni_ymm_high_all, "15", "8", "12", "%{vex%} vpdpbusd %%ymm12, %%ymm8, %%ymm15")
VNNI_FORM(vnni_ymm_memory, "11", "10", "0", "%{vex%} vpdpbusd (%2), %%ymm10, %%ymm11")
VNNI_FORM(vnni_ymm_memory_disp32, "4", "5", "0", "%{vex%} vpdpbusd 1000(%3), %%ymm5, %%ymm4")
VNNI_FORM(vnni_ymm_memory_sib, "4", "13", "0", "%{vex%} vpdpbusd (%3,%4,8), %%ymm13, %%ymm4")
VNNI_FORM(vnni_xmm_low, "1", "2", "3", "%{vex%} vpdpbusd %%xmm3, %%xmm2, %%xmm1")
VNNI_FORM(vnni_xmm_high_all, "14", "9", "13", "%{vex%} vpdpbusd %%xmm13, %%xmm9, %%xmm14")
VNNI_FORM(vnni_xmm_memory, "8", "7", "0", "%{vex%} vpdpbusd (%2), %%xmm7, %%xmm8")

/* The ymm high halves are in their initial state (after vzeroall) when the instruction traps: an xmm
 * result must then have zeros above it, a ymm one the sum of the memory operand with them. */
void vnni_from_init_state(uint8_t *c, const uint8_t *b) {
  __asm__ volatile(
      "vzeroall\n\t"
      "vpcmpeqd %%xmm2, %%xmm2, %%xmm2\n\t" /* xmm2 = all ones: 255 in each unsigned byte */
      "%{vex%} vpdpbusd (%1), %%ymm2, %%ymm1\n\t"
      "vmovdqu %%ymm1, (%0)\n\tvzeroupper"
      :
      : "r"(c), "r"(b)
      : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
        "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

/* All sixteen ymm registers and rflags survive a trap, except the destination.  out: 16 x 32. */
void vnni_preserves(uint8_t *out, const uint8_t *in) {
  __asm__ volatile(
      ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\t"
      "vmovdqu 32*\\n(%1), %%ymm\\n\n\t"
      ".endr\n\t"
      "%{vex%} vpdpbusd %%ymm3, %%ymm2, %%ymm9\n\t"
      ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\t"
      "vmovdqu %%ymm\\n, 32*\\n(%0)\n\t"
      ".endr\n\tvzeroupper"
      :
      : "r"(out), "r"(in)
      : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
        "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

/* A run with broadcasts in it, into low and high, ymm and xmm registers. */
void vnni_run(uint8_t *c, const uint8_t *a, const uint8_t *b) {
  __asm__ volatile(
      "vmovdqu (%0), %%ymm1\n\t"
      "vmovdqu (%2), %%ymm9\n\t"
      "vpcmpeqd %%ymm3, %%ymm3, %%ymm3\n\t"
      "vpbroadcastd (%1), %%ymm2\n\t"
      "%{vex%} vpdpbusd %%ymm9, %%ymm2, %%ymm1\n\t"
      "vpbroadcastd 8(%1), %%ymm12\n\t"
      "%{vex%} vpdpbusd %%ymm9, %%ymm12, %%ymm1\n\t"
      "vpbroadcastd -4(%1,%3,8), %%xmm3\n\t"
      "%{vex%} vpdpbusd %%ymm9, %%ymm3, %%ymm1\n\t"
      "vmovdqu %%ymm1, (%0)\n\tvzeroupper"
      :
      : "r"(c), "r"(a), "r"(b), "r"((uint64_t)3)
      : "memory", "xmm1", "xmm2", "xmm3", "xmm9", "xmm12");
}

/* ---- misuse */

void bad_no_config(int32_t *c) {
  _tile_release();
  _tile_loadd(0, c, 64);
}

void bad_shape(int32_t *c, int m0, int n0, int m1, int k1, int k2, int n2) {
  struct config cfg = {.palette = 1};
  shape(&cfg, 0, m0, n0);
  shape(&cfg, 1, m1, k1);
  shape(&cfg, 2, k2, n2);
  load_tile_config(&cfg);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_dpbusd(0, 1, 2);
  _tile_stored(0, c, 64);
}

void bad_same_tile(int32_t *c) {
  struct config cfg = {.palette = 1};
  shape(&cfg, 0, 16, 64);
  shape(&cfg, 1, 16, 64);
  load_tile_config(&cfg);
  __asm__ volatile(".byte 0xc4, 0xe2, 0x71, 0x5e, 0xc1"); /* tdpbusd tmm0, tmm1, tmm1: not assembled */
  _tile_stored(0, c, 64);
}

void bad_unconfigured_tile(void) {
  struct config cfg = {.palette = 1};
  shape(&cfg, 0, 16, 64);
  load_tile_config(&cfg);
  _tile_zero(5);
}

void really_illegal(void) { __asm__ volatile("ud2"); }
