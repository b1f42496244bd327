"""The recipe: frozen dataclasses. Every default stands here and nowhere else.

Units are part of the names (`_s`, `_bytes`, `_tokens`) or of the descriptions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from lte.lowrank import Init, Subspace
from lte.quantize import Quant


def _no_truth(value: Any) -> Any:
    """Python takes true for 1; a person who writes `train.rounds=true` means something else."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "a number")
    return value


def _none_if_said(value: Any) -> Any:
    return None if value == "none" else value


Codec = Literal["fp32", "bf16", "int8", "int4", "int2"]
"""How small tensors travel (see `compress.blockwise`)."""

_MAX_INT = 2**63 - 1
"""What travels, and what torch counts with."""
Count = Annotated[int, Field(ge=1, le=_MAX_INT), BeforeValidator(_no_truth)]
Whole = Annotated[int, Field(ge=0, le=_MAX_INT), BeforeValidator(_no_truth)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_truth)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_truth)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), BeforeValidator(_no_truth)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_no_truth)]
Multiple = Annotated[float, Field(ge=1, allow_inf_nan=False), BeforeValidator(_no_truth)]
Name = Annotated[str, Field(min_length=1)]
Merge = Literal["reset-less", "reset-b", "reset", "never"]
_OrNone = BeforeValidator(_none_if_said)

_STRICT = ConfigDict(extra="forbid")


