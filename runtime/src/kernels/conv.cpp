#include "../kernel.h"

namespace er::ER_ISA {

extern const Kernel conv_kernels[];
const Kernel conv_kernels[] = {
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
