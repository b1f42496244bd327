"""Keys of servers and workers, and the list of those that may join.

A pair of keys is two small text files: NAME.secret, which only its owner may read, and NAME.public.
The server's allow-list names the worker that each public key belongs to, one key a line:

    alice  rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7   # her laptop

A relay's line names the workers that it may speak for, with * at the end of a name for all that begin so:

    relay/paris  7&2k}Nf=xw!W@R6jF1PZc8>eVq.3%hT+m0GdJsLa  carol,dave,paris-*
"""

from __future__ import annotations

import os
import re
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from lte.errors import KeysError

WORKER_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
RELAY = "relay/"
"""What the name of a relay begins with, and no worker_id does."""
_RELAY_ID = re.compile(re.escape(RELAY) + WORKER_ID.pattern, re.ASCII)
_SPOKEN_FOR = re.compile(r"[\w.-]{1,64}\*?|\*", re.ASCII)
_SECRET = "lte-secret-key "
"""What a secret file begins with, so that nobody takes one kind for the other."""


@dataclass(frozen=True)
class KeyPair:
    """A public key and its secret, in z85 (40 characters)."""

    public: str
    secret: str = field(repr=False)


def create(path: str | Path) -> KeyPair:
    """Make a pair of keys and write it to PATH.secret (mode 0600) and PATH.public.

    Raises:
        KeysError: one of them is there already, or cannot be written. Neither is left then.
    """
    public, secret = (half.decode() for half in zmq.curve_keypair())
    written = []
    try:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for ending, text, mode in (("secret", _SECRET + secret, 0o600), ("public", public, 0o644)):
            file = Path(f"{path}.{ending}")
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as handle:
                written.append(file)
                handle.write(f"{text}\n")
    except OSError as error:
        for file in written:
            file.unlink()
        if isinstance(error, FileExistsError) and str(error.filename) in (f"{path}.secret", f"{path}.public"):
            raise KeysError(
                f"{error.filename}: is there already, and keys are not overwritten; choose another name"
            ) from None
        raise KeysError(f"{path}: keys cannot be written there ({error.strerror})") from None
    return KeyPair(public, secret)


def load_secret(path: str | Path) -> KeyPair:
    """Read a secret file, and derive its public key.

    Raises:
        KeysError: it is missing, no secret key, or others than its owner may read it.
    """
    text, mode = _read(path)
    if not text.startswith(_SECRET):
        what = "a public key" if _is_key(text) else "no key"
        raise KeysError(f"{path}: {what}; the file NAME.secret of 'lte keys new NAME' is needed here")
    secret = text.removeprefix(_SECRET)
    if not _is_key(secret):
        raise KeysError(f"{path}: a damaged secret key; make another pair with 'lte keys new NAME'")
    if mode & 0o077:
        raise KeysError(f"{path}: others than its owner may read this secret; chmod 600 {path}")
    return KeyPair(zmq.curve_public(secret.encode()).decode(), secret)


def load_public(path: str | Path) -> str:
    """Read a public key, in z85.

    Raises:
        KeysError: the file is missing or holds none.
    """
    text, _ = _read(path)
    if not _is_key(text):
        what = "a secret key, which must stay with its owner" if text.startswith(_SECRET) else "no key"
        raise KeysError(f"{path}: {what}; the file NAME.public of 'lte keys new NAME' is needed here")
    return text


@dataclass(frozen=True)
class _Listed:
    """An allow-list: whose each public key is, and the names that each relay may speak for."""

    owners: dict[str, str]
    spoken_for: dict[str, tuple[str, ...]]


class AllowList:
    """The keys that may join, by a file that is read again whenever it has changed.

    A file that cannot be read or understood leaves the last good list in force. Any thread may ask.
    """

    def __init__(self, path: str | Path, report: Callable[[str], None]) -> None:
        """Read the list.

        Args:
            report: told in words, from whichever thread asked, that the list was read again, or why
                it cannot be: once for each change of the file.

        Raises:
            KeysError: it is missing or malformed.
        """
        self.path, self._report = Path(path), report
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._listed = _parsed(self.path)

    def worker_id(self, key: str) -> str:
        """The worker (or relay, see `RELAY`) that a public key (z85) belongs to now, or "" if it may not
        join."""
        return self._now().owners.get(key, "")

    def speaks_for(self, sender: str, worker_id: str) -> bool:
        """Whether the owner of a key may speak for a worker now: it is that one, or its relay."""
        if not WORKER_ID.fullmatch(worker_id):
            return False
        if sender == worker_id:
            return True
        names = self._now().spoken_for.get(sender, ())
        return any(
            worker_id.startswith(name[:-1]) if name.endswith("*") else worker_id == name for name in names
        )

    def _now(self) -> _Listed:
        """What the file says, read again if it has changed."""
        with self._lock:
            if (signature := self._signature()) != self._seen:
                self._seen = signature  # before reading: what changes meanwhile is read once more
                try:
                    self._listed = _parsed(self.path)
                    self._report(f"{self.path}: read again, keys allowed: {len(self._listed.owners)}")
                except KeysError as error:
                    self._report(f"{error}; the list as it was before stays in force")
            return self._listed

    def _signature(self) -> tuple[int, ...]:
        try:
            status = self.path.stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _read(path: str | Path) -> tuple[str, int]:
    """A key file's text and mode."""
    try:
        with open(path, encoding="ascii") as handle:
            return handle.read(1024).strip(), os.fstat(handle.fileno()).st_mode
    except FileNotFoundError:
        raise KeysError(f"{path}: no such key; make a pair with 'lte keys new NAME'") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII"
        raise KeysError(f"{path}: cannot be read ({reason})") from None


def _parsed(path: Path) -> _Listed:
    """What an allow-list says."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise KeysError(f"{path}: the allow-list cannot be read ({reason})") from None
    owners: dict[str, str] = {}
    spoken_for: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):  # a key may hold one, a word of its own may not
            continue
        is_relay = words[0].startswith(RELAY)
        num_words, name = (3, _RELAY_ID) if is_relay else (2, WORKER_ID)
        is_entry = len(words) == num_words or (len(words) > num_words and words[num_words].startswith("#"))
        if not is_entry or not name.fullmatch(words[0]) or not _is_key(words[1]):
            form = "relay/NAME PUBLIC_KEY WORKER_ID,WORKER_ID,..." if is_relay else "WORKER_ID PUBLIC_KEY"
            raise KeysError(f"{path}, line {number}: not '{form}' (a comment starts with #)")
        if words[1] in owners:
            raise KeysError(f"{path}, line {number}: this key is {owners[words[1]]}'s already")
        owners[words[1]] = words[0]
        if is_relay:
            names = words[2].split(",")
            if wrong := [each for each in names if not _SPOKEN_FOR.fullmatch(each)]:
                raise KeysError(
                    f"{path}, line {number}: {wrong[0]!r} is no worker_id; a relay's line ends with those"
                    " that it may speak for, as in alice,bob or site-*"
                )
            spoken_for[words[0]] = (*spoken_for.get(words[0], ()), *names)
    return _Listed(owners, spoken_for)


def _is_key(text: str) -> bool:
    """Whether this is 32 bytes in z85."""
    try:
        return len(text) == 40 and z85.encode(z85.decode(text)).decode() == text
    except (ValueError, KeyError, struct.error):  # not ASCII; no such digit; a number of over 32 bits
        return False
