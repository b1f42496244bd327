"""Workers' heads as PEFT adapters.

A worker computes deq(Q) + s (B A - B' A') with its own dense parameters. So it is exported as two things: a
base, that is deq(Q) of the version that the worker held when it saved its state, with the worker's dense
parameters, in transformers' layout; and for each of its heads an adapter on it. Where the head has merged
factors its adapter has twice the lora_rank, [B - B', B'] [A; A - A'].

A worker saves its state before it sends a contribution, and when it is stopped. So at the end of a run these
are the heads that were merged last, on the base that they were trained on.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lte import lowrank, quantize, recipes
from lte.compress import A, B
from lte.config import Recipe
from lte.errors import RunError, UserError
from lte.export.merged import in_transformers, written_whole
from lte.models import hf
from lte.models.counterparts import counterpart_of
from lte.nn import HeadSpec, experts_split, from_matrix, places_in_stacks
from lte.server import folder as run_folder
from lte.server import recovery
from lte.server.master import Master
from lte.worker import state
from lte.worker.state import Saved

_NAME = "default"
"""PEFT's name for the one adapter of a model."""
_NO_PLACE = re.compile(r"Module '(\w+)' is incompatible")
"""How PEFT says where it puts no heads."""


@dataclass(frozen=True)
class Factors:
    """What a head adds to a weight (out, in): scale * left @ right.

    Attributes:
        left: (out, k). right: (k, in).
    """

    left: Tensor
    right: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.right)


def to_peft(run: Path, out: Path, states: Sequence[Path] = ()) -> list[str]:
    """Write `out/WORKER-head-K`, an adapter of each head, and `out/base-K`, the models that they are on.

    Args:
        states: folders of workers' states, named for these; by default those in the run's folder.
        out: a folder that is not there, or empty.

    Returns:
        A line on each worker.

    Raises:
        RunError: there is no state of a worker, or none on a version that the run still holds.
        UserError: PEFT is not installed, or has no such heads; or `out` holds something.
    """
    recipe = recipes.recipe_of(run)
    if recipe.server.shards > 1:
        raise RunError(
            f"{run}: heads of a run with server.shards = {recipe.server.shards} are not exported yet; its"
            " merged model is (--format hf or safetensors)"
        )
    _need_peft()
    workers = _saved(run, states)
    with written_whole(out) as folder:
        writer = _Writer(recipe, folder, out)
        for version in sorted({saved.version for saved in workers.values()}):
            on_it = {name: saved for name, saved in workers.items() if saved.version == version}
            master = _master_at(run, recipe, version)
            if master is None:
                gone = f"left out, as {run} holds version {version} no more"
                writer.lines += [f"{name}: {gone}" for name in on_it]
            elif master.recipe.train.full_rank:
                whole = f"left out, as the round on version {version} trained weights of full rank"
                writer.lines += [f"{name}: {whole}" for name in on_it]
            elif not master.plan.adapted:
                writer.lines += [f"{name}: left out, as no module has heads (lora.modules)" for name in on_it]
            else:
                for name, saved in on_it.items():
                    writer.write(name, saved, master)
        if not writer.bases:
            raise RunError("; ".join(writer.lines))
    return writer.lines


def _saved(run: Path, states: Sequence[Path]) -> dict[str, Saved]:
    """The states of a run's workers, by the names of their folders.

    Raises:
        RunError: a folder that was named holds none of this run, or there is none at all.
    """
    run_id, workers = run_folder.run_id(run), dict[str, Saved]()
    for path in states or sorted((run / "workers").glob("*")):
        saved = state.load(path)
        if saved is not None and saved.run_id == run_id and path.name not in workers:
            workers[path.name] = saved
        elif states:
            raise RunError(f"--state: {path} holds no state of a worker of {run}, or another has its name")
    if not workers:
        raise RunError(
            f"{run}: no worker's state is there; workers that keep one elsewhere (lte worker --state FOLDER)"
            " are exported by --state FOLDER"
        )
    return workers


def _master_at(run: Path, recipe: Recipe, version: int) -> Master | None:
    """The master of a version, or None where the run's folder leads to it no more."""
    master = Master(recipes.initial_model(recipe), recipe)
    progress = recovery.recover(run, master, until=version).progress
    return master if progress.version == version and progress.base_digest else None


