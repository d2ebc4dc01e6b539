// The C ABI for what an app needs beside steps and predictions: evaluation and checkpoints.
#include "checkpoint.h"
#include "error.h"

using namespace er;

extern "C" {

er_status er_evaluate(er_session* session, const er_array* arrays, uint64_t samples, er_evaluation* result) {
  return guard([&] {
    if (!session || !arrays || !result) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
    const Session::Turn turn(session->turns());
    return session->evaluate(arrays, samples, result);
  });
}

er_status er_checkpoint_save(const er_session* session, const char* path, uint64_t update, const void* user,
                             size_t user_bytes) {
  return guard([&] {
    if (!session || !path || !*path || (user_bytes && !user)) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
    if (user_bytes > kMaxUserBytes)
      return fail(ER_INVALID_ARGUMENT, "%zu bytes of the program's own; at most %zu are kept", user_bytes,
                  kMaxUserBytes);
    const Session::Turn turn(session->turns());
    save_checkpoint(*session, path, update, user, user_bytes);
    return ER_OK;
  });
}

er_status er_checkpoint_load(er_session* session, const char* path, uint64_t* update, void* user, size_t capacity,
                             size_t* user_bytes) {
  return guard([&] {
    if (!session || !path || !update || (capacity && !user)) return fail(ER_INVALID_ARGUMENT, "a NULL argument");
    const Session::Turn turn(session->turns());
    load_checkpoint(*session, path, update, user, capacity, user_bytes);
    return ER_OK;
  });
}

}  // extern "C"
