#!/usr/bin/env bash
# What needs a GPU, on a machine where rlsp_fast is installed with the CUDA library (RLSP_BUILD=cuda):
#   [WHEELS=DIR] [PEERS=DIR] bash bench/gpu.sh [OUT [PART ...]]
# All parts, or those named, in the order below. Each writes OUT/<part>.log, the benches add to bench/results/*.csv, and one
# line a part is printed at the end. A part that fails or takes longer than its limit does not stop the others.
#
# Parts and their limits in seconds, each within a command of 10 minutes:
#   540  pytest: the tests marked gpu
#   300  memcheck racecheck initcheck: the advantages under compute-sanitizer
#   540  memcheck_triton: the kernels on logits
#   300  bench_gae bench_packing
#   540  bench_logprob_entropy bench_ppo_loss bench_linear_logprob_entropy bench_linear_ppo_loss bench_linear_ppo_loss_151936
#        bench_token_losses: the Triton kernels beside their peers
#   540  peers_liger peers_trl peers_verl: the peers' own tests against our ops, see bench/peer_suites.py
#   540  bench_trl_grpo: TRL's GRPO patched and not, where trl imports
#   590  step_NAME_LENGTH: 0.5 B and 1.5 B at 4k and 16k responses
#   590  step_without_liger step_compiled step_compiled_without_liger: 1.5 B at 4k with Hugging Face's layers, torch.compile, both
#   540  bench_step bench_step_full_size bench_colocate compare compare_transformers demo: where vLLM imports; compare needs trl
#   590  compare_peers: the same with verl and OpenRLHF, where VERL_PYTHON or OPENRLHF_PYTHON is set
#   540  nsys ncu read_ncu: profiles of a step, where the tools are installed, and the table of our kernels
#
# WHEELS: a folder of wheels for a machine without a package registry, installed with pip --no-index --no-deps into OUT/wheels,
#   which goes on PYTHONPATH, ahead of what is installed. The peers' distributions and what they need beside torch and triton:
#     liger-kernel            its CuTe kernels: nvidia-cutlass-dsl, apache-tvm-ffi
#     trl                     transformers, accelerate, datasets
#     cut-cross-entropy
#     verl                    transformers, tensordict; Ray is not imported by the benches of kernels
#     quack-kernels           nvidia-cutlass-dsl, apache-tvm-ffi, torch-c-dlpack-ext, einops
#     flash-attn              only its Triton cross entropy is used: a wheel built with FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE
#   What is missing is left out of the benches, by name.
# VERL_PYTHON, OPENRLHF_PYTHON: interpreters of environments with torch, vLLM and these, for the part compare_peers:
#     verl                    ray, hydra-core, omegaconf, antlr4-python3-runtime, TransferQueue, tensordict, torchdata, codetiming,
#                             dill, peft, pylatexenc, msgspec, pyzmq, orjson, tensorboard, datasets, pandas, pyarrow; not beside
#                             trl 1.16
#     openrlhf                ray, deepspeed (compiles its AdamW with nvcc), flash-attn with its CUDA library, peft, torchdata,
#                             loralib, optree, pylatexenc, pynvml, jsonlines, torchmetrics, hjson, py-cpuinfo, tensorboard,
#                             datasets
# PEERS: a folder with checkouts liger/, trl/ and verl/, for the peers_ parts.
set -u
cd "$(dirname "$0")/.."
out=${1:-outputs/gpu}
shift || true
wanted=("$@")
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
  python -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$out/wheels" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH="$PYTHONPATH:$out/wheels"
fi
peers=${PEERS:-outputs/peers}
summary=()

part() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  if [ ${#wanted[@]} -gt 0 ] && [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  [ "$code" -eq 124 ] && echo "longer than $limit s" >>"$out/$name.log"
  local last
  last=$(tail -n 1 "$out/$name.log" | cut -c1-90)
  summary+=("$(printf '%-28s exit %-3d %4d s  %s' "$name" "$code" $((SECONDS - start)) "$last")")
}

sanitize() { part "$1" 300 python -m pytest -q -m gpu tests/test_packed_gae.py -k "sanitizer and $1"; }

# The Triton kernels' own tests under memcheck, the small ones: it slows them a hundredfold.
sanitize_triton() {
  part memcheck_triton 540 compute-sanitizer --tool memcheck --error-exitcode 1 \
    python -m pytest -q -m gpu tests/test_kernels.py -k "every_way_a_row_can_end or begin_anywhere or in_place"
}

part pytest 540 python -m pytest -q -m gpu tests
for tool in memcheck racecheck initcheck; do sanitize "$tool"; done
sanitize_triton
part bench_gae 300 python bench/bench_gae.py --device cuda --most-tokens 8388608
part bench_packing 300 python bench/bench_packing.py --dtype bfloat16 --sequences 128
for bench in logprob_entropy ppo_loss linear_logprob_entropy token_losses; do
  part "bench_$bench" 540 python "bench/bench_$bench.py" --device cuda
done
part bench_linear_ppo_loss 540 python bench/bench_linear_ppo_loss.py --device cuda --vocab 128256
part bench_linear_ppo_loss_151936 540 python bench/bench_linear_ppo_loss.py --device cuda --vocab 151936 --active 100
for peer in liger trl verl; do part "peers_$peer" 540 python bench/peer_suites.py "$peer" --path "$peers/$peer"; done
if python -c 'import trl' 2>/dev/null; then part bench_trl_grpo 540 python bench/bench_trl_grpo.py; fi
if python -c 'import vllm' 2>/dev/null; then
  part bench_step 540 python bench/bench_step.py --engines vllm transformers
  part bench_colocate 540 python bench/bench_colocate.py
  # The step table. Where memory is short of what `rlsp plan` finds for 17,408 tokens of 1.5 B parameters beside two Adam states,
  # about 100 GiB, layers are recomputed, which lowers MFU.
  recompute=$([ "$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -1)" -lt 120000 ] && echo true || echo false)
  part bench_step_full_size 540 python bench/bench_step.py --architecture Qwen2.5-1.5B --response 512 --idle --engines vllm --steps 3 \
    --rounds 1 model.dtype=bfloat16 model.activation_checkpointing="$recompute" rollout.max_response_length=1024 \
    train.batch_size=64 train.mini_batch_size=32 train.max_tokens_per_micro_batch=16384 rollout.kv_cache_gib=20
  full_size() {
    part "$1" 590 python bench/bench_step.py --architecture "$2" --response 0 --engines vllm --steps 3 --rounds 1 model.dtype=bfloat16 \
      model.activation_checkpointing="$recompute" train.batch_size=8 train.mini_batch_size=8 train.max_tokens_per_micro_batch=17408 \
      rollout.kv_cache_gib=20 rollout.max_response_length="$3" "${@:4}"
  }
  for name in Qwen2.5-0.5B Qwen2.5-1.5B; do
    for length in 4096 16384; do full_size "step_${name}_$length" "$name" "$length"; done
  done
  full_size step_without_liger Qwen2.5-1.5B 4096 model.layer_kernels=torch
  full_size step_compiled Qwen2.5-1.5B 4096 model.compile=true
  full_size step_compiled_without_liger Qwen2.5-1.5B 4096 model.compile=true model.layer_kernels=torch
  part compare 540 python bench/compare.py --architecture Qwen2.5-0.5B --engines vllm --cases spread --repeats 2 --problems 64 \
    --response 300 --limit 1024 --sequences-at-once 16 --seconds 250
  if [ -n "${VERL_PYTHON:-}${OPENRLHF_PYTHON:-}" ]; then
    part compare_peers 590 python bench/compare.py --architecture Qwen2.5-0.5B --engines vllm --cases spread --repeats 1 \
      --problems 64 --response 300 --limit 1024 --sequences-at-once 16 --seconds 250 \
      ${VERL_PYTHON:+--python "verl=$VERL_PYTHON"} ${OPENRLHF_PYTHON:+--python "openrlhf=$OPENRLHF_PYTHON"}
  fi
  part compare_transformers 540 python bench/compare.py --architecture Qwen2.5-0.5B --engines transformers --cases spread \
    --repeats 1 --problems 32 --response 300 --limit 512 --sequences-at-once 16 --seconds 250
  part demo 540 python -m rlsp_fast demo
fi
profiled="model.path=outputs/gpu-model data.train=outputs/gpu-model/problems.jsonl data.template={problem} data.validation=[]
  sft.steps=0 data.max_prompt_length=256 train.critic_warmup_steps=0 model.dtype=bfloat16 rollout.max_response_length=1024
  train.max_tokens_per_micro_batch=16384"
if command -v nsys >/dev/null || command -v ncu >/dev/null; then
  python bench/random_model.py Qwen2.5-0.5B outputs/gpu-model --response 256 >/dev/null 2>&1
fi
if command -v nsys >/dev/null; then OUT="$out/nsys" part nsys 540 bash bench/profile_nsys.sh demo $profiled; fi
if command -v ncu >/dev/null; then
  OUT="$out/ncu" part ncu 540 bash bench/profile_ncu.sh demo $profiled
  part read_ncu 60 python bench/read_ncu.py "$out/ncu/rank0.csv" --append
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
printf '%s\n' "${summary[@]}"
