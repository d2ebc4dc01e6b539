#include "plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "byte_reader.h"
#include "crc32.h"
#include "error.h"
#include "registry.h"
#include "stored.h"
#include "utf8.h"

namespace er {
namespace {

constexpr char kMagic[] = "EDGERZR\n";
constexpr uint32_t kVersion = 5;
constexpr size_t kHeaderBytes = 24;
constexpr uint64_t kAlignment = 64;
constexpr uint64_t kMaxRegionBytes = uint64_t{1} << 46;  // far above any device, far below overflow
constexpr uint32_t kMaxBatch = 1u << 20;

#define ER_BAD(...) \
  throw Error { ER_BAD_PLAN, text(__VA_ARGS__) }

unsigned long long ull(uint64_t x) { return x; }

// Bit i: the kernel only reads operand i, so that it may lie in memory that cannot be written. What is not listed takes
// no such operand.
constexpr struct {
  const char* kernel;
  uint32_t reads;
} kReads[] = {
    {"conv", 0x4f},
    {"conv_grad_input", 0x17},
    {"conv_grad_weight", 0x3},
    {"pack", 0x1},
    {"affine", 0x7},
    {"activation_grad", 0x3},
    {"channel_sum", 0x1},
    {"batch_norm_fold", 0x1f},
    {"batch_norm_grad", 0x1f},
    {"column_dot", 0x3},
    {"scale_columns", 0x3},
    {"mul_grad", 0x3},
    {"binary", 0x3},
    {"neg", 0x1},
    {"reduce", 0x1},
    {"broadcast", 0x1},
    {"max_pool", 0x1},
    {"max_pool_grad", 0x3},
    {"average_pool", 0x1},
    {"average_pool_grad", 0x1},
    {"softmax", 0x1},
    {"softmax_grad", 0x3},
    {"layer_norm", 0x7},
    {"layer_norm_grad", 0x8f},
    {"attention", 0x1f},
    {"attention_grad", 0x7f},
    {"select_position", 0x3},
    {"select_position_grad", 0x3},
    {"embedding", 0x3},
    {"embedding_grad", 0x3},
    {"embedding_grad_rows", 0x3},
    {"batch_matmul", 0x3},
    {"rotary", 0x7},
    {"copy", 0x1},
    {"dropout", 0x1},
    {"cross_entropy", 0x3},
    {"mse", 0x3},
    {"bce_logits", 0x3},
    {"sgd", 0x2},
    {"adamw", 0x2},
    {"sgd_rows", 0x2},
    {"adamw_rows", 0x2},
};

// Bit i: operand i holds indices or bit masks, which say where the kernel reads or writes. They are checked in the
// step, so nothing that it writes may change them.
constexpr struct {
  const char* kernel;
  uint32_t operands;
} kIndices[] = {
    {"conv_grad_weight", 0x1},     {"mul_grad", 0x1},        {"max_pool_grad", 0x2},
    {"layer_norm_grad", 0x1},      {"attention_grad", 0x47}, {"select_position", 0x2},
    {"select_position_grad", 0x2}, {"embedding", 0x1},       {"embedding_grad", 0x1},
    {"embedding_grad_rows", 0x1},  {"cross_entropy", 0x2},   {"sgd_rows", 0xa},
    {"adamw_rows", 0x12},
};

bool only_reads(const char* kernel, size_t operand) {
  for (const auto& entry : kReads)
    if (!std::strcmp(entry.kernel, kernel)) return operand < 32 && entry.reads >> operand & 1;
  return false;
}

uint32_t index_operands(const char* kernel) {
  for (const auto& entry : kIndices)
    if (!std::strcmp(entry.kernel, kernel)) return entry.operands;
  return 0;
}

bool overlap(const PlanOperand& a, const PlanOperand& b) {
  return a.region == b.region && a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
}

Spill spill_of(const std::string& kernel) {
  if (kernel == "spill_write") return Spill::kWrite;
  if (kernel == "spill_read") return Spill::kRead;
  return kernel == "spill_wait" ? Spill::kWait : Spill::kNone;
}

class PlanReader {
 public:
  explicit PlanReader(ByteReader bytes) : bytes_(bytes) {}

