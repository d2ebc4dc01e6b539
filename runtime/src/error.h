// How the library reports failures: fail() inside functions that return a status, Error (thrown) inside loaders,
// guard() where the two meet.
#pragma once
#include <cstdio>
#include <exception>
#include <new>
#include <string>

#include "edge_razor.h"

namespace er {

// Sets this thread's er_last_error() (printf format) and returns `status`. Does not allocate.
er_status fail(er_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Thrown by the plan and weights readers, which know what is wrong but not how deep they were called.
struct Error {
  er_status status;
  std::string message;
};

// printf into a std::string.
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs `body`, which returns a status, and turns every exception into one: nothing may escape through the C ABI.
template <class F>
er_status guard(F&& body) noexcept {
  try {
    return body();
  } catch (const Error& error) {
    return fail(error.status, "%s", error.message.c_str());
  } catch (const std::bad_alloc&) {
    return fail(ER_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(ER_OUT_OF_MEMORY, "%s", error.what());  // std::system_error: a thread could not be started
  }
}

}  // namespace er
