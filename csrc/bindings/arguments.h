// How Python describes tensors and calls to the native code: addresses, dtypes, sizes and strides, so that no
// framework is linked.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/attention.h"
#include "common/low_rank.h"
#include "common/merge.h"

// A Tensor argument: None where it is absent, or the tuple (address, DType, sizes, strides) of four
// dimensions. Read by hand: a call has up to a dozen of them, and pybind11's own containers take
// microseconds.
template <>
struct pybind11::detail::type_caster<ck::Tensor> {
  PYBIND11_TYPE_CASTER(ck::Tensor, const_name("tuple[int, DType, tuple[int, ...], tuple[int, ...]] | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    make_caster<ck::DType> dtype;
    if (!dtype.load(PyTuple_GET_ITEM(source.ptr(), 1), false)) return false;
    value.given = true;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    value.dtype = cast_op<ck::DType>(dtype);
    return no_error() && read(PyTuple_GET_ITEM(source.ptr(), 2), value.size) &&
           read(PyTuple_GET_ITEM(source.ptr(), 3), value.stride);
  }

 private:
  static bool read(PyObject* source, int64_t (&numbers)[4]) {
    if (!PyTuple_Check(source) || PyTuple_GET_SIZE(source) != 4) return false;
    for (int i = 0; i < 4; ++i) numbers[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source, i));
    return no_error();
  }

  static bool no_error() {
    const bool none = PyErr_Occurred() == nullptr;
    if (!none) PyErr_Clear();
    return none;
  }
};

namespace ck {

// DType; Attention with its results as attributes that are set; LowRankSum and Merge.
inline void bind_types(pybind11::module_& m) {
  namespace py = pybind11;
  py::enum_<DType>(m, "DType", py::module_local())
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16)
      .value("float64", DType::kFloat64)
      .value("int32", DType::kInt32);
  py::class_<Attention> attention(m, "Attention", py::module_local());
  attention.def(py::init([](const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias,
                            const Tensor& labels, const Tensor& table, double scale) {
                  Attention a;
                  a.query = query, a.key = key, a.value = value;
                  a.bias = bias, a.labels = labels, a.table = table;
                  a.scale = scale;
                  return a;
                }),
                py::arg("query"), py::arg("key"), py::arg("value"), py::arg("bias"), py::arg("labels"),
                py::arg("table"), py::arg("scale"));
  const auto result = [&](const char* name, Tensor Attention::* tensor) {
    attention.def_property(name, nullptr, [tensor](Attention& a, const Tensor& given) { a.*tensor = given; });
  };
  result("out", &Attention::out);
  result("grad_out", &Attention::grad_out);
  result("grad_query", &Attention::grad_query);
  result("grad_key", &Attention::grad_key);
  result("grad_value", &Attention::grad_value);
  result("grad_bias", &Attention::grad_bias);
  result("grad_table", &Attention::grad_table);
  py::class_<LowRankSum>(m, "LowRankSum", py::module_local())
      .def(py::init([](const Tensor& base,
                       const std::vector<std::tuple<Tensor, Tensor, int64_t, double>>& terms,
                       const Tensor& out) {
             LowRankSum sum{base, out, {}};
             for (const auto& [u, v, start, scale] : terms) sum.terms.push_back({u, v, start, scale});
             return sum;
           }),
           py::arg("base"), py::arg("terms"), py::arg("out"));
  py::class_<Merge>(m, "Merge", py::module_local())
      .def(py::init([](const Tensor& base, const std::vector<Tensor>& weights,
                       const std::vector<Tensor>& targets, const Tensor& basis,
                       const Tensor& out) { return Merge{base, weights, targets, basis, out}; }),
           py::arg("base"), py::arg("weights"), py::arg("targets"), py::arg("basis"), py::arg("out"));
}

}  // namespace ck
