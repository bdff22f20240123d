// What tests/emulator/bare_runner.cpp needs of tvm-ffi, which a TVM that has Relay does not have.
//
// `relay_kernel` calls a kernel of such a TVM (TVMValue arguments and their type codes) as the
// runner calls those of newer ones.
#pragma once
#include <dlpack/dlpack.h>

#include <cstdint>
#include <cstdio>

struct TVMFFIAny {
  int32_t type_index, zero_padding;
  union {
    int64_t v_int64;
    void* v_ptr;
  };
};
enum { kTVMFFIDLTensorPtr = 7 };
using TVMFFISafeCallType = int (*)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);

union TVMValue {
  int64_t v_int64;
  void* v_handle;
};
using RelayFunction = int(TVMValue* args, int* codes, int count, TVMValue* result, int* code,
                          void* resource);

extern "C" {
__attribute__((weak)) extern void* __TVMAPISetLastError;
}

template <RelayFunction function>
int relay_kernel(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny*) {
  constexpr int kMost = 64, kDLTensorHandle = 7;
  if (count > kMost) return -1;
  if (&__TVMAPISetLastError) {
    void (*set)(const char*) = [](const char* message) { std::fprintf(stderr, "%s\n", message); };
    __TVMAPISetLastError = reinterpret_cast<void*>(set);
  }
  TVMValue values[kMost], result;
  int codes[kMost], code = 0;
  for (int32_t i = 0; i < count; ++i) {
    values[i].v_handle = args[i].v_ptr;
    codes[i] = kDLTensorHandle;
  }
  return function(values, codes, count, &result, &code, nullptr);
}
