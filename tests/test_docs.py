"""docs/build.py makes the README's tables from rows as a GPU would leave them: several devices, failures, other trainers."""

import csv
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "bench")]

import rows  # noqa: E402

import build  # noqa: E402

COMPARE = {
    "commit": "c0ffee", "torch": "2.11", "transformers": "5", "trl": "1.16", "vllm": "0.23", "threads": "", "dtype": "bfloat16",
    "architecture": "Qwen2.5-0.5B", "problems": "64", "samples": "4", "response": "300", "limit": "1024",
    "sequences_at_once": "16",
    "case": "spread", "engine": "vllm", "basis": "step", "step": "10", "gen": "4", "reward": "0", "annotate": "2",
    "update": "3", "other": "1", "failed": "", "peer": "", "rounds": "3",
}  # fmt: skip
STEP = dict.fromkeys(("commit", "torch", "vllm", "recipe", "idle_share", "peak_gib", "decode_mbu"), "x") | {
    "engine": "vllm", "architecture": "Qwen2.5-1.5B", "step_s": "9", "tokens_per_s": "1000", "train_mfu": "0.46",
}  # fmt: skip


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "RESULTS", tmp_path)

    def write(name, rows):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    return write


def compared(device, trainer, repeat, rate, **changes):
    found = {"device": device, "trainer": trainer, "repeat": str(repeat), "seconds_a_round": "8", "tokens_per_s": str(rate)}
    return COMPARE | found | changes


def test_ratios_are_of_one_repeat_each_and_every_device_and_peer_has_its_line(write, tmp_path):
    failed = {"step": "", "seconds_a_round": "", "failed": "OutOfMemoryError: CUDA"}
    write(
        "compare",
        [
            compared("CPU", "rlsp_fast", 0, 300, basis="cpu", threads="1"),
            compared("CPU", "trl", 0, 100, basis="cpu", threads="1"),
            compared("H200", "rlsp_fast", 0, 999),
            compared("H200", "trl", 0, "", **failed),
            compared("H200", "rlsp_fast", 1, 500),
            compared("H200", "trl", 1, 250),
            compared("H200", "verl", 1, 400, peer="verl 0.9.1"),
        ],
    )
    text = build.compare()
    assert "| lengths spread | vllm | TRL | 8.00 | 8.00 | 3.00 (3.00 to 3.00) |" in text
    assert "| lengths spread | vllm | TRL | 8.00 | 8.00 | 2.00 (2.00 to 2.00) |" in text  # not 999 over 250
    assert "| lengths spread | vllm | verl | 8.00 | 8.00 | 1.25 (1.25 to 1.25) |" in text
    assert "TRL with vllm here: `OutOfMemoryError: CUDA`" in text and "verl 0.9.1." in text
    assert "float16, 1 thread." in text and "float16." in text  # a GPU's rows name no threads
    assert build.rest().startswith("Beside OpenRLHF on a GPU: not measured.")
    build.plot_compare(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_device_on_which_nothing_ran_says_why(write):
    failed = {"step": "", "seconds_a_round": "", "failed": "OutOfMemoryError: CUDA"}
    write("compare", [compared("H100", name, 0, "", **failed) for name in ("rlsp_fast", "trl")])
    assert "| lengths spread | vllm | TRL | fails | fails | - |" in build.compare()
    assert "rlsp_fast with vllm here: `OutOfMemoryError: CUDA`" in build.compare()


def test_rows_of_other_work_have_a_table_of_their_own_and_what_was_measured_last_is_last(write):
    small = {"problems": "32", "limit": "512"}
    write(
        "compare",
        [compared("H200", "rlsp_fast", 0, 100, **small), compared("H200", "trl", 0, 10, **small)]
        + [compared("H200", "rlsp_fast", 0, 200), compared("H200", "trl", 0, 100)]
        + [compared("H200", "rlsp_fast", 0, 300, **small), compared("H200", "trl", 0, 100, **small)],
    )
    text = build.compare()
    assert text.index("2.00 (2.00 to 2.00)") < text.index("3.00 (3.00 to 3.00)") and "10.00" not in text
    assert [table[0]["limit"] for table in build.compared()] == ["1024", "512"]


def test_steps_at_full_size_name_their_device_and_what_differs(write):
    write(
        "step",
        [
            STEP | {"device": "H100", "overrides": "model.dtype=bfloat16 rollout.max_response_length=4096"},
            STEP | {"device": "H200", "overrides": "model.dtype=bfloat16 rollout.max_response_length=16384"},
        ],
    )
    text = build.full_size()
    assert "| H100 | Qwen2.5-1.5B | vllm | rollout.max_response_length=4096 | 9 | 1000 | 0.46 |" in text
    assert "| H200 | Qwen2.5-1.5B | vllm | rollout.max_response_length=16384 |" in text
    assert "All with `model.dtype=bfloat16`." in text


def test_kernels_and_steps_of_two_devices_do_not_mix(write):
    kernel = dict.fromkeys(("calls", "ms", "gb_s", "dram", "tensor", "commit"), "1") | {"kernel": "_ppo_loss_kernel"}
    write("ncu", [kernel | {"device": device} for device in ("H100", "H200")])
    assert build.ncu().count("_ppo_loss_kernel") == 2 and "| H100 |" in build.ncu() and "| H200 |" in build.ncu()
    phases = {"gen_s": "1", "step_s": "2", "tokens_per_s": "3", "peak_gib": "4", "torch": "2.11", "vllm": "0.23", "commit": "c"}
    demo = phases | {"recipe": "demo", "architecture": "", "overrides": ""}
    ran = (("CPU", "vllm"), ("CPU", "transformers"), ("H200", "vllm"))
    write("step", [demo | {"device": device, "engine": engine} for device, engine in ran])
    assert "| phase | vllm |\n" in build.step() and "H200, torch" in build.step()


def test_what_has_no_rows_is_called_not_measured(write):
    for table in (build.compare, build.step, build.full_size, build.ncu, build.ops, build.packing, build.host):
        assert "not measured" in table()


def test_rows_of_other_columns_are_not_appended(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    path = rows.append("some", [{"a": 1, "b": 2}])
    rows.append("some", [{"a": 3, "b": 4}])
    for other, named in ({"a": 1, "c": 2}, "b, c"), ({"b": 1, "a": 2}, "their order"):
        with pytest.raises(ValueError, match=named):
            rows.append("some", [other])
    assert path.read_text().split() == ["a,b", "1,2", "3,4"]
