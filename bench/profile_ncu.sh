#!/usr/bin/env bash
# Nsight Compute of one phase's kernels in one step of a recipe, one report a rank:
#   [PHASE=update_actor] [KERNELS=regex:.] [COUNT=40] [STEP=3] [NPROC=1] [OUT=outputs/ncu] bash bench/profile_ncu.sh RECIPE [key=value ...]
# Every kernel is run many times over, so the step takes minutes: COUNT bounds the kernels. Writes OUT/rank0.ncu-rep and a summary
# (duration, registers, occupancy, shares of compute and memory throughput) in OUT/rank0.csv. PHASE is a name of docs/metrics.md's
# timing_s/<phase>; KERNELS picks by name, for instance regex:ppo_loss.
set -eu
cd "$(dirname "$0")/.."
out=${OUT:-outputs/ncu}
mkdir -p "$out"
command -v ncu >/dev/null || {
  echo "ncu is not installed: it comes with the CUDA toolkit"
  exit 1
}
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
torchrun --nproc-per-node "${NPROC:-1}" --no-python \
  ncu --profile-from-start off --nvtx --nvtx-include "rlsp_fast@${PHASE:-update_actor}/" --kernel-name "${KERNELS:-regex:.}" \
  --launch-count "${COUNT:-40}" --set full --force-overwrite --export "$out/rank%q{RANK}" \
  python bench/profile_run.py "$1" --first "${STEP:-3}" --last "${STEP:-3}" "output.dir=$out/run" "${@:2}"
for report in "$out"/rank*.ncu-rep; do
  ncu --import "$report" --csv --page raw --metrics \
    gpu__time_duration.sum,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active,sm__throughput.avg.pct_of_peak_sustained_elapsed,dram__throughput.avg.pct_of_peak_sustained_elapsed \
    >"${report%.ncu-rep}.csv"
done