class _Writer:
    """Writes the heads of one worker after another.

    Attributes:
        bases: name of a base, by its digest. lines: on each worker, for people.
    """

    def __init__(self, recipe: Recipe, folder: Path, final: Path) -> None:
        """Args: folder: to write to. final: what its name will be."""
        self.bases, self.lines = dict[str, str](), list[str]()
        self._recipe, self._folder, self._final = recipe, folder, final
        self._model = recipes.initial_model(recipe)

    def write(self, name: str, saved: Saved, master: Master) -> None:
        """Write the heads of a worker, and their base if no other worker has it."""
        _fill(self._model, saved, master)
        theirs = in_transformers(self._model, self._recipe)
        digest = quantize.digest(sorted(theirs.state_dict().items()))
        if digest not in self.bases:
            self.bases[digest] = f"base-{len(self.bases)}"
            with hf.quiet():
                theirs.save_pretrained(self._folder / self.bases[digest])
        base = self._final.absolute() / self.bases[digest]
        with experts_split(theirs):
            heads = [_of_modules(theirs, factors, self._recipe) for factors in _heads(saved, master)]
        for k, factors in enumerate(heads):
            _save_adapter(theirs, factors, self._recipe, base, self._folder / f"{name}-head-{k}")
        self.lines.append(f"{name}: {len(heads)} of version {saved.version}, on {base.name}")


@torch.no_grad()
def _fill(model: nn.Module, saved: Saved, master: Master) -> None:
    """Give a plain model what a worker held beside its heads."""
    master.fill(model, "published")
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for site, spec in master.plan.adapted.items():
        named[spec.parameter].copy_(from_matrix(quantize.dequantize(master.base[site]), spec))
    for name in master.plan.dense:
        named[name].copy_(saved.tensors[f"parameter/{name}"])
    for name in master.plan.statistics:
        named[name].copy_(saved.tensors[f"buffer/{name}"])


def _heads(saved: Saved, master: Master) -> list[dict[HeadSpec, Factors]]:
    """What each head of a worker adds to the base, by site. Heads that all see the whole batch are one."""
    adapted, lora, tensors = master.plan.adapted, master.recipe.lora, saved.tensors
    own_scale = float(saved.numbers.get("scale", 0.0))
    own_B = {site: tensors[f"parameter/{site}.lora_B"] for site in adapted}
    num_heads = max((len(factor) for factor in own_B.values()), default=0)
    if not master.recipe.is_A_given:
        own_A = {site: tensors[f"parameter/{site}.lora_A"] for site in adapted}
    else:
        rank = max((factor.shape[-1] for factor in own_B.values()), default=0)
        given = master.given_A(lora.first_head(saved.slot), num_heads, rank, int(saved.numbers["draw"]))
        own_A = {site: given[site + A] for site in adapted}
    is_one = lora.batch == "whole" and num_heads > 1
    heads: list[dict[HeadSpec, Factors]] = [{} for _ in range(1 if is_one else num_heads)]
    for site, spec in adapted.items():
        left, right, scale = own_B[site], own_A[site], master.plan.scale_at(site, own_scale)
        merged_A, merged_B = (tensors.get(f"merged/{site}{factor}") for factor in (A, B))
        if merged_A is not None and merged_B is not None and merged_B.any():
            left, right = lowrank.stacked(right, left, merged_A, merged_B)
        if is_one:
            left, right = (factor.unsqueeze(0) for factor in lowrank.side_by_side(right, left))
            scale = scale / num_heads
        for k, head in enumerate(heads):
            head[spec] = Factors(left[k], right[k], scale)
    return heads


