// What the bindings call: whole operators on one device and stream, checked, with the scratch memory that the
// caller provides; a stream is a cudaStream_t. Bitwise the same results on every run.
#pragma once

#include "common/attention.h"

namespace ck {
namespace cuda {

// Fills a.out.
void attention_forward(Attention a, int device, void* stream);

// Numbers of float32 that attention_backward needs beside the tensors.
int64_t attention_backward_scratch(const Attention& a, int device);

// Fills the gradients that a has.
void attention_backward(Attention a, int device, void* stream, float* scratch);

// How many parts gram() leaves for each (b, h).
int64_t gram_parts(const Tensor& rows, int device);

// parts: (B, H, gram_parts, D + 1, D) float32, each the product rowsᵀ rows and then Σ rows of a part of rows
// (B, H, n, D).
void gram(const Tensor& rows, float* parts, int device, void* stream);

}  // namespace cuda
}  // namespace ck
