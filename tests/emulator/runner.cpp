// Runs exported kernels with nothing but the TVM runtime and compares their results.
//
//   runner DIRECTORY
//
// For each DIRECTORY/NAME.so: calls its function "main" with the arrays NAME.in0.npy, NAME.in1.npy,
// ... and an output array of the shape and type of NAME.out.npy, and compares that with NAME.out.npy.
// NAME.tol, if it exists, holds the largest absolute difference allowed (default 0).  Integer and
// boolean arrays of 1, 2, 4 and 8 bytes and float32 and float64 ones are understood.
//
// Prints "PASS NAME" or "FAIL NAME reason" for each, and at last "N passed, M failed".  Exits with 0
// if there was at least one case and all passed.

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fs = std::filesystem;
namespace ffi = tvm::ffi;

namespace {

constexpr size_t kAlignment = 64;  // what kernels compiled by TVM may rely on

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// An array in aligned memory, with the DLTensor that describes it.
class Array {
 public:
  Array(std::vector<int64_t> shape, DLDataType dtype) : shape_(std::move(shape)), dtype_(dtype) {
    size_t rounded = (Bytes() + kAlignment) / kAlignment * kAlignment;
    data_.reset(std::aligned_alloc(kAlignment, rounded));
    if (!data_) throw std::bad_alloc();
    std::memset(data_.get(), 0xA5, rounded);  // a kernel that does not write its output is caught
    tensor_ = DLTensor{};
    tensor_.data = data_.get();
    tensor_.device = DLDevice{kDLCPU, 0};
    tensor_.ndim = static_cast<int32_t>(shape_.size());
    tensor_.dtype = dtype_;
    tensor_.shape = shape_.data();
    // DLPack 1.2 wants explicit strides
    strides_.assign(shape_.size(), 1);
    for (size_t i = shape_.size(); i-- > 1;) strides_[i - 1] = strides_[i] * shape_[i];
    tensor_.strides = strides_.data();
  }
  Array(const Array&) = delete;  // tensor_ points into this object
  Array& operator=(const Array&) = delete;

  size_t Size() const {
    size_t n = 1;
    for (int64_t extent : shape_) n *= static_cast<size_t>(extent);
    return n;
  }
  size_t Bytes() const { return Size() * dtype_.bits / 8; }
  void* data() const { return data_.get(); }
  const std::vector<int64_t>& shape() const { return shape_; }
  DLDataType dtype() const { return dtype_; }
  DLTensor* tensor() { return &tensor_; }

