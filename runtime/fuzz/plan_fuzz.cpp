// libFuzzer target: the plan loader, and two updates, an evaluation and a prediction with every small plan that it
// accepts. benchmarks/fuzz.py builds and runs it.
#include <memory>

#include "crc32.h"
#include "fuzz_file.h"

namespace {

constexpr size_t kHeader = 24;
constexpr uint64_t kRunnable = 1u << 20;  // bytes of all regions; larger plans are only loaded
constexpr uint32_t kMaxSteps = 200;

bool expected(er_status status) { return status == ER_OK || status == ER_NON_FINITE || status == ER_INVALID_ARGUMENT; }

std::string escaped(const char* name) {
  std::string out;
  char code[8];
  for (; *name; name++) {
    const unsigned char c = static_cast<unsigned char>(*name);
    std::snprintf(code, sizeof code, c < 0x20 || c == '"' || c == '\\' ? "\\u%04x" : "%c", c);
    out += code;
  }
  return out;
}

// Loads a weights file for the plan, if its tensors are small: a plan may read them there.
void load_weights(er_session* session, const er_info& info) {
  std::string header = "{";
  uint64_t bytes = 0;
  for (uint32_t p = 0; p < info.params; p++) {
    er_tensor_info tensor;
    expect(er_param_info(session, p, &tensor) == ER_OK);
    if (tensor.elements > kRunnable / 4 - bytes / 4) return;
    header += (p ? ",\"" : "\"") + escaped(tensor.name) + "\":{\"dtype\":\"F32\",\"shape\":[";
    for (uint32_t d = 0; d < tensor.rank; d++) header += (d ? "," : "") + std::to_string(tensor.shape[d]);
    header += "],\"data_offsets\":[" + std::to_string(bytes) + ",";
    header += std::to_string(bytes += tensor.elements * 4) + "]}";
  }
  header += "}";
  const uint64_t length = header.size();
  std::string file(reinterpret_cast<const char*>(&length), 8);
  file += header;
  const std::vector<float> values(bytes / 4, 0.25f);
  file.append(reinterpret_cast<const char*>(values.data()), bytes);
  write_file(file.data(), file.size());
  // Names that hold a NUL byte are cut off here: the loader misses the tensor.
  const er_status status = er_weights_load(session, fuzz_path().c_str());
  expect(status == ER_OK || status == ER_BAD_FILE);
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
  if (spill.file_bytes && spill.file_bytes <= kRunnable) expect(er_spill_open(session, "/dev/shm") == ER_OK);
  load_weights(session, info);
  for (uint64_t update = 1; update <= 2; update++) {
    float loss;
    expect(expected(er_train_step(session, arrays.data(), samples, 0.01f, update, 7, &loss)));
  }
  er_evaluation evaluation;
  const er_status status = er_evaluate(session, arrays.data(), samples, &evaluation);
  expect(expected(status) || status == ER_BAD_PLAN);  // a plan may train what it does not put out
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
