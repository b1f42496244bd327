"""What is run of the LTE paper's experiments: recipes, and what is changed of them. See reproduction.py."""

from __future__ import annotations

from dataclasses import dataclass

FULL = ("lora.modules=[]", "lora.heads=1")
"""Full-rank data-parallel training: one worker has the whole batch, and averaging one worker's changes is
what it did."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A point of a plot: a setting, of which the best rate counts.

    Attributes:
        series: the line that it is on. x: its place there; or a name, where curves are drawn.
        settings: what is changed of the experiment's recipe. rates: of these the best is taken.
    """

    series: str
    x: float | str
    settings: tuple[str, ...]
    rates: tuple[str, ...] = ("",)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Cases of one recipe.

    Attributes:
        recipe: file in configs/reproduction. common: settings of all cases.
        x: what x is; '' where curves over samples, `over`, are drawn instead. y: what is measured.
        log: axes that are logarithmic.
        seeds: how many at the best rate; the rates are tried with the first.
    """

    recipe: str
    title: str
    cases: tuple[Case, ...]
    common: tuple[str, ...] = ()
    x: str = ""
    over: str = "images trained on"
    y: str = "validation loss, nats an image"
    log: str = "x"
    seeds: int = 2


def lr(*rates: float) -> tuple[str, ...]:
    return tuple(f"optimizer.lr={rate:g}" for rate in rates)


def dense_lr(*rates: float) -> tuple[str, ...]:
    return tuple(f"optimizer.dense_lr={rate:g}" for rate in rates)


def rounds(steps: int, local_steps: int) -> tuple[str, str]:
    """So many local steps in all."""
    return f"train.local_steps={local_steps}", f"train.rounds={steps // local_steps}"


LTE_RATE, FULL_RATE = lr(5e-4), dense_lr(2e-3)
"""The best of those that `rates` tries."""
_REGRESSION_STEPS, _STEPS = 1000, 240
_ERROR = "validation loss, squared error"
_REGRESSION_RATES = lr(3e-3, 1e-2)


def at(series: str, x: float | str, *settings: str, rates: tuple[str, ...] = ("",)) -> Case:
    return Case(series=series, x=x, settings=settings, rates=rates)


EXPERIMENTS: dict[str, Experiment] = {
    "regression": Experiment(
        recipe="regression",
        title="Least squares, 32 x 32, heads of rank 4: what is left of the error",
        over="samples",
        y=_ERROR,
        log="y",
        cases=(
            at("full rank", "", *FULL, *rounds(_REGRESSION_STEPS, 25), rates=dense_lr(1e-2)),
            at("LoRA, never merged", "", "lora.merge=reset-less"),
            *(
                at(f"merged every {T} steps", "", *rounds(_REGRESSION_STEPS, T))
                for T in (200, 100, 50, 25, 10)
            ),
        ),
    ),
    "regression-merges": Experiment(
        recipe="regression",
        title="Least squares: too few merges and too many",
        x="T, local steps between merges",
        y=_ERROR,
        log="xy",
        common=("eval.every=0",),
        cases=tuple(
            at("heads made anew", T, *rounds(_REGRESSION_STEPS, T), rates=_REGRESSION_RATES)
            for T in (1, 5, 25, 100, 500)
        ),
    ),
    "regression-heads": Experiment(
        recipe="regression",
        title="Least squares: heads of rank 4 side by side, never made anew",
        over="samples",
        y=_ERROR,
        log="y",
        common=("lora.merge=reset-less",),
        cases=tuple(at(f"{H} head{'s' * (H > 1)}", "", f"lora.heads={H}") for H in (1, 2, 4, 8, 16)),
    ),
    "rates": Experiment(
        recipe="vit",
        title="ViT: learning rates",
        x="learning rate",
        cases=(
            *(at("full rank", rate, *FULL, *dense_lr(rate)) for rate in (1e-3, 2e-3, 4e-3)),
            *(at("LTE, 4 heads", rate, *lr(rate)) for rate in (2.5e-4, 5e-4, 1e-3, 2e-3)),
        ),
    ),
    "heads": Experiment(
        recipe="vit",
        title="ViT: more heads, 16 images a step each",
        x="heads",
        cases=tuple(
            at(f"r = {r}", H, f"lora.heads={H}", f"train.batch_size={16 * H}", f"lora.rank={r}", *LTE_RATE)
            for r in (8,)
            for H in (1, 2, 4)
        ),
    ),
    "heads-fixed-batch": Experiment(
        recipe="vit",
        title="ViT: more heads, 64 images a step for all",
        x="heads",
        cases=tuple(at("lora_rank 8", H, f"lora.heads={H}", *LTE_RATE) for H in (1, 4, 16)),
    ),
    "rank": Experiment(
        recipe="vit",
        title="ViT: lora_rank",
        x="lora_rank",
        cases=tuple(at("4 heads", r, f"lora.rank={r}", *LTE_RATE) for r in (1, 8, 32)),
    ),
    "merges": Experiment(
        recipe="vit",
        title="ViT: how often heads are merged",
        x="T, local steps between merges",
        cases=tuple(at("4 heads", T, *rounds(_STEPS, T), *LTE_RATE) for T in (1, 5, 10, 40)),
    ),
    "early-late": Experiment(
        recipe="vit",
        title="ViT: LTE and full-rank training",
        y="training loss of a round, nats an image",
        cases=(
            *(at(f"full rank, rate {rate:g}", "", *FULL, *dense_lr(rate)) for rate in (1e-3, 2e-3)),
            *(at(f"LTE, rate {rate:g}", "", *lr(rate)) for rate in (5e-4, 1e-3, 2e-3)),
        ),
    ),
    "init": Experiment(
        recipe="vit",
        title="ViT: initialization of A",
        x="learning rate",
        cases=tuple(
            at(init, rate, f"lora.init={init}", *lr(rate))
            for init, rates in (
                ("semi-orthogonal", (2.5e-4, 5e-4, 1e-3, 2e-3)),
                ("xavier", (5e-4, 1e-3)),
                ("kaiming", (1e-3, 2e-3)),
            )
            for rate in rates
        ),
    ),
    "scale": Experiment(
        recipe="vit",
        title="ViT: lora_scale s against the learning rate",
        x="s * learning rate",
        cases=tuple(
            at(f"s = {s}", eta, f"lora.scale={s}", *lr(eta / s))
            for s, etas in ((4, (0.008,)), (16, (0.004, 0.008, 0.016, 0.032)), (64, (0.008,)))
            for eta in etas
        ),
    ),
}
