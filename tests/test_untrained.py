"""What a worker says of heads that no gradient reaches."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import lte
from lte import config
from lte.config import Recipe


class Branches(nn.Module):
    """Some of what it has is not computed with."""

    def __init__(self, num_unused: int) -> None:
        super().__init__()
        self.used = nn.Linear(8, 4)
        self.unused = nn.ModuleList(nn.Linear(8, 4) for _ in range(num_unused))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


UNUSED = "w0: heads of {} modules got no gradient in the first local step, and are not trained where that"
SAID = {
    0: [],
    1: [f"{UNUSED.format('1 of 2')} goes on: unused.0"],
    4: [f"{UNUSED.format('4 of 5')} goes on: unused.0, unused.1, unused.2, ..."],
}


@pytest.mark.parametrize("num_unused", SAID)
def test_heads_that_no_gradient_reaches_are_said_once(num_unused: int, tmp_path: Path) -> None:
    settings = config.replace(
        Recipe(),
        **{
            "run.dir": str(tmp_path / "run"),
            "server.address": f"inprocess://{tmp_path.name}",
            "train.rounds": 2,
            "train.local_steps": 2,
            "train.workers": 1,
            "lora.rank": 2,
        },
    )
    said: list[str] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            model = lte.convert(Branches(num_unused), settings.lora, settings.base.quant)
            with lte.Worker(model, server.address, worker_id="w0", say=said.append) as worker:
                goes_on = True
                while goes_on:
                    loss = model(torch.randn(4, 8)).square().mean()
                    loss.backward()
                    goes_on = worker.step(loss)
        except BaseException as error:
            failures.append(error)

    with lte.Server(lambda: Branches(num_unused), settings, display=False) as server:
        thread = threading.Thread(target=work)
        thread.start()
        server.serve()
        thread.join(60)
    assert failures == []
    assert said == SAID[num_unused]
