#pragma once

#include <pybind11/pybind11.h>

// The CUDA kernels, in the product's module _C and in the tests' that runs them on a CPU. Needs bind_types.
void bind_cuda(pybind11::module_& m);
