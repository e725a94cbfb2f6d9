// Python module midstream.kernels._cpu: no torch at build time. What is bound (weights, tables) has
// been checked by kernels/cpu.py and comes as addresses. What comes with every call is read and
// checked here: a call answers False, having changed nothing, where kernels/call_checks.py would
// raise.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "addresses.h"
#include "midstream/add_rms_norm_score.h"
#include "midstream/advance.h"
#include "midstream/isa.h"
#include "midstream/score.h"
#include "midstream/score_advance.h"
#include "tensor.h"

namespace py = pybind11;

namespace {

using midstream::python::Address;
using midstream::python::pointer;
using midstream::python::Tensor;

// Releasing the GIL costs about 0.1 us, more than 1 % of the call below this many multiply-adds.
constexpr std::int64_t kReleaseGilAbove = 1 << 19;
// Asking torch for its number of threads costs about 0.1 us too, and no second one is used below.
constexpr std::int64_t kAskForThreadsAbove = 1 << 24;

midstream::python::TensorReader reader;
py::handle get_num_threads;

std::optional<midstream::DType> float_type(const Tensor& tensor) {
  using midstream::DType;
  if (tensor.kind == midstream::python::kFloat && tensor.bits == 32) return DType::float32;
  if (tensor.kind == midstream::python::kFloat && tensor.bits == 16) return DType::float16;
  if (tensor.kind == midstream::python::kBFloat && tensor.bits == 16) return DType::bfloat16;
  return std::nullopt;
}

/// Whether this is [rows, columns] with its last dimension contiguous.
bool is_matrix(const Tensor& tensor, std::int64_t rows, std::int64_t columns) {
  return tensor.ndim == 2 && tensor.shape[0] == rows && tensor.shape[1] == columns &&
         (tensor.strides[1] == 1 || columns == 1 || rows == 0);
}

/// Whether no two elements of a matrix share memory, as those of an expanded tensor do.
bool rows_are_apart(const Tensor& tensor) {
  return tensor.shape[0] <= 1 || tensor.strides[0] >= tensor.shape[1];
}

bool is_vector(const Tensor& tensor, std::int64_t length) {
  return tensor.ndim == 1 && tensor.shape[0] == length && (tensor.strides[0] == 1 || length <= 1);
}

bool read_hidden(py::handle object, std::int64_t width, midstream::Hidden& hidden,
                 bool written = false) {
  Tensor tensor;
  if (!reader.read(object, tensor) || tensor.ndim != 2) return false;
  const auto dtype = float_type(tensor);
  if (!dtype || !is_matrix(tensor, tensor.shape[0], width)) return false;
  if (written && !rows_are_apart(tensor)) return false;
  hidden = {tensor.as<const void>(), *dtype, tensor.shape[0], tensor.strides[0]};
  return true;
}

bool read_logits(py::handle object, std::int64_t rows, std::int64_t probes,
                 midstream::Logits& logits) {
  Tensor tensor;
  if (!reader.read(object, tensor) || float_type(tensor) != midstream::DType::float32 ||
      !is_matrix(tensor, rows, probes) || !rows_are_apart(tensor)) {
    return false;
  }
  logits = {tensor.as<float>(), tensor.strides[0]};
  return true;
}

bool read_ints(py::handle object, std::int64_t length, const std::int32_t*& values) {
  Tensor tensor;
  if (!reader.read(object, tensor) || tensor.kind != midstream::python::kInt || tensor.bits != 32 ||
      !is_vector(tensor, length)) {
    return false;
  }
  values = tensor.as<const std::int32_t>();
  return true;
}

/// Runs body(threads), without the GIL where there is much to do.
template <class Body>
void run(std::int64_t work, const Body& body) {
  const int threads = work > kAskForThreadsAbove ? get_num_threads().cast<int>() : 1;
  if (work > kReleaseGilAbove) {
    const py::gil_scoped_release release;
    body(threads);
  } else {
    body(threads);
  }
}

/// Slot, evidence, chain and policy tables.
struct Tables {
  Tables(const midstream::python::TableSizes& sizes, const midstream::python::SlotAddresses& slots,
         const midstream::python::EvidenceAddresses& evidence,
         const midstream::python::ChainAddresses& chain,
         const midstream::python::PolicyAddresses& policy)
      : tables(midstream::python::tables_at(sizes, slots, evidence, chain, policy)) {}

  bool read(const midstream::Logits& logits, py::handle slot, py::handle position,
            std::int64_t count, midstream::Rows& rows) const {
    rows = {logits.data, logits.stride, nullptr, nullptr, count};
    return read_ints(slot, count, rows.slot) && read_ints(position, count, rows.position);
  }

  void refuse_bad_row(const midstream::Rows& rows) const {
    const std::int64_t bad = midstream::first_bad_row(rows, tables);
    if (bad >= 0) throw py::index_error(midstream::explain_bad_row(rows, tables, bad));
  }

  // Holds the GIL throughout: a slot is admitted and retired by Python code.
  bool advance(py::handle logits, py::handle slot, py::handle position) const {
    Tensor tensor;
    if (!reader.read(logits, tensor) || tensor.ndim != 2) return false;
    const std::int64_t count = tensor.shape[0];
    midstream::Logits z{};
    midstream::Rows rows{};
    if (!read_logits(logits, count, tables.sizes.probes, z) ||
        !read(z, slot, position, count, rows)) {
      return false;
    }
    refuse_bad_row(rows);
    midstream::advance(rows, tables);
    return true;
  }

