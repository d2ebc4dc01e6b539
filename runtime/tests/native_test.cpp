// Drives the C ABI as a C program would, meant for a build with sanitizers (see sanitize.sh): every call with NULL, the
// thread pool under stress, given plans, thousands of altered plans with right checksums, thousands of altered weights
// files.
//
//   native_test SEED ROUNDS PLAN…      PLANs as tests/runtime/write_plans.py writes them
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "crc32.h"
#include "edge_razor.h"

namespace {

using Bytes = std::vector<uint8_t>;
constexpr size_t kHeader = 24;
constexpr uint64_t kRunnable = 4u << 20;  // altered plans with larger regions are only loaded

Bytes read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  CHECK(file.good());
  return Bytes(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

void write_file(const std::string& path, const Bytes& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  CHECK(file.good());
}

void seal(Bytes& plan) {
  const uint32_t crc = er::crc32(plan.data() + kHeader, plan.size() - kHeader);
  const uint64_t payload = plan.size() - kHeader;
  std::memcpy(plan.data() + 12, &crc, sizeof crc);
  std::memcpy(plan.data() + 16, &payload, sizeof payload);
}

void alter(Bytes& bytes, size_t begin, std::mt19937& random) {
  static const uint64_t kValues[] = {0,   1,   2,   3,   4,     7,        63,         64,        65,
                                     127, 128, 255, 256, 65535, 1u << 31, UINT32_MAX, INT64_MAX, UINT64_MAX};
  for (unsigned changes = 1 + random() % 3; changes && bytes.size() > begin; changes--) {
    const size_t at = begin + random() % (bytes.size() - begin);
    const uint64_t value = kValues[random() % std::size(kValues)];
    const size_t width = std::min<size_t>(size_t{1} << random() % 4, bytes.size() - at);
    switch (random() % 8) {
      case 0:
        bytes.resize(at);
        break;
      case 1:
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), static_cast<uint8_t>(value));
        break;
      case 2:
        bytes[at] ^= static_cast<uint8_t>(1u << random() % 8);
        break;
      default:
        std::memcpy(bytes.data() + at, &value, width);
    }
  }
}

// Two updates and a prediction with inputs of the sizes that the session states.
void run(er_session* session, uint32_t samples) {
  er_info info;
  CHECK(er_session_info(session, &info) == ER_OK);
  std::vector<std::vector<float>> values;
  std::vector<er_array> arrays;
  for (uint32_t i = 0; i < info.inputs; i++) {
    er_tensor_info tensor;
    CHECK(er_input_info(session, i, &tensor) == ER_OK);
    CHECK(std::strlen(tensor.name) > 0 && tensor.rank >= 1 && tensor.rank <= ER_MAX_RANK);
    values.emplace_back(tensor.elements / info.micro_batch * samples, tensor.dtype ? 0.0f : 0.5f);
    arrays.push_back({values.back().data(), values.back().size() * 4, tensor.dtype, 0});
  }
  std::vector<std::vector<float>> results;
  std::vector<float*> outputs;
  for (uint32_t o = 0; o < info.outputs; o++) {
    er_tensor_info tensor;
    CHECK(er_output_info(session, o, &tensor) == ER_OK);
    results.emplace_back(tensor.elements / info.micro_batch * samples);
    outputs.push_back(results.back().data());
  }
  er_spill_info spill;
  CHECK(er_spill_read_info(session, &spill) == ER_OK);
  if (spill.file_bytes && spill.file_bytes <= kRunnable) CHECK(er_spill_open(session, ".") == ER_OK);
  const auto expected = [](er_status status) {
    return status == ER_OK || status == ER_NON_FINITE || status == ER_INVALID_ARGUMENT;
  };
  CHECK(er_profile(session, 1) == ER_OK);
  for (uint64_t update = 1; update <= 2; update++) {
    float loss;
    CHECK(expected(er_train_step(session, arrays.data(), samples, 0.01f, update, 7, &loss)));
  }
  CHECK(expected(er_predict(session, arrays.data(), samples, outputs.data())));
  CHECK(er_spill_read_info(session, &spill) == ER_OK && spill.written_bytes >= spill.read_bytes);
  for (uint32_t i = 0; i < info.train_steps + info.eval_steps; i++) {
    er_profile_entry entry;
    CHECK(er_profile_read(session, i, &entry) == ER_OK && entry.kernel && entry.label);
  }
  for (uint32_t p = 0; p < info.params; p++) {
    er_tensor_info tensor;
    CHECK(er_param_info(session, p, &tensor) == ER_OK);
    std::vector<float> data(tensor.elements);
    CHECK(er_param_read(session, p, data.data(), data.size()) == ER_OK);
    CHECK(er_param_write(session, p, data.data(), data.size()) == ER_OK);
    CHECK(er_param_read(session, p, data.data(), data.size() + 1) == ER_INVALID_ARGUMENT);
    for (uint32_t slot = 0; slot < tensor.states; slot++) {
      CHECK(er_state_read(session, p, slot, data.data(), data.size()) == ER_OK);
      CHECK(er_state_write(session, p, slot, data.data(), data.size()) == ER_OK);
    }
    CHECK(er_state_read(session, p, tensor.states, data.data(), data.size()) == ER_INVALID_ARGUMENT);
  }
}

