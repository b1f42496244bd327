"""Which modules can take heads, at which of their parameters, and what takes their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from lte.config import LoRA
from lte.nn.embedding import LoRAEmbedding, can_adapt
from lte.nn.linear import LoRALinear
from lte.nn.sites import HeadSpec
from lte.quantize import Quant


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
    """

    called: str
    fits: Callable[[nn.Module], bool]
    slots: Callable[[nn.Module], tuple[Slot, ...]]
    with_heads: Callable[[nn.Module, Mapping[str, HeadSpec], LoRA, Quant], nn.Module]


def is_a(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this kind and computes nothing else: a subclass may have other manners,
    but no other forward, and nothing that would be lost in its place."""
    own = type(module)
    return (
        isinstance(module, kind)
        and own.forward is kind.forward
        and getattr(own, "_conv_forward", None) is getattr(kind, "_conv_forward", None)
        and {"weight"} <= module._parameters.keys() <= {"weight", "bias"}
        and not module._buffers
        and not module._modules
    )


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module; None where it can take no heads."""
    return next((kind for kind in KINDS if kind.fits(module)), None)


def is_table(module: nn.Module) -> bool:
    """Whether it is an embedding."""
    return is_a(module, nn.Embedding)


def can_take_heads(module: nn.Module) -> bool:
    """Whether a module of some kind is none of its exceptions."""
    return not isinstance(module, nn.Embedding) or can_adapt(module)


def _one_slot(module: nn.Module) -> tuple[Slot, ...]:
    return (Slot(),)


def _linear(plain: nn.Module, specs: Mapping[str, HeadSpec], lora: LoRA, quant: Quant) -> nn.Module:
    assert isinstance(plain, nn.Linear)
    return LoRALinear(plain, specs[""], lora, quant)


def _embedding(plain: nn.Module, specs: Mapping[str, HeadSpec], lora: LoRA, quant: Quant) -> nn.Module:
    assert isinstance(plain, nn.Embedding)
    return LoRAEmbedding(plain, specs[""], lora, quant)


KINDS = (
    Kind("nn.Linear", lambda module: is_a(module, nn.Linear), _one_slot, _linear),
    Kind("nn.Embedding", is_table, _one_slot, _embedding),
)
