#include "session.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "error.h"

namespace er {
namespace {

enum ArrayType : uint32_t { kFloat32 = 0, kInt32 = 1, kUint8 = 2 };
const char* const kTypeNames[] = {"float32", "int32", "uint8"};
constexpr uint64_t kTypeBytes[] = {4, 4, 1};

unsigned long long ull(uint64_t x) { return x; }

// One sample in the user's (identity = false) or already the runtime's layout. The batch dimension comes first in both.
Layout sample_layout(const std::vector<uint64_t>& shape, const std::vector<uint8_t>& perm, bool identity) {
  uint64_t dims[ER_MAX_RANK];
  uint8_t order[ER_MAX_RANK];
  const int rank = static_cast<int>(shape.size()) - 1;
  for (int d = 0; d < rank; d++) {
    const uint8_t p = static_cast<uint8_t>(perm[d + 1] - 1);
    dims[d] = shape[(identity ? p : d) + 1];
    order[d] = identity ? static_cast<uint8_t>(d) : p;
  }
  return make_layout(rank, dims, order, true);
}

template <class From, class To, class F>
void bind_sample(const Layout& layout, const void* from, void* to, F&& value) {
  const From* user = static_cast<const From*>(from);
  To* sample = static_cast<To*>(to);
  for_each_run(layout, 0, layout.elements,
               [&](uint64_t at, uint64_t out, uint64_t stride, uint64_t n, uint64_t channel, uint64_t step) {
                 for (uint64_t i = 0; i < n; i++) sample[out + i * stride] = value(user[at + i], channel + i * step);
               });
}

}  // namespace

Pages::Pages(uint64_t bytes) : data_(nullptr), bytes_(bytes) {
  if (!bytes_) return;
  void* pages = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED)
    throw Error{ER_OUT_OF_MEMORY, text("cannot allocate %llu bytes: %s", ull(bytes_), std::strerror(errno))};
#if defined(MADV_HUGEPAGE)
  // Kernels walk rows that lie pages apart: with 4 KB pages the address translation takes a good part of the time. Only
  // whole huge pages inside the mapping are used, so resident memory stays within `bytes`. A kernel that has none says
  // so, and nothing changes.
  (void)::madvise(pages, bytes_, MADV_HUGEPAGE);
#endif
  data_ = static_cast<uint8_t*>(pages);
}

Pages::~Pages() {
  if (data_) ::munmap(data_, bytes_);
}

uint64_t Pages::resident() const {
#if defined(__APPLE__)
  using Flag = char;
#else
  using Flag = unsigned char;
#endif
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  Flag flags[4096];  // of so many pages at a time
  uint64_t pages = 0;
  for (uint64_t at = 0; at < bytes_; at += sizeof(flags) * page) {
    const uint64_t length = std::min(bytes_ - at, sizeof(flags) * page);
    if (::mincore(data_ + at, length, flags)) return 0;
    for (uint64_t i = 0; i < (length + page - 1) / page; i++) pages += flags[i] & 1;
  }
  return std::min(pages * page, bytes_);
}

Regions::Regions(const Plan& plan)
    : arena(plan.arena_bytes),
      params(plan.params_bytes),
      state(plan.state_bytes),
      pool(static_cast<int>(plan.threads)),
      frozen(plan.params.size()),
      copies(plan.params.size()) {}

namespace {

std::shared_ptr<Regions> shared_regions(const Plan& plan, const Plan& base, const std::shared_ptr<Regions>& regions) {
  const auto same = [](const PlanParam& a, const PlanParam& b) {
    return a.name == b.name && a.trainable == b.trainable && a.form == b.form && a.shape == b.shape &&
           a.perm == b.perm && a.offset == b.offset && a.state_offsets == b.state_offsets &&
           (!a.read_whole || b.read_whole || !b.looked_up);  // else it may not be aligned (load_weights)
  };
  if (plan.params_bytes != base.params_bytes || plan.state_bytes != base.state_bytes ||
      !std::equal(plan.params.begin(), plan.params.end(), base.params.begin(), base.params.end(), same))
    throw Error{ER_BAD_PLAN, "the plan lays parameters out in another way than the session that it would share"};
  if (plan.arena_bytes > base.arena_bytes || plan.threads != base.threads)
    throw Error{ER_BAD_PLAN, text("the plan needs %llu bytes and %u threads; the session that it would share has %llu "
                                  "and %u",
                                  ull(plan.arena_bytes), plan.threads, ull(base.arena_bytes), base.threads)};
  return regions;
}

}  // namespace

