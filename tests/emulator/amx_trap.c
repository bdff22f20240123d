/* SIGILL-trap emulator for AMX (int8 tiles) and AVX-VNNI.
 *
 * Purpose: execute kernels compiled for those ISAs, bit-exactly, on a CPU that lacks them.  The CPU
 * raises #UD for every such instruction, Linux delivers SIGILL, and the handler below decodes the
 * instruction from memory, performs it on the interrupted thread's registers (the signal frame) and
 * on real memory, and continues after it.  On a CPU that has the ISA nothing traps.
 *
 * Misuse that hardware answers with #UD or #GP (no tile configuration, shapes that do not fit, an
 * invalid configuration) ends the process with a message on stderr, so a wrong kernel fails its test.
 *
 * Only what a signal handler may do is done here: no malloc, no stdio, TLS is initial-exec.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <immintrin.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the SIGILL emulator is for x86-64 Linux only"
#endif

/* ---------------------------------------------------------------- counters and settings */

enum feature { FEATURE_AMX = 1, FEATURE_AVXVNNI = 2 };

enum op {
  OP_LDTILECFG,
  OP_STTILECFG,
  OP_TILERELEASE,
  OP_TILEZERO,
  OP_TILELOADD,
  OP_TILELOADDT1,
  OP_TILESTORED,
  OP_TDPBUUD, /* the four tdp* are ordered by VEX.pp: none, 66, F3, F2 */
  OP_TDPBUSD,
  OP_TDPBSUD,
  OP_TDPBSSD,
  OP_VPDPBUSD, /* the four vpdp* are ordered by opcode 50..53 */
  OP_VPDPBUSDS,
  OP_VPDPWSSD,
  OP_VPDPWSSDS,
  OP_COUNT,
  /* Not an emulated ISA: AVX2's memory form, done along with its neighbours (see on_sigill). */
  OP_VPBROADCASTD = OP_COUNT,
  OP_UNKNOWN
};

static const char *const op_names[OP_UNKNOWN] = {
    "ldtilecfg",  "sttilecfg", "tilerelease", "tilezero", "tileloadd",
    "tileloaddt1", "tilestored", "tdpbuud",   "tdpbusd",  "tdpbsud",
    "tdpbssd",    "vpdpbusd",  "vpdpbusds",   "vpdpwssd", "vpdpwssds",
    "vpbroadcastd"};

static uint64_t op_counts[OP_COUNT]; /* instructions emulated */
static uint64_t trap_count;          /* signals taken; below the sum, see on_sigill */
static unsigned enabled_features;
static bool trace;
static struct sigaction previous;

/* ---------------------------------------------------------------- fatal errors */

static void put(const char *text) {
  ssize_t ignored = write(STDERR_FILENO, text, strlen(text));
  (void)ignored;
}

static void put_number(uint64_t value, unsigned base) {
  char buffer[24];
  char *p = buffer + sizeof buffer - 1;
  *p = 0;
  do {
    *--p = "0123456789abcdef"[value % base];
    value /= base;
  } while (value);
  put(base == 16 ? "0x" : "");
  put(p);
}

struct term {
  const char *name;
  uint64_t value;
};

#define FAULT(op, what, ...)                                                    \
  do {                                                                          \
    const struct term terms_[] = {__VA_ARGS__};                                 \
    fault((op), (what), terms_, sizeof terms_ / sizeof terms_[0]);              \
  } while (0)

static __thread uint64_t current_rip __attribute__((tls_model("initial-exec")));

static _Noreturn void fault(enum op op, const char *what, const struct term *terms, size_t n) {
  put("isa emulator: ");
  put(op_names[op]);
  put(": ");
  put(what);
  for (size_t i = 0; i < n; ++i) {
    put(i ? ", " : " (");
    put(terms[i].name);
    put("=");
    put_number(terms[i].value, 10);
  }
  put(n ? ") at rip " : " at rip ");
  put_number(current_rip, 16);
  put("\n");
  abort();
}

