"""What an operation on fake tensors returned for arguments that looked alike.

PyTorch remembers that, too, under a key that takes most of a trace's time: it is made for symbolic shapes, of which a
trace has none. Here an argument is known by what its output can depend on, and everything unusual is left to
PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
UNUSUAL = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
Make = Callable[[list[FakeTensor]], Any]
"""From the tensors among the arguments to the output."""


class _Unusual(Exception):
    """Arguments or an output that are not remembered."""


MOST_KNOWN = 2**15
"""Operations that are remembered: a trace has some hundreds."""


class KnownOutputs:
    """Of all traces of this process."""

    _made: ClassVar[dict[Any, Make | None]] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`func(*args, **kwargs)`."""
        tensors: list[FakeTensor] = []
        key: list[Any] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        try:
            _describe(args, key, tensors)
            _describe(kwargs, key, tensors)
        except _Unusual:
            return func(*args, **kwargs)
        known = tuple(key)
        make = self._made.get(known)
        if make is not None and tensors:
            return make(tensors)
        out = func(*args, **kwargs)
        if known not in self._made:
            if len(self._made) >= MOST_KNOWN:
                self._made.clear()
            self._made[known] = None if UNUSUAL.intersection(func.tags) else _maker(out, tensors)
        return out


def _describe(values: Iterable[Any], key: list[Any], tensors: list[FakeTensor]) -> None:
    """Append to `key` everything that an output may depend on, and the tensors to `tensors`."""
    key.append(len(values))  # type: ignore[arg-type]
    each: Iterable[Any] = values.items() if isinstance(values, dict) else values
    for value in each:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.layout is not torch.strided:
                raise _Unusual
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
            key.append(value.is_inference())
            tensors.append(value)
        elif kind in PLAIN:
            key += (kind, value)
        elif kind is tuple or kind is list:
            _describe(value, key, tensors)
        else:
            raise _Unusual


def _maker(out: Any, tensors: list[FakeTensor]) -> Make | None:
    """What makes the like of `out`; None for one that is left to PyTorch."""
    if type(out) is tuple:
        makers = [_maker(each, tensors) for each in out]
        fresh = [each.untyped_storage()._cdata for each in out if isinstance(each, Tensor)]
        if len(set(fresh)) < len(fresh):  # they share one
            return None
        known = [make for make in makers if make is not None]
        return (lambda given: tuple(make(given) for make in known)) if len(known) == len(makers) else None
    if out is None or type(out) is int:
        return lambda given: out
    if type(out) is not FakeTensor or out.constant is not None or out.layout is not torch.strided:
        return None
    if same := [number for number, tensor in enumerate(tensors) if out is tensor]:
        # Given twice, it might be the other one where the two differ.
        return (lambda given: given[same[0]]) if len(same) == 1 else None
    shape, stride, offset = out.shape, out.stride(), out.storage_offset()
    dtype, device, size = out.dtype, out.fake_device, out.untyped_storage().nbytes()
    storage = out.untyped_storage()._cdata
    shared = [n for n, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == storage]

    def like(given: list[FakeTensor]) -> FakeTensor:
        mode: FakeTensorMode = given[0].fake_mode
        with in_kernel_invocation_manager(mode):
            if not shared:
                made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:  # in inference mode, too, a view of another tensor is an ordinary one
                base = given[shared[0]]
                with torch.inference_mode(base.is_inference()):
                    made = torch.empty(0, dtype=dtype, device="meta")
                    made.set_(base.untyped_storage(), offset, shape, stride)
        return FakeTensor(mode, made, device)

    if (
        not tensors
        or len(shared) > 1
        or (not shared and (offset or like(tensors).untyped_storage().nbytes() != size))
    ):
        return None
    return like
