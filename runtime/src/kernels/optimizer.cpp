#include "../kernel.h"

namespace er::ER_ISA {

extern const Kernel optimizer_kernels[];
const Kernel optimizer_kernels[] = {
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
