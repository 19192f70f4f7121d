#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command and under ten minutes: build, check every kernel, measure.
#
#   benchmarks/gpu_session.sh [--dry-run]
#
# CSV rows and logs go to $OUT (benchmarks/results/gpu by default), every row as soon as it is there; with PACK=1 they go
# to $OUT/session.tar.gz alone. --dry-run takes tiny sizes on the CPU, under Triton's interpreter, and builds nothing.
# Python is $PYTHON (python3 by default); no network is used. The authors' code is timed where $REFERENCE is a checkout
# of it, LXT where it is installed or $LXT is a checkout. Parts run in the order of what they are worth; each has a
# limit, and no part starts or runs past $TOTAL seconds (590 by default). A part that fails, is late or is left out for
# lack of time does not stop the next one; budget.csv says so, and the exit status is 1. PARTS="vit llama" runs those.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
packed=${OUT:=$PWD/benchmarks/results/gpu}
mkdir -p "$packed"
if [ "${PACK:-}" = 1 ]; then OUT=$(mktemp -d); fi
export OUT
status=0

# Seconds that a part should take on an H200 with 16 cores, and its limit: estimates until they are measured.
budget='build 75 110
compiled 0 120
info 6 20
ceilings 12 30
checks 25 70
parity 45 80
vit 95 150
latency 25 45
llama 60 100
tokens 25 50
several 20 40
kernels 34 65
steps 40 70
inductor 50 100
tiles 12 25
sanitizer 40 80
peers 21 45'
if [ "${1:-}" = "--dry-run" ]; then # an interpreter's times say nothing of a GPU's
  budget=$(awk '$1 != "build" { print $1, $2, 3600 }' <<<"$budget")
  TOTAL=${TOTAL:-3600}
fi
TOTAL=${TOTAL:-590}
of_budget() { awk -v name="$1" -v column="$2" '$1 == name { print $column }' <<<"$budget"; }

echo "part expected limit, in seconds; $TOTAL in all"
awk '{ sum += $2; print } END { print "all", sum }' <<<"$budget"
echo "part,expected_s,limit_s,took_s,state" >"$OUT/budget.csv"

wanted() { [ -z "${PARTS:-}" ] || [[ " $PARTS " == *" $1 "* ]]; }

part() { # name, command...: within the smaller of the part's own limit and what is left
  local name=$1 start=$SECONDS left=$((TOTAL - SECONDS)) state=done
  local limit
  limit=$(of_budget "$name" 3)
  shift
  if ((limit > left)); then limit=$left; fi
  if ((limit < 5)); then
    state="no time left"
  else
    echo "== $name"
    LIMIT=$limit timeout -k 5 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    local ended=${PIPESTATUS[0]}
    case $ended in
      0) ;;
      124 | 137) state="late" ;;
      *) state="failed" ;;
    esac
  fi
  if [ "$state" != done ]; then
    echo "== $name $state" >&2
    status=1
  fi
  echo "== $name took $((SECONDS - start)) s" | tee -a "$OUT/$name.log"
  echo "$name,$(of_budget "$name" 2),$limit,$((SECONDS - start)),$state" >>"$OUT/budget.csv"
  if [ "${PACK:-}" = 1 ]; then tar -czf "$packed/session.tar.gz" -C "$OUT" .; fi
}

run() { if wanted "$1"; then part "$@"; fi; }

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
# Triton's kernels are compiled while the CUDA kernels are built: they do not need each other, and there are many cores.
if wanted compiled; then
  (timeout -k 5 "$(of_budget compiled 3)" "$PYTHON" -m benchmarks.gpu.compiled_first "$@") >"$OUT/compiling.log" 2>&1 &
  compiler=$!
fi
if [ "${1:-}" != "--dry-run" ]; then
  export RELPROP_BUILD_JOBS=${RELPROP_BUILD_JOBS:-$(nproc)}
  run build "$PYTHON" setup.py --quiet build_ext --inplace
fi
if wanted compiled; then
  wait "$compiler"
  run compiled bash -c "cat '$OUT/compiling.log'; exit $?"
fi
run info "$PYTHON" -m relprop info
run ceilings "$PYTHON" -m benchmarks.gpu.ceilings "$@"
run checks "$PYTHON" -m benchmarks.gpu.kernels check "$@"
run parity "$PYTHON" -m benchmarks.gpu.end_to_end parity "$@"
run vit "$PYTHON" -m benchmarks.gpu.end_to_end vit "$@"
run latency "$PYTHON" -m benchmarks.gpu.end_to_end latency "$@"
run llama "$PYTHON" -m benchmarks.gpu.end_to_end llama "$@"
run tokens "$PYTHON" -m benchmarks.gpu.end_to_end tokens "$@"
run several "$PYTHON" -m benchmarks.gpu.end_to_end several "$@"
run kernels "$PYTHON" -m benchmarks.gpu.kernels measure "$@"
run steps "$PYTHON" -m benchmarks.gpu.steps "$@"
run inductor "$PYTHON" -m benchmarks.gpu.end_to_end inductor "$@"
run tiles "$PYTHON" -m benchmarks.gpu.tiles_timed "$@"
run sanitizer "$PYTHON" -m benchmarks.gpu.sanitized "$@"
if [ "${1:-}" = "--dry-run" ]; then
  race=(--quick --contenders forward relprop_stable relprop relprop_attnlrp)
else # in the order of their worth: who would start after --minutes has no row
  race=(--device cuda --models vit_base_patch16_224 --batches 8 --dtypes bfloat16 float32 --budget 3 --memory 40
    --minutes 0.5 --contenders forward relprop_stable relprop authors relprop_attnlrp forward_backward
    captum_gradient_shap grad_cam zennit captum_ig)
fi
run peers "$PYTHON" -m benchmarks.peers "${race[@]}" ${REFERENCE:+--reference "$REFERENCE"} --out "$OUT/peers_cuda.csv"
echo "== all took $SECONDS s"
column -s, -t "$OUT/budget.csv" 2>/dev/null || cat "$OUT/budget.csv"
exit $status
