"""The kernels as a distribution of their own."""

import os
import re
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parent.parent

USE = """
import sys, torch, rlsp_kernels
from rlsp_kernels import linear_logprob_entropy, packed_gae, patch
from rlsp_kernels.packed_gae import backend_report

hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
logprob, entropy = linear_logprob_entropy(hidden, weight, torch.arange(5))
(logprob + entropy).sum().backward()
cu_seqlens, mask = torch.tensor([0, 2, 5], dtype=torch.int32), torch.ones(5, dtype=torch.bool)
assert packed_gae(torch.randn(5), cu_seqlens, mask, terminal_reward_S=torch.ones(2)).advantage_T.isfinite().all()
for trainer in (patch.trl, patch.verl, patch.openrlhf):
    try:
        trainer.apply()
    except ImportError as error:
        assert "is not installed: pip install" in str(error), error
foreign = {"vllm", "transformers", "rlsp_fast", "trl", "verl", "openrlhf"} & {name.split(".")[0] for name in sys.modules}
assert not foreign, foreign
print(rlsp_kernels.__path__[0], backend_report()["cpp"].loaded)
"""


def required(names, found=None):
    """The installed distributions that these need, and theirs, extras left out."""
    found = {} if found is None else found
    for name in names:
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key not in found:
            try:
                found[key] = distribution(key)
            except PackageNotFoundError:  # for another platform
                continue
            wanted = [line for line in found[key].requires or () if "extra ==" not in line]
            required([re.match(r"[\w.-]+", line)[0] for line in wanted], found)
    return found


def test_the_kernels_install_alone_and_run_where_torch_and_triton_are_all_there_is(tmp_path):
    """The environment is empty but for links to what torch and triton require: nothing is downloaded."""
    venv.create(tmp_path / "env", symlinks=True)
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    needs = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]["dependencies"]
    for found in required(re.match(r"\w+", line)[0] for line in needs).values():
        for top in {file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
    assert (site / "torch").exists() and not (site / "transformers").exists()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON_"))}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, str(ROOT / "kernels")], check=True, env=env, cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    done = subprocess.run([python, "-c", USE], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, compiled = done.stdout.split()
    assert Path(folder).is_relative_to(tmp_path) and compiled == "True"
