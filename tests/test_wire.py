"""Messages and their bytes: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import math
import tracemalloc
import zlib
from typing import Any, get_args

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lte import wire
from lte.errors import WireError

MESSAGES: list[wire.AnyMessage] = [
    wire.Hello(schema=wire.SCHEMA, worker_id="w0", session="5e55", model={"a.weight": "adapted"}, heads=2),
    wire.Welcome(
        holds=False,
        run_id="run",
        merged_digest="",
        generation=1,
        worker_id="w0",
        incarnation=2**40,
        slot=0,
        version=3,
        settings={"train": {"rounds": 5, "lr": 1e-300}, "modules": ["*"], "none": None, "text": "Ω\x00\n"},
        model={"a.weight": "dense 3x4"},
    ),
    wire.Placement(generation=1, addresses=("tcp://0.0.0.0:5556",), names=(("a.weight",), ("b.weight",))),
    wire.HelloAgain(generation=2),
    wire.Refusal(generation=1, reason="no", cure="yes"),
    wire.Begin(generation=1, version=0),
    wire.Part(generation=1, worker_id="w0", incarnation=2, version=3, stream=1, index=1),
    wire.Contribution(
        generation=1,
        worker_id="w0",
        incarnation=2,
        version=3,
        stream=1,
        parts=2,
        draw=0,
        tokens=4096,
        loss=5e-324,
        lost=0.01,
        step_s=0.5,
        encode_s=0.1,
        apply_s=0.1,
        base_digest="d1",
        merged_digest="d2",
        given_digest="",
    ),
    wire.Receipt(generation=1, version=3, stream=2, status="superseded", reason="late"),
    wire.Update(
        generation=1,
        version=4,
        since=None,
        step=0,
        stream=1,
        parts=3,
        merged=(2, 7, 5),
        base_digest="d3",
        last=True,
    ),
    wire.Heartbeat(generation=1, number=7, worker_id="w0", incarnation=2, version=3, local_step=9),
    wire.Pulse(generation=1, number=7, version=4),
    wire.Behind(generation=1, version=3, worker_id="w0", incarnation=2),
    wire.Recall(generation=1, worker_id="w0", incarnation=2),
    wire.Factors(generation=1, version=3, stream=1, parts=2),
    wire.Leave(generation=1, worker_id="w0", incarnation=2, reason="finished"),
    wire.Farewell(generation=1, reason="done", finished=False, returns=True),
    wire.Inquiry(schema=wire.SCHEMA),
    wire.Status(
        generation=1,
        run_id="run",
        folder="runs/a",
        phase="collecting",
        words="round open for 1.0 s",
        version=3,
        rounds=5,
        on_arrival=False,
        local_steps=2,
        train_loss=2.5,
        valid_loss=None,
        tokens=4096,
        tokens_per_s=1e3,
        uplink_bytes=2**40,
        downlink_bytes=0,
        merged_s=0.5,
        elapsed_s=9.0,
        left_s=None,
        num_members=1,
        num_gone=0,
        workers=(
            wire.WorkerStatus(
                worker_id="w0",
                slot=0,
                state="training",
                version=3,
                local_step=1,
                heard_s=0.1,
                rounds=3,
                step_s=0.2,
                tokens_per_s=None,
                address="127.0.0.1",
                reason="",
            ),
        ),
    ),
]
HELLO = MESSAGES[0]


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """All that a tensor is, with NaNs and signed zeros told apart."""
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bits: denormals, infinities and NaNs with payloads included."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def every_kind_of_tensor() -> dict[str, torch.Tensor]:
    shapes = [(), (1,), (7,), (0,), (3, 0, 2), (5, 3), (2, 1, 3, 1, 2), (1000, 33)]
    found = {
        f"{name} {shape}": random_tensor(dtype, shape, len(name) + len(shape))
        for name, dtype in wire.DTYPES.items()
        for shape in shapes
    }
    for name, dtype in wire.DTYPES.items():
        whole = random_tensor(dtype, (6, 10), 3)
        found |= {f"{name} turned": whole.T, f"{name} strided": whole[::2, 1::3]}
        found |= {f"{name} spread": whole[:1].expand(4, 10)}
    return found | {"": torch.zeros(2), "Ω/ü.\x00weight": torch.ones(2)}


def frames_of(message: wire.AnyMessage, table: list[Any], payload: bytes | None = b"") -> list[bytes]:
    """Frames with a table of our choice: [name, dtype, shape, offset] each."""
    return sealed(msgspec.msgpack.encode([message, table]), *([] if payload is None else [payload]))


def sealed(body: bytes, *payload: bytes) -> list[bytes]:
    """Frames with this header and payload, and the checksum that belongs to them."""
    checksum = zlib.crc32(b"".join([body, *payload])).to_bytes(4, "little")
    return [wire.MAGIC + checksum + body, *payload]


def test_there_is_an_example_of_every_message() -> None:
    assert {type(message) for message in MESSAGES} == set(get_args(wire.AnyMessage))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_comes_out_as_it_went_in(message: wire.AnyMessage) -> None:
    sent = every_kind_of_tensor()
    frames = wire.encode(message, sent)
    decoded, table = wire.decode(frames)
    received = wire.tensors(frames, table)
    assert decoded == message
    assert type(decoded) is type(message)
    assert list(received) == list(sent)
    assert {name: bits(tensor) for name, tensor in received.items()} == {
        name: bits(tensor) for name, tensor in sent.items()
    }
    alone = wire.encode(message)
    assert len(alone) == 1
    assert wire.decode(alone) == (message, ())
    assert wire.tensors(alone, ()) == {}


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_frames_may_come_in_any_kind_of_buffer(kind: Any) -> None:
    frames = [kind(bytes(frame)) for frame in wire.encode(HELLO, {"a": torch.arange(5), "b": torch.ones(3)})]
    message, table = wire.decode(frames)
    assert message == HELLO
    assert wire.tensors(frames, table)["a"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("misaligned_by", [0, 1, 24])
def test_received_tensors_are_aligned_and_in_memory_of_their_own(misaligned_by: int) -> None:
    frames = wire.encode(HELLO, {f"t{n}": torch.full((n,), n, dtype=torch.int8) for n in (1, 63, 64, 65, 3)})
    buffer = bytearray(bytes(misaligned_by) + bytes(frames[1]))
    arrived = [frames[0], memoryview(buffer)[misaligned_by:]]
    received = wire.tensors(arrived, wire.decode(arrived)[1])
    assert [tensor.data_ptr() % 64 for tensor in received.values()] == [0] * 5
    buffer[:] = bytes(len(buffer))
    assert all((tensor == len(tensor)).all() for tensor in received.values())


def test_encode_copies() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    frames = wire.encode(HELLO, {"whole": tensor, "part": tensor[:, 1]})
    before = [bytes(frame) for frame in frames]
    tensor.zero_()
    assert [bytes(frame) for frame in frames] == before
    assert wire.tensors(frames, wire.decode(frames)[1])["part"].tolist() == [1, 5, 9]


def test_encoding_is_a_function_of_the_message_alone() -> None:
    """Padding included: it must not carry what was in memory before."""
    torch.full((4096,), 255, dtype=torch.uint8)
    tensors = {"a": torch.ones(3), "b": torch.ones(70, dtype=torch.int8)}
    first, second = ([bytes(frame) for frame in wire.encode(HELLO, tensors)] for _ in range(2))
    assert first == second
    assert wire.num_bytes(first) == len(first[0]) + 64 + 128
    assert first[1][12:64] == bytes(52)


@settings(deadline=None)
@given(
    st.sampled_from(MESSAGES),
    st.lists(
        st.tuples(st.sampled_from(list(wire.DTYPES.values())), st.lists(st.integers(0, 5), max_size=5)),
        max_size=4,
    ),
    st.data(),
)
def test_damaged_frames_are_refused_or_are_messages_themselves(
    message: wire.AnyMessage, kinds: list[tuple[torch.dtype, list[int]]], data: st.DataObject
) -> None:
    """Cut, extended, or with a flipped bit: refused."""
    tensors = {f"t{n}": random_tensor(dtype, tuple(shape), n) for n, (dtype, shape) in enumerate(kinds)}
    frames = [bytearray(frame) for frame in wire.encode(message, tensors)]
    which = data.draw(st.integers(0, len(frames) - 1))
    damage = data.draw(st.sampled_from(["cut", "extended", "flipped", "another frame"]))
    frame = frames[which]
    if damage == "flipped" and frame:
        bit = data.draw(st.integers(0, 8 * len(frame) - 1))
        frame[bit // 8] ^= 1 << bit % 8
    elif damage == "another frame":
        frames.append(bytearray(data.draw(st.binary(max_size=3))))
    elif damage == "cut" and frame:
        del frame[data.draw(st.integers(0, len(frame) - 1)) :]
    else:
        frame += data.draw(st.binary(min_size=1, max_size=100))
    with pytest.raises(WireError):
        wire.decode(frames)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=3), st.booleans())
def test_random_frames_are_refused(frames: list[bytes], has_magic: bool) -> None:
    if frames and has_magic:
        frames = sealed(*frames)
    assert_refused_or_sound(frames)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(max_size=3),
            st.sampled_from([*wire.DTYPES, "c8", ""]),
            st.lists(st.integers(-1, 3) | st.integers(-(2**63), 2**64 - 1), max_size=20),
            st.integers(-64, 256) | st.integers(0, 2**64 - 1),
        ),
        max_size=3,
    ),
    st.binary(max_size=300),
)
def test_random_tables_are_refused(table: list[Any], payload: bytes) -> None:
    """The header is sound, its table of tensors is not."""
    assert_refused_or_sound(frames_of(HELLO, table, payload))


def assert_refused_or_sound(frames: list[Any]) -> None:
    """Whatever these are, decoding raises nothing but WireError, and takes no more than what came."""
    received_bytes = sum(map(len, frames))
    taken, empty, complaint = [], torch.empty, ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda n, **options: taken.append(n) or empty(n, **options))
        tracemalloc.start()
        try:
            message, table = wire.decode(frames)
            tensors = wire.tensors(frames, table)
        except WireError as error:
            complaint = str(error)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 100_000 + 100 * received_bytes
    assert sum(taken) <= received_bytes
    assert len(complaint) < 500
    if complaint:
        return
    again = wire.encode(message, tensors)
    assert wire.decode(again)[1] == table
    assert [bytes(f) for f in wire.encode(wire.decode(again)[0], tensors)] == [bytes(f) for f in again]


# Each was raised by the decoder of a former version, or asks for more than its frames hold.
_WELCOME = msgspec.msgpack.encode([MESSAGES[1], []])
_FIVE = b"\xa6rounds\x05"
assert _FIVE in _WELCOME


@pytest.mark.parametrize(
    "value",
    [
        b"\x91" * 100_000 + b"\xc0",  # lists in lists: RecursionError
        b"\xa2\xff\xfe",  # not UTF-8
        b"\x81\x81\x01\x01\x01",  # a map as a key
        b"\xdd\xff\xff\xff\xff",  # a list of 4 G items
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xd7\xff" + b"\xff" * 8,  # a time out of range
    ],
    ids=["deep", "not utf-8", "unhashable key", "huge list", "huge map", "huge text", "time"],
)
def test_hostile_settings_are_refused(value: bytes) -> None:
    frames = sealed(_WELCOME.replace(_FIVE, b"\xa6rounds" + value))
    with pytest.raises(WireError):
        wire.decode(frames)
    assert_refused_or_sound(frames)


@pytest.mark.parametrize(
    ("table", "payload", "words"),
    [
        ([["a", "f4", [2], 0], ["a", "f4", [2], 64]], bytes(128), "twice"),
        ([["a", "f4", [2], 0], ["b", "f4", [2], 0]], bytes(64), "malformed tensor entry 'b'"),  # overlap
        ([["a", "f4", [2], 0], ["b", "f4", [2], 8]], bytes(128), "malformed tensor entry 'b'"),
        ([["a", "f4", [2], 0], ["b", "f4", [2], 128]], bytes(192), "malformed tensor entry 'b'"),  # gap
        ([["a", "f4", [2], 64], ["b", "f4", [2], 0]], bytes(128), "malformed tensor entry 'a'"),
        ([["a", "f4", [17], 0]], bytes(64), "announces 128"),
        ([["a", "f4", [2], 0]], bytes(128), "announces 64"),
        ([["a", "f4", [2**40], 0]], bytes(64), "announces"),
        ([["a", "f4", [2**64 - 1, 2**64 - 1], 0]], bytes(64), "malformed"),
        ([["a", "f4", [0, 2**62], 0]], b"", "malformed"),  # empty, but no strides can be made for it
        ([["a", "f4", [1] * 17, 0]], bytes(64), "malformed"),
        ([["a", "f4", [-2], 0]], bytes(64), "header"),
        ([["a", "f4", [2.0], 0]], bytes(64), "header"),
        ([["a", "f4", [True], 0]], bytes(64), "header"),
        ([["a", "f16", [2], 0]], bytes(64), "malformed"),
        ([["a", "f4", [2], 0]], None, "payload"),
        ([["a", "f4", [0], 0]], None, "payload"),  # an IndexError once: announced, and no frame came
        ([], b"", "payload"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_that_does_not_fit_is_refused(table: list[Any], payload: bytes | None, words: str) -> None:
    frames = frames_of(HELLO, table, payload)
    with pytest.raises(WireError, match=words):
        wire.decode(frames)
    assert_refused_or_sound(frames)


def test_a_shape_of_many_sizes_is_refused_at_once() -> None:
    """Their product would have 25 million bits; the test's time limit is the assertion."""
    with pytest.raises(WireError, match="malformed"):
        wire.decode(frames_of(HELLO, [["a", "f4", [2**64 - 1] * 400_000, 0]]))


