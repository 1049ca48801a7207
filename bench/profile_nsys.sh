#!/usr/bin/env bash
# Nsight Systems around chosen steps of a recipe, one report a rank, and the table of each:
#   [FIRST=3] [LAST=3] [NPROC=1] [OUT=outputs/nsys] bash bench/profile_nsys.sh RECIPE [key=value ...]
# Writes OUT/rank0.nsys-rep and OUT/rank0.sqlite, rank1..., and OUT/rank0.txt as read_profile.py prints it.
set -eu
cd "$(dirname "$0")/.."
out=${OUT:-outputs/nsys}
mkdir -p "$out"
command -v nsys >/dev/null || {
  echo "nsys is not installed: python bench/profile_run.py ... --trace $out writes a torch.profiler trace, which read_profile.py reads too"
  exit 1
}
command -v torchrun >/dev/null || {
  echo "torchrun is not on the PATH: activate the environment that rlsp_fast is installed in (. .venv/bin/activate)"
  exit 1
}
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
torchrun --nproc-per-node "${NPROC:-1}" --no-python \
  nsys profile --trace=cuda,nvtx,cublas,osrt --cuda-graph-trace=node --sample=none --cpuctxsw=none \
  --capture-range=cudaProfilerApi --capture-range-end=stop \
  --force-overwrite=true --output="$out/rank%q{RANK}" \
  python bench/profile_run.py "$1" --first "${FIRST:-3}" --last "${LAST:-3}" "output.dir=$out/run" "${@:2}"
for report in "$out"/rank*.nsys-rep; do
  nsys export --type=sqlite --force-overwrite=true --output="${report%.nsys-rep}.sqlite" "$report" >/dev/null
  python bench/read_profile.py "${report%.nsys-rep}.sqlite" | tee "${report%.nsys-rep}.txt"
done
