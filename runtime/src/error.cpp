#include "error.h"

#include <cstdarg>

namespace er {

static thread_local char last_error[1024] = "";

er_status fail(er_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

std::string text(const char* format, ...) {
  char buffer[768];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

}  // namespace er

extern "C" const char* er_last_error(void) { return er::last_error; }
