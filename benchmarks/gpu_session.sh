#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command and under ten minutes: build, check every kernel, measure.
#
#   benchmarks/gpu_session.sh [--dry-run]
#
# CSV rows go to $OUT (benchmarks/results/gpu by default). --dry-run takes tiny sizes on the CPU, under Triton's
# interpreter, and builds nothing. Python is $PYTHON (python3 by default); no network is used. The authors' code is timed
# where $REFERENCE is a checkout of it, LXT where it is installed. A part that fails does not stop the next one, and each
# has a limit (ten minutes together); the exit status then is 1.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export OUT=${OUT:-$PWD/benchmarks/results/gpu}
mkdir -p "$OUT"
status=0

run() { # name, seconds, command...
  local name=$1 seconds=$((10#$2 * ${SLOWER:-1})) start=$SECONDS
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
  run build 90 "$PYTHON" setup.py --quiet build_ext --inplace
fi
run info 10 "$PYTHON" -m relprop info
run ceilings 20 "$PYTHON" -m benchmarks.gpu.ceilings "$@"
run parity 30 "$PYTHON" -m benchmarks.gpu.end_to_end parity "$@"
run vit 105 "$PYTHON" -m benchmarks.gpu.end_to_end vit "$@"
run latency 30 "$PYTHON" -m benchmarks.gpu.end_to_end latency "$@"
run tokens 40 "$PYTHON" -m benchmarks.gpu.end_to_end tokens "$@"
run llama 85 "$PYTHON" -m benchmarks.gpu.end_to_end llama "$@"
run several 40 "$PYTHON" -m benchmarks.gpu.end_to_end several "$@"
if [ "${1:-}" = "--dry-run" ]; then
  race=(--quick --contenders forward forward_backward relprop_stable)
else
  race=(--device cuda --models vit_base_patch16_224 --batches 8 --dtypes bfloat16 --budget 5 --memory 40
    --contenders forward forward_backward relprop_stable relprop_attnlrp captum_gradient_shap zennit)
fi
run peers 50 "$PYTHON" -m benchmarks.peers "${race[@]}" ${REFERENCE:+--reference "$REFERENCE"} --out "$OUT/peers.csv"
run kernels 100 "$PYTHON" -m benchmarks.gpu.kernels "$@"
exit $status
