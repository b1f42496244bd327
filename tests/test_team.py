"""The parts of a worker that is several processes; `faults/test_processes.py` has whole ones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Family
from torch import Tensor, nn
from torch.nn import functional as F

from lte import config
from lte.config import Recipe
from lte.errors import ConfigError
from lte.nn import adapted_modules
from lte.team import Own, Share, device_of, group, mirror
from lte.team.group import Group
from lte.worker import draws

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "model.num_layers": 1,
    "model.width": 32,
    "model.num_attention_heads": 2,
    "model.mlp_width": 64,
    "model.context_tokens": 16,
    "base.quant": "none",
    "lora.rank": 4,
    "train.batch_size": 12,
}


def together(
    num: int, folder: Path, act: Callable[[int, Group], Any], backend: group.Backend = "gloo"
) -> list[Any]:
    """What each of a group's members, threads here, comes to."""
    found: list[Any] = [None] * num
    meeting = str(folder / f"meeting-{next(_MEETINGS)}")

    def be(k: int) -> None:
        if backend == "nccl":
            torch.cuda.set_device(k)
        found[k] = act(k, Group(backend, meeting, k, num, 60.0))

    threads = [threading.Thread(target=be, args=(k,)) for k in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


_MEETINGS = count()


def recipe(shards: Path, **settings: Any) -> Recipe:
    return config.replace(Recipe(), **(TINY | {"data.shards": str(shards)} | settings))


def share(of: Recipe, process: int = 0, processes: int = 1) -> Share:
    """With weights that are a function of the recipe."""
    made = Share(of, CPU, Own(0, 0, of.lora.heads, 0.0), process=process, processes=processes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*made.model.parameters(), *made.model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return made


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_mean_of_the_shares_gradients_is_the_batchs(shards: Path, num: int, heads: int) -> None:
    """Averaged by hand."""
    settings = recipe(shards, **{"lora.heads": heads})
    whole = share(settings)
    loss, tokens = whole.backward(5)
    parts = [share(settings, p, num) for p in range(num)]
    told = [part.backward(5) for part in parts]
    assert {of_whole for _, of_whole in told} == {tokens} == {12 * 16}
    torch.testing.assert_close(sum(of_part for of_part, _ in told) / num, loss)
    for name, parameter in whole.model.named_parameters():
        if parameter.requires_grad:
            gradients = [part.model.get_parameter(name).grad for part in parts]
            mean = torch.stack([g for g in gradients if g is not None]).mean(0)
            torch.testing.assert_close(mean, parameter.grad, rtol=1e-4, atol=1e-6)


def test_no_two_processes_have_a_sample_in_common(shards: Path) -> None:
    settings = recipe(shards, **{"train.accumulate": 2, "lora.heads": 2})
    seen: list[list[int]] = []
    for p in range(3):
        of_p = share(settings, p, 3)
        batches: list[Tensor] = []
        of_p._task.loss = lambda model, part, to=batches: _seen(part, to)  # type: ignore[method-assign]
        of_p.backward(0)
        seen.append([hash(tuple(row.tolist())) for part in batches for row in part])
    assert [len(rows) for rows in seen] == [4, 4, 4]
    assert len({row for rows in seen for row in rows}) == 12


def _seen(part: Tensor, to: list[Tensor]) -> Tensor:
    to.append(part)
    return torch.zeros((), requires_grad=True)


# How tensors travel


def _various(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    floats = [torch.randn(shape, generator=generator) for shape in ((3, 5), (), (0, 7), (40,))]
    return [
        *floats,
        torch.randint(0, 255, (9,), generator=generator, dtype=torch.uint8),
        torch.randn(11, generator=generator).to(torch.bfloat16),
        torch.randint(0, 9, (2,), generator=generator),
        torch.randn(4, 6, generator=generator).T,
        torch.rand(5, generator=generator) > 0.5,
    ]


@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 25])
def test_all_are_given_the_leaders_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int
) -> None:
    monkeypatch.setattr(group, "_BUCKET_BYTES", bucket_bytes)

    def act(k: int, members: Group) -> list[Tensor]:
        own = _various(k)
        members.broadcast(own)
        return own

    for found in together(3, tmp_path, act):
        for tensor, leaders in zip(found, _various(0), strict=True):
            assert tensor.equal(leaders)


def test_the_leader_has_the_sums(tmp_path: Path) -> None:
    def act(k: int, members: Group) -> list[Tensor]:
        own = _various(k)[:4]
        members.sum(own)
        return own

    leaders = together(3, tmp_path, act)[0]
    for tensor, *parts in zip(leaders, *(_various(k)[:4] for k in range(3)), strict=True):
        torch.testing.assert_close(tensor, sum(parts))


