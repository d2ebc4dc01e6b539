// libFuzzer target: the plan loader, and two updates and a prediction with every small plan that it accepts.
// benchmarks/fuzz.py builds and runs it.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "crc32.h"
#include "edge_razor.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

constexpr size_t kHeader = 24;
constexpr uint64_t kRunnable = 1u << 20;  // bytes of all regions; larger plans are only loaded
constexpr uint32_t kMaxSteps = 200;

void expect(bool holds) {
  if (!holds) std::abort();
}

bool expected(er_status status) {
  return status == ER_OK || status == ER_NON_FINITE || status == ER_INVALID_ARGUMENT;
}

void run(er_session* session, const er_info& info) {
  const uint32_t samples = std::min(info.batch_size, info.micro_batch + 1);
  std::vector<std::vector<float>> values, results;
  std::vector<er_array> arrays;
  for (uint32_t i = 0; i < info.inputs; i++) {
    er_tensor_info tensor;
    expect(er_input_info(session, i, &tensor) == ER_OK);
    values.emplace_back(tensor.elements / info.micro_batch * samples, tensor.dtype ? 0.0f : 0.5f);
    arrays.push_back({values.back().data(), values.back().size() * 4, tensor.dtype, 0});
  }
  std::vector<float*> outputs;
  for (uint32_t o = 0; o < info.outputs; o++) {
    er_tensor_info tensor;
    expect(er_output_info(session, o, &tensor) == ER_OK);
    results.emplace_back(tensor.elements / info.micro_batch * samples);
    outputs.push_back(results.back().data());
  }
  er_spill_info spill;
  expect(er_spill_read_info(session, &spill) == ER_OK);
  if (spill.file_bytes && spill.file_bytes <= kRunnable) expect(er_spill_open(session, "/tmp") == ER_OK);
  for (uint64_t update = 1; update <= 2; update++) {
    float loss;
    expect(expected(er_train_step(session, arrays.data(), samples, 0.01f, update, 7, &loss)));
  }
  expect(expected(er_predict(session, arrays.data(), samples, outputs.data())));
}

}  // namespace

// Almost every mutated plan would end at the checksum: the header is made right again, but for one in 16.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  if (size <= kHeader || max_size <= kHeader || seed % 16 == 0) return LLVMFuzzerMutate(data, size, max_size);
  const uint64_t payload = LLVMFuzzerMutate(data + kHeader, size - kHeader, max_size - kHeader);
  const uint32_t checksum = er::crc32(data + kHeader, payload);
  std::memcpy(data + 12, &checksum, sizeof checksum);
  std::memcpy(data + 16, &payload, sizeof payload);
  return kHeader + payload;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  er_session* session = nullptr;
  const er_status status = er_session_create(data ? data : reinterpret_cast<const uint8_t*>(""), size, &session);
  expect((status == ER_OK) == (session != nullptr));
  expect(status == ER_OK || status == ER_BAD_PLAN || status == ER_OUT_OF_MEMORY);
  expect(status == ER_OK || std::strlen(er_last_error()) > 0);
  if (status) return 0;
  er_info info;
  expect(er_session_info(session, &info) == ER_OK);
  for (uint32_t p = 0; p < info.params; p++) {
    er_tensor_info tensor;
    expect(er_param_info(session, p, &tensor) == ER_OK && std::strlen(tensor.name) > 0);
  }
  if (info.arena_bytes <= kRunnable && info.params_bytes <= kRunnable && info.state_bytes <= kRunnable &&
      info.train_steps + info.eval_steps <= kMaxSteps)
    run(session, info);
  er_session_free(session);
  return 0;
}
