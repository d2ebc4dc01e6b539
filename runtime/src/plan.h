// A plan in memory (docs/plan-format.md), fully validated.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernel.h"

namespace er {

constexpr uint64_t kAbsent = UINT64_MAX;  // an offset that is not there
constexpr uint32_t kMaxThreads = 64;
constexpr int64_t kSpillAlignment = 4096;  // bytes; of every tensor in the spill file
constexpr int64_t kMaxSpills = 1 << 20;

enum Region : uint8_t { kNone = 0, kArena = 1, kParams = 2, kState = 3, kMapped = 4 };
// How a parameter is stored: float32 in the parameters' region; float32 in the weights file, as it lies there; or rows
// of an output channel in bf16 or int8, in the parameters' region.
enum ParamForm : uint8_t { kFloat = 0, kInFile = 1, kBf16Rows = 2, kInt8 = 3 };

struct PlanParam {
  std::string name;
  bool trainable;
  uint8_t form;                 // ParamForm; only kFloat is trainable
  std::vector<uint64_t> shape;  // torch layout
  std::vector<uint8_t> perm;
  uint64_t elements, offset;
  std::vector<uint64_t> state_offsets;
  // Of a parameter in the weights file: whether steps take single rows of it, and whether any reads it as a whole.
  bool looked_up = false, read_whole = false;
};

struct PlanInput {
  std::string name;
  uint32_t dtype;               // 0 float32, 1 int32
  std::vector<uint64_t> shape;  // the user's layout, first = micro_batch
  std::vector<uint8_t> perm;
  uint64_t elements, train_offset, eval_offset;
  std::vector<float> mul, add;
  int64_t limit = 0;  // an int32 input: its values lie in [0, limit); 0: not known
};

struct PlanOutput {
  std::string name;
  std::vector<uint64_t> shape;  // the user's layout
  std::vector<uint8_t> perm;    // like an input's: runtime dimension d is the user's perm[d]
  uint64_t elements, eval_offset;
};

struct PlanOperand {
  uint8_t region;
  uint64_t offset, bytes;  // kMapped: the offset is the parameter's index
};

enum class Spill : uint8_t { kNone, kWrite, kRead, kWait };

struct PlanStep {
  const Kernel* kernel;
  std::string label;
  std::vector<int64_t> ints;
  std::vector<float> floats;
  std::vector<PlanOperand> operands;
  bool loss;      // adds to Context::loss
  bool looks_up;  // takes rows of a table, operand 1, which is stored as it is
  Spill spill;
};

struct Plan {
  std::string bundle_id;  // not checked: names the bundle that checkpoints of this plan belong to
  uint32_t batch_size, micro_batch, threads;
  uint64_t arena_bytes, params_bytes, state_bytes;
  std::vector<PlanParam> params;
  std::vector<PlanInput> inputs;  // the target is the last
  std::vector<PlanOutput> outputs;
  std::vector<PlanStep> train, eval;
  int64_t classes;  // of an int32 target, whose elements may also be ignore_index
  int64_t ignore_index;
  uint32_t spill_slots;  // tensors in the spill file
  uint64_t spill_bytes;  // of the file
};

// Reads and checks a plan. Throws Error with ER_BAD_PLAN if anything about it is wrong.
Plan read_plan(const void* data, size_t bytes);

// Checks the spill steps of a plan against each other, and fills in spill_slots and spill_bytes. Throws as read_plan.
void check_spills(Plan& plan);

}  // namespace er