  Plan read() {
    plan_.bundle_id = bytes_.string();
    if (plan_.bundle_id.size() > 4096 || !is_utf8(plan_.bundle_id)) ER_BAD("the plan has an invalid bundle id");
    plan_.batch_size = bytes_.value<uint32_t>();
    plan_.micro_batch = bytes_.value<uint32_t>();
    plan_.threads = bytes_.value<uint32_t>();
    if (bytes_.value<uint64_t>() != 0) ER_BAD("the plan uses a reserved field: it needs a newer runtime");
    plan_.arena_bytes = region("arena");
    plan_.params_bytes = region("parameters");
    plan_.state_bytes = region("state");
    if (plan_.batch_size < 1 || plan_.batch_size > kMaxBatch || plan_.micro_batch < 1 ||
        plan_.micro_batch > plan_.batch_size)
      ER_BAD("the plan has batch size %u and micro-batch %u", plan_.batch_size, plan_.micro_batch);
    if (plan_.threads < 1 || plan_.threads > kMaxThreads)
      ER_BAD("the plan has %u threads, 1 to %u are possible", plan_.threads, kMaxThreads);
    params();
    inputs();
    outputs();
    steps(plan_.train);
    steps(plan_.eval);
    if (bytes_.left()) ER_BAD("the plan has %llu bytes after its end", ull(bytes_.left()));
    losses();
    check_spills(plan_);
    return std::move(plan_);
  }

 private:
  uint64_t region(const char* name) {
    const uint64_t bytes = bytes_.value<uint64_t>();
    if (bytes > kMaxRegionBytes) ER_BAD("the plan's %s region of %llu bytes is beyond reason", name, ull(bytes));
    return bytes;
  }

  std::string name(const char* what) {
    std::string name = bytes_.string();
    if (name.empty() || name.size() > 4096 || !is_utf8(name)) ER_BAD("the plan has %s with an invalid name", what);
    return name;
  }

  std::vector<uint64_t> shape(const std::string& owner, uint64_t* elements) {
    std::vector<uint64_t> dims = bytes_.values<uint64_t>();
    if (dims.size() > ER_MAX_RANK)
      ER_BAD("'%.200s' has %llu dimensions, %d are possible", owner.c_str(), ull(dims.size()), ER_MAX_RANK);
    *elements = 1;
    for (uint64_t dim : dims)
      if (dim == 0 || __builtin_mul_overflow(*elements, dim, elements) || *elements > kMaxRegionBytes / 4)
        ER_BAD("'%.200s' has an impossible shape", owner.c_str());
    return dims;
  }

  std::vector<uint8_t> permutation(const std::string& owner, size_t rank) {
    std::vector<uint8_t> perm = bytes_.values<uint8_t>();
    unsigned seen = 0;
    for (uint8_t p : perm) seen |= p < ER_MAX_RANK ? 1u << p : 1u << 31;
    if (perm.size() != rank || seen != (1u << rank) - 1) ER_BAD("'%.200s' has an invalid permutation", owner.c_str());
    return perm;
  }

  void inside(const std::string& owner, const char* what, uint64_t offset, uint64_t bytes, uint64_t region_bytes) {
    if (offset % kAlignment || offset > region_bytes || bytes > region_bytes - offset)
      ER_BAD("'%.200s': %s at %llu with %llu bytes does not lie inside its region of %llu bytes", owner.c_str(), what,
             ull(offset), ull(bytes), ull(region_bytes));
  }

