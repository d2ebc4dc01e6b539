#include "../kernel.h"

namespace er::ER_ISA {

extern const Kernel dropout_kernels[];
const Kernel dropout_kernels[] = {
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
