"""The planner against arithmetic done by hand, against measured transfers, and as its users meet it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lte import config, cost, optim, recipes
from lte.config import Recipe
from lte.cost import Link, Rates, Site, calibrate, links, model
from lte.errors import ConfigError, RunError, UserError
from lte.nn.linear import LoRALinear
from lte.server.master import Master
from lte.tasks import Text
from lte.team.share import Own, Share
from lte.worker.trainer import Trainer

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")

# One block: qkv (192, 64), out (64, 64), up (128, 64), down (64, 128); output (256, 64).
OUT, IN = (192, 64, 128, 64, 256), (64, 64, 64, 128, 64)
ADAPTED = sum(o * i for o, i in zip(OUT, IN, strict=True))
DENSE = 256 * 64 + 3 * 64


def recipe(**settings: object) -> Recipe:
    small: dict[str, object] = {
        "model.num_layers": 1,
        "model.width": 64,
        "model.mlp_width": 128,
        "model.context_tokens": 16,
        "train.batch_size": 4,
        "lora.rank": 8,
        "base.quant": "nf4",
        "optimizer.name": "adamw",
    }
    return config.replace(Recipe(), **(small | settings))


RATES = Rates(
    step_s=0.5,
    encode_el_s=1e5,
    decode_el_s=1e6,
    merge_flop_s=1e8,
    requantize_el_s=1e6,
    pack_el_s=1e6,
    apply_el_s=1e6,
    factor_bits=4,
    dense_bits_up=8,
    dense_bits_down=2,
    base_bits=0.5,
)
INSTANT = dataclasses.replace(
    RATES,
    encode_el_s=math.inf,
    decode_el_s=math.inf,
    requantize_el_s=math.inf,
    pack_el_s=math.inf,
    apply_el_s=math.inf,
)
LINK = Link(up_bps=10e6, down_bps=10e6, rtt_s=0.1)


def sites(count: int = 4, link: Link = LINK, step_s: float | None = None) -> list[Site]:
    return [Site(name="worker", link=link, count=count, step_s=step_s)]


def lte_round(recipe: Recipe, sites: list[Site], rates: Rates = RATES, **options: float) -> cost.Estimate:
    return cost.lte_round(recipe, cost.plan_of(recipe), sites, rates, **options)


# Transfers


def naive_transfer_s(num_bytes: int, bps: float, rtt_s: float) -> float:
    """One round trip after the other: what the window allows, or what the link carries."""
    per_trip = bps * 1448 / 1514 / 8 * rtt_s
    window, left, seconds = 10 * 1448.0, float(num_bytes), rtt_s / 2
    while left > min(window, per_trip):
        left -= min(window, per_trip)
        window *= 2
        seconds += rtt_s
    return seconds + left / per_trip * rtt_s


@given(st.integers(1, 5_000_000), st.floats(1e6, 1e9), st.floats(1e-3, 0.5))
def test_a_transfer_takes_as_long_as_its_windows(num_bytes: int, bps: float, rtt_s: float) -> None:
    seconds = cost.transfer_s(num_bytes, bps, rtt_s)
    assert seconds == pytest.approx(naive_transfer_s(num_bytes, bps, rtt_s), rel=1e-6, abs=1.01 * rtt_s)


@pytest.mark.parametrize(
    ("num_bytes", "bps", "rtt_s", "measured_s"),
    [  # over tap_link.py, connections idle before, both directions
        (20_000, 100e6, 0.05, 0.077),
        (200_000, 100e6, 0.05, 0.186),
        (1_000_000, 100e6, 0.05, 0.338),
        (16_000_000, 100e6, 0.05, 1.39),
        (20_000, 10e6, 0.1, 0.157),
        (200_000, 10e6, 0.1, 0.441),
        (1_000_000, 10e6, 0.1, 1.043),
        (4_000_000, 10e6, 0.1, 3.53),
    ],
)
def test_a_transfer_takes_as_long_as_was_measured(
    num_bytes: int, bps: float, rtt_s: float, measured_s: float
) -> None:
    assert cost.transfer_s(num_bytes, bps, rtt_s) == pytest.approx(measured_s, rel=0.15)


@pytest.mark.parametrize(
    ("num_bytes", "loss", "fastest_s", "slowest_s"),  # measured at 100 Mbit/s, 50 ms, reno
    [
        (200_000, 0.005, 0.18, 0.24),
        (1_000_000, 0.005, 1.5, 2.0),
        (4_000_000, 0.005, 6.3, 9.2),
        (4_000_000, 0.01, 11, 12),
    ],
)
def test_loss_slows_a_transfer_as_measured(
    num_bytes: int, loss: float, fastest_s: float, slowest_s: float
) -> None:
    assert fastest_s <= cost.transfer_s(num_bytes, 100e6, 0.05, loss) <= slowest_s


@given(
    st.integers(1, 10_000_000),
    st.floats(1e5, 1e9),
    st.floats(1e-3, 0.3),
    st.floats(0, 0.05),
    st.floats(1, 3),
)
def test_more_bytes_less_bandwidth_longer_trips_and_more_loss_take_no_less(
    num_bytes: int, bps: float, rtt_s: float, loss: float, factor: float
) -> None:
    seconds = cost.transfer_s(num_bytes, bps, rtt_s, loss)
    slack = 1 - 1e-9
    assert cost.transfer_s(num_bytes * factor, bps, rtt_s, loss) >= seconds * slack
    assert cost.transfer_s(num_bytes, bps, rtt_s * factor, loss) >= seconds * slack
    assert cost.transfer_s(num_bytes, bps / factor, rtt_s, loss) >= seconds * slack
    # but for a round trip of slow start that an early loss cuts off
    assert cost.transfer_s(num_bytes, bps, rtt_s, loss * factor) >= seconds * slack - rtt_s


def test_a_link_without_limits_takes_no_time() -> None:
    assert cost.transfer_s(1e9, math.inf, 0.0) == 0


# Bytes


@pytest.mark.parametrize(
    ("settings", "elements"),
    [
        ({}, 8 * (sum(OUT) + sum(IN))),
        ({"lora.A": "frozen"}, 8 * sum(OUT)),
        ({"lora.heads": 2}, 2 * 8 * (sum(OUT) + sum(IN))),
        ({"compress.truncate_rank": 2}, 2 * (sum(OUT) + 5 * 8 + sum(IN) + 5 * 8)),
        ({"compress.truncate_rank": 8}, 8 * (sum(OUT) + sum(IN))),
        ({"compress.truncate_rank": 2, "lora.merge": "reset"}, 2 * (sum(OUT) + 5 * 8) + 8 * sum(IN)),
    ],
)
def test_a_contribution_holds_the_factors_that_are_sent(settings: dict[str, object], elements: int) -> None:
    uplink = lte_round(recipe(**settings), sites()).uplink_bytes
    assert uplink["factors"] == elements * 4 / 8
    assert uplink["dense"] == DENSE * 8 / 8


def test_an_update_holds_changes_of_the_base_and_of_dense_parameters() -> None:
    downlink = lte_round(recipe(), sites()).downlink_bytes
    assert downlink["base"] == ADAPTED * 0.5 / 8
    assert downlink["dense"] == DENSE * 2 / 8


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_data_parallel_training_moves_what_a_ring_does(workers: int) -> None:
    small = recipe(**{"train.local_steps": 7})
    each = 7 * 2 * (workers - 1) / workers * 2 * (ADAPTED + DENSE)
    estimate = cost.ddp_round(small, cost.plan_of(small), sites(workers), RATES)
    assert estimate.uplink_bytes == estimate.downlink_bytes == {"gradients": pytest.approx(each)}


def test_diloco_moves_all_parameters_once_a_round() -> None:
    small, parameters = recipe(), ADAPTED + DENSE
    plan = cost.plan_of(small)
    ring = cost.diloco_round(small, plan, sites(4), RATES)
    assert ring.uplink_bytes == {"changes": 1.5 * 4 * parameters}
    server = cost.diloco_round(small, plan, sites(4), RATES, bits=4.25, server_bps=math.inf)
    assert server.downlink_bytes == {"changes": 4.25 / 8 * parameters}


def test_the_ratios_are_those_of_the_bytes() -> None:
    found = cost.outlook(recipe(**{"train.local_steps": 20}), sites(4), RATES)
    moved = sum(found.own.uplink_bytes.values()) + sum(found.own.downlink_bytes.values())
    assert found.below_ddp == pytest.approx(4 * (ADAPTED + DENSE) * 20 / moved)
    assert found.below_ring == pytest.approx(found.below_ddp * 2 * 3 / 4)


# Seconds


def test_a_round_is_the_sum_of_its_parts() -> None:
    own = lte_round(recipe(**{"train.local_steps": 10}), sites(4))
    s = own.seconds
    elements = 8 * (sum(OUT) + sum(IN)) + DENSE
    assert s.compute == 10 * 0.5
    assert s.encode == pytest.approx(elements / 1e5)
    assert s.decode == pytest.approx(4 * elements / 1e6)
    assert s.merge == pytest.approx(4 * 2 * 8 * ADAPTED / 1e8)
    assert s.requantize == s.pack == s.apply == ADAPTED / 1e6
    assert s.uplink == LINK.up_s(sum(own.uplink_bytes.values()))
    assert s.hidden == s.queue == 0  # all fits into one part, and the server has a link for each
    parts = s.encode + s.uplink + s.decode + s.merge + s.requantize + s.pack + s.downlink + s.apply
    assert own.round_s == pytest.approx(s.compute + parts)
    assert own.compute_share == pytest.approx(s.compute / own.round_s)
    assert own.tokens_s == pytest.approx(4 * 10 * 4 * 16 / own.round_s)


def test_seconds_need_no_unit_where_they_are_the_unit() -> None:
    assert links.seconds("0.3") == links.seconds("300ms") == links.duration("0.3s") == 0.3
    with pytest.raises(UserError, match="no time"):
        links.seconds("fast")


def test_encoding_hides_behind_sending_but_for_a_part() -> None:
    small = recipe(**{"compress.part_bytes": 4096})
    own = lte_round(small, sites())
    parts = [math.ceil(sum(way.values()) / 4096) for way in (own.uplink_bytes, own.downlink_bytes)]
    hidden = [
        min(pair) * (1 - 1 / n)
        for pair, n in zip(
            [(own.seconds.encode, own.seconds.uplink), (own.seconds.pack, own.seconds.downlink)],
            parts,
            strict=True,
        )
    ]
    assert own.seconds.hidden == pytest.approx(sum(hidden))


@pytest.mark.parametrize(("steps", "waits"), [(100, False), (1, True)])
def test_steps_ahead_fill_the_wait(steps: int, waits: bool) -> None:
    own_sites = sites(step_s=0.1)
    plain = lte_round(recipe(**{"train.local_steps": steps}), own_sites)
    ahead = lte_round(recipe(**{"train.local_steps": steps, "train.overlap": True}), own_sites)
    s = ahead.seconds
    out_of_hand = s.exchange - s.encode
    assert ahead.round_s == pytest.approx(max(s.compute, out_of_hand) + s.encode + s.apply)
    assert (out_of_hand > s.compute) == waits
    assert plain.round_s - ahead.round_s == pytest.approx(min(s.compute, out_of_hand))


def test_few_steps_ahead_fill_a_part_of_the_wait() -> None:
    settings: dict[str, object] = {"train.local_steps": 100, "train.overlap": True}
    some = lte_round(recipe(**settings, **{"train.overlap_steps": 2}), sites(step_s=0.1))
    assert some.seconds.exchange - some.seconds.encode > 0.2
    none = lte_round(recipe(**{"train.local_steps": 100}), sites(step_s=0.1))
    assert none.round_s - some.round_s == pytest.approx(0.2)


def test_a_round_waits_for_the_slowest() -> None:
    slow = dataclasses.replace(LINK, up_bps=1e6, down_bps=1e6)
    mixed = [Site(name="near", link=LINK, count=3), Site(name="far", link=slow, count=1, step_s=2.0)]
    own = lte_round(recipe(), mixed)
    assert own.slowest == "far"
    assert own.round_s == lte_round(recipe(), sites(4, slow, 2.0)).round_s
    T = recipe().train.local_steps
    assert own.compute_share == pytest.approx((3 * 0.5 + 2.0) / 4 * T / own.round_s)


def test_all_share_the_servers_link() -> None:
    alone = lte_round(recipe(), sites(20), INSTANT)
    shared = lte_round(recipe(), sites(20), INSTANT, server_bps=20e6)
    assert alone.seconds.queue == 0
    assert shared.seconds.queue == pytest.approx(
        sum(
            cost.transfer_s(sum(way.values()), 1e6, 0.1) - cost.transfer_s(sum(way.values()), 10e6, 0.1)
            for way in (shared.uplink_bytes, shared.downlink_bytes)
        )
    )


def test_data_parallel_steps_hide_what_they_can() -> None:
    small = recipe(**{"train.local_steps": 3})
    plan = cost.plan_of(small)
    exchange_s = model.all_reduce_s(2 * (ADAPTED + DENSE), sites(4))
    assert exchange_s == pytest.approx(LINK.up_s(1.5 * 2 * (ADAPTED + DENSE)) + 5 * 0.05)
    for step_s in (0.01, 100.0):
        own = cost.ddp_round(small, plan, sites(4, step_s=step_s), RATES)
        assert own.round_s == pytest.approx(3 * (step_s / 3 + max(2 / 3 * step_s, exchange_s)))
    assert model.all_reduce_s(1e6, sites(1)) == 0


# Memory


@pytest.mark.parametrize(
    ("hook", "gradients"),
    [
        ("none", 4 * (ADAPTED + DENSE)),
        ("bf16", 2 * (ADAPTED + DENSE)),
        # Norms are whole; of matrices two factors.
        ("powersgd", 4 * (2 * (sum(OUT) + sum(IN) + 256 + 64) + 3 * 64)),
    ],
)
def test_a_data_parallel_recipe_is_planned_as_such(hook: str, gradients: int) -> None:
    settings = {"ddp.hook": hook, "ddp.powersgd_rank": 2, "train.local_steps": 3, "train.accumulate": 2}
    found = cost.outlook(recipe(**{"train.method": "ddp", **settings}), sites(), RATES)
    own = found.own
    assert own is found.methods[0]
    assert own.method == f"DDP {'fp32' if hook == 'none' else hook}"
    assert own.uplink_bytes == own.downlink_bytes == {"gradients": 3 * 2 * 3 / 4 * gradients}
    exchange_s = cost.transfer_s(2 * 3 / 4 * gradients, 10e6, 0.1) + (6 - 1) * 0.1 / 2
    step_s = 0.5 + max(0, exchange_s - 2 / 3 * 0.5 / 2)
    assert own.round_s == pytest.approx(3 * step_s)
    assert not own.server_bytes
    held = 4 + 4 + 4 + 8 + 4 * (hook == "powersgd")
    assert sum(own.worker_bytes.values()) == held * (ADAPTED + DENSE)
    assert found.lte == lte_round(recipe(**settings), sites())
    assert (found.rank, found.local_steps, found.has_heads) == (None, {}, False)


def test_memory_counts_every_copy() -> None:
    own = lte_round(recipe(), sites(4))
    factors = 8 * (sum(OUT) + sum(IN))
    assert own.worker_bytes["base"] == ADAPTED / 64 * (32 + 2)
    assert own.worker_bytes["heads, gradients, moments"] == 16 * factors
    assert own.worker_bytes["dense, gradients, moments"] == 16 * DENSE
    assert own.server_bytes["master"] == 4 * (ADAPTED + DENSE)
    assert own.server_bytes["contributions"] == 4 * 4 * (factors + DENSE)
    assert "outer momentum" not in own.server_bytes


def test_reset_less_heads_and_momentum_take_more() -> None:
    settings = {"lora.merge": "reset-less", "outer.name": "sgd", "outer.momentum": 0.9, "outer.lr": 0.7}
    own = lte_round(recipe(**settings), sites(4))
    factors = 8 * (sum(OUT) + sum(IN))
    assert own.worker_bytes["factors the server knows"] == 4 * factors
    assert own.server_bytes["factors of workers"] == 4 * 4 * factors
    assert own.server_bytes["outer momentum"] == 4 * ADAPTED


@pytest.mark.parametrize(
    ("settings", "element_bytes"),
    [
        ({"name": "adamw"}, 16),
        ({"name": "sgd"}, 8),
        ({"name": "sgd", "momentum": 0.9}, 12),
        ({"name": "muon"}, 12),
        ({"name": "adamw8bit"}, 10),
    ],
    ids=str,
)
def test_moments_take_what_the_optimizer_keeps(settings: dict[str, object], element_bytes: int) -> None:
    own = lte_round(recipe(**{f"optimizer.{key}": value for key, value in settings.items()}), sites(4))
    assert own.worker_bytes["heads, gradients, moments"] == element_bytes * 8 * (sum(OUT) + sum(IN))
    assert own.worker_bytes["dense, gradients, moments"] == element_bytes * DENSE


def test_an_outer_adam_and_an_average_take_more() -> None:
    settings = {"outer.name": "adam", "outer.lr": 0.001, "outer.dense": True, "outer.ema": 0.98}
    own = lte_round(recipe(**settings), sites(4))
    assert own.server_bytes["outer momentum"] == 8 * (ADAPTED + DENSE)
    assert own.server_bytes["average"] == 4 * (ADAPTED + DENSE)


def test_others_hold_every_parameter_with_its_state() -> None:
    small, parameters = recipe(), ADAPTED + DENSE
    plan = cost.plan_of(small)
    assert sum(cost.ddp_round(small, plan, sites(), RATES).worker_bytes.values()) == 16 * parameters
    assert sum(cost.diloco_round(small, plan, sites(), RATES).worker_bytes.values()) == 24 * parameters


# The other way round


@pytest.mark.parametrize("overlap", [False, True])
def test_the_least_local_steps_reach_the_share_and_one_fewer_do_not(overlap: bool) -> None:
    found = cost.outlook(recipe(**{"train.overlap": overlap}), sites(), RATES, share=0.9)
    assert found.local_steps.keys() == {False, True}
    for on, steps in found.local_steps.items():
        assert steps is not None
        assert steps > 1
        shares = [
            lte_round(recipe(**{"train.local_steps": T, "train.overlap": on}), sites()).compute_share
            for T in (steps - 1, steps)
        ]
        assert shares[0] < 0.9 <= shares[1]


def test_the_largest_rank_reaches_the_share_and_one_more_does_not() -> None:
    found = cost.outlook(recipe(), sites(), RATES, share=0.8)
    assert found.rank is not None
    shares = [
        lte_round(recipe(**{"lora.rank": rank}), sites()).compute_share
        for rank in (found.rank, found.rank + 1)
    ]
    assert shares[1] < 0.8 <= shares[0]


def test_one_model_is_built_for_all_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of hundreds of experts takes a second."""
    built, build = list[object](), Text.build
    monkeypatch.setattr(Text, "build", lambda self: (built.append(self), build(self))[1])
    overrides = {"lora.overrides": [{"modules": "output", "rank": 2}]}
    found = cost.outlook(recipe(**overrides), sites(), RATES, share=0.8)
    assert len(built) == 1
    monkeypatch.undo()
    assert found.rank is not None
    for rank, reaches in ((found.rank, True), (found.rank + 1, False)):
        share = lte_round(recipe(**overrides, **{"lora.rank": rank}), sites()).compute_share
        assert (share >= 0.8) == reaches


