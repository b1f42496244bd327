"""A worker: local training (no sockets), the protocol's worker side, and the two joined."""

from lte.worker.service import Worker

__all__ = ["Worker"]