  // Refuses overlaps among (offset, bytes) spans.
  static void disjoint(const char* what, std::vector<std::pair<uint64_t, uint64_t>> spans) {
    std::sort(spans.begin(), spans.end());
    for (size_t i = 1; i < spans.size(); i++)
      if (spans[i - 1].first + spans[i - 1].second > spans[i].first)
        ER_BAD("two %s of the plan overlap at byte %llu", what, ull(spans[i].first));
  }

  void params() {
    const uint32_t n = bytes_.count(30);
    std::set<std::string> names;
    std::vector<std::pair<uint64_t, uint64_t>> values, states;
    for (uint32_t i = 0; i < n; i++) {
      PlanParam p;
      p.name = name("a parameter");
      const uint8_t trainable = bytes_.value<uint8_t>();
      if (trainable > 1) ER_BAD("'%.200s': trainable is %u", p.name.c_str(), trainable);
      p.trainable = trainable;
      p.form = bytes_.value<uint8_t>();
      if (p.form > kInt8 || (p.form != kFloat && p.trainable))
        ER_BAD("'%.200s': a parameter that trains (%u) cannot be stored in form %u", p.name.c_str(), trainable, p.form);
      p.shape = shape(p.name, &p.elements);
      p.perm = permutation(p.name, p.shape.size());
      p.offset = bytes_.value<uint64_t>();
      p.state_offsets = bytes_.values<uint64_t>();
      if (p.form == kInFile) {
        if (p.offset != 0 || !std::is_sorted(p.perm.begin(), p.perm.end()))
          ER_BAD("'%.200s' is read in the weights file, but has a place or a layout of its own", p.name.c_str());
      } else {
        inside(p.name, "the parameter", p.offset, stored_bytes(p), plan_.params_bytes);
        values.emplace_back(p.offset, stored_bytes(p));
      }
      if (p.form != kFloat && !p.state_offsets.empty())
        ER_BAD("'%.200s' does not train, but has optimizer state", p.name.c_str());
      for (uint64_t offset : p.state_offsets) {
        inside(p.name, "its state", offset, p.elements * 4, plan_.state_bytes);
        states.emplace_back(offset, p.elements * 4);
      }
      if (!names.insert(p.name).second) ER_BAD("the plan has two parameters '%.200s'", p.name.c_str());
      plan_.params.push_back(std::move(p));
    }
    disjoint("parameters", std::move(values));
    disjoint("state tensors", std::move(states));
  }

  void inputs() {
    const uint32_t n = bytes_.count(41);
    if (n == 0) ER_BAD("the plan has no target");
    std::set<std::string> names;
    std::vector<std::pair<uint64_t, uint64_t>> train, eval;
    for (uint32_t i = 0; i < n; i++) {
      PlanInput in;
      in.name = name("an input");
      in.dtype = bytes_.value<uint8_t>();
      if (in.dtype > 1) ER_BAD("input '%.200s' has dtype %u", in.name.c_str(), in.dtype);
      in.shape = shape(in.name, &in.elements);
      in.perm = permutation(in.name, in.shape.size());
      batched(in.name, in.shape, in.perm);
      in.train_offset = bytes_.value<uint64_t>();
      in.eval_offset = bytes_.value<uint64_t>();
      in.mul = bytes_.values<float>();
      in.add = bytes_.values<float>();
      inside(in.name, "the input", in.train_offset, in.elements * 4, plan_.arena_bytes);
      train.emplace_back(in.train_offset, in.elements * 4);
      if (in.eval_offset != kAbsent) {
        inside(in.name, "the input", in.eval_offset, in.elements * 4, plan_.arena_bytes);
        eval.emplace_back(in.eval_offset, in.elements * 4);
      }
      const uint64_t channels = in.shape.size() > 1 && in.dtype == 0 ? in.shape[in.perm.back()] : 0;
      if (in.mul.size() != in.add.size() || (!in.mul.empty() && in.mul.size() != channels))
        ER_BAD("input '%.200s' has %llu channels, but normalization for %llu and %llu", in.name.c_str(), ull(channels),
               ull(in.mul.size()), ull(in.add.size()));
      for (size_t c = 0; c < in.mul.size(); c++)
        if (!std::isfinite(in.mul[c]) || !std::isfinite(in.add[c]))
          ER_BAD("input '%.200s' has a non-finite normalization", in.name.c_str());
      if (!names.insert(in.name).second) ER_BAD("the plan has two inputs '%.200s'", in.name.c_str());
      plan_.inputs.push_back(std::move(in));
    }
    const PlanInput& target = plan_.inputs.back();
    if (target.name != "target" || target.eval_offset != kAbsent) ER_BAD("the plan's last input is not a target");
    disjoint("inputs", std::move(train));
    disjoint("inputs", std::move(eval));
  }

