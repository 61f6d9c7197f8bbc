// Compiled once for each instruction set: CK_ISA is its name, the compiler's flags are its meaning.
#include "cpu/kernels.h"

#include "cpu/score_moments.h"

#define CK_TEXT(name) CK_TEXT_(name)
#define CK_TEXT_(name) #name

namespace ck {
namespace CK_ISA {

extern const Kernels table;
const Kernels table = {CK_TEXT(CK_ISA), score_moments};

}  // namespace CK_ISA
}  // namespace ck
