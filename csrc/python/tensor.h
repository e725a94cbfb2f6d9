// Torch tensors as C++ sees them, without building against torch: through the C exchange API of
// DLPack 1.3, which torch offers from 2.11 on. Reading a tensor takes some 30 ns; its address,
// shape, strides, dtype and device as Python attributes take 600.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace midstream::python {

/// DLTensor of dlpack.h, same layout.
struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t kind, bits;
  std::uint16_t lanes;
  const std::int64_t* shape;
  const std::int64_t* strides;
  std::uint64_t byte_offset;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset);
  }
};

enum Kind : std::uint8_t { kInt = 0, kFloat = 2, kBFloat = 4 };  // DLDataTypeCode
constexpr std::int32_t kCpu = 1;                                 // kDLCPU

/// DLPackExchangeAPI of dlpack.h, same layout.
struct ExchangeApi {
  std::uint32_t major, minor;
  ExchangeApi* previous;
  void *allocate, *from_object, *to_object;
  int (*tensor_from_object)(void* object, Tensor* tensor);
  void* current_stream;
};

class TensorReader {
 public:
  /// Throws pybind11::import_error where torch has no such interface.
  void open() {
    namespace py = pybind11;
    const py::object type = py::module_::import("torch").attr("Tensor");
    const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    const char* name = "dlpack_exchange_api";
    if (PyCapsule_IsValid(capsule.ptr(), name) != 0) {
      api_ = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), name));
    }
    if (api_ == nullptr || api_->major != 1 || api_->tensor_from_object == nullptr) {
      throw py::import_error(
          "torch.Tensor has no __dlpack_c_exchange_api__; use torch 2.11 or newer");
    }
    type_ = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
  }

  /// Whether `object` is a tensor in the memory of the CPU; what it holds is valid as long as it
  /// is.
  bool read(pybind11::handle object, Tensor& tensor) const {
    if (!PyObject_TypeCheck(object.ptr(), type_)) return false;
    if (api_->tensor_from_object(object.ptr(), &tensor) != 0) {
      PyErr_Clear();  // without storage
      return false;
    }
    return tensor.device_type == kCpu && tensor.lanes == 1 && has_memory(tensor);
  }

 private:
  /// A fake tensor, for one, says that it is on the CPU and has none.
  static bool has_memory(const Tensor& tensor) {
    if (tensor.data != nullptr) return true;
    for (std::int32_t i = 0; i < tensor.ndim; ++i) {
      if (tensor.shape[i] == 0) return true;
    }
    return false;
  }

  const ExchangeApi* api_ = nullptr;
  PyTypeObject* type_ = nullptr;
};

}  // namespace midstream::python
