// Every kernel of one instruction set. Compiled once per ER_ISA, like the kernels.
#include "registry.h"

#include <cstring>

namespace er::ER_ISA {

#define ER_FAMILIES(X) \
  X(conv)              \
  X(conv_weight)       \
  X(razor)             \
  X(activation)        \
  X(norm)              \
  X(arithmetic)        \
  X(pool)              \
  X(softmax)           \
  X(layer_norm)        \
  X(attention)         \
  X(embedding)         \
  X(select_position)   \
  X(matmul)            \
  X(dropout)           \
  X(loss)              \
  X(spill)             \
  X(optimizer)         \
  X(optimizer_rows)

#define ER_DECLARE(family) extern const Kernel family##_kernels[];
ER_FAMILIES(ER_DECLARE)
#undef ER_DECLARE

const Kernel* find_kernel(const char* name) {
#define ER_LIST(family) family##_kernels,
  static const Kernel* const families[] = {ER_FAMILIES(ER_LIST)};
#undef ER_LIST
  for (const Kernel* kernel : families)
    for (; kernel->name; kernel++)
      if (!std::strcmp(kernel->name, name)) return kernel;
  return nullptr;
}

}  // namespace er::ER_ISA
