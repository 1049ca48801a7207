"""What the doctor says of this machine, of versions that are known to be bad, and of packages that break when imported."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from test_cli import environment, refused, rlsp

from rlsp_fast import config as configs
from rlsp_fast import doctor
from rlsp_fast.doctor import combination_findings, environment_findings, machine_findings, release, version_findings

GOOD = {
    "torch": "2.14.0",
    "triton": "3.8.0",
    "vllm": "0.33.0",
    "transformers": "5.19.0",
    "math-verify": "0.9.0",
    "antlr4-python3-runtime": "4.13.2",
    "sympy": "1.14",
}
CPU = {"torch": "2.13.0+cpu", "cuda": None, "gpus": [], "error": None}
H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "free": 79 * 2**30, "total": 79 * 2**30}


def by_name(findings):
    return {finding.what: finding for finding in findings}


# --- versions ---------------------------------------------------------------------------------------


def test_good_versions_are_all_right_together():
    found = [*version_findings(GOOD, (3, 11, 9)), *combination_findings(GOOD, ["torch==2.14.0", "transformers>=5.16"])]
    assert {f.level for f in found} == {"ok"}


@pytest.mark.parametrize(
    "name, version, says",
    [
        ("vllm", "0.10.2", "std::bad_alloc"),
        ("vllm", "0.14.1", "illegal memory access"),
        ("vllm", "0.21.0", "not supported below 0.22"),
        ("torch", "2.10.1", "not supported below 2.11"),
        ("transformers", "4.57.1", "not supported below 5.16"),
        ("triton", "3.5.0", "not supported below 3.6"),
    ],
)
def test_a_version_that_is_known_to_be_bad_fails_with_what_to_install(name, version, says):
    found = by_name(version_findings(GOOD | {name: version}, (3, 11, 9)))[name]
    assert found.level == "fail" and says in found.says and "pip install" in found.fix


def test_an_old_python_and_missing_packages_fail_and_optional_ones_do_not():
    found = by_name(version_findings({}, (3, 10, 4)))
    assert found["python"].level == found["torch"].level == found["math-verify"].level == "fail"
    assert found["vllm"].level == "warn" and found["flash-attn"].level == found["liger-kernel"].level == "ok"


def test_a_vllm_built_for_another_torch_fails():
    found = by_name(combination_findings(GOOD, ["torch==2.11.0", "fastapi", "transformers<6; extra == 'never'"]))
    assert found["vllm and torch"].level == "fail"
    assert "built for torch==2.11.0, here is 2.14.0" in found["vllm and torch"].says


def test_a_grammar_that_the_answer_parser_does_not_know_fails():
    found = by_name(combination_findings(GOOD | {"antlr4-python3-runtime": "4.7.2"}, []))
    assert found["math-verify and antlr"].level == "fail" and "math-verify[" in found["math-verify and antlr"].fix
    assert by_name(combination_findings(GOOD, []))["sympy and antlr"].level == "ok"


def test_torchvision_for_cuda_beside_a_torch_for_cpus_fails():
    found = by_name(combination_findings(GOOD | {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, []))
    assert (
        found["torchvision and torch"].level == "fail" and found["torchvision and torch"].fix == "pip uninstall -y torchvision"
    )
    assert not by_name(combination_findings(GOOD | {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, [])).keys() & {
        "torchvision and torch"
    }


def test_the_numbers_of_a_version_are_read_whatever_follows_them():
    assert release("2.13.0+cpu") == (2, 13, 0) and release("0.22.1rc2") == (0, 22, 1) and release("dev") == ()


# --- environment ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, has_gpu, level",
    [
        ("TRITON_INTERPRET", "1", True, "fail"),
        ("TRITON_INTERPRET", "1", False, "ok"),
        ("CUDA_VISIBLE_DEVICES", "", True, "warn"),
        ("CUDA_VISIBLE_DEVICES", "0,1", True, "ok"),
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "1", True, "fail"),
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0", True, "ok"),
        ("VLLM_USE_V1", "0", True, "fail"),
        ("NCCL_P2P_DISABLE", "1", True, "warn"),
        ("NCCL_P2P_DISABLE", "0", True, "ok"),
        ("NCCL_DEBUG", "INFO", True, "warn"),
        ("NCCL_SOCKET_IFNAME", "eth0", True, "ok"),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", True, "ok"),
        ("OMP_NUM_THREADS", "100000", False, "warn"),
    ],
)
def test_a_variable_is_judged_by_its_value(name, value, has_gpu, level):
    (found,) = environment_findings({name: value, "PATH": "/bin"}, has_gpu=has_gpu)
    assert (found.what, found.level) == (name, level) and bool(found.fix) == (level != "ok")


def test_two_allocator_settings_that_differ_are_pointed_out_and_secrets_are_not_shown():
    both = {"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_CUDA_ALLOC_CONF": "a:2", "VLLM_API_KEY": "hush"}
    found = by_name(environment_findings(both, has_gpu=True))
    assert found["PYTORCH_CUDA_ALLOC_CONF"].level == "warn" and "hush" not in str(found)


# --- machine ----------------------------------------------------------------------------------------


def test_a_gpu_that_torch_does_not_see_fails_and_a_machine_without_one_is_fine():
    (blind,) = machine_findings(CPU, "580.95")
    assert blind.level == "fail" and blind.fix == "install torch for CUDA"
    (alone,) = machine_findings(CPU, None)
    assert alone.level == "ok"


def test_a_gpu_in_use_is_pointed_out_and_an_old_one_fails():
    gpus = [H100, H100 | {"free": 40 * 2**30}, H100 | {"name": "V100", "capability": [7, 0]}]
    found = by_name(machine_findings(CPU | {"cuda": "13.0", "gpus": gpus, "nccl": "2.29.7"}, "580.95"))
    assert [found[f"GPU {i}"].level for i in range(3)] == ["ok", "warn", "fail"]
    assert "driver 580.95, NCCL 2.29.7" in found["CUDA"].says and "40.0 of 79.0 GiB" in found["GPU 1"].says


def test_a_recipe_too_large_for_the_gpus_is_pointed_out_with_the_plans_change():
    config = configs.load("qwen2.5-32b-aime")
    found = by_name(doctor.recipe_findings(config, {}, {"gpus": [H100] * 8}))
    assert found["memory"].level == "warn" and "rlsp plan says: --nodes" in found["memory"].fix
    config = configs.load("llama-3.1-8b-math-paper")
    assert by_name(doctor.recipe_findings(config, {}, {"gpus": [H100] * 8}))["memory"].level == "ok"


# --- the whole of it --------------------------------------------------------------------------------


def run_doctor(*words, cwd, **extra):
    command = [sys.executable, "-m", "rlsp_fast", "doctor", *words]
    return subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=300)


def test_on_this_machine_training_can_start(tmp_path):
    done = run_doctor(cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ("loss kernels", "advantages", "attention", "layer kernels", "rollout engine")
    for word in ("python", "torch", *parts, "disk", "Training can start."):
        assert word in done.stdout


@pytest.fixture
def broken(tmp_path):
    """Makes a package that does this when it is imported."""

    def make(name, code):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(code)
        return tmp_path / "broken"

    return make


@pytest.mark.parametrize(
    "code, says",
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
        ("import os; os.abort()", "killed by signal 6"),
    ],
)
def test_a_vllm_that_breaks_when_imported_is_reported(tmp_path, monkeypatch, broken, code, says):
    monkeypatch.syspath_prepend(broken("vllm", code))
    found = by_name(doctor.examine())["rollout engine"]
    assert found.level == "warn" and says in found.says and found.says.startswith("transformers, since vLLM")
    asked = configs.load("demo", ["rollout.engine=vllm"])
    assert by_name(doctor.examine(asked))["rollout engine"].level == "fail"


def test_a_torch_that_breaks_when_imported_is_reported_and_training_cannot_start(tmp_path, monkeypatch, broken, capsys):
    monkeypatch.syspath_prepend(broken("torch", "raise ImportError('libcudart.so.13: cannot open shared object file')"))
    findings = [f for f in doctor.examine() if f.what == "torch" and f.level == "fail"]
    assert len(findings) == 1 and "libcudart.so.13" in findings[0].says
    assert doctor.report(findings) == 1 and "Training cannot start." in capsys.readouterr().out


def test_a_package_that_hangs_is_given_up(monkeypatch, broken):
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 1)
    monkeypatch.syspath_prepend(broken("vllm", "import time; time.sleep(60)"))
    start = time.perf_counter()
    probe = doctor._start_probes(None, environment())[1]
    assert doctor._finish(probe) == {"error": "no answer within 1 s"} and time.perf_counter() - start < 30


def test_a_recipes_model_and_sources_are_looked_for(tmp_path):
    here = tiny.save_model(tmp_path)
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "1 + 1", "answer": "2"}\n')

    def levels(*overrides, **env):
        config = configs.load("llama-3.1-8b-math-paper", ["sft.epochs=0", *overrides])
        return [(f.what, f.level) for f in doctor.recipe_findings(config, env, {"gpus": []})]

    good = (f"model.path={here}", f"data.train={problems}", "data.validation=reasoning-gym:chain_sum?size=8")
    assert levels(*good) == [("model.path", "ok"), ("data.train", "ok"), ("data.validation", "ok")]
    assert ("data.train", "fail") in levels(*good, "data.train=nowhere.jsonl")
    assert ("data.validation", "warn") in levels(*good, "data.validation=hf:some/set", HF_HUB_OFFLINE="1")
    assert ("model.path", "fail") in levels(*good, "model.path=./no/such/model")
    assert ("model.path", "warn") in levels(*good, "model.path=some/model", HF_HOME=str(tmp_path))
    assert ("model.path", "fail") in levels(*good, "model.path=some/model", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert ("reward.function", "fail") in levels(*good, "reward.function=mine.py:compute_score")
    judge = tmp_path / "judge.toml"
    judge.write_text('url = "http://127.0.0.1:1"\nmodel = "m"\n')
    assert ("reward.judge", "ok") in levels(*good, f"reward.judge={judge}")
    judge.write_text('url = "http://127.0.0.1:1"\nmodle = "m"\n')
    assert ("reward.judge", "fail") in levels(*good, f"reward.judge={judge}")
    assert ("train.monitors", "fail") in levels(*good, f"train.monitors={tmp_path / 'none.toml'}")
    (Path(here) / "model.safetensors").unlink()
    assert ("model.path", "fail") in levels(*good)


def test_a_recipe_that_cannot_start_is_exit_code_1_and_a_misspelt_one_2(tmp_path):
    done = run_doctor("llama-3.1-8b-math-paper", "model.path=./no/such/model", cwd=tmp_path)
    assert done.returncode == 1 and "no such folder" in done.stdout and "Training cannot start." in done.stdout
    refused(rlsp("doctor", "demmo", cwd=tmp_path), "demmo", "demo")
