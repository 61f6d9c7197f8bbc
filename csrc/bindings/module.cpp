// customdiff_kernels._C: the CPU kernels, and the CUDA ones where they were built.
#include "bindings/arguments.h"
#include "common/thread_pool.h"
#include "cpu/attention.h"
#include "cpu/eigen.h"
#include "cpu/kernels.h"
#include "cpu/low_rank.h"
#ifdef CK_CUDA_ARCHITECTURES
#include "bindings/cuda.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  py::list isas;
  for (const ck::Kernels* const* entry = ck::usable_kernels(); *entry != nullptr; ++entry)
    isas.append((*entry)->name);
  info["cpu_isas"] = isas;
#ifdef CK_CUDA_ARCHITECTURES
  info["cuda_architectures"] = CK_CUDA_ARCHITECTURES;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of customdiff_kernels; customdiff_kernels._native is the only caller.";

  ck::bind_types(m);
#ifdef CK_CUDA_ARCHITECTURES
  bind_cuda(m);
#endif
  m.def("build_info", &build_info, "Compiler and the instruction sets that this build and machine offer.");
  m.def("cpu_isa", [] { return ck::kernels().name; }, "The instruction set in use.");
  m.def(
      "use_host_threads",
      [](uintptr_t address) { ck::use_host_threads(reinterpret_cast<ck::HostParallel>(address)); },
      "Run on the team of the OpenMP library whose GOMP_parallel lies at this address; 0: on the own pool.");
  m.def("attention_forward", &ck::attention_forward, py::arg("attention"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("attention_backward", &ck::attention_backward, py::arg("attention"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def(
      "score_moments",
      [](const ck::Tensor& query, const ck::Tensor& key, int threads) {
        ck::Moments moments;
        {
          py::gil_scoped_release unlocked;
          moments = ck::score_moments(query, key, threads);
        }
        return py::make_tuple(moments.sum, moments.sum_of_squares);
      },
      py::arg("query"), py::arg("key"), py::arg("threads"));
  m.def("symmetric_eigenvalues", &ck::symmetric_eigenvalues, py::arg("matrices"), py::arg("reflectors"),
        py::arg("numbers"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("tridiagonal_vectors", &ck::tridiagonal_vectors, py::arg("numbers"), py::arg("vectors"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("low_rank_sum", &ck::low_rank_sum, py::arg("sum"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("merge_residual", &ck::merge_residual, py::arg("merge"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("merge_apply", &ck::merge_apply, py::arg("merge"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("gram", &ck::gram, py::arg("features"), py::arg("out"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}