class _Net(nn.Module):
    """A norm with statistics, a parameter that only some batches use, one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.rare, self.never = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, is_rare: bool) -> Tensor:
        y: Tensor = self.last(self.norm(x))
        return y + self.rare if is_rare else y


def test_gradients_and_statistics_become_means(tmp_path: Path) -> None:
    """A gradient that one process alone has counts as zero elsewhere; one that none has stays none, so that
    optimizers leave its parameter alone. Statistics are averaged, counts stay."""
    torch.manual_seed(0)
    start, batches = _Net().state_dict(), torch.randn(2, 6, 3)

    def after(k: int) -> tuple[_Net, Tensor]:
        net = _Net()
        net.load_state_dict(start)
        loss = F.mse_loss(net(batches[k], k == 1), torch.zeros(6, 2))
        loss.backward()
        return net, loss.detach()

    def act(k: int, members: Group) -> tuple[_Net, Tensor]:
        net, loss = after(k)
        sums = mirror.summands(net, loss)
        members.sum(sums)
        return (net, loss) if k else (net, mirror.take_means(net, sums, 2))

    (leader, mean), _ = together(2, tmp_path, act)
    (one, loss_one), (two, loss_two) = after(0), after(1)
    torch.testing.assert_close(mean, (loss_one + loss_two) / 2)
    assert leader.never.grad is None
    assert two.rare.grad is not None and leader.rare.grad is not None
    assert leader.rare.grad.equal(two.rare.grad / 2)
    torch.testing.assert_close(leader.last.weight.grad, (one.last.weight.grad + two.last.weight.grad) / 2)
    averaged = (one.norm.running_var + two.norm.running_var) / 2
    torch.testing.assert_close(leader.norm.running_var, averaged)
    assert int(leader.norm.num_batches_tracked) == 1


def test_a_group_is_not_the_default_one(tmp_path: Path) -> None:
    together(2, tmp_path, lambda k, members: members.broadcast([torch.ones(1)]))
    assert not torch.distributed.is_initialized()


def test_each_process_has_masks_of_its_own(shards: Path) -> None:
    settings = recipe(shards, **{"lora.dropout": 0.5})
    model = share(settings).model
    modules = dict(adapted_modules(model))
    seeds = []
    for p in range(3):
        draws.seed_dropout(modules, settings, first_head=0, step=4, forward=0, process=p)
        seeds += [seed for module in modules.values() for seed in module.dropout_seeds or []]
    assert len(set(seeds)) == len(seeds) == 3 * len(modules)


# Devices


def test_gpus_are_shared_out_among_all_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    of_two = [device_of(Recipe(), number).index for number in range(2 * 2)]
    assert of_two == [0, 1, 2, 0]
    named = config.replace(Recipe(), **{"worker.device": "cuda:1"})
    assert device_of(named, 2) == torch.device("cuda:1")
    assert device_of(Recipe()) == torch.device("cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="NCCL needs a GPU")
def test_nccl_gives_and_sums(tmp_path: Path) -> None:
    """With one process; with two where there are as many GPUs."""
    num = min(torch.cuda.device_count(), 2)

    def act(k: int, members: Group) -> tuple[Tensor, Tensor]:
        given, added = torch.full((5,), float(k), device="cuda"), torch.ones(3, device="cuda")
        members.broadcast([given])
        members.sum([added])
        return given.cpu(), added.cpu()

    found = together(num, tmp_path, act, "nccl")
    assert all(given.equal(torch.zeros(5)) for given, _ in found)
    assert found[0][1].equal(torch.full((3,), float(num)))


# Mistakes


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"worker.processes": 5}, "worker.processes: 5 cannot share the 12 samples of a micro-batch equally"),
        (
            {"worker.processes": 2, "lora.heads": 2, "train.accumulate": 2},
            "worker.processes: 2 cannot share the 3 samples of a head of a micro-batch equally",
        ),
        ({"worker.processes": 0}, "worker.processes: "),
        ({"worker.processes": 2, "server.address": "inprocess://x"}, "worker.processes: 2 contradict"),
        ({"worker.processes": 2, "train.method": "ddp"}, "worker.processes: workers of train.method=ddp"),
    ],
)
def test_what_cannot_be_is_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as met:
        config.replace(Recipe(), **{"train.batch_size": 12} | settings)
    (fault,) = met.value.faults
    assert fault.startswith(line)


def test_none_is_no_number_of_processes(here: Callable[..., tuple[int, str, str]]) -> None:
    code, _, said = here("worker", "--server", "tcp://127.0.0.1:1", "--processes", "0")
    assert (code, said.count("\n")) == (2, 1)
    assert "--processes: '0' is not a whole number of 1 or more" in said


def test_lte_train_starts_workers_of_two_processes(tmp_path: Path, shards: Path) -> None:
    """And says why a worker whose process is killed has ended, in one line; nobody is left behind, and the
    same command goes on."""
    family = Family(tmp_path)
    settings = TINY | {
        "data.shards": str(shards),
        "train.rounds": 3,
        "train.local_steps": 2,
        "train.workers": 2,
        "eval.every": 0,
        "eval.final_tokens": 64,
        "eval.sample_tokens": 0,
        "run.dir": str(tmp_path / "run"),
        "worker.processes": 2,
    }
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(config.replace(Recipe(), **settings)))
    try:
        command = family.start("train", "recipe.yaml", "train.rounds=100000")
        command.until_round(tmp_path / "run", 1)
        family.kill(*family.members_of("lte.team"))
        assert command.ended() == 1
        assert "process 1 of this worker's 0 to 1 was killed by SIGKILL" in command.err
        family.until_all_ended(60.0)
        again = family.start("train", "recipe.yaml")
        assert again.ended() == 0, again.err
        family.until_all_ended(60.0)
    finally:
        family.close()


def test_a_worker_refuses_a_number_that_does_not_fit_the_servers_batches(
    tmp_path: Path, shards: Path
) -> None:
    family = Family(tmp_path)
    settings = TINY | {"data.shards": str(shards), "run.dir": str(tmp_path / "run"), "train.workers": 1}
    settings["server.address"] = f"ipc://{tmp_path}/socket"
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(config.replace(Recipe(), **settings)))
    try:
        server = family.start("server", "recipe.yaml")
        worker = family.start("worker", "--server", settings["server.address"], "--processes", "5")
        assert worker.ended() == 2
        (line,) = worker.err_lines
        assert line == "lte: --processes: 5 cannot share the 12 samples of the recipe's batches of 12 equally"
        server.signal(2)
        server.ended()
    finally:
        family.close()
