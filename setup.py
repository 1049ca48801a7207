"""What pyproject.toml cannot say: CMake builds csrc/ into the package, for a platform but for no Python version.

The environment variable RLSP_BUILD chooses: "auto" (default: the CPU library, and the CUDA library when nvcc is found
and torch has CUDA), "none", "cpu", or "cuda" (both, whatever torch is installed). What is left out is said here and, at
run time, by rlsp_kernels.packed_gae.backend_report(); packed_gae then runs in plain torch on a CPU.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BUILD = ROOT / "build" / "native"  # kept, so that building twice does nothing the second time


def find_program(name: str, *folders: str) -> str | None:
    """Path of a program: on the PATH, beside this Python (where pip puts cmake and ninja), or in one of the folders."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent), *folders])
    return shutil.which(name, path=path)


def installed_torch() -> tuple[Path, bool] | None:
    """Torch's folder, and whether it has CUDA; None when it cannot be imported."""
    code = "import torch; print(torch.__path__[0]); print(torch.version.cuda is not None)"
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if probe.returncode != 0:
        return None
    folder, has_cuda = probe.stdout.splitlines()[-2:]
    return Path(folder), has_cuda == "True"


def plan(wanted: str) -> tuple[dict[str, str], list[str]]:
    """For each library ("cpu", "cuda") that is not to be built, why; and CMake's arguments for the others."""
    if wanted not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"RLSP_BUILD must be auto, none, cpu or cuda, got {wanted!r}")
    torch, cmake = installed_torch(), find_program("cmake")
    compiler = find_program(os.environ.get("CXX", "c++")) or find_program("g++") or find_program("clang++")
    nvcc = find_program("nvcc", os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
    reason = None
    if wanted == "none":
        reason = "RLSP_BUILD=none was set"
    elif torch is None:
        reason = "torch could not be imported; install torch first, then pip install --no-build-isolation"
    elif cmake is None:
        reason = "cmake was not found; pip install cmake"
    elif compiler is None:
        reason = "no C++ compiler was found"
    if reason is not None:
        if wanted in ("cpu", "cuda"):
            raise SystemExit(f"RLSP_BUILD={wanted}, but {reason}")
        return {"cpu": reason, "cuda": reason}, []

    arguments = [
        cmake,
        "-S",
        str(ROOT),
        "-B",
        str(BUILD),
        f"-DRLSP_TORCH={torch[0]}",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    ]
    if not (BUILD / "CMakeCache.txt").exists() and (ninja := find_program("ninja")):
        arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    no_cuda = None
    if wanted == "cpu":
        no_cuda = "RLSP_BUILD=cpu was set"
    elif nvcc is None:
        no_cuda = "nvcc was not found"
    elif wanted == "auto" and not torch[1]:
        no_cuda = "torch has no CUDA (RLSP_BUILD=cuda builds it all the same)"
    if no_cuda is None:
        return {}, [*arguments, "-DRLSP_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    if wanted == "cuda":
        raise SystemExit(f"RLSP_BUILD=cuda, but {no_cuda}")
    return {"cuda": no_cuda}, [*arguments, "-DRLSP_CUDA=OFF"]


class BuildLibraries(build_ext):
    """Puts librlsp_cpu.so, librlsp_cuda.so and native_build.json (what was left out, and why) into rlsp_kernels."""

    def run(self) -> None:
        inplace = self.inplace or self.editable_mode
        package = ROOT / "kernels" / "rlsp_kernels" if inplace else Path(self.build_lib).absolute() / "rlsp_kernels"
        left_out, configure = plan(os.environ.get("RLSP_BUILD", "auto"))
        if configure:
            cmake = configure[0]
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(BUILD), "--parallel", str(os.cpu_count())], check=True)
            subprocess.run([cmake, "--install", str(BUILD), "--prefix", str(package)], check=True)
        package.mkdir(parents=True, exist_ok=True)
        for name, reason in left_out.items():
            (package / f"librlsp_{name}.so").unlink(missing_ok=True)  # of an earlier build
            print(f"rlsp_kernels: the {name} library is not built: {reason}", file=sys.stderr, flush=True)
        (package / "native_build.json").write_text(json.dumps(left_out) + "\n")

    def get_outputs(self) -> list[str]:
        return []  # build_ext would list one shared object for each Extension

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the libraries know no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("rlsp_kernels.native", sources=[])],  # so that build_ext runs
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
