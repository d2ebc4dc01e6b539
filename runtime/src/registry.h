#pragma once
#include "kernel.h"

namespace er {

#define ER_DECLARE_ISA(isa)                    \
  namespace isa {                              \
  const Kernel* find_kernel(const char* name); \
  }
ER_DECLARE_ISA(portable)
#if defined(__x86_64__) && !defined(ER_BASELINE_ONLY)
ER_DECLARE_ISA(avx2)
ER_DECLARE_ISA(avx512)
#endif
#undef ER_DECLARE_ISA

// The kernel `name` for the best instruction set of this machine (or EDGE_RAZOR_ISA), or null.
const Kernel* find_kernel(const char* name);
// The most scratch that the kernel needs with any instruction set of this machine, so that a plan does not depend on
// which; UINT64_MAX for attributes that are not valid.
uint64_t scratch_everywhere(const char* name, const Call& call, int threads);
const char* isa_name();
// What is wrong with EDGE_RAZOR_ISA; "" if nothing.
const char* isa_problem();

// Everything that must hold before `kernel` may run: its own check, and for a kernel with scratch() that the last
// operand is large enough for `threads`. Returns what is wrong, "" if nothing.
std::string check_call(const Kernel& kernel, const Call& call, int threads);

}  // namespace er
