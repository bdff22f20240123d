// Runs one compiled kernel with no TVM at all, its arrays between unreadable pages.
//
//   runner KERNEL <arrays >arrays
//
// arm.py links this statically with an object file of kernels and a table of their names, for an
// architecture that needs no TVM runtime then (no wheel has one for 32-bit ARM) and starts in
// milliseconds under an emulator. Standard input: int32 count, and for each array int32 code, bits,
// ndim, int64 shape[ndim] and its bytes, as this architecture stores them. Standard output: the bytes
// of all arrays after the call. Exit status: 0, or 1 with the reason on standard error.
//
// What of TVM's runtime a kernel calls is defined here, made to find faults: workspaces are fenced
// like the arrays, and the tasks of a parallel loop run last to first.

#include <dlpack/dlpack.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

// What the generated table defines: the kernels of the object file.
struct Kernel {
  const char* name;
  TVMFFISafeCallType function;
};
extern const Kernel kKernels[];
extern const int kKernelCount;

namespace {

constexpr size_t kAlignment = 64;  // what kernels compiled by TVM may rely on
constexpr uint8_t kPattern = 0xA5;
constexpr int kTasks = 3;  // of a parallel loop: no power of two, so that tails are met

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::_Exit(1);
}

size_t PageSize() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// Memory whose end, rounded to the alignment, lies at an unreadable page; another one is before it.
class Fenced {
 public:
  Fenced(std::string name, size_t size) : name_(std::move(name)), size_(size) {
    size_t page = PageSize();
    size_t rounded = (size + kAlignment - 1) / kAlignment * kAlignment;
    usable_ = (rounded + page - 1) / page * page;
    void* memory = mmap(nullptr, usable_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) Fail("no memory for " + name_);
    whole_ = static_cast<uint8_t*>(memory);
    first_ = whole_ + page;
    if (mprotect(first_, usable_, PROT_READ | PROT_WRITE) != 0) Fail("mprotect failed");
    std::memset(first_, kPattern, usable_);
    data_ = first_ + usable_ - rounded;
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() { munmap(whole_, usable_ + 2 * PageSize()); }

  const std::string& name() const { return name_; }
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

  void Check() const {
    for (uint8_t* p = first_; p < first_ + usable_; ++p)
      if ((p < data_ || p >= data_ + size_) && *p != kPattern)
        Fail("the kernel wrote " + Where(p));
  }
  bool Guards(const uint8_t* p) const { return p >= whole_ && p < first_ + usable_ + PageSize(); }
  std::string Where(const uint8_t* p) const {
    long offset = static_cast<long>(p - data_);
    return offset < 0 ? std::to_string(-offset) + " bytes before " + name_
                      : std::to_string(offset - static_cast<long>(size_)) + " bytes behind " + name_;
  }

 private:
  std::string name_;
  size_t size_, usable_;
  uint8_t *whole_, *first_, *data_;
};

std::vector<Fenced*> fences;  // arrays and live workspaces, for the signal handler and the checks

void OnFault(int signal, siginfo_t* info, void*) {
  auto* address = static_cast<uint8_t*>(info->si_addr);
  for (Fenced* fence : fences)
    if (fence->Guards(address)) Fail("the kernel touched " + fence->Where(address));
  Fail(std::string(signal == SIGBUS ? "SIGBUS" : "SIGSEGV") + " far from every array");
}

void Read(void* to, size_t size) {
  if (size && std::fread(to, 1, size, stdin) != size) Fail("standard input is too short");
}

// ---------------------------------------------------------------- what kernels call

void* AllocWorkspace(int, int, uint64_t size, int, int) {
  fences.push_back(new Fenced("a workspace of " + std::to_string(size) + " bytes", size));
  return fences.back()->data();
}

int FreeWorkspace(int, int, void* memory) {
  for (size_t i = fences.size(); i-- > 0;) {
    if (fences[i]->data() != memory) continue;
    fences[i]->Check();
    delete fences[i];
    fences.erase(fences.begin() + static_cast<long>(i));
    return 0;
  }
  Fail("the kernel frees a workspace that it does not have");
}

struct GroupEnv {  // TVMParallelGroupEnv
  void* sync_handle;
  int32_t num_task;
};
using Task = int (*)(int task_id, GroupEnv* env, void* data);

int ParallelLaunch(Task task, void* data, int wanted) {
  GroupEnv env{nullptr, wanted > 0 ? wanted : kTasks};
  for (int i = env.num_task; i-- > 0;)
    if (int failed = task(i, &env, data)) return failed;
  return 0;
}

}  // namespace

