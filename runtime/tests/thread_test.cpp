// Sessions in several threads, as edge_razor.h promises, meant for a build with the thread sanitizer: several sessions
// at once; one session, and two that share memory, from several threads at once.
//
//   thread_test PLAN     a plan with momentum as tests/runtime/write_plans.py writes it
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "edge_razor.h"

namespace {

constexpr int kUpdates = 30;

// A session's batch: inputs first, target last.
struct Batch {
  std::vector<std::vector<float>> values;
  std::vector<er_array> arrays;
  uint64_t output = 0;
  uint32_t samples = 0;

  explicit Batch(er_session* session) {
    er_info info;
    CHECK(er_session_info(session, &info) == ER_OK);
    samples = info.batch_size;
    for (uint32_t i = 0; i < info.inputs; i++) {
      er_tensor_info tensor;
      CHECK(er_input_info(session, i, &tensor) == ER_OK);
      values.emplace_back(tensor.elements / info.micro_batch * samples, tensor.dtype ? 0.0f : 0.5f);
      arrays.push_back({values.back().data(), values.back().size() * 4, tensor.dtype, 0});
    }
    er_tensor_info tensor;
    CHECK(er_output_info(session, 0, &tensor) == ER_OK);
    output = tensor.elements / info.micro_batch * samples;
  }
};

er_session* create(const std::vector<char>& plan, const er_session* base = nullptr) {
  er_session* session = nullptr;
  CHECK((base ? er_session_create_shared(plan.data(), plan.size(), base, &session)
              : er_session_create(plan.data(), plan.size(), &session)) == ER_OK);
  return session;
}

void train(er_session* session, const Batch& batch) {
  float loss;
  for (uint64_t update = 1; update <= kUpdates; update++)
    CHECK(er_train_step(session, batch.arrays.data(), batch.samples, 0.01f, update, 0, &loss) == ER_OK);
}

std::vector<float> predict(er_session* session, const Batch& batch) {
  std::vector<float> out(batch.output);
  float* outputs[] = {out.data()};
  CHECK(er_predict(session, batch.arrays.data(), batch.samples, outputs) == ER_OK);
  return out;
}

template <class F>
void in_threads(int count, F&& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; i++) threads.emplace_back([&body, i] { body(i); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 2);
  std::ifstream file(argv[1], std::ios::binary);
  const std::vector<char> plan{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};

  // Each thread its own session, creation and errors included: all end at the same bits.
  std::vector<std::vector<float>> ends(3);
  in_threads(3, [&](int i) {
    er_session* session = create(plan);
    const Batch batch(session);
    train(session, batch);
    ends[static_cast<size_t>(i)] = predict(session, batch);
    CHECK(er_param_read(session, 1000 + static_cast<uint32_t>(i), nullptr, 0) == ER_INVALID_ARGUMENT);
    er_session_free(session);
  });
  CHECK(ends[0] == ends[1] && ends[0] == ends[2]);

  // One session and another on its memory: train, predict, evaluate, save and read parameters at once.
  er_session* base = create(plan);
  er_session* shared = create(plan, base);
  const Batch batch(base);
  const std::string checkpoint = std::string(argv[1]) + ".thread_test";
  std::atomic<bool> done{false};
  in_threads(5, [&](int i) {
    if (i == 0) {
      train(base, batch);
      done = true;
    }
    for (int n = 0; i && (n < 5 || !done); n++) {
      er_session* session = i % 2 ? base : shared;
      er_tensor_info info;
      er_evaluation result;
      CHECK(er_param_info(session, 0, &info) == ER_OK);
      std::vector<float> weights(info.elements);
      if (i < 3) predict(session, batch);
      if (i == 3) CHECK(er_evaluate(session, batch.arrays.data(), batch.samples, &result) == ER_OK);
      if (i == 4) CHECK(er_checkpoint_save(session, checkpoint.c_str(), 1, nullptr, 0) == ER_OK);
      CHECK(er_param_read(session, 0, weights.data(), weights.size()) == ER_OK);
      CHECK(er_range_read(session, 0, ER_PARAMETER, 1, weights.data(), weights.size() - 1) == ER_OK);
      CHECK(er_range_read(session, 0, 0, 1, weights.data(), weights.size() - 1) == ER_OK);
    }
  });
  CHECK(predict(shared, batch) == ends[0]);
  std::remove(checkpoint.c_str());
  er_session_free(base);
  er_session_free(shared);
  std::printf("threads: no race, the same bits\n");
  return 0;
}
