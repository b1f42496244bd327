"""How the factors of heads travel: as the change from what the server knows of them.

What a codec leaves out of the change of A - A' or B - B' stays in it and is owed to the next
contribution (error feedback). That is exact where both factors are known to the bit. In reset-b with
a trained, lossily sent A the product would be wrong by B times what was left out of A. So A is set to
what was sent of it, and B takes over what that A can hold of the difference; the rest is lost, and measured.

Shapes: A (H, r, in), B (H, out, r), H heads; never a matrix (out, in).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lte.compress import blockwise
from lte.config import Codec, Recipe
from lte.errors import WireError

DAMPING = 1e-3
"""Of what B takes over, see `refit`. Less of it lets B grow where A is small, and codecs round B by its
largest numbers: what they leave out is owed, refitted, and grows from round to round."""
A, B = "/A", "/B"
"""Endings of names of factors."""


def codec_of(name: str, recipe: Recipe, *, is_known: bool) -> tuple[Codec, int | None]:
    """Codec and rank by which a factor travels.

    Args:
        name: `MODULE/A` or `MODULE/B`. is_known: the server knows an earlier value of it.
    """
    settings = recipe.compress
    if recipe.train.full_rank:
        return settings.dense, None
    if name.endswith(A) and not is_known:
        if recipe.lora.merge == "reset":  # an A for one round only is never known
            return settings.factors, None
        # Once, and nearly whole: what comes after is the change from it.
        return ("fp32" if settings.factors == "fp32" else "bf16"), None
    return settings.factors, settings.truncate_rank


def is_lossy(recipe: Recipe) -> bool:
    """Whether factors as sent differ from what they are."""
    return recipe.compress.factors != "fp32" or recipe.compress.truncate_rank is not None


def refits(recipe: Recipe) -> bool:
    """Whether a worker sets A to what was sent of it, and refits B."""
    return recipe.is_A_sent and not recipe.lora.keeps_factors and is_lossy(recipe)


def remembers_A(recipe: Recipe) -> bool:
    """Whether the server remembers a worker's A though no part of it stays merged."""
    return refits(recipe) and recipe.lora.merge == "reset-b"


def max_bytes(name: str, shape: tuple[int, ...], recipe: Recipe) -> int:
    """Most bytes that a factor `name` of this shape (H, m, n) takes, known before or not."""
    most = 0
    for is_known in (False, True):
        codec, truncate_rank = codec_of(name, recipe, is_known=is_known)
        if truncate_rank is None or not truncates(shape, truncate_rank):
            most = max(most, blockwise.max_rows_bytes(shape, codec))
        else:
            sides = (shape[0] * size * truncate_rank for size in shape[1:])
            most = max(most, 4 + sum(blockwise.max_bytes(side, codec) for side in sides))
    return most


def encode(difference: Tensor, codec: Codec, truncate_rank: int | None) -> tuple[Tensor, Tensor]:
    """Encode the change of one factor of all heads, (H, m, n), fp32.

    Args:
        truncate_rank: send the best approximation of this rank (of the factor's change, which is a
            matrix of at most r rows or columns), as two matrices, where these are smaller; None: all.

    Returns:
        The bytes, and what `decode` makes of them.
    """
    if not truncates(difference.shape, truncate_rank):
        # By rows: of B of an embedding only those of the tokens that were met have changed.
        blob, rebuilt = blockwise.encode_rows(difference.flatten(0, 1), codec)
        return blob, rebuilt.view(difference.shape)
    U, S, Vh = torch.linalg.svd(difference, full_matrices=False)
    root = S[:, None, :truncate_rank].sqrt()  # shared out, so that both sides are of one size
    left, sent_left = blockwise.encode(U[..., :truncate_rank] * root, codec)
    right, sent_right = blockwise.encode(root.mT * Vh[:, :truncate_rank], codec)
    length = torch.tensor([left.numel()], dtype=torch.int32).view(torch.uint8)
    return torch.cat([length, left, right]), _product(sent_left, sent_right)


def decode(blob: Tensor, codec: Codec, shape: tuple[int, ...], truncate_rank: int | None) -> Tensor:
    """The change of a factor of this shape, (H, m, n), that `encode` made these bytes of.

    Raises:
        WireError: it did not.
    """
    if not truncates(shape, truncate_rank):
        return blockwise.decode_rows(blob, codec, (shape[0] * shape[1], shape[2])).view(shape)
    assert truncate_rank is not None
    H, m, n = shape
    if blob.numel() < 4:
        raise WireError("a truncated factor of fewer than 4 bytes")
    length = int(blob[:4].clone().view(torch.int32))
    if not 0 <= length <= blob.numel() - 4:
        raise WireError("a truncated factor whose left side ends beyond it")
    left = blockwise.decode(blob[4 : 4 + length], codec, (H, m, truncate_rank))
    return _product(left, blockwise.decode(blob[4 + length :], codec, (H, truncate_rank, n)))


def truncates(shape: tuple[int, ...], truncate_rank: int | None) -> bool:
    """Whether a factor (..., m, n) travels as two matrices of this rank: where these are smaller."""
    m, n = shape[-2:]
    return truncate_rank is not None and truncate_rank * (m + n) < m * n


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, element by element in one order: a matrix product's last bits depend on the
    machine, and server and worker must agree on them."""
    total = torch.zeros(*left.shape[:-1], right.shape[-1])
    for k in range(left.shape[-1]):
        total += left[..., k : k + 1] * right[..., k : k + 1, :]
    return total


def refit(B: Tensor, A: Tensor, new_A: Tensor, damping: float = 1e-9) -> Tensor:
    """The B of the product B A for another A: argmin over X of |X new_A - B A|^2 + d |X|^2.

    d is `damping` times the mean of the squared singular values of new_A. Without it X has no bound where
    new_A hardly reaches: beyond its columns (r > in), or where training has shrunk it.

    Args:
        B: (H, out, r). A: (H, r, in). new_A: (H, r', in).
    """
    gram, right = new_A.double() @ new_A.double().mT, B.double() @ (A.double() @ new_A.double().mT)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += damping * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.double).tiny
    solved = torch.cholesky_solve(right.mT, torch.linalg.cholesky(gram)).mT
    return solved.float().contiguous()


def lost(B: Tensor, A: Tensor, new_B: Tensor, new_A: Tensor) -> tuple[float, float]:
    """Squared norms of B A - new_B new_A and of B A, summed over heads, from small matrices alone."""

    def squared_norm(left: Tensor, right: Tensor) -> float:
        left, right = left.double(), right.double()
        return float(((left.mT @ left) * (right @ right.mT)).sum())

    difference = squared_norm(torch.cat([B, -new_B], -1), torch.cat([A, new_A], -2))
    return max(difference, 0.0), squared_norm(B, A)