def _of_modules(theirs: nn.Module, factors: Mapping[HeadSpec, Factors], recipe: Recipe) -> dict[str, Factors]:
    """The same by modules of the model there, experts split: all that share a weight add the same to it.

    Raises:
        UserError: PEFT has no such heads.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in theirs.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters, counterpart = dict(theirs.named_parameters()), counterpart_of(recipe.model)
    found = {}
    for spec, whole in factors.items():
        if spec.ending != ".weight":
            raise UserError(f"{spec.parameter}: PEFT has no heads for projections of an attention module")
        for part, left in counterpart.cut(spec.parameter, whole.left):
            for name in names[id(parameters[part])]:
                module = name.removesuffix(".weight")
                right = _with_groups(theirs.get_submodule(module), whole.right, module)
                found[module] = Factors(left, right, whole.scale)
    return found


def _with_groups(module: nn.Module, right: Tensor, name: str) -> Tensor:
    """A of a convolution with groups as PEFT has it: over all channels, with rows of its own for each group.

    Raises:
        UserError: PEFT computes something else with such a convolution.
    """
    if not isinstance(module, nn.Conv2d):
        return right
    if module.dilation != (1, 1) or module.padding_mode != "zeros":
        raise UserError(f"{name}: PEFT's heads have no dilation and no padding but zeros")
    if module.groups == 1:
        return right
    whole: Tensor = torch.block_diag(*[right] * module.groups)  # type: ignore[no-untyped-call]
    return whole


def _save_adapter(
    theirs: nn.Module, factors: Mapping[str, Factors], recipe: Recipe, base: Path, folder: Path
) -> None:
    """Write one head, by PEFT itself. The model is as before afterwards."""
    from peft import LoraConfig, get_peft_model

    places = places_in_stacks(theirs)
    of_experts = _of_experts(places, factors)
    of_modules = {name: head for name, head in factors.items() if name not in places}
    both = of_modules | {name: heads[0] for name, heads in of_experts.items()}
    ranks = {name: head.rank for name, head in both.items()}
    alphas = {name: head.scale * head.rank for name, head in both.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = LoraConfig(
        r=int(rank),
        lora_alpha=alpha,  # type: ignore[arg-type]
        rank_pattern={_only(name): own for name, own in ranks.items() if own != rank},
        alpha_pattern={_only(name): own for name, own in alphas.items() if own != alpha},
        target_modules=list(of_modules),
        target_parameters=list(of_experts) or None,
        task_type="CAUSAL_LM" if recipe.data.kind == "text" else None,
        inference_mode=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights are transposed, tied, or in groups, which is seen to
        try:
            adapted: Any = get_peft_model(theirs, config)
        except ValueError as error:
            raise _not_taken(error, recipe) from None
        adapted.peft_config[_NAME].base_model_name_or_path = str(base)  # it forgets what a config says
        with torch.no_grad():
            for name, head in of_modules.items():
                _set(adapted.base_model.model.get_submodule(name), head)
            for name, heads in of_experts.items():
                _set_experts(adapted.base_model.model, name, heads)
        adapted.save_pretrained(folder, save_embedding_layers=False)
        adapted.unload()


def _not_taken(error: ValueError, recipe: Recipe) -> UserError:
    """Of heads that PEFT puts on no such model, as on a Mamba's `out_proj`, whose weight its kernels read."""
    found = _NO_PLACE.search(str(error))
    cure = f'; heads of a run with lora.exclude=["*.{found[1]}"] can be exported' if found else ""
    return UserError(f"PEFT takes no such heads of {recipe.model.architecture} ({hf.in_a_line(error)}){cure}")


def _set(layer: Any, head: Factors) -> None:
    """Give one of PEFT's layers its factors."""
    if _NAME in layer.lora_embedding_A:
        layer.lora_embedding_A[_NAME].copy_(head.left.T)
        layer.lora_embedding_B[_NAME].copy_(head.right.T)
    else:
        for linear, factor in ((layer.lora_A[_NAME], head.right), (layer.lora_B[_NAME], head.left)):
            linear.weight.copy_(factor.reshape(linear.weight.shape))


def _of_experts(
    places: Mapping[str, tuple[str, int]], factors: Mapping[str, Factors]
) -> dict[str, list[Factors]]:
    """By the name of their parameter the heads of all of its experts, of one rank and scale."""
    stacks: dict[str, list[str]] = {}
    for name, (parameter, _) in places.items():
        stacks.setdefault(parameter, []).append(name)
    found = {}
    for parameter, names in stacks.items():
        own = [factors[name] for name in names if name in factors]
        if own:
            like = max(own, key=lambda head: head.rank)
            found[parameter] = [_as(like, factors.get(name)) for name in names]
    return found


def _as(like: Factors, head: Factors | None) -> Factors:
    """A head, or none, as one of another's rank and scale."""
    left, right = torch.zeros_like(like.left), torch.zeros_like(like.right)
    if head is not None:
        left[:, : head.rank], right[: head.rank] = head.left * (head.scale / like.scale), head.right
    return Factors(left, right, like.scale)


def _set_experts(adapted: nn.Module, name: str, heads: Sequence[Factors]) -> None:
    """Give PEFT's layer of a parameter with stacked experts the factors of all of them: A (experts k, in),
    and B (out, k experts)."""
    module, _, parameter = name.rpartition(".")
    layer: Any = adapted.get_submodule(module)
    while layer.parameter_name != parameter:  # one lies around the other
        layer = layer.base_layer
    layer.lora_A[_NAME].weight.copy_(torch.cat([head.right for head in heads]))
    layer.lora_B[_NAME].weight.copy_(torch.stack([head.left for head in heads], -1).flatten(1))


def _only(name: str) -> str:
    """PEFT's pattern for this module alone, and none whose name ends like it."""
    return f"^{re.escape(name)}"


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError("adapters need the peft library; pip install 'lte[hf]'") from None