/* ---------------------------------------------------------------- tile state */

enum { TILES = 8, MAX_ROWS = 16, MAX_COLSB = 64 };

struct tile_state {
  _Alignas(64) uint8_t data[TILES][MAX_ROWS][MAX_COLSB];
  uint8_t config[64]; /* as loaded; all zero when not configured */
  uint8_t rows[TILES];
  uint8_t colsb[TILES];
  bool configured;
};

/* Only a pointer lives in TLS: a library opened at run time gets initial-exec TLS from a small
 * surplus that 8 KiB of tiles would exhaust.  The mapping is never freed; it is 12 KiB per thread
 * that ever ran a tile instruction. */
static __thread struct tile_state *thread_tiles __attribute__((tls_model("initial-exec")));

static struct tile_state *tiles(void) {
  if (!thread_tiles) {
    void *p = mmap(NULL, sizeof(struct tile_state), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
      put("isa emulator: no memory for tile state\n");
      abort();
    }
    thread_tiles = p;
  }
  return thread_tiles;
}

static void load_config(struct tile_state *s, const uint8_t *source) {
  uint8_t c[64];
  memcpy(c, source, sizeof c);
  if (c[0] > 1) FAULT(OP_LDTILECFG, "unknown palette", {"palette", c[0]});
  if (c[0] == 0) { /* palette 0 releases the tiles */
    memset(s, 0, sizeof *s);
    return;
  }
  if (c[1] != 0) FAULT(OP_LDTILECFG, "start_row is not emulated", {"start_row", c[1]});
  for (unsigned i = 2; i < 64; ++i) {
    bool reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
    if (reserved && c[i]) FAULT(OP_LDTILECFG, "reserved byte is not zero", {"byte", i});
  }
  memset(s, 0, sizeof *s);
  for (unsigned t = 0; t < TILES; ++t) {
    unsigned colsb = c[16 + 2 * t] | (unsigned)c[17 + 2 * t] << 8;
    unsigned rows = c[48 + t];
    if (rows > MAX_ROWS || colsb > MAX_COLSB || (rows == 0) != (colsb == 0))
      FAULT(OP_LDTILECFG, "invalid tile shape", {"tile", t}, {"rows", rows}, {"colsb", colsb});
    s->rows[t] = (uint8_t)rows;
    s->colsb[t] = (uint8_t)colsb;
  }
  memcpy(s->config, c, sizeof c);
  s->configured = true;
}

static void require_tile(const struct tile_state *s, enum op op, unsigned t) {
  if (!s->configured) FAULT(op, "no tile configuration is loaded", {"tile", t});
  if (t >= TILES || s->rows[t] == 0) FAULT(op, "tile is not configured", {"tile", t});
}

/* For loads and stores, whose tiles hold whole 32-bit elements. */
static void require_dword_tile(const struct tile_state *s, enum op op, unsigned t) {
  require_tile(s, op, t);
  if (s->colsb[t] % 4)
    FAULT(op, "colsb is not a multiple of 4", {"tile", t}, {"colsb", s->colsb[t]});
}

static void tile_load(struct tile_state *s, enum op op, unsigned t, uint64_t base, uint64_t stride) {
  require_dword_tile(s, op, t);
  memset(s->data[t], 0, sizeof s->data[t]);
  for (unsigned r = 0; r < s->rows[t]; ++r)
    memcpy(s->data[t][r], (const void *)(base + r * stride), s->colsb[t]);
}

static void tile_store(struct tile_state *s, unsigned t, uint64_t base, uint64_t stride) {
  require_dword_tile(s, OP_TILESTORED, t);
  for (unsigned r = 0; r < s->rows[t]; ++r)
    memcpy((void *)(base + r * stride), s->data[t][r], s->colsb[t]);
}

