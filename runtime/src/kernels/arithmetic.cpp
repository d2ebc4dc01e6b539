#include "../kernel.h"

namespace er::ER_ISA {

extern const Kernel arithmetic_kernels[];
const Kernel arithmetic_kernels[] = {
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
