"""Muon (Keller Jordan 2024): steps of momentum whose singular values are all made about one.

torch has one for single matrices; here a parameter may also hold the matrices of several heads, each of
which is orthogonalized by itself, and what is no matrix is stepped by AdamW, so that one optimizer and
one state hold all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lte.nn import as_matrices, from_matrices

_STEPS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5: steep at 0, at the price of ending anywhere in about 0.7 to 1.2."""
_EPS = 1e-7

Scale = Literal["original", "match-rms"]


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T, about, of each of these matrices U S V^T, by Newton and Schulz' iteration.

    Args:
        matrices: (..., m, n). dtype: in which to iterate.

    Returns:
        The same shape and dtype; zero where a matrix is zero.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if is_tall else matrices
    x: Tensor = (wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=_EPS)).to(dtype)
    rows, columns = x.shape[-2:]
    # In multiplications of (rows, rows): 17 + 4 columns / rows against 10 + 20 columns / rows. What is
    # rounded in the Gram matrix is the square of a singular value, which bf16 would not carry.
    by_gram = 2 * columns > 3 * rows and torch.finfo(dtype).bits >= 32
    x = _iterated_on_gram(x) if by_gram else _iterated(x)
    return (x.mT if is_tall else x).to(matrices.dtype)


def _iterated(x: Tensor) -> Tensor:
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def _iterated_on_gram(x: Tensor) -> Tensor:
    """The same: x is multiplied from the left by polynomials of its Gram matrix, which all commute."""
    a, b, c = _QUINTIC
    gram, product = x @ x.mT, None
    for step in range(_STEPS):
        factor = b * gram + c * (gram @ gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step < _STEPS - 1:
            gram = factor @ gram @ factor
    assert product is not None
    return product @ x


def scale_of(shape: torch.Size, scale: Scale) -> float:
    """Factor on the step of a matrix (..., out, in).

    `original`: sqrt(max(1, out / in)). `match-rms`: 0.2 sqrt(max(out, in)), with which a step's root mean
    square is about AdamW's, so that AdamW's learning rates do.
    """
    out_features, in_features = shape[-2:]
    if scale == "original":
        return math.sqrt(max(1.0, out_features / in_features))
    return 0.2 * math.sqrt(max(out_features, in_features))


class Muon(torch.optim.Optimizer):
    """Muon for groups that say `orthogonal`, AdamW for all others.

    m <- mu m + (1 - mu) g; W <- (1 - lr decay) W - lr scale orthogonalized((1 - mu) g + mu m).
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        dtype: torch.dtype,
        scale: Scale,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Make it.

        Args:
            params: groups, each with `orthogonal`: whether it holds matrices to step so; and how these lie,
                `layout`, where that is not (..., out, in).
            momentum: mu. dtype, scale: see `orthogonalized`, `scale_of`. betas, eps: AdamW's.
        """
        # `fused` for torch's `load_state_dict`: a fused step has its count where the parameter is.
        defaults = {"lr": lr, "weight_decay": 0.0, "orthogonal": False, "layout": "matrices", "fused": True}
        super().__init__(params, defaults | {"momentum": momentum, "betas": betas, "eps": eps})
        self._dtype, self._scale = dtype, scale

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step once; see torch.optim.Optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                for parameter in with_gradient:
                    self._step_matrix(parameter, group)
            elif with_gradient:
                self._step_rest(with_gradient, group)
        return loss

    def _step_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        matrices = as_matrices(gradient.lerp(momentum, group["momentum"]), group["layout"])
        direction = from_matrices(orthogonalized(matrices, self._dtype), parameter.shape, group["layout"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * scale_of(matrices.shape, self._scale))

    def _step_rest(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
