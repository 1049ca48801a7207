"""The house rules, checked: who may import whom, what stays free of torch, and that kernels/ shadows nobody."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # a module may import only from rows above its own
    {"__version__", "config", "types", "answer", "spelling", "repetition"},
    {"rlsp_kernels", "notation"},
    {"data", "verifier", "verify_worker", "judge", "packing", "dist"},
    {"reward", "decontaminate", "pending", "monitor", "log", "model", "rollout", "optim", "memory", "shapes"},
    {"checkpoint", "sync", "ppo", "sft", "evaluate", "report", "convert", "plan"},
    {"budget"},
    {"train", "demo", "doctor"},
    {"__main__"},
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
WITHOUT_TORCH = {
    "config", "types", "answer", "spelling", "notation", "repetition", "verifier", "verify_worker", "judge", "data", "reward",
    "decontaminate", "pending", "monitor", "shapes", "plan",
}  # fmt: skip
SOLE_IMPORTERS = {
    "vllm": {"rollout", "sync"},
    "wandb": {"log"},
    "nvtx": {"log", "memory"},
    "train": {"__main__"},
    "__main__": set(),
    "bench": set(),
    "tests": set(),
}
TRAINER = sorted(p for p in (ROOT / "rlsp_fast").glob("*.py") if p.stem != "__init__")
KERNELS = sorted((ROOT / "kernels" / "rlsp_kernels").rglob("*.py"))


def imported(path):
    """(top-level package, first submodule) of every import statement in the file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple((a.name + ".").split(".")[:2]) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute here"
            top, sub = (node.module + ".").split(".")[:2]
            yield from [(top, sub)] if sub else ((top, a.name) for a in node.names)


@pytest.mark.parametrize("path", TRAINER, ids=lambda p: p.stem)
def test_imports_point_down_the_layers(path):
    assert path.stem in RANK, f"{path.stem} has no row in LAYERS: give it one, and docs/architecture.md too"
    for top, sub in imported(path):
        name = sub if top == "rlsp_fast" else top
        assert path.stem in SOLE_IMPORTERS.get(name, {path.stem}), f"{path.stem} may not import {name}"
        if top in ("rlsp_fast", "rlsp_kernels"):
            rank = RANK[name if top == "rlsp_fast" else top]
            assert rank < RANK[path.stem], f"{path.stem} may not import {name}: it is not in a row above"


def test_settings_data_and_reward_load_without_torch():
    """A mistake in a recipe is reported before torch loads, and the workers that verify answers stay small."""
    modules = sorted(WITHOUT_TORCH & {path.stem for path in TRAINER})
    code = f"import sys, {', '.join('rlsp_fast.' + m for m in modules)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_need_torch_and_triton_only(path):
    others = {top for top, _ in imported(path)} - {"torch", "triton", "rlsp_kernels"}
    assert others <= sys.stdlib_module_names, others - sys.stdlib_module_names


def test_kernels_folder_does_not_shadow_the_hugging_face_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    assert str(ROOT) in sys.path or str(ROOT / "tests") in sys.path
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


@pytest.mark.parametrize("path", [*TRAINER, *KERNELS], ids=lambda p: p.stem)
def test_no_error_is_caught_that_was_not_expected(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"{path.name}:{node.lineno}: {caught}"


def test_no_room_is_called_utils():
    assert not [p for p in (*TRAINER, *KERNELS) if p.stem in ("utils", "util", "helpers", "common", "misc")]


def test_every_module_says_what_it_is():
    assert [p.name for p in (*TRAINER, *KERNELS) if not ast.get_docstring(ast.parse(p.read_text()))] == []
