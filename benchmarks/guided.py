"""Frames for the codec, guided by the coverage that they reach: needs atheris, which nothing else here does.

    pip install atheris
    python benchmarks/guided.py -runs=200000 [-seed=1] [FOLDER of inputs]

An input is the choice of a codec and of what is mutated, the header's length, and the bytes of header
and payload; the checksum is mended, so that it says nothing. Whatever is raised beside WireError is a
bug, and ends the process with the input in a file.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["lte.wire", "lte.compress"]):
    import fuzz
    from mutations import Frames, body_of, sealed

TARGETS = [fuzz.target(codecs, is_known=known) for codecs in fuzz.CODECS for known in (False, True)]


def one_input(data: bytes) -> None:
    """An input of three kinds: frames, the payload of a contribution, or one of its blobs."""
    provider = atheris.FuzzedDataProvider(data)
    target = TARGETS[provider.ConsumeIntInRange(0, len(TARGETS) - 1)]
    target.take(_frames(provider, target.frames))


def _frames(provider: atheris.FuzzedDataProvider, whole: Frames) -> Frames:
    how = provider.ConsumeIntInRange(0, 2)
    if how == 0:
        header = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 300))
        return sealed(header, provider.ConsumeBytes(1 << 16))
    payload = bytearray(whole[1])
    at = provider.ConsumeIntInRange(0, len(payload) - 1)
    given = provider.ConsumeBytes(16 if how == 1 else 1 << 16)
    payload[at : at + len(given)] = given[: len(payload) - at]
    return sealed(body_of(whole), bytes(payload))


def main() -> None:
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
