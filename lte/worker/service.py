"""The worker: a trainer joined to a server."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec
import torch
from torch import Tensor, nn

from lte import config, durable, wire
from lte.config import Recipe
from lte.errors import DigestError, RefusedError, RunError, StoppedError
from lte.nn import adapted_modules, describe, difference
from lte.printable import some
from lte.worker import state
from lte.worker.session import Session, Step, parting_words
from lte.worker.state import Saved, Tally
from lte.worker.trainer import MakeOptimizer, Trainer

_LOOK_AGAIN_S = 1.0
"""How often a worker whose disk is full tries to write its state."""
_MOST_REFUSALS = 2
"""In a row, after which a worker whose heads were started over gives up."""


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
        stopped: `stop` was called, and this worker has left.
    """

    def __init__(
        self,
        model: nn.Module,
        server: str | Session,
        optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
        *,
        worker_id: str = "",
        scale: float = 0.0,
        folder: str | Path | None = None,
        wait_s: float = 30.0,
        key: str | Path | None = None,
        server_key: str | Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Join a server.

        Args:
            model: from `lte.convert`; its heads may be fewer, and of a smaller rank, than the server's
                recipe says. Where `train.phases` change them it has those of `Recipe.as_built`, whose rank
                is the largest, and the heads follow.
            server: its address, or a session that has joined, with a worker_id, folder and keys of its own.
            optimizer: over the model's parameters, or a function that makes one of the model; its
                learning rates are peaks on which the recipe's schedule acts.
            scale: lora_scale of the model's heads, where it is to be another than the recipe's.
            worker_id: a name of your choice. wait_s: how long to look for the server.
            folder: where to keep this worker's state, which is written before each contribution is
                sent, and by `stop` and `save`: a new process with the same name and folder goes on where
                this one was, bit for bit. None: it starts over from what the server has merged of this
                worker.
            key: file of this worker's secret key, server_key: of the server's public one, both from
                `lte keys new`, for a server that has keys.
            say: told, in a line, when the server is not heard for long, and when it is again; which
                modules with heads no gradient reached in the first local step, if any; and which moments
                begin anew where the state in the folder is of another optimizer.

        Raises:
            ConnectError: no server answers, or keys do not fit. KeysError: the files of keys cannot be
            used. RefusedError: the server refused, for another model say. RunError: the state in the
            folder is damaged.
        """
        described = describe(model)
        if isinstance(server, str):
            modules = [module for _, module in adapted_modules(model)]
            server = Session(
                server,
                worker_id=worker_id,
                model=described,
                heads=max((module.heads for module in modules), default=0),
                rank=max((module.rank for module in modules), default=0),
                scale=scale,
                folder=folder,
                wait_s=wait_s,
                key=key,
                server_key=server_key,
                say=say,
            )
        self._session, self._folder, saved, self._say = server, server.folder, server.saved, say
        self._replaces = saved.incarnation if saved else 0
        try:
            welcome = server.welcome
            if differs := difference(described, welcome.model):
                raise RefusedError(differs, "build the model that the server's recipe describes")
            self.worker_id, self.slot = welcome.worker_id, welcome.slot
            self.done = self.stopped = self._told_to_stop = self._has_stepped = False
            self.recipe: Recipe = config.from_dict(welcome.settings)
            self._trainer = Trainer(
                model,
                self.recipe,
                slot=welcome.slot,
                version=welcome.version,
                base=server.base,
                base_digest=server.base_digest,
                step=server.step,
                scale=server.scale,
                optimizer=optimizer,
                shards=server.shards,
            )
            server.base = {}  # the model holds it now
            self._count(Tally())
            # What was pushed on the version at hand: its message and blobs.
            self._pushed: tuple[wire.Contribution, Mapping[str, Tensor]] | None = None
            self._refusals = 0
            # Processes whose contributions are this one's: its own, and the one that it goes on from.
            self._incarnations = {welcome.incarnation}
            self._apply_s = self._waited_s = 0.0
            if saved is not None and saved.continues(welcome):
                self._resume(saved)
            server.saved = saved = None  # it is in the trainer, if it is of use
            if self._trainer.merged_digest() != welcome.merged_digest and not self._pushed:
                self._start_over()
            if not self._trainer.is_ahead:
                self._until_open()
            server.progress(self.version, self._trainer.local_step)
            self._began_s, self._waited_s, self._steps = time.monotonic(), 0.0, 0
            self._follow_through()
        except BaseException as error:
            server.close(parting_words(type(error), error))
            raise

    @property
    def version(self) -> int:
        """Version of the base that the model holds."""
        return self._trainer.version

    @property
    def trainer(self) -> Trainer:
        """Of the model, for who takes part in its local steps; only this worker may call it."""
        return self._trainer

    @property
    def step_index(self) -> int:
        """Local steps since the start of the run, as this worker counts them: names the next batch."""
        return self.recipe.steps_before(self._trainer.round) + self._trainer.local_step

    def step(self, loss: Tensor | float | None = None, *, tokens: int = 0) -> bool:
        """Take an optimizer step on the gradients at hand; after every T-th, merge.

        Args:
            loss: of this batch, for the records. tokens: in this batch, for the records and for
                merging by tokens.

        Returns:
            Whether to go on. Not after the last round, nor once `stop` was called; then steps do nothing.

        Raises:
            RunEnded: the server stopped before the last round, or is not heard any more.
            RefusedError: the server refused a contribution or replaced this worker.
        """
        if self.done or self.stopped:
            return False
        if not self._has_stepped:
            self._has_stepped = True
            if untrained := self._trainer.without_gradient():
                self._say(f"{self.worker_id}: {_untrained(untrained, len(self._trainer.modules))}")
        self._trainer.step()
        if loss is not None:
            self._loss += loss.detach().cpu() if isinstance(loss, Tensor) else loss
            self._batches += 1
        self._tokens += tokens
        self._steps += 1
        self._session.progress(self.version, self._trainer.local_step)
        with suppress(StoppedError):  # it waited
            self._follow_through()
        if self._told_to_stop and not self.done:
            self._leave()
        return not (self.done or self.stopped)

    def _follow_through(self) -> None:
        """Pull and push as it is time to after the local steps taken: the next one may follow."""
        trainer = self._trainer
        train = self.recipe.in_round(trainer.round).train
        if trainer.is_ahead and trainer.local_step >= train.steps_ahead:
            self._until_published()
        if not self.done and trainer.local_step >= train.local_steps:
            self._push()
            if self._can_go_ahead():
                trainer.go_ahead()
            else:
                self._until_open()
            self._began_s, self._waited_s, self._steps = time.monotonic(), 0.0, 0

    def _can_go_ahead(self) -> bool:
        """Whether a round follows. On arrival nobody knows which contribution is the last."""
        train = self.recipe.train
        return train.overlap and (self.recipe.merges_on_arrival or self._trainer.round + 1 < train.rounds)

    def stop(self) -> None:
        """Have this worker save its state, if it has a folder, and leave: at the end of the local step
        at hand, or, where it waits, within a second. `step` returns False then.

        May be called from a signal handler or another thread.
        """
        self._told_to_stop = True
        self._session.stop()

    def _leave(self) -> None:
        is_saved = self._pushed and not self._trainer.is_ahead  # by the push
        if self._folder is not None and not is_saved:
            self.save()
        self.stopped = True
        self.close("interrupted")

    def save(self) -> None:
        """Write this worker's state to its folder, between two steps: a process that goes on from it
        takes the next one.

        Raises:
            RunError: it was given no folder. OSError: the disk; the state before is still there.
        """
        if self._folder is None:
            raise RunError("this worker has no folder to save to; give it one: lte.Worker(folder=...)")
        tally = Tally(loss=float(self._loss), batches=self._batches, tokens=self._tokens)
        contribution, blobs = self._pushed or (None, {})
        self._write(self._folder, contribution, blobs, tally)

    def _write(
        self,
        folder: Path,
        contribution: wire.Contribution | None,
        blobs: Mapping[str, Tensor],
        tally: Tally,
    ) -> None:
        welcome = self._session.welcome
        tensors, numbers = self._trainer.state()
        saved = Saved(
            run_id=welcome.run_id,
            slot=self.slot,
            incarnation=welcome.incarnation,
            senders=sorted(self._incarnations | {welcome.incarnation}),
            contribution=contribution,
            blobs=blobs,
            tally=tally,
            tensors=tensors,
            numbers=numbers,
        )
        is_said = False
        while True:
            try:
                return state.save(folder, saved, self._replaces)
            except OSError as error:
                if error.errno not in durable.DISK_FULL or self._told_to_stop:
                    raise
                if not is_said:
                    self._say(f"{folder} has no room for this worker's state; waiting for some")
                is_said = True
                time.sleep(_LOOK_AGAIN_S)

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
        trainer = self._trainer
        step_s = (time.monotonic() - self._began_s - self._waited_s) / max(self._steps, 1)
        base_digest, merged_digest = trainer.base_digest(), trainer.merged_digest()
        started_s = time.monotonic()

        def close(num_parts: int, blobs: dict[str, Tensor]) -> wire.Contribution:
            welcome = self._session.welcome
            contribution = wire.Contribution(
                generation=welcome.generation,
                worker_id=welcome.worker_id,
                incarnation=welcome.incarnation,
                version=trainer.version,
                stream=0,  # the session's to say
                parts=num_parts,
                draw=trainer.draw,
                tokens=self._tokens,
                loss=float(self._loss) / self._batches if self._batches else None,
                lost=trainer.lost,
                step_s=step_s,
                encode_s=time.monotonic() - started_s,
                apply_s=self._apply_s,
                base_digest=base_digest,
                merged_digest=merged_digest,
                given_digest=trainer.given_digest(),
            )
            self._incarnations = {welcome.incarnation}
            if self._folder is not None:
                self._write(self._folder, contribution, blobs, Tally())
            self._pushed = contribution, blobs
            return contribution

        self._session.push(trainer.version, trainer.contribution(), close)
        self._count(Tally())

    def _count(self, tally: Tally) -> None:
        """Begin to count local steps, after those of a tally."""
        self._loss, self._batches, self._tokens = torch.tensor(tally.loss), tally.batches, tally.tokens

    def _resume(self, saved: Saved) -> None:
        """Go on from what an earlier process saved. What it had pushed is pushed again, unless a later
        version is published already."""
        sent, version = saved.contribution, self.version
        merged = sent is not None and not self._session.merged.isdisjoint(saved.senders)
        try:
            anew = self._trainer.resume(saved.tensors, saved.numbers, merged=merged)
        except (KeyError, ValueError, RuntimeError) as error:
            raise RunError(
                f"{self._folder}: the state of other heads, model or optimizer ({error}); delete it, and this"
                " worker starts over"
            ) from None
        if anew:
            self._say(f"{self.worker_id}: {anew}")
        if self._trainer.local_step:
            self._count(saved.tally)
        if sent is None:
            return
        self._incarnations.update(saved.senders)
        if version == saved.version:
            if self._folder is not None:  # before it is pushed: whoever goes on must know that this one did
                self._write(self._folder, sent, saved.blobs, saved.tally)
            self._session.push(version, saved.blobs.items(), lambda parts, _: _with_parts(sent, parts))
            self._pushed = sent, saved.blobs
            if not self._trainer.is_ahead and self._can_go_ahead():
                self._trainer.go_ahead()

    def _start_over(self) -> None:
        """Have the heads be what the server has merged of this worker, and nothing owed."""
        self._session.recall()
        while not self.done:
            message, blobs = self._wait()
            if isinstance(message, wire.Factors):
                factors = {name: _floats(name, blob, self._trainer) for name, blob in blobs.items()}
                self._trainer.adopt(factors)
                self._count(Tally())
                self._pushed = None
                self._session.progress(self.version, 0)
                return
            if isinstance(message, wire.Update):
                self._apply(message, blobs)

    def _refused(self, receipt: wire.Receipt) -> None:
        """Start the heads over, unless that has not helped before."""
        self._refusals += 1
        if self._refusals > _MOST_REFUSALS:
            raise RefusedError(receipt.reason, "look into the server's log")
        self._start_over()

    def _until_open(self) -> None:
        """Apply what is published until the round on the newest version opens, or none follows."""
        while not self.done:
            message, blobs = self._wait()
            match message:
                case wire.Update():
                    self._apply(message, blobs)
                case wire.Receipt():
                    self._refused(message)
                case wire.Begin() if message.version == self.version and not self._pushed:
                    return

    def _until_published(self) -> None:
        """Apply the update that opens the round which local steps are taken of already."""
        while not self.done and self._trainer.is_ahead:
            message, blobs = self._wait()
            if isinstance(message, wire.Update):
                self._apply(message, blobs)
            elif isinstance(message, wire.Receipt):
                self._refused(message)

    def _wait(self) -> tuple[Step, dict[str, Tensor]]:
        started_s = time.monotonic()
        received = self._session.next_step()
        self._waited_s += time.monotonic() - started_s
        return received

    def _apply(self, update: wire.Update, blobs: dict[str, Tensor]) -> None:
        started_s = time.monotonic()
        own = self._incarnations | {self._session.welcome.incarnation}
        merged = self._pushed is not None and not own.isdisjoint(update.merged)
        self._trainer.apply(
            update.version,
            blobs,
            update.base_digest,
            merged=merged,
            whole=self._session.whole,
            step=update.step,
        )
        self._pushed = None
        if not self._trainer.local_step:  # those taken were of a round that is over
            self._count(Tally())
        self._refusals = 0 if merged else self._refusals
        self._session.progress(self.version, self._trainer.local_step)
        self._session.base_digest = update.base_digest
        if update.last:
            self.done = True
            self.close("finished")
        self._apply_s = time.monotonic() - started_s
        self._waited_s += self._apply_s


def _with_parts(contribution: wire.Contribution, num_parts: int) -> wire.Contribution:
    return msgspec.structs.replace(contribution, parts=num_parts)


def _floats(name: str, blob: Tensor, trainer: Trainer) -> Tensor:
    """A factor from its bytes.

    Raises:
        DigestError: it is none of this model's.
    """
    shape = trainer.factor_shape(name)
    if shape is None or blob.numel() != 4 * math.prod(shape):
        raise DigestError(f"the server remembers {name!r} of this worker, which its model does not have")
    return blob.clone().view(torch.float32).view(shape)


def _untrained(names: list[str], num_modules: int) -> str:
    """That no gradient reached these of so many modules with heads, in a line for a person."""
    return (
        f"heads of {len(names)} of {num_modules} modules got no gradient in the first local step, and are not"
        f" trained where that goes on: {some(names)}"
    )