/* Widens 16 bytes to 16 int16. */
static inline __m256i widen(const uint8_t *bytes, bool is_signed) {
  __m128i v = _mm_loadu_si128((const __m128i *)bytes);
  return is_signed ? _mm256_cvtepi8_epi16(v) : _mm256_cvtepu8_epi16(v);
}

/* Splits one 64-byte row of 16 groups of 4 bytes into int16 pairs: lo[g] = bytes 0 and 1 of group g,
 * hi[g] = bytes 2 and 3, which is what vpmaddwd wants. */
static void split_row(const uint8_t *row, bool is_signed, int32_t lo[16], int32_t hi[16]) {
  for (unsigned half = 0; half < 2; ++half) {
    __m256 a = _mm256_castsi256_ps(widen(row + 32 * half, is_signed));
    __m256 b = _mm256_castsi256_ps(widen(row + 32 * half + 16, is_signed));
    /* shuffle_ps works per 128-bit lane; the permute puts the groups back in order */
    __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
    __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD));
    _mm256_storeu_si256((__m256i *)(lo + 8 * half), _mm256_permute4x64_epi64(even, 0xD8));
    _mm256_storeu_si256((__m256i *)(hi + 8 * half), _mm256_permute4x64_epi64(odd, 0xD8));
  }
}

static void check_dot_shapes(const struct tile_state *s, enum op op, unsigned c, unsigned a,
                             unsigned b) {
  require_tile(s, op, c);
  require_tile(s, op, a);
  require_tile(s, op, b);
  if (c == a || c == b || a == b)
    FAULT(op, "the three tiles must differ", {"dst", c}, {"a", a}, {"b", b});
  if (s->colsb[c] % 4 || s->colsb[a] % 4 || s->colsb[b] % 4)
    FAULT(op, "colsb is not a multiple of 4", {"dst.colsb", s->colsb[c]}, {"a.colsb", s->colsb[a]},
          {"b.colsb", s->colsb[b]});
  if (s->rows[c] != s->rows[a] || s->colsb[a] != 4 * s->rows[b] || s->colsb[c] != s->colsb[b])
    FAULT(op, "tile shapes do not match", {"dst.rows", s->rows[c]}, {"dst.colsb", s->colsb[c]},
          {"a.rows", s->rows[a]}, {"a.colsb", s->colsb[a]}, {"b.rows", s->rows[b]},
          {"b.colsb", s->colsb[b]});
}

/* dst[m][n] += sum over k, i of a[m][4k+i] * b[k][4n+i], modulo 2^32.  Unused parts of a tile are
 * always zero, so whole 16-column rows are computed and the parts beyond stay zero. */
static void tile_dot(struct tile_state *s, enum op op, unsigned c, unsigned a, unsigned b) {
  bool a_signed = op == OP_TDPBSUD || op == OP_TDPBSSD;
  bool b_signed = op == OP_TDPBUSD || op == OP_TDPBSSD;
  check_dot_shapes(s, op, c, a, b);
  int32_t blo[MAX_ROWS][16], bhi[MAX_ROWS][16];
  unsigned depth = s->rows[b];
  for (unsigned k = 0; k < depth; ++k) split_row(s->data[b][k], b_signed, blo[k], bhi[k]);
  for (unsigned m = 0; m < s->rows[c]; ++m) {
    int32_t alo[16], ahi[16];
    split_row(s->data[a][m], a_signed, alo, ahi);
    __m256i *out = (__m256i *)s->data[c][m];
    __m256i acc0 = _mm256_load_si256(out), acc1 = _mm256_load_si256(out + 1);
    for (unsigned k = 0; k < depth; ++k) {
      __m256i lo = _mm256_set1_epi32(alo[k]), hi = _mm256_set1_epi32(ahi[k]);
      const __m256i *bl = (const __m256i *)blo[k], *bh = (const __m256i *)bhi[k];
      acc0 = _mm256_add_epi32(acc0, _mm256_madd_epi16(lo, _mm256_loadu_si256(bl)));
      acc1 = _mm256_add_epi32(acc1, _mm256_madd_epi16(lo, _mm256_loadu_si256(bl + 1)));
      acc0 = _mm256_add_epi32(acc0, _mm256_madd_epi16(hi, _mm256_loadu_si256(bh)));
      acc1 = _mm256_add_epi32(acc1, _mm256_madd_epi16(hi, _mm256_loadu_si256(bh + 1)));
    }
    _mm256_store_si256(out, acc0);
    _mm256_store_si256(out + 1, acc1);
  }
}