Session::Session(Plan plan) : Session(std::move(plan), std::shared_ptr<Regions>()) {}

Session::Session(Plan plan, const Session& base)
    : Session(std::move(plan), shared_regions(plan, base.plan_, base.regions_)) {}

Session::Session(Plan plan, std::shared_ptr<Regions> regions)
    : plan_(std::move(plan)),
      regions_(regions ? std::move(regions) : std::make_shared<Regions>(plan_)),
      target_(plan_.inputs.back().elements * 4) {
  size_t operands = 0;
  for (const auto* steps : {&plan_.train, &plan_.eval})
    for (const PlanStep& step : *steps) operands += step.operands.size();
  operands_.reserve(operands);  // calls keep pointers into it
  transfers_.resize(plan_.spill_slots);
  train_ = prepare(plan_.train);
  eval_ = prepare(plan_.eval);
  for (const PlanInput& in : plan_.inputs)
    inputs_.push_back({sample_layout(in.shape, in.perm, false), sample_layout(in.shape, in.perm, true),
                       in.elements / plan_.micro_batch});
  for (const PlanOutput& out : plan_.outputs)
    outputs_.push_back({sample_layout(out.shape, out.perm, false), sample_layout(out.shape, out.perm, true),
                        out.elements / plan_.micro_batch});
}

std::vector<Session::Step> Session::prepare(const std::vector<PlanStep>& steps) {
  uint8_t* const regions[] = {nullptr, regions_->arena.data(), regions_->params.data(), regions_->state.data(),
                              nullptr};
  std::vector<Step> out;
  out.reserve(steps.size());
  for (const PlanStep& step : steps) {
    const er_operand* first = operands_.data() + operands_.size();
    for (const PlanOperand& o : step.operands) {
      uint8_t* const region = regions[o.region];
      if (o.region == kMapped) frozen_operands_.emplace_back(operands_.size(), o.offset);
      operands_.push_back({region ? region + o.offset : nullptr, o.bytes});
    }
    const Call call{step.ints.data(),
                    static_cast<uint32_t>(step.ints.size()),
                    step.floats.data(),
                    static_cast<uint32_t>(step.floats.size()),
                    first,
                    static_cast<uint32_t>(step.operands.size()),
                    &regions_->pool,
                    &context_};
    out.push_back({&step, call, 0, 0.0});
  }
  return out;
}

er_status Session::check_arrays(const er_array* arrays, size_t count, uint64_t samples) const {
  for (size_t i = 0; i < count; i++) {
    const PlanInput& in = plan_.inputs[i];
    const er_array& array = arrays[i];
    const char* name = in.name.c_str();
    if (!array.data) return fail(ER_INVALID_ARGUMENT, "input '%.200s' is NULL", name);
    if (array.layout > 1) return fail(ER_INVALID_ARGUMENT, "input '%.200s' has layout %u", name, array.layout);
    if (array.dtype > kUint8) return fail(ER_INVALID_ARGUMENT, "input '%.200s' has dtype %u", name, array.dtype);
    if (array.dtype == kUint8 && in.dtype == kFloat32) {
      if (in.mul.empty())
        return fail(ER_INVALID_ARGUMENT, "input '%.200s' is uint8, but the plan states no normalization for it", name);
    } else if (array.dtype != in.dtype) {
      return fail(ER_INVALID_ARGUMENT, "input '%.200s' is %s, %s is needed", name, kTypeNames[array.dtype],
                  kTypeNames[in.dtype]);
    }
    if (reinterpret_cast<uintptr_t>(array.data) % kTypeBytes[array.dtype])
      return fail(ER_INVALID_ARGUMENT, "input '%.200s' is not aligned to its elements", name);
    uint64_t bytes;
    if (__builtin_mul_overflow(samples, inputs_[i].sample_elements * kTypeBytes[array.dtype], &bytes) ||
        array.bytes != bytes)
      return fail(ER_INVALID_ARGUMENT, "input '%.200s' has %llu bytes, %llu samples of %llu are needed", name,
                  ull(array.bytes), ull(samples), ull(inputs_[i].sample_elements * kTypeBytes[array.dtype]));
    if (in.limit)
      for (uint64_t e = 0; e < bytes / 4; e++)
        if (const int32_t id = static_cast<const int32_t*>(array.data)[e]; id < 0 || id >= in.limit)
          return fail(ER_INVALID_ARGUMENT, "input '%.200s' has the index %d in sample %llu; the table has 0 to %lld",
                      name, id, ull(e / inputs_[i].sample_elements), static_cast<long long>(in.limit - 1));
  }
  return ER_OK;
}

