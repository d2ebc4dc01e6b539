#pragma once
#include "kernel.h"

namespace er {

#define ER_DECLARE_ISA(isa)                  \
  namespace isa {                            \
  const Kernel* find_kernel(const char* name); \
  }
ER_DECLARE_ISA(portable)
#if defined(__x86_64__)
ER_DECLARE_ISA(avx2)
ER_DECLARE_ISA(avx512)
#endif
#undef ER_DECLARE_ISA

// The kernel `name` for the best instruction set of this machine (or EDGE_RAZOR_ISA), or null.
const Kernel* find_kernel(const char* name);
const char* isa_name();

}  // namespace er
