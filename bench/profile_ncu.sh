#!/usr/bin/env bash
# Nsight Compute of kernels in one step of a recipe, one report a rank, and the table of those that took most:
#   [KERNELS=REGEX] [PHASE=NAME] [COUNT=1000] [SET=full] [STEP=3] [NPROC=1] [OUT=outputs/ncu] bash bench/profile_ncu.sh RECIPE [key=value ...]
# Every launch is repeated for each group of numbers, so the step takes minutes: COUNT bounds the launches, and SET=full, which
# ncu's window wants, multiplies them. KERNELS picks by name ('gemm|nvjet' for cuBLAS); unset: ours. PHASE, a name of
# docs/metrics.md's timing_s/<phase>, keeps to that phase, without what backward launches from autograd's own thread; unset: the
# whole step. Writes OUT/rank0.ncu-rep, its numbers in OUT/rank0.csv, and OUT/rank0.txt as read_ncu.py prints it.
set -eu
cd "$(dirname "$0")/.."
out=${OUT:-outputs/ncu}
mkdir -p "$out"
command -v ncu >/dev/null || {
  echo "ncu is not installed: it comes with the CUDA toolkit"
  exit 1
}
command -v torchrun >/dev/null || {
  echo "torchrun is not on the PATH: activate the environment that rlsp_fast is installed in (. .venv/bin/activate)"
  exit 1
}
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
ours='^(_(logprob_entropy|logprob_entropy_grad|ppo_loss|reduce|value_loss|kl_penalty|scale)_kernel|packed_gae_kernel)'
metrics=$(cd bench && python -c 'import read_ncu; print(",".join(read_ncu.METRICS))')
torchrun --nproc-per-node "${NPROC:-1}" --no-python \
  ncu --profile-from-start off --nvtx ${PHASE:+--nvtx-include "rlsp_fast@$PHASE/"} --kernel-name "regex:${KERNELS:-$ours}" \
  --launch-count "${COUNT:-1000}" ${SET:+--set "$SET"} --metrics "$metrics" --force-overwrite --export "$out/rank%q{RANK}" \
  python bench/profile_run.py "$1" --first "${STEP:-3}" --last "${STEP:-3}" "output.dir=$out/run" "${@:2}"
for report in "$out"/rank*.ncu-rep; do
  ncu --import "$report" --csv --page raw --print-units base --metrics "$metrics" >"${report%.ncu-rep}.csv"
  python bench/read_ncu.py "${report%.ncu-rep}.csv" | tee "${report%.ncu-rep}.txt"
done