  void batched(const std::string& owner, const std::vector<uint64_t>& shape, const std::vector<uint8_t>& perm) {
    if (shape.empty() || shape[0] != plan_.micro_batch || perm[0] != 0)
      ER_BAD("'%.200s': the first dimension is not the micro-batch of %u", owner.c_str(), plan_.micro_batch);
  }

  void outputs() {
    const uint32_t n = bytes_.count(20);
    for (uint32_t i = 0; i < n; i++) {
      PlanOutput out;
      out.name = name("an output");
      const std::vector<uint64_t> runtime = shape(out.name, &out.elements);
      const std::vector<uint8_t> perm = permutation(out.name, runtime.size());
      batched(out.name, runtime, perm);
      out.shape.resize(runtime.size());
      out.perm.resize(runtime.size());
      for (size_t d = 0; d < runtime.size(); d++) {
        out.shape[d] = runtime[perm[d]];
        out.perm[perm[d]] = static_cast<uint8_t>(d);
      }
      out.eval_offset = bytes_.value<uint64_t>();
      inside(out.name, "the output", out.eval_offset, out.elements * 4, plan_.arena_bytes);
      plan_.outputs.push_back(std::move(out));
    }
  }

  void steps(std::vector<PlanStep>& steps) {
    const uint32_t n = bytes_.count(20);
    for (uint32_t i = 0; i < n; i++) {
      const std::string kernel = bytes_.string();
      PlanStep step;
      step.kernel = find_kernel(kernel.c_str());
      if (!step.kernel || kernel != step.kernel->name)
        ER_BAD("step %u needs the kernel '%.64s', which this runtime does not have", i, kernel.c_str());
      step.label = bytes_.string();
      if (step.label.size() > 4096 || !is_utf8(step.label))
        ER_BAD("step %u (%s) has an invalid label", i, step.kernel->name);
      step.ints = bytes_.values<int64_t>();
      step.floats = bytes_.values<float>();
      const uint32_t operands = bytes_.count(17);
      for (uint32_t o = 0; o < operands; o++) step.operands.push_back(operand(step, o, o + 1 == operands));
      check(step);
      if (step.kernel->scratch) scratch_apart(step);
      indices_apart(step);
      if (kernel == "attention_grad") gradients_apart(step);
      if (kernel == "conv" && operands > 7) addend_apart(step);
      step.spill = spill_of(kernel);
      step.looks_up = kernel == "embedding" && step.ints[3] == 0;
      for (size_t o = 0; o < step.operands.size(); o++)
        if (step.operands[o].region == kMapped) {
          PlanParam& param = plan_.params[step.operands[o].offset];
          (step.looks_up && o == 1 ? param.looked_up : param.read_whole) = true;
        }
      step.loss = kernel == "cross_entropy" || kernel == "mse" || kernel == "bce_logits";
      steps.push_back(std::move(step));
    }
  }

