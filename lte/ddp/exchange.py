"""How the workers' gradients become one mean: torch's communication hooks, and what they send."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.distributed_c10d import GroupMember
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lte.config import Recipe

_EPSILON = 1e-8
"""Added to the norms of PowerSGD's columns: some gradients are zero."""
_MEMORIES = ("error_dict", "p_memory_dict", "q_memory_dict")
"""What PowerSGD remembers of each bucket of gradients: what its factors left out here, and the factors."""


class Exchange:
    """One of `ddp.hook`."""

    def __init__(self, recipe: Recipe) -> None:
        self._payload_bytes = 0
        self._powersgd: PowerSGDState | None = None
        self._hook = default_hooks.allreduce_hook
        self._bytes_of_element = 4
        if recipe.ddp.hook == "bf16":
            self._hook, self._bytes_of_element = default_hooks.bf16_compress_hook, 2
        elif recipe.ddp.hook == "powersgd":
            self._powersgd = PowerSGDState(
                None,
                matrix_approximation_rank=recipe.ddp.powersgd_rank,
                start_powerSGD_iter=recipe.ddp.powersgd_start,
                use_error_feedback=recipe.compress.error_feedback,
                orthogonalization_epsilon=_EPSILON,
                random_seed=recipe.run.seed % 2**32,
            )

    def bucket_cap_mb(self, model: nn.Module, backend: str) -> float | None:
        """Largest bucket of gradients, in MiB; None: torch's own.

        PowerSGD's second and third all-reduce of a bucket are begun where the one before ended: with Gloo in
        its threads, which on each worker mix those of several buckets in another order. With NCCL the
        order is the stream's.
        """
        if self._powersgd is None or backend == "nccl":
            return None
        return 1 + sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20

    def register(self, model: DistributedDataParallel) -> None:
        """Have the model's gradients travel so."""
        # A function of no name that torch knows: it would refuse its own bf16 hook without a GPU.
        model.register_comm_hook(None, lambda _, bucket: self._reduced(bucket))

    def _reduced(self, bucket: GradBucket) -> Future[Tensor]:
        """The mean over workers of a bucket of gradients."""
        state = self._powersgd
        if state is None or state.iter < state.start_powerSGD_iter:
            self._payload_bytes += bucket.buffer().numel() * self._bytes_of_element
        if state is None:
            assert GroupMember.WORLD is not None
            return self._hook(GroupMember.WORLD, bucket)
        before = state.total_numel_after_compression
        reduced = powerSGD_hook(state, bucket)
        self._payload_bytes += (state.total_numel_after_compression - before) * self._bytes_of_element
        return reduced

    def payload_bytes(self) -> int:
        """What this worker has handed to all-reduce since this was asked last."""
        payload, self._payload_bytes = self._payload_bytes, 0
        return payload

    # State

    def state(self) -> dict[str, Tensor]:
        """What it remembers, for a file."""
        if self._powersgd is None:
            return {}
        memories = {
            f"{kind}/{bucket}": tensor
            for kind in _MEMORIES
            for bucket, tensor in getattr(self._powersgd, kind).items()
        }
        return {"iter": torch.tensor(self._powersgd.iter), **memories}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned; nothing, and it starts anew."""
        if self._powersgd is None:
            return
        self._powersgd.iter = int(state.get("iter", 0))
        for kind in _MEMORIES:
            memory = getattr(self._powersgd, kind)
            memory.clear()
            for name, tensor in state.items():
                of, _, bucket = name.partition("/")
                if of == kind:
                    memory[int(bucket)] = tensor