def test_a_server_hears_what_workers_say_and_nothing_else() -> None:
    heard = get_args(wire.FromWorker)
    for message in MESSAGES:
        frames = wire.encode(message)
        if isinstance(message, heard):
            assert wire.decode_from_worker(frames) == (message, ())
        else:
            with pytest.raises(WireError, match="malformed header"):
                wire.decode_from_worker(frames)


def test_lists_in_settings_take_no_memory_of_a_server() -> None:
    """Only what servers say holds anything: a million lists are 70 MB."""
    num_lists = 1_000_000
    body = _WELCOME.replace(_FIVE, b"\xa6rounds\xdd" + num_lists.to_bytes(4, "big") + b"\x90" * num_lists)
    frames = sealed(body)
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            wire.decode_from_worker(frames)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_none_is_malformed(scale: float) -> None:
    hello = wire.Hello(schema=wire.SCHEMA, worker_id="", session="s", model={}, heads=0, scale=scale)
    with pytest.raises(WireError, match="scale"):
        wire.decode(wire.encode(hello))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (wire.Hello, "session", "x" * 1025),
        (wire.Hello, "worker_id", "x" * 1025),
        (wire.Heartbeat, "worker_id", "x" * 1025),
        (wire.Leave, "reason", "x" * 1025),
        (wire.Contribution, "base_digest", "x" * 1025),
        (wire.Contribution, "tokens", 2**40 + 1),  # of which a sum would not fit into the journal
    ],
)
def test_what_a_server_keeps_of_a_message_has_a_largest_size(
    kind: type[wire.Message], field: str, value: Any
) -> None:
    (message,) = (message for message in MESSAGES if type(message) is kind)
    with pytest.raises(WireError, match=field):
        wire.decode(wire.encode(msgspec.structs.replace(message, **{field: value})))


