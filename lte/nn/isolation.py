"""Whether heads that are to have a slice of the batch each are given that: as far as shapes tell before a
run, and then in its first local step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lte.errors import ConfigError
from lte.nn.adapted import Adapted, indivisible
from lte.nn.plan import Plan
from lte.printable import some


def rehearse(model: nn.Module, plan: Plan, num_slices: int, run: Callable[[], object]) -> None:
    """Run a plain model and refuse what its modules with heads could not cut into slices.

    Nothing is refused of a model that cannot run on the meta device, as its way depends on numbers.

    Args:
        model: on the meta device, in training. run: calls it with a batch of a local step there.

    Raises:
        ConfigError: a module's batch cannot be cut.
    """
    owners = {id(model.get_parameter(spec.parameter)): name for name, spec in plan.adapted.items()}
    handles = []

    def look(site: str, module: nn.Module, given: tuple[object, ...]) -> None:
        if given and isinstance(given[0], Tensor) and given[0].dim():
            has_batch = not (isinstance(module, nn.Conv2d) and given[0].dim() == 3)
            batch = given[0].shape[0] if has_batch else 1
            if batch % num_slices:
                raise indivisible(site, batch, num_slices)

    for module in model.modules():
        if not isinstance(module, nn.MultiheadAttention):  # which knows where its batch is
            sites = {owners.get(id(parameter)) for parameter in module.parameters(recurse=False)} - {None}
            handles += [module.register_forward_pre_hook(partial(look, site)) for site in sites if site]
    try:
        run()
    except ConfigError:
        raise
    except Exception:  # any: of a model whose way depends on its numbers, say
        return
    finally:
        for handle in handles:
            handle.remove()


def watch_slices(model: nn.Module, adapted: Mapping[str, Adapted]) -> None:
    """Look, at the model's next forward pass in training, whether its heads see their own samples alone.

    A module cuts its input's first dimension into slices, one a head, and takes it for the batch. It is not
    in a module that is given (time, batch, width), or rows that were gathered from all samples. What is
    looked at is what the heads of the last slice must alone have made: the model's outputs for its samples,
    which may have no gradient in another head. It costs one backward pass more, once.

    It is not looked at where nothing among the outputs has the batch's size, as where the model gives a loss,
    and where norms mix samples by their statistics.

    Raises:
        ConfigError: (in that forward pass) a head's outputs depend on another one's.
    """
    sliced = {name: module for name, module in adapted.items() if module.num_slices > 1}
    if not sliced:
        return

    def look(_: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        handle.remove()
        mixes = any(isinstance(module, _BatchNorm) and module.training for module in model.modules())
        if not mixes and (output := _of_batch((args, kwargs), outputs)) is not None:
            _check(sliced, output)

    handle = model.register_forward_hook(look, with_kwargs=True)


def _of_batch(inputs: Any, outputs: Any) -> Tensor | None:
    """The first output that asks for a gradient, and has the first dimension of an input."""
    sizes = {tensor.shape[0] for tensor in _tensors(inputs) if tensor.dim()}
    found = (tensor for tensor in _tensors(outputs) if tensor.requires_grad and tensor.dim())
    return next((tensor for tensor in found if tensor.shape[0] in sizes), None)


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Mapping):
        for value in nested.values():
            yield from _tensors(value)
    elif isinstance(nested, Sequence) and not isinstance(nested, str):
        for value in nested:
            yield from _tensors(value)


def _check(sliced: Mapping[str, Adapted], output: Tensor) -> None:
    """Raise where the last samples' part of an output has a gradient in another head than the last."""
    num_slices = next(iter(sliced.values())).num_slices
    if output.shape[0] % num_slices:
        return
    last = output[-(output.shape[0] // num_slices) :]
    # Of random weights, as sums of softmaxes and norms have no gradient.
    weights = torch.randn(last.shape, generator=torch.Generator().manual_seed(0)).to(last)
    gradients = torch.autograd.grad(
        last, [module.lora_B for module in sliced.values()], weights, retain_graph=True, allow_unused=True
    )
    named = zip(sliced, gradients, strict=True)
    mixed = [name for name, grad in named if grad is not None and bool(grad[:-1].any())]
    if mixed:
        raise ConfigError(
            [
                f"{some(mixed)}: heads see each other's samples, as the first"
                " dimension of what they are given is not the batch, or the model mixes its samples; have it"
                " first (batch_first=True, say), set lora.heads=1, or name them in lora.exclude"
            ]
        )
