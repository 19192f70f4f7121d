#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command and under ten minutes: build, check every kernel, measure.
#
#   benchmarks/gpu_session.sh [--dry-run]
#
# CSV rows go to $OUT (benchmarks/results/gpu by default). --dry-run takes tiny sizes on the CPU, under Triton's
# interpreter, and builds nothing. Python is $PYTHON (python3 by default); no network is used. A part that fails does not
# stop the next one; the exit status then is 1.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export OUT=${OUT:-$PWD/benchmarks/results/gpu}
mkdir -p "$OUT"
status=0

run() { # name, seconds, command...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  echo "== $name"
  if ! timeout "$seconds" "$@" 2>&1 | tee "$OUT/$name.log"; then
    echo "== $name failed" >&2
    status=1
  fi
  echo "== $name took $((SECONDS - start)) s"
}

set -o pipefail
if [ "${1:-}" = "--dry-run" ]; then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
else
  unset TRITON_INTERPRET
  run build 120 "$PYTHON" setup.py --quiet build_ext --inplace
fi
run info 60 "$PYTHON" -m relprop info
run ceilings 60 "$PYTHON" -m benchmarks.gpu.ceilings "$@"
run kernels 240 "$PYTHON" -m benchmarks.gpu.kernels "$@"
run end_to_end 180 "$PYTHON" -m benchmarks.gpu.end_to_end "$@"
exit $status