/* ---------------------------------------------------------------- decoding */

struct insn {
  enum op op;
  bool is_256;
  bool is_memory; /* the r/m operand is memory, at address */
  uint8_t length;
  uint8_t reg, rm, vvvv; /* register numbers with the VEX extension bits */
  uint64_t address;      /* base + disp for sibmem, else base + index * scale + disp */
  uint64_t index_value;  /* index << scale: the stride of sibmem */
};

static uint64_t gpr(const ucontext_t *uc, unsigned n) {
  static const uint8_t order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                    REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                    REG_R12, REG_R13, REG_R14, REG_R15};
  return (uint64_t)uc->uc_mcontext.gregs[order[n]];
}

/* The operation that pp, opcode and ModRM name, with all fixed fields (W0, L, vvvv) checked. */
static enum op classify(unsigned pp, unsigned opcode, unsigned modrm, bool w, bool l, unsigned vvvv) {
  bool memory = modrm < 0xC0, sib = memory && (modrm & 7) == 4;
  if (w) return OP_UNKNOWN;
  if (opcode >= 0x50 && opcode <= 0x53 && pp == 1) return OP_VPDPBUSD + (opcode - 0x50);
  if (opcode == 0x58 && pp == 1 && memory && vvvv == 0) return OP_VPBROADCASTD;
  if (l) return OP_UNKNOWN;
  if (opcode == 0x5E && !memory) return OP_TDPBUUD + pp;
  if (vvvv != 0) return OP_UNKNOWN; /* the encoded field is inverted: 1111 means unused */
  if (opcode == 0x49 && memory && (modrm & 0x38) == 0) {
    if (pp == 0) return OP_LDTILECFG;
    if (pp == 1) return OP_STTILECFG;
  }
  if (opcode == 0x49 && pp == 0 && modrm == 0xC0) return OP_TILERELEASE;
  if (opcode == 0x49 && pp == 3 && !memory && (modrm & 7) == 0) return OP_TILEZERO;
  if (opcode == 0x4B && sib) {
    if (pp == 3) return OP_TILELOADD;
    if (pp == 1) return OP_TILELOADDT1;
    if (pp == 2) return OP_TILESTORED;
  }
  return OP_UNKNOWN;
}

