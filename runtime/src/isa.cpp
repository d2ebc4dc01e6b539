// Chooses the kernels' instruction set once, at first use.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "error.h"
#include "registry.h"

namespace er {

bool byte_masks = false;

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernel* (*find)(const char*);
  bool byte_masks = false;
};

#if defined(__x86_64__) && !defined(ER_BASELINE_ONLY)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
#endif

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__) && !defined(ER_BASELINE_ONLY)
    {"avx512vbmi2",
     [] { return has_avx512() && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq"); },
     avx512::find_kernel, true},
    {"avx512", has_avx512, avx512::find_kernel},
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2");
     },
     avx2::find_kernel},
#endif
    {"portable", [] { return true; }, portable::find_kernel},
};

struct Choice {
  const Isa* isa = nullptr;
  std::string problem;
};

Choice choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char* wanted = std::getenv("EDGE_RAZOR_ISA");
  Choice choice;
  for (const Isa& isa : kIsas) {
    if (!isa.supported()) continue;
    if (!wanted || !*wanted || !std::strcmp(wanted, isa.name)) return {&isa, ""};
    choice.isa = &isa;
  }
  choice.problem = text("EDGE_RAZOR_ISA=%.40s: this machine and build have", wanted);
  for (const Isa& isa : kIsas)
    if (isa.supported()) choice.problem += std::string(" ") + isa.name;
  return choice;
}

const Choice& choice() {
  static const Choice chosen = [] {
    const Choice best = choose();
    byte_masks = best.isa->byte_masks;
    return best;
  }();
  return chosen;
}

}  // namespace

const Kernel* find_kernel(const char* name) { return choice().isa->find(name); }
uint64_t scratch_everywhere(const char* name, const Call& call, int threads) {
  uint64_t most = 0;
  for (const Isa& isa : kIsas) {
    const Kernel* kernel = isa.supported() ? isa.find(name) : nullptr;
    if (kernel && kernel->scratch) most = std::max(most, kernel->scratch(call, threads));
  }
  return most;
}
const char* isa_name() { return choice().isa->name; }
const char* isa_problem() { return choice().problem.c_str(); }

}  // namespace er
