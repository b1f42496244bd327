"""The processes of one worker as each sees the others: a group of torch.distributed, and never the default
one, which may be the user's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore, ProcessGroupGloo

Backend = Literal["gloo", "nccl"]
_BUCKET_BYTES = 1 << 25
"""About as much travels, and is copied for that, at a time."""
_LOOPBACK = "127.0.0.1"

_made: list[Any] = []
"""All groups of this process. Who frees one waits, with Python's lock held, for Gloo's threads, of which
one may be waiting for that lock: so they last as long as the process."""


class Group:
    """Process 0 has what all others are given, and gets what they add. All methods are called by all
    processes, in the same order, with tensors of the same shapes and dtypes.

    They raise RuntimeError where another process is gone, or is silent for `patience_s`.
    """

    def __init__(
        self, backend: Backend, meeting: str, process: int, processes: int, patience_s: float
    ) -> None:
        """Meet the others.

        Args:
            meeting: a file that no other group uses. process: this one's number of `processes`.
        """
        self._process = process
        store, patience = FileStore(meeting, processes), timedelta(seconds=patience_s)
        self._group: Any
        if backend == "nccl":
            from torch._C._distributed_c10d import ProcessGroupNCCL  # builds for CPUs have none

            of_nccl = ProcessGroupNCCL.Options()
            of_nccl._timeout = patience
            self._group = ProcessGroupNCCL(store, process, processes, of_nccl)
        else:
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
            options._threads, options._timeout = 1, patience
            self._group = ProcessGroupGloo(store, process, processes, options)
        _made.append(self._group)

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give the others process 0's values, in place, bit for bit."""
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            self._group.broadcast(flat.view(torch.uint8), 0).wait()
            if self._process:
                _spread(flat, bucket)

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Set process 0's tensors, in place, to the sums over all. The same values give the same bits."""
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            self._group.reduce(flat, 0).wait()
            if not self._process:
                _spread(flat, bucket)

    def abort(self) -> None:
        """Have whoever waits for another process here wait no more. Gloo does so by itself."""
        if not isinstance(self._group, ProcessGroupGloo):
            self._group.abort()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """All that are not empty, by dtype, in pieces."""
    found = sorted((tensor for tensor in tensors if tensor.numel()), key=lambda tensor: str(tensor.dtype))
    for _, of_dtype in groupby(found, key=lambda tensor: tensor.dtype):
        bucket, num_bytes = list[Tensor](), 0
        for tensor in of_dtype:
            bucket.append(tensor)
            num_bytes += tensor.nbytes
            if num_bytes >= _BUCKET_BYTES:
                yield bucket
                bucket, num_bytes = [], 0
        if bucket:
            yield bucket


def _spread(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    parts = torch.split(flat, [tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))
