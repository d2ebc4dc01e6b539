// A parameter as a session holds it (docs/plan-format.md, "Weights"): float32, or a frozen one in bf16, or in int8 with
// a scale for each row; frozen ones may also be read where they lie in the weights file. Values go in and out in the
// user's order and in float32.
#pragma once
#include "layout.h"
#include "plan.h"

namespace er {

// Bytes that the parameter takes in its region, or of the file if it is mapped.
uint64_t stored_bytes(const PlanParam& param);

struct StoredParam {
  const PlanParam& param;
  uint8_t* data;

  // Elements [begin, begin + count) of the user's order.
  void read(uint64_t begin, uint64_t count, float* user) const;
  // int8 needs the largest magnitude of each row first: begin_scales(), scan() of every element, end_scales().
  void write(uint64_t begin, uint64_t count, const float* user) const;
  bool needs_scales() const { return param.form == kInt8; }
  void begin_scales() const;
  void scan(uint64_t begin, uint64_t count, const float* user) const;
  // Throws Error (ER_BAD_FILE) if a value was not finite.
  void end_scales() const;

 private:
  Layout layout() const;
  uint64_t rows() const { return param.shape.empty() ? 1 : param.shape[param.perm[0]]; }
  uint64_t columns() const { return param.elements / rows(); }
  float* scales() const { return reinterpret_cast<float*>(data); }
  int8_t* bytes() const { return reinterpret_cast<int8_t*>(data) + (rows() * 4 + 63) / 64 * 64; }
};

}  // namespace er
