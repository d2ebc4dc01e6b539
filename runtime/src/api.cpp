// The C ABI for sessions: checks pointers and indices, everything else is Session's.
#include <cstring>

#include "error.h"
#include "registry.h"
#include "session.h"
#include "weights.h"

using namespace er;

namespace {

// Fills what parameters, inputs and outputs have in common.
template <class T>
er_tensor_info describe(const T& tensor) {
  er_tensor_info info{};
  info.name = tensor.name.c_str();
  info.rank = static_cast<uint32_t>(tensor.shape.size());
  for (size_t d = 0; d < tensor.shape.size(); d++) info.shape[d] = tensor.shape[d];
  info.elements = tensor.elements;
  return info;
}

er_status no_item(const char* what, uint32_t index, size_t count) {
  return fail(ER_INVALID_ARGUMENT, "there is no %s %u, the plan has %zu", what, index, count);
}

// Checks the arguments of the calls that copy one tensor in or out.
er_status check_copy(const er_session* session, uint32_t index, const void* data, uint64_t elements) {
  if (!session || !data) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
  const std::vector<PlanParam>& params = session->plan().params;
  if (index >= params.size()) return no_item("parameter", index, params.size());
  if (elements != params[index].elements)
    return fail(ER_INVALID_ARGUMENT, "parameter '%.200s' has %llu elements, not %llu", params[index].name.c_str(),
                static_cast<unsigned long long>(params[index].elements), static_cast<unsigned long long>(elements));
  return ER_OK;
}

er_status check_state(const er_session* session, uint32_t index, uint32_t slot, const void* data, uint64_t elements) {
  if (const er_status status = check_copy(session, index, data, elements)) return status;
  const PlanParam& param = session->plan().params[index];
  if (slot >= param.state_offsets.size()) return no_item("state tensor", slot, param.state_offsets.size());
  return ER_OK;
}

// Checks the arguments of the calls that copy a part of one tensor.
er_status check_range(const er_session* session, uint32_t index, uint32_t slot, uint64_t first, const void* data,
                      uint64_t elements) {
  if (!session || !data) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
  const std::vector<PlanParam>& params = session->plan().params;
  if (index >= params.size()) return no_item("parameter", index, params.size());
  const PlanParam& param = params[index];
  if (slot != ER_PARAMETER && slot >= param.state_offsets.size())
    return no_item("state tensor", slot, param.state_offsets.size());
  if (first > param.elements || elements > param.elements - first)
    return fail(ER_INVALID_ARGUMENT, "parameter '%.200s' has %llu elements, not %llu from %llu on", param.name.c_str(),
                static_cast<unsigned long long>(param.elements), static_cast<unsigned long long>(elements),
                static_cast<unsigned long long>(first));
  return ER_OK;
}

Layout param_layout(const er_session* session, uint32_t index) {
  const PlanParam& param = session->plan().params[index];
  return make_layout(static_cast<int>(param.shape.size()), param.shape.data(), param.perm.data(), false);
}

}  // namespace