er_session* create(const Bytes& plan) {
  // An allocation of exactly this size, so that reading past the end is caught.
  const std::unique_ptr<uint8_t[]> copy(new uint8_t[plan.size()]);
  std::memcpy(copy.get(), plan.data(), plan.size());
  er_session* session = nullptr;
  const er_status status = er_session_create(copy.get(), plan.size(), &session);
  CHECK((status == ER_OK) == (session != nullptr));
  CHECK(status == ER_OK || status == ER_BAD_PLAN || status == ER_OUT_OF_MEMORY);
  CHECK(status == ER_OK || std::strlen(er_last_error()) > 0);
  return session;
}

void null_arguments() {
  er_session* session = nullptr;
  uint64_t bytes;
  er_context context{};
  CHECK(er_session_create(nullptr, 0, &session) == ER_INVALID_ARGUMENT);
  CHECK(er_session_create("", 0, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_session_create("", 0, &session) == ER_BAD_PLAN);
  er_session_free(nullptr);
  CHECK(er_session_info(nullptr, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_param_info(nullptr, 0, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_input_info(nullptr, 0, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_output_info(nullptr, 0, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_param_write(nullptr, 0, nullptr, 0) == ER_INVALID_ARGUMENT);
  CHECK(er_param_read(nullptr, 0, nullptr, 0) == ER_INVALID_ARGUMENT);
  CHECK(er_state_write(nullptr, 0, 0, nullptr, 0) == ER_INVALID_ARGUMENT);
  CHECK(er_state_read(nullptr, 0, 0, nullptr, 0) == ER_INVALID_ARGUMENT);
  CHECK(er_weights_load(nullptr, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_weights_save(nullptr, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_train_step(nullptr, nullptr, 1, 0, 1, 0, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_predict(nullptr, nullptr, 1, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_spill_open(nullptr, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_spill_read_info(nullptr, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_profile(nullptr, 1) == ER_INVALID_ARGUMENT);
  CHECK(er_profile_read(nullptr, 0, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_unpack(0, 1, 1, 1, 0, nullptr, 0, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_kernel_scratch(nullptr, nullptr, 0, nullptr, 0, 1, &bytes) == ER_INVALID_ARGUMENT);
  CHECK(er_kernel_scratch("neg", nullptr, 1, nullptr, 0, 1, nullptr) == ER_INVALID_ARGUMENT);
  CHECK(er_kernel_run("neg", nullptr, 1, nullptr, 0, nullptr, 2, 1, &context) == ER_INVALID_ARGUMENT);
  CHECK(er_kernel_run("neg", nullptr, 0, nullptr, 0, nullptr, 0, 1, nullptr) == ER_INVALID_ARGUMENT);
}

// Kernels of a few microseconds back to back, then after a pause in which the threads have gone to sleep.
void stress_pool(uint32_t threads, int rounds) {
  std::vector<float> x(1003, 2.0f), y(x.size());
  const int64_t n = static_cast<int64_t>(x.size());
  er_operand operands[] = {{x.data(), x.size() * 4}, {y.data(), y.size() * 4}};
  er_context context{};
  for (int i = 0; i < rounds; i++) {
    x[static_cast<size_t>(i) % x.size()] = static_cast<float>(i);
    CHECK(er_kernel_run("neg", &n, 1, nullptr, 0, operands, 2, threads, &context) == ER_OK);
    for (size_t k = 0; k < x.size(); k++) CHECK(y[k] == -x[k]);
    if (i % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

void altered_plans(const Bytes& good, std::mt19937& random, int rounds) {
  int accepted = 0;
  for (int i = 0; i < rounds; i++) {
    Bytes plan = good;
    alter(plan, kHeader, random);
    seal(plan);
    er_session* session = create(plan);
    if (!session) continue;
    accepted++;
    er_info info;
    CHECK(er_session_info(session, &info) == ER_OK);
    if (info.arena_bytes + info.params_bytes + info.state_bytes <= kRunnable) run(session, 1);
    er_session_free(session);
  }
  std::printf("  %d altered plans: %d accepted and run, the others refused\n", rounds, accepted);
}

void altered_weights(er_session* session, const std::string& path, std::mt19937& random, int rounds) {
  CHECK(er_weights_save(session, path.c_str()) == ER_OK);
  CHECK(er_weights_load(session, path.c_str()) == ER_OK);
  const Bytes good = read_file(path);
  uint64_t header;
  std::memcpy(&header, good.data(), sizeof header);
  int accepted = 0;
  for (int i = 0; i < rounds; i++) {
    Bytes json(good.begin() + 8, good.begin() + 8 + static_cast<std::ptrdiff_t>(header));
    if (i % 2) {
      static const char kJson[] = "{}[]\":,\\0123456789aF32u ";
      for (unsigned changes = 1 + random() % 3; changes; changes--)
        json[random() % json.size()] = static_cast<uint8_t>(kJson[random() % (sizeof kJson - 1)]);
    } else {
      alter(json, 0, random);
    }
    const uint64_t length = i % 16 ? json.size() : random();
    Bytes file(8);
    std::memcpy(file.data(), &length, sizeof length);
    file.insert(file.end(), json.begin(), json.end());
    file.insert(file.end(), good.begin() + 8 + static_cast<std::ptrdiff_t>(header), good.end());
    write_file(path, file);
    const er_status status = er_weights_load(session, path.c_str());
    CHECK(status == ER_OK || status == ER_BAD_FILE);
    accepted += status == ER_OK;
  }
  std::remove(path.c_str());
  std::printf("  %d altered weights files: %d accepted, the others refused\n", rounds, accepted);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: native_test SEED ROUNDS PLAN...\n");
    return 2;
  }
  const unsigned seed = static_cast<unsigned>(std::strtoul(argv[1], nullptr, 10));
  const int rounds = std::atoi(argv[2]);
  std::printf("seed %u, %s\n", seed, er_isa());
  std::mt19937 random(seed);
  CHECK(er_abi_version() == ER_ABI_VERSION);
  null_arguments();
  for (const uint32_t threads : {1u, 2u, 3u, 4u, 1u, 4u}) stress_pool(threads, 300);
  std::vector<std::thread> callers;
  for (uint32_t i = 0; i < 3; i++) callers.emplace_back([i] { stress_pool(1 + i, 200); });
  for (std::thread& caller : callers) caller.join();
  for (int i = 3; i < argc; i++) {
    std::printf("%s\n", argv[i]);
    const Bytes plan = read_file(argv[i]);
    er_session* session = create(plan);
    CHECK(session);
    for (uint32_t samples = 1; samples <= 4; samples++) run(session, samples);
    altered_weights(session, std::string(argv[i]) + ".weights", random, rounds);
    er_session_free(session);
    altered_plans(plan, random, rounds);
  }
  return 0;
}
