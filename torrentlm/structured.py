"""Small helpers for structured concurrency."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torrentlm.errors import TorrentLMError


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


@contextmanager
def single_error() -> Iterator[None]:
    """Let one error out of a nursery as itself instead of in a group.

    For a nursery whose tasks fail for one reason at a time. If several failed at once, the first of our own errors
    stands for all; groups without one of ours, and several foreign errors at once, stay groups: they are bugs, and
    nothing of them may be lost.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        leaves = list(_leaves(group))
        ours = [error for error in leaves if isinstance(error, TorrentLMError)]
        if len(leaves) == 1:
            raise leaves[0] from leaves[0].__cause__
        if ours and all(isinstance(error, Exception) for error in leaves):
            raise ours[0] from ours[0].__cause__
        raise
