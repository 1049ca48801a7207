"""bench/read_profile.py on small profiles that make_profiles.py made: nsys exports by hand and cut, a trace of torch cut."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "bench"))
import read_ncu  # noqa: E402
import read_profile  # noqa: E402


@pytest.fixture(scope="module")
def nsys():
    rows = read_profile.table(*read_profile.read(HERE / "profile_nsys.sqlite"))
    return {row["phase"]: row for row in rows}


def test_phases_are_our_ranges_in_order_and_no_one_elses(nsys):
    assert list(nsys) == ["old_log_prob", "update_actor"]
    assert [row["times"] for row in nsys.values()] == [1, 2]
    assert [row["wall_ms"] for row in nsys.values()] == [10, 30]


def test_time_in_which_two_streams_work_counts_once(nsys):
    assert nsys["old_log_prob"]["busy"] == pytest.approx(0.7)  # 1 to 8 of 0 to 10 ms
    assert nsys["update_actor"]["busy"] == pytest.approx((10 + 2 + 1 + 5) / 30)


def test_only_nccl_that_nothing_hides_is_exposed(nsys):
    assert (nsys["old_log_prob"]["nccl_ms"], nsys["old_log_prob"]["nccl_exposed_ms"]) == (4, 3)
    assert (nsys["update_actor"]["nccl_ms"], nsys["update_actor"]["nccl_exposed_ms"]) == (4, 0)


def test_gaps_are_what_is_left_and_the_longest_is_named(nsys):
    assert (nsys["old_log_prob"]["gaps_ms"], nsys["old_log_prob"]["long_gaps"]) == (3, 2)
    assert nsys["update_actor"]["gaps_ms"] == 12
    assert nsys["update_actor"]["longest_gap_ms"] == 5  # 25 to 30, not across the border of two ranges
    assert nsys["update_actor"]["long_gaps"] == 5


def test_copies_say_their_direction_and_size(nsys):
    assert nsys["update_actor"]["copies"] == "DtoH 1.000 ms 1.00 MB; HtoD 2.000 ms 4.00 MB"


def test_top_kernels_are_summed_over_their_calls(nsys):
    assert nsys["update_actor"]["kernels"] == "gemm 15.000 ms x3; ncclDevKernel_AllGather 4.000 ms x1"


def test_an_export_that_nsys_wrote_on_a_cpu_has_all_phases_and_no_kernels():
    rows = {row["phase"]: row for row in read_profile.table(*read_profile.read(HERE / "profile_nsys_cpu.sqlite"))}
    walk = ("gen", "reward", "pack", "sleep", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor")
    assert [name for name in rows if name in walk] == list(walk)
    assert all(rows[name]["times"] == (4 if "update" in name else 2) for name in walk)  # two steps of two mini-batches
    assert rows["gen"]["wall_ms"] > rows["swap/generate"]["wall_ms"] > 0.99 * rows["gen"]["wall_ms"]  # one within the other
    assert all(row["busy"] == 0 and row["gaps_ms"] == row["wall_ms"] and not row["kernels"] for row in rows.values())


def test_a_trace_of_torch_on_a_cpu_has_phases_operators_and_gaps():
    rows = {row["phase"]: row for row in read_profile.table(*read_profile.read(HERE / "profile_torch.json.gz"))}
    assert list(rows) == ["old_log_prob", "adv"]
    for row in rows.values():
        assert row["gaps_ms"] == pytest.approx(row["wall_ms"] * (1 - row["busy"]), abs=1e-3)
    assert rows["old_log_prob"]["kernels"].startswith("aten::linear")
    assert "x28" in rows["old_log_prob"]["kernels"]  # four layers of seven matrices
    assert "rlsp_kernels::packed_gae" in rows["adv"]["kernels"]


def test_a_trace_of_a_gpu_without_kernels_is_refused(tmp_path):
    event = {"ph": "X", "cat": "user_annotation", "name": "gen", "ts": 0, "dur": 1, "tid": 1}
    path = tmp_path / "rank0.json"
    path.write_text(json.dumps({"deviceProperties": [{"name": "H200"}], "traceEvents": [event]}))
    with pytest.raises(read_profile.ProfileError, match="no kernels"):
        read_profile.read(path)


def test_operators_that_others_called_do_not_count_again():
    events = [dict(name="a", ts=0, dur=10, tid=1), dict(name="b", ts=2, dur=3, tid=1), dict(name="c", ts=10, dur=1, tid=1)]
    assert [span.name for span in read_profile.outermost(events)] == ["a", "c"]


def test_another_file_is_refused_with_what_was_wanted(tmp_path):
    path = tmp_path / "rank0.nsys-rep"
    path.write_bytes(b"NSYS")
    command = [sys.executable, str(HERE.parent / "bench" / "read_profile.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "want an SQLite file (nsys export --type=sqlite) or a torch.profiler trace" in done.stderr


def ncu_csv(path, rows, columns=read_ncu.METRICS):
    """As `ncu --csv --page raw --print-units base` prints it: a message, names, units, a row a launch."""
    head = ["ID", "Kernel Name", *columns]
    lines = [head, ["", "", *("" for _ in columns)], *([str(i), *row] for i, row in enumerate(rows))]
    quoted = [",".join(f'"{value}"' for value in line) for line in lines]
    path.write_text("\n".join(["==WARNING== something", *quoted]) + "\n")
    return path


def test_launches_of_a_kernel_count_together_weighted_with_their_time(tmp_path):
    # time in ns, bytes, registers, then shares: DRAM, tensor, SM, warps
    rows = [
        ("_ppo_loss_kernel", "1,000,000", "3,000,000,000", "64", "80.0", "0", "50", "100"),
        ("_ppo_loss_kernel", "3,000,000", "3,000,000,000", "66", "40.0", "0", "10", "100"),
        ("void rlsp::packed_gae_kernel<1, 256>(Problem, int)", "5,000,000", "10,000,000,000", "110", "60", "1.5", "20", "25"),
    ]
    gae, loss = read_ncu.table(read_ncu.read(ncu_csv(tmp_path / "rank0.csv", rows)))
    assert (gae["kernel"], gae["calls"], gae["ms"], gae["gb_s"], gae["tensor"]) == ("packed_gae_kernel", 1, 5.0, 2000.0, 1.5)
    assert (loss["kernel"], loss["calls"], loss["ms"], loss["registers"]) == ("_ppo_loss_kernel", 2, 4.0, 66)
    assert (loss["gb_s"], loss["dram"], loss["sm"]) == (1500.0, 50.0, 20.0)


def test_a_page_of_ncu_without_launches_or_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no kernel in it"):
        read_ncu.read(ncu_csv(tmp_path / "empty.csv", []))
    other = ncu_csv(tmp_path / "other.csv", [("k", "1")], columns=read_ncu.METRICS[:1])
    with pytest.raises(ValueError, match=r"no dram__bytes\.sum"):
        read_ncu.read(other)
