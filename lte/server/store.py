"""A server's journal and checkpoints while it runs. A full disk is waited for, and said once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from lte.durable import DISK_FULL
from lte.errors import RunError
from lte.server import checkpoint
from lte.server.checkpoint import Progress
from lte.server.journal import AnyRecord, Journal

State = Mapping[str, Mapping[str, Tensor]]
"""Groups of tensors, as `Master.state` gives them; they must not change afterwards."""


class Store:
    """What must survive a crash, written by one server.

    Attributes:
        folder: the run's. is_full: there was no room for what was to be written last.
    """

    def __init__(
        self, folder: Path, generation: int, settings: dict[str, Any], *, keep: int, say: Callable[..., None]
    ) -> None:
        """Make it.

        Args:
            settings: of the run, which stand at the head of each segment of the journal.
            keep: checkpoints kept. say: called with the kind of an event and its words.
        """
        self.folder, self.is_full = folder, False
        self._journal, self._settings, self._keep, self._say = (
            Journal(folder, generation),
            settings,
            keep,
            say,
        )
        self._saving: Future[None] | None = None
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="lte-checkpoint")

    @property
    def oldest(self) -> int:
        """The earliest version that is kept."""
        return checkpoint.version_of(checkpoint.versions(self.folder / "checkpoints")[0])

    def begin(self, progress: Progress, state: State, follows: dict[str, int]) -> None:
        """Write a checkpoint to start from, and begin a journal that follows these segments.

        Raises:
            OSError: the disk is full, say.
        """
        self._write(progress, state)
        self._journal.begin(progress.version, self._settings, follows)

    def write(self, record: AnyRecord) -> None:
        """Append to the journal; `is_durable` tells when it is on disk."""
        self._journal.write(record)

    def is_durable(self, what_next: str) -> bool:
        """Whether all that the journal was told is on disk.

        Args:
            what_next: waits for it, in words.

        Raises:
            FencedError: a newer server has taken the run over. RunError: the disk fails.
        """
        return self._has_room(self._journal.sync, what_next)

    def check_generation(self) -> None:
        """See that no newer server has taken the run over.

        Raises:
            FencedError: one has.
        """
        self._journal.check_generation()

    def save_meanwhile(self, progress: Progress, state: State) -> None:
        """Have a checkpoint written while the rounds go on, unless one is being written. What comes
        after it goes to a new segment of the journal."""
        if self._saving is not None:
            if not self._saving.done():
                return
            if error := self._saving.exception():
                self._say("unsaved", f"the last checkpoint could not be written: {error}")
        if self._has_room(self._begin_segment(progress), "the next checkpoint is written"):
            self._saving = self._saver.submit(self._write, progress, state)

    def save(self, progress: Progress, state: State) -> bool:
        """Write a checkpoint, after the one that is being written. False where the disk has no room."""
        if self._saving is not None:
            self._saving.exception()

        def write() -> None:
            self._begin_segment(progress)()
            self._write(progress, state)

        return self._has_room(write, "the last checkpoint is written")

    def close(self) -> None:
        self._saver.shutdown()
        self._journal.close()

    def _begin_segment(self, progress: Progress) -> Callable[[], None]:
        return lambda: self._journal.begin(progress.version, self._settings)

    def _has_room(self, write: Callable[[], None], what_next: str) -> bool:
        """Whether that could be written. A disk that is full, or has room again, is told of."""
        try:
            write()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise RunError(
                    f"{self.folder}: cannot be written ({error.strerror}); what was published is safe: mend"
                    " the disk and start the server again"
                ) from error
            if not self.is_full:
                self.is_full = True
                self._say("disk", f"{self._journal.folder} has no room: {what_next} once it has")
            return False
        if self.is_full:
            self.is_full = False
            self._say("disk", f"{self._journal.folder} has room again")
        return True

    def _write(self, progress: Progress, state: State) -> None:
        saved = self.folder / "checkpoints"
        checkpoint.save(saved, progress, state, keep=self._keep)
        self._journal.prune(checkpoint.version_of(checkpoint.versions(saved)[0]))
