// _cuda_shim: the kernels of csrc/cuda on the CPU, with the bindings that they have in the product.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "bindings/cuda.h"
#include "cuda_shim.h"
#include "self_test.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda_shim, m) {
  ck::bind_types(m);
  bind_cuda(m);

  namespace shim = ck::cuda::shim;
  py::enum_<shim::Sync>(m, "Sync")
      .value("barrier", shim::kBarrier)
      .value("warp_barrier", shim::kWarpBarrier)
      .value("copy_wait", shim::kCopyWait);
  m.def("set_seed", &shim::set_seed);
  m.def("set_dropped", &shim::set_dropped, py::arg("sync"), py::arg("n"), py::arg("launch") = -1,
        "Every thread passes its n-th sync by (-1: none), in every launch from now on or in the launch-th.");
  m.def("executed", &shim::executed,
        "What a thread met of sync, for each launch since the last set_dropped.");
  m.def("launched", &shim::launched, "The kernels of the same launches, as offsets in this library.");
  m.def("set_dropped_barrier", &shim::set_dropped_barrier, py::arg("n"), py::arg("launch") = -1);
  m.def("barriers_of_last_launch", &shim::barriers_of_last_launch);
  m.def("self_test", [](const std::string& name, uintptr_t a, uintptr_t b, uintptr_t out, int n,
                        int64_t blocks, int threads, int64_t shared_bytes) {
    const auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    py::gil_scoped_release unlocked;
    ck::cuda::self_test(name, {at(a), at(b), at(out), n}, blocks, threads, shared_bytes);
  });
}