def test_idle_fast_workers_do_not_hide_what_local_steps_can_do() -> None:
    mixed = [*sites(3, step_s=0.1), *sites(1, step_s=1.0)]
    found = cost.outlook(recipe(**{"train.local_steps": 100}), mixed, RATES, share=0.95)
    assert found.own.compute_share < 0.4
    assert found.own.slowest_compute_share > 0.95
    assert found.local_steps[False] is not None


def test_where_nothing_reaches_the_share_it_says_so() -> None:
    hopeless = dataclasses.replace(RATES, apply_el_s=1e-6)
    found = cost.outlook(recipe(), sites(), hopeless)
    assert (found.rank, *found.local_steps.values()) == (None, None, None)


def test_a_recipe_that_cannot_overlap_is_not_planned_with_it() -> None:
    rotating = recipe(**{"lora.A": "rotating"})
    assert list(cost.outlook(rotating, sites(), RATES).local_steps) == [False]


# Rates


def write_run(folder: Path, recipe: Recipe, rounds: list[dict[str, Any]], **started: int) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml(recipe))
    lines = [{"kind": "event", **started}, *({"kind": "round", **line} for line in rounds)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


ROUND: dict[str, Any] = {
    "num_merged": 4,
    "num_told": 8,
    "step_s": 0.25,
    "encode_s": 0.5,
    "apply_s": 0.125,
    "merge_s": 0.75,
    "requantize_s": 0.25,
    "pack_s": 0.5,
    "wait_s": 4.0,
    "uplink_bytes": 9000,
    "downlink_bytes": 9000,
    "uplink_factors_bytes": 4 * 8704 * 3 // 8,
    "uplink_dense_bytes": 4 * DENSE,
    "downlink_dense_bytes": 4 * DENSE,
    "downlink_codes_bytes": 8 * ADAPTED // 16,
    "downlink_scales_bytes": 8 * ADAPTED // 16,
}


def test_a_step_is_three_times_the_products_of_a_forward_pass() -> None:
    """Counted by hand, on text and on images, of attention and of experts."""
    of_attention = 2 * 2 * 16 * 16 * 64
    assert calibrate.step_flop(recipe()) == 3 * 4 * (2 * 16 * ADAPTED + of_attention)
    images = {"data.kind": "images", "model.name": "vit", "model.patch_size": 4, "model.image_size": 12}
    patches, tokens = 9, 10  # a class token
    of_vit = sum(o * i for o, i in zip(OUT[:4], IN[:4], strict=True))
    products = 2 * tokens * of_vit + 2 * patches * 64 * 3 * 16 + 2 * 64 * 10
    expected = 3 * 4 * (products + 2 * 2 * tokens * tokens * 64)
    met = calibrate.step_flop(recipe(**images, **{"model.num_classes": 10, "model.channels": 3}))
    assert met == pytest.approx(expected, rel=0.01)


def test_a_step_of_any_model_of_transformers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    of_attention = 4 * 64 * 64 + 2 * 2 * 16 * 64 // 2  # of a token, q, k, v and o; scores and their values

    def flop(architecture: str, **more: int) -> float:
        settings = {**shape, "num_key_value_heads": 2, "max_position_embeddings": 16, **more}
        model = {"name": "transformers", "architecture": architecture, "config": settings}
        model["context_tokens"] = 16
        given = config.replace(Recipe(), **{f"model.{key}": value for key, value in model.items()})
        return calibrate.step_flop(given) / (3 * given.train.batch_size * 16 * 2)

    mlp = 3 * 64 * 128
    assert flop("llama") == pytest.approx(2 * (of_attention + mlp) + 256 * 64, rel=0.02)
    experts = flop("mixtral", num_local_experts=8, num_experts_per_tok=2)
    assert experts == pytest.approx(2 * (of_attention + 2 * mlp + 8 * 64) + 256 * 64, rel=0.02)
    # A sample sends 32 rows to them, the batch 256.
    experts = flop("mixtral", num_local_experts=64, num_experts_per_tok=2)
    assert experts == pytest.approx(2 * (of_attention + 2 * mlp + 64 * 64) + 256 * 64, rel=0.02)
    cannot = r"^model: its operations cannot be counted, .* \(\w+: .*\w.*\); a short run tells"
    with pytest.raises(ConfigError, match=cannot):
        flop("jetmoe", num_local_experts=4)


def test_a_step_of_a_net_that_norms_single_pixels() -> None:
    """Batch norm trains on no single number a channel. Counted by hooks, layer by layer."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    settings = {"data.kind": "images", "model.image_size": 32, "model.num_classes": 10, "model.channels": 3}
    settings |= {"model.name": "transformers", "model.architecture": "resnet"}
    given = config.replace(
        Recipe(), **settings, **{"model.config": {**shape, "layer_type": "basic"}, "train.batch_size": 6}
    )
    made = transformers.ResNetConfig(**shape, layer_type="basic", num_labels=10)
    net, products = transformers.ResNetForImageClassification(made).eval(), list[int]()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(
                lambda layer, _, out: products.append(2 * layer.weight[0].numel() * out.numel())
            )
    assert net.resnet(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape[2:] == (1, 1)
    products.clear()
    net(torch.zeros(1, 3, 32, 32))
    assert calibrate.step_flop(given) == 3 * 6 * sum(products)


def test_processes_of_a_worker_share_a_step_and_hold_the_model_again() -> None:
    alone, two = (recipe(**{"worker.processes": number}) for number in (1, 2))
    assert cost.assumed(two).step_s == cost.assumed(alone).step_s / 2
    held = {number: lte_round(each, sites()).worker_bytes for number, each in ((1, alone), (2, two))}
    again = held[2].pop("its other processes")
    assert held[1] == held[2]
    trained = sum(OUT) * 8 + sum(IN) * 8 + DENSE
    assert again == model.sizes(two, cost.plan_of(two)).base_bytes + 8 * trained


def test_rates_are_medians_of_a_run_without_its_start(tmp_path: Path) -> None:
    first = {**ROUND, "step_s": 99.0, "downlink_codes_bytes": 10**9}
    folder = write_run(tmp_path / "run", recipe(), [first] * 2 + [ROUND] * 18, num_parameters=ADAPTED + DENSE)
    rates = cost.from_run(folder, recipe(), cost.assumed(recipe()))
    assert 8 * (sum(OUT) + sum(IN)) == 8704
    assert rates.step_s == 0.25
    assert rates.encode_el_s == pytest.approx((8704 + DENSE) / 0.5)
    assert rates.merge_flop_s == pytest.approx(4 * 2 * 8 * ADAPTED / 0.5)
    assert rates.requantize_el_s == ADAPTED / 0.25
    assert rates.pack_el_s == ADAPTED / 0.5
    assert rates.apply_el_s == ADAPTED / 0.125
    assert (rates.factor_bits, rates.dense_bits_up, rates.dense_bits_down) == (3, 8, 4)
    assert rates.base_bits == pytest.approx(1)
    assert rates.sources["step_s"] == f"measured in {folder}"


def test_an_older_run_tells_what_it_can(tmp_path: Path) -> None:
    old = {"num_merged": 4, "merge_s": 0.5, "wait_s": 5.0, "uplink_bytes": 1, "downlink_bytes": 1}
    folder = write_run(tmp_path / "run", recipe(), [old] * 3)
    assumed = cost.assumed(recipe())
    rates = cost.from_run(folder, recipe(), assumed)
    assert rates.step_s == 5.0 / recipe().train.local_steps
    assert dataclasses.replace(rates, step_s=assumed.step_s, sources=assumed.sources) == assumed


def test_what_belongs_to_other_settings_is_not_taken_over(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", recipe(), [ROUND] * 3)
    planned = recipe(**{"base.quant": "int8", "compress.factors": "int2", "train.batch_size": 8})
    assumed = cost.assumed(planned)
    rates = cost.from_run(folder, planned, assumed)
    assert (rates.base_bits, rates.factor_bits) == (assumed.base_bits, assumed.factor_bits)
    assert rates.dense_bits_up == 8
    assert rates.step_s == 2 * 0.25


def test_a_run_without_rounds_or_of_another_model_tells_nothing(tmp_path: Path) -> None:
    empty = write_run(tmp_path / "empty", recipe(), [])
    with pytest.raises(RunError, match="no round"):
        cost.from_run(empty, recipe(), RATES)
    own = write_run(tmp_path / "own", recipe(), [ROUND], num_parameters=5)
    with pytest.raises(RunError, match="a model of its own"):
        cost.from_run(own, recipe(), RATES)


def test_a_trial_measures_all_but_bits() -> None:
    assumed = cost.assumed(recipe())
    rates = cost.probe(recipe(), assumed)
    for name, source in rates.sources.items():
        assert math.isfinite(value := getattr(rates, name))
        assert value > 0
        assert (source == "measured on this machine") == (not name.startswith(("factor", "dense", "base")))


def test_a_trial_takes_the_steps_of_a_worker(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its precision, in its pieces of a batch, with its activations computed anew: by what layers see."""
    small = recipe(
        **{
            "data.shards": str(shards),
            "train.precision": "bf16",
            "train.accumulate": 2,
            "train.checkpoint_activations": True,
            "train.checkpoint_modules": ["blocks.*"],
        }
    )
    seen = list[tuple[torch.dtype, torch.Size]]()
    forward = LoRALinear.forward

    def watched(self: LoRALinear, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        seen.append((out.dtype, out.shape))
        return out

    master = Master(recipes.initial_model(small), small)
    share = Share(small, torch.device("cpu"), Own(0, 0, 0, 0.0))
    base = {"base": master.snapshot(), "base_digest": master.base_digest()}
    Trainer(share.model, small, slot=0, version=0, **base)
    monkeypatch.setattr(LoRALinear, "forward", watched)
    share.backward(0)
    of_worker = seen.copy()
    assert len(of_worker) == 2 * (4 + 1 + 3), "four in a block, again all whose inputs are needed, the output"
    assert {dtype for dtype, _ in of_worker} == {torch.bfloat16}
    seen.clear()
    monkeypatch.setattr(calibrate, "_STEP_TRIAL_S", 0)
    monkeypatch.setattr(calibrate, "_round_rates", lambda recipe: {})
    calibrate.probe(small, cost.assumed(small))
    assert seen == of_worker * 2, "two steps"


@pytest.mark.parametrize(
    "named",
    [
        {"lora.exclude": ["blocks.1.*"]},
        {"lora.modules": ["blocks.1.*"]},
        {"lora.freeze": ["blocks.1.mlp.*"]},
        {"lora.overrides": [{"modules": "blocks.1.*", "rank": 2}]},
        {"train.checkpoint_activations": True, "train.checkpoint_modules": ["blocks.1"]},
    ],
)
def test_a_trial_has_the_layers_that_patterns_name(
    named: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_STEP_TRIAL_S", 0)
    two = recipe(**{"model.num_layers": 2})
    built, of_model = list[int](), Master.__init__

    def counted(self: Master, model: nn.Module, recipe: Recipe) -> None:
        built.append(len(model.blocks))
        of_model(self, model, recipe)

    monkeypatch.setattr(Master, "__init__", counted)
    assumed = cost.assumed(two)
    for planned, layers in ((two, 1), (config.replace(two, **named), 2)):
        rates = cost.probe(planned, assumed)
        assert built.pop() == layers
        assert rates.sources["merge_flop_s"] == "measured on this machine"


# Units


@pytest.mark.parametrize(
    ("text", "bps"),
    [
        ("100mbit", 100e6),
        ("1.5Gbit/s", 1.5e9),
        ("500kbps", 5e5),
        ("12.5MB/s", 1e8),
        ("8 bit", 8),
        ("100Mbit", 1e8),
    ],
)
def test_bandwidths_are_read(text: str, bps: float) -> None:
    assert links.bandwidth(text) == bps
    assert links.bandwidths(text) == (bps, bps)


def test_bandwidths_may_differ() -> None:
    assert links.bandwidths("20mbit:100mbit") == (20e6, 100e6)


@pytest.mark.parametrize(("text", "seconds"), [("50ms", 0.05), ("0.2s", 0.2), ("300us", 3e-4), ("0", 0)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert links.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "share"), [("0.5%", 0.005), ("95 %", 0.95), ("0.95", 0.95), ("0", 0)])
def test_shares_are_read(text: str, share: float) -> None:
    assert links.share(text) == pytest.approx(share)


@pytest.mark.parametrize(
    "text", ["100", "100mb", "100MB", "0mbit", "-1mbit", "mbit", "1tbit", "nan mbit", ""]
)
def test_what_is_no_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no bandwidth, such as 100mbit"):
        links.bandwidth(text)


@pytest.mark.parametrize("text", ["50", "50 m", "-1s", "1h", ""])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no time with a unit"):
        links.duration(text)


@pytest.mark.parametrize("text", ["100%", "1", "5", "-0.1", "half"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no share below 1"):
        links.share(text)


def test_a_table_of_workers_is_read(tmp_path: Path) -> None:
    table = tmp_path / "links.txt"
    table.write_text(
        "# name link rtt\nnear 1gbit 1ms\n\npi 5mbit:20mbit 80ms 2s 3  # the school's\nhome 50mbit 30ms 2\n"
    )
    near, pi, home = cost.read_table(table, loss=0.01)
    assert near == Site(name="near", link=Link(up_bps=1e9, down_bps=1e9, rtt_s=0.001, loss=0.01), count=1)
    assert (pi.link.up_bps, pi.link.down_bps, pi.step_s, pi.count) == (5e6, 20e6, 2.0, 3)
    assert (home.step_s, home.count) == (None, 2)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "names no worker"),
        ("near 1gbit", "line 1: must be"),
        ("near 1gbit 1ms 1s 1 1", "line 1: must be"),
        ("near 1gbit 1ms 0", "line 1: must be"),
        ("\nnear 1gbit 1", "line 2: '1' is no time"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    table = tmp_path / "links.txt"
    table.write_text(text)
    with pytest.raises(UserError, match=fault):
        cost.read_table(table)


# The command


Command = Callable[..., tuple[int, str, str]]
"""Words; exit code, stdout, stderr."""


@pytest.fixture
def lte(here: Command) -> Command:
    """`lte plan`."""
    return lambda *arguments: here("plan", *arguments)


OVER = ("--bandwidth", "100mbit", "--rtt", "50ms")


def test_a_plan_of_the_quickstart(lte: Command) -> None:
    code, out, err = lte(
        QUICKSTART, *OVER, "--workers", "16", "--server-bandwidth", "1gbit", "--loss", "0.1%"
    )
    assert (code, err) == (0, "")
    assert "16 workers, T = 5" in out
    assert "16 x worker: 100 Mbit/s, rtt 50 ms, 0.1% lost" in out
    assert "GFLOP/s, assumed: step_s" in out
    for title in ("a worker and round", "time of a round", "a worker's memory", "a round of each"):
        assert title in out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


def test_a_plan_as_json(lte: Command) -> None:
    code, out, _ = lte(QUICKSTART, "train.local_steps=20", *OVER, "--step-time", "0.2s", "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["workers"], told["local_steps"], told["server_bps"]) == (4, 20, None)
    assert told["rates"]["step_s"] == 0.2
    assert told["methods"][0]["seconds"]["compute"] == pytest.approx(4.0)
    assert [method["method"] for method in told["methods"]] == [
        "LTE",
        "LTE, overlap",
        "DiLoCo int4, server",
        "DiLoCo fp32, server",
        "DiLoCo fp32, ring",
        "DDP",
    ]
    assert told["recommended"].keys() == {"share", "local_steps", "local_steps_with_overlap", "rank"}


@pytest.mark.parametrize(("number", "steps"), [("0", 1), ("5", 10)])
def test_a_plan_of_a_round_is_by_the_settings_of_its_phase(lte: Command, number: str, steps: int) -> None:
    begin = "{from_round: 0, full_rank: true, merge: reset-b, local_steps: 1}"
    phases = f"train.phases=[{begin}, {{from_round: 5, full_rank: false, local_steps: 10}}]"
    code, out, _ = lte(QUICKSTART, phases, *OVER, "--step-time", "0.2s", "--json", "--round", number)
    told = json.loads(out)
    assert (code, told["local_steps"]) == (0, steps)
    sent = told["methods"][0]["uplink_bytes"]["factors"]
    assert (sent > 700_000) == (number == "0"), "a byte a weight, of 820,000"


def test_a_plan_for_unequal_workers(lte: Command, tmp_path: Path) -> None:
    table = tmp_path / "links.txt"
    table.write_text("near 1gbit 1ms 0.1s 3\nfar 2mbit 200ms 0.3s\n")
    code, out, _ = lte(QUICKSTART, "--table", str(table))
    assert code == 0
    assert "4 workers" in out
    assert "time of a round (far)" in out


@pytest.mark.parametrize("name", ["llama-1m", "vit-fashion-mnist", "methods/mhlora"])
def test_a_plan_of_any_model(lte: Command, name: str) -> None:
    if "llama" in name:
        pytest.importorskip("transformers", reason="transformers is not installed")
    code, out, err = lte(str(ROOT / "configs" / f"{name}.yaml"), *OVER)
    assert (code, err) == (0, "")
    assert ("images/s" if "vit" in name else "tokens/s") in out


def test_a_plan_of_what_has_no_heads_says_nothing_of_them(lte: Command) -> None:
    methods = ROOT / "configs" / "methods"
    for name, own in (
        ("ddp", "DDP fp32"),
        ("powersgd", "DDP powersgd"),
        ("diloco", "LTE"),
        ("localsgd", "LTE"),
    ):
        code, out, err = lte(str(methods / f"{name}.yaml"), *OVER)
        assert (code, err) == (0, "")
        headline, _, text = out.partition("\n")
        assert ("data-parallel" if "DDP" in own else "none adapted") in headline
        assert "head" not in out and "lora.rank" not in text, name
        assert ("train.local_steps >=" in text) == (own == "LTE")
        assert ("the server's" in text) == (own == "LTE")
        first = text.partition("a round of each")[2].splitlines()[1]
        assert first.startswith(own)
    code, out, _ = lte(str(methods / "ddp.yaml"), *OVER, "--json")
    told = json.loads(out)
    assert (told["num_adapted_parameters"], told["lora_rank"], told["join_bytes"]) == (0, None, None)


def test_a_trial_of_a_data_parallel_recipe_steps_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_STEP_TRIAL_S", 0)
    monkeypatch.setattr(calibrate, "_round_rates", lambda recipe: {})
    trained, make = list[set[str]](), optim.make_optimizer

    def watched(model: nn.Module, settings: Any) -> torch.optim.Optimizer:
        trained.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
        return make(model, settings)

    monkeypatch.setattr(optim, "make_optimizer", watched)
    parallel = recipe(**{"train.method": "ddp", "lora.freeze": ["embedding.*"]})
    rates = cost.probe(parallel, cost.assumed(parallel))
    plain = {name for name, _ in recipes.initial_model(parallel).named_parameters()}
    assert trained == [plain - {"embedding.weight"}]
    assert rates.sources["step_s"] == "measured on this machine"


def test_a_plan_from_a_run(lte: Command, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", recipe(), [ROUND] * 3)
    code, out, _ = lte(str(folder / "config.yaml"), *OVER, "--from", str(folder), "--json")
    assert code == 0
    assert json.loads(out)["rates"]["step_s"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((QUICKSTART,), "needs --bandwidth and --rtt"),
        ((QUICKSTART, "--bandwidth", "100mbit"), "needs --bandwidth and --rtt"),
        ((QUICKSTART, "--bandwidth", "100", "--rtt", "50ms"), "argument --bandwidth: '100' is no bandwidth"),
        ((QUICKSTART, "--bandwidth", "100mbit", "--rtt", "50"), "argument --rtt: '50' is no time"),
        ((QUICKSTART, *OVER, "--loss", "200%"), "argument --loss: '200%' is no share"),
        ((QUICKSTART, *OVER, "--workers", "0"), "argument --workers: '0' is not a whole number"),
        ((QUICKSTART, *OVER, "--table", "links.txt"), "leave out --bandwidth"),
        ((QUICKSTART, "--table", "/none/links.txt"), "cannot be read"),
        ((QUICKSTART, *OVER, "--from", "/none"), "no such file"),
        (("/none.yaml", *OVER), "no such file"),
        ((QUICKSTART, "lora.rnak=3", *OVER), "did you mean lora.rank"),
    ],
)
def test_a_mistake_gets_one_line(lte: Command, arguments: tuple[str, ...], fault: str) -> None:
    code, out, err = lte(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert fault in err


def test_its_help_has_an_example(lte: Command) -> None:
    code, out, _ = lte("--help")
    assert code == 0
    assert "lte plan configs/quickstart.yaml --bandwidth 100mbit --rtt 50ms" in out
