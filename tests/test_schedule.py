"""The schedules against naive loops."""

from __future__ import annotations

import math

import pytest

from lte import config, schedule
from lte.config import Recipe, Schedule

TOTAL, LOCAL = 120, 10


def factors(settings: Schedule, total: int = TOTAL) -> list[float]:
    restarts = settings.restart_rounds * LOCAL
    return [schedule.factor(settings, step, total, step - step % restarts) for step in range(total)]


@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
@pytest.mark.parametrize(("warmup", "share", "final"), [(20, 0.25, 0.0), (0, 1.0, 0.1), (15, 0.1, 0.3)])
def test_warmup_stable_decay(shape: str, warmup: int, share: float, final: float) -> None:
    settings = Schedule(name="wsd", warmup_steps=warmup, decay_share=share, decay_shape=shape, final=final)
    decay = int(TOTAL * share)
    stable = TOTAL - warmup - decay
    expected = [(k + 1) / warmup for k in range(warmup)] + [1.0] * stable
    for k in range(decay):
        done = k / decay
        fallen = done if shape == "linear" else done**0.5
        expected.append(1 - (1 - final) * fallen)
    assert factors(settings) == pytest.approx(expected)


def test_a_decay_as_long_as_the_run_begins_after_the_warmup() -> None:
    settings = Schedule(name="wsd", warmup_steps=20, decay_share=1.0, final=0.0)
    line = [1 - k / 100 for k in range(100)]
    assert factors(settings)[20:] == pytest.approx(line)


@pytest.mark.parametrize(("rounds", "climb", "warmup"), [(1, 4, 0), (3, 7, 12), (2, 1, 25), (2, 0, 5)])
def test_jagged_cosine(rounds: int, climb: int, warmup: int) -> None:
    """The cosine, but for the first steps after every so many merges: a line up to it."""
    settings = Schedule(
        name="jagged-cosine",
        warmup_steps=warmup,
        final=0.1,
        restart_rounds=rounds,
        restart_warmup_steps=climb,
    )
    expected = [
        0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (k - warmup) / (TOTAL - warmup))) for k in range(TOTAL)
    ]
    for start in range(rounds * LOCAL, TOTAL, rounds * LOCAL):
        top = expected[start + climb - 1]
        for k in range(climb):
            expected[start + k] = top * (k + 1) / climb
    expected[:warmup] = [(k + 1) / warmup for k in range(warmup)]
    assert factors(settings) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "jagged-cosine"])
@pytest.mark.parametrize("final", [0.0, 0.25])
def test_the_end_of_the_run_has_the_final_factor(name: str, final: float) -> None:
    settings = Schedule(name=name, warmup_steps=20, final=final)
    end = schedule.factor(settings, TOTAL + 5, TOTAL, 0)
    assert end == pytest.approx(final, abs=1e-12)
    last = schedule.factor(settings, TOTAL - 1, TOTAL, 0)
    assert final < last < final + 0.06, "the last step is taken just before the end"


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd", "jagged-cosine"])
def test_a_run_shorter_than_its_warmup_is_all_warmup(name: str) -> None:
    assert factors(Schedule(name=name, warmup_steps=50), total=10) == [(k + 1) / 50 for k in range(10)]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd", "jagged-cosine"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_rates_go_by_the_local_steps_taken_where_their_number_changes(name: str, rounds: int) -> None:
    """Against lists: 4 rounds of 5 steps, 3 of 2, 5 of 7; jagged-cosine restarts at merges."""
    lengths = [5] * 4 + [2] * 3 + [7] * 5
    recipe = config.replace(
        Recipe(),
        **{
            "train.rounds": 12,
            "train.local_steps": 5,
            "train.phases": [{"from_round": 4, "local_steps": 2}, {"from_round": 7, "local_steps": 7}],
            "schedule.name": name,
            "schedule.warmup_steps": 6,
            "schedule.restart_rounds": rounds,
            "schedule.restart_warmup_steps": 2,
        },
    )
    total = sum(lengths)
    assert recipe.total_steps == total
    expected, step, restart = [], 0, 0
    for number, length in enumerate(lengths):
        restart = step if number % rounds == 0 else restart
        for _ in range(length):
            expected.append(schedule.factor(recipe.schedule, step, total, restart))
            step += 1
    met = [schedule.factor_in(recipe, n, k) for n, length in enumerate(lengths) for k in range(length)]
    assert met == expected
    if name == "jagged-cosine":
        restarts = {sum(lengths[:n]) for n in range(rounds, 12, rounds)} - {5}  # that is in the warmup
        assert {k for k in range(7, total) if met[k] > met[k - 1]} == {k + 1 for k in restarts}