er_status Session::check_labels(const er_array& labels, uint64_t samples, uint64_t* counted) const {
  const int32_t* label = static_cast<const int32_t*>(labels.data);
  const uint64_t positions = inputs_.back().sample_elements;
  *counted = 0;
  for (uint64_t i = 0; i < samples * positions; i++) {
    if (label[i] == plan_.ignore_index) continue;
    ++*counted;
    if (label[i] < 0 || label[i] >= plan_.classes)
      return fail(ER_INVALID_ARGUMENT, "target of sample %llu is class %d; the model has classes 0 to %lld",
                  ull(i / positions), label[i], static_cast<long long>(plan_.classes - 1));
  }
  if (!*counted)
    return fail(ER_INVALID_ARGUMENT, "every target of the batch is %lld, which is ignored",
                static_cast<long long>(plan_.ignore_index));
  return ER_OK;
}

// Copies micro-batch samples [first, first + valid) into the runtime's layout at `to`. Rows past the valid ones get a
// zero gradient, but 0 times what a model makes of zeros may be NaN (a mean over a mask without any key): they repeat
// the last valid sample.
void Session::bind_input(size_t input, const er_array& array, uint8_t* to, uint64_t first, uint64_t valid) {
  const PlanInput& in = plan_.inputs[input];
  const Port& port = inputs_[input];
  const Layout& layout = array.layout ? port.runtime : port.user;
  const uint64_t elements = port.sample_elements;
  regions_->pool.split(plan_.micro_batch, 1, [&](int64_t begin, int64_t end, int) {
    for (uint64_t s = static_cast<uint64_t>(begin); s < static_cast<uint64_t>(end); s++) {
      uint8_t* sample = to + s * elements * 4;
      const uint64_t source = first + std::min(s, valid - 1);
      const uint8_t* from = static_cast<const uint8_t*>(array.data) + source * elements * kTypeBytes[array.dtype];
      if (array.dtype == kUint8)
        bind_sample<uint8_t, float>(layout, from, sample,
                                    [&](uint8_t x, uint64_t c) { return x * in.mul[c] + in.add[c]; });
      else if (array.dtype == kInt32)
        bind_sample<int32_t, int32_t>(layout, from, sample, [](int32_t x, uint64_t) { return x; });
      else
        bind_sample<float, float>(layout, from, sample, [](float x, uint64_t) { return x; });
    }
  });
}

void Session::bind(const er_array* arrays, size_t count, bool train, uint64_t first, uint64_t valid) {
  for (size_t i = 0; i < count; i++) {
    const PlanInput& in = plan_.inputs[i];
    bind_input(i, arrays[i], regions_->arena.data() + (train ? in.train_offset : in.eval_offset), first, valid);
  }
}

void Session::write_param(uint32_t index, const float* user) {
  const PlanParam& p = plan_.params[index];
  if (p.form == kInFile && !regions_->copies[index]) {
    regions_->copies[index] = std::make_unique<Pages>(stored_bytes(p));
    regions_->frozen[index] = regions_->copies[index]->data();
    regions_->changes++;
  }
  const StoredParam stored = param(index);
  if (stored.needs_scales()) {
    for (uint64_t i = 0; i < p.elements; i++)
      if (!std::isfinite(user[i]))
        throw Error{ER_INVALID_ARGUMENT,
                    text("parameter '%.200s' is stored in int8, which has no NaN or infinity", p.name.c_str())};
    stored.begin_scales();
    stored.scan(0, p.elements, user);
    stored.end_scales();
  }
  stored.write(0, p.elements, user);
}

void Session::set_frozen(std::vector<uint8_t*> places, std::vector<std::unique_ptr<Pages>> copies,
                         std::unique_ptr<WeightsFile> file) {
  regions_->frozen = std::move(places);
  regions_->copies = std::move(copies);
  regions_->file = std::move(file);
  regions_->changes++;
}

