// customdiff_kernels._C: tensors arrive as addresses, dtypes, sizes and strides, so no framework is linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/thread_pool.h"
#include "cpu/attention.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

using Four = std::array<int64_t, 4>;

ck::Tensor make_tensor(uintptr_t address, ck::DType dtype, const Four& size, const Four& stride) {
  ck::Tensor tensor;
  tensor.given = true;
  tensor.data = reinterpret_cast<void*>(address);
  tensor.dtype = dtype;
  for (int i = 0; i < 4; ++i) {
    tensor.size[i] = size[i];
    tensor.stride[i] = stride[i];
  }
  return tensor;
}

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
  return info;
}

// An absent tensor is one that was made without arguments.
void attention_forward(const ck::Tensor& query, const ck::Tensor& key, const ck::Tensor& value,
                       const ck::Tensor& bias, const ck::Tensor& labels, const ck::Tensor& table,
                       double scale, const ck::Tensor& out, int threads) {
  ck::Attention a;
  a.query = query, a.key = key, a.value = value;
  a.bias = bias, a.labels = labels, a.table = table;
  a.scale = scale;
  a.out = out;
  py::gil_scoped_release unlocked;
  ck::attention_forward(a, threads);
}

void attention_backward(const ck::Tensor& grad_out, const ck::Tensor& query, const ck::Tensor& key,
                        const ck::Tensor& value, const ck::Tensor& bias, const ck::Tensor& labels,
                        const ck::Tensor& table, double scale, const ck::Tensor& grad_query,
                        const ck::Tensor& grad_key, const ck::Tensor& grad_value, const ck::Tensor& grad_bias,
                        const ck::Tensor& grad_table, int threads) {
  ck::Attention a;
  a.query = query, a.key = key, a.value = value;
  a.bias = bias, a.labels = labels, a.table = table;
  a.scale = scale;
  a.grad_out = grad_out;
  a.grad_query = grad_query, a.grad_key = grad_key, a.grad_value = grad_value;
  a.grad_bias = grad_bias, a.grad_table = grad_table;
  py::gil_scoped_release unlocked;
  ck::attention_backward(a, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of customdiff_kernels; customdiff_kernels._native is the only caller.";

  py::enum_<ck::DType>(m, "DType")
      .value("float32", ck::DType::kFloat32)
      .value("bfloat16", ck::DType::kBFloat16)
      .value("float16", ck::DType::kFloat16)
      .value("float64", ck::DType::kFloat64)
      .value("int32", ck::DType::kInt32);
  py::class_<ck::Tensor>(m, "Tensor")
      .def(py::init<>())
      .def(py::init(&make_tensor), py::arg("address"), py::arg("dtype"), py::arg("size"), py::arg("stride"));

  m.def("build_info", &build_info, "Compiler and the instruction sets that this build and machine offer.");
  m.def("cpu_isa", [] { return ck::kernels().name; }, "The instruction set in use.");
  m.def(
      "use_host_threads",
      [](uintptr_t address) { ck::use_host_threads(reinterpret_cast<ck::HostParallel>(address)); },
      "Run on the team of the OpenMP library whose GOMP_parallel lies at this address; 0: on the own pool.");
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
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
}
