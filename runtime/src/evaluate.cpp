// Loss and share of right answers of the evaluation part's output. The loss is the training part's own kernel, run on
// the output without asking for a gradient.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "error.h"
#include "session.h"

namespace er {
namespace {

// Rows of logits[classes] whose largest (the first of equals) is at the target, of those that count.
double right_classes(const float* logits, const int32_t* target, uint64_t rows, int64_t classes, int64_t ignored) {
  double right = 0;
  for (uint64_t r = 0; r < rows; r++) {
    const float* row = logits + r * static_cast<uint64_t>(classes);
    if (target[r] != ignored && std::max_element(row, row + classes) - row == target[r]) right++;
  }
  return right;
}

// Samples, each by its share of outputs on the right side of 0.
double right_signs(const float* logits, const float* target, uint64_t samples, uint64_t elements) {
  double right = 0;
  for (uint64_t i = 0; i < samples * elements; i++) right += (logits[i] > 0) == (target[i] > 0.5f);
  return right / static_cast<double>(elements);
}

}  // namespace

er_status Session::evaluate(const er_array* arrays, uint64_t samples, er_evaluation* result) {
  const auto loss = std::find_if(train_.begin(), train_.end(), [](const Step& s) { return s.plan->loss; });
  if (eval_.empty() || loss == train_.end() || outputs_.empty())
    return fail(ER_INVALID_ARGUMENT, "the plan lacks an evaluation part, an output or a loss");
  if (samples < 1) return fail(ER_INVALID_ARGUMENT, "there are no samples to evaluate");
  const PlanInput& target = plan_.inputs.back();
  const bool classes = target.dtype == 1, signs = !std::strcmp(loss->plan->kernel->name, "bce_logits");
  const std::vector<int64_t>& ints = loss->plan->ints;
  const uint64_t micro = plan_.micro_batch, positions = inputs_.back().sample_elements;
  const uint64_t width = classes ? static_cast<uint64_t>(plan_.classes) : 1;
  if (static_cast<uint64_t>(ints[0]) != micro || static_cast<uint64_t>(ints[1]) != positions ||
      outputs_[0].sample_elements / width != positions || outputs_[0].sample_elements % width)
    return fail(ER_BAD_PLAN, "the plan's loss is not of its first output");
  if (const er_status status = check_arrays(arrays, inputs_.size(), samples)) return status;
  uint64_t counted = 0;
  if (classes)
    if (const er_status status = check_labels(arrays[inputs_.size() - 1], samples, &counted)) return status;
  if (const er_status status = find_frozen()) return status;

  uint8_t* const output = regions_->arena.data() + plan_.outputs[0].eval_offset;
  const er_operand operands[] = {
      {output, plan_.outputs[0].elements * 4}, {target_.data(), target.elements * 4}, {nullptr, 0}};
  Call call = loss->call;
  call.operands = operands;
  double total = 0, right = 0;
  for (uint64_t first = 0; first < samples; first += micro) {
    const uint64_t valid = std::min(micro, samples - first);
    context_ = {0.0f, 0, 0, static_cast<uint32_t>(first / micro), 1, samples, valid, first, 0.0, counted};
    bind(arrays, inputs_.size() - 1, false, first, valid);
    bind_input(inputs_.size() - 1, arrays[inputs_.size() - 1], target_.data(), first, valid);
    if (const er_status status = run(eval_)) return status;
    const float* logits = reinterpret_cast<const float*>(output);
    if (classes)
      right += right_classes(logits, reinterpret_cast<const int32_t*>(target_.data()), valid * positions, plan_.classes,
                             plan_.ignore_index);
    else if (signs)
      right += right_signs(logits, reinterpret_cast<const float*>(target_.data()), valid, positions);
    if (!loss->plan->kernel->run(call) || !std::isfinite(context_.loss))
      return fail(ER_NON_FINITE, "the loss is NaN or infinite");
    total += context_.loss;
  }
  result->weight = classes ? counted : samples;
  result->loss = total;
  result->accuracy =
      classes || signs ? right / static_cast<double>(result->weight) : std::numeric_limits<double>::quiet_NaN();
  return ER_OK;
}

}  // namespace er
