#include "../kernel.h"

namespace er::ER_ISA {

extern const Kernel norm_kernels[];
const Kernel norm_kernels[] = {
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
