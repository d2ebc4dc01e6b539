#include "../kernel.h"

namespace er::ER_ISA {

extern const Kernel razor_kernels[];
const Kernel razor_kernels[] = {
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
