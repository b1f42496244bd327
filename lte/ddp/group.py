"""The workers of a run, as each sees the others: torch.distributed, over Gloo or NCCL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from lte.config import Recipe
from lte.ddp import traffic
from lte.ddp.attempt import agreed
from lte.ddp.place import Place
from lte.ddp.traffic import Moved
from lte.errors import RunEnded
from lte.team import device_of
from lte.transport import meeting

_OF_GLOO = "gloo"
"""What the words of its errors hold, which are plain RuntimeErrors."""

_left: list[dist.ProcessGroup] = []
"""Groups that were left. Who frees one waits, with Python's lock held, for Gloo's threads, of which one may
be waiting for that lock to free a tensor: so they last as long as the process."""


def has_left() -> bool:
    """Whether this process was in a group, whose threads last as long as it."""
    return bool(_left)


class Group:
    """This process among all workers, from entering to leaving; a context manager. All methods are called
    by all workers, in the same order.

    Leaving it by an error of the others' connections raises RunEnded: one of them is gone, or was silent
    for `worker.patience_s`.

    Attributes:
        place: this worker's. device: where it computes. backend: `nccl` where every worker of this
            machine has a GPU of its own, else `gloo`.
    """

    def __init__(self, recipe: Recipe, place: Place) -> None:
        """Raise ConfigError where `worker.device` is not on this machine."""
        self.place, self._patience_s = place, recipe.worker.patience_s
        self.device, self.backend = device_of(recipe), "gloo"
        if self.device.type == "cuda" and self.device.index is None:
            num_gpus = torch.cuda.device_count()
            self.device = torch.device("cuda", place.local_number % num_gpus)
            self.backend = "nccl" if place.local_size <= num_gpus and dist.is_nccl_available() else "gloo"
        self._sockets: list[int] = []
        self._asked: dist.Work | None = None  # what `largest` has begun
        self._before = Moved(0, 0)

    def __enter__(self) -> Self:
        place, patience = self.place, timedelta(seconds=self._patience_s)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        before = set(traffic.sockets().values())
        try:
            store = self._store(patience)
            dist.init_process_group(
                self.backend, store=store, rank=place.number, world_size=place.size, timeout=patience
            )
        except RuntimeError as error:
            if not _is_of_others(error):
                raise
            raise RunEnded(f"the workers did not meet ({_last_line(error)})", finished=False) from error
        self._sockets = [number for number, name in traffic.sockets().items() if name not in before]
        return self

    def _store(self, patience: timedelta) -> Store:
        """Where these processes meet, and no others that were started before or will be."""
        place = self.place
        if place.meeting:
            return FileStore(place.meeting, place.size)
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=place.number == 0 and not meeting.has_agent(),
            wait_for_workers=False,
            timeout=patience,
        )
        return PrefixStore(f"lte/{agreed(store, place.number, place.size, self._patience_s)}", store)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_theirs = _is_of_others(error)
        # Torch frees what is under way only with Python's lock held, and may hold it while it ends.
        if self._asked is not None and not is_theirs:
            self._asked.wait()
        if dist.group.WORLD is not None:
            _left.append(dist.group.WORLD)
        dist.destroy_process_group()
        if is_theirs:
            raise RunEnded(f"another worker is gone ({_last_line(error)})", finished=False) from error

    def largest(self, number: int) -> Callable[[], int]:
        """Begin to find the largest of the workers' numbers; calling the result waits for it."""
        told = torch.tensor(number, device=self.device)
        self._asked = work = dist.all_reduce(told, dist.ReduceOp.MAX, async_op=True)

        def wait() -> int:
            assert work is not None
            work.wait()
            self._asked = None
            return int(told)

        return wait

    def gathered(self, *numbers: float) -> Tensor:
        """The numbers of all workers, (workers, numbers) in fp64 on the CPU."""
        row = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(row) for _ in range(self.place.size)]
        dist.all_gather(rows, row)
        return torch.stack(rows).cpu()

    def wait_for_all(self) -> None:
        """Return once all have called this."""
        self.gathered(0.0)

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Set tensors, fp32, to their means over the workers, in place."""
        tensors = list(tensors)
        if tensors:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(flat)
            sizes = [tensor.numel() for tensor in tensors]
            for tensor, mean in zip(tensors, torch.split(flat / self.place.size, sizes), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def moved(self, payload_bytes: int) -> Moved:
        """Bytes that this worker has sent and received since this was asked last: as the kernel counted
        them on the group's TCP connections (Gloo's); or, where they go by other ways, what a ring moves of
        the payload, 2 (N - 1) / N times as much.

        Args:
            payload_bytes: that this worker has handed to all-reduce since then.
        """
        now = traffic.counted(self._sockets)
        if now is None or self.backend != "gloo":
            by_ring = round(2 * (self.place.size - 1) / self.place.size * payload_bytes)
            return Moved(by_ring, by_ring)
        moved, self._before = now.since(self._before), now
        return moved


def _is_of_others(error: BaseException | None) -> bool:
    """Whether it tells that the connections to the others do not work."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _OF_GLOO in str(error).lower()
    )


def _last_line(error: BaseException | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
