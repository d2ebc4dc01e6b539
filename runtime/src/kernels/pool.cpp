#include "../kernel.h"

namespace er::ER_ISA {

extern const Kernel pool_kernels[];
const Kernel pool_kernels[] = {
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