def test_the_header_has_a_largest_size() -> None:
    def of_size(num_bytes: int) -> list[bytes | memoryview]:
        empty = wire.num_bytes(wire.encode(wire.Refusal(generation=1, reason="r" * 100_000, cure="")))
        return wire.encode(wire.Refusal(generation=1, reason="r" * (100_000 + num_bytes - empty), cure=""))

    wire.decode(of_size(wire.MAX_HEADER_BYTES))
    with pytest.raises(WireError, match="header of 4194305 bytes"):
        wire.decode(of_size(wire.MAX_HEADER_BYTES + 1))


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"GET / HTTP/1.1"],
        [b"LTE\x03" + bytes(wire.encode(HELLO)[0])[4:]],  # a later version of the protocol
        [*wire.encode(HELLO, {"a": torch.ones(1)}), b""],
    ],
)
def test_other_things_than_messages_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        wire.decode(frames)


@pytest.mark.parametrize("field", ["heads", "version", "incarnation", "tokens"])
def test_counts_are_not_negative(field: str) -> None:
    """Negative heads would turn a merge's sign."""
    message = next(m for m in MESSAGES if hasattr(m, field) and not isinstance(m, wire.Welcome))
    frames = wire.encode(msgspec.structs.replace(message, **{field: -1}))
    with pytest.raises(WireError, match=field):
        wire.decode(frames)