extern "C" {

// Pointers that a kernel's library holds and its loader fills in.
__attribute__((weak)) extern void* __TVMBackendAllocWorkspace;
__attribute__((weak)) extern void* __TVMBackendFreeWorkspace;
__attribute__((weak)) extern void* __TVMBackendParallelLaunch;

void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message) {
  std::fprintf(stderr, "%s: %s\n", kind, message);
}

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  std::fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) std::fputs(parts[i] ? parts[i] : "", stderr);
  std::fputc('\n', stderr);
}

}  // extern "C"

int main(int argc, char** argv) {
  const Kernel* kernel = nullptr;
  for (int i = 0; argc == 2 && i < kKernelCount; ++i)
    if (std::strcmp(kKernels[i].name, argv[1]) == 0) kernel = &kKernels[i];
  if (!kernel) Fail("usage: runner KERNEL <arrays >arrays");

  rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  struct sigaction action {};
  action.sa_sigaction = OnFault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
  auto fill = [](void** pointer, auto function) {
    if (pointer) *pointer = reinterpret_cast<void*>(function);
  };
  fill(&__TVMBackendAllocWorkspace, AllocWorkspace);
  fill(&__TVMBackendFreeWorkspace, FreeWorkspace);
  fill(&__TVMBackendParallelLaunch, ParallelLaunch);

  int32_t count = 0;
  Read(&count, sizeof count);
  std::vector<std::vector<int64_t>> shapes(static_cast<size_t>(count)), strides = shapes;
  std::vector<DLTensor> tensors(shapes.size());
  std::vector<TVMFFIAny> arguments(shapes.size());
  for (size_t i = 0; i < shapes.size(); ++i) {
    int32_t head[3];  // code, bits, ndim
    Read(head, sizeof head);
    shapes[i].resize(static_cast<size_t>(head[2]));
    Read(shapes[i].data(), shapes[i].size() * sizeof(int64_t));
    size_t bytes = static_cast<size_t>(head[1]) / 8;
    strides[i].assign(shapes[i].size(), 1);
    for (size_t d = shapes[i].size(); d-- > 0;) {
      if (d + 1 < shapes[i].size()) strides[i][d] = strides[i][d + 1] * shapes[i][d + 1];
      bytes *= static_cast<size_t>(shapes[i][d]);
    }
    fences.push_back(new Fenced("argument " + std::to_string(i), bytes));
    Read(fences[i]->data(), bytes);
    tensors[i] = DLTensor{};
    tensors[i].data = fences[i]->data();
    tensors[i].device = DLDevice{kDLCPU, 0};
    tensors[i].ndim = head[2];
    tensors[i].dtype = DLDataType{static_cast<uint8_t>(head[0]), static_cast<uint8_t>(head[1]), 1};
    tensors[i].shape = shapes[i].data();
    tensors[i].strides = strides[i].data();
    arguments[i] = TVMFFIAny{};
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = &tensors[i];
  }

  TVMFFIAny result{};
  if (kernel->function(nullptr, arguments.data(), count, &result) != 0) Fail("the kernel failed");
  if (fences.size() != shapes.size()) Fail("the kernel kept a workspace");
  for (const Fenced* fence : fences) {
    fence->Check();
    if (std::fwrite(fence->data(), 1, fence->size(), stdout) != fence->size()) Fail("cannot write");
  }
  return std::fflush(stdout) == 0 ? 0 : 1;
}
