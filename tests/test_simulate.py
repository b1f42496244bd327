"""Simulated runs against closed forms, the planner, order statistics, and the product's rules of rounds."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lte import config, cost
from lte.config import Recipe
from lte.cost import Link, Rates, Site
from lte.errors import ConfigError, UserError
from lte.server import rounds
from lte.simulate import Figures, Fleet, WorkerClass, read_fleet, server, simulate, world
from lte.simulate.fluid import Shared, then
from lte.simulate.links import Way, payload
from lte.simulate.worker import Worker

simpy = pytest.importorskip("simpy")

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "configs" / "gpt-10m.yaml")
MIXED = ROOT / "configs" / "links" / "mixed.yaml"
NEVER = 1e9

RATES = Rates(
    step_s=0.5,
    encode_el_s=1e5,
    decode_el_s=1e6,
    merge_flop_s=1e8,
    requantize_el_s=1e6,
    pack_el_s=1e5,
    apply_el_s=1e6,
    factor_bits=4,
    dense_bits_up=8,
    dense_bits_down=2,
    base_bits=0.5,
)
FREE = Rates(
    step_s=0.5,
    encode_el_s=math.inf,
    decode_el_s=math.inf,
    merge_flop_s=math.inf,
    requantize_el_s=math.inf,
    pack_el_s=math.inf,
    apply_el_s=math.inf,
    factor_bits=4,
    dense_bits_up=8,
    dense_bits_down=2,
    base_bits=0.5,
)
"""Rates with which only local steps and links take time."""
LINK = Link(up_bps=10e6, down_bps=20e6, rtt_s=0.1)
NO_LINK = Link(up_bps=math.inf, down_bps=math.inf, rtt_s=0.0)


@pytest.fixture(autouse=True)
def free_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed forms know nothing of the server's CPU for each message."""
    monkeypatch.setattr(world, "MESSAGE_S", 0.0)
    monkeypatch.setattr(server, "MESSAGE_S", 0.0)
    monkeypatch.setattr(world, "MEMBER_S", 0.0)


def recipe(workers: int = 1, **changes: object) -> Recipe:
    small: dict[str, object] = {
        "model.num_layers": 1,
        "model.width": 64,
        "model.mlp_width": 128,
        "model.context_tokens": 16,
        "train.batch_size": 4,
        "train.local_steps": 4,
        "train.workers": workers,
        "lora.rank": 8,
        "server.deadline_s": NEVER,
        "worker.patience_s": 1e10,
    }
    return config.replace(Recipe(), **(small | changes))


def fleet(link: Link = LINK, **of_class: Any) -> Fleet:
    return Fleet(classes=[WorkerClass(name="worker", link=link, **of_class)])


def planned(recipe: Recipe, rates: Rates = RATES, link: Link = LINK) -> cost.Estimate:
    sites = [Site(name="worker", link=link, count=recipe.train.workers)]
    return cost.lte_round(recipe, cost.plan_of(recipe), sites, rates)


# Closed forms


def closed_form_s(recipe: Recipe, link: Link) -> float:
    """A round of workers alike whose server has all the bandwidth that they can use."""
    s, steps, part_bytes = (
        planned(recipe, link=link).seconds,
        recipe.train.local_steps,
        recipe.compress.part_bytes,
    )

    def passed_s(coding_s: float, alone_s: float, num_bytes: float) -> float:
        """Until all is there, where parts are coded one by one, and each is sent as soon as it is coded."""
        parts = math.ceil(num_bytes / part_bytes)
        alone_s -= link.rtt_s / 2
        rest_s = coding_s - coding_s / parts
        return coding_s / parts + max(alone_s, rest_s + (alone_s / parts if rest_s else 0)) + link.rtt_s / 2

    plan = planned(recipe, link=link)
    up_s = passed_s(s.encode, s.uplink, sum(plan.uplink_bytes.values()))
    down_s = passed_s(s.pack, s.downlink, sum(plan.downlink_bytes.values()))
    away_s = up_s + s.decode + s.merge + s.requantize + down_s - s.encode
    ahead_s = recipe.train.steps_ahead * RATES.step_s
    return steps * RATES.step_s + s.encode + s.apply + max(0.0, away_s - ahead_s)