  PlanOperand operand(const PlanStep& step, uint32_t index, bool last) {
    PlanOperand o;
    o.region = bytes_.value<uint8_t>();
    o.offset = bytes_.value<uint64_t>();
    o.bytes = bytes_.value<uint64_t>();
    const uint64_t sizes[] = {0, plan_.arena_bytes, plan_.params_bytes, plan_.state_bytes};
    const std::string owner = std::string(step.kernel->name) + " " + step.label;
    if (o.region > kMapped) ER_BAD("'%.200s' has an operand in region %u", owner.c_str(), o.region);
    if (o.region == kMapped) {
      if (o.offset >= plan_.params.size() || plan_.params[o.offset].form != kInFile ||
          o.bytes != stored_bytes(plan_.params[o.offset]))
        ER_BAD("'%.200s': operand %u is no parameter in the weights file", owner.c_str(), index);
      if ((last && step.kernel->scratch) || !only_reads(step.kernel->name, index))  // the last is scratch
        ER_BAD("'%.200s' cannot have operand %u in the weights file, which is never written", owner.c_str(), index);
      return o;
    }
    inside(owner, "an operand", o.offset, o.bytes, sizes[o.region]);
    return o;
  }

  void check(const PlanStep& step) {
    // The regions do not exist yet; checks look only at whether a pointer is null. One past the header is as good as
    // any.
    static char somewhere;
    std::vector<er_operand> operands;
    for (const PlanOperand& o : step.operands) operands.push_back({o.region == kNone ? nullptr : &somewhere, o.bytes});
    const Call call{step.ints.data(),
                    static_cast<uint32_t>(step.ints.size()),
                    step.floats.data(),
                    static_cast<uint32_t>(step.floats.size()),
                    operands.data(),
                    static_cast<uint32_t>(operands.size()),
                    nullptr,
                    nullptr};
    const std::string problem = check_call(*step.kernel, call, static_cast<int>(plan_.threads));
    if (!problem.empty()) ER_BAD("step '%.200s' (%s): %.400s", step.label.c_str(), step.kernel->name, problem.c_str());
  }

  // Kernels keep tables of pointers in their scratch: nothing that a step writes may change them.
  static void scratch_apart(const PlanStep& step) {
    const PlanOperand& scratch = step.operands.back();
    for (size_t i = 0; i + 1 < step.operands.size(); i++)
      if (overlap(step.operands[i], scratch))
        ER_BAD("step '%.200s' (%s): scratch overlaps operand %zu", step.label.c_str(), step.kernel->name, i);
  }

  static void indices_apart(const PlanStep& step) {
    const uint32_t indices = index_operands(step.kernel->name);
    for (size_t i = 0; i < step.operands.size() && indices >> i; i++)
      for (size_t o = 0; o < step.operands.size() && indices >> i & 1; o++)
        if (o != i && step.operands[i].region && !only_reads(step.kernel->name, o) &&
            overlap(step.operands[i], step.operands[o]))
          ER_BAD("step '%.200s' (%s): operand %zu would overwrite the indices in operand %zu", step.label.c_str(),
                 step.kernel->name, o, i);
  }

  // dQ, dK and dV may be columns of one matrix, which several threads write at once: different ones of the same rows.
  static void gradients_apart(const PlanStep& step) {
    constexpr size_t kFirst = 7, kColumns = 22;  // operand and integer of dQ
    for (size_t i = 0; i < 3; i++)
      for (size_t j = i + 1; j < 3; j++) {
        const PlanOperand &a = step.operands[kFirst + i], &b = step.operands[kFirst + j];
        if (a.region == kNone || !overlap(a, b)) continue;
        bool apart = step.ints.size() > kColumns && a.offset == b.offset && a.bytes == b.bytes;
        if (apart) {
          const int64_t *at_a = &step.ints[kColumns + 2 * i], *at_b = &step.ints[kColumns + 2 * j];
          const int64_t width_a = step.ints[i ? 4 : 3] * step.ints[5], width_b = step.ints[4] * step.ints[5];
          apart = at_a[0] == at_b[0] && (at_a[1] + width_a <= at_b[1] || at_b[1] + width_b <= at_a[1]);
        }
        if (!apart) ER_BAD("step '%.200s' (attention_grad): its gradients overlap", step.label.c_str());
      }
  }

