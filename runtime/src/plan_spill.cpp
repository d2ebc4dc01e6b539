// What must hold between the spill steps of a plan: every slot is written, awaited, read and awaited once, in this
// order, at its own place in the file, and nothing touches its memory while the I/O thread does.
#include <algorithm>
#include <map>

#include "error.h"
#include "plan.h"

namespace er {
namespace {

constexpr uint64_t kMaxFileBytes = uint64_t{1} << 46;

#define ER_BAD(...) \
  throw Error { ER_BAD_PLAN, text(__VA_ARGS__) }

enum class State { kNew, kWriting, kWritten, kReading, kRead };

struct Slot {
  State state = State::kNew;
  uint64_t offset = 0, bytes = 0;        // in the file
  const PlanOperand* operand = nullptr;  // of the transfer under way
};

// Memory of the arena that the I/O thread works on. The spans are not empty, and what a transfer takes touches none of
// the others: the last that begins before an operand's end is the only one that could reach into it.
class Busy {
 public:
  void add(const PlanOperand& span) { ends_[span.offset] = span.offset + span.bytes; }
  void remove(const PlanOperand& span) { ends_.erase(span.offset); }
  bool touches(const PlanOperand& operand) const {
    if (operand.region != kArena) return false;
    const auto after = ends_.lower_bound(operand.offset + operand.bytes);
    return after != ends_.begin() && std::prev(after)->second > operand.offset;
  }

 private:
  std::map<uint64_t, uint64_t> ends_;  // first byte → one past the last
};

void begin(const PlanStep& step, Slot& slot) {
  const PlanOperand& operand = step.operands[0];
  const uint64_t offset = static_cast<uint64_t>(step.ints[1]);
  const char* label = step.label.c_str();
  if (operand.region != kArena) ER_BAD("step '%.200s' (%s) is not about the arena", label, step.kernel->name);
  if (step.spill == Spill::kWrite) {
    if (slot.state != State::kNew) ER_BAD("step '%.200s' writes slot %lld again", label, (long long)step.ints[0]);
    if (operand.bytes > kMaxFileBytes || offset > kMaxFileBytes - operand.bytes)
      ER_BAD("step '%.200s' (%s): a spill file of that size is beyond reason", label, step.kernel->name);
    slot = {State::kWriting, offset, operand.bytes, &operand};
  } else {
    if (slot.state != State::kWritten)
      ER_BAD("step '%.200s' reads slot %lld, which is not written", label, (long long)step.ints[0]);
    if (slot.offset != offset || slot.bytes != operand.bytes)
      ER_BAD("step '%.200s' reads slot %lld otherwise than it was written", label, (long long)step.ints[0]);
    slot.state = State::kReading;
    slot.operand = &operand;
  }
}

void end(const PlanStep& step, Slot& slot) {
  const PlanOperand& operand = step.operands[0];
  const bool under_way = slot.state == State::kWriting || slot.state == State::kReading;
  if (!under_way || operand.region != slot.operand->region || operand.offset != slot.operand->offset ||
      operand.bytes != slot.operand->bytes)
    ER_BAD("step '%.200s' waits for a transfer of slot %lld that is not under way", step.label.c_str(),
           (long long)step.ints[0]);
  slot.state = slot.state == State::kWriting ? State::kWritten : State::kRead;
  slot.operand = nullptr;
}

// Distinct places in the file; returns its size.
uint64_t file_bytes(const std::vector<Slot>& slots) {
  std::vector<std::pair<uint64_t, uint64_t>> spans;
  for (const Slot& slot : slots) spans.emplace_back(slot.offset, slot.bytes);
  std::sort(spans.begin(), spans.end());
  uint64_t end = 0;
  for (const auto& [offset, bytes] : spans) {
    if (offset < end)
      ER_BAD("two tensors of the plan overlap in the spill file at byte %llu", (unsigned long long)offset);
    end = offset + bytes;
  }
  return end;
}

}  // namespace

void check_spills(Plan& plan) {
  for (const PlanStep& step : plan.eval)
    if (step.spill != Spill::kNone) ER_BAD("the evaluation part of the plan spills");
  size_t count = 0;
  for (const PlanStep& step : plan.train) count += step.spill == Spill::kWrite;
  plan.spill_slots = static_cast<uint32_t>(count);
  std::vector<Slot> slots(count);
  Busy busy;
  for (const PlanStep& step : plan.train) {
    if (step.spill != Spill::kNone && static_cast<uint64_t>(step.ints[0]) >= count)
      ER_BAD("step '%.200s' (%s) has slot %lld, the plan writes %zu", step.label.c_str(), step.kernel->name,
             (long long)step.ints[0], count);
    if (step.spill == Spill::kWait && slots[step.ints[0]].operand) busy.remove(*slots[step.ints[0]].operand);
    for (const PlanOperand& operand : step.operands)
      if (busy.touches(operand))
        ER_BAD("step '%.200s' (%s) touches memory that is being spilled", step.label.c_str(), step.kernel->name);
    if (step.spill == Spill::kNone) continue;
    Slot& slot = slots[step.ints[0]];
    if (step.spill == Spill::kWait) {
      end(step, slot);
    } else {
      begin(step, slot);
      busy.add(*slot.operand);
    }
  }
  for (size_t i = 0; i < count; i++)
    if (slots[i].state != State::kRead) ER_BAD("slot %zu of the spill file is not written and read back to the end", i);
  plan.spill_bytes = file_bytes(slots);
}

}  // namespace er
