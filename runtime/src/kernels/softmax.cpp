#include "../kernel.h"

namespace er::ER_ISA {

extern const Kernel softmax_kernels[];
const Kernel softmax_kernels[] = {
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
