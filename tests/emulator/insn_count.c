/* QEMU plugin: counts the guest instructions executed between two marks.
 *
 *   qemu-aarch64 -plugin libinsn_count.so,out=FILE[,blocks=on] -d plugin PROGRAM
 *
 * A mark is the system call MARK (no real one: the kernel answers ENOSYS) with 1 to start and 2 to
 * stop; each stop appends "count N" to FILE. With blocks=on the end of the process appends
 * "block ADDRESS INSTRUCTIONS EXECUTIONS" for each translated block that ran in between.
 *
 * Counts are exact for a guest of one thread: a translated block has one entry and runs to its end.
 * Debian's qemu-user has plugins compiled in, and no header for them: what is needed of
 * qemu-plugin.h stands here (API version 1 of QEMU 7.2; nothing of it has changed since).
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MARK = 4242 };

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
                                           void (*cb)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb,
                                          void (*cb)(unsigned int, void *),
                                          enum qemu_plugin_cb_flags flags, void *userdata);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t id,
                                          void (*cb)(qemu_plugin_id_t, unsigned int, int64_t,
                                                     uint64_t, uint64_t, uint64_t, uint64_t,
                                                     uint64_t, uint64_t, uint64_t, uint64_t));
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*cb)(qemu_plugin_id_t, void *),
                                    void *userdata);

#ifndef QEMU_PLUGIN_VERSION
#define QEMU_PLUGIN_VERSION 1 /* QEMU 9 and later want -DQEMU_PLUGIN_VERSION=2 */
#endif
EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

struct block {
  struct block *next;
  uint64_t address, instructions, executions;
};

static struct block *blocks;
static FILE *out;
static bool counting, want_blocks;
static uint64_t counted;

static void on_exec(unsigned int cpu, void *userdata) {
  (void)cpu;
  if (counting) {
    struct block *block = userdata;
    block->executions++;
    counted += block->instructions;
  }
}

static void on_translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
  (void)id;
  struct block *block = calloc(1, sizeof *block);
  if (block == NULL) {
    abort();
  }
  block->address = qemu_plugin_tb_vaddr(tb);
  block->instructions = qemu_plugin_tb_n_insns(tb);
  block->next = blocks;
  blocks = block;
  qemu_plugin_register_vcpu_tb_exec_cb(tb, on_exec, QEMU_PLUGIN_CB_NO_REGS, block);
}

static void on_syscall(qemu_plugin_id_t id, unsigned int cpu, int64_t number, uint64_t a1,
                       uint64_t a2, uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7,
                       uint64_t a8) {
  (void)id, (void)cpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
  if (number != MARK) {
    return;
  }
  counting = a1 == 1;
  if (counting) {
    counted = 0;
  } else {
    fprintf(out, "count %" PRIu64 "\n", counted);
    fflush(out);
  }
}

static void on_exit_of_guest(qemu_plugin_id_t id, void *userdata) {
  (void)id, (void)userdata;
  for (struct block *block = blocks; want_blocks && block != NULL; block = block->next) {
    if (block->executions != 0) {
      fprintf(out, "block 0x%" PRIx64 " %" PRIu64 " %" PRIu64 "\n", block->address,
              block->instructions, block->executions);
    }
  }
  fclose(out);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
                               char **argv) {
  (void)info;
  for (int i = 0; i < argc; i++) {
    if (strncmp(argv[i], "out=", 4) == 0) {
      out = fopen(argv[i] + 4, "w");
    } else if (strcmp(argv[i], "blocks=on") == 0) {
      want_blocks = true;
    } else {
      fprintf(stderr, "insn_count: %s is no argument of this plugin\n", argv[i]);
      return -1;
    }
  }
  if (out == NULL) {
    fprintf(stderr, "insn_count: out=FILE is missing or cannot be written\n");
    return -1;
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
  qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
  qemu_plugin_register_atexit_cb(id, on_exit_of_guest, NULL);
  return 0;
}
