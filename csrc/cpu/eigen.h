// The largest eigenvectors of symmetric matrices, in float32: customdiff_kernels/low_rank/MATH.md.
#pragma once

#include "common/tensor.h"

namespace ck {

// Reduces each of matrices (G,1,n,n), of which the lower triangle is read, to a tridiagonal T. numbers
// (G,1,4,n) receives the diagonal of T, the entries beside it (n - 1), the factors tau of the reflectors
// (n - 1) and all eigenvalues, descending; row j of reflectors (G,1,n-1,n-1) column j of Q[1:,1:] as LAPACK's
// ormqr takes it, for matrices whose rows and columns are in reverse order. Bitwise the same at any number of
// threads.
void symmetric_eigenvalues(const Tensor& matrices, const Tensor& reflectors, const Tensor& numbers,
                           int threads);

// The unit eigenvectors of one T (numbers (1,1,4,n)) for its first r eigenvalues, as rows of vectors
// (1,1,r,n).
void tridiagonal_vectors(const Tensor& numbers, const Tensor& vectors, int threads);

}  // namespace ck
