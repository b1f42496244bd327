"""What of a worker's model its other processes are given, and when."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lte import quantize
from lte.config import Recipe
from lte.nn import adapted_modules, changing_buffers, constant_tensors, fit_heads, statistics
from lte.team.orders import Step


def tensors(model: nn.Module, order: Step) -> list[Tensor]:
    """What comes with an order, in the same order in all processes: all that a local step computes with
    and that has changed since the last one."""
    found: list[Tensor] = [*trained_parameters(model)]
    found += [buffer for _, buffer in changing_buffers(model)]
    if order.whole:
        found += _of_versions(model)
    if order.constants:
        found += [tensor for _, tensor, _ in constant_tensors(model)]
    return found


def num_bytes(some: list[Tensor]) -> int:
    """How many bytes that is."""
    return sum(tensor.nbytes for tensor in some)


def _of_versions(model: nn.Module) -> Iterator[Tensor]:
    """What of modules with heads is the same during a round."""
    for _, module in adapted_modules(model):
        yield from (module.codes, module.scales)
        yield from (merged for merged in (module.merged_A, module.merged_B) if merged is not None)
        if not module.lora_A.requires_grad:
            yield module.lora_A


def fit(model: nn.Module, before: Recipe, now: Recipe, *, rank: int, scale: float) -> None:
    """Bring heads and base to the shapes of a round, as the trainer has brought the leader's.

    Args:
        before, now: with the settings of the rounds that the model is of, and is to be of. rank: the largest
            lora_rank of the model as it was built. scale: of its heads; 0: the recipe's.
    """
    if now.train.full_rank or not now.has_heads_of(before):
        fit_heads(model, now.lora, rank, own_scale=scale, full_rank=now.train.full_rank)
    for _, module in adapted_modules(model):
        if module.quant != now.base.quant:
            module.load_base(quantize.empty(module.spec.shape, now.base.quant, module.codes.device))


def summands(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """What processes add up after their backward passes: of each trained parameter its gradient, 0 where it
    has none, of each statistic its value, how many processes have which gradient, and the loss."""
    trained = trained_parameters(model)
    has = torch.tensor([float(p.grad is not None) for p in trained], device=loss.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    return [*gradients, *(statistic for _, statistic in statistics(model)), has, loss]


@torch.no_grad()
def take_means(model: nn.Module, sums: list[Tensor], processes: int) -> Tensor:
    """Have the means of what was added up. A gradient that no process has stays none.

    Statistics are the means over the processes, as contributions' are over workers.

    Returns:
        The mean loss.
    """
    trained, averaged = trained_parameters(model), [statistic for _, statistic in statistics(model)]
    *sums, has, loss = sums
    for parameter, gradient, num in zip(trained, sums[: len(trained)], has.tolist(), strict=True):
        parameter.grad = gradient.div_(processes) if num else None
    for statistic in averaged:
        statistic.div_(processes)  # it was added to in place
    return loss / processes


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """In the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
