#include "bindings/cuda.h"

#include "bindings/arguments.h"
#include "cuda/attention.h"
#include "cuda/low_rank.h"

namespace py = pybind11;

void bind_cuda(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def(
      "cuda_attention_forward",
      [](const ck::Attention& a, int device, uintptr_t stream) {
        ck::cuda::attention_forward(a, device, reinterpret_cast<void*>(stream));
      },
      py::arg("attention"), py::arg("device"), py::arg("stream"), unlocked);
  m.def("cuda_attention_backward_scratch", &ck::cuda::attention_backward_scratch, py::arg("attention"),
        py::arg("device"), "Numbers of float32 that cuda_attention_backward needs.", unlocked);
  m.def(
      "cuda_attention_backward",
      [](const ck::Attention& a, int device, uintptr_t stream, uintptr_t scratch) {
        ck::cuda::attention_backward(a, device, reinterpret_cast<void*>(stream),
                                     reinterpret_cast<float*>(scratch));
      },
      py::arg("attention"), py::arg("device"), py::arg("stream"), py::arg("scratch"), unlocked);
  m.def("cuda_gram_parts", &ck::cuda::gram_parts, py::arg("rows"), py::arg("device"), unlocked);
  m.def(
      "cuda_gram",
      [](const ck::Tensor& rows, uintptr_t parts, int device, uintptr_t stream) {
        ck::cuda::gram(rows, reinterpret_cast<float*>(parts), device, reinterpret_cast<void*>(stream));
      },
      py::arg("rows"), py::arg("parts"), py::arg("device"), py::arg("stream"), unlocked);
  m.def(
      "cuda_low_rank_sum",
      [](const ck::LowRankSum& sum, int device, uintptr_t stream) {
        ck::cuda::low_rank_sum(sum, device, reinterpret_cast<void*>(stream));
      },
      py::arg("sum"), py::arg("device"), py::arg("stream"), unlocked);
}