@pytest.mark.parametrize("workers", [1, 7])
@pytest.mark.parametrize("part_bytes", [4096, 1 << 20])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("link", [LINK, Link(up_bps=2e5, down_bps=1e5, rtt_s=0.03, loss=0.001)])
def test_workers_alike_take_compute_transfers_and_merge(
    workers: int, part_bytes: int, overlap: bool, link: Link
) -> None:
    """In one part just what the planner says, too."""
    ours = recipe(workers, **{"compress.part_bytes": part_bytes, "train.overlap": overlap})
    found, plan = simulate(ours, fleet(link), RATES), planned(ours, link=link)
    assert found.round_s == pytest.approx(closed_form_s(ours, link), rel=1e-6)
    if part_bytes == 1 << 20:
        assert found.round_s == pytest.approx(plan.round_s, rel=1e-6)
    assert found.compute_share == pytest.approx(4 * RATES.step_s / found.round_s, rel=1e-6)
    assert found.tokens_s == pytest.approx(workers * 4 * 64 / found.round_s, rel=1e-6)
    assert found.uplink_bytes == pytest.approx(workers * sum(plan.uplink_bytes.values()))
    assert found.downlink_bytes == pytest.approx(workers * sum(plan.downlink_bytes.values()))
    assert (found.used, found.late, found.lost) == (19 * workers, 0, 0)


def test_without_network_and_server_all_is_training() -> None:
    found = simulate(recipe(5), fleet(NO_LINK), FREE)
    assert (found.round_s, found.efficiency, found.compute_share) == pytest.approx((2.0, 1.0, 1.0))
    assert (found.server_up, found.server_down, found.server_cpu) == (0, 0, 0)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_saturated_link_takes_bytes_by_bandwidth(shards: int) -> None:
    workers, up_bps, down_bps = 50, 2e6, 1e6
    narrow = dataclasses.replace(fleet(), server_up_bps=up_bps, server_down_bps=down_bps)
    found = simulate(recipe(workers), narrow, FREE, shards=shards)
    plan = planned(recipe(workers), FREE)
    up, down = (workers * sum(kinds.values()) for kinds in (plan.uplink_bytes, plan.downlink_bytes))
    moving_s = up / payload(up_bps) / shards + down / payload(down_bps) / shards
    assert found.round_s == pytest.approx(2.0 + LINK.rtt_s + moving_s, rel=1e-6)
    assert found.server_up == pytest.approx(up / payload(up_bps) / shards / found.round_s, rel=1e-6)


def test_a_relay_takes_an_update_once_for_its_group() -> None:
    """Eight workers on one link: alone each has an eighth of it."""
    rates = dataclasses.replace(FREE, factor_bits=1e-9, dense_bits_up=1e-9, dense_bits_down=800)
    site = fleet(Link(up_bps=math.inf, down_bps=10e6, rtt_s=0.0), per_link=8)
    each, relayed = (simulate(recipe(32), site, rates, relay_group=size) for size in (1, 8))
    assert relayed.downlink_bytes == pytest.approx(each.downlink_bytes / 8)
    assert relayed.round_s - 2.0 == pytest.approx((each.round_s - 2.0) / 8, rel=0.01)


def test_processes_share_the_cores_of_their_machine() -> None:
    one_machine = dataclasses.replace(fleet(NO_LINK), cores=2.0)
    apart = fleet(NO_LINK, cores=2.0, per_machine=4)
    for of, workers, times in ((one_machine, 10, 5.0), (apart, 10, 2.0), (one_machine, 2, 1.0)):
        found = simulate(recipe(workers), of, FREE)
        assert found.round_s == pytest.approx(2.0 * times), "T = 4 steps of 0.5 s"
        assert found.tokens_s == pytest.approx(workers * 4 * 64 / found.round_s)
    assert simulate(recipe(8), one_machine, FREE).efficiency == pytest.approx(1.0), "of two cores"


def test_the_server_works_on_the_cores_that_its_workers_leave() -> None:
    rates = dataclasses.replace(FREE, requantize_el_s=1e5)
    together = dataclasses.replace(fleet(NO_LINK), cores=1.0)
    found = simulate(recipe(3), together, rates)
    requantize_s = planned(recipe(3), rates).seconds.requantize
    assert found.round_s == pytest.approx(3 * 2.0 + requantize_s)
    assert found.server_cpu == pytest.approx(requantize_s / found.round_s)


