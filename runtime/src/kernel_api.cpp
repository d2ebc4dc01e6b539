// The C ABI for single kernels: planners ask for scratch sizes, tests and tools run them on their own buffers.
#include <memory>

#include "blas.h"
#include "error.h"
#include "plan.h"
#include "registry.h"

namespace er {
namespace {

// Kernels may read any scalar of a tensor with an aligned load; the widest is the razor mask's u64.
constexpr uintptr_t kAlignment = 8;

const Kernel* kernel_or_fail(const char* name, er_status* status) {
  const Kernel* kernel = nullptr;
  if (!name)
    *status = fail(ER_INVALID_ARGUMENT, "kernel name is NULL");
  else if (*isa_problem())
    *status = fail(ER_INVALID_ARGUMENT, "%s", isa_problem());
  else if (!(kernel = find_kernel(name)))
    *status = fail(ER_INVALID_ARGUMENT, "there is no kernel '%.64s'", name);
  return kernel;
}

// Single kernel calls come in series with the same thread count (tests, benchmarks): keep the last pool of each calling
// thread.
ThreadPool& cached_pool(int threads) {
  static thread_local std::unique_ptr<ThreadPool> pool;
  if (!pool || pool->threads() != threads) {
    pool.reset();
    blas_single_threaded();
    pool = std::make_unique<ThreadPool>(threads);
  }
  return *pool;
}

}  // namespace

std::string check_call(const Kernel& kernel, const Call& call, int threads) {
  std::string problem = portable::find_kernel(kernel.name)->check(call);
  if (!problem.empty() || !kernel.scratch) return problem;
  const uint64_t needed = kernel.scratch(call, threads);
  const er_operand scratch = call.n_operands ? call.operands[call.n_operands - 1] : er_operand{nullptr, 0};
  const uint64_t given = scratch.data ? scratch.bytes : 0;
  if (given < needed)
    return text("scratch has %llu bytes, %llu are needed with %d threads", static_cast<unsigned long long>(given),
                static_cast<unsigned long long>(needed), threads);
  return "";
}

}  // namespace er

using namespace er;

extern "C" {

uint32_t er_abi_version(void) { return ER_ABI_VERSION; }

const char* er_isa(void) { return isa_name(); }

er_status er_kernel_scratch(const char* name, const int64_t* ints, uint32_t n_ints, const float* floats,
                            uint32_t n_floats, uint32_t threads, uint64_t* bytes) {
  return guard([&] {
    er_status status = ER_OK;
    const Kernel* kernel = kernel_or_fail(name, &status);
    if (!kernel) return status;
    if (!bytes || (n_ints && !ints) || (n_floats && !floats))
      return fail(ER_INVALID_ARGUMENT, "%s: a NULL array", name);
    if (threads < 1 || threads > kMaxThreads)
      return fail(ER_INVALID_ARGUMENT, "%s: threads must be 1 to %u, not %u", name, kMaxThreads, threads);
    *bytes = 0;
    if (!kernel->scratch) return ER_OK;
    const Call call{ints, n_ints, floats, n_floats, nullptr, 0, nullptr, nullptr};
    const uint64_t needed = scratch_everywhere(name, call, static_cast<int>(threads));
    if (needed == UINT64_MAX) return fail(ER_INVALID_ARGUMENT, "%s: the attributes are not valid", name);
    *bytes = needed;
    return ER_OK;
  });
}

er_status er_kernel_run(const char* name, const int64_t* ints, uint32_t n_ints, const float* floats, uint32_t n_floats,
                        const er_operand* operands, uint32_t n_operands, uint32_t threads, er_context* context) {
  return guard([&] {
    er_status status = ER_OK;
    const Kernel* kernel = kernel_or_fail(name, &status);
    if (!kernel) return status;
    if (!context || (n_ints && !ints) || (n_floats && !floats) || (n_operands && !operands))
      return fail(ER_INVALID_ARGUMENT, "%s: a NULL array or context", name);
    if (threads < 1 || threads > kMaxThreads)
      return fail(ER_INVALID_ARGUMENT, "%s: threads must be 1 to %u, not %u", name, kMaxThreads, threads);
    for (uint32_t i = 0; i < n_operands; i++)
      if (reinterpret_cast<uintptr_t>(operands[i].data) % kAlignment)
        return fail(ER_INVALID_ARGUMENT, "%s: operand %u is not aligned to %u bytes", name, i,
                    static_cast<unsigned>(kAlignment));
    for (uint32_t i = 0; i < n_operands; i++)
      if (!operands[i].data && operands[i].bytes)
        return fail(ER_INVALID_ARGUMENT, "%s: operand %u is NULL but has a size", name, i);
    if (!kernel->run) return fail(ER_INVALID_ARGUMENT, "%s runs only as a step of a session", name);
    Call call{ints, n_ints, floats, n_floats, operands, n_operands, nullptr, nullptr};
    const std::string problem = check_call(*kernel, call, static_cast<int>(threads));
    if (!problem.empty()) return fail(ER_INVALID_ARGUMENT, "%s: %s", name, problem.c_str());
    if (kernel->scratch && n_operands) {
      const er_operand& scratch = operands[n_operands - 1];
      const auto begin = [](const er_operand& o) { return reinterpret_cast<uintptr_t>(o.data); };
      for (uint32_t i = 0; i + 1 < n_operands; i++)
        if (begin(operands[i]) < begin(scratch) + scratch.bytes &&
            begin(scratch) < begin(operands[i]) + operands[i].bytes)
          return fail(ER_INVALID_ARGUMENT, "%s: scratch overlaps operand %u", name, i);
    }
    call.pool = &cached_pool(static_cast<int>(threads));
    call.context = context;
    if (!kernel->run(call)) return fail(ER_NON_FINITE, "%s: a value is NaN or infinite", name);
    return ER_OK;
  });
}

}  // extern "C"