 private:
  std::vector<int64_t> shape_, strides_;
  DLDataType dtype_;
  std::unique_ptr<void, FreeDeleter> data_;
  DLTensor tensor_;
};

// ---------------------------------------------------------------- .npy files

// The text behind 'key': in the header, which is a Python dict literal such as
// {'descr': '|u1', 'fortran_order': False, 'shape': (1, 64), }
std::string HeaderValue(const std::string& header, const std::string& key) {
  size_t at = header.find("'" + key + "':");
  if (at == std::string::npos) throw std::runtime_error("no " + key + " in the npy header");
  at = header.find_first_not_of(' ', at + key.size() + 3);
  return header.substr(at);
}

DLDataType ParseType(const std::string& descr) {
  // descr is like '|u1' or '<i4', with the quotes
  if (descr.size() < 5 || descr[1] == '>') throw std::runtime_error("unsupported dtype " + descr);
  uint8_t bits = static_cast<uint8_t>(8 * (descr[3] - '0'));
  switch (descr[2]) {
    case 'i': return DLDataType{kDLInt, bits, 1};
    case 'u': return DLDataType{kDLUInt, bits, 1};
    case 'f': return DLDataType{kDLFloat, bits, 1};
    case 'b': return DLDataType{kDLBool, bits, 1};
    default: throw std::runtime_error("unsupported dtype " + descr.substr(0, 5));
  }
}

std::vector<int64_t> ParseShape(const std::string& text) {
  std::vector<int64_t> shape;
  std::stringstream in(text.substr(1, text.find(')') - 1));
  for (std::string item; std::getline(in, item, ',');)
    if (item.find_first_of("0123456789") != std::string::npos) shape.push_back(std::stoll(item));
  return shape;
}

std::unique_ptr<Array> LoadNpy(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  unsigned char head[8];
  if (!in.read(reinterpret_cast<char*>(head), 8) || std::memcmp(head, "\x93NUMPY", 6) != 0)
    throw std::runtime_error(path.string() + " is not an npy file");
  unsigned char length[4] = {};
  in.read(reinterpret_cast<char*>(length), head[6] == 1 ? 2 : 4);  // little-endian
  std::string header(length[0] | length[1] << 8 | length[2] << 16, '\0');
  in.read(header.data(), static_cast<std::streamsize>(header.size()));
  if (HeaderValue(header, "fortran_order").rfind("False", 0) != 0)
    throw std::runtime_error(path.string() + " is in Fortran order");
  auto array = std::make_unique<Array>(ParseShape(HeaderValue(header, "shape")),
                                       ParseType(HeaderValue(header, "descr")));
  in.read(static_cast<char*>(array->data()), static_cast<std::streamsize>(array->Bytes()));
  if (!in) throw std::runtime_error(path.string() + " is too short");
  return array;
}

// ---------------------------------------------------------------- comparison

struct Difference {
  double largest = 0;
  size_t count = 0;  // of elements beyond the tolerance
};

template <typename T>
Difference CompareAs(const Array& got, const Array& expected, double tolerance) {
  const T* a = static_cast<const T*>(got.data());
  const T* b = static_cast<const T*>(expected.data());
  Difference result;
  for (size_t i = 0; i < expected.Size(); ++i) {
    double difference = std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (std::isnan(difference)) difference = std::numeric_limits<double>::infinity();
    result.largest = std::max(result.largest, difference);
    if (difference > tolerance) ++result.count;
  }
  return result;
}

Difference Compare(const Array& got, const Array& expected, double tolerance) {
  DLDataType t = expected.dtype();
  bool is_signed = t.code == kDLInt;
  if (t.code == kDLFloat) {
    if (t.bits == 32) return CompareAs<float>(got, expected, tolerance);
    if (t.bits == 64) return CompareAs<double>(got, expected, tolerance);
  } else {
    switch (t.bits) {
      case 8:
        return is_signed ? CompareAs<int8_t>(got, expected, tolerance)
                         : CompareAs<uint8_t>(got, expected, tolerance);
      case 16:
        return is_signed ? CompareAs<int16_t>(got, expected, tolerance)
                         : CompareAs<uint16_t>(got, expected, tolerance);
      case 32:
        return is_signed ? CompareAs<int32_t>(got, expected, tolerance)
                         : CompareAs<uint32_t>(got, expected, tolerance);
      case 64:
        return is_signed ? CompareAs<int64_t>(got, expected, tolerance)
                         : CompareAs<uint64_t>(got, expected, tolerance);
    }
  }
  throw std::runtime_error("cannot compare this dtype");
}

// ---------------------------------------------------------------- cases

double Tolerance(const fs::path& path) {
  std::ifstream in(path);
  double value = 0;
  if (in && !(in >> value)) throw std::runtime_error(path.string() + " holds no number");
  return value;
}

// Runs one case; returns what is wrong with its result, or an empty string.
std::string RunCase(const fs::path& library) {
  std::string stem = (library.parent_path() / library.stem()).string();
  std::vector<std::unique_ptr<Array>> inputs;
  for (int i = 0;; ++i) {
    fs::path path = stem + ".in" + std::to_string(i) + ".npy";
    if (!fs::exists(path)) break;
    inputs.push_back(LoadNpy(path));
  }
  std::unique_ptr<Array> expected = LoadNpy(stem + ".out.npy");
  Array output(expected->shape(), expected->dtype());

  ffi::Module module = ffi::Module::LoadFromFile(library.string());
  ffi::Optional<ffi::Function> function = module->GetFunction("main");
  if (!function.has_value()) return "has no function main";
  std::vector<ffi::AnyView> arguments;
  for (auto& input : inputs) arguments.emplace_back(input->tensor());
  arguments.emplace_back(output.tensor());
  ffi::Any result;
  function.value().CallPacked(
      ffi::PackedArgs(arguments.data(), static_cast<int32_t>(arguments.size())), &result);

  double tolerance = Tolerance(stem + ".tol");
  Difference difference = Compare(output, *expected, tolerance);
  if (difference.count == 0) return "";
  std::ostringstream message;
  message << "maxdiff " << difference.largest << " (allowed " << tolerance << "), "
          << difference.count << " of " << expected->Size() << " elements";
  return message.str();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !fs::is_directory(argv[1])) {
    std::cerr << "usage: runner DIRECTORY\n";
    return 2;
  }
  std::vector<fs::path> libraries;
  for (const auto& entry : fs::directory_iterator(argv[1]))
    if (entry.path().extension() == ".so") libraries.push_back(entry.path());
  std::sort(libraries.begin(), libraries.end());

  int passed = 0, failed = 0;
  for (const fs::path& library : libraries) {
    std::string name = library.stem().string(), problem;
    // shown before the kernel runs, so that the one which dies of a signal is known
    std::cerr << "running " << name << std::endl;
    try {
      problem = RunCase(library);
    } catch (const std::exception& error) {
      problem = error.what();
    }
    ++(problem.empty() ? passed : failed);
    std::cout << (problem.empty() ? "PASS " + name : "FAIL " + name + " " + problem) << std::endl;
  }
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  return passed > 0 && failed == 0 ? 0 : 1;
}
