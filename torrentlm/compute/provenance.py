"""Where values come from: every operation of a forward is watched, and its result remembers what went into it.

A set of sources is an int, a bit each. Weights are sources, token ids, borders, whatever the caller marks. Unlike
autograd's graph this also sees integers, values made without gradients, and what is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_SHAPE_ONLY = frozenset(
    [
        "empty_like",
        "full_like",
        "new_empty",
        "new_empty_strided",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones_like",
        "rand_like",
        "randint_like",
        "randn_like",
        "zeros_like",
    ]
)
"""Operations whose results depend on the shapes of their arguments alone."""
_SHAPE_OF_SECOND = frozenset(["expand_as", "reshape_as", "type_as", "view_as"])


class Sources:
    """Numbers the sources: any hashable value gets a bit of its own when it is first seen."""

    def __init__(self) -> None:
        self._bits: dict[Hashable, int] = {}

    def bit(self, source: Hashable) -> int:
        return 1 << self._bits.setdefault(source, len(self._bits))

    def named(self, sources: int) -> Iterator[Any]:
        """The sources in a set, in the order in which they were first seen."""
        for source, number in self._bits.items():
            if sources >> number & 1:
                yield source


class Provenance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows sources through everything that runs in its ``with``. ``inside`` is added to all that has any source;
    ``compute`` is what runs an operation.
    """

    def __init__(
        self, compute: Callable[[Any, Any, Any], Any] = lambda func, args, kwargs: func(*args, **kwargs)
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._compute = compute
        self.inside = 0
        self.read = 0
        """All sources that any operation has had among its arguments."""
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def mark(self, tensor: torch.Tensor, sources: int) -> None:
        """Say where a tensor's storage comes from."""
        # The reference keeps the address from being used anew.
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._known[reference.cdata] = (reference, sources)

    def of(self, tensor: torch.Tensor) -> int:
        """The sources of a tensor's storage."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return 0 if known is None else known[1]

    def forget(self) -> None:
        """No tensor has any source from here on."""
        self._known.clear()

    @contextmanager
    def within(self, source: int) -> Iterator[None]:
        """Mark with ``source`` whatever is made in here from any source."""
        before, self.inside = self.inside, source
        try:
            yield
        finally:
            self.inside = before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping it off costs more than most operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self._compute(func, args, kwargs)
        counts, written = _habits(func)
        given = list(_tensors((args, kwargs)))
        sources = 0
        for tensor in given[:counts]:
            sources |= self.of(tensor)
        self.read |= sources
        if sources:
            sources |= self.inside
        for position, name in written:
            for tensor in _tensors((args[position] if position < len(args) else kwargs.get(name),)):
                self.mark(tensor, self.of(tensor) | sources)
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in _tensors((result,)):
            if tensor.untyped_storage()._cdata not in storages:  # no view, nothing changed in place
                self.mark(tensor, sources)
        return result


@cache
def _habits(func: Any) -> tuple[int | None, tuple[tuple[int, str], ...]]:
    """How many of its tensors an operation reads (None: all), and the arguments that it changes in place."""
    name = func._schema.name.partition("::")[2]
    counts = 0 if name in _SHAPE_ONLY else 1 if name in _SHAPE_OF_SECOND else None
    arguments = enumerate(func._schema.arguments)
    return counts, tuple((at, each.name) for at, each in arguments if each.alias_info and each.alias_info.is_write)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
