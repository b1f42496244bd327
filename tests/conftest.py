"""One thread for torch: tests share two cores with their own child processes. And no test of a property
may depend on how busy these are."""

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from cluster import shards as packed

from lte.cli import main

torch.set_num_threads(1)
hypothesis.settings.register_profile("lte", deadline=None)
hypothesis.settings.load_profile("lte")
# Shells start what goes on in the background with Ctrl-C ignored, and commands that find it so keep it so.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Here:
    """An `lte` command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Returns its exit code and what it wrote to stdout and stderr."""
        try:
            code = main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *self._capsys.readouterr()


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 22 kB, packed, for those who only read it."""
    return packed(tmp_path_factory.mktemp("data"))
