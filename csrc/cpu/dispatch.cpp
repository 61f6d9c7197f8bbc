// Chooses among the instruction sets that were built by what the machine says it can run.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(CK_X86)
#include <cpuid.h>
#endif

#include "cpu/kernels.h"

namespace ck {

namespace portable {
extern const Kernels table;
}
#if defined(CK_X86)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif
#if defined(CK_X86_BF16)
namespace avx512_bf16 {
extern const Kernels table;
}
#endif

#if defined(CK_X86)
namespace {

// Of the processor itself: not every compiler's __builtin_cpu_supports knows the name.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

}  // namespace
#endif

const Kernels* const* usable_kernels() {
  static const Kernels* list[5] = {};
  static const bool filled = [] {
    int count = 0;
#if defined(CK_X86)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
#if defined(CK_X86_BF16)
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) list[count++] = &avx512_bf16::table;
#endif
    if (has_avx512) list[count++] = &avx512::table;
    if (has_avx2) list[count++] = &avx2::table;
#endif
    list[count++] = &portable::table;
    return true;
  }();
  (void)filled;
  return list;
}

const Kernels& kernels() {
  const char* forced = std::getenv("CK_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return *usable_kernels()[0];
  std::string usable;
  for (const Kernels* const* entry = usable_kernels(); *entry != nullptr; ++entry) {
    if (std::strcmp((*entry)->name, forced) == 0) return **entry;
    usable += (usable.empty() ? "" : ", ") + std::string((*entry)->name);
  }
  throw std::runtime_error("CK_CPU_ISA=" + std::string(forced) +
                           " cannot run here; this machine and build offer " + usable);
}

}  // namespace ck
