"""The parameter server: rounds (pure), master, checkpoints, and the service that joins them."""

from lte.server.service import Server

__all__ = ["Server"]