  // Each element is read before it is written: only where the addend begins with the result.
  static void addend_apart(const PlanStep& step) {
    const PlanOperand &y = step.operands[4], &addend = step.operands[6];
    if (addend.region != kNone && overlap(y, addend) && y.offset != addend.offset)
      ER_BAD("step '%.200s' (conv): a part of the addend is overwritten before it is read", step.label.c_str());
  }

  // A training plan has a loss, and an int32 target gets the class count that its values are checked against from the
  // loss.
  void losses() {
    plan_.classes = 0;
    bool loss = false;
    for (const PlanStep& step : plan_.eval)
      if (step.loss) ER_BAD("the evaluation part of the plan has a loss");
    for (const PlanStep& step : plan_.train) {
      loss |= step.loss;
      if (std::strcmp(step.kernel->name, "cross_entropy")) continue;
      plan_.classes = step.ints.at(2);
      plan_.ignore_index = step.ints.at(3);
    }
    if (!plan_.train.empty() && !loss) ER_BAD("the training part of the plan has no loss");
    if (!plan_.train.empty() && (plan_.inputs.back().dtype == 1) != (plan_.classes > 0))
      ER_BAD("the plan's loss does not fit its target");
    indices(plan_.train, &PlanInput::train_offset);
    indices(plan_.eval, &PlanInput::eval_offset);
    if (plan_.eval.empty()) return;
    for (size_t i = 0; i + 1 < plan_.inputs.size(); i++)
      if (plan_.inputs[i].eval_offset == kAbsent)
        ER_BAD("input '%.200s' has no place in the evaluation part", plan_.inputs[i].name.c_str());
  }

  // The values of an int32 input are checked against the smallest table that they index.
  void indices(const std::vector<PlanStep>& steps, uint64_t PlanInput::* offset) {
    std::map<uint64_t, PlanInput*> inputs;  // no two begin at one byte: they are disjoint, and none is empty
    for (size_t i = 0; i + 1 < plan_.inputs.size(); i++)
      if (plan_.inputs[i].dtype == 1) inputs[plan_.inputs[i].*offset] = &plan_.inputs[i];
    for (const PlanStep& step : steps) {
      if (std::strcmp(step.kernel->name, "embedding") || step.operands[0].region != kArena) continue;
      const auto found = inputs.find(step.operands[0].offset);
      if (found == inputs.end()) continue;
      PlanInput& in = *found->second;
      in.limit = in.limit ? std::min(in.limit, step.ints[1]) : step.ints[1];
    }
  }

  ByteReader bytes_;
  Plan plan_{};
};

}  // namespace

Plan read_plan(const void* data, size_t bytes) {
  const uint8_t* begin = static_cast<const uint8_t*>(data);
  if (bytes < kHeaderBytes || std::memcmp(begin, kMagic, 8)) ER_BAD("this is not a plan file");
  ByteReader header(begin + 8, kHeaderBytes - 8);
  const uint32_t version = header.value<uint32_t>(), crc = header.value<uint32_t>();
  const uint64_t payload = header.value<uint64_t>();
  if (version != kVersion) ER_BAD("the plan has format version %u; this runtime reads version %u", version, kVersion);
  if (payload != bytes - kHeaderBytes)
    ER_BAD("the plan is truncated or altered: %llu bytes where its header says %llu", ull(bytes - kHeaderBytes),
           ull(payload));
  if (crc != crc32(begin + kHeaderBytes, bytes - kHeaderBytes))
    ER_BAD("the plan is altered: its checksum does not match");
  return PlanReader(ByteReader(begin + kHeaderBytes, bytes - kHeaderBytes)).read();
}

}  // namespace er
