"""Where heads are put: which parameter of the plain model, and how it lies as a matrix.

Server and worker speak of sites. A site is named for the module that takes the heads; its plain parameter
has a name of its own, and need not be a matrix (out, in). Pure functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lte import lowrank


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What the heads of one site are.

    Attributes:
        name: of the site. ending: what the plain parameter's name has after it.
        plain_shape: of the plain parameter: (out, ...), or (in, out) where it is transposed.
        rank: r. scale: s. init: how A starts.
    """

    name: str
    plain_shape: tuple[int, ...]
    rank: int
    scale: float
    init: lowrank.Init
    ending: str = ".weight"
    transposed: bool = False

    @property
    def parameter(self) -> str:
        """Name of the plain parameter."""
        return self.name + self.ending

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the plain parameter as a matrix."""
        if self.transposed:
            in_features, out_features = self.plain_shape
            return out_features, in_features
        return self.plain_shape[0], math.prod(self.plain_shape[1:])


def to_matrix(plain: Tensor, spec: HeadSpec) -> Tensor:
    """The plain parameter as a matrix (out, in): a view of it where it is not transposed."""
    assert tuple(plain.shape) == spec.plain_shape
    return plain.mT.contiguous() if spec.transposed else plain.reshape(spec.shape)


def from_matrix(matrix: Tensor, spec: HeadSpec) -> Tensor:
    """The plain parameter that this matrix (out, in) is; undoes `to_matrix`."""
    assert tuple(matrix.shape) == spec.shape
    return matrix.mT.contiguous() if spec.transposed else matrix.view(spec.plain_shape)
