"""Recipes: frozen dataclasses, read from YAML and from `key=value` overrides.

Every default stands here and nowhere else. Units are part of the names (`_s`, `_bytes`, `_tokens`)
or of the descriptions. Unknown keys and impossible values are reported together.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from lte.errors import ConfigError
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
_HEADER_ROOM = 1 << 20
"""Bytes of a message beside the part that it carries."""
Count = Annotated[int, Field(ge=1, le=_MAX_INT), BeforeValidator(_no_truth)]
Whole = Annotated[int, Field(ge=0, le=_MAX_INT), BeforeValidator(_no_truth)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_truth)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_truth)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), BeforeValidator(_no_truth)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_no_truth)]
Multiple = Annotated[float, Field(ge=1, allow_inf_nan=False), BeforeValidator(_no_truth)]
Name = Annotated[str, Field(min_length=1)]
_OrNone = BeforeValidator(_none_if_said)

_STRICT = ConfigDict(extra="forbid")


def _doc(default: Any, text: str) -> Any:
    """A field with its default and the description that `lte train --help` prints."""
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
    """The reference decoder, a GPT with rotary positions."""

    __pydantic_config__ = _STRICT
    num_layers: Count = _doc(4, "transformer blocks")
    width: Count = _doc(128, "features of the residual stream")
    num_attention_heads: Count = _doc(4, "attention heads a block; must divide width")
    mlp_width: Count = _doc(512, "hidden features of a block's MLP")
    context_tokens: Count = _doc(128, "tokens of a training sequence, and most that attention sees")
    vocab_size: Count = _doc(256, "number of distinct tokens; 256 for bytes")
    tie_embeddings: bool = _doc(False, "the output matrix is the embedding (then it stays dense)")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the tokens come from."""

    __pydantic_config__ = _STRICT
    shards: Name = _doc("data/shards", "folder made by `lte data pack`: WebDataset shards, index.json")


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, how often merged, by how many."""

    __pydantic_config__ = _STRICT
    rounds: Count = _doc(50, "merges in the run")
    local_steps: Count = _doc(10, "optimizer steps of a worker between merges (T)")
    workers: Count = _doc(4, "workers that must have joined before the first round opens (N)")
    batch_size: Count = _doc(8, "sequences a worker reads per local step, shared by its heads")
    precision: Literal["fp32", "bf16"] = _doc(
        "fp32", "bf16: the recipe's model computes under torch.autocast; all that is kept stays fp32"
    )
    overlap: bool = _doc(False, "take local steps of the next round while a merge is under way")
    overlap_steps: Annotated[Count | None, _OrNone] = _doc(
        None, "local steps of the next round after which the update is applied; none: all T"
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
    scale: Positive = _doc(16.0, "lora_scale s (alpha / r, held fixed when ranks change)")
    heads: Count = _doc(1, "heads a worker trains (H), at most; they share its batch in equal slices")
    merge: Literal["reset-less", "reset-b", "reset"] = _doc(
        "reset-b", "after a merge: keep A and B; or keep A, B = 0; or new A, B = 0"
    )
    A: Literal["trained", "frozen", "rotating"] = _doc(
        "trained", "A is trained; or drawn once from the seed; or redrawn after merges; not sent then"
    )
    init: Init = _doc("semi-orthogonal", "initialization of A; semi-orthogonal has factor sqrt(in/r)")
    subspace: Subspace = _doc(
        "random", "heads draw A independently; or disjoint: they share out one orthogonal matrix"
    )
    rotate_every: Count = _doc(1, "merges between rotations of a rotating A")
    moments: Literal["keep", "transport", "clear"] = _doc(
        "clear", "optimizer moments of a head whose A was redrawn: kept, carried over, or cleared"
    )
    modules: tuple[str, ...] = _doc(
        ("*",), "patterns of the nn.Linear modules (and see embeddings) that get heads"
    )
    embeddings: bool = _doc(
        False, "nn.Embedding modules that the patterns match get heads too, instead of training densely"
    )
    exclude: tuple[str, ...] = _doc((), "patterns of modules that get none and stay dense")
    overrides: tuple[Override, ...] = _doc((), "settings per module; the last that matches counts")

    def capped(self, rank: int, heads: int) -> LoRA:
        """These settings for a worker whose heads are of this lora_rank at most, and so many; 0: as here."""

        def least(met: int) -> int:
            return min(met, rank) if rank else met

        overrides = tuple(
            dataclasses.replace(o, rank=None if o.rank is None else least(o.rank)) for o in self.overrides
        )
        return dataclasses.replace(
            self, rank=least(self.rank), heads=heads or self.heads, overrides=overrides
        )


@dataclass(frozen=True, kw_only=True)
class Base:
    """The frozen weights that a worker holds."""

    __pydantic_config__ = _STRICT
    quant: Quant = _doc("nf4", "nf4: 4 bits, bitsandbytes' layout; int8: 8 bits; none: fp32")
    hysteresis: NonNegative = _doc(
        0.5, "a code changes only if the new one is nearer by more than this share: fewer changes"
    )
    keep_scale_from: Positive = _doc(
        0.8, "a block keeps its scale while its largest weight is at least this share of it ..."
    )
    keep_scale_to: Positive = _doc(1.05, "... and at most this one")


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
class Optimizer:
    """A worker's own (inner) optimizer. Its state never leaves the worker."""

    __pydantic_config__ = _STRICT
    name: Literal["adamw", "sgd"] = _doc("adamw", "torch's AdamW, or SGD with momentum")
    lr: NonNegative = _doc(1e-3, "learning rate of lora_B, at its peak")
    lr_A: Annotated[NonNegative | None, _OrNone] = _doc(
        None, "learning rate of lora_A, at its peak; none: the same as lr"
    )
    dense_lr: NonNegative = _doc(3e-3, "learning rate of dense parameters, at its peak")
    beta1: Fraction = _doc(0.9, "AdamW's first decay")
    beta2: Fraction = _doc(0.95, "AdamW's second decay")
    eps: Positive = _doc(1e-8, "AdamW's epsilon")
    momentum: Fraction = _doc(0.0, "SGD's momentum")
    dense_weight_decay: NonNegative = _doc(0.0, "decoupled weight decay of dense matrices")
    clip_norm: NonNegative = _doc(1.0, "largest gradient norm; 0: no clipping")
    clip_by: Literal["all", "group"] = _doc(
        "all", "clip the norm over all parameters, or lora_A, lora_B and dense each by itself"
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Factor on every learning rate, as a function of the local steps since the run's start."""

    __pydantic_config__ = _STRICT
    name: Literal["cosine", "linear", "constant"] = _doc("cosine", "shape after the warmup")
    warmup_steps: Whole = _doc(50, "local steps of linear warmup")
    final: Share = _doc(0.1, "factor at the last step (cosine, linear)")
    join_warmup_steps: Whole = _doc(
        20, "local steps of linear warmup of heads that begin in the middle of a run, without moments"
    )


@dataclass(frozen=True, kw_only=True)
class Outer:
    """The outer optimizer: how the server moves the master by the mean delta."""

    __pydantic_config__ = _STRICT
    name: Literal["average", "sgd"] = _doc("average", "W += mean delta; or SGD on minus that delta")
    lr: Positive = _doc(1.0, "SGD's learning rate on adapted weights")
    momentum: Fraction = _doc(0.0, "SGD's momentum on adapted weights")
    nesterov: bool = _doc(True, "SGD's momentum is Nesterov's")
    dense: bool = _doc(False, "use SGD for dense parameters too, instead of averaging them")
    weights: Literal["heads", "tokens"] = _doc("heads", "heads count the same, or by tokens trained on")
    weight_decay: Fraction = _doc(0.0, "share of every adapted weight that a merge takes away")
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
        "tcp://127.0.0.1:5555", "tcp://HOST:PORT (PORT * picks a free one), ipc://PATH, inprocess://NAME"
    )
    quorum: Count = _doc(1, "least contributions to merge a round")
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
    insecure: bool = _doc(False, "bind beyond loopback without keys: trusted networks only")
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
    num_threads: Count = _doc(1, "CPU threads of a worker")
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
    tokens: Count = _doc(16384, "validation tokens of an evaluation during the run")
    final_tokens: Whole = _doc(0, "validation tokens of the last evaluation; 0: all there are")
    prompt: str = _doc("\n", "text that the sample at the end starts from")
    sample_tokens: Whole = _doc(300, "tokens of that sample; 0: no sample")


