#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command and under ten minutes: build, check every kernel, measure.
#
#   benchmarks/gpu_session.sh [--dry-run]
#
# CSV rows and logs go to $OUT (benchmarks/results/gpu by default), every row as soon as it is there; with PACK=1 they go
# to $OUT/session.tar.gz alone. --dry-run takes tiny sizes on the CPU, under Triton's interpreter, and builds nothing.
# Python is $PYTHON (python3 by default); no network is used. The authors' code is timed where $REFERENCE is a checkout
# of it, LXT where it is installed or $LXT is a checkout. A part that fails does not stop the next one, and each has a
# limit (ten minutes together); the exit status then is 1. PARTS="vit llama" runs only those.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
packed=${OUT:=$PWD/benchmarks/results/gpu}
mkdir -p "$packed"
if [ "${PACK:-}" = 1 ]; then OUT=$(mktemp -d); fi
export OUT
status=0

run() { # name, seconds, command...
  local name=$1 seconds=$((10#$2 * ${SLOWER:-1})) start=$SECONDS
  shift 2
  if [ -n "${PARTS:-}" ] && [[ " $PARTS " != *" $name "* ]]; then return; fi
  echo "== $name"
  if ! timeout -k 5 "$seconds" "$@" 2>&1 | tee "$OUT/$name.log"; then
    echo "== $name failed" >&2
    status=1
  fi
  echo "== $name took $((SECONDS - start)) s" | tee -a "$OUT/$name.log"
  if [ "${PACK:-}" = 1 ]; then tar -czf "$packed/session.tar.gz" -C "$OUT" .; fi
}

set -o pipefail
if [ "${1:-}" = "--dry-run" ]; then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
else
  unset TRITON_INTERPRET
fi
# Installed, relprop.kernels is the folder kernels/; in a checkout that is not, a link stands in for as long as this runs.
if ! "$PYTHON" -c "import relprop.kernels" 2>/dev/null && [ ! -e relprop/kernels ]; then
  ln -s ../kernels relprop/kernels
  trap 'rm -f relprop/kernels' EXIT
fi
if [ "${1:-}" != "--dry-run" ]; then
  export RELPROP_BUILD_JOBS=${RELPROP_BUILD_JOBS:-$(nproc)}
  run build 85 "$PYTHON" setup.py --quiet build_ext --inplace
fi
run info 10 "$PYTHON" -m relprop info
run ceilings 15 "$PYTHON" -m benchmarks.gpu.ceilings "$@"
run checks 60 "$PYTHON" -m benchmarks.gpu.kernels check "$@"
run parity 30 "$PYTHON" -m benchmarks.gpu.end_to_end parity "$@"
run vit 90 "$PYTHON" -m benchmarks.gpu.end_to_end vit "$@"
run latency 20 "$PYTHON" -m benchmarks.gpu.end_to_end latency "$@"
run tokens 35 "$PYTHON" -m benchmarks.gpu.end_to_end tokens "$@"
run llama 75 "$PYTHON" -m benchmarks.gpu.end_to_end llama "$@"
run several 30 "$PYTHON" -m benchmarks.gpu.end_to_end several "$@"
run steps 25 "$PYTHON" -m benchmarks.gpu.steps "$@"
run kernels 30 "$PYTHON" -m benchmarks.gpu.kernels measure "$@"
if [ "${1:-}" = "--dry-run" ]; then
  race=(--quick --contenders forward forward_backward relprop_stable)
else
  race=(--device cuda --models vit_base_patch16_224 --batches 8 --dtypes bfloat16 --budget 5 --memory 40
    --contenders forward forward_backward relprop_stable relprop_attnlrp captum_gradient_shap zennit)
fi
run peers 50 "$PYTHON" -m benchmarks.peers "${race[@]}" ${REFERENCE:+--reference "$REFERENCE"} --out "$OUT/peers.csv"
run sanitizer 45 "$PYTHON" -m benchmarks.gpu.sanitized "$@"
exit $status