static int32_t read_i32(const uint8_t *p) {
  int32_t v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* Decodes a memory operand; p points behind ModRM.  Returns the end of the instruction. */
static const uint8_t *decode_memory(struct insn *i, const ucontext_t *uc, const uint8_t *p,
                                    unsigned modrm, unsigned x, unsigned b) {
  unsigned mod = modrm >> 6, base = (modrm & 7) | b << 3;
  uint64_t base_value = 0;
  bool rip_relative = mod == 0 && (modrm & 7) == 5, has_base = !rip_relative;
  if ((modrm & 7) == 4) {
    unsigned sib = *p++, index = (sib >> 3 & 7) | x << 3;
    base = (sib & 7) | b << 3;
    has_base = !(mod == 0 && (sib & 7) == 5);
    if (index != 4) i->index_value = gpr(uc, index) << (sib >> 6);
  }
  if (has_base) base_value = gpr(uc, base);
  if (mod == 1) {
    base_value += (uint64_t)(int64_t)(int8_t)*p;
    p += 1;
  } else if (mod == 2 || !has_base) {
    base_value += (uint64_t)(int64_t)read_i32(p);
    p += 4;
  }
  if (rip_relative) base_value += (uint64_t)p; /* none of these has an immediate behind it */
  i->address = base_value;
  return p;
}

/* Decodes the instruction at code.  Looks at no byte that is not part of an instruction. */
static bool decode(struct insn *i, const ucontext_t *uc, const uint8_t *code) {
  memset(i, 0, sizeof *i);
  if (code[0] != 0xC4) return false; /* map 0F38 needs the three-byte VEX form */
  unsigned byte1 = code[1];
  if ((byte1 & 0x1F) != 2) return false;
  unsigned byte2 = code[2], opcode = code[3], modrm = code[4];
  unsigned r = !(byte1 & 0x80), x = !(byte1 & 0x40), b = !(byte1 & 0x20);
  unsigned vvvv = ~(byte2 >> 3) & 15;
  i->is_256 = byte2 >> 2 & 1;
  i->op = classify(byte2 & 3, opcode, modrm, byte2 >> 7, i->is_256, vvvv);
  if (i->op == OP_UNKNOWN) return false;
  if (!(enabled_features & (i->op >= OP_VPDPBUSD ? FEATURE_AVXVNNI : FEATURE_AMX))) return false;
  i->reg = (uint8_t)((modrm >> 3 & 7) | r << 3);
  i->vvvv = (uint8_t)vvvv;
  const uint8_t *end = code + 5;
  if (modrm >= 0xC0) {
    i->rm = (uint8_t)((modrm & 7) | b << 3);
  } else {
    i->is_memory = true;
    end = decode_memory(i, uc, end, modrm, x, b);
  }
  i->length = (uint8_t)(end - code);
  return true;
}

/* ---------------------------------------------------------------- vector registers */

enum { XSTATE_SSE = 1 << 1, XSTATE_YMM = 1 << 2, XSTATE_ZMM_HIGH = 1 << 6 };
enum { SW_RESERVED_OFFSET = 464, XSTATE_BV_OFFSET = 512, FP_MAGIC = 0x46505853 };

static uint32_t ymm_offset, zmm_high_offset; /* in the XSAVE area; from CPUID leaf 0xD */

static uint64_t *xstate_bv(ucontext_t *uc) {
  uint8_t *fp = (uint8_t *)uc->uc_mcontext.fpregs;
  uint32_t magic;
  memcpy(&magic, fp + SW_RESERVED_OFFSET, sizeof magic);
  if (magic != FP_MAGIC) {
    put("isa emulator: the signal frame has no XSAVE area\n");
    abort();
  }
  return (uint64_t *)(fp + XSTATE_BV_OFFSET);
}

/* Brings a state component that is in its initial configuration (its memory in the frame is then
 * meaningless) into a defined, all-zero one, so that it can be read and written. */
static void materialise(ucontext_t *uc) {
  uint64_t *bv = xstate_bv(uc);
  uint8_t *fp = (uint8_t *)uc->uc_mcontext.fpregs;
  if (!(*bv & XSTATE_SSE)) memset(uc->uc_mcontext.fpregs->_xmm, 0, 256);
  if (!(*bv & XSTATE_YMM)) memset(fp + ymm_offset, 0, 256);
  *bv |= XSTATE_SSE | XSTATE_YMM;
}

static void read_vector(const ucontext_t *uc, unsigned n, uint8_t out[32]) {
  const uint8_t *fp = (const uint8_t *)uc->uc_mcontext.fpregs;
  memcpy(out, &uc->uc_mcontext.fpregs->_xmm[n], 16);
  memcpy(out + 16, fp + ymm_offset + 16 * n, 16);
}

/* Writes a ymm register; like any VEX instruction this clears the bits above it. */
static void write_vector(ucontext_t *uc, unsigned n, const uint8_t value[32]) {
  uint8_t *fp = (uint8_t *)uc->uc_mcontext.fpregs;
  memcpy(&uc->uc_mcontext.fpregs->_xmm[n], value, 16);
  memcpy(fp + ymm_offset + 16 * n, value + 16, 16);
  if (zmm_high_offset && (*xstate_bv(uc) & XSTATE_ZMM_HIGH))
    memset(fp + zmm_high_offset + 32 * n, 0, 32);
}

static int32_t saturate(int64_t v) {
  return v > INT32_MAX ? INT32_MAX : v < INT32_MIN ? INT32_MIN : (int32_t)v;
}

static int64_t dot_lane(enum op op, const uint8_t *a, const uint8_t *b) {
  int64_t sum = 0;
  if (op == OP_VPDPBUSD || op == OP_VPDPBUSDS) {
    for (unsigned k = 0; k < 4; ++k) sum += (int32_t)a[k] * (int8_t)b[k];
    return sum;
  }
  int16_t x[2], y[2];
  memcpy(x, a, sizeof x);
  memcpy(y, b, sizeof y);
  return (int64_t)x[0] * y[0] + (int64_t)x[1] * y[1];
}

static void vector_dot(ucontext_t *uc, const struct insn *i) {
  uint8_t c[32], a[32], b[32];
  unsigned bytes = i->is_256 ? 32 : 16;
  uint64_t address = i->address + i->index_value;
  materialise(uc);
  read_vector(uc, i->reg, c);
  read_vector(uc, i->vvvv, a);
  if (i->is_memory)
    memcpy(b, (const void *)address, bytes);
  else
    read_vector(uc, i->rm, b);
  for (unsigned n = 0; n < bytes; n += 4) {
    int64_t sum = read_i32(c + n) + dot_lane(i->op, a + n, b + n);
    bool saturating = i->op == OP_VPDPBUSDS || i->op == OP_VPDPWSSDS;
    int32_t result = saturating ? saturate(sum) : (int32_t)(uint32_t)sum;
    memcpy(c + n, &result, sizeof result);
  }
  if (!i->is_256) memset(c + 16, 0, 16);
  write_vector(uc, i->reg, c);
}

static void vector_broadcast(ucontext_t *uc, const struct insn *i) {
  uint8_t value[32] = {0};
  materialise(uc);
  for (unsigned n = 0; n < (i->is_256 ? 32 : 16); n += 4)
    memcpy(value + n, (const void *)(i->address + i->index_value), 4);
  write_vector(uc, i->reg, value);
}

/* ---------------------------------------------------------------- the handler */

static void execute(ucontext_t *uc, const struct insn *i) {
  if (i->op >= OP_VPDPBUSD) {
    i->op == OP_VPBROADCASTD ? vector_broadcast(uc, i) : vector_dot(uc, i);
    return;
  }
  struct tile_state *s = tiles();
  uint64_t address = i->address + i->index_value;
  switch (i->op) {
    case OP_LDTILECFG: load_config(s, (const uint8_t *)address); break;
    case OP_STTILECFG: memcpy((void *)address, s->config, 64); break;
    case OP_TILERELEASE: memset(s, 0, sizeof *s); break;
    case OP_TILEZERO:
      require_tile(s, i->op, i->reg);
      memset(s->data[i->reg], 0, sizeof s->data[i->reg]);
      break;
    case OP_TILELOADD:
    case OP_TILELOADDT1: tile_load(s, i->op, i->reg, i->address, i->index_value); break;
    case OP_TILESTORED: tile_store(s, i->reg, i->address, i->index_value); break;
    default: tile_dot(s, i->op, i->reg, i->rm, i->vvvv); break;
  }
}

static void trace_insn(const struct insn *i) {
  put("isa emulator: ");
  put_number(current_rip, 16);
  put(" ");
  put(op_names[i->op]);
  put("\n");
}

/* Hands an unknown instruction on.  A handler that returns without having changed anything would be
 * called again for ever; after a few rounds at one place the default action (death) takes over. */
static void chain(int sig, siginfo_t *info, void *context, uint64_t rip) {
  static __thread uint64_t last_rip __attribute__((tls_model("initial-exec")));
  static __thread unsigned repeats __attribute__((tls_model("initial-exec")));
  repeats = rip == last_rip ? repeats + 1 : 0;
  last_rip = rip;
  bool callable = previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN;
  if (!callable || repeats >= 3) {
    /* back to the instruction, which now dies with the right signal, address and core file */
    signal(sig, SIG_DFL);
    if (info->si_code <= 0) raise(sig); /* sent by kill(): nothing would be executed again */
  } else if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(sig, info, context);
  } else {
    previous.sa_handler(sig);
  }
}

