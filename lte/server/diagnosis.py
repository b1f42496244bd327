"""What the server measures of some rounds, beside losses and bytes: the records' line `diagnostics`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lte import diagnostics, durable, merge, quantize
from lte.compress import CODES, DENSE, SCALES, tensors_of
from lte.diagnostics import Noise
from lte.errors import ConfigError, RunError
from lte.merge import HeadDelta
from lte.quantize import Quantized
from lte.server.master import Master, Received
from lte.track import METRICS, Records

INITIAL = "initial.safetensors"
"""Name of the file in a run's folder that holds Q_0, of which W_0 = deq(Q_0) is made again; or W_0 itself,
by module, where it is another (`Recipe.keeps_initial`)."""
_MOST_HEADS = 16
"""Heads between which Grassmann distances are measured: with all pairs of more they would take the time."""
_DIGITS = 6


class Diagnosis:
    """Measures rounds; without `log.diagnostics_every` it does nothing and holds nothing.

    The initial weights are read from the run's folder, a module at a time, when a round is measured. They
    are written there by the run's first server, before the first merge: whoever runs a model of their own
    need not make the same weights again when a server is started anew.

    A measurement takes 1.7 s of a core for 10M parameters and four heads, most of it for the spectra of each
    weight's updates: with square weights its time grows with the third power of their width.
    """

    def __init__(self, folder: Path, master: Master) -> None:
        """Take the settings of the master's recipe.

        Raises:
            ConfigError: a pattern of log.diagnostics_modules matches no adapted module.
        """
        self._path, self._master = folder / INITIAL, master
        self._every = master.recipe.log.diagnostics_every
        patterns = master.recipe.log.diagnostics_modules
        self._modules = [name for name in master.base if any(fnmatchcase(name, p) for p in patterns)]
        shown = ", ".join(master.base) or "none"
        unmatched = [p for p in patterns if p != "*" and not any(fnmatchcase(n, p) for n in master.base)]
        if self._every and unmatched:
            raise ConfigError(
                [
                    f"log.diagnostics_modules: {p!r} matches no module that has heads; there are: {shown}"
                    for p in unmatched
                ]
            )
        self._told = set[int]()
        if self._every:
            lines = Records.read(folder / METRICS)
            self._told = {line["version"] for line in lines if line["kind"] == "diagnostics"}

    def is_due(self, version: int) -> bool:
        """Whether the round that ends with this version is to be measured, and is not yet."""
        return bool(self._every) and version % self._every == 0 and version not in self._told

    def begin(self, version: int) -> str:
        """Go on from a version; before the first merge keep the initial weights.

        Returns:
            What cannot be measured, in words, or ''.

        Raises:
            RunError: the initial weights cannot be read.
        """
        self._told = set()  # records beyond this version are dropped
        if not self._every:
            return ""
        if version == 0:
            partial = self._path.with_name(f".{INITIAL}")
            master = self._master
            kept = master.weights if master.recipe.keeps_initial else tensors_of(master.base, {})
            durable.save_tensors(kept, partial)
            durable.name(partial, self._path)
        if not self._path.exists():
            return "the initial weights are not known, as log.diagnostics_every was 0 when the run began"
        self._initial(self._modules[:1])
        return ""

    @torch.no_grad()
    def measure(
        self,
        version: int,
        tokens: int,
        contributions: Sequence[Received],
        heads: Mapping[str, Sequence[HeadDelta]],
        before: Mapping[str, Quantized],
        *,
        last: bool,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any] | None:
        """The line on a round that was just merged and requantized; None if told to stop meanwhile.

        Args:
            tokens: of the run. contributions, heads: what was merged, as `Master.merge` took and gave it.
            before: the base of the version before. last: this is the run's last version.
            is_stopped: asked before every module.
        """
        began_s = perf_counter()
        torch.set_num_threads(self._master.recipe.server.num_threads)
        quantized = self._master.to_publish(last=last)
        try:
            modules = {}
            for name in self._modules:
                if is_stopped():
                    return None
                modules[name] = _rounded(self._of_module(name, heads[name], quantized[name], before[name]))
            adapted, dense = self._noise(version - 1, contributions, heads)
        finally:
            torch.set_num_threads(1)
        whole = _rounded(
            {
                "noise_scale": adapted.scale,
                "signal": adapted.signal,
                "noise": adapted.noise,
                "noise_scale_dense": dense.scale,
                "diagnose_s": perf_counter() - began_s,
            }
        )
        return {"version": version, "tokens": tokens, **whole, "modules": modules}

    def _of_module(
        self, name: str, heads: Sequence[HeadDelta], quantized: Tensor, before: Quantized
    ) -> dict[str, float]:
        base = self._master.base[name]
        cosines = diagnostics.of_pairs(diagnostics.cosines(heads)).tolist()
        columns, rows = _distances(heads)
        of_round = diagnostics.singular(merge.mean_delta(heads)).values
        error = error_in_steps = 0.0
        if self._master.recipe.lora.merge != "never":  # with which W itself is published
            error, error_in_steps = diagnostics.quantization_error(quantized, base)
        return {
            "cosine_mean": _mean(cosines),
            "cosine_max": max(filter(math.isfinite, cosines), default=math.nan),
            "grassmann_columns": columns,
            "grassmann_rows": rows,
            **self._accumulated(name, self._master.weights[name]),
            "round_effective_rank": diagnostics.effective_rank(of_round),
            "round_stable_rank": diagnostics.stable_rank(of_round),
            "quantization_error": error,
            "quantization_error_steps": error_in_steps,
            "codes_flipped": diagnostics.codes_flipped(before, base),
        }

    def _accumulated(self, name: str, weight: Tensor) -> dict[str, float]:
        """Of the update since the run began, W - W_0."""
        if not self._path.exists():
            return dict.fromkeys(("effective_rank", "stable_rank", "amplification"), math.nan)
        initial = self._initial([name])[name]
        update = diagnostics.singular(weight - initial)
        return {
            "effective_rank": diagnostics.effective_rank(update.values),
            "stable_rank": diagnostics.stable_rank(update.values),
            "amplification": diagnostics.amplification(update, initial, self._master.plan.adapted[name].rank),
        }

    def _initial(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The initial weights of these modules."""
        try:
            with safe_open(self._path, "pt") as file:
                if self._master.recipe.keeps_initial:
                    return {name: file.get_tensor(name) for name in names}
                bases = {
                    name: Quantized(
                        self._master.recipe.in_round(0).base.quant,
                        self._master.base[name].shape,
                        codes=file.get_tensor(name + CODES),
                        scales=file.get_tensor(name + SCALES),
                    )
                    for name in names
                }
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self._path}: damaged ({error}); delete it to go on without") from None
        return {name: quantize.dequantize(base) for name, base in bases.items()}

    def _noise(
        self, number: int, contributions: Sequence[Received], heads: Mapping[str, Sequence[HeadDelta]]
    ) -> tuple[Noise, Noise]:
        """In a round: of all weights, and of the dense ones alone, which every worker trains in one space."""
        workers = len(contributions)
        owners = [k for k, contribution in enumerate(contributions) for _ in range(contribution.heads)]
        dense = torch.zeros(workers, workers, dtype=torch.float64)
        for name in self._master.plan.dense:
            deltas = [contribution.tensors[name + DENSE] for contribution in contributions]
            dense += merge.dense_products(deltas, [1.0] * workers)
        # A worker's delta is the mean of its heads'.
        share = torch.zeros(workers, len(owners), dtype=torch.float64)
        for k, owner in enumerate(owners):
            share[owner, k] = 1 / contributions[owner].heads
        whole, plan = dense.clone(), self._master.plan_in(number)
        for name, of_module in heads.items():
            scales = [plan.scale_at(name, contributions[owner].scale) for owner in owners]
            deltas_of_heads = [replace(h, weight=s) for h, s in zip(of_module, scales, strict=True)]
            whole += share @ merge.products(deltas_of_heads) @ share.T
        tokens = [contribution.tokens for contribution in contributions]
        return diagnostics.gradient_noise(whole, tokens), diagnostics.gradient_noise(dense, tokens)


def _distances(heads: Sequence[HeadDelta]) -> tuple[float, float]:
    """Mean Grassmann distances of heads' column spaces and of their row spaces."""
    spread = heads[:: -(-len(heads) // _MOST_HEADS)]
    found = [diagnostics.subspaces(head) for head in spread]
    columns, rows = zip(*found, strict=True)
    return _mean_distance(columns), _mean_distance(rows)


def _mean_distance(bases: Sequence[Tensor]) -> float:
    return _mean([diagnostics.grassmann_distance(one, other) for one, other in combinations(bases, 2)])


def _mean(numbers: Sequence[float]) -> float:
    """Of those that are defined: a head that has not moved has no direction."""
    defined = list(filter(math.isfinite, numbers))
    return sum(defined) / len(defined) if defined else math.nan


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers with the digits that mean something."""
    return {key: float(f"{number:.{_DIGITS}g}") for key, number in numbers.items()}