def test_messages_take_the_servers_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life alone keep it busy: 500 a second of 1 ms, each heard and answered by half of that."""
    for module in (world, server):
        monkeypatch.setattr(module, "MESSAGE_S", 0.5e-3)
    found = simulate(recipe(500, **{"worker.heartbeat_s": 1.0}), fleet(NO_LINK), FREE)
    in_round_s = 500 * (2 + 1 + 3) * 0.5e-3  # part and contribution, receipt; part, update and word to begin
    assert found.server_cpu == pytest.approx(0.5 + in_round_s / found.round_s)
    assert found.round_s == pytest.approx(2.0 + 2 * in_round_s), "the rest is half as fast"


# Stragglers


def test_a_round_of_all_takes_as_long_as_its_slowest() -> None:
    workers, deviation = 40, 0.4
    found = simulate(recipe(workers), fleet(NO_LINK, jitter=deviation), FREE, rounds=500)
    draws = np.random.default_rng(0).lognormal(-(deviation**2) / 2, deviation, (20_000, workers))
    assert found.round_s == pytest.approx(2.0 * draws.max(1).mean(), rel=0.03)
    assert found.efficiency == pytest.approx(1 / draws.max(1).mean(), rel=0.03)


def naive_rounds(workers: int, quorum: int, deviation: float, num_rounds: int) -> tuple[float, int]:
    """Seconds a round and contributions that were late, where a round closes with its quorum: an event at a
    time is all there is."""
    draws = np.random.default_rng(1)

    def round_s() -> float:
        return 2.0 * float(draws.lognormal(-(deviation**2) / 2, deviation))

    at_work = [(round_s(), n, 0) for n in range(workers)]
    heapq.heapify(at_work)
    version, now_s, late, waiting = 0, 0.0, 0, list[int]()
    while version < num_rounds:
        now_s, n, base = heapq.heappop(at_work)
        if base < version:
            late += 1
            heapq.heappush(at_work, (now_s + round_s(), n, version))
            continue
        waiting.append(n)
        if len(waiting) == quorum:
            version += 1
            for n in waiting:
                heapq.heappush(at_work, (now_s + round_s(), n, version))
            waiting = []
    return now_s / num_rounds, late


def test_a_quorum_is_an_order_statistic_and_the_rest_is_late() -> None:
    rules = {"server.quorum": 30, "server.grace_s": 0.0}
    found = simulate(recipe(40, **rules), fleet(NO_LINK, jitter=0.4), FREE, rounds=500)
    round_s, late = naive_rounds(40, 30, 0.4, 500)
    assert found.round_s == pytest.approx(round_s, rel=0.03)
    assert found.late == pytest.approx(late, rel=0.05)
    assert found.used == 499 * 30


def test_a_deadline_closes_the_rounds_that_a_stall_holds_up() -> None:
    rules = {"server.quorum": 50, "server.deadline_s": 3.0}
    stalls = fleet(NO_LINK, stalls=0.05, stall_factor=3.0)
    found = simulate(recipe(100, **rules), stalls, FREE, rounds=200)
    waiting = simulate(recipe(100), stalls, FREE, rounds=200)
    assert found.round_s == pytest.approx(3.0, rel=0.01), "of 100 workers almost always one stalls"
    assert waiting.round_s == pytest.approx(2.0 + 4.0 * (1 - 0.95**100), rel=0.01)
    assert found.late > 0
    assert waiting.late == 0


# Deaths


def test_who_dies_is_missed_and_comes_back() -> None:
    churn = fleet(up_s=200.0, down_s=50.0)
    found = simulate(recipe(50, **{"server.silence_s": 5.0}), churn, FREE, rounds=400)
    assert found.used / (399 * 50) == pytest.approx(0.8, abs=0.06), "the share of time that each lives"
    deaths = 50 * 399 * found.round_s / 250
    assert found.lost / deaths == pytest.approx(found.compute_share, rel=0.15), (
        "who waits has nothing to lose"
    )
    assert found.round_s > simulate(recipe(50), fleet(), FREE).round_s + 1, "some wait for the silence"


@pytest.mark.parametrize("silence_s", [30.0, 60.0])
def test_silence_decides_how_long_a_round_waits_for_the_dead(silence_s: float) -> None:
    """Of two workers the one dies at once and never comes back."""
    ours = recipe(2, **{"server.silence_s": silence_s, "worker.heartbeat_s": 0.5})
    here = world.World(ours, world.costs_of(ours, FREE), seed=0, shards=1)
    merged_s: list[float] = []

    def publish(num_merged: int, pack_s: float) -> None:
        merged_s.append(here.env.now)

    one = server.Server(here, None, call=lambda number: None, publish=publish)
    way = Way(NO_LINK, math.inf, Shared(here.env))
    for number, up_s in enumerate((1e-6, math.inf)):
        kind = WorkerClass(name="worker", link=NO_LINK, up_s=up_s, down_s=NEVER)
        Worker(here, one, number, kind, up=way, down=way, cores=None)
    here.env.run(until=100.0)
    assert merged_s == pytest.approx([silence_s], abs=0.5)


@pytest.mark.parametrize(("comes_s", "waits"), [(0.5, False), (5.0, True)])
def test_who_comes_while_an_update_leaves_belongs_to_the_next_round(comes_s: float, waits: bool) -> None:
    """It takes the whole model of that version, to which no update will come. Who came before is sent it."""
    ours = recipe(2, **{"server.quorum": 1})
    costs = dataclasses.replace(world.costs_of(ours, FREE), pack_s=10.0, down_parts=10)
    here = world.World(ours, costs, seed=0, shards=1)
    one = server.Server(here, None, call=lambda number: None, publish=lambda num_merged, pack_s: None)
    one.gone(1)
    one.contributed(0, 0)
    here.env.run(until=comes_s)
    assert (one.version, one.is_merging) == (int(comes_s > 1.0), True)
    assert one.joined(1) is waits
    here.env.run(until=12.0)
    assert one.expected == {0, 1}


Happening = tuple[float, str, int]
happenings = st.lists(
    st.tuples(st.floats(0.01, 3.0), st.sampled_from(["contribute", "go", "join"]), st.integers(0, 4)),
    max_size=60,
)


_TWO_WAIT_WHILE_THREE_GO = [
    *((1.0, what, number) for what in ("go", "join") for number in (3, 4)),
    *((1.0, "go", number) for number in (0, 1, 2)),
    *((1.0, "contribute", 3), (1.0, "join", 0)),
]
"""The round begins anew with those who waited, and so does its deadline."""
_THE_LAST_IS_REPLACED = [
    *((1.0, "go", number) for number in (0, 1, 2, 3)),
    *((1.0, "join", number) for number in (0, 4)),
]
"""Who waited takes part with the new process."""


@settings(max_examples=60, deadline=None)
@example(_TWO_WAIT_WHILE_THREE_GO, 1, 4.0, 4.0)
@example(_THE_LAST_IS_REPLACED, 1, 0.0, 4.0)
@given(happenings, st.integers(1, 5), st.floats(0, 4), st.floats(4, 8))
def test_its_rounds_are_the_products(
    events: list[Happening], quorum: int, grace_s: float, deadline_s: float
) -> None:
    """The same happens to `server.rounds`; both hold the same after each event."""
    rules = {"server.quorum": quorum, "server.grace_s": grace_s, "server.deadline_s": deadline_s}
    ours = recipe(5, **rules)
    simulated = world.World(ours, world.costs_of(ours, FREE), seed=0, shards=1)
    called: list[int] = []
    one = server.Server(simulated, None, call=called.append, publish=lambda num_merged, pack_s: None)
    members = {
        f"w{n}": rounds.Member(
            worker_id=f"w{n}", session=f"{n}", incarnation=n + 1, slot=n, heads=1, rank=8, heard_s=0.0
        )
        for n in range(5)
    }
    own_rules = dataclasses.replace(simulated.rules, rounds=10**6, silence_s=NEVER)
    state = rounds.State(rules=own_rules, version=0, members=members, known=members, next_incarnation=6)
    state = dataclasses.replace(state, phase="collecting", expected=frozenset(members))

    def happened(event: rounds.Event, now_s: float) -> None:
        nonlocal state
        state, _ = rounds.step(state, event, now_s)
        while state.phase == "merging":
            state, _ = rounds.step(state, rounds.Merged(), now_s)

    now_s, sessions = 0.0, itertools.count(100)
    for after_s, what, number in events:
        until_s = now_s + after_s
        while (due_s := rounds.next_deadline(state)) is not None and due_s < until_s:
            happened(rounds.Ticked(), due_s)
        now_s, worker_id = until_s, f"w{number}"
        simulated.env.run(until=now_s)
        member = state.members.get(worker_id)
        if what == "join":
            one.joined(number)
            happened(rounds.Joined(worker_id, str(next(sessions)), 1, 8), now_s)
        elif member is None:
            continue
        elif what == "go":
            one.gone(number)
            happened(rounds.Left(worker_id, member.incarnation, ""), now_s)
        else:
            one.contributed(number, one.version)
            happened(rounds.Contributed(worker_id, member.incarnation, state.version), now_s)
        simulated.env.run(until=simulated.env.now + 1e-9)
        assert one.version == state.version
        assert {f"w{n}" for n in one.held} == state.held
        assert {f"w{n}" for n in one.expected} == state.expected
        assert {f"w{n}" for n in one.members} == state.members.keys()


# Determinism


def test_equal_seeds_give_equal_figures() -> None:
    mixed = read_fleet(MIXED)
    one, again, other = (simulate(recipe(60), mixed, RATES, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one.round_s != other.round_s


# Sharing


def test_shares_are_max_min_fair() -> None:
    """Of 10 a second the first can take 2; the second has 8, and half of that once the third has come."""
    env, ends = simpy.Environment(), dict[str, float]()
    shared = Shared(env, 10.0)

    def take(name: str, amount: float, cap: float) -> None:
        then(shared.take(amount, cap), lambda _: ends.__setitem__(name, env.now))

    take("slow", 20.0, 2.0)
    take("fast", 56.0, 100.0)
    then(env.timeout(5.0), lambda _: take("late", 8.0, 9.0))
    env.run()
    assert ends == pytest.approx({"slow": 10.0, "fast": 8.0, "late": 7.0})
    assert shared.given == pytest.approx(84.0)


def test_who_wants_no_more_leaves_its_share_to_others() -> None:
    env, ends = simpy.Environment(), list[float]()
    shared = Shared(env, 10.0)
    dropped = shared.take(1000.0, 100.0)
    then(shared.take(50.0, 100.0), lambda _: ends.append(env.now))
    then(env.timeout(4.0), lambda _: shared.drop(dropped))
    env.run()
    assert ends == pytest.approx([7.0]), "20 in the first 4 s, 30 in the next 3"
    assert not dropped.triggered


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 50), st.floats(0.5, 20)), min_size=1, max_size=20))
def test_nothing_is_given_beyond_the_capacity_and_nobody_waits_for_ever(
    wanted: list[tuple[float, float, float]],
) -> None:
    env, ends = simpy.Environment(), list[float]()
    shared = Shared(env, 10.0)

    def come(amount: float, cap: float) -> Callable[[object], None]:
        return lambda _: then(shared.take(amount, cap), lambda _: ends.append(env.now))

    for at_s, amount, cap in wanted:
        then(env.timeout(at_s), come(amount, cap))
    env.run()
    assert len(ends) == len(wanted)
    assert shared.given == pytest.approx(sum(amount for _, amount, _ in wanted), rel=1e-6)
    assert env.now >= shared.given / 10.0 - 1e-6


# What people write


def test_the_shipped_fleet_is_read() -> None:
    mixed = read_fleet(MIXED)
    assert [each.name for each in mixed.classes] == ["lab", "home", "school"]
    assert mixed.counts(10) == [3, 5, 2]
    assert mixed.counts(7) == [2, 4, 1]
    assert sum(mixed.counts(1)) == 1
    home = mixed.classes[1]
    assert (home.up_s, home.down_s, home.link.loss, home.step_s) == (28800, 1200, 0.001, 0.4)
    assert mixed.server_up_bps == 1e9


ONE = "classes: [{name: a, bandwidth: 10mbit, rtt: 1ms%s}]"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "must be a mapping with classes, not 'None'"),
        ("classes: []", "must be a list of one or more"),
        ("classes: [a]", "class 1: must be a mapping with name, bandwidth, rtt, not 'a'"),
        ("classes: [{name: a, bandwidth: 10mbit}]", "class 1: rtt is missing"),
        ("clases: []", "clases: unknown; did you mean classes?"),
        (ONE % ", jiter: 1", "class 1: jiter: unknown; did you mean jitter?"),
        (ONE % ", up: 3", "class 1: up: '3' is no time with a unit, such as 8h, 30min"),
        (ONE % ", down: 0", "class 1: down: '0' is no time above 0"),
        (ONE % ", share: none", "class 1: share: 'none' is no share above 0"),
        (ONE % ", per_link: 1.5", "class 1: per_link: '1.5' is not a whole number of 1 or more"),
        (ONE % ", jitter: -1", "class 1: jitter: '-1' is not a number of 0 or more"),
        (ONE % ", loss: 200%", "class 1: loss: '200%' is no share below 1"),
        ("server_bandwidth: 10\n" + ONE % "", "server_bandwidth: '10' is no bandwidth"),
        ("classes: [", "line 1"),
    ],
)
def test_a_wrong_fleet_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "links.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_fleet(path)
    assert str(refused.value).startswith(str(path))
    assert fault in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("settings", [{"outer.when": "arrival"}, {"train.method": "ddp"}])
def test_what_has_no_rounds_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="simulated"):
        simulate(recipe(2, **settings), fleet(), RATES)


# The command


Command = Callable[..., tuple[int, str, str]]
"""Words; exit code, stdout, stderr."""


@pytest.fixture
def lte(here: Command) -> Command:
    """`lte simulate`."""
    return lambda *arguments: here("simulate", *arguments)


LINKS = ("--links", str(MIXED))


def test_a_table_of_runs(lte: Command) -> None:
    code, out, err = lte(RECIPE, "--workers", "2,20", *LINKS, "--rounds", "3", "--shards", "2")
    assert (code, err) == (0, "")
    assert "3 rounds simulated, 2 shards (modelled)" in out
    for title in ("rounds/h", "tokens/s", "efficiency", "computing", "link in", "CPU", "late", "lost"):
        assert title in out
    assert "Nothing of the server is busy for 90% of the time." in out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


def test_runs_as_json_say_where_the_server_saturates(lte: Command, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow.yaml"
    narrow.write_text("server_bandwidth: 10mbit\n" + ONE % "")
    workers = ("--workers", "1,64", "--links", str(narrow))
    code, out, _ = lte(RECIPE, *workers, "--step-time", "0.1s", "--rounds", "3", "--quorum", "50%", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["rates"]["step_s"], told["local_steps"], told["rounds"]) == (0.1, 10, 3)
    assert told["runs"][0].keys() == {field.name for field in dataclasses.fields(Figures)}
    assert told["saturated"].keys() == {"server_up", "server_down", "server_cpu"}
    assert told["runs"][0]["server_down"] < told["runs"][1]["server_down"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((RECIPE,), "the following arguments are required: --links"),
        ((RECIPE, "--links", "/none.yaml"), "/none.yaml: cannot be read"),
        ((RECIPE, *LINKS, "--workers", "10,x"), "argument --workers: 'x' is not a whole number"),
        ((RECIPE, *LINKS, "--rounds", "1"), "--rounds: a simulation needs 2 or more"),
        ((RECIPE, *LINKS, "--quorum", "80"), "argument --quorum: '80' is no share"),
        ((RECIPE, *LINKS, "--shards", "0"), "argument --shards: '0' is not a whole number"),
        ((RECIPE, "outer.when=arrival", *LINKS), "outer.when: simulated are rounds"),
        ((RECIPE, "train.method=ddp", *LINKS), "train.method: simulated is lte"),
        ((RECIPE, *LINKS, "--shards", "2", "--relay-group", "8"), "a divided server has no relays"),
    ],
)
def test_a_mistake_gets_one_line(lte: Command, arguments: tuple[str, ...], fault: str) -> None:
    code, out, err = lte(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert fault in err


def test_without_simpy_it_says_what_to_install(lte: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "simpy", None)
    code, _, err = lte(RECIPE, *LINKS)
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install 'lte[simulate]'" in err


def test_its_help_says_what_is_modelled_otherwise(lte: Command) -> None:
    code, out, _ = lte("--help")
    assert code == 0
    assert "Shards have a machine each here" in out
