// Python module midstream.kernels._cuda: bindings on raw device addresses, no torch at build time.
// The callers in kernels/cuda.py have checked every shape, dtype and stride before they come here,
// and have made the device current.

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "addresses.h"
#include "midstream/cuda/advance.h"
#include "midstream/cuda/launch.h"
#include "midstream/cuda/score.h"

namespace py = pybind11;
namespace cuda = midstream::cuda;

namespace {

using midstream::python::Address;
using midstream::python::pointer;

cudaStream_t stream_of(Address address) { return reinterpret_cast<cudaStream_t>(address); }

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(cudaGetErrorName(error)) + ": " +
                             cudaGetErrorString(error));
  }
}

/// Slot, evidence, chain and policy tables.
struct Tables {
  Tables(const midstream::python::TableSizes& sizes, const midstream::python::SlotAddresses& slots,
         const midstream::python::EvidenceAddresses& evidence,
         const midstream::python::ChainAddresses& chain,
         const midstream::python::PolicyAddresses& policy)
      : tables(midstream::python::tables_at(sizes, slots, evidence, chain, policy)) {}

  void advance(Address logits, std::int64_t logits_stride, Address slot, Address position,
               std::int64_t count, Address stream) const {
    const midstream::Rows rows{pointer<float>(logits), logits_stride,
                               pointer<const std::int32_t>(slot),
                               pointer<const std::int32_t>(position), count};
    check(cuda::advance(rows, tables, stream_of(stream)));
  }

  midstream::Tables tables;
};

/// The probes of one tap, packed.
struct Probes {
  Probes(Address bfloat16, int bfloat16_parts, Address float16, Address float32, Address bias,
         int probes, int width, bool rms_norm, float eps)
      : probes{pointer<const void>(bfloat16),
               bfloat16_parts,
               pointer<const void>(float16),
               pointer<const float>(float32),
               pointer<const float>(bias),
               probes,
               width,
               rms_norm,
               eps} {}

  void score(Address hidden, int dtype, std::int64_t rows, std::int64_t stride, Address out,
             std::int64_t out_stride, Address stream) const {
    const cuda::HiddenRows given{pointer<const void>(hidden), static_cast<cuda::DType>(dtype),
                                 stride, rows};
    check(cuda::score(probes, given, pointer<float>(out), out_stride, stream_of(stream)));
  }

  void score_advance(const Tables& tables, Address hidden, int dtype, std::int64_t count,
                     std::int64_t stride, Address logits, std::int64_t logits_stride, Address slot,
                     Address position, Address stream) const {
    const cuda::HiddenRows given{pointer<const void>(hidden), static_cast<cuda::DType>(dtype),
                                 stride, count};
    const midstream::Rows rows{pointer<float>(logits), logits_stride,
                               pointer<const std::int32_t>(slot),
                               pointer<const std::int32_t>(position), count};
    check(cuda::score_advance(probes, given, rows, tables.tables, stream_of(stream)));
  }

  void add_rms_norm_score(Address x, std::int64_t x_stride, Address residual,
                          std::int64_t residual_stride, Address gamma, int dtype,
                          std::int64_t count, float norm_eps, Address out, std::int64_t out_stride,
                          Address stream) const {
    const cuda::NormRows rows{pointer<void>(x),
                              x_stride,
                              pointer<void>(residual),
                              residual_stride,
                              pointer<const void>(gamma),
                              static_cast<cuda::DType>(dtype),
                              count,
                              norm_eps};
    check(
        cuda::add_rms_norm_score(probes, rows, pointer<float>(out), out_stride, stream_of(stream)));
  }

  cuda::Probes probes;
};

