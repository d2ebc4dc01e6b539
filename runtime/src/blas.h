// The two entry points of OpenBLAS (scipy-openblas32) that the runtime uses.
#pragma once
#include <cstdint>
#include <mutex>

extern "C" {
void scipy_openblas_set_num_threads(int threads);
void scipy_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float* a, int lda,
                       const float* b, int ldb, float beta, float* c, int ldc);
}

namespace er {

// The pool's threads call it; it must not start its own. Sessions may be made by several threads at once.
inline void blas_single_threaded() {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  scipy_openblas_set_num_threads(1);
}

enum class Trans { no = 111, yes = 112 };

// Row-major C[m,n] = alpha · op(A)[m,k] · op(B)[k,n] + beta · C. Runs on the calling thread only.
inline void sgemm(Trans a_trans, Trans b_trans, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
                  int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  scipy_cblas_sgemm(101, static_cast<int>(a_trans), static_cast<int>(b_trans), static_cast<int>(m), static_cast<int>(n),
                    static_cast<int>(k), alpha, a, static_cast<int>(lda), b, static_cast<int>(ldb), beta, c,
                    static_cast<int>(ldc));
}

}  // namespace er