def _doc(default: Any, text: str) -> Any:
    """A field with its default and the description that `lte train --help` prints."""
    if isinstance(default, dict):  # equal recipes have equal hashes without it, too
        return field(default_factory=default.copy, hash=False, metadata={"doc": text})
    return field(default=default, metadata={"doc": text})


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run lives and how it starts."""

    __pydantic_config__ = _STRICT
    dir: Name = _doc("runs/default", "folder that the run writes")
    seed: Whole = _doc(0, "seed of initialization, heads and data order")
    resume: Literal["auto", "never", "must"] = _doc(
        "auto", "auto: go on with the run in run.dir, if any; never: move it aside; must: demand it"
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained: a small reference model, or any of the transformers library from scratch."""

    __pydantic_config__ = _STRICT
    name: Literal["gpt", "vit", "linear", "transformers"] = _doc(
        "gpt",
        "gpt: a decoder with rotary positions; vit: of images; linear: a matrix; transformers: that library's"
        " (lte[hf])",
    )
    architecture: Annotated[Name | None, _OrNone] = _doc(
        None, "which of transformers', by its model_type: llama, gpt2, mixtral, vit, resnet, ..."
    )
    config: dict[str, Any] = _doc(
        {}, "its settings by their names there: model.config.hidden_size=128; dropouts not set here are 0"
    )
    num_layers: Count = _doc(4, "transformer blocks")
    width: Count = _doc(128, "features of the residual stream (these four: of gpt and vit)")
    num_attention_heads: Count = _doc(4, "attention heads a block; must divide width")
    mlp_width: Count = _doc(512, "hidden features of a block's MLP")
    context_tokens: Count = _doc(128, "tokens of a training sequence, and most that attention sees")
    vocab_size: Count = _doc(256, "number of distinct tokens; 256 for bytes")
    tie_embeddings: bool = _doc(False, "gpt's output matrix is the embedding (see lora.tied)")
    image_size: Count = _doc(28, "height and width of an image, pixels")
    channels: Count = _doc(1, "of an image: 1 where it is gray, 3 in colour")
    patch_size: Count = _doc(4, "height and width of vit's patches, pixels; must divide image_size")
    num_classes: Count = _doc(10, "number of classes of images")
    init_from: Annotated[Name | None, _OrNone] = _doc(
        None,
        "weights to start from, read by a new run's server alone: a folder of transformers', a .safetensors"
        " file, or another run's folder; none: run.seed's. Without model.config, transformers' settings come"
        " from there, too",
    )
    init_weights: Literal["published", "master", "ema"] = _doc(
        "master", "which weights of a run that model.init_from names"
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read."""

    __pydantic_config__ = _STRICT
    kind: Literal["text", "images", "regression"] = _doc(
        "text",
        "text: every token is predicted; images: their classes, and images count where tokens would;"
        " regression: a linear map of samples that are drawn from the seed",
    )
    shards: Name = _doc(
        "data/shards", "folder made by `lte data pack` or `pack-images`: WebDataset shards, index.json"
    )
    augment: Literal["none", "crop-flip"] = _doc(
        "none", "crop-flip: training images are moved by up to an eighth of their size, half are mirrored"
    )

    @property
    def counted(self) -> str:
        """What the `tokens` of the records are."""
        return {"text": "tokens", "images": "images", "regression": "samples"}[self.kind]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Other settings from a round on, until a later phase changes them again; None keeps what was."""

    __pydantic_config__ = _STRICT
    from_round: Whole = _doc(0, "first round, counted from 0, that these settings are for")
    local_steps: Annotated[Count | None, _OrNone] = _doc(None, "train.local_steps of these rounds")
    base_quant: Quant | None = _doc(
        None, "base.quant of what these rounds train on, made anew from the master; none: fp32, not as before"
    )
    rank: Annotated[Count | None, _OrNone] = _doc(
        None, "lora.rank of these rounds: the first rows of A are kept, further ones drawn"
    )
    merge: Annotated[Merge | None, _OrNone] = _doc(
        None, "lora.merge of these rounds; what a worker owes when it changes stays in B, as for a new rank"
    )

    full_rank: bool | None = _doc(None, "train.full_rank in these rounds: true from round 0 is a warm start")

    def then(self, later: Phase) -> Phase:
        """The settings once a later phase has begun."""
        return dataclasses.replace(
            self, **{k: value for k, value in vars(later).items() if value is not None}
        )

    @property
    def changes_heads(self) -> bool:
        """Whether heads of these rounds are others than before."""
        return any(value is not None for value in (self.rank, self.merge, self.full_rank))


@dataclass(frozen=True, kw_only=True)
class Train:
    """By which method, how long, how often merged, by how many."""

    __pydantic_config__ = _STRICT
    method: Literal["lte", "ddp"] = _doc(
        "lte",
        "lte: heads, and what else the recipe says; ddp: torch's DistributedDataParallel, for comparison,"
        " which ignores what is of heads and merges. With it rounds only record, base.quant is what the"
        " published weights are rounded to, and optimizer.dense_lr the rate of all (see docs/ddp.md)",
    )
    rounds: Count = _doc(
        50, "merges in the run; with outer.when = arrival so many contributions for each of the workers"
    )
    local_steps: Count = _doc(10, "optimizer steps of a worker between merges (T)")
    workers: Count = _doc(4, "workers that must have joined before the first round opens (N)")
    batch_size: Count = _doc(8, "sequences or images a worker reads per local step, shared by its heads")
    accumulate: Count = _doc(
        1, "pieces that a local step's batch is cut into, one after another: less memory, the same gradients"
    )
    checkpoint_activations: bool = _doc(
        False, "compute activations of blocks anew in the backward pass: less memory, about a third more time"
    )
    checkpoint_modules: tuple[str, ...] = _doc(
        ("*",), "patterns of those blocks: children of nn.ModuleList or nn.Sequential, such as 'blocks.*'"
    )
    precision: Literal["fp32", "bf16"] = _doc(
        "fp32", "bf16: the recipe's model computes under torch.autocast; all that is kept stays fp32"
    )
    overlap: bool = _doc(False, "take local steps of the next round while a merge is under way")
    overlap_steps: Annotated[Count | None, _OrNone] = _doc(
        None, "local steps of the next round after which the update is applied; none: all T"
    )
    full_rank: bool = _doc(
        False, "heads are weights of full rank, sent by compress.dense: with the memory and bytes of these"
    )
    phases: tuple[Phase, ...] = _doc(
        (),
        "settings that change: [{from_round: 80, local_steps: 2, base_quant, rank, merge, full_rank}, ...]",
    )

    @property
    def steps_ahead(self) -> int:
        """Local steps that a worker takes of a round before the update that opens it is due."""
        if not self.overlap:
            return 0
        return self.local_steps if self.overlap_steps is None else self.overlap_steps


@dataclass(frozen=True, kw_only=True)
class Override:
    """Other head settings for the modules that a pattern names; None keeps the recipe's."""

    __pydantic_config__ = _STRICT
    modules: str = _doc("*", "pattern of module names, such as 'blocks.*.mlp.*'")
    rank: Annotated[Count | None, _OrNone] = _doc(None, "lora_rank r of these modules")
    scale: Annotated[Positive | None, _OrNone] = _doc(None, "lora_scale s of these modules")
    init: Annotated[Init | None, _OrNone] = _doc(None, "initialization of A of these modules")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """The heads: what is trained on top of the frozen base."""

    __pydantic_config__ = _STRICT
    rank: Count = _doc(32, "lora_rank r; a worker may have a smaller one (lte worker --rank)")
    scale: Positive = _doc(
        16.0, "lora_scale s (alpha / r, held fixed when ranks change); or a worker's own (lte worker --scale)"
    )
    scaling: Literal["given", "rank-stabilized"] = _doc(
        "given", "lora_scale s is lora.scale; or lora.alpha / sqrt(r), with each module's own lora_rank"
    )
    alpha: Annotated[Positive | None, _OrNone] = _doc(None, "lora_alpha, for lora.scaling = rank-stabilized")
    dropout: Fraction = _doc(
        0.0,
        "share of the inputs of A that are dropped in training (not of embeddings, whose inputs are tokens)",
    )
    heads: Count = _doc(1, "heads a worker trains (H), at most")
    batch: Literal["sliced", "whole"] = _doc(
        "sliced",
        "heads see equal slices of a worker's batch, as if each were alone; or all see the whole of it, and"
        " each adds 1 / H of what it would add alone (multi-head LoRA)",
    )
    merge: Merge = _doc(
        "reset-b",
        "after a merge: keep A and B; or keep A, B = 0; or new A, B = 0; never: there is none, the model is"
        " the base of the start with the heads (LoRA)",
    )
    A: Literal["trained", "frozen", "rotating"] = _doc(
        "trained", "A is trained; or drawn once from the seed; or redrawn after merges; not sent then"
    )
    init: Init = _doc("semi-orthogonal", "initialization of A; semi-orthogonal has factor sqrt(in/r)")
    subspace: Subspace = _doc(
        "random",
        "heads draw A independently; or disjoint: they share out one orthogonal matrix; or shared: all draw"
        " the same one",
    )
    rotate_every: Count = _doc(
        1,
        "merges between rotations of a rotating A; what compression has left out by then is kept only as far"
        " as the new A can hold it",
    )
    moments: Literal["keep", "transport", "clear", "prune-magnitude", "prune-random"] = _doc(
        "clear",
        "optimizer moments of a head whose A was redrawn: kept, carried over, cleared; or a share of them"
        " cleared, the smallest or any (ReLoRA)",
    )
    prune: Annotated[Fraction | None, _OrNone] = _doc(
        None, "that share of the moments, such as 0.9; none: lora.moments is another"
    )
    modules: tuple[str, ...] = _doc(
        ("*",), "patterns of the modules (nn.Linear, nn.Conv2d, ...; and see embeddings) that get heads"
    )
    embeddings: bool = _doc(
        False, "nn.Embedding modules that the patterns match get heads too, instead of training densely"
    )
    exclude: tuple[str, ...] = _doc((), "patterns of modules that get none and stay dense")
    tied: Literal["dense", "adapted"] = _doc(
        "dense", "a weight of several modules is trained densely; or gets heads, once, named for the first"
    )
    freeze: tuple[str, ...] = _doc(
        (), "patterns of parameters that are not trained at all, such as '*.bias'; they are sent once"
    )
    statistics: tuple[str, ...] = _doc(
        (),
        "patterns of buffers that training changes beside those of torch's norms (running means of one's own,"
        " vectors of spectral norms): they are averaged at merges, as those are",
    )
    overrides: tuple[Override, ...] = _doc((), "settings per module; the last that matches counts")
    nested: Literal["none", "unfrozen", "frozen"] = _doc(
        "none",
        "DyLoRA: each local step draws a rank b and uses b rows of A and columns of B, the first, at alpha /"
        " b; unfrozen: it trains all of these; frozen: those alone that b adds to the next smaller rank",
    )
    nested_min_rank: Count = _doc(1, "least rank that is drawn with lora.nested")
    nested_ranks: tuple[Count, ...] = _doc(
        (),
        "ranks that are drawn with lora.nested, one that stands here twice being twice as likely; none: all"
        " from lora.nested_min_rank to lora.rank",
    )

    def drawn_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks that local steps of heads of this lora_rank draw from with `nested`. Where a larger one
        would be drawn, heads of a worker or a phase with less are used whole."""
        ranks = self.nested_ranks or range(min(self.nested_min_rank, rank), rank + 1)
        return tuple(min(b, rank) for b in ranks)

    def nested_scale(self, rank: int, used: int) -> float:
        """Factor on lora_scale where so many of a head's `rank` rows are used: lora_alpha stays."""
        return rank / used if self.scaling == "given" else math.sqrt(rank / used)

    @property
    def keeps_factors(self) -> bool:
        """Whether a worker goes on with its A and B, and the server remembers both."""
        return self.merge in ("reset-less", "never")

    @property
    def num_slices(self) -> int:
        """Into how many slices the heads of a worker cut its batch."""
        return self.heads if self.batch == "sliced" else 1

    def first_head(self, slot: int) -> int:
        """Index of a worker's first head among all workers'. Heads that are never merged are the run's:
        whoever comes goes on with them."""
        return 0 if self.merge == "never" else slot * self.heads

    def scale_of(self, rank: int) -> float:
        """lora_scale s of a module with this lora_rank, without an override."""
        return self.scale if self.alpha is None else self.alpha / math.sqrt(rank)

    def capped(self, rank: int, heads: int, scale: float = 0.0) -> LoRA:
        """These settings for a worker whose heads are of this lora_rank at most, so many, and of this
        lora_scale in every module; 0: as here."""

        def least(met: int) -> int:
            return min(met, rank) if rank else met

        overrides = tuple(
            dataclasses.replace(
                o,
                rank=None if o.rank is None else least(o.rank),
                scale=scale or (o.scale if o.rank is None or self.alpha is None else self.scale_of(o.rank)),
            )
            for o in self.overrides
        )
        return dataclasses.replace(
            self,
            rank=least(self.rank),
            heads=heads or self.heads,
            # What a worker adds is measured by the recipe's ranks, not by its own.
            scale=scale or self.scale_of(self.rank),
            scaling="given",
            alpha=None,
            overrides=overrides,
            nested_min_rank=least(self.nested_min_rank),
            nested_ranks=tuple(map(least, self.nested_ranks)),
        )


@dataclass(frozen=True, kw_only=True)
class Base:
    """The frozen weights that a worker holds."""

    __pydantic_config__ = _STRICT
    quant: Quant = _doc("int8", "nf4: 4 bits, bitsandbytes' layout; int8: 8 bits; none: fp32")
    hysteresis: NonNegative = _doc(
        0.5, "a code changes only if the new one is nearer by more than this share: fewer changes"
    )
    keep_scale_from: Positive = _doc(
        0.8, "a block keeps its scale while its largest weight is at least this share of it ..."
    )
    keep_scale_to: Positive = _doc(1.05, "... and at most this one")
    keep_initial: Annotated[bool | None, _OrNone] = _doc(
        None,
        "the master starts as the initial weights, not as what is published of them, which is rounded;"
        " none: with model.init_from",
    )


@dataclass(frozen=True, kw_only=True)
class Compress:
    """How contributions and dense changes travel. What a codec leaves out is owed, and sent later."""

    __pydantic_config__ = _STRICT
    factors: Codec = _doc("int4", "codec of lora_A and lora_B")
    dense: Codec = _doc("int8", "codec of the changes of dense parameters, both ways")
    truncate_rank: Annotated[Count | None, _OrNone] = _doc(
        None, "send so many singular directions of each factor's change; none: all"
    )
    part_bytes: Annotated[Count, Field(ge=4096)] = _doc(
        1 << 18, "largest piece of a contribution or update, bytes: whatever is urgent waits for one"
    )
    measure_entropy: bool = _doc(
        False, "record how far above the entropy of the changes their bytes are; costs the server some time"
    )
    error_feedback: bool = _doc(True, "false forgets what codecs leave out: only to measure its worth")


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Another learning rate for the parameters that a pattern names; the last that matches counts."""

    __pydantic_config__ = _STRICT
    modules: str = _doc("*", "pattern of parameter names, such as 'blocks.0.*' or '*.norm.weight'")
    factor: NonNegative = _doc(1.0, "on the learning rate that they would have; 0 keeps them as they are")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """A worker's own (inner) optimizer. Its state never leaves the worker."""

    __pydantic_config__ = _STRICT
    name: Literal["adamw", "sgd", "muon", "adamw8bit", "paged-adamw8bit"] = _doc(
        "muon",
        "torch's AdamW; SGD with momentum; Muon; bitsandbytes' AdamW with 8-bit moments, also paged (GPU)",
    )
    lr: NonNegative = _doc(1e-3, "learning rate of lora_B, at its peak")
    lr_A: Annotated[NonNegative | None, _OrNone] = _doc(
        None, "learning rate of lora_A, at its peak; none: the same as lr"
    )
    dense_lr: NonNegative = _doc(3e-3, "learning rate of dense parameters, at its peak")
    rates: tuple[Rate, ...] = _doc(
        (), "factors on the learning rates of single parameters, [{modules: 'blocks.0.*', factor: 0.5}, ...]"
    )
    layer_decay: Share = _doc(
        1.0, "factor on the learning rates of a layer for every layer above it; 1: all the same"
    )
    beta1: Fraction = _doc(0.9, "AdamW's first decay")
    beta2: Fraction = _doc(0.95, "AdamW's second decay")
    eps: Positive = _doc(1e-8, "AdamW's epsilon")
    momentum: Fraction = _doc(0.0, "SGD's momentum")
    muon_momentum: Fraction = _doc(0.95, "Muon's momentum, Nesterov's")
    muon_dtype: Literal["bf16", "fp32"] = _doc("fp32", "in which Muon orthogonalizes")
    muon_scale: Literal["match-rms", "original"] = _doc(
        "match-rms", "factor on Muon's steps: 0.2 sqrt(max(out, in)), for AdamW's rates; sqrt(max(1, out/in))"
    )
    muon_exclude: tuple[str, ...] = _doc(
        ("*embed*", "output.*", "*head.*", "classifier.*"),
        "patterns of parameters that get AdamW with optimizer.name = muon, besides embeddings and all that is"
        " neither a matrix nor a convolution's kernel, taken as (out, in * kh * kw), but depthwise",
    )
    adamw_lr: Annotated[NonNegative | None, _OrNone] = _doc(
        None, "learning rate of what gets AdamW with optimizer.name = muon; none: lr, lr_A, dense_lr"
    )
    dense_weight_decay: NonNegative = _doc(0.0, "decoupled weight decay of dense matrices")
    clip_norm: NonNegative = _doc(1.0, "largest gradient norm; 0: no clipping")
    clip_by: Literal["all", "group", "head"] = _doc(
        "all", "clip the norm over all; or lora_A, lora_B and dense each; or each head's A and B, and dense"
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Factor on every learning rate, as a function of the local steps since the run's start."""

    __pydantic_config__ = _STRICT
    name: Literal["cosine", "linear", "constant", "wsd", "jagged-cosine"] = _doc(
        "cosine",
        "shape after the warmup; wsd: constant, then a decay; jagged-cosine: ReLoRA's, with restarts",
    )
    warmup_steps: Whole = _doc(50, "local steps of linear warmup")
    final: Share = _doc(0.1, "factor at the end of the run (all but constant); 0: down to nothing")
    decay_share: Share = _doc(0.2, "share of the run's local steps in which wsd decays, its last ones")
    decay_shape: Literal["linear", "1-sqrt"] = _doc(
        "linear", "how wsd decays: in a line, or by 1 - the root of the share of the decay that is done"
    )
    restart_rounds: Count = _doc(1, "merges between restarts of jagged-cosine")
    restart_warmup_steps: Whole = _doc(
        10, "local steps after a restart in which jagged-cosine climbs to the cosine again, in a line"
    )
    join_warmup_steps: Whole = _doc(
        20, "local steps of linear warmup of heads that begin in the middle of a run, without moments"
    )


@dataclass(frozen=True, kw_only=True)
class DDP:
    """How gradients travel with train.method = ddp."""

    __pydantic_config__ = _STRICT
    hook: Literal["none", "bf16", "powersgd"] = _doc(
        "none",
        "what is sent of gradients, by torch's communication hooks: all, in fp32; rounded to bf16; or"
        " factors of a low rank, PowerSGD's, with compress.error_feedback",
    )
    powersgd_rank: Count = _doc(4, "columns of PowerSGD's factors")
    powersgd_start: Annotated[Count, Field(ge=2)] = _doc(
        50, "local steps at the run's start with whole gradients, before PowerSGD"
    )
    find_unused: bool = _doc(
        False, "allow steps that use only some parameters, as of dropped layers; costs a small message a step"
    )


@dataclass(frozen=True, kw_only=True)
class Outer:
    """The outer optimizer: how the server moves the master by the mean delta."""

    __pydantic_config__ = _STRICT
    name: Literal["average", "sgd", "adam"] = _doc(
        "average", "W += mean delta; or SGD, or Adam, on minus that delta"
    )
    when: Literal["round", "arrival"] = _doc(
        "round", "merge when all have contributed; or whatever has arrived, at once: nobody waits for others"
    )
    staleness: Literal["constant", "polynomial", "inverse"] = _doc(
        "constant",
        "on arrival, weight of a contribution that is s versions behind: 1, (1 + s)^-a or 1 / (1 + a s)",
    )
    staleness_exponent: NonNegative = _doc(0.5, "a of these weights")
    max_staleness: Annotated[Whole | None, _OrNone] = _doc(
        None,
        "on arrival, most versions behind: what is older counts with its worker's next one; none: any",
    )
    combine: Literal["products", "factors"] = _doc(
        "products",
        "the mean of the heads' products B A is merged; or A and B are averaged each, as dense parameters"
        " are, and never merged (factor averaging, FedLoRA)",
    )
    lr: Positive = _doc(1.0, "SGD's or Adam's learning rate on adapted weights")
    momentum: Fraction = _doc(0.0, "SGD's momentum on adapted weights")
    nesterov: bool = _doc(True, "SGD's momentum is Nesterov's")
    beta1: Fraction = _doc(0.9, "Adam's first decay, a merge")
    beta2: Fraction = _doc(0.99, "Adam's second decay, a merge")
    eps: Positive = _doc(1e-8, "Adam's epsilon")
    dense: bool = _doc(False, "use SGD or Adam for dense parameters too, instead of averaging them")
    ema: Annotated[Fraction | None, _OrNone] = _doc(
        None, "decay, a round, of an average of the master over versions, such as 0.98; none: no average"
    )
    publish_ema: bool = _doc(False, "the last version that is published is that average, requantized")
    weights: Literal["heads", "tokens"] = _doc("heads", "heads count the same, or by tokens trained on")
    weight_decay: Fraction = _doc(0.0, "share of every adapted weight that a round takes away")
    bound_norm: Annotated[Multiple | None, _OrNone] = _doc(
        None, "weigh a head less whose delta of a module is longer than so many medians of all; none: never"
    )
    trim: Annotated[Fraction | None, _OrNone] = _doc(
        None,
        "leave out whose delta, of 4 or more, agrees with the others' less than this share of the usual",
    )


@dataclass(frozen=True, kw_only=True)
class Server:
    """The parameter server."""

    __pydantic_config__ = _STRICT
    address: str = _doc(
        "tcp://127.0.0.1:5555",
        "tcp://HOST:PORT (PORT * picks a free one), ipc://PATH, collective://HOST:PORT (torch.distributed),"
        " collective://env (where torchrun says), inprocess://NAME",
    )
    host: Annotated[Name | None, _OrNone] = _doc(
        None,
        "by which others reach this machine, for RUN/address where server.address is tcp://*; none: its"
        " hostname",
    )
    place: Literal["beside", "alone", "elsewhere"] = _doc(
        "beside",
        "under torchrun: beside: rank 0 starts the server, and is a worker, too; alone: it only starts the"
        " server; elsewhere: all ranks are workers of a server that 'lte server' runs",
    )
    quorum: Count = _doc(1, "least contributions to merge")
    grace_s: Annotated[NonNegative | None, _OrNone] = _doc(
        None, "seconds that a round waits for the rest once it has its quorum; none: until its deadline"
    )
    deadline_s: Positive = _doc(600.0, "seconds after which a round with its quorum is merged anyway")
    silence_s: Positive = _doc(
        15.0, "seconds without a sign of life after which a worker is gone; more than one part takes"
    )
    max_workers: Count = _doc(1024, "most workers at a time; who comes then is turned away")
    max_message_bytes: Count = _doc(
        1 << 26, "largest message accepted, bytes; models and contributions travel in parts"
    )
    key: Annotated[Name | None, _OrNone] = _doc(
        None, "file of the server's secret key ('lte keys new'); then only keys of server.allow may join"
    )
    allow: Annotated[Name | None, _OrNone] = _doc(
        None, "file of lines 'WORKER_ID PUBLIC_KEY', read again whenever it changes"
    )
    insecure: bool = _doc(
        False, "bind beyond loopback without keys, which collective:// has none of: trusted networks only"
    )
    shards: Annotated[int, Field(ge=1, le=8)] = _doc(
        1, "processes that the master is divided among by bytes, each with an address of its own"
    )
    num_threads: Count = _doc(1, "threads of merge and packing, a layer each, and of evaluations")
    checkpoint_every: Count = _doc(10, "rounds between checkpoints")
    keep_checkpoints: Count = _doc(2, "checkpoints kept; older ones are deleted")
    diverging: Annotated[Share | None, _OrNone] = _doc(
        0.1, "say so when the loss rises again by this share of all that it had fallen; none: never"
    )
    remember_rounds: Whole = _doc(10, "rounds for which what is merged of a worker that is gone is known")


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker process does with its machine."""

    __pydantic_config__ = _STRICT
    device: Name = _doc("auto", "auto: a GPU if there is one; or cpu, cuda, cuda:1")
    processes: Count = _doc(
        1, "processes of a worker, each with a share of every batch and, where it can be, a GPU of its own"
    )
    num_threads: Count = _doc(1, "CPU threads of each process of a worker")
    heartbeat_s: Annotated[Positive | None, _OrNone] = _doc(
        None, "seconds between signs of life; none: a tenth of server.silence_s, 1 at most"
    )
    patience_s: Positive = _doc(
        600.0, "seconds that a worker waits for a server that is not heard: how long one may be gone"
    )


@dataclass(frozen=True, kw_only=True)
class Eval:
    """How the published model is measured."""

    __pydantic_config__ = _STRICT
    every: Whole = _doc(5, "rounds between evaluations; 0: only after the last round")
    tokens: Count = _doc(16384, "validation tokens (or images) of an evaluation during the run")
    final_tokens: Whole = _doc(0, "validation tokens (or images) of the last evaluation; 0: all there are")
    prompt: str = _doc("\n", "text that the sample at the end starts from")
    sample_tokens: Whole = _doc(300, "tokens of that sample; 0: no sample")


@dataclass(frozen=True, kw_only=True)
class Log:
    """Records beside metrics.jsonl."""

    __pydantic_config__ = _STRICT
    wandb: Literal["off", "offline", "online"] = _doc("off", "also log to Weights & Biases")
    wandb_project: str = _doc("lte", "its project")
    diagnostics_every: Whole = _doc(
        0, "rounds between diagnostics of heads, updates and base, which take the server time; 0: never"
    )
    diagnostics_modules: tuple[str, ...] = _doc(
        ("*",), "patterns of the modules with heads that they look at, such as 'blocks.0.*'"
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run is made of. The server's recipe is every worker's."""

    __pydantic_config__ = _STRICT
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    lora: LoRA = field(default_factory=LoRA)
    base: Base = field(default_factory=Base)
    compress: Compress = field(default_factory=Compress)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    ddp: DDP = field(default_factory=DDP)
    outer: Outer = field(default_factory=Outer)
    server: Server = field(default_factory=Server)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    eval: Eval = field(default_factory=Eval)
    log: Log = field(default_factory=Log)

    @property
    def total_steps(self) -> int:
        """Local steps of a worker in the whole run."""
        return self.steps_before(self.train.rounds)

    def steps_before(self, number: int) -> int:
        """Local steps of a worker in the rounds before this one: names the first batch of it."""
        spans = self._spans("local_steps", self.train.local_steps, number)
        return sum((end - begin) * local_steps for begin, end, local_steps in spans)

    def last_reset(self, version: int) -> int:
        """The last version up to this one with whose merge heads drew a new A, as lora.merge = reset says;
        0 where there was none."""
        spans = self._spans("merge", self.lora.merge, version)
        return max((end for begin, end, merge in spans if merge == "reset" and begin < end), default=0)

    def _spans(self, key: str, first: Any, until: int) -> Iterator[tuple[int, int, Any]]:
        """Begin, end and value of each stretch of the rounds before `until` with one value of a setting.

        Args:
            key: its name in `Phase`. first: its value before all phases.
        """
        since, now = 0, first
        for phase in self.train.phases:
            if (other := getattr(phase, key)) is not None:
                begins = min(phase.from_round, until)
                yield since, begins, now
                since, now = begins, other
        yield since, until, now

    def in_round(self, number: int) -> Recipe:
        """The recipe with the settings of a round, counted from 0; after the last one, with the last one's.

        Its phases name the settings of the rounds before the first of them, too, so that it says the
        same of all rounds as this one does.
        """
        if not self.train.phases:
            return self
        first = Phase(
            from_round=0,
            local_steps=self.train.local_steps,
            base_quant=self.base.quant,
            rank=self.lora.rank,
            merge=self.lora.merge,
            full_rank=self.train.full_rank,
        )
        said = self.train.phases
        if said[0].from_round == 0:
            first, said = first.then(said[0]), said[1:]
        now = first
        for phase in said:
            now = now.then(phase) if phase.from_round <= number else now
        settings: dict[str, Any] = vars(now)  # of which none is None
        of_train = {key: settings[key] for key in ("local_steps", "full_rank")}
        return dataclasses.replace(
            self,
            train=dataclasses.replace(self.train, **of_train, phases=(first, *said)),
            lora=dataclasses.replace(self.lora, rank=settings["rank"], merge=settings["merge"]),
            base=dataclasses.replace(self.base, quant=settings["base_quant"]),
        )

    @property
    def is_A_given(self) -> bool:
        """Whether the server draws the heads' A too, so that it is not sent."""
        return self.lora.A != "trained" and not self.train.full_rank

    @property
    def is_A_sent(self) -> bool:
        """Whether heads have an A that they train."""
        return self.lora.A == "trained" and not self.train.full_rank

    @property
    def draws_ranks(self) -> bool:
        """Whether each local step draws the ranks that it uses and trains; of full rank it uses all."""
        return self.lora.nested != "none" and not self.train.full_rank

    def has_heads_of(self, other: Recipe) -> bool:
        """Whether heads by this recipe are as by another, so that what is merged of them stays known."""
        return (self.lora, self.train.full_rank) == (other.lora, other.train.full_rank)

    @property
    def as_built(self) -> Recipe:
        """The recipe by which models are built that join, in whichever round: the first one's, with the
        largest lora.rank of all. Their worker brings them to the settings of the round."""
        first = self.in_round(0)
        spans = self._spans("rank", self.lora.rank, self.train.rounds)
        rank = max(rank for begin, end, rank in spans if begin < end)
        return dataclasses.replace(first, lora=dataclasses.replace(first.lora, rank=rank))

    @property
    def keeps_initial(self) -> bool:
        """`base.keep_initial`, or what it is derived from."""
        said = self.base.keep_initial
        if said is None:
            return self.model.init_from is not None and self.lora.merge != "never"
        return said

    @property
    def merges_on_arrival(self) -> bool:
        return self.outer.when == "arrival"

    def round_of(self, version: int, contributions: int) -> int:
        """Rounds that are done with a version, in which so many contributions are merged: where they are
        merged on arrival, so many for each of the workers are as good as a round."""
        return contributions // self.train.workers if self.merges_on_arrival else version

    def step_of(self, version: int, contributions: int) -> int:
        """Local steps that the run has come to with a version: by these rates are scheduled."""
        if self.merges_on_arrival:
            return contributions * self.train.local_steps // self.train.workers
        return self.steps_before(version)

    @property
    def averages_factors(self) -> bool:
        """Whether heads are parameters that all workers have in common, and average."""
        return self.outer.combine == "factors"

    @property
    def grace_s(self) -> float:
        """`server.grace_s`, or what it is derived from."""
        return self.server.deadline_s if self.server.grace_s is None else self.server.grace_s

    @property
    def heartbeat_s(self) -> float:
        """`worker.heartbeat_s`, or what it is derived from."""
        said = self.worker.heartbeat_s
        return min(1.0, self.server.silence_s / 10) if said is None else said
