"""The change of a base between two versions, as bytes.

A change holds differences, so it can be undone; or, where that takes fewer bytes, the new codes or
scales in full, which apply to any base of the shape. Codes and scales travel as two blobs, each of
which says by its first byte what it holds:

    SAME     nothing: they did not change
    GAPS     the gaps between changed elements, and these elements' differences
    DENSE    the differences of all codes
    FULL     all new codes, or all new scales

Codes of `nf4` differ modulo 16, those of `int8` modulo 256, scales by their bits modulo 2^16. A gap, the
number of unchanged elements before a changed one, takes as many bytes of 255 as fit in it, and one for
the rest; where gaps are long that tells multiples of 256, and the remainders follow. All but remainders
is squeezed (see `entropy`). The fp32 weights of `none` travel in full, their highest bytes squeezed.

Within 5 % of the zeroth-order entropy of the differences for a million codes and more of `nf4`, 11 % for
`int8`, whatever share of them changed. Integers in blobs are uint32, little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lte.compress.entropy import expand, squeeze
from lte.errors import WireError
from lte.quantize import Quant, Quantized, pack

SAME, GAPS, DENSE, FULL = range(4)
"""Forms of a blob."""
_GAPS_UP_TO = {"nf4": 0.33, "int8": 0.6}
"""Share of changed codes up to which gaps take fewer bytes than all differences."""
_CODES_A_BYTE = {"nf4": 2, "int8": 1}
_WIDE = 15
"""What stands for a difference that does not fit in four bits."""
_CHUNK = 1 << 17
"""Elements of which positions (8 bytes each) are held at a time."""
_MORE = 255
"""A byte of a gap that goes on."""

Bytes = npt.NDArray[np.uint8]
Bits = npt.NDArray[np.uint16]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Change:
    """What brings a base from one version to another.

    Attributes:
        codes, scales: the blobs, uint8, one dimension.
        codes_changed, scales_changed: how many; all of them in a snapshot.
    """

    codes: Tensor
    scales: Tensor
    codes_changed: int
    scales_changed: int


def encode(old: Quantized, new: Quantized) -> Change:
    """The change between two bases of one shape and format, on the CPU."""
    assert (old.shape, old.quant) == (new.shape, new.quant)
    codes, codes_changed = _encode_codes(_bytes(old.codes), _bytes(new.codes), new.quant)
    scales, scales_changed = _encode_scales(_bits(old.scales), _bits(new.scales))
    return Change(torch.from_numpy(codes), torch.from_numpy(scales), codes_changed, scales_changed)


def full(base: Quantized) -> Change:
    """A snapshot: the change to this base, on the CPU, from any base of its shape and format."""
    codes, scales = _full_codes(_bytes(base.codes), base.quant), _full_scales(_bits(base.scales))
    num_codes = base.codes.numel() * _CODES_A_BYTE.get(base.quant, 1)
    return Change(torch.from_numpy(codes), torch.from_numpy(scales), num_codes, base.scales.numel())


def is_reformatted(old: Mapping[str, Quantized], new: Mapping[str, Quantized]) -> bool:
    """Whether a base of these has another format than before: then there is no change between them."""
    return any(old[name].quant != base.quant for name, base in new.items())


def apply(base: Quantized, codes: Tensor, scales: Tensor) -> Quantized:
    """The base after a change, as new tensors on its device.

    Args:
        base: the base before, bit for bit. codes, scales: the blobs of a `Change`.

    Raises:
        WireError: no encoder made these blobs for a base of this shape and format.
    """
    return _changed(base, codes, scales, undo=False)


def revert(base: Quantized, codes: Tensor, scales: Tensor) -> Quantized:
    """The base before a change, given the one after it: `apply` undone.

    Raises:
        ValueError: the change holds codes or scales in full, so what was before is not in it.
        WireError: no encoder made these blobs for a base of this shape and format.
    """
    if FULL in (_form(_bytes(codes)), _form(_bytes(scales))):
        raise ValueError("a change that holds codes or scales in full cannot be undone")
    return _changed(base, codes, scales, undo=True)


def entropy_bytes(old: Quantized, new: Quantized) -> float:
    """Zeroth-order entropy of the differences of codes and scales: what an ideal coder that takes every
    code for itself would need, without its tables. Of the four bytes of fp32 for `none`."""
    old_codes, new_codes = _bytes(old.codes), _bytes(new.codes)
    if new.quant == "none":
        planes = new_codes.reshape(-1, 4).T if (old_codes != new_codes).any() else np.zeros((0, 1), np.uint8)
        return sum(_entropy(np.bincount(plane, minlength=256)) for plane in planes) / 8
    counts = np.bincount(_minus(new_codes, old_codes, new.quant), minlength=256)
    if new.quant == "nf4":
        counts = counts.reshape(16, 16).sum(0) + counts.reshape(16, 16).sum(1)
    scales = np.unique(_bits(new.scales) - _bits(old.scales), return_counts=True)[1]
    return (_entropy(counts) + _entropy(scales)) / 8


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    """Bits of so many occurrences of each symbol."""
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


# Codes


def _encode_codes(old: Bytes, new: Bytes, quant: Quant) -> tuple[Bytes, int]:
    """The blob, and how many codes changed."""
    if quant == "none":
        changed = int((old.view("<u4") != new.view("<u4")).sum())
        return (_full_codes(new, quant) if changed else _blob(SAME)), changed
    differences = _minus(new, old, quant)
    changed = _num_nonzero(differences, quant)
    if not changed:
        return _blob(SAME), 0
    if changed <= _GAPS_UP_TO[quant] * differences.size * _CODES_A_BYTE[quant]:
        blob = _sparse_codes(differences, quant, changed)
    else:
        blob = _blob(DENSE, _squeezed(differences))
    # Codes squeeze to little less than they are: no need to try when changes take far fewer bytes.
    if blob.size > new.size // 4:
        blob = min(blob, _full_codes(new, quant), key=len)
    return blob, changed


def _sparse_codes(differences: Bytes, quant: Quant, changed: int) -> Bytes:
    parts, last, unit = [], -1, _unit(changed, differences.size * _CODES_A_BYTE[quant])
    for start, elements in _elements(differences, quant):
        at = np.flatnonzero(elements != 0)
        if at.size:
            parts.append((*_gaps(at + start, last, unit), elements[at]))
            last = start + int(at[-1])
    units, remainders, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _blob(GAPS, _gaps_blob(units, remainders), _values_blob(values, quant))


def _values_blob(values: Bytes, quant: Quant) -> Bytes:
    """Differences that are not zero, two a byte; those of `int8` zigzag, large ones apart."""
    if quant == "nf4":
        return _squeezed(_pack(values))
    zigzag = _zigzag(values)
    wide = zigzag[zigzag >= _WIDE]
    return np.concatenate([_sized(_squeezed(_pack(np.minimum(zigzag, _WIDE)))), _squeezed(wide)])


def _values(body: Bytes, count: int, quant: Quant) -> Bytes:
    if quant == "nf4":
        return _unpack(_expanded(body, (count + 1) // 2))[:count]
    narrow, wide = _take_sized(body)
    zigzag = _unpack(_expanded(narrow, (count + 1) // 2))[:count]
    is_wide = zigzag == _WIDE
    zigzag[is_wide] = _expanded(wide, int(np.count_nonzero(is_wide)))
    return _unzigzag(zigzag)


def _full_codes(codes: Bytes, quant: Quant) -> Bytes:
    if quant != "none":
        return _blob(FULL, _squeezed(codes))
    floats = codes.reshape(-1, 4)  # only the highest bytes, signs and exponents, have a skewed histogram
    return _blob(FULL, floats[:, :3].reshape(-1), _squeezed(floats[:, 3]))


def _changed_codes(codes: Bytes, blob: Bytes, quant: Quant, *, undo: bool) -> Bytes:
    form, body = _form(blob), blob[1:]
    if form == SAME and not body.size:
        return codes.copy()
    if form == FULL and quant == "none":
        low_bytes = codes.size // 4 * 3
        floats = np.empty((codes.size // 4, 4), np.uint8)
        floats[:, 3] = _expanded(body[low_bytes:], codes.size // 4)  # fails if the low bytes lack
        floats[:, :3] = body[:low_bytes].reshape(-1, 3)
        return floats.reshape(-1)
    if form == FULL:
        return _expanded(body, codes.size)
    if form == DENSE and quant != "none":
        differences = _expanded(body, codes.size)
    elif form == GAPS and quant != "none":
        differences = _dense(body, codes.size, quant)
    else:
        raise WireError(f"a change of {quant} codes in form {form}, {body.size} bytes")
    return (_minus if undo else _plus)(codes, differences, quant)


def _dense(body: Bytes, num_bytes: int, quant: Quant) -> Bytes:
    """The differences of all codes, as codes are packed, that `_sparse_codes` made this of."""
    per_byte = _CODES_A_BYTE[quant]
    gaps = _Gaps(body, num_bytes, num_bytes * per_byte)
    values = _values(gaps.rest, gaps.count, quant)
    differences, done = np.zeros(num_bytes, np.uint8), 0
    for at in gaps.positions():
        first, last = int(at[0]) // per_byte, int(at[-1]) // per_byte
        elements = np.zeros((last + 1 - first) * per_byte, np.uint8)
        elements[at - first * per_byte] = values[done : done + at.size]
        done += at.size
        # One half of the first byte may have come with the positions before these.
        differences[first : last + 1] |= _pack(elements) if quant == "nf4" else elements
    return differences


def _minus(new: Bytes, old: Bytes, quant: Quant) -> Bytes:
    """Differences of codes, packed as they are."""
    if quant == "int8":
        return new - old
    # A borrow goes upward only: the low nibble is right, and the high one once the low ones are gone.
    differences: Bytes = ((new & 0xF0) - (old & 0xF0)) | ((new - old) & 0x0F)
    return differences


def _plus(old: Bytes, differences: Bytes, quant: Quant) -> Bytes:
    if quant == "int8":
        return old + differences
    new: Bytes = ((old & 0xF0) + (differences & 0xF0)) | ((old + differences) & 0x0F)
    return new


def _num_nonzero(differences: Bytes, quant: Quant) -> int:
    if quant == "int8":
        return int(np.count_nonzero(differences != 0))
    return int(np.count_nonzero(differences > 0x0F) + np.count_nonzero(differences & 0x0F != 0))


def _elements(packed: Bytes, quant: Quant) -> Iterator[tuple[int, Bytes]]:
    """Elements, one a byte, a chunk at a time, each with the index of its first."""
    per_byte = _CODES_A_BYTE[quant]
    for start in range(0, packed.size, _CHUNK // per_byte):
        part = packed[start : start + _CHUNK // per_byte]
        yield start * per_byte, _unpack(part) if quant == "nf4" else part


def _zigzag(differences: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """0, -1, 1, -2, ... of an unsigned type as 0, 1, 2, 3, ...: small differences as small numbers."""
    sign_bit = differences.itemsize * 8 - 1
    return differences << 1 ^ -(differences >> sign_bit)


def _unzigzag(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return numbers >> 1 ^ -(numbers & 1)


def _pack(nibbles: Bytes) -> Bytes:
    """Two a byte, as codes are; a zero is added to an odd number."""
    packed: Bytes = pack(np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8)))
    return packed


def _unpack(packed: Bytes) -> Bytes:
    pairs = packed.astype("<u2")
    nibbles: Bytes = (pairs >> 4 | (pairs & 0x0F) << 8).view(np.uint8)
    return nibbles


# Scales


def _encode_scales(old: Bits, new: Bits) -> tuple[Bytes, int]:
    """The blob, and how many scales changed."""
    at = np.flatnonzero(new != old)
    if not at.size:
        return _blob(SAME), 0
    gaps = _gaps_blob(*_gaps(at, -1, _unit(at.size, new.size)))
    sparse = _blob(GAPS, gaps, _squeezed_planes(_zigzag(new[at] - old[at])))
    return min(sparse, _full_scales(new), key=len), at.size


def _full_scales(scales: Bits) -> Bytes:
    return _blob(FULL, _squeezed_planes(scales))


def _changed_scales(scales: Bits, blob: Bytes, *, undo: bool) -> Bits:
    form, body = _form(blob), blob[1:]
    if form == SAME and not body.size:
        return scales.copy()
    if form == FULL:
        return _expanded_planes(body, scales.size)
    if form != GAPS:
        raise WireError(f"a change of scales in form {form}, {body.size} bytes")
    gaps = _Gaps(body, scales.nbytes, scales.size)
    difference = _unzigzag(_expanded_planes(gaps.rest, gaps.count))
    changed, done = scales.copy(), 0
    for at in gaps.positions():
        here, done = difference[done : done + at.size], done + at.size
        changed[at] += -here if undo else here
    return changed


def _squeezed_planes(bits: Bits) -> Bytes:
    planes = bits.astype("<u2").view(np.uint8).reshape(-1, 2)
    return np.concatenate([_sized(_squeezed(planes[:, 0])), _squeezed(planes[:, 1])])


def _expanded_planes(body: Bytes, count: int) -> Bits:
    low, high = _take_sized(body)
    planes = np.stack([_expanded(low, count), _expanded(high, count)], 1)
    return planes.view("<u2")[:, 0].astype(np.uint16)


# Gaps


def _unit(count: int, num_elements: int) -> int:
    """In what unit gaps are told: 256 where they are so long that their low bytes are noise."""
    return 256 if count * 256 < num_elements else 1


def _gaps(at: Positions, last: int, unit: int) -> tuple[Bytes, Bytes]:
    """Gaps before each of these positions, of which the one before them was `last`.

    Returns:
        Whole units, as many bytes of `_MORE` as fit and the rest for each; and the remainders, a byte
        each, unless the unit is 1.
    """
    gaps = np.diff(at, prepend=last) - 1
    units = gaps // unit
    more = units // _MORE
    ends = np.cumsum(more + 1) - 1
    coded = np.full(int(ends[-1]) + 1, _MORE, np.uint8)
    coded[ends] = units - more * _MORE
    return coded, (gaps - units * unit).astype(np.uint8)[: at.size if unit > 1 else 0]


def _gaps_blob(units: Bytes, remainders: Bytes) -> Bytes:
    return np.concatenate([_number(units.size), _sized(_squeezed(units)), remainders])


class _Gaps:
    """The gaps at the beginning of a blob, of at most `max_bytes` bytes, among so many elements.

    Attributes:
        count: how many changed elements they tell of. rest: what follows them in the blob.
    """

    def __init__(self, body: Bytes, max_bytes: int, num_elements: int) -> None:
        num_units, body = _take_number(body)
        if num_units > max_bytes:
            raise WireError(f"{num_units} bytes of gaps, at most {max_bytes}")
        squeezed, body = _take_sized(body)
        self._units = _expanded(squeezed, num_units)
        if num_units and self._units[-1] == _MORE:
            raise WireError("a gap without an end")
        self.count = int(np.count_nonzero(self._units != _MORE))
        self._num_elements = num_elements
        self._unit = _unit(self.count, num_elements)
        self._remainders, self.rest = np.zeros(self.count, np.uint8), body
        if self._unit > 1:
            self._remainders, self.rest = _take(body, self.count)

    def positions(self) -> Iterator[Positions]:
        """Positions of the changed elements, those of about `_CHUNK` elements at a time, never none.

        Raises:
            WireError: one is beyond the elements.
        """
        past = done = 0
        chunk = self._units.size * _CHUNK // self._num_elements + 1
        for start in range(0, self._units.size, chunk):
            units = self._units[start : start + chunk]
            ends = np.flatnonzero(units != _MORE)
            in_units = np.cumsum(units, dtype=np.int64) * self._unit
            beside = np.cumsum(self._remainders[done : done + ends.size] + np.int64(1))
            at = in_units[ends] + beside + (past - 1)
            past += int(in_units[-1]) + int(beside[-1] if ends.size else 0)
            done += ends.size
            if past > self._num_elements:
                raise WireError(f"a change beyond the {self._num_elements} elements that there are")
            if at.size:
                yield at


# Blobs


def _changed(base: Quantized, codes: Tensor, scales: Tensor, *, undo: bool) -> Quantized:
    new_codes = _changed_codes(_bytes(base.codes), _bytes(codes), base.quant, undo=undo)
    new_scales = _changed_scales(_bits(base.scales), _bytes(scales), undo=undo)
    return Quantized(
        base.quant,
        base.shape,
        torch.empty_like(base.codes).copy_(torch.from_numpy(new_codes).view(base.codes.dtype)),
        torch.empty_like(base.scales).copy_(torch.from_numpy(new_scales.view(np.int16)).view(torch.bfloat16)),
    )


def _blob(form: int, *parts: Bytes) -> Bytes:
    return np.concatenate([np.array([form], np.uint8), *parts])


def _form(blob: Bytes) -> int:
    if not blob.size:
        raise WireError("a change without a byte")
    return int(blob[0])


def _number(number: int) -> Bytes:
    return np.array([number], "<u4").view(np.uint8)


def _sized(part: Bytes) -> Bytes:
    """A part with its length before it."""
    return np.concatenate([_number(part.size), part])


def _take(body: Bytes, num_bytes: int) -> tuple[Bytes, Bytes]:
    """So many bytes at the beginning, and the rest."""
    if num_bytes > body.size:
        raise WireError(f"a change that ends {num_bytes - body.size} bytes early")
    return body[:num_bytes], body[num_bytes:]


def _take_number(body: Bytes) -> tuple[int, Bytes]:
    number, rest = _take(body, 4)
    return int.from_bytes(number.tobytes(), "little"), rest


def _take_sized(body: Bytes) -> tuple[Bytes, Bytes]:
    length, rest = _take_number(body)
    return _take(rest, length)


def _squeezed(raw: Bytes) -> Bytes:
    return squeeze(raw).numpy()


def _expanded(blob: Bytes, num_bytes: int) -> Bytes:
    return expand(blob, num_bytes).numpy()


def _bytes(tensor: Tensor) -> Bytes:
    flat: Bytes = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return flat


def _bits(scales: Tensor) -> Bits:
    return scales.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
