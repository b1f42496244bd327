"""Dividing a model among several servers, and putting together what they send: no process, no socket."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from simulation import Simulation, recipe
from torch import nn

from lte import config, recipes, wire
from lte.compress.shards import Shards
from lte.config import LoRA, Recipe
from lte.errors import ConfigError, RunError
from lte.nn import divide, part_of, plan
from lte.server import assembly
from lte.server.commit import Edition, Gathering, agreed
from lte.server.master import Master
from lte.worker.ends import _reachable
from lte.worker.staging import Staging


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16 * (k + 1), 16 * (k + 2)) for k in range(6)))


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_a_model_is_divided_by_bytes_and_nothing_is_lost(num: int) -> None:
    whole = plan(model(), LoRA(rank=4), "nf4")
    shards = divide(whole, num)
    names = [name for shard in shards for name in shard]
    assert sorted(names) == sorted([*whole.adapted, *whole.averaged, *whole.constants])
    assert shards == divide(whole, num)
    sizes = [
        sum(math.prod(spec.shape) for spec in part_of(whole, shard).adapted.values()) for shard in shards
    ]
    assert max(sizes) - min(sizes) <= max(math.prod(spec.shape) for spec in whole.adapted.values())


@pytest.mark.parametrize("which", ["published", "master", "ema"])
def test_parts_of_a_master_fill_a_model_and_make_its_digest(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With statistics, a frozen weight and an average; a tensor at a time, each asked for once."""
    monkeypatch.setattr("lte.server.assembly._MOST_BYTES", 1)
    settings = recipe(**{"base.quant": "int8", "outer.ema": 0.5, "lora.freeze": ["4.*"]})

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        )

    whole = Master(net(), settings)
    simulation = Simulation(net(), settings, 1)
    simulation.local_steps(lambda model, x: model(x).square().mean(), [[torch.randn(6, 16)]])
    simulation.merge()
    whole.enter(1)
    whole.load_state(state := simulation.master.state())
    names = assembly.names(net(), config.replace(settings, **{"server.shards": 3}))
    parts = [Master(net(), settings, of_shard) for of_shard in names]
    for part in parts:
        part.enter(1)
        part.load_state({**state, "momentum": {}, "merged": {}, "ema": state["ema"]})
    asked = Counter[str]()

    def ask(shard: int, which: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        assert len(names) == 1
        asked.update(names)
        fixed = {name: parts[shard].constants[name] for name in names if name in parts[shard].constants}
        return parts[shard].parameters(which, names) | fixed

    expected, met = net(), net()
    for parameter in met.parameters():
        parameter.data.fill_(torch.nan)
    whole.fill(expected, which)
    parts[0].fill(met, which)
    assembly.fill_others(met, which, parts[0].built, names, ask)
    for name, tensor in met.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert asked == Counter(name for of_shard in names[1:] for name in of_shard)
    digests = parts[1].digests() | parts[2].digests()
    assert assembly.master_digest(parts[0], names, digests, ask) == whole.master_digest()


def test_more_shards_than_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"server\.shards: 8 is more than the 2 tensors that are trained"):
        divide(plan(nn.Sequential(nn.Linear(16, 16)), LoRA(rank=4), "nf4"), 8)


@pytest.mark.parametrize(
    "setting",
    [
        {"outer.when": "arrival"},
        {"outer.bound_norm": 1.5},
        {"lora.merge": "never", "train.workers": 1},
        {"train.phases": [{"from_round": 1, "local_steps": 2}]},
        {"log.diagnostics_every": 5},
        {"server.address": "inprocess://x"},
        {"server.address": "collective://127.0.0.1:5555"},
    ],
)
def test_what_needs_the_whole_model_is_refused_in_one_line(setting: dict[str, Any]) -> None:
    config.replace(Recipe(), **setting)
    with pytest.raises(ConfigError) as raised:
        config.replace(Recipe(), **setting, **{"server.shards": 2})
    (fault,) = raised.value.faults
    assert fault.startswith("server.shards: 2 servers") and next(iter(setting)) in fault


def test_digests_of_one_shard_are_those_of_everything() -> None:
    named = {"a/codes": torch.arange(4), "b/codes": torch.arange(3)}
    one, two = Shards(), Shards([["b"], ["a"]])
    assert " " not in one.digest(named.items())
    assert two.digest(named.items()).split(" ") == [
        one.digest([("b/codes", named["b/codes"])]),
        one.digest([("a/codes", named["a/codes"])]),
    ]
    assert two.of("a/dense.3") == 1 and two.of("b") == 0


def test_a_contribution_counts_once_all_shards_have_the_same_one() -> None:
    gathering = Gathering(3)
    first, again = (Edition("a", 1, 5, stream, 64) for stream in (1, 2))
    assert not gathering.durable(0, first)
    assert not gathering.durable(2, first)
    assert not gathering.durable(1, again), "the other two have an older one"
    assert not gathering.durable(0, again)
    assert gathering.durable(2, again)
    assert gathering.durable(2, again), "it was told twice"
    gathering.drop("a")
    assert not gathering.durable(1, again)


def test_a_group_goes_on_from_what_all_have() -> None:
    assert agreed([4, 5, 4]) == 4
    assert agreed([5, 5, 5]) == 5


def update(version: int) -> wire.Update:
    return wire.Update(
        generation=1,
        version=version,
        since=None,
        step=0,
        stream=1,
        parts=0,
        merged=(),
        base_digest=f"of {version}",
        last=False,
    )


def test_an_update_is_whole_when_all_parts_of_one_version_have_come() -> None:
    staging, part = Staging[wire.Update](2), torch.zeros(1)
    assert staging.add(1, update(3), {"b": part}) is None
    assert staging.add(1, update(4), {"b": part}) is None
    assert staging.add(0, update(3), {"a": part}) is None, "the other's is a later version"
    found = staging.add(0, update(4), {"a": part})
    assert found is not None
    assert [message.version for message in found[0]] == [4, 4] and found[1].keys() == {"a", "b"}


def test_who_listens_everywhere_is_where_the_first_server_is() -> None:
    assert _reachable("tcp://0.0.0.0:5556", "tcp://10.0.0.1:5555") == "tcp://10.0.0.1:5556"
    assert _reachable("tcp://127.0.0.1:5556", "tcp://10.0.0.1:5555") == "tcp://127.0.0.1:5556"
    assert _reachable("ipc:///run/x.1", "ipc:///run/x") == "ipc:///run/x.1"


def test_a_divided_run_is_not_rolled_back(tmp_path: Path) -> None:
    recipe = config.replace(Recipe(), **{"server.shards": 2})
    (tmp_path / "config.yaml").write_text(config.to_yaml(recipe))
    with pytest.raises(RunError, match=r"server\.shards = 2 cannot go back yet"):
        recipes.roll_back(tmp_path, 1)