def test_fields_that_are_missing_or_unknown_are_refused() -> None:
    fields = msgspec.to_builtins(HELLO)
    for wrong in (fields | {"more": 1}, {k: v for k, v in fields.items() if k != "session"}, {"type": "Hi"}):
        with pytest.raises(WireError, match="malformed header"):
            wire.decode(sealed(msgspec.msgpack.encode([wrong, []])))
    wire.decode(sealed(msgspec.msgpack.encode([fields, []])))


def variant(**changes: Any) -> list[type[msgspec.Struct]]:
    """The vocabulary with another Pulse: fields changed, added, or (None) taken away."""
    fields = {f.name: f.type for f in msgspec.structs.fields(wire.Pulse)} | changes
    pulse = msgspec.defstruct(
        "Pulse", [(name, kind) for name, kind in fields.items() if kind], bases=(wire.Message,), kw_only=True
    )
    return [pulse if kind is wire.Pulse else kind for kind in get_args(wire.AnyMessage)]


def test_the_schema_names_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wire.schema_of(variant()) == wire.SCHEMA
    names = {
        wire.schema_of(kinds)
        for kinds in (
            variant(),
            variant(more=int),
            variant(version=None),
            variant(version=str),
            variant(version=int | None),
            variant()[1:],
        )
    }
    assert len(names) == 6
    monkeypatch.setitem(wire.DTYPES, "f1", torch.float8_e4m3fn)
    assert wire.schema_of(variant()) not in names


