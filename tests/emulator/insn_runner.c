/* Calls one TVM kernel on patterned arrays, between the marks of insn_count.c.
 *
 *   runner CALLS TYPE:BITS:DIMxDIMx... [...]      TYPE is a DLPack code: 0 int, 1 uint, 2 float
 *
 * Linked with the kernel's object file into a static program: the few functions of TVM's runtime
 * that a kernel calls stand here, parallel loops run as one task. No result is looked at.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MARK = 4242, MAX_TENSORS = 8, MAX_DIMS = 8, DLTENSOR = 7, ALIGNMENT = 64 };

typedef struct {
  void *data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} DLTensor;

typedef struct {
  int32_t type_index;
  uint32_t padding;
  union { void *pointer; int64_t integer; };
} Any;

typedef struct { void *sync; int32_t num_task; } ParallelGroup;
typedef int (*Lambda)(int task, ParallelGroup *group, void *data);

int __tvm_ffi_main(void *self, const Any *args, int32_t count, Any *result);

static int launch(Lambda lambda, void *data, int tasks) {
  ParallelGroup group = {NULL, 1};
  (void)tasks;
  return lambda(0, &group, data);
}

/* Sixteen buffers are more than any kernel holds at once; TVM's own pool reuses them as well. */
static struct { void *memory; uint64_t size; int used; } pool[16];

static void *take(int device, int id, uint64_t size, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  for (unsigned i = 0; i < sizeof pool / sizeof *pool; i++) {
    if (!pool[i].used && (pool[i].memory == NULL || pool[i].size >= size)) {
      if (pool[i].memory == NULL) {
        pool[i].size = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        pool[i].memory = aligned_alloc(ALIGNMENT, pool[i].size);
      }
      pool[i].used = 1;
      return pool[i].memory;
    }
  }
  return NULL;
}

static int give(int device, int id, void *memory) {
  (void)device, (void)id;
  for (unsigned i = 0; i < sizeof pool / sizeof *pool; i++) {
    pool[i].used &= pool[i].memory != memory;
  }
  return 0;
}

/* A kernel reaches the runtime through pointers that its loader sets; it defines those it uses. */
extern void *__TVMBackendParallelLaunch __attribute__((weak));
extern void *__TVMBackendAllocWorkspace __attribute__((weak));
extern void *__TVMBackendFreeWorkspace __attribute__((weak));

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; i++) {
    fputs(parts[i], stderr);
  }
  fputs("\n", stderr);
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) {
  fprintf(stderr, "%s: %s\n", kind, message);
}

static DLTensor tensor(char *text) {
  DLTensor made = {.device = {1, 0}};
  char *code = strtok(text, ":"), *bits = strtok(NULL, ":"), *dims = strtok(NULL, ":");
  if (code == NULL || bits == NULL || dims == NULL) {
    fprintf(stderr, "runner: a tensor is TYPE:BITS:DIMxDIMx...\n");
    exit(2);
  }
  made.dtype.code = (uint8_t)atoi(code);
  made.dtype.bits = (uint8_t)atoi(bits);
  made.dtype.lanes = 1;
  made.shape = calloc(MAX_DIMS, sizeof *made.shape);
  uint64_t size = made.dtype.bits / 8;
  for (char *dim = strtok(dims, "x"); dim != NULL && made.ndim < MAX_DIMS; dim = strtok(NULL, "x")) {
    made.shape[made.ndim++] = atoll(dim);
    size *= (uint64_t)atoll(dim);
  }
  uint64_t rounded = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + ALIGNMENT;
  uint8_t *bytes = aligned_alloc(ALIGNMENT, rounded);
  if (made.dtype.code == 2) {
    for (uint64_t i = 0; i < size / 4; i++) { /* no denormals, which an emulator is slow at */
      ((float *)bytes)[i] = (float)(i % 7) * 0.25f;
    }
  } else {
    for (uint64_t i = 0; i < size; i++) {
      bytes[i] = (uint8_t)(i * 37 >> 3);
    }
  }
  made.data = bytes;
  return made;
}

int main(int argc, char **argv) {
  static DLTensor tensors[MAX_TENSORS];
  Any args[MAX_TENSORS] = {0}, result = {0};
  if (argc < 3 || argc - 2 > MAX_TENSORS) {
    fprintf(stderr, "usage: runner CALLS TYPE:BITS:SHAPE...\n");
    return 2;
  }
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = (void *)launch;
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = (void *)take;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = (void *)give;
  int count = argc - 2, calls = atoi(argv[1]);
  for (int i = 0; i < count; i++) {
    tensors[i] = tensor(argv[i + 2]);
    args[i].type_index = DLTENSOR;
    args[i].pointer = &tensors[i];
  }
  int failed = 0;
  syscall(MARK, 1);
  for (int i = 0; i < calls; i++) {
    failed |= __tvm_ffi_main(NULL, args, count, &result);
  }
  syscall(MARK, 2);
  return failed != 0;
}