static void on_sigill(int sig, siginfo_t *info, void *context) {
  ucontext_t *uc = context;
  uint64_t rip = (uint64_t)uc->uc_mcontext.gregs[REG_RIP];
  struct insn i;
  if (info->si_code <= 0 || !decode(&i, uc, (const uint8_t *)rip) || i.op >= OP_COUNT) {
    chain(sig, info, context, rip);
    return;
  }
  __atomic_fetch_add(&trap_count, 1, __ATOMIC_RELAXED);
  /* A signal costs microseconds and such instructions come in runs, those of AVX-VNNI with the
   * broadcasts of their operands between them: do the whole run for the price of one signal. */
  do {
    current_rip = rip;
    if (trace) trace_insn(&i);
    execute(uc, &i);
    if (i.op < OP_COUNT) __atomic_fetch_add(&op_counts[i.op], 1, __ATOMIC_RELAXED);
    rip += i.length;
    uc->uc_mcontext.gregs[REG_RIP] = (greg_t)rip;
  } while (decode(&i, uc, (const uint8_t *)rip));
}

/* ---------------------------------------------------------------- interface (see __init__.py) */

/* Adds features (bits of enum feature) to the emulated ones.  May be called again, also after
 * another library replaced the handler.  Returns 0, or -1 with errno set. */