  midstream::Tables tables;
};

/// The probes of one tap.
struct Probes {
  Probes(Address weight, int weight_dtype, Address bias, std::int64_t probes, std::int64_t width,
         bool rms_norm, float eps)
      : packed({pointer<const void>(weight), static_cast<midstream::DType>(weight_dtype),
                pointer<const float>(bias), probes, width, rms_norm, eps}),
        size(probes * width) {}

  bool read(py::handle hidden, py::handle out, midstream::Hidden& x, midstream::Logits& z,
            bool written = false) const {
    return read_hidden(hidden, packed.table().width, x, written) &&
           read_logits(out, x.rows, packed.table().probes, z);
  }

  bool score(py::handle hidden, py::handle out) const {
    midstream::Hidden x{};
    midstream::Logits z{};
    if (!read(hidden, out, x, z)) return false;
    run(x.rows * size, [&](int threads) { midstream::score(packed, x, z, threads); });
    return true;
  }

  // Scores without the GIL where there is much to do, and folds with it, as advance does.
  bool score_advance(const Tables& tables, py::handle hidden, py::handle logits, py::handle slot,
                     py::handle position) const {
    midstream::Hidden x{};
    midstream::Logits z{};
    midstream::Rows rows{};
    if (!read(hidden, logits, x, z) || !tables.read(z, slot, position, x.rows, rows)) return false;
    tables.refuse_bad_row(rows);
    run(x.rows * size, [&](int threads) { midstream::score(packed, x, z, threads); });
    // Without the GIL, others may have changed what was checked.
    if (x.rows * size > kReleaseGilAbove) tables.refuse_bad_row(rows);
    midstream::advance(rows, tables.tables);
    return true;
  }

  bool add_rms_norm_score(py::handle x, py::handle residual, py::handle gamma, float norm_eps,
                          py::handle out) const {
    midstream::Hidden sum{}, other{};
    midstream::Logits z{};
    Tensor gain;
    const std::int64_t width = packed.table().width;
    if (!read(residual, out, sum, z, true) || !read_hidden(x, width, other, true) ||
        !reader.read(gamma, gain) || other.dtype != sum.dtype || other.rows != sum.rows ||
        float_type(gain) != sum.dtype || !is_vector(gain, width)) {
      return false;
    }
    const midstream::NormRows rows{const_cast<void*>(other.data),
                                   other.stride,
                                   const_cast<void*>(sum.data),
                                   sum.stride,
                                   gain.as<const void>(),
                                   sum.dtype,
                                   sum.rows,
                                   norm_eps};
    run(sum.rows * size,
        [&](int threads) { midstream::add_rms_norm_score(packed, rows, z, threads); });
    return true;
  }

  midstream::Probes packed;
  std::int64_t size;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  reader.open();
  get_num_threads = py::object(py::module_::import("torch").attr("get_num_threads")).release();
  m.doc() = "C++ CPU backend of midstream.kernels.";
  m.attr("MAX_STATES") = midstream::kMaxStates;
  m.def(
      "isa", [] { return midstream::isa_name(midstream::isa()); },
      "Instruction set in use: generic, avx2, avx512, avx512bf16 or amx.");
  m.def(
      "detected_isa", [] { return midstream::isa_name(midstream::detected_isa()); },
      "Widest instruction set this machine can run.");
  m.def("set_isa_cap", &midstream::set_isa_cap, py::arg("name"),
        "Bind with at most this instruction set from now on, whatever MIDSTREAM_CPU_ISA says.");
  py::class_<Tables>(m, "Tables", "Addresses and sizes of all tables of a monitor.")
      .def(py::init<const midstream::python::TableSizes&, const midstream::python::SlotAddresses&,
                    const midstream::python::EvidenceAddresses&,
                    const midstream::python::ChainAddresses&,
                    const midstream::python::PolicyAddresses&>(),
           py::arg("sizes"), py::arg("slots"), py::arg("evidence"), py::arg("chain"),
           py::arg("policy"))
      .def("advance", &Tables::advance, "Fold the rows.", py::arg("logits"), py::arg("slot"),
           py::arg("position"));
  py::class_<Probes>(m, "Probes", "The probes of one tap, their weights copied.")
      .def(py::init<Address, int, Address, std::int64_t, std::int64_t, bool, float>(),
           py::arg("weight"), py::arg("weight_dtype"), py::arg("bias"), py::arg("probes"),
           py::arg("width"), py::arg("rms_norm"), py::arg("eps"))
      .def("score", &Probes::score, "Write the logits of the rows.", py::arg("hidden"),
           py::arg("out"))
      .def("score_advance", &Probes::score_advance, "Score the rows and fold them.",
           py::arg("tables"), py::arg("hidden"), py::arg("logits"), py::arg("slot"),
           py::arg("position"))
      .def("add_rms_norm_score", &Probes::add_rms_norm_score, "Add, score and normalise.",
           py::arg("x"), py::arg("residual"), py::arg("gamma"), py::arg("norm_eps"),
           py::arg("out"));
}
