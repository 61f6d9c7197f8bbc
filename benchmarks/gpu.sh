#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on a machine with an NVIDIA GPU that may have no network.
#
#   benchmarks/gpu.sh [build] [test] [sanitize] [bench]     (no argument, or all: the four, about 20 minutes)
#
# Where a command may take 10 minutes: "build test sanitize" first, then "build bench" (a second build is short).
# Logs and results go to $OUT (default out/gpu): <stage>.log, memcheck.log, racecheck.log, synccheck.log, and
# <gpu>.json for benchmarks/results/. A stage that fails does not keep the next from running; the exit status is
# the number of stages that failed. What it honours, with the default:
#
#   PYTHON=python3  WHEELS=.gpu-wheels  CK_ARCH=the GPU's own, e.g. 90
#   CK_BENCH=""               arguments for the benchmarks' pytest, e.g. "-k sd1"
#   CK_BENCH_SECONDS=480      CK_SANITIZE_SECONDS=120, of each tool
#   CK_COMMIT=""              what the results say was measured, where there is no git
#
# It needs torch, pytest, hypothesis, CMake, Ninja, pybind11 and nvcc there. What is missing, and what only the
# comparison with diffusers needs, is carried in .gpu-wheels/ (left out of git by .git/info/exclude), downloaded
# where there is a network, for that machine's Python 3.12:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d .gpu-wheels \
#       diffusers==0.42.1 importlib_metadata zipp setuptools==84.2.1 pybind11==3.1.0
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.gpu-wheels}
OUT=${OUT:-out/gpu}
SITE=${TMPDIR:-/tmp}/customdiff-site
KERNELS=2ck4cuda # of the mangled names of everything in the namespace ck::cuda
mkdir -p "$OUT" "$SITE"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

build() {
    nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv
    if compgen -G "$WHEELS/*.whl" >/dev/null; then
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" "$WHEELS"/*.whl
    fi
    local arch=${CK_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}
    CUSTOMDIFF_CUDA=ON CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$arch ${CMAKE_ARGS:-}" \
        "$PYTHON" -m pip install -v --no-index --no-build-isolation --no-deps -e .
    "$PYTHON" -c 'import customdiff_kernels as ck; print(ck.build_info(), ck.explain("cuda"), sep="\n")'
    [[ $("$PYTHON" -c 'import customdiff_kernels as ck; print(ck.explain("cuda"))') == cuda:* ]]
}

test_gpu() {
    local workers=() failed=0
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
    "$PYTHON" -m pytest tests -m gpu -q "${workers[@]}" --durations=5 || failed=1
    "$PYTHON" -m pytest tests/test_triton.py -q || failed=1
    return "$failed"
}

# One tensor an allocation, so that memcheck sees where each ends. Only our kernels are watched, by name: that the
# name is in all of them is checked first.
sanitize() {
    local module unnamed tool failed=0
    module=$("$PYTHON" -c 'import customdiff_kernels._C as module; print(module.__file__)')
    unnamed=$(cuobjdump --dump-resource-usage "$module" | grep -o 'Function [^:]*' | grep -v "$KERNELS")
    if [[ -n $unnamed ]]; then
        echo "kernels without $KERNELS in their names would not be watched: $unnamed"
        return 1
    fi
    "$PYTHON" benchmarks/sanitize.py || failed=1
    for tool in memcheck racecheck synccheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${CK_SANITIZE_SECONDS:-120}" compute-sanitizer --tool "$tool" \
            --kernel-name kns="$KERNELS" --report-api-errors no --error-exitcode 99 --log-file "$OUT/$tool.log" \
            "$PYTHON" benchmarks/sanitize.py
        local status=$?
        echo "$tool: exit status $status; $(tail -n 1 "$OUT/$tool.log")"
        ((status == 0)) || failed=1
    done
    return "$failed"
}

# An interrupt rather than an end: what was measured by then is written.
bench() {
    local name status
    name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr '[:upper:] ' '[:lower:]-')
    rm -f out/benchmarks/benchmarks.json
    # shellcheck disable=SC2086
    timeout -s INT -k 30 "${CK_BENCH_SECONDS:-480}" "$PYTHON" -m pytest benchmarks/ --benchmark ${CK_BENCH:-}
    status=$?
    cp out/benchmarks/benchmarks.json "$OUT/$name.json"
    return "$status"
}

failures=0
run_stage() { # name, function
    local start=$SECONDS
    (
        [[ $2 == build ]] && set -e
        "$2"
    ) >"$OUT/$1.log" 2>&1
    local status=$?
    tail -n "${CK_TAIL:-25}" "$OUT/$1.log"
    echo "== $1: exit status $status after $((SECONDS - start)) s =="
    ((status == 0)) || failures=$((failures + 1))
}

stages=("$@")
if [[ $# == 0 || $* == all ]]; then stages=(build test sanitize bench); fi
for stage in "${stages[@]}"; do
    case $stage in
        build | sanitize | bench) run_stage "$stage" "$stage" ;;
        test) run_stage test test_gpu ;;
        *)
            echo "unknown stage '$stage': build, test, sanitize, bench or all" >&2
            exit 2
            ;;
    esac
done
exit "$failures"
