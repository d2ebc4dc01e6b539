// Transfers between the arena and the spill file. The session starts and awaits them itself (session.cpp), so these
// entries have only checks: what a single step can be told, while check_spills (plan_spill.cpp) looks at the pairs.
#include "../plan.h"
#include "call_check.h"

namespace er::ER_ISA {
namespace {

// spill_write: X; spill_read: X!; ints slot, offset in the file. spill_wait: X; ints slot.
std::string check_spill(const Call& call, uint32_t ints) {
  CallCheck check(call, 1, ints, 0);
  check.integer(0, "slot", 0, kMaxSpills - 1);
  if (ints > 1) {
    const int64_t offset = check.integer(1, "offset", 0, INT64_MAX);
    if (check.ok()) check.require(offset % kSpillAlignment == 0, "offset must be a multiple of 4096");
  }
  check.present(0, "X", 1);
  return check.error();
}

std::string check_transfer(const Call& call) { return check_spill(call, 2); }
std::string check_wait(const Call& call) { return check_spill(call, 1); }

}  // namespace

extern const Kernel spill_kernels[];
const Kernel spill_kernels[] = {
    {"spill_write", ER_CHECK(check_transfer), nullptr, nullptr},
    {"spill_read", ER_CHECK(check_transfer), nullptr, nullptr},
    {"spill_wait", ER_CHECK(check_wait), nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
