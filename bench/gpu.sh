#!/usr/bin/env bash
# Everything that needs a GPU, in one go, on a machine where rlsp_fast is installed with the CUDA library (RLSP_BUILD=cuda):
#   bash bench/gpu.sh [OUT]
# Tests, sanitizers, kernel benches, then a colocated run on real vLLM where it imports. Each part writes OUT/<part>.log and adds
# to bench/results/*.csv; one line a part is printed at the end. A part that fails does not stop the others.
set -u
cd "$(dirname "$0")/.."
out=${1:-outputs/gpu}
mkdir -p "$out"
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
summary=()

part() {
  local name=$1 start=$SECONDS code=0
  shift
  "$@" >"$out/$name.log" 2>&1 || code=$?
  summary+=("$(printf '%-14s exit %-3d %4d s  %s' "$name" "$code" $((SECONDS - start)) "$(tail -n 1 "$out/$name.log" | cut -c1-90)")")
}

sanitize() { python -m pytest -q -m gpu tests/test_packed_gae.py -k "sanitizer and $1"; }

part pytest python -m pytest -q -m gpu tests
for tool in memcheck racecheck initcheck; do part "$tool" sanitize "$tool"; done
part bench_gae python bench/bench_gae.py --device cuda --most-tokens 8388608
part bench_packing python bench/bench_packing.py --dtype bfloat16 --sequences 128
if python -c 'import vllm' 2>/dev/null; then
  part bench_step python bench/bench_step.py --engines vllm transformers
  part demo python -m rlsp_fast demo
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
printf '%s\n' "${summary[@]}"
