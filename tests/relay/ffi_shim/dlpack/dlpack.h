// What tests/emulator/bare_runner.cpp needs of DLPack, for machines without that header.
#pragma once
#include <cstdint>

enum { kDLCPU = 1 };
struct DLDevice {
  int32_t device_type, device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