# Parts


PART = wire.Part(generation=1, worker_id="w0", incarnation=2, version=3, stream=1, index=0)


def part(index: int) -> wire.Part:
    return msgspec.structs.replace(PART, index=index)


def take(assembly: wire.Assembly, frames: Any) -> dict[str, int]:
    message, table = wire.decode(frames)
    assert isinstance(message, wire.Part)
    return assembly.add(message, frames, table)


@settings(deadline=None)
@given(st.lists(st.integers(0, 700), max_size=12), st.sampled_from([64, 65, 128, 300, 10**6]))
def test_parts_put_together_are_what_was_cut(sizes: list[int], part_bytes: int) -> None:
    blobs = {f"t{n}": random_tensor(torch.uint8, (size,), n) for n, size in enumerate(sizes)}
    parts = list(wire.in_parts(iter(blobs.items()), part_bytes, part))
    assembly = wire.Assembly(1, 3, {name: blob.numel() for name, blob in blobs.items()})
    counted: dict[str, int] = {}
    for frames, of_names in parts:
        assert wire.num_bytes(frames[1:]) <= max(part_bytes + 128, 128 * len(of_names))
        assert take(assembly, frames) == of_names
        for name, num_bytes in of_names.items():
            counted[name] = counted.get(name, 0) + num_bytes
    whole = assembly.close(len(parts))
    assert whole is not None
    assert {name: bits(tensor) for name, tensor in whole.items()} == {
        name: bits(tensor) for name, tensor in blobs.items()
    }
    assert counted == {name: blob.numel() for name, blob in blobs.items()}


def test_a_part_leaves_before_the_next_tensor_is_made() -> None:
    """A link must not be idle while layers are packed."""
    made = 0

    def layers() -> Any:
        nonlocal made
        for made in range(1, 5):
            yield f"layer {made}", torch.zeros(100, dtype=torch.uint8)

    parts = wire.in_parts(layers(), 100, part)
    for sent in range(1, 5):
        next(parts)
        assert made == sent


BLOBS = {"a": torch.zeros(250, dtype=torch.uint8)}


