"""The worker: a trainer joined to a server."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from lte import config, wire
from lte.config import Recipe
from lte.errors import RefusedError
from lte.nn import adapted_modules, describe, difference
from lte.worker.session import Session, parting_words
from lte.worker.trainer import MakeOptimizer, Trainer


class Worker:
    """Trains a converted model together with the other workers of a server.

        with lte.Worker(model, server="tcp://10.0.0.1:5555") as worker:
            for batch in loader:
                loss = model(batch)
                loss.backward()
                if not worker.step(loss, tokens=batch.numel()):
                    break

    The loss is the mean over the batch. The server's recipe decides on local steps, rounds,
    schedule and, unless an optimizer is given, on the optimizer. Joining blocks until the server's
    first round opens, that is until all workers it waits for are there.

    Attributes:
        worker_id, slot: the name that the server gave, and the place among all workers.
        recipe: the server's. version: merges that the model holds. done: the last one was reached.
    """

    def __init__(
        self,
        model: nn.Module,
        server: str | Session,
        optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
        *,
        worker_id: str = "",
        wait_s: float = 30.0,
    ) -> None:
        """Join a server.

        Args:
            model: from `lte.convert`.
            server: its address, or a session that has joined.
            optimizer: over the model's parameters, or a function that makes one of the model; its
                learning rates are peaks on which the recipe's schedule acts.
            worker_id: a name of your choice. wait_s: how long to look for the server.

        Raises:
            ConnectError: no server answers. RefusedError: it refused, for another model say.
        """
        described = describe(model)
        if isinstance(server, str):
            heads = next((m.heads for _, m in adapted_modules(model)), 1)
            server = Session(server, worker_id=worker_id, model=described, heads=heads, wait_s=wait_s)
        self._session = server
        try:
            welcome = server.welcome
            if differs := difference(described, welcome.model):
                raise RefusedError(differs, "build the model that the server's recipe describes")
            self.worker_id, self.slot, self.done = welcome.worker_id, welcome.slot, False
            self.recipe: Recipe = config.from_dict(welcome.settings)
            self._trainer = Trainer(
                model,
                self.recipe,
                slot=welcome.slot,
                version=welcome.version,
                base=server.base,
                base_digest=welcome.base_digest,
                optimizer=optimizer,
            )
            server.base = {}  # the model holds it now
            self._loss, self._tokens, self._batches = torch.zeros(()), 0, 0
            self._pushed = False
            self._until_open()
        except BaseException as error:
            server.close(parting_words(type(error), error))
            raise

    @property
    def version(self) -> int:
        """Version of the base that the model holds."""
        return self._trainer.version

    @property
    def step_index(self) -> int:
        """Local steps since the start of the run: names the next batch."""
        return self.version * self.recipe.train.local_steps + self._trainer.local_step

    def step(self, loss: Tensor | float | None = None, *, tokens: int = 0) -> bool:
        """Take an optimizer step on the gradients at hand; after every T-th, merge.

        Args:
            loss: of this batch, for the records. tokens: in this batch, for the records and for
                merging by tokens.

        Returns:
            Whether the run goes on. Once it does not, steps do nothing.

        Raises:
            RunEnded: the server stopped before the last round, or is not heard any more.
            RefusedError: the server refused a contribution or replaced this worker.
        """
        if self.done:
            return False
        self._trainer.step()
        if loss is not None:
            self._loss += loss.detach().cpu() if isinstance(loss, Tensor) else loss
            self._batches += 1
        self._tokens += tokens
        self._session.progress(self.version, self._trainer.local_step)
        if self._trainer.local_step >= self.recipe.train.local_steps:
            self._push()
            self._until_open()
        return not self.done

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(parting_words(kind, error))

    def close(self, reason: str = "closed") -> None:
        """Leave the run."""
        self._session.close(reason)

    def _push(self) -> None:
        trainer, welcome = self._trainer, self._session.welcome
        contribution = wire.Contribution(
            generation=welcome.generation,
            worker_id=welcome.worker_id,
            incarnation=welcome.incarnation,
            version=trainer.version,
            draw=trainer.draw,
            tokens=self._tokens,
            loss=float(self._loss) / self._batches if self._batches else None,
            base_digest=trainer.base_digest(),
            merged_digest=trainer.merged_digest(),
            given_digest=trainer.given_digest(),
        )
        self._session.push(contribution, trainer.contribution())
        self._pushed = True

    def _until_open(self) -> None:
        """Apply what is published until the round on the newest version opens, or none follows."""
        while True:
            message, tensors = self._session.next_step()
            if isinstance(message, wire.Update):
                if message.version <= self.version:
                    continue
                merged = self._pushed and self._session.welcome.incarnation in message.merged
                self._trainer.apply(message.version, tensors, message.base_digest, merged=merged)
                self._loss, self._tokens, self._batches = torch.zeros(()), 0, 0
                self._pushed = False
                self._session.progress(self.version, 0)
                if message.last:
                    self.done = True
                    return
            elif message.version == self.version and not self._pushed:
                return
