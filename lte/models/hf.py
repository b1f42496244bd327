"""Any model of the transformers library, from scratch. The library is imported when one is asked for, and
nothing is ever fetched."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lte.config import Model
from lte.errors import ConfigError, UserError
from lte.lowrank import seed_of
from lte.nn import has_split_experts, split_experts

Kind = Literal["text", "images", "regression"]
"""What is read; the recipe's checks let no model of transformers read a regression's."""

_NOT_COMPUTED = (
    "drop",
    "token_id",
    "init",
    "cache",
    "aux_loss",
    "output_router_logits",
    "router_jitter",
    "is_decoder",
    "pretraining",
)
"""Parts of the names of settings that change nothing of what a trained model computes."""
_READ = re.compile(
    r"""\bconfig\.([a-z]\w*)|\bgetattr\((?:self\.)?config, ["'](\w+)|\bkwargs\.(?:pop|get)\(["'](\w+)"""
)
"""How code takes a setting from a config."""
_WEIGHTS_OF_BALANCE = ("router_aux_loss_coef", "aux_loss_coef")
_PADDING = "pad_token_id"
_SPECIAL_TOKENS = (_PADDING, "bos_token_id", "eos_token_id")
_NO_TOKEN = -1
"""What padding is to models that compare their tokens with it: none of them, so that all are counted."""
_COMPARES = re.compile(r"\binput_ids(?:\.ne\(| != )(?:self\.)?(?:padding_idx|pad_index)\b")
"""How code of such a model does that."""


def build(config: Model, kind: Kind) -> nn.Module:
    """A causal language model, or a classifier of images, on the device that torch makes tensors on, as the
    library makes it.

    Raises:
        ConfigError: no such architecture, settings that it does not know, or cannot be made a model of.
        UserError: transformers is not installed.
    """
    auto, made = _configured(config, kind)
    counts_all = getattr(made, _PADDING, None) == _NO_TOKEN
    try:
        with quiet() if counts_all else nullcontext():
            model: nn.Module = auto.from_config(made)
    except Exception as error:  # whatever a model raises on settings that do not fit each other
        raise _impossible(config, error) from None
    if counts_all:
        _train_all_rows(model)
    if getattr(made, "output_router_logits", False) and _weight_of_balance(model) is None:
        raise ConfigError(
            [
                f"model.config.output_router_logits: this {config.architecture} has no loss that balances its"
                " experts, or no weight of it; leave it out"
            ]
        )
    positions, before = getattr(made, "max_position_embeddings", None), _positions_of_padding(model)
    if kind == "text" and isinstance(positions, int) and 0 < positions < config.context_tokens + before:
        raise ConfigError(
            [
                f"model.context_tokens: {config.context_tokens} is more than the {positions - before}"
                f" positions of this {config.architecture}; set"
                f" model.config.max_position_embeddings={config.context_tokens + before}"
            ]
        )
    return model


def _train_all_rows(model: Any) -> None:
    """Have a model without a token for padding train every row of its tables: torch takes that number for
    the last one. Nor would the library write such a generation config."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    if model.can_generate():
        model.generation_config.pad_token_id = None


def _positions_of_padding(model: nn.Module) -> int:
    """How many positions no token has, as a model counts them from its padding's on."""
    counting = (
        module
        for module in model.modules()
        if hasattr(module, "create_position_ids_from_input_ids")
        and isinstance(getattr(module, "position_embeddings", None), nn.Embedding)
    )
    return next((int(module.padding_idx) + 1 for module in counting), 0)  # type: ignore[arg-type]


def need() -> None:
    """See that the library is there.

    Raises:
        UserError: it is not.
    """
    try:
        from transformers.models.auto import configuration_auto  # noqa: F401
    except ImportError:
        raise UserError(
            "models of transformers and its layout need the library of that name; pip install 'lte[hf]'"
        ) from None


def _configured(config: Model, kind: Kind) -> tuple[Any, Any]:
    """The library's class that makes models of this kind, and the config of this one; see `build`."""
    need()
    from transformers.models.auto import configuration_auto, modeling_auto

    names: Mapping[str, Sequence[str]]
    auto: Any
    if kind == "text":
        names, auto = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.AutoModelForCausalLM
    else:
        names = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        auto = modeling_auto.AutoModelForImageClassification
    architecture = config.architecture or ""
    if architecture not in names:
        hint = _nearest(architecture, names)
        raise ConfigError([f"model.architecture: transformers has no {architecture!r} for {kind}{hint}"])
    config_class: Any = configuration_auto.CONFIG_MAPPING[architecture]
    settings = _settings(config, kind, auto, config_class)
    try:
        with quiet() if settings.get(_PADDING) == _NO_TOKEN else nullcontext():
            made = config_class(**settings)
    except Exception as error:  # of settings that do not fit each other
        raise _impossible(config, error) from None
    if not isinstance(classes := names[architecture], str):  # among which the library chooses by its name
        made.architectures = [classes[0]]
    return auto, made


def _impossible(config: Model, error: Exception) -> ConfigError:
    reason = in_a_line(error)
    return ConfigError(
        [f"model.config: transformers can make no {config.architecture} of these settings ({reason})"]
    )


def in_a_line(error: Exception) -> str:
    """What a library says, short enough for a line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _settings(config: Model, kind: Kind, auto: Any, config_class: Any) -> dict[str, Any]:
    """What the model's config is made of: the recipe's, and defaults for training from scratch.

    Raises:
        ConfigError: settings that the config does not know.
    """
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    names = {*fields, *config_class.attribute_map}
    known = names
    if any(name not in names for name in config.config):
        known = names | _read_of_config(auto, config_class)
    if unknown := [name for name in config.config if name not in known]:
        raise ConfigError(
            [
                f"model.config.{name}: unknown setting of {config.architecture}"
                f"{_nearest(name, known, 'model.config.')}"
                for name in unknown
            ]
        )
    if kind == "text":
        # Packed text has no special tokens; one that pads would have an embedding that is not trained.
        scratch: dict[str, Any] = dict.fromkeys(_SPECIAL_TOKENS)
        scratch |= {"vocab_size": config.vocab_size, "is_decoder": True}
        if _compares_padding(auto, config_class):
            scratch[_PADDING] = _NO_TOKEN
    else:
        scratch = {"image_size": config.image_size, "num_channels": config.channels}
    scratch = {name: value for name, value in scratch.items() if name in names}
    scratch |= {
        name: 0.0 for name, default in fields.items() if "drop" in name and isinstance(default, float)
    }
    if kind == "images":
        scratch["num_labels"] = config.num_classes  # a property, not a field
    return scratch | config.config


def _read_of_config(auto: Any, config_class: Any) -> set[str]:
    """Names that an architecture's code takes from its config though it declares no such field, as the
    `head_dim` of some: the config stores whatever it is given, misspelt or not."""
    sources = _sources(auto, config_class)
    return {name for source in sources for match in _READ.finditer(source) for name in match.groups() if name}


def _compares_padding(auto: Any, config_class: Any) -> bool:
    """Whether an architecture's code looks for padding among its tokens, as those that count positions by
    what is none: it needs a number for it, and computes something else with another one."""
    return any(_COMPARES.search(source) for source in _sources(auto, config_class))


def _sources(auto: Any, config_class: Any) -> list[str]:
    """The code of an architecture and of its config."""
    found = auto._model_mapping[config_class]
    model_class = found[0] if isinstance(found, tuple) else found
    modules = {inspect.getmodule(one) for one in (model_class, config_class)}
    return [inspect.getsource(module) for module in modules if module is not None]


Misshapen = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name of a tensor that was read, its shape there, and in the model."""


@dataclass(frozen=True)
class Read:
    """Weights that were read from a folder.

    Attributes:
        tensors: fp32, by the model's names, experts split. missing: names of those that the folder does not
            have, as the library has them. unknown: names of what it has beside. misshapen: those of another
            shape.
    """

    tensors: dict[str, Tensor]
    missing: set[str]
    unknown: set[str]
    misshapen: set[Misshapen]


def compare(config: Model, kind: Kind, folder: Path) -> None:
    """Refuse a folder in the library's layout whose config is of another model than this one.

    Raises:
        ConfigError: it is, or cannot be read. UserError: transformers is not installed.
    """
    _, made = _configured(config, kind)
    if differs := _difference(made, config_of(folder)):
        raise ConfigError([f"model.init_from: {folder} holds another model: {differs}"])


def config_of(folder: Path) -> Any:
    """The library's config of a folder.

    Raises:
        ConfigError: it cannot be read. UserError: transformers is not installed.
    """
    need()
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of files that are damaged or of unknown models, in many classes
        raise ConfigError([f"model.init_from: {folder} cannot be read ({in_a_line(error)})"]) from None


def read(config: Model, kind: Kind, folder: Path) -> Read:
    """Weights for a model of `build` from a folder in the library's layout, which `compare` has seen; no
    pickles are opened. They are converted one at a time, so that memory is that of one model in fp32.

    Raises:
        ConfigError: it cannot be read. UserError: transformers is not installed.
    """
    auto, made = _configured(config, kind)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model, found = auto.from_pretrained(
                folder,
                config=made,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # of files that are missing or damaged, in many classes
        # The library compares tied tensors and fails where one of them has another shape; and where experts
        # cannot be stacked, which one it is stands in a report that `quiet` keeps back.
        seen = _seen(auto, made, folder)
        if seen is not None and (seen.misshapen or (seen.missing and isinstance(error, RuntimeError))):
            return seen
        raise ConfigError([f"model.init_from: {folder} cannot be read ({in_a_line(error)})"]) from None
    # Of experts that are too few the library tells the stack. Names of old are known to it alone.
    seen = _seen(auto, made, folder) if found["mismatched_keys"] else None
    if seen is not None and seen.unknown <= set(found["unexpected_keys"]):
        return seen
    split_experts(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    model.to("meta")  # it refers to itself: what is taken of the tensors would live on in it
    return Read(
        tensors=tensors,
        missing=set(found["missing_keys"]),
        unknown=set(found["unexpected_keys"]),
        misshapen={(name, tuple(one), tuple(other)) for name, one, other in found["mismatched_keys"]},
    )


def _seen(auto: Any, made: Any, folder: Path) -> Read | None:
    """What the heads of a folder's files tell, without tensors, by the names that the library writes; None
    where they cannot be read, or most names there are others."""
    from transformers.core_model_loading import revert_weight_conversion

    with quiet(), torch.device("meta"):
        model = auto.from_config(made)
        written = revert_weight_conversion(model, model.state_dict())
    here = {name: tuple(tensor.shape) for name, tensor in written.items()}
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    there: dict[str, tuple[int, ...]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                there |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if 2 * len(here.keys() & there.keys()) < len(here):
        return None
    return Read(
        tensors={},
        missing=here.keys() - there.keys() - tied,  # which are written once
        unknown=there.keys() - here.keys(),
        misshapen={
            (name, there[name], here[name]) for name in here if name in there and there[name] != here[name]
        },
    )


def _difference(made: Any, there: Any) -> str:
    """In what the model of a recipe computes something else than that of a folder, in words, or ''."""
    if made.model_type != there.model_type:
        return f"a {there.model_type}, not a {made.model_type}"
    return ", ".join(
        f"{name} is {getattr(there, name, None)}, not {getattr(made, name, None)}"
        for name in computed(made)
        if getattr(made, name, None) != getattr(there, name, None)
    )


def computed(made: Any) -> list[str]:
    """Names of those settings of a config that decide what a trained model computes."""
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    of_all = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = [field.name for field in dataclasses.fields(made) if field.name not in of_all]
    names = [name for name in dict.fromkeys([*names, "tie_word_embeddings"]) if is_computed(name)]
    auto: Any = AutoModelForCausalLM
    if type(made) in auto._model_mapping and _compares_padding(auto, type(made)):
        names.append(_PADDING)
    return names


def is_computed(name: str) -> bool:
    """Whether a setting of this name decides what a trained model computes."""
    return not any(part in name for part in _NOT_COMPUTED)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's warnings and progress bars from the terminal."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def _nearest(met: str, names: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(met, sorted(names), n=1)
    return (
        f", did you mean {prefix}{close[0]}?"
        if close
        else f"; there are: {', '.join(sorted(names)[:12])}, ..."
    )


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """The library's own initialization, each module's from a seed of its own name. What has values by the
    making of its module alone is taken from another model that the library makes, from a seed.

    The library draws from torch's global generator, which is put back afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        if left := _left_out(model, seed):
            torch.manual_seed(seed_of(seed, "init", ""))
            with quiet(), torch.device("cpu"):
                made = type(model)._from_config(model.config)  # type: ignore[attr-defined]
            values = _tensors(split_experts(made) if has_split_experts(model) else made)
            for name, tensor in left.items():
                tensor.copy_(values[name])


def _left_out(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Have each module of a model give its tensors values. Returns those that kept what they had before."""
    tensors = {name: tensor for name, tensor in _tensors(model).items() if not tensor.is_meta}
    for tensor in tensors.values():
        tensor.fill_(_nothing(tensor.dtype))
    _draw(model, seed)
    left = {name: tensor for name, tensor in tensors.items() if bool(_is_nothing(tensor).any())}
    if flags := {name: tensor for name, tensor in left.items() if tensor.dtype == torch.bool}:
        # Of two values each is one that a module may give: both are tried.
        given = {name: tensor.clone() for name, tensor in flags.items()}
        for tensor in flags.values():
            tensor.fill_(True)
        _draw(model, seed)
        for name, tensor in flags.items():
            if torch.equal(tensor, given[name]):
                del left[name]
    return left


def _draw(model: nn.Module, seed: int) -> None:
    for name, module, owner in _modules(model):
        torch.manual_seed(seed_of(seed, "init", name))
        owner._init_weights(module)  # type: ignore[operator]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _nothing(dtype: torch.dtype) -> float:
    """What stands for no value yet."""
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return False if dtype == torch.bool else torch.iinfo(dtype).max


def _is_nothing(tensor: Tensor) -> Tensor:
    return tensor.isnan() if math.isnan(_nothing(tensor.dtype)) else tensor == _nothing(tensor.dtype)


def _modules(
    module: nn.Module, name: str = "", owner: nn.Module | None = None
) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, module, the innermost model around it, which knows how it begins), children first: some
    models give a child's weights their values by way of its parent."""
    if owner is None or hasattr(module, "_init_weights"):
        owner = module
    for child_name, child in module.named_children():
        yield from _modules(child, f"{name}.{child_name}".lstrip("."), owner)
    yield name, module, owner


def outputs(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits, and while training the loss that balances the experts of a mixture, times its weight, if
    its config asks for it (`output_router_logits`)."""
    given = {"use_cache": False} if model.main_input_name == "input_ids" else {}
    found = model(inputs, **given)
    auxiliary = getattr(found, "aux_loss", None)
    if auxiliary is None or not model.training:
        return found.logits, None
    return found.logits, _weight_of_balance(model) * auxiliary


def _weight_of_balance(model: nn.Module) -> Any:
    """What a mixture's model of the library multiplies the loss that balances its experts by, or None. Its
    config has that under many names, and not always at the top."""
    named = (getattr(model, name, None) for name in _WEIGHTS_OF_BALANCE)
    return next((weight for weight in named if weight is not None), None)
