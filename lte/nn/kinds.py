"""Which modules can take heads, at which of their parameters, and what takes their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lte.config import LoRA
from lte.nn.adapted import Adapted
from lte.nn.attention import LoRAMultiheadAttention
from lte.nn.conv import LoRAConv2d
from lte.nn.embedding import LoRAEmbedding, TiedEmbedding, can_adapt
from lte.nn.linear import LoRALinear, TiedLinear
from lte.nn.sites import HeadSpec
from lte.printable import some
from lte.quantize import Quant

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

_FORWARDS = ("forward", "_conv_forward")
"""Methods in which the kinds below compute what they compute."""
_LIKE_LINEAR = {("transformers.models.falcon.modeling_falcon", "FalconLinear")}
"""Subclasses of `nn.Linear` that write down anew what it computes."""


@dataclass(frozen=True)
class Slot:
    """A parameter of a module that heads can stand for.

    Attributes:
        suffix: of the site's name, after the module's. ending: what its parameter's name has after the
            site's. transposed: it is (in, out).
    """

    suffix: str = ""
    ending: str = ".weight"
    transposed: bool = False

    @property
    def attribute(self) -> str:
        """Name of the parameter in its module."""
        return (self.suffix + self.ending).removeprefix(".")


@dataclass(frozen=True)
class Kind:
    """A kind of modules that can take heads.

    Attributes:
        called: what people call it. fits: whether a module is one. slots: its parameters for heads.
        with_heads: what takes its place, given the heads of those of its slots that get some, by suffix.
        holds: a child that is a site of its own, but whose weight this module's forward reads, so that
            it must be replaced where that one is.
    """

    called: str
    fits: Callable[[nn.Module], bool]
    slots: Callable[[nn.Module], tuple[Slot, ...]]
    with_heads: Callable[[nn.Module, Mapping[str, HeadSpec], LoRA, Quant], nn.Module]
    holds: str = ""


def is_a(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this kind and computes nothing else: a subclass may have other manners,
    but no other forward, and nothing that would be lost in its place."""
    return (
        isinstance(module, kind)
        and _computes(module, kind)
        and not _has_own_forward(module)
        and {"weight"} <= module._parameters.keys() <= {"weight", "bias"}
        and not module._buffers
        and not module._modules
        and not _added(module, kind)
    )


def _computes(module: nn.Module, kind: type[nn.Module]) -> bool:
    own = type(module)
    same = all(getattr(own, method, None) is getattr(kind, method, None) for method in _FORWARDS)
    return same or (kind is nn.Linear and (own.__module__, own.__qualname__) in _LIKE_LINEAR)


def _names(kind: type[nn.Module]) -> frozenset[str]:
    sizes = (1, 1, 1) if kind is nn.Conv2d else (1, 1)
    return frozenset(dir(kind(*sizes, device="meta")))


def _added(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Public names that a module of a subclass has beside the kind's, in its classes or of its own: the rest
    of the model may use them, and what takes its place has none of them."""
    if type(module) is kind:
        return []
    of_classes = (name for owner in type(module).__mro__ for name in vars(owner))
    found, known = dict.fromkeys((*of_classes, *vars(module))), _names(kind)
    return [name for name in found if not name.startswith("_") and name not in known]


def why_none(module: nn.Module) -> str:
    """Why a module of a subclass can take no heads, in words; '' where it can, or is of none."""
    bases = (nn.Linear, nn.Conv2d, nn.MultiheadAttention, nn.Embedding)
    kind = next((base for base in bases if isinstance(module, base)), None)
    if kind is None or type(module) is kind or kind_of(module):
        return ""
    if not _computes(module, kind) or _has_own_forward(module):
        return f"{type(module).__name__} computes in a forward of its own"
    held = (*module._parameters, *module._buffers, *module._modules)
    known = _names(kind)
    own = [*_added(module, kind), *(name for name in held if name not in known)]
    return f"{type(module).__name__} has {some(own)} of its own, which would be lost"


def _has_own_forward(module: nn.Module) -> bool:
    """Whether somebody gave this one module another forward, which would be lost."""
    return any(method in module.__dict__ for method in _FORWARDS)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module; None where it can take no heads."""
    return next((kind for kind in KINDS if kind.fits(module)), None)


def is_table(module: nn.Module) -> bool:
    """Whether it is an embedding."""
    return is_a(module, nn.Embedding)


def can_share(module: nn.Module) -> bool:
    """Whether it can compute with the base and heads of another module."""
    return is_a(module, nn.Linear) or (is_table(module) and can_take_heads(module))


def tied_to(module: nn.Module, adapted: Adapted) -> nn.Module:
    """What takes the place of a module that `can_share`, where another has its weight."""
    if isinstance(module, nn.Linear):
        return TiedLinear(module, adapted)
    assert isinstance(module, nn.Embedding)
    return TiedEmbedding(module, adapted)


def is_depthwise(module: Convolution) -> bool:
    """Whether each of its channels is convolved by itself."""
    return module.groups == module.in_channels > 1


def can_take_heads(module: nn.Module) -> bool:
    """Whether a module of some kind is none of its exceptions."""
    if isinstance(module, nn.Conv2d):
        return not is_depthwise(module)  # whose factors would be larger than the kernel
    return not isinstance(module, nn.Embedding) or can_adapt(module)


def _is_transformers_conv1d(module: nn.Module) -> bool:
    own = type(module)
    named = (own.__module__, own.__qualname__) == ("transformers.pytorch_utils", "Conv1D")
    return named and not _has_own_forward(module)


def _is_attention(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and not _has_own_forward(module)
        and module._modules.keys() == {"out_proj"}
        and not module._buffers
        and not _added(module, nn.MultiheadAttention)
    )


def _weight(module: nn.Module) -> tuple[Slot, ...]:
    return (Slot(),)


def _transposed_weight(module: nn.Module) -> tuple[Slot, ...]:
    return (Slot(transposed=True),)


def _projections(module: nn.Module) -> tuple[Slot, ...]:
    """Of an attention, but for `out_proj`, which is a module of its own."""
    slots = (Slot(f".{site}", "_weight") for site in ("in_proj", "q_proj", "k_proj", "v_proj"))
    return tuple(slot for slot in slots if getattr(module, slot.attribute) is not None)


def _linear(plain: Any, specs: Mapping[str, HeadSpec], lora: LoRA, quant: Quant) -> nn.Module:
    return LoRALinear(plain.weight, plain.bias, specs[""], lora, quant)


def _conv(plain: Any, specs: Mapping[str, HeadSpec], lora: LoRA, quant: Quant) -> nn.Module:
    return LoRAConv2d(plain, specs[""], lora, quant)


def _embedding(plain: Any, specs: Mapping[str, HeadSpec], lora: LoRA, quant: Quant) -> nn.Module:
    return LoRAEmbedding(plain, specs[""], lora, quant)


def _attention(plain: Any, specs: Mapping[str, HeadSpec], lora: LoRA, quant: Quant) -> nn.Module:
    return LoRAMultiheadAttention(plain, specs, lora, quant)


KINDS = (
    Kind("nn.Linear", lambda module: is_a(module, nn.Linear), _weight, _linear),
    Kind("nn.Conv2d", lambda module: is_a(module, nn.Conv2d), _weight, _conv),
    Kind("nn.MultiheadAttention", _is_attention, _projections, _attention, holds="out_proj"),
    Kind("Conv1D of transformers", _is_transformers_conv1d, _transposed_weight, _linear),
    Kind("nn.Embedding", is_table, _weight, _embedding),
)
