// A plan being executed: its three memory regions, its threads, and its steps with pointers in place of offsets.
#pragma once
#include <memory>
#include <vector>

#include "layout.h"
#include "mapped_file.h"
#include "plan.h"
#include "spill_file.h"
#include "stored.h"
#include "turns.h"

namespace er {

// Zeroed pages from the operating system; resident only once touched.
class Pages {
 public:
  explicit Pages(uint64_t bytes);  // throws Error with ER_OUT_OF_MEMORY
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  uint8_t* data() const { return data_; }
  uint64_t resident() const;  // bytes

 private:
  uint8_t* data_;
  uint64_t bytes_;
};

// What sessions of plans for other sample sizes share: memory, and the threads that work on it.
struct Regions {
  Regions(const Plan& plan);
  Pages arena, params, state;
  ThreadPool pool;
  Turns turns;  // one call at a time
  // Of the parameters in the weights file: where they are now, and, where they are not read in the file, their memory.
  std::vector<uint8_t*> frozen;
  std::vector<std::unique_ptr<Pages>> copies;
  std::unique_ptr<WeightsFile> file;
  uint64_t changes = 0;              // counts changes of `frozen`
  std::unique_ptr<SpillFile> spill;  // goes first: its thread works on the arena
};

class Session {
 public:
  explicit Session(Plan plan);
  // Works on the regions of `base`, whose plan must lay parameters and state out in the same way.
  Session(Plan plan, const Session& base);

  using Turn = std::lock_guard<Turns>;
  // Held by every call that reads or writes the regions.
  Turns& turns() const { return regions_->turns; }

  const Plan& plan() const { return plan_; }
  // Where parameter `index` is; null if it is one of the weights file and none has been loaded.
  StoredParam param(uint32_t index) const {
    const PlanParam& p = plan_.params[index];
    return {p, p.form == kInFile ? regions_->frozen[index] : regions_->params.data() + p.offset};
  }
  // Sets a parameter from all its values in the user's order; one of the weights file gets memory of its own. Throws
  // Error.
  void write_param(uint32_t index, const float* user);
  // The parameters of the weights file, all of which `places` has, are there from now on.
  void set_frozen(std::vector<uint8_t*> places, std::vector<std::unique_ptr<Pages>> copies,
                  std::unique_ptr<WeightsFile> file);
  float* state(uint32_t index, uint32_t slot) const {
    return reinterpret_cast<float*>(regions_->state.data() + plan_.params[index].state_offsets[slot]);
  }

  er_status train_step(const er_array* arrays, uint32_t samples, float learning_rate, uint64_t update, uint64_t seed,
                       float* loss);
  er_status predict(const er_array* inputs, uint64_t samples, float* const* outputs);
  er_status evaluate(const er_array* arrays, uint64_t samples, er_evaluation* result);

  void open_spill(const char* directory);  // throws Error with ER_IO
  void spill_info(er_spill_info* info) const;
  er_resident resident() const {
    return {regions_->arena.resident(), regions_->params.resident(), regions_->state.resident()};
  }

  void profile(bool enabled);
  bool profile_read(uint32_t index, er_profile_entry* entry) const;

 private:
  Session(Plan plan, std::shared_ptr<Regions> regions);
  struct Step {
    const PlanStep* plan;
    Call call;
    uint64_t calls;
    double seconds;
  };
  struct Port {  // an input or output; the layouts are one sample's
    Layout user, runtime;
    uint64_t sample_elements;
  };
  std::vector<Step> prepare(const std::vector<PlanStep>& steps);
  er_status check_arrays(const er_array* arrays, size_t count, uint64_t samples) const;
  er_status check_labels(const er_array& labels, uint64_t samples, uint64_t* counted) const;
  void bind_input(size_t input, const er_array& array, uint8_t* to, uint64_t first, uint64_t valid);
  void bind(const er_array* arrays, size_t count, bool train, uint64_t first, uint64_t valid);
  er_status run(std::vector<Step>& steps);
  er_status find_frozen();
  er_status run_steps(std::vector<Step>& steps);
  er_status transfer(const Step& step);
  bool rows_in_file(const Step& step) const;
  er_status read_rows(const Step& step) const;

  const Plan plan_;
  const std::shared_ptr<Regions> regions_;
  er_context context_{};
  std::vector<er_operand> operands_;                          // of all steps; calls point into it
  std::vector<std::pair<size_t, uint64_t>> frozen_operands_;  // which of them are parameters of the weights file
  uint64_t frozen_seen_ = 0;                                  // Regions::changes when they were last looked up
  std::vector<Step> train_, eval_;
  std::vector<Port> inputs_, outputs_;
  const Pages target_;               // of an evaluated micro-batch; resident once evaluate() has run
  std::vector<Transfer> transfers_;  // one a slot of the spill file
  bool spill_open_ = false;          // with room for this plan
  bool broken_ = false;              // a step ended halfway
  bool profiling_ = false;
};

}  // namespace er

struct er_session : er::Session {
  using er::Session::Session;
};
