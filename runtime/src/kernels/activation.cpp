#include "../kernel.h"

namespace er::ER_ISA {

extern const Kernel activation_kernels[];
const Kernel activation_kernels[] = {
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
