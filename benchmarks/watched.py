"""What a process costs, read from /proc while it runs."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

_PAGE_BYTES, _TICKS_PER_S = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


class Watched:
    """Samples the resident memory of a process until it is closed or the process ends."""

    def __init__(self, pid: int, *, every_s: float = 0.02) -> None:
        self._proc, self._every_s = Path("/proc") / str(pid), every_s
        self.samples: list[tuple[float, int]] = []  # (seconds since the start, bytes)
        self._began_s, self._cpu_s = time.monotonic(), (0.0, 0.0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    @property
    def peak_bytes(self) -> int:
        return max((num_bytes for _, num_bytes in self.samples), default=0)

    @property
    def cpu_share(self) -> float:
        """Of one core, since this began."""
        seconds, cpu_s = self._cpu_s
        return cpu_s / seconds if seconds else 0.0

    def slope(self, from_s: float) -> float:
        """Bytes a second by which it grows after that second, by least squares."""
        later = [(at_s, num_bytes) for at_s, num_bytes in self.samples if at_s >= from_s]
        if len(later) < 2:
            return 0.0
        mean_s = sum(at_s for at_s, _ in later) / len(later)
        spread = sum((at_s - mean_s) ** 2 for at_s, _ in later)
        return sum((at_s - mean_s) * num_bytes for at_s, num_bytes in later) / spread

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _sample(self) -> None:
        first_cpu_s = None
        while not self._stopping.wait(self._every_s):
            try:
                pages = int((self._proc / "statm").read_text().split()[1])
                user, system = (self._proc / "stat").read_text().rpartition(")")[2].split()[11:13]
            except (OSError, IndexError):  # it has ended
                return
            if not pages:  # and was not waited for
                return
            cpu_s = (int(user) + int(system)) / _TICKS_PER_S
            first_cpu_s = cpu_s if first_cpu_s is None else first_cpu_s
            at_s = time.monotonic() - self._began_s
            self.samples.append((at_s, pages * _PAGE_BYTES))
            self._cpu_s = (at_s, cpu_s - first_cpu_s)
