"""Network namespaces that stand for machines: a hub, and others with a cable to it each."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HUB_ADDRESS = "10.213.7.1"
_NOBODY = "02:00:00:00:00:99"
"""A hardware address that nobody has."""
_CLONE_NEWNET = 0x40000000
Commands = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Network:
    """Names of namespaces. A leaf has its end of the cable as eth0, the hub has eth0, eth1, ..."""

    hub: str
    leaves: tuple[str, ...]

    def down(self, leaf: int) -> Commands:
        """Unplug a leaf's cable at its own end, which it sees."""
        return (_ip("-n", self.leaves[leaf], "link", "set", "eth0", "down"),)

    def up(self, leaf: int) -> Commands:
        return (_ip("-n", self.leaves[leaf], "link", "set", "eth0", "up"),)

    def hub_down(self, leaf: int) -> Commands:
        """Unplug it at the hub's end."""
        return (_ip("-n", self.hub, "link", "set", f"eth{leaf}", "down"),)

    def hub_up(self, leaf: int) -> Commands:
        return (_ip("-n", self.hub, "link", "set", f"eth{leaf}", "up"),)

    def mute(self, leaf: int) -> Commands:
        """Lose what a leaf sends, and nothing else: its packets are for nobody, and nobody is told."""
        to_nobody = (HUB_ADDRESS, "dev", "eth0", "lladdr", _NOBODY, "nud", "permanent")
        return (_ip("-n", self.leaves[leaf], "neigh", "replace", *to_nobody),)

    def unmute(self, leaf: int) -> Commands:
        return (_ip("-n", self.leaves[leaf], "neigh", "del", HUB_ADDRESS, "dev", "eth0"),)

    def deafen(self, leaf: int) -> Commands:
        """Lose what the hub sends to a leaf, and nothing else."""
        to_nobody = (_address(leaf), "dev", f"eth{leaf}", "lladdr", _NOBODY, "nud", "permanent")
        return (_ip("-n", self.hub, "neigh", "replace", *to_nobody),)

    def undeafen(self, leaf: int) -> Commands:
        return (_ip("-n", self.hub, "neigh", "del", _address(leaf), "dev", f"eth{leaf}"),)


@dataclass(frozen=True)
class Inside:
    """A process runs in this namespace, if it has no threads yet."""

    namespace: str

    def install(self) -> None:
        with Path("/run/netns", self.namespace).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")


def run(commands: Commands) -> None:
    for command in commands:
        subprocess.run(command, check=True, capture_output=True)


@contextmanager
def star(num_leaves: int) -> Iterator[Network]:
    """A hub at HUB_ADDRESS and its leaves. Skips the test where that is not allowed."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    name = f"lte-t{os.getpid()}"
    network = Network(f"{name}-hub", tuple(f"{name}-{leaf}" for leaf in range(num_leaves)))
    everyone = (network.hub, *network.leaves)
    try:
        try:
            run(tuple(_ip("netns", "add", each) for each in everyone))
            for leaf in range(num_leaves):
                _lay_cable(network, leaf)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        run(tuple(_ip("-n", each, "link", "set", "lo", "up") for each in everyone))
        yield network
    finally:
        for each in everyone:
            subprocess.run(_ip("netns", "del", each), check=False, capture_output=True)


def _lay_cable(network: Network, leaf: int) -> None:
    near, far = (network.hub, f"eth{leaf}"), (network.leaves[leaf], "eth0")
    run((_ip("link", "add", near[1], "netns", near[0], "type", "veth", "peer", far[1], "netns", far[0]),))
    for (name, device), here, there in (
        (near, HUB_ADDRESS, _address(leaf)),
        (far, _address(leaf), HUB_ADDRESS),
    ):
        run((_ip("-n", name, "addr", "add", here, "peer", there, "dev", device),))
        run((_ip("-n", name, "link", "set", device, "up"),))
        if shutil.which("ethtool"):  # frames as they would be on a wire
            subprocess.run(
                ["ip", "netns", "exec", name, "ethtool", "-K", device, "tso", "off", "gso", "off"],
                check=False,
                capture_output=True,
            )


def _address(leaf: int) -> str:
    return f"10.213.7.{2 + leaf}"


def _ip(*arguments: str) -> tuple[str, ...]:
    return ("ip", *arguments)
