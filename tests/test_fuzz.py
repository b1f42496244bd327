"""Mutated frames for the codec, drawn by hypothesis and by a seed; `benchmarks/fuzz.py` has many more.

Whatever comes, it is a message of this protocol or it is refused by a WireError, which is what a server
drops. Most frames carry a checksum that is right, so that what they hold reaches the decoders.
"""

from __future__ import annotations

import functools
import random

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import Mutations

from lte import wire


@functools.cache
def target(codecs: int, is_known: bool) -> fuzz.Target:
    return fuzz.target(fuzz.CODECS[codecs], is_known=is_known)


KINDS = list(Mutations([], random.Random()).kinds)


@pytest.mark.parametrize("is_known", [False, True], ids=["first", "later"])
@pytest.mark.parametrize(
    "codecs", range(len(fuzz.CODECS)), ids=lambda n: "-".join(map(str, fuzz.CODECS[n].values()))
)
def test_a_contribution_that_nobody_touched_is_taken(codecs: int, is_known: bool) -> None:
    assert target(codecs, is_known).take(target(codecs, is_known).frames) == "a contribution"


@settings(deadline=None, max_examples=400)
@given(
    st.integers(0, len(fuzz.CODECS) - 1),
    st.booleans(),
    st.sampled_from(["blobs mutated", *KINDS]),
    st.randoms(use_true_random=False),
)
def test_whatever_comes_is_a_message_or_refused(
    codecs: int, is_known: bool, kind: str, chance: random.Random
) -> None:
    aim = target(codecs, is_known)
    ordinary = [[bytes(f) for f in wire.encode(message)] for message in fuzz.ordinary()]
    aim.take(Mutations([aim.frames, *ordinary], chance).make(kind))


def test_thousands_of_mutated_frames_by_a_seed() -> None:
    """Of every kind some are refused, and many mutated contributions get as far as the arithmetic."""
    counts = fuzz.fuzz_codec(3_000, random.Random(0))
    for kind in KINDS:
        assert kind == "replayed" or counts[kind, "refused"], kind
    assert counts["blobs mutated", "a contribution"] > 50
    assert counts["replayed", "refused"] == 0


def test_mutated_changes_of_bases_are_refused_or_taken() -> None:
    counts = fuzz.fuzz_changes(1_000, random.Random(0))
    assert counts["refused"] > 100
    assert counts["taken"] > 10