@dataclass(frozen=True, kw_only=True)
class Log:
    """Records beside metrics.jsonl."""

    __pydantic_config__ = _STRICT
    wandb: Literal["off", "offline", "online"] = _doc("off", "also log to Weights & Biases")
    wandb_project: str = _doc("lte", "its project")


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
    outer: Outer = field(default_factory=Outer)
    server: Server = field(default_factory=Server)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    eval: Eval = field(default_factory=Eval)
    log: Log = field(default_factory=Log)

    @property
    def total_steps(self) -> int:
        """Local steps of a worker in the whole run."""
        return self.train.rounds * self.train.local_steps

    @property
    def grace_s(self) -> float:
        """`server.grace_s`, or what it is derived from."""
        return self.server.deadline_s if self.server.grace_s is None else self.server.grace_s

    @property
    def heartbeat_s(self) -> float:
        """`worker.heartbeat_s`, or what it is derived from."""
        said = self.worker.heartbeat_s
        return min(1.0, self.server.silence_s / 10) if said is None else said


_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)


# Reading


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, with `key=value` overrides such as `train.rounds=20`.

    Raises:
        ConfigError: with one line for each fault of file and overrides.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([_missing_file(Path(path))]) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise ConfigError([f"{path}: cannot be read ({reason})"]) from None
    try:
        tree = _read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError([_yaml_fault(path, error)]) from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: must hold sections, such as train:, not {_quoted(tree)}"])
    faults: list[str] = []
    for override in overrides:
        _override(tree, override, faults)
    return from_dict(tree, faults)


