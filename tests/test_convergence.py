"""The parity benchmark: which rate it tries next, and what it makes of finished runs."""

import dataclasses
import json
from pathlib import Path

import convergence
import pytest

from lte import config


def searched(best: float, num_trials: int, guess: float = 1e-3) -> dict[float, float]:
    """Losses of the rates that a search tries where the loss is least at a rate."""
    losses: dict[float, float] = {}
    for _ in range(num_trials):
        rate = convergence.next_rate(losses, guess)
        assert rate not in losses
        losses[rate] = abs(rate / best - 1) + abs(best / rate - 1)
    return losses


@pytest.mark.parametrize("best", [1e-3, 2.2e-4, 6e-3])
def test_a_search_brackets_the_best_rate_and_then_narrows(best: float) -> None:
    tried = searched(best, 8)
    rates = sorted(tried)
    k = rates.index(min(tried, key=tried.__getitem__))
    assert 0 < k < len(rates) - 1
    assert rates[k - 1] < best < rates[k + 1]
    assert rates[k + 1] / rates[k - 1] < 2.9


def test_the_table_pairs_seeds_and_gives_an_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {0: (1.60, 1.50), 1: (1.70, 1.55), 2: (1.65, 1.60)}
    lines: list[dict[str, object]] = [
        {
            "case": name,
            "rate": 4e-3,
            "seed": seed,
            "loss": published + shift,
            "loss_master": master,
            "bytes": 3e6,
        }
        for name, shift in (("DDP AdamW", 0.0), ("LTE T=10 Muon r=128", 0.03))
        for seed, (published, master) in losses.items()
    ]
    lines.append({"case": "LTE T=10 Muon r=128", "rate": 8e-3, "seed": 0, "diverged": True})
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kind = dataclasses.replace(convergence.TEXT, folder=tmp_path, ledger=ledger)
    runs = convergence.Runs(kind, tmp_path, minutes=0)
    runs.report(3)
    rows = [line for line in capsys.readouterr().out.splitlines() if "LTE T=10 Muon r=128 |" in line]
    excess = [100 * ((p + 0.03) / m - 1) for p, m in losses.values()]
    mean = sum(excess) / 3
    half = 4.30 * (sum((x - mean) ** 2 for x in excess) / 2) ** 0.5 / 3**0.5
    assert len(rows) == 1
    assert f"{mean:+.2f} %" in rows[0]
    assert f"± {half:.2f}" in rows[0]
    assert "| 3 |" in rows[0]
    assert "0.004, 0.008 | 0.004" in rows[0], "a rate that diverged was tried, and is not the best"


@pytest.mark.parametrize("kind", [convergence.TEXT, convergence.IMAGES], ids=["text", "images"])
@pytest.mark.parametrize("name", convergence.CASES)
def test_every_case_is_a_valid_recipe_of_as_many_samples(name: str, kind: convergence.Kind) -> None:
    case = convergence.CASES[name]
    path = Path(__file__).parent.parent / case.recipe
    case = dataclasses.replace(case, recipe=str(path))
    recipe = config.load(path, [*case.on(kind), f"{case.key}={case.guess:g}"])
    samples = recipe.total_steps * recipe.train.workers * recipe.train.batch_size
    assert samples == 32 * kind.batch * convergence.STEPS
    assert recipe.data.kind == ("images" if kind is convergence.IMAGES else "text")
