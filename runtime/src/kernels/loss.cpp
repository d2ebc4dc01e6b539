#include "../kernel.h"

namespace er::ER_ISA {

extern const Kernel loss_kernels[];
const Kernel loss_kernels[] = {
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