// Gives the steps the parameters of the weights file, wherever they are now.
er_status Session::find_frozen() {
  if (frozen_operands_.empty()) return ER_OK;
  if (regions_->file && !regions_->file->unchanged())
    return fail(ER_BAD_FILE,
                "%.400s was changed while a session reads its weights there; copy a whole one there and "
                "start again",
                regions_->file->path());
  if (frozen_seen_ == regions_->changes) {
    if (frozen_seen_) return ER_OK;
    return fail(ER_INVALID_ARGUMENT, "no weights file has been loaded, and the plan reads parameters there");
  }
  for (const auto& [operand, index] : frozen_operands_) {
    if (!regions_->frozen[index])
      return fail(ER_INVALID_ARGUMENT, "parameter '%.200s' has no value: load a weights file",
                  plan_.params[index].name.c_str());
    operands_[operand].data = regions_->frozen[index];
  }
  frozen_seen_ = regions_->changes;
  return ER_OK;
}

void Session::open_spill(const char* directory) {
  if (!plan_.spill_bytes) return;
  if (!regions_->spill) regions_->spill = std::make_unique<SpillFile>(directory);
  regions_->spill->reserve(plan_.spill_bytes);
  spill_open_ = true;
}

void Session::spill_info(er_spill_info* info) const {
  *info = {plan_.spill_bytes, 0, 0, 0.0};
  if (regions_->spill) regions_->spill->totals(info);
}

er_status Session::transfer(const Step& step) {
  SpillFile& file = *regions_->spill;
  Transfer& transfer = transfers_[static_cast<size_t>(step.plan->ints[0])];
  if (step.plan->spill == Spill::kWait) {
    const er_status status = file.wait(transfer);
    // Backward steps have updated parameters already.
    if (status && !transfer.write) broken_ = true;
    return status;
  }
  const er_operand& operand = step.call.operands[0];
  transfer.data = static_cast<uint8_t*>(operand.data);
  transfer.bytes = operand.bytes;
  transfer.offset = static_cast<uint64_t>(step.plan->ints[1]);
  transfer.write = step.plan->spill == Spill::kWrite;
  file.start(transfer);
  return ER_OK;
}

// Whether a step takes single rows of a table that is in the weights file.
bool Session::rows_in_file(const Step& step) const {
  if (!step.plan->looks_up) return false;
  const PlanOperand& table = step.plan->operands[1];
  return table.region == kMapped && !regions_->copies[table.offset];
}

// The kernel `embedding` on a table in the weights file, by read() and not through the mapping: the system maps what
// surrounds a touched page as well, 64 KB on Linux, so that after a few batches the whole table would be resident.
er_status Session::read_rows(const Step& step) const {
  const int64_t n = step.call.ints[0], vocabulary = step.call.ints[1], cols = step.call.ints[2];
  const int32_t* ids = step.call.as<const int32_t>(0);
  const uint64_t table = static_cast<uint64_t>(step.call.as<const uint8_t>(1) - regions_->file->map());
  float* y = step.call.as<float>(2);
  const uint64_t row = static_cast<uint64_t>(cols) * sizeof *y;
  return guard([&] {
    for (int64_t r = 0; r < n; r++, y += cols) {
      const int64_t id = ids[r];
      if (id < 0 || id >= vocabulary)
        return fail(ER_INVALID_ARGUMENT, "%.200s: index %lld is outside of a table of %lld rows",
                    step.plan->label.c_str(), static_cast<long long>(id), static_cast<long long>(vocabulary));
      regions_->file->read(y, row, table + static_cast<uint64_t>(id) * row);
    }
    return ER_OK;
  });
}

// A step that fails must not leave the I/O thread working on the arena.
er_status Session::run(std::vector<Step>& steps) {
  const er_status status = run_steps(steps);
  if (status && regions_->spill) regions_->spill->drain();
  return status;
}

er_status Session::run_steps(std::vector<Step>& steps) {
  using Clock = std::chrono::steady_clock;
  for (Step& step : steps) {
    const Clock::time_point begin = profiling_ ? Clock::now() : Clock::time_point();
    er_status status = ER_OK;
    const bool finite = step.plan->spill != Spill::kNone ? !(status = transfer(step))
                        : rows_in_file(step)             ? !(status = read_rows(step))
                                                         : step.plan->kernel->run(step.call);
    if (profiling_) {
      step.calls++;
      step.seconds += std::chrono::duration<double>(Clock::now() - begin).count();
    }
    if (status) return status;
    if (step.plan->loss && !(finite && std::isfinite(context_.loss)))
      return fail(ER_NON_FINITE, "the loss is NaN or infinite");
    if (!finite)
      return fail(ER_NON_FINITE, "a value in %.200s (%s) is NaN or infinite", step.plan->label.c_str(),
                  step.plan->kernel->name);
  }
  return ER_OK;
}