int isa_emulator_install(unsigned features) {
  struct sigaction action, now;
  unsigned a, b, c, d;
  if (__get_cpuid_count(0xD, 2, &a, &b, &c, &d)) ymm_offset = b;
  if (__get_cpuid_count(0xD, 6, &a, &b, &c, &d)) zmm_high_offset = b; /* 0 without AVX-512 */
  trace = getenv("ISA_EMULATOR_TRACE") && *getenv("ISA_EMULATOR_TRACE") == '1';
  enabled_features |= features;
  if (sigaction(SIGILL, NULL, &now)) return -1;
  if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_sigill) return 0;
  memset(&action, 0, sizeof action);
  sigemptyset(&action.sa_mask);
  action.sa_sigaction = on_sigill;
  /* NODEFER: a chained handler may leave by longjmp or run code that is itself emulated */
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  return sigaction(SIGILL, &action, &previous);
}

unsigned isa_emulator_op_count(void) { return OP_COUNT; }
const char *isa_emulator_op_name(unsigned op) { return op < OP_COUNT ? op_names[op] : ""; }

uint64_t isa_emulator_count(unsigned op) {
  return op < OP_COUNT ? __atomic_load_n(&op_counts[op], __ATOMIC_RELAXED) : 0;
}

uint64_t isa_emulator_traps(void) { return __atomic_load_n(&trap_count, __ATOMIC_RELAXED); }

void isa_emulator_reset(void) {
  for (unsigned i = 0; i < OP_COUNT; ++i) __atomic_store_n(&op_counts[i], 0, __ATOMIC_RELAXED);
  __atomic_store_n(&trap_count, 0, __ATOMIC_RELAXED);
}
