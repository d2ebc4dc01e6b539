// libFuzzer target: the loader of safetensors weights, into the memory of a session or as a file that it goes on
// reading. benchmarks/fuzz.py builds and runs it; EDGE_RAZOR_FUZZ_PLANS names plans whose parameters are loaded.
#include <cmath>

#include "fuzz_file.h"

namespace {

void predict(er_session* session) {
  er_info info;
  er_tensor_info input, output;
  expect(er_session_info(session, &info) == ER_OK && info.inputs == 2 && info.outputs == 1);
  expect(er_input_info(session, 0, &input) == ER_OK && er_output_info(session, 0, &output) == ER_OK);
  const std::vector<float> values(input.elements, 0.5f);
  std::vector<float> result(output.elements);
  const er_array array{values.data(), values.size() * 4, 0, 0};
  float* const outputs[] = {result.data()};
  const er_status status = er_predict(session, &array, info.micro_batch, outputs);
  expect(status == ER_OK || status == ER_NON_FINITE);
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  open_sessions();
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  return mutate_safetensors(data, size, max_size, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  for (er_session* session : sessions) {
    write_file(data, size);
    const er_status status = er_weights_load(session, fuzz_path().c_str());
    expect(status == ER_OK || status == ER_BAD_FILE);
    expect(status == ER_OK || std::strlen(er_last_error()) > 0);
    if (status) continue;
    predict(session);
    // What was loaded can be saved, and loaded again, in the place of what is being read.
    expect(er_weights_save(session, fuzz_path().c_str()) == ER_OK);
    expect(er_weights_load(session, fuzz_path().c_str()) == ER_OK);
  }
  return 0;
}