extern "C" {

namespace {

er_status create(const void* plan, size_t plan_bytes, const er_session* base, er_session** session) {
  return guard([&] {
    if (!plan || !session) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
    *session = nullptr;
    if (*isa_problem()) return fail(ER_INVALID_ARGUMENT, "%s", isa_problem());
    Plan checked = read_plan(plan, plan_bytes);
    *session = base ? new er_session(std::move(checked), *base) : new er_session(std::move(checked));
    return ER_OK;
  });
}

}  // namespace

er_status er_session_create(const void* plan, size_t plan_bytes, er_session** session) {
  return create(plan, plan_bytes, nullptr, session);
}

er_status er_session_create_shared(const void* plan, size_t plan_bytes, const er_session* base, er_session** session) {
  if (!base) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
  return create(plan, plan_bytes, base, session);
}

void er_session_free(er_session* session) { delete session; }

er_status er_session_info(const er_session* session, er_info* info) {
  if (!session || !info) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
  const Plan& plan = session->plan();
  *info = {plan.arena_bytes,
           plan.params_bytes,
           plan.state_bytes,
           plan.batch_size,
           plan.micro_batch,
           plan.threads,
           static_cast<uint32_t>(plan.params.size()),
           static_cast<uint32_t>(plan.inputs.size()),
           static_cast<uint32_t>(plan.outputs.size()),
           static_cast<uint32_t>(plan.train.size()),
           static_cast<uint32_t>(plan.eval.size())};
  return ER_OK;
}

er_status er_session_resident(const er_session* session, er_resident* resident) {
  if (!session || !resident) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
  const Session::Turn turn(session->turns());
  *resident = session->resident();
  return ER_OK;
}

er_status er_param_info(const er_session* session, uint32_t index, er_tensor_info* info) {
  if (!session || !info) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
  const std::vector<PlanParam>& params = session->plan().params;
  if (index >= params.size()) return no_item("parameter", index, params.size());
  *info = describe(params[index]);
  info->trainable = params[index].trainable;
  info->states = static_cast<uint32_t>(params[index].state_offsets.size());
  return ER_OK;
}

er_status er_input_info(const er_session* session, uint32_t index, er_tensor_info* info) {
  if (!session || !info) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
  const std::vector<PlanInput>& inputs = session->plan().inputs;
  if (index >= inputs.size()) return no_item("input", index, inputs.size());
  *info = describe(inputs[index]);
  info->dtype = inputs[index].dtype;
  return ER_OK;
}

er_status er_output_info(const er_session* session, uint32_t index, er_tensor_info* info) {
  if (!session || !info) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
  const std::vector<PlanOutput>& outputs = session->plan().outputs;
  if (index >= outputs.size()) return no_item("output", index, outputs.size());
  *info = describe(outputs[index]);
  return ER_OK;
}

er_status er_param_write(er_session* session, uint32_t index, const float* data, uint64_t elements) {
  return guard([&] {
    if (const er_status status = check_copy(session, index, data, elements)) return status;
    const Session::Turn turn(session->turns());
    session->write_param(index, data);
    return ER_OK;
  });
}

er_status er_param_read(const er_session* session, uint32_t index, float* data, uint64_t elements) {
  if (const er_status status = check_copy(session, index, data, elements)) return status;
  const Session::Turn turn(session->turns());
  const StoredParam param = session->param(index);
  if (!param.data)
    return fail(ER_INVALID_ARGUMENT, "parameter '%.200s' has no value: load a weights file", param.param.name.c_str());
  param.read(0, elements, data);
  return ER_OK;
}

er_status er_state_write(er_session* session, uint32_t index, uint32_t slot, const float* data, uint64_t elements) {
  if (const er_status status = check_state(session, index, slot, data, elements)) return status;
  const Session::Turn turn(session->turns());
  copy_in(param_layout(session, index), 0, elements, data, session->state(index, slot));
  return ER_OK;
}

er_status er_state_read(const er_session* session, uint32_t index, uint32_t slot, float* data, uint64_t elements) {
  if (const er_status status = check_state(session, index, slot, data, elements)) return status;
  const Session::Turn turn(session->turns());
  copy_out(param_layout(session, index), 0, elements, session->state(index, slot), data);
  return ER_OK;
}

er_status er_range_write(er_session* session, uint32_t index, uint32_t slot, uint64_t first, const float* data,
                         uint64_t elements) {
  if (const er_status status = check_range(session, index, slot, first, data, elements)) return status;
  const Session::Turn turn(session->turns());
  if (slot != ER_PARAMETER) {
    copy_in(param_layout(session, index), first, elements, data, session->state(index, slot));
    return ER_OK;
  }
  const StoredParam param = session->param(index);
  if (param.param.form != kFloat)  // its scales, or the copy of what lies in the file, belong to the whole
    return fail(ER_INVALID_ARGUMENT, "parameter '%.200s' is frozen and not float32 in memory: write it whole",
                param.param.name.c_str());
  param.write(first, elements, data);
  return ER_OK;
}

er_status er_range_read(const er_session* session, uint32_t index, uint32_t slot, uint64_t first, float* data,
                        uint64_t elements) {
  if (const er_status status = check_range(session, index, slot, first, data, elements)) return status;
  const Session::Turn turn(session->turns());
  if (slot != ER_PARAMETER) {
    copy_out(param_layout(session, index), first, elements, session->state(index, slot), data);
    return ER_OK;
  }
  const StoredParam param = session->param(index);
  if (!param.data)
    return fail(ER_INVALID_ARGUMENT, "parameter '%.200s' has no value: load a weights file", param.param.name.c_str());
  param.read(first, elements, data);
  return ER_OK;
}

er_status er_weights_load(er_session* session, const char* path) {
  return er_weights_load_at(session, path, 0, UINT64_MAX);
}

er_status er_weights_load_at(er_session* session, const char* path, uint64_t offset, uint64_t bytes) {
  return guard([&] {
    if (!session || !path) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
    const Session::Turn turn(session->turns());
    load_weights(*session, std::make_unique<WeightsFile>(path, offset, bytes));
    return ER_OK;
  });
}

er_status er_weights_save(const er_session* session, const char* path) {
  return guard([&] {
    if (!session || !path) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
    const Session::Turn turn(session->turns());
    save_weights(*session, path);
    return ER_OK;
  });
}

er_status er_train_step(er_session* session, const er_array* arrays, uint32_t samples, float learning_rate,
                        uint64_t update, uint64_t seed, float* loss) {
  return guard([&] {
    if (!session || !arrays || !loss) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
    const Session::Turn turn(session->turns());
    return session->train_step(arrays, samples, learning_rate, update, seed, loss);
  });
}

er_status er_predict(er_session* session, const er_array* inputs, uint64_t samples, float* const* outputs) {
  return guard([&] {
    if (!session || !inputs || !outputs) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
    const Session::Turn turn(session->turns());
    return session->predict(inputs, samples, outputs);
  });
}

er_status er_spill_open(er_session* session, const char* directory) {
  return guard([&] {
    if (!session || !directory) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
    if (!*directory) return fail(ER_INVALID_ARGUMENT, "the spill directory is empty text");
    const Session::Turn turn(session->turns());
    session->open_spill(directory);
    return ER_OK;
  });
}

er_status er_spill_read_info(const er_session* session, er_spill_info* info) {
  if (!session || !info) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
  const Session::Turn turn(session->turns());
  session->spill_info(info);
  return ER_OK;
}

er_status er_profile(er_session* session, int enabled) {
  if (!session) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
  const Session::Turn turn(session->turns());
  session->profile(enabled != 0);
  return ER_OK;
}

er_status er_profile_read(const er_session* session, uint32_t index, er_profile_entry* entry) {
  if (!session || !entry) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
  const Session::Turn turn(session->turns());
  if (session->profile_read(index, entry)) return ER_OK;
  const Plan& plan = session->plan();
  return no_item("step", index, plan.train.size() + plan.eval.size());
}

}  // extern "C"