def from_dict(tree: Mapping[str, Any], faults: Sequence[str] = ()) -> Recipe:
    """Check a nested mapping and make a recipe of it.

    Args:
        faults: lines found before, reported with those found here.

    Raises:
        ConfigError: with one line for each fault.
    """
    found = list(faults)
    # A section whose settings are all commented out is none in YAML.
    sections = {key: {} if value is None else value for key, value in tree.items()}
    wrong: set[str] = set()
    try:
        recipe = _ADAPTER.validate_python(sections)
    except ValidationError as error:
        found += [_fault_line(fault) for fault in error.errors()]
        wrong = {".".join(_path(fault)[:2]) for fault in error.errors()}
        # What is right is checked all the same, with defaults in place of what is wrong.
        recipe = _ADAPTER.validate_python(_without(sections, wrong))
    # But a rule about a setting that is wrong by itself says nothing.
    found += [line for line in check(recipe) if not any(_names(line, key) for key in wrong)]
    if found:
        raise ConfigError(found)
    return recipe


def checked(recipe: Recipe) -> Recipe:
    """The same recipe, for one that was made in Python: dataclasses alone take any value.

    Raises:
        ConfigError: with one line for each fault.
    """
    return from_dict(dataclasses.asdict(recipe))


def check(recipe: Recipe) -> list[str]:
    """Faults that no single field shows, one line each."""
    lora, model, train, outer = recipe.lora, recipe.model, recipe.train, recipe.outer
    inits = [lora.init, *(override.init for override in lora.overrides)]
    other_init = next((init for init in inits if init not in (None, "semi-orthogonal")), None)
    rules = [
        (
            model.width % model.num_attention_heads == 0
            and (model.width // model.num_attention_heads) % 2 == 0,
            f"model.num_attention_heads: {model.num_attention_heads} must divide model.width"
            f" ({model.width}) into an even number of features",
        ),
        (
            train.batch_size % lora.heads == 0,
            f"train.batch_size: {train.batch_size} cannot be cut into lora.heads ({lora.heads}) equal slices",
        ),
        (
            lora.A != "rotating" or lora.merge == "reset-b",
            f"lora.A: rotating needs lora.merge = reset-b, not {lora.merge} (a kept B would act"
            " through another A)",
        ),
        (
            lora.A == "trained" or lora.merge != "reset",
            f"lora.A: {lora.A} contradicts lora.merge = reset, which redraws A; use reset-b",
        ),
        (
            lora.moments != "transport" or lora.A == "rotating",
            "lora.moments: transport needs lora.A = rotating (clear or keep otherwise)",
        ),
        (
            lora.subspace == "random" or other_init is None,
            f"lora.subspace: disjoint needs lora.init = semi-orthogonal, not {other_init} (in"
            " lora.overrides, too)",
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
            outer.name == "sgd" or (outer.lr == 1.0 and outer.momentum == 0.0),
            "outer.lr, outer.momentum: need outer.name = sgd (average has neither)",
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
            recipe.server.address.partition("://")[0] in ("tcp", "ipc", "inprocess"),
            f"server.address: {recipe.server.address!r} must start with tcp://, ipc:// or inprocess://",
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


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a nested mapping of plain values, which `from_dict` reads back."""
    return _ADAPTER.dump_python(recipe, mode="json")  # type: ignore[no-any-return]


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML with every setting, which `load` reads back."""
    return yaml.dump(to_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def replace(recipe: Recipe, **changes: Any) -> Recipe:
    """A copy with other values: `replace(recipe, **{"train.rounds": 20})`.

    Raises:
        ConfigError: with one line for each fault.
    """
    tree = to_dict(recipe)
    faults: list[str] = []
    for key, value in changes.items():
        _place(tree, key, value, key, faults)
    return from_dict(tree, faults)


def differences(one: Recipe, other: Recipe, sections: Sequence[str]) -> list[str]:
    """Settings of these sections that differ, as lines `train.rounds: 50 -> 60`."""
    left, right = dict(_leaves(to_dict(one))), dict(_leaves(to_dict(other)))
    return [
        f"{key}: {left.get(key)} -> {right.get(key)}"
        for key in sorted(left.keys() | right.keys())
        if key.split(".")[0] in sections and left.get(key) != right.get(key)
    ]


# Describing


def describe() -> Iterator[tuple[str, str, str, str]]:
    """Every setting as (key, type, default, description), in the order of the recipe."""
    for section in fields(Recipe):
        kind = get_type_hints(Recipe)[section.name]
        hints = get_type_hints(kind)
        for leaf in fields(kind):
            default = leaf.default if leaf.default is not dataclasses.MISSING else ""
            yield (
                f"{section.name}.{leaf.name}",
                _type_name(hints[leaf.name]),
                _show(default),
                leaf.metadata["doc"],
            )


def _show(value: Any) -> str:
    """A default as it is written in an override."""
    if isinstance(value, tuple):
        return yaml.dump(list(value), Dumper=_Dumper, default_flow_style=True).strip()
    if isinstance(value, str):
        return value if value.strip() else json.dumps(value)
    return "none" if value is None else str(value).lower()


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return "list" if is_dataclass(inner) else f"list of {_type_name(inner)}"
    options = [option for option in get_args(hint) if option is not type(None)]
    if options and type(None) in get_args(hint):
        return f"{_type_name(options[0])} or none"
    return getattr(hint, "__name__", str(hint))


# Faults


def _override(tree: dict[str, Any], override: str, faults: list[str]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        faults.append(f"{override!r}: an override is key=value, such as train.rounds=20")
        return
    try:
        value = _read_yaml(text)
    except yaml.YAMLError:
        value = _UNREADABLE
    if key in _text_keys() and not isinstance(value, str):  # a folder named 2024, a prompt "ROMEO:"
        value = text
    if value is _UNREADABLE:
        faults.append(
            f"{key}: {_quoted(text)} cannot be read; lists are [a, b], text with signs in it 'a: b'"
        )
        return
    _place(tree, key, value, override, faults)


def _place(tree: dict[str, Any], key: str, value: Any, met: str, faults: list[str]) -> None:
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            faults.append(f"{met}: {section!r} is a value, not a section")
            return
        node = child
    node[leaf] = value


_UNREADABLE = object()
_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "finite_number": "finite",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "number": "a number",
    "string_too_short": "a name",
    "string_type": "text in quotes",
    "tuple_type": "a list, such as [a, b]",
}
"""What to say for pydantic's types of errors."""


def _without(sections: Mapping[str, Any], wrong: set[str]) -> dict[str, Any]:
    """The sections less the settings, or whole sections, that these keys name."""
    return {
        section: (
            {key: setting for key, setting in value.items() if f"{section}.{key}" not in wrong}
            if isinstance(value, Mapping)
            else value
        )
        for section, value in sections.items()
        if str(section) not in wrong
    }


def _names(line: str, key: str) -> bool:
    return re.search(rf"{re.escape(key)}\b", line) is not None


def _path(fault: Any) -> list[str]:
    """Where one of pydantic's errors is, from the section down."""
    return [str(part) for part in fault["loc"] if part != "Recipe"]


def _fault_line(fault: Any) -> str:
    """One line for one of pydantic's errors."""
    path = _path(fault)
    key = ".".join(path)
    met = fault["input"]
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden", "invalid_key"):
        return f"{key}: unknown setting{_nearest(key)}"
    if fault["type"] in ("dataclass_type", "dataclass_exact_type", "model_type", "dict_type"):
        return f"{key or 'recipe'}: must be a section with settings of its own, not {_quoted(met)}"
    if fault["type"] == "literal_error":
        expected = fault["ctx"]["expected"].replace("'", "")
        return f"{key}: {_quoted(met)} is not one of {expected}{_nearest_choice(met, expected)}"
    expected = _EXPECTED.get(fault["type"], fault["msg"].removeprefix("Input should be "))
    return f"{key}: must be {expected}, not {_quoted(met)}"


def _quoted(met: object) -> str:
    """A value as a person wrote it, on one line of bearable length."""
    text = str(met).lower() if met is None or isinstance(met, bool) else repr(met)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_keys() -> list[str]:
    return [key for key, *_ in describe()]


def _text_keys() -> set[str]:
    return {key for key, kind, *_ in describe() if kind in ("str", "str or none")}


def _nearest(key: str) -> str:
    """What was meant, most likely: `, did you mean ...?`, or what there is."""
    *above, leaf = key.split(".")
    if above[:2] == ["lora", "overrides"]:
        return _choose(leaf, [field.name for field in fields(Override)])
    known = _known_keys()
    if namesakes := [name for name in known if name.split(".")[-1] == leaf]:
        close = difflib.get_close_matches(key, namesakes, n=1, cutoff=0.75)
        return f", did you mean {' or '.join(close or namesakes)}?"
    if not above:
        return _choose(leaf, [section.name for section in fields(Recipe)])
    siblings = {name.split(".")[-1]: name for name in known if name.startswith(f"{above[0]}.")}
    everywhere = {name.split(".")[-1]: name for name in reversed(known)}
    for names, cutoff in ((siblings, 0.6), (everywhere, 0.75)):
        if close := difflib.get_close_matches(leaf, names, n=1, cutoff=cutoff):
            return f", did you mean {names[close[0]]}?"
    return _choose(leaf, list(siblings))


def _choose(met: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(met, names, n=1)
    return f", did you mean {close[0]}?" if close else f"; known here: {', '.join(names)}"


def _nearest_choice(met: object, expected: str) -> str:
    choices = expected.replace(" or ", ", ").split(", ")
    close = difflib.get_close_matches(str(met), choices, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _missing_file(path: Path) -> str:
    found = [file for folder in (path.parent, Path("configs")) for file in sorted(folder.glob("*.yaml"))]
    by_name = {file.stem: str(file) for file in reversed(found)}
    close = difflib.get_close_matches(path.stem, by_name, n=1, cutoff=0.5)
    if close:
        return f"{path}: no such file, did you mean {by_name[close[0]]}?"
    there = f"; there is: {', '.join(dict.fromkeys(map(str, found)))}" if found else ""
    return f"{path}: no such file{there}"


# YAML


class _Loader(yaml.SafeLoader):
    """YAML with the numbers and truth values of its version 1.2, and every key once.

    PyYAML's 1.1 reads `off` as false, `1e-3` as text and `10:00` as 600.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for n, key in enumerate(keys):
            if key.value in (other.value for other in keys[:n]):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} occurs twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what readers of either version would take for something else than text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Line breaks that are not ASCII must be escaped, or they are read as spaces."""
        style = '"' if set(text) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.yaml_implicit_resolvers = {}
_NUMBER = r"(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", rf"[-+]?(?:{_NUMBER})|\.(?:nan|NaN|NAN)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _read_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, lists in lists in lists
        raise yaml.YAMLError(str(error)) from None


def _yaml_fault(path: str | Path, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{path}, line {error.problem_mark.line + 1}: {error.problem}"
    return f"{path}: not YAML ({' '.join(str(error).split())})"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
