// What every backend's attention is called with, and the checks that keep it inside its tensors.
#pragma once

#include "common/tensor.h"

namespace ck {

// s = query keyᵀ · scale + bias, P = softmax(s), out = P value; and the gradients. Tensors that are absent
// (or gradients that are not wanted) are null.
struct Attention {
  Tensor query, key, value;    // (B, H, N, D), (B, H, S, D), (B, H, S, D)
  Tensor bias, labels, table;  // (B, H, N, S), or (B, 1, N, 1) and (B, 1, G, S)
  double scale = 1;
  Tensor out;
  Tensor grad_out, grad_query, grad_key, grad_value;
  Tensor grad_bias, grad_table;  // their own shapes, with size 1 where they are broadcast

  int64_t batch() const { return query.size[0]; }
  int64_t heads() const { return query.size[1]; }
  int64_t queries() const { return query.size[2]; }
  int64_t keys() const { return key.size[2]; }
};

// Shapes and dtypes that belong together, `out` or the gradients included; std::invalid_argument names what
// does not. The kernels index memory by these sizes: nothing that disagrees may reach them.
void check_forward(const Attention& a);
void check_backward(const Attention& a);

// A broadcast dimension of the bias, the labels and the table is read with stride 0, at the full size.
void expand_bias(Attention& a);

}  // namespace ck
