#!/usr/bin/env bash
# Native tests, the fuzz targets on altered files, and the kernel and runtime tests of Python under the address and undefined-behaviour sanitizers.
#   PYTHON=python3 [BUILD=folder] [ROUNDS=2000] [SEED=n] runtime/tests/sanitize.sh [pytest arguments]
# PYTHON needs the extra `test`. Without arguments all of tests/runtime and tests/kernels runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
BUILD=${BUILD:-build/sanitize}
SEED=${SEED:-$RANDOM}
python_path=$(command -v "$PYTHON")

cmake -S runtime -B "$BUILD" -DEDGE_RAZOR_SANITIZE=ON -DEDGE_RAZOR_WERROR=ON -DPython3_EXECUTABLE="$python_path"
cmake --build "$BUILD" --target edge_razor native_test plan_fuzz weights_fuzz checkpoint_fuzz -j "$(nproc)"

# Python itself is not built with the sanitizers, so their runtime must be there before it, and what it leaks at exit is no matter.
export EDGE_RAZOR_LIBRARY="$PWD/$BUILD/libedge_razor.so"
[[ $BUILD = /* ]] && export EDGE_RAZOR_LIBRARY="$BUILD/libedge_razor.so"
preload="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libstdc++.so)"
sanitized_python() {
  LD_PRELOAD=$preload ASAN_OPTIONS="detect_leaks=0:log_path=$plans/found" "$PYTHON" "$@"
}

plans=$(mktemp -d)
# A process of pytest that is stopped by a sanitizer can show nothing any more: what was found is in files.
trap 'cat "$plans"/found.* >&2 2>/dev/null || true; rm -rf "$plans"' EXIT
sanitized_python -m tests.runtime.write_plans "$plans"
ASAN_OPTIONS=allocator_may_return_null=1 "$BUILD/native_test" "$SEED" "${ROUNDS:-2000}" "$plans"/*.plan
sanitized_python -m tests.runtime.write_fuzz_seeds "$plans/fuzz"
for target in plan_fuzz weights_fuzz checkpoint_fuzz; do
  EDGE_RAZOR_FUZZ_PLANS=$(printf '%s:' "$plans/fuzz/plans/$target"-*.plan) \
    ASAN_OPTIONS=allocator_may_return_null=1 "$BUILD/$target" "$SEED" "${ROUNDS:-2000}" "$plans/fuzz/$target"/*
done
if [ $# -eq 0 ]; then set -- tests/runtime tests/kernels; fi
sanitized_python -m pytest -q -p no:cacheprovider -n auto --dist worksteal "$@"
