"""Being a process of a worker that another one leads."""

from __future__ import annotations

from multiprocessing.connection import Connection

import torch

from lte import config
from lte.lowrank import seed_of
from lte.nn import adapted_modules, recompute_activations
from lte.team import mirror, orders
from lte.team.group import Group
from lte.team.share import Own, Share, device_of
from lte.worker import draws


class Follower:
    """One of a worker's processes but the first.

    Attributes:
        recipe: the server's.
    """

    def __init__(self, begin: orders.Begin) -> None:
        """Build the model. Raises: see `share.Share` and `share.device_of`."""
        self._begin, self.recipe = begin, config.from_dict(begin.settings)
        recipe = self.recipe
        self._share = Share(
            recipe,
            device_of(recipe, begin.number),
            Own(begin.slot, begin.rank, begin.heads, begin.scale),
            process=begin.process,
            processes=begin.processes,
        )
        self._model = self._share.model
        self._modules = dict(adapted_modules(self._model))
        self._rank = max((module.rank for module in self._modules.values()), default=0)
        self._now = recipe.as_built
        self._step = self._num_forwards = 0
        if recipe.train.checkpoint_activations:
            recompute_activations(self._model, recipe.train.checkpoint_modules)
        self._model.register_forward_pre_hook(lambda *_: self._draw())

    def serve(self, connection: Connection, group: Group) -> None:
        """Do as the leader says until it is gone."""
        while True:
            try:
                order = orders.order_of(connection.recv_bytes())
            except (EOFError, OSError):
                return
            assert isinstance(order, orders.Step)
            self._take(order, group)

    def _take(self, order: orders.Step, group: Group) -> None:
        """Take part in a local step."""
        model, now = self._model, self.recipe.in_round(order.version)
        if order.whole:
            mirror.fit(model, self._now, now, rank=self._rank, scale=self._begin.scale)
        self._now, self._step, self._num_forwards = now, order.step, 0
        coming = mirror.tensors(model, order)
        assert mirror.num_bytes(coming) == order.num_bytes, "the leader's model has other shapes"
        group.broadcast(coming)
        # Drawn anew in each step, so that a new process draws what this one would have.
        begin = self._begin
        torch.manual_seed(seed_of(now.run.seed, "forward", begin.slot, begin.process, order.step))
        loss, _ = self._share.backward(order.step)
        group.sum(mirror.summands(model, loss))
        model.zero_grad(set_to_none=True)

    def _draw(self) -> None:
        """Choose what the next forward pass draws, as the leader's trainer does for its own."""
        recipe, begin = self._now, self._begin
        first_head = recipe.lora.first_head(begin.slot)
        if recipe.lora.dropout:
            draws.seed_dropout(
                self._modules,
                recipe,
                first_head=first_head,
                step=self._step,
                forward=self._num_forwards,
                process=begin.process,
            )
        if recipe.draws_ranks:
            used = draws.ranks(self._modules, recipe, first_head=first_head, step=self._step)
            draws.gate(self._modules, recipe, used)
        self._num_forwards += 1
