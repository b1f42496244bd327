"""What settings of a recipe must be to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lte.config.recipe import Model, Recipe

_HEADER_ROOM = 1 << 20
"""Bytes of a message beside the part that it carries."""
_READS = {"gpt": ("text",), "vit": ("images",), "linear": ("regression",), "transformers": ("text", "images")}
_OF_REFERENCES = (
    "num_layers",
    "width",
    "num_attention_heads",
    "mlp_width",
    "tie_embeddings",
    "patch_size",
)
"""Settings of the reference models alone."""
_OF_BOTH = {
    "vocab_size": "vocab_size",
    "image_size": "image_size",
    "num_channels": "channels",
    "num_labels": "num_classes",
}
"""What a transformers model takes from the recipe's own settings: its name there, and the recipe's."""


def check(recipe: Recipe) -> list[str]:
    """Faults that no single field shows, one line each, in whichever phase."""
    faults = _faults(recipe)
    starts = [phase.from_round for phase in recipe.train.phases]
    if starts != sorted(set(starts)):
        faults.append(f"train.phases: their from_round must rise, not be {', '.join(map(str, starts))}")
    elif starts and starts[-1] >= recipe.train.rounds:
        faults.append(
            f"train.phases: round {starts[-1]} does not come, as train.rounds is {recipe.train.rounds} (the"
            " first one is 0)"
        )
    elif recipe.train.overlap and any(phase.changes_heads for phase in recipe.train.phases):
        faults.append(
            "train.overlap: contradicts train.phases of other heads (rank, merge, full_rank): a contribution"
            " may be under way when they begin"
        )
    elif _changes_what_is_never_merged(recipe, starts):
        faults.append(
            "lora.merge: never contradicts train.phases of other heads or another base (rank, merge,"
            " full_rank, base_quant)"
        )
    else:
        for start in starts:
            later = [line for line in _faults(recipe.in_round(start)) if line not in faults]
            faults += [f"train.phases: from round {start} on: {line}" for line in later]
    return faults


def _changes_what_is_never_merged(recipe: Recipe, starts: Sequence[int]) -> bool:
    """Whether heads that are never merged, or their base, are others in a later phase."""
    first, *later = (recipe.in_round(start) for start in (0, *starts))
    return any(
        "never" in (first.lora.merge, other.lora.merge)
        and not (other.has_heads_of(first) and other.base.quant == first.base.quant)
        for other in later
    )


def _faults(recipe: Recipe) -> list[str]:
    """What contradicts each other in the settings of one phase."""
    lora, model, train, outer = recipe.lora, recipe.model, recipe.train, recipe.outer
    schedule = recipe.schedule
    period_steps = schedule.restart_rounds * train.local_steps
    defaults = {field.name: field.default for field in dataclasses.fields(Model)}
    foreign = next((name for name in _OF_REFERENCES if getattr(model, name) != defaults[name]), None)
    twice = next((name for name in _OF_BOTH if name in model.config), None)
    inits = [lora.init, *(override.init for override in lora.overrides)]
    other_init = next((init for init in inits if init not in (None, "semi-orthogonal")), None)
    nests = lora.nested != "none"
    cuts = nests and lora.keeps_factors
    is_plain = (outer.name, outer.combine, outer.when) == ("average", "products", "round")
    most_rank = max([lora.rank, *(override.rank or 0 for override in lora.overrides)])
    most_of_run = max(most_rank, recipe.as_built.lora.rank)
    most_drawn = max(lora.nested_ranks, default=most_rank)
    merges = {lora.merge, *(phase.merge for phase in train.phases)}
    undivided = _undivided(recipe)
    pieces = lora.num_slices * train.accumulate
    rules = [
        (
            recipe.data.kind in _READS[model.name],
            f"model.name: {model.name} is no model of data.kind = {recipe.data.kind}; gpt reads text, vit"
            " images, transformers both, linear fits a regression",
        ),
        (
            (model.name == "transformers") == (model.architecture is not None),
            "model.architecture: model.name = transformers and the name of a model there, such as llama or"
            " vit, need each other",
        ),
        (
            model.name == "transformers" or not model.config,
            f"model.config: holds settings of model.name = transformers, not of {model.name}",
        ),
        (
            model.name != "transformers" or foreign is None,
            f"model.{foreign}: is a setting of gpt and vit; transformers' have names of their own, such as"
            " model.config.hidden_size",
        ),
        (
            twice is None,
            f"model.config.{twice}: is model.{_OF_BOTH.get(twice or '')} here, which transformers' models"
            " get, too",
        ),
        (
            model.name != "vit" or model.width % model.num_attention_heads == 0,
            f"model.num_attention_heads: {model.num_attention_heads} must divide model.width ({model.width})",
        ),
        (
            model.name != "vit" or model.image_size % model.patch_size == 0,
            f"model.patch_size: {model.patch_size} must divide model.image_size ({model.image_size})",
        ),
        (
            model.init_from is not None or model.init_weights == "master",
            f"model.init_weights: {model.init_weights} is of a run to start from, model.init_from=runs/...",
        ),
        (
            model.init_from is None or Path(model.init_from) != Path(recipe.run.dir),
            f"model.init_from: {model.init_from} is run.dir itself, which goes on with run.resume=auto",
        ),
        (
            recipe.data.augment == "none" or recipe.data.kind == "images",
            f"data.augment: {recipe.data.augment} is for data.kind = images",
        ),
        (
            model.name != "gpt" or model.width % (2 * model.num_attention_heads) == 0,
            f"model.num_attention_heads: {model.num_attention_heads} must divide model.width"
            f" ({model.width}) into an even number of features",
        ),
        (
            train.batch_size % lora.num_slices == 0,
            f"train.batch_size: {train.batch_size} cannot be cut into lora.heads ({lora.heads}) equal slices",
        ),
        (
            train.batch_size % lora.num_slices != 0
            or train.batch_size // lora.num_slices % train.accumulate == 0,
            f"train.accumulate: the {train.batch_size // lora.num_slices} samples of a head (train.batch_size"
            f"{' / lora.heads' if lora.num_slices > 1 else ''}) cannot be cut into {train.accumulate} equal"
            " pieces",
        ),
        (
            train.batch_size % pieces != 0 or train.batch_size // pieces % recipe.worker.processes == 0,
            f"worker.processes: {recipe.worker.processes} cannot share the"
            f" {train.batch_size // pieces} samples"
            f"{' of a head' if lora.num_slices > 1 else ''} of a micro-batch equally",
        ),
        (
            recipe.worker.processes == 1 or train.method == "lte",
            "worker.processes: workers of train.method=ddp are one process each; set train.workers",
        ),
        (
            recipe.worker.processes == 1 or not recipe.server.address.startswith("inprocess://"),
            f"worker.processes: {recipe.worker.processes} contradict server.address ="
            f" {recipe.server.address}, where a worker is no process, but a thread",
        ),
        (
            (lora.scaling == "rank-stabilized") == (lora.alpha is not None),
            "lora.scaling, lora.alpha: rank-stabilized and an alpha need each other",
        ),
        (
            lora.scaling == "given" or all(override.scale is None for override in lora.overrides),
            "lora.overrides: a scale of its own contradicts lora.scaling = rank-stabilized",
        ),
        (
            lora.A != "rotating" or lora.merge == "reset-b",
            f"lora.A: rotating needs lora.merge = reset-b, not {lora.merge} (a kept B would act"
            " through another A)",
        ),
        (
            train.method == "lte" or lora.merge != "never",
            f"lora.merge: never has no weights to quantize, as train.method = {train.method} has",
        ),
        (
            train.method == "lte" or not train.phases,
            f"train.phases: are of heads and merges, which train.method = {train.method} has none of",
        ),
        (
            not train.full_rank or lora.merge == "reset-b",
            f"train.full_rank: needs lora.merge = reset-b, not {lora.merge} (a phase may set both)",
        ),
        (
            not train.full_rank or lora.num_slices == lora.heads,
            f"train.full_rank: lora.heads = {lora.heads} that all see the whole batch would be one and the"
            " same; use lora.batch = sliced",
        ),
        (
            lora.A == "trained" or lora.merge != "reset",
            f"lora.A: {lora.A} contradicts lora.merge = reset, which redraws A; use reset-b",
        ),
        (
            lora.merge != "never" or train.workers == 1 or recipe.averages_factors,
            f"lora.merge: never is for one worker, not train.workers = {train.workers}, whose heads would"
            " never meet; outer.combine = factors averages them",
        ),
        (
            lora.merge == "never" or not recipe.averages_factors,
            f"outer.combine: factors are averaged in place of merging, which needs lora.merge = never, not"
            f" {lora.merge}",
        ),
        (
            not recipe.averages_factors or recipe.compress.truncate_rank is None,
            "compress.truncate_rank: is for contributions to products, not for outer.combine = factors",
        ),
        (
            lora.merge != "never" or lora.num_slices == 1,
            f"lora.merge: never would leave lora.heads = {lora.heads} that are alone on their slices; they"
            " need lora.batch = whole",
        ),
        (
            lora.merge != "never" or (outer.name == "average" and not outer.weight_decay),
            "lora.merge: never leaves the outer optimizer nothing to move: outer.name = average, and no"
            " outer.weight_decay",
        ),
        (
            lora.merge != "never" or not recipe.keeps_initial,
            "base.keep_initial: is for a master that merges; with lora.merge = never heads stand on the base",
        ),
        (
            lora.merge != "never" or outer.when == "round",
            "lora.merge: never has rounds; outer.when = arrival merges",
        ),
        (
            lora.merge != "never" or not outer.publish_ema,
            "outer.publish_ema: cannot be told in heads, which are all that lora.merge = never trains",
        ),
        (
            lora.merge != "never" or outer.bound_norm is None,
            "outer.bound_norm: compares deltas that are merged; with lora.merge = never none is",
        ),
        (
            lora.moments != "transport" or lora.A == "rotating",
            "lora.moments: transport needs lora.A = rotating (clear or keep otherwise)",
        ),
        (
            lora.moments.startswith("prune") == (lora.prune is not None),
            "lora.moments, lora.prune: prune-magnitude or prune-random and a share, such as 0.9, need each"
            " other",
        ),
        (
            not lora.moments.startswith("prune") or "reset" in merges or lora.A == "rotating",
            f"lora.moments: {lora.moments} needs merges that redraw A, lora.merge = reset (or lora.A ="
            " rotating), in some rounds",
        ),
        (
            lora.moments in ("keep", "clear") or "8bit" not in recipe.optimizer.name,
            f"lora.moments: {lora.moments} cannot carry moments of 8 bits (optimizer.name ="
            f" {recipe.optimizer.name}); use clear",
        ),
        (
            lora.subspace != "disjoint" or other_init is None,
            f"lora.subspace: disjoint needs lora.init = semi-orthogonal, not {other_init} (in"
            " lora.overrides, too)",
        ),
        (
            nests or (lora.nested_min_rank == 1 and not lora.nested_ranks),
            "lora.nested_min_rank, lora.nested_ranks: need lora.nested = unfrozen or frozen",
        ),
        (
            lora.nested_min_rank == 1 or not lora.nested_ranks,
            "lora.nested_min_rank: contradicts lora.nested_ranks, which names every rank that is drawn",
        ),
        (
            lora.nested_min_rank <= most_rank,
            f"lora.nested_min_rank: {lora.nested_min_rank} is more than the largest lora_rank ({most_rank})",
        ),
        (
            most_drawn <= most_of_run,
            f"lora.nested_ranks: {most_drawn} is more than the largest lora_rank ({most_of_run})",
        ),
        (
            most_drawn >= most_rank,
            f"lora.nested_ranks: must hold the largest lora_rank ({most_rank}), or no step trains what is"
            " beyond the others",
        ),
        (
            not nests or recipe.optimizer.name in ("adamw", "sgd"),
            f"lora.nested: needs an optimizer that steps each number by itself, adamw or sgd, not"
            f" {recipe.optimizer.name}",
        ),
        (
            not cuts or (train.workers == 1 and lora.num_slices == 1),
            f"lora.nested: with lora.merge = {lora.merge} it needs train.workers = 1, and lora.heads = 1 or"
            " lora.batch = whole, as what is merged of others cannot be cut to a rank; use reset-b",
        ),
        (
            not cuts or (is_plain and not outer.weight_decay),
            f"lora.nested: with lora.merge = {lora.merge} it needs outer.name = average, outer.combine ="
            " products, outer.when = round and no outer.weight_decay, or ranks could not be taken out of the"
            " master",
        ),
        (
            lora.subspace != "shared" or lora.num_slices == lora.heads,
            f"lora.subspace: shared would make lora.heads = {lora.heads} that all see the whole batch one and"
            " the same; use lora.batch = sliced",
        ),
        (
            not train.overlap or (lora.A != "rotating" and lora.merge != "reset"),
            "train.overlap: needs an A that merges do not redraw (lora.A trained or frozen, lora.merge"
            " reset-b or reset-less)",
        ),
        (
            not train.overlap or train.steps_ahead <= train.local_steps,
            f"train.overlap_steps: {train.overlap_steps} is more than train.local_steps"
            f" ({train.local_steps})",
        ),
        (
            train.overlap or train.overlap_steps is None,
            "train.overlap_steps: needs train.overlap=true",
        ),
        (
            recipe.compress.error_feedback or not train.overlap,
            "compress.error_feedback: false cannot be measured with train.overlap=true",
        ),
        (
            train.workers <= recipe.server.max_workers,
            f"server.max_workers: {recipe.server.max_workers} is less than train.workers ({train.workers})",
        ),
        (
            recipe.compress.part_bytes + _HEADER_ROOM <= recipe.server.max_message_bytes,
            f"compress.part_bytes: {recipe.compress.part_bytes} does not fit into server.max_message_bytes"
            f" ({recipe.server.max_message_bytes}), which must be {_HEADER_ROOM} larger",
        ),
        (
            recipe.base.keep_scale_from <= 1 <= recipe.base.keep_scale_to,
            f"base.keep_scale_from, keep_scale_to: {recipe.base.keep_scale_from:g} to"
            f" {recipe.base.keep_scale_to:g} must hold 1",
        ),
        (
            schedule.name != "jagged-cosine" or schedule.restart_warmup_steps <= period_steps,
            f"schedule.restart_warmup_steps: {schedule.restart_warmup_steps} is more than the {period_steps}"
            " local steps between restarts (schedule.restart_rounds * train.local_steps)",
        ),
        (
            outer.name != "average" or (outer.lr == 1.0 and outer.momentum == 0.0),
            "outer.lr, outer.momentum: need outer.name = sgd (average has neither)",
        ),
        (
            outer.name == "average" or outer.dense or bool(lora.modules),
            f"outer.name: {outer.name} acts on adapted weights, and lora.modules = [] adapts none; set"
            " outer.dense=true",
        ),
        (
            outer.name != "adam" or outer.lr < 1,
            f"outer.lr: with outer.name = adam a merge would move every weight by {outer.lr:g}; try 1e-3",
        ),
        (
            outer.name != "adam" or outer.momentum == 0.0,
            "outer.momentum: is SGD's; outer.name = adam has outer.beta1",
        ),
        (
            outer.when == "arrival" or (outer.staleness, outer.max_staleness) == ("constant", None),
            "outer.staleness, outer.max_staleness: need outer.when = arrival (in a round nobody is behind)",
        ),
        (
            outer.when == "round" or outer.name != "adam",
            "outer.name: adam, which moves by its rate however small a delta is, needs outer.when = round",
        ),
        (
            outer.when == "round" or outer.weights == "heads" or recipe.server.quorum > 1,
            "outer.weights: tokens compares contributions that are merged together; with outer.when = arrival"
            " it needs server.quorum = 2 or more",
        ),
        (
            outer.when == "round" or not train.phases,
            "train.phases: begin with a round; they need outer.when = round",
        ),
        (
            outer.when == "round" or outer.bound_norm is None,
            "outer.bound_norm, outer.trim: compare the contributions of a round; need outer.when = round",
        ),
        (
            outer.ema is not None or not outer.publish_ema,
            "outer.publish_ema: needs an average to publish, outer.ema",
        ),
        (
            outer.trim is None or outer.bound_norm is not None,
            "outer.trim: looks at directions alone; it needs outer.bound_norm, such as 1.5, against lengths",
        ),
        (
            recipe.server.quorum <= train.workers,
            f"server.quorum: {recipe.server.quorum} is more than train.workers ({train.workers})",
        ),
        (
            recipe.grace_s <= recipe.server.deadline_s,
            f"server.grace_s: {recipe.grace_s:g} s is more than server.deadline_s"
            f" ({recipe.server.deadline_s:g} s), at which a round with its quorum closes anyway",
        ),
        (
            recipe.heartbeat_s * 3 <= recipe.server.silence_s,
            f"server.silence_s: {recipe.server.silence_s:g} s must be at least 3 times"
            f" worker.heartbeat_s ({recipe.heartbeat_s:g} s)",
        ),
        (
            recipe.server.silence_s <= recipe.worker.patience_s,
            f"worker.patience_s: {recipe.worker.patience_s:g} s is less than server.silence_s"
            f" ({recipe.server.silence_s:g} s): a pause that the server forgives would end a worker",
        ),
        (
            recipe.server.address.partition("://")[0] in ("tcp", "ipc", "collective", "inprocess"),
            f"server.address: {recipe.server.address!r} must start with tcp://, ipc://, collective:// or"
            " inprocess://",
        ),
        (
            recipe.server.shards == 1 or undivided is None,
            f"server.shards: {recipe.server.shards} servers with a part of the model each cannot do what"
            f" {undivided} asks for",
        ),
        (
            (recipe.server.key is None) == (recipe.server.allow is None),
            "server.key, server.allow: the server's key and the list of those allowed need each other",
        ),
        (
            recipe.server.key is None or recipe.server.address.startswith("tcp://"),
            f"server.key: keys are for tcp:// addresses, not {recipe.server.address}",
        ),
    ]
    return [line for holds, line in rules if not holds]


def _undivided(recipe: Recipe) -> str | None:
    """A setting that needs the whole model in one server process, or one that is not divided yet."""
    found = {
        f"server.address={recipe.server.address}": not recipe.server.address.startswith(("tcp://", "ipc://")),
        "train.method=ddp": recipe.train.method == "ddp",
        "train.phases": bool(recipe.train.phases),
        "lora.merge=never": recipe.lora.merge == "never",
        "outer.when=arrival": recipe.outer.when == "arrival",
        "outer.combine=factors": recipe.outer.combine == "factors",
        "outer.bound_norm": recipe.outer.bound_norm is not None,
        "log.diagnostics_every": recipe.log.diagnostics_every > 0,
        "compress.measure_entropy": recipe.compress.measure_entropy,
    }
    return next((setting for setting, is_set in found.items() if is_set), None)
