// A check that ends the program with its place and the runtime's last error.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "edge_razor.h"

#define CHECK(condition)                                                                                      \
  do {                                                                                                        \
    if (!(condition)) {                                                                                       \
      std::fprintf(stderr, "%s:%d: %s\n  last error: %s\n", __FILE__, __LINE__, #condition, er_last_error()); \
      std::exit(1);                                                                                           \
    }                                                                                                         \
  } while (0)