@pytest.mark.parametrize("come", [[0, 1, 2], [2, 0, 1], [0, 0, 1, 2], [2, 1, 0, 1, 2]])
def test_parts_may_come_in_any_order_and_more_than_once(come: list[int]) -> None:
    blobs = {"a": torch.arange(250, dtype=torch.uint8)}
    parts = [frames for frames, _ in wire.in_parts(iter(blobs.items()), 100, part)]
    assembly = wire.Assembly(1, 3, {"a": 250})
    counted = [sum(take(assembly, parts[index]).values()) for index in come]
    whole = assembly.close(3)
    assert whole is not None
    assert torch.equal(whole["a"], blobs["a"])
    assert sum(counted) == 250, "each once"


@pytest.mark.parametrize("come", [[1], [0, 2], [0, 1], [0, 0, 1], []])
def test_where_parts_were_lost_nothing_comes_out(come: list[int]) -> None:
    parts = [frames for frames, _ in wire.in_parts(iter(BLOBS.items()), 100, part)]
    assembly = wire.Assembly(1, 3, {"a": 250})
    for index in come:
        take(assembly, parts[index])
    assert assembly.close(3) is None


@pytest.mark.parametrize("num_parts", [0, 2, 2**62])
def test_a_number_of_parts_that_did_not_come_takes_no_memory(num_parts: int) -> None:
    """The server was to make a set of so many once."""
    assembly = wire.Assembly(1, 3, {"a": 250})
    take(assembly, wire.encode(part(0), BLOBS))
    tracemalloc.start()
    try:
        assert assembly.close(num_parts) is None
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_parts_cannot_be_many_and_empty() -> None:
    assembly = wire.Assembly(1, 3, {"a": 250})
    take(assembly, wire.encode(part(0)))
    with pytest.raises(WireError, match="empty"):
        assembly.close(1)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": torch.zeros(251, dtype=torch.uint8)}, "'a' is larger than the 250 bytes"),
        ({"b": torch.zeros(0, dtype=torch.uint8)}, "'b', which is not of the model's"),
        ({"a": torch.zeros(1)}, "not bytes"),
        ({"a": torch.zeros(1, 1, dtype=torch.uint8)}, "not bytes"),
    ],
)
def test_what_may_not_come_is_refused_and_takes_no_memory(
    tensors: dict[str, torch.Tensor], says: str
) -> None:
    assembly = wire.Assembly(1, 3, {"a": 250})
    assert take(assembly, wire.encode(part(0), tensors)) == {}
    assert take(assembly, wire.encode(part(1), BLOBS)) == {}
    with pytest.raises(WireError, match=says):
        assembly.close(1)


def test_pieces_cannot_be_many_and_small() -> None:
    """Each takes 64 bytes at least: a hostile worker must not make that a thousand times its message."""
    assembly = wire.Assembly(1, 3, {"a": 10_000})
    for index in range(10_000):
        take(assembly, wire.encode(part(index), {"a": torch.zeros(1, dtype=torch.uint8)}))
    with pytest.raises(WireError, match="larger"):
        assembly.close(10_000)
    empty = wire.Assembly(1, 3, {"a": 10})
    for index in range(2):
        take(empty, wire.encode(part(index), {"a": torch.zeros(0, dtype=torch.uint8)}))
    with pytest.raises(WireError, match="empty"):
        empty.close(2)


def test_what_workers_say_forges_no_line_and_moves_no_cursor() -> None:
    """It is recorded, and shown by `lte status`."""
    said = "done\n10:00 bob left\x1b[2J\x9b\u202e"
    leave = wire.Leave(generation=1, worker_id="alice", incarnation=1, reason=said)
    hello = wire.Hello(schema=said, worker_id=said, session=said, model={said: said, "Straße": "é"}, heads=0)
    heard, _ = wire.decode_from_worker(wire.encode(leave))
    assert isinstance(heard, wire.Leave)
    assert heard.reason == "done�10:00 bob left�[2J��"
    heard, _ = wire.decode_from_worker(wire.encode(hello))
    assert isinstance(heard, wire.Hello)
    texts = [heard.schema, heard.worker_id, heard.session, *heard.model, *heard.model.values()]
    assert all(text.isprintable() for text in texts)
    assert heard.model["Straße"] == "é"
    with pytest.raises(WireError, match="malformed tensor entry"):
        wire.decode_from_worker(wire.encode(leave, {said: torch.zeros(1)}))
