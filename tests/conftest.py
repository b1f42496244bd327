"""One thread for torch: tests share two cores with their own child processes. And no test of a property
may depend on how busy these are."""

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

from lte.data import pack

torch.set_num_threads(1)
hypothesis.settings.register_profile("lte", deadline=None)
hypothesis.settings.load_profile("lte")
# Shells start what goes on in the background with Ctrl-C ignored, and commands that find it so keep it so.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 22 kB, packed, for those who only read it."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"{n} bottles of beer on the wall. " for n in range(700)))
    pack([folder / "text.txt"], folder / "shards", num_shards=2)
    return folder / "shards"
