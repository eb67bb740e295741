"""The protocol between the trusted test and an untrusted program: a closed encoding of plain literals.

Only None, bool, int, float, complex, str, bytes, list, tuple, dict, set and frozenset are sent, by exact
type and with bounds on depth, number and size; a subclass is not a literal. Values are built here from their
tag, never by the sender's code. Both ends run the text of this file, which imports nothing from potstill.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

MAX_BYTES = 4 << 20
MAX_DEPTH = 50
MAX_VALUES = 100_000
LENGTH_BYTES = 4
EXACT_IN_JSON = 2**53


class ProtocolError(Exception):
    """A value that is not a plain literal or is too large, or a malformed frame."""


def pack(value: Any) -> Any:
    """A literal in a form that JSON can hold. Raises ProtocolError."""
    return _pack(value, MAX_DEPTH, [MAX_VALUES])


def _pack(value: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if depth < 0 or left[0] < 0:
        raise ProtocolError("nested too deep" if depth < 0 else "too many values")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if abs(value) < EXACT_IN_JSON else {"int": hex(value)}
    if kind is float:
        return {"float": value.hex()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is list:
        return [_pack(each, depth - 1, left) for each in value]
    if kind is dict:
        items = [[_pack(key, depth - 1, left), _pack(each, depth - 1, left)] for key, each in value.items()]
        return {"dict": items}
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [_pack(each, depth - 1, left) for each in value]}
    raise ProtocolError(f"a {kind.__name__} is not a plain literal")


def unpack(packed: Any) -> Any:
    """The literal again. Raises ProtocolError on anything that `pack` does not write."""
    try:
        return _unpack(packed, MAX_DEPTH, [MAX_VALUES])
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ProtocolError(f"not an encoded literal: {error}") from error


def _unpack(packed: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if depth < 0 or left[0] < 0:
        raise ProtocolError("nested too deep" if depth < 0 else "too many values")
    if packed is None or type(packed) in (bool, str, int):
        return packed
    if type(packed) is list:
        return [_unpack(each, depth - 1, left) for each in packed]
    if type(packed) is not dict or len(packed) != 1:
        raise ProtocolError("not an encoded literal")
    ((tag, inside),) = packed.items()
    if tag == "int":
        return int(inside, 16)
    if tag == "float":
        return float.fromhex(inside)
    if tag == "complex":
        real, imag = inside
        return complex(float.fromhex(real), float.fromhex(imag))
    if tag == "bytes":
        return bytes.fromhex(inside)
    if tag == "dict":
        return {_unpack(key, depth - 1, left): _unpack(each, depth - 1, left) for key, each in inside}
    make: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}
    if type(inside) is not list:
        raise ProtocolError("not an encoded literal")
    return make[tag](_unpack(each, depth - 1, left) for each in inside)


def send(write: Callable[[bytes], int], message: dict[str, Any]) -> None:
    """Write one frame: its length, then JSON. Raises ProtocolError if it is too large."""
    body = json.dumps(message).encode()
    if len(body) > MAX_BYTES:
        raise ProtocolError(f"{len(body)} bytes are too many")
    frame = len(body).to_bytes(LENGTH_BYTES, "big") + body
    while frame:
        frame = frame[write(frame) :]


def receive(read: Callable[[int], bytes]) -> dict[str, Any]:
    """The next frame. Raises EOFError if there is none, ProtocolError if it is malformed."""
    size = int.from_bytes(_exactly(read, LENGTH_BYTES), "big")
    if size > MAX_BYTES:
        raise ProtocolError(f"a frame of {size} bytes")
    try:
        message = json.loads(_exactly(read, size))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a frame that is not JSON") from error
    if type(message) is not dict:
        raise ProtocolError("a frame that is not a message")
    return message


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = read(size - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)