midstream::Sizes sizes_of(const std::array<std::int64_t, 8>& n) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA backend of midstream.kernels.";
  m.attr("PACK_PROBES") = cuda::kPackProbes;
  m.attr("PACK_WIDTH") = cuda::kPackWidth;
  m.def(
      "load",
      [] {
        check(cuda::load_score_kernels());
        check(cuda::load_advance_kernels());
        check(cuda::load_score_advance_kernels());
        check(cuda::load_add_rms_norm_score_kernels());
      },
      "Load all kernels onto the current device, which a graph capture may not do.");
  m.def(
      "fits", [](const std::array<std::int64_t, 8>& sizes) { return cuda::fits(sizes_of(sizes)); },
      "Whether advance has the shared memory for tables of these sizes.", py::arg("sizes"));
  m.def(
      "fits_score_advance",
      [](const std::array<std::int64_t, 8>& sizes) {
        return cuda::fits_score_advance(sizes_of(sizes));
      },
      "Whether score_advance has the shared memory for tables of these sizes.", py::arg("sizes"));
  m.def("score_warps", &cuda::score_warps, "See launch.h.", py::arg("width"), py::arg("columns"));
  m.def("rows_per_block", &cuda::rows_per_block, "See launch.h.", py::arg("rows"), py::arg("most"));
  m.def("advance_threads", &cuda::advance_threads, "See launch.h.", py::arg("rows"));
  m.def(
      "advance_chunk",
      [](const std::array<std::int64_t, 8>& sizes, int most, std::int64_t limit) {
        return cuda::advance_chunk(sizes_of(sizes), most, limit);
      },
      "See launch.h.", py::arg("sizes"), py::arg("most"), py::arg("limit"));
  m.def(
      "norm_tile",
      [](std::int64_t rows, int most, int width, int size, std::int64_t limit) {
        const cuda::NormTile tile = cuda::norm_tile(rows, most, width, size, limit);
        return std::array<int, 2>{tile.per_block, tile.kept_stride};
      },
      "See launch.h: rows per block and numbers from row to row.", py::arg("rows"), py::arg("most"),
      py::arg("width"), py::arg("size"), py::arg("limit"));

  py::class_<Tables>(m, "Tables", "Addresses and sizes of all tables of a monitor.")
      .def(py::init<const midstream::python::TableSizes&, const midstream::python::SlotAddresses&,
                    const midstream::python::EvidenceAddresses&,
                    const midstream::python::ChainAddresses&,
                    const midstream::python::PolicyAddresses&>(),
           py::arg("sizes"), py::arg("slots"), py::arg("evidence"), py::arg("chain"),
           py::arg("policy"))
      .def("advance", &Tables::advance, "Fold `count` rows.", py::arg("logits"),
           py::arg("logits_stride"), py::arg("slot"), py::arg("position"), py::arg("count"),
           py::arg("cuda_stream"));
  py::class_<Probes>(m, "Probes", "The packed probes of one tap.")
      .def(py::init<Address, int, Address, Address, Address, int, int, bool, float>(),
           py::arg("bfloat16"), py::arg("bfloat16_parts"), py::arg("float16"), py::arg("float32"),
           py::arg("bias"), py::arg("probes"), py::arg("width"), py::arg("rms_norm"),
           py::arg("eps"))
      .def("score", &Probes::score, "Write the logits of `rows` rows.", py::arg("hidden"),
           py::arg("dtype"), py::arg("rows"), py::arg("stride"), py::arg("out"),
           py::arg("out_stride"), py::arg("cuda_stream"))
      .def("score_advance", &Probes::score_advance, "Score `count` rows and fold them.",
           py::arg("tables"), py::arg("hidden"), py::arg("dtype"), py::arg("count"),
           py::arg("stride"), py::arg("logits"), py::arg("logits_stride"), py::arg("slot"),
           py::arg("position"), py::arg("cuda_stream"))
      .def("add_rms_norm_score", &Probes::add_rms_norm_score,
           "Add, normalise and score `count` rows.", py::arg("x"), py::arg("x_stride"),
           py::arg("residual"), py::arg("residual_stride"), py::arg("gamma"), py::arg("dtype"),
           py::arg("count"), py::arg("norm_eps"), py::arg("out"), py::arg("out_stride"),
           py::arg("cuda_stream"));
}