er_status Session::train_step(const er_array* arrays, uint32_t samples, float learning_rate, uint64_t update,
                              uint64_t seed, float* loss) {
  if (train_.empty()) return fail(ER_INVALID_ARGUMENT, "the plan has no training part");
  if (samples < 1 || samples > plan_.batch_size)
    return fail(ER_INVALID_ARGUMENT, "%u samples; the plan takes 1 to %u", samples, plan_.batch_size);
  if (update < 1) return fail(ER_INVALID_ARGUMENT, "updates count from 1");
  if (plan_.spill_bytes && !spill_open_)
    return fail(ER_INVALID_ARGUMENT, "the plan keeps %llu bytes in a file: give a directory for it (er_spill_open)",
                ull(plan_.spill_bytes));
  if (broken_)
    return fail(ER_IO,
                "an earlier step ended halfway, when the spill file could not be read; start again from the last "
                "checkpoint");
  if (!std::isfinite(learning_rate)) return fail(ER_INVALID_ARGUMENT, "the learning rate is not finite");
  if (const er_status status = check_arrays(arrays, inputs_.size(), samples)) return status;
  uint64_t counted = 0;
  if (plan_.inputs.back().dtype == kInt32)
    if (const er_status status = check_labels(arrays[inputs_.size() - 1], samples, &counted)) return status;
  if (const er_status status = find_frozen()) return status;
  const uint32_t micro = plan_.micro_batch;
  // Micro-batches without a valid sample do not run; the optimizer updates at the last one that does.
  const uint32_t count = (samples + micro - 1) / micro;
  context_ = {learning_rate, update, seed, 0, count, samples, 0, 0, 0.0, counted};
  for (uint32_t m = 0; m < count; m++) {
    context_.micro_index = m;
    context_.first_sample = uint64_t{m} * micro;
    context_.valid_micro = std::min(micro, samples - m * micro);
    bind(arrays, inputs_.size(), true, context_.first_sample, context_.valid_micro);
    if (const er_status status = run(train_)) return status;
  }
  *loss = static_cast<float>(context_.loss);
  return ER_OK;
}

er_status Session::predict(const er_array* inputs, uint64_t samples, float* const* outputs) {
  if (eval_.empty()) return fail(ER_INVALID_ARGUMENT, "the plan has no evaluation part");
  const size_t count = inputs_.size() - 1;
  if (const er_status status = check_arrays(inputs, count, samples)) return status;
  if (const er_status status = find_frozen()) return status;
  for (size_t o = 0; o < outputs_.size(); o++)
    if (!outputs[o]) return fail(ER_INVALID_ARGUMENT, "output '%.200s' is NULL", plan_.outputs[o].name.c_str());
  const uint64_t micro = plan_.micro_batch;
  for (uint64_t first = 0; first < samples; first += micro) {
    const uint64_t valid = std::min(micro, samples - first);
    context_ = {0.0f, 0, 0, static_cast<uint32_t>(first / micro), 1, samples, valid, first, 0.0, 0};
    bind(inputs, count, false, first, valid);
    if (const er_status status = run(eval_)) return status;
    for (size_t o = 0; o < outputs_.size(); o++) {
      const Port& port = outputs_[o];
      const float* from = reinterpret_cast<const float*>(regions_->arena.data() + plan_.outputs[o].eval_offset);
      for (uint64_t s = 0; s < valid; s++)
        copy_out(port.user, 0, port.sample_elements, from + s * port.sample_elements,
                 outputs[o] + (first + s) * port.sample_elements);
    }
  }
  return ER_OK;
}

void Session::profile(bool enabled) {
  if (enabled)
    for (auto* steps : {&train_, &eval_})
      for (Step& step : *steps) {
        step.calls = 0;
        step.seconds = 0.0;
      }
  profiling_ = enabled;
}

bool Session::profile_read(uint32_t index, er_profile_entry* entry) const {
  if (index >= train_.size() + eval_.size()) return false;
  const bool eval = index >= train_.size();
  const Step& step = eval ? eval_[index - train_.size()] : train_[index];
  *entry = {step.plan->kernel->name, step.plan->label.c_str(), eval, step.calls, step.seconds};
  return true;
}

}  // namespace er
