"""Shared by all tests: Triton's interpreter where there is no GPU, a quiet vLLM, a process group of one rank."""

import os
from collections.abc import Iterator

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests need nothing from outside

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, tests marked gpu are skipped and say so. Of several processes one begins with the longest file."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.name != "test_smollm2.py")
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests recorded by record_property: the registers of compiled kernels, which nothing else keeps."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    recorded = [f"{name}: {value}" for report in reports for name, value in report.user_properties]
    if recorded:
        terminalreporter.section("recorded")
        terminalreporter.write_line("\n".join(recorded))


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """This process as the only rank, and its device. What torchrun would have set is taken back afterwards."""
    from rlsp_fast import dist

    before = dict(os.environ)
    torch.set_num_threads(1)
    yield dist.setup()
    dist.cleanup()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
