"""The workers of a simulated run: classes of them, with their links, machines, speeds and lifetimes."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lte.config import yaml12
from lte.cost import links
from lte.cost.links import Link
from lte.errors import UserError


@dataclass(frozen=True, kw_only=True)
class WorkerClass:
    """Workers alike.

    Attributes:
        share: of all workers, relative to that of the other classes.
        link: of one worker, or of `per_link` of them, an equal part each.
        step_s: mean seconds of a local step; None: as fast as all.
        spread: of the workers' own means, the standard deviation of their logarithm; jitter: of a
            worker's rounds. stalls: share of rounds that take `stall_factor` times as long.
        up_s, down_s: means of how long a worker lives and how long it is gone then, seconds; both are
            exponential, and it goes without a word.
        per_machine: workers that share a machine's `cores`.
    """

    name: str
    link: Link
    share: float = 1.0
    step_s: float | None = None
    spread: float = 0.0
    jitter: float = 0.0
    stalls: float = 0.0
    stall_factor: float = 10.0
    up_s: float = math.inf
    down_s: float = 60.0
    per_link: int = 1
    per_machine: int = 1
    cores: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """All workers, and what they share.

    Attributes:
        server_up_bps, server_down_bps: bits a second from and to all workers at the server's link.
        cores: of one machine on which the server and all workers run; infinite: they do not.
    """

    classes: Sequence[WorkerClass]
    server_up_bps: float = math.inf
    server_down_bps: float = math.inf
    cores: float = math.inf

    def counts(self, workers: int) -> list[int]:
        """How many of so many workers each class has: whole numbers nearest to the shares."""
        whole = sum(each.share for each in self.classes)
        exact = [workers * each.share / whole for each in self.classes]
        counts = [int(number) for number in exact]
        by_rest = sorted(range(len(exact)), key=lambda n: counts[n] - exact[n])
        for n in by_rest[: workers - sum(counts)]:
            counts[n] += 1
        return counts


# As people write it


def read_fleet(path: Path) -> Fleet:
    """A fleet from a YAML file such as configs/links/mixed.yaml.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        tree = yaml12.read(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise UserError(f"{path}: cannot be read ({reason})") from None
    except yaml.YAMLError as error:
        raise UserError(yaml12.fault_of(path, error)) from None
    top = _settings(tree, _OF_FLEET, str(path), needed=("classes",))
    classes = top.pop("classes")
    if not isinstance(classes, list) or not classes:
        raise UserError(f"{path}: classes: must be a list of one or more, each with name, bandwidth and rtt")
    found = [_worker_class(entry, f"{path}, class {n}") for n, entry in enumerate(classes, 1)]
    up_bps, down_bps = top.pop("server_bandwidth", (math.inf, math.inf))
    return Fleet(classes=found, server_up_bps=up_bps, server_down_bps=down_bps, **top)


def _worker_class(entry: Any, where: str) -> WorkerClass:
    met = _settings(entry, _OF_CLASS, where, needed=("name", "bandwidth", "rtt"))
    up_bps, down_bps = met.pop("bandwidth")
    link = Link(up_bps=up_bps, down_bps=down_bps, rtt_s=met.pop("rtt"), loss=met.pop("loss", 0.0))
    seconds = {_SECONDS[key]: met.pop(key) for key in list(met) if key in _SECONDS}
    return WorkerClass(link=link, **seconds, **met)


def _settings(
    tree: Any, readers: Mapping[str, Callable[[Any], Any]], where: str, *, needed: Sequence[str]
) -> dict[str, Any]:
    """A mapping's values, each read as its key says."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}: must be a mapping with {', '.join(needed)}, not {str(tree)[:80]!r}")
    found = {}
    for key, value in tree.items():
        if key not in readers:
            close = difflib.get_close_matches(str(key), readers, n=1)
            meant = f"did you mean {close[0]}?" if close else f"known here: {', '.join(readers)}"
            raise UserError(f"{where}: {key}: unknown; {meant}")
        try:
            found[key] = readers[key](value)
        except UserError as error:
            raise UserError(f"{where}: {key}: {error}") from None
    if missing := [key for key in needed if key not in found]:
        raise UserError(f"{where}: {missing[0]} is missing")
    return found


def _of_text(read: Callable[[str], Any]) -> Callable[[Any], Any]:
    return lambda value: read(str(value))


def _span(text: str) -> float:
    """Seconds of `8h`, `30min`, or of what `links.duration` reads."""
    if met := re.fullmatch(r"(\d+\.?\d*) ?(min|h)", text):
        return float(met[1]) * {"min": 60, "h": 3600}[met[2]]
    try:
        return links.duration(text)
    except UserError:
        raise UserError(f"{text!r} is no time with a unit, such as 8h, 30min, 20s or 50ms") from None


def _some_time(text: str) -> float:
    if not (seconds := _span(text)):
        raise UserError(f"{text!r} is no time above 0")
    return seconds


def _weight(text: str) -> float:
    met = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?%?", text)
    if met is None or not float(met[1]):
        raise UserError(f"{text!r} is no share above 0, such as 0.3 or 30%")
    return float(met[1])


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{str(value)!r} is not a number of 0 or more")
    return float(value)


def _above_zero(value: Any) -> float:
    if not (number := _number(value)):
        raise UserError("must be above 0")
    return number


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{str(value)!r} is not a whole number of 1 or more")
    return value


_OF_FLEET: dict[str, Callable[[Any], Any]] = {
    "server_bandwidth": _of_text(links.bandwidths),
    "cores": _above_zero,
    "classes": lambda value: value,
}
_OF_CLASS: dict[str, Callable[[Any], Any]] = {
    "name": str,
    "share": _of_text(_weight),
    "bandwidth": _of_text(links.bandwidths),
    "rtt": _of_text(links.duration),
    "loss": _of_text(links.share),
    "step_time": _of_text(_some_time),
    "spread": _number,
    "jitter": _number,
    "stalls": _of_text(links.share),
    "stall_factor": _above_zero,
    "up": _of_text(_some_time),
    "down": _of_text(_some_time),
    "per_link": _count,
    "per_machine": _count,
    "cores": _above_zero,
}
_SECONDS = {"step_time": "step_s", "up": "up_s", "down": "down_s"}
