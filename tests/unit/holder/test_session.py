"""What a holder lets its neighbours do to a session."""

from __future__ import annotations

import pytest

from torrentlm.errors import RefusedError
from torrentlm.holder.session import Session
from torrentlm.records import NodeKey, SessionId, Span

CLIENT, BEFORE, STRANGER = (NodeKey(letter * 32) for letter in (b"c", b"b", b"s"))


def session(first: int, *, has_stem: bool) -> Session:
    return Session(
        SessionId(b"s" * 16),
        CLIENT,
        Span(first, first + 1),
        has_stem,
        prev=frozenset([BEFORE]),
        next=None,
        batch=1,
        max_length=64,
        pads=(),
        lease_s=30,
        expires=100,
        epoch=1,
        position=20,
    )


@pytest.mark.parametrize("first", [0, 6], ids=["the model's", "a decoder's behind an encoder"])
def test_only_the_client_begins_an_epoch_at_the_stem(first: int) -> None:
    stem = session(first, has_stem=True)
    with pytest.raises(RefusedError, match="only the client"):
        stem.admit(BEFORE, 2, 0, 1)
    assert (stem.epoch, stem.position) == (1, 20)
    assert stem.admit(BEFORE, 1, 20, 1)
    assert stem.admit(CLIENT, 2, 5, 3)
    assert stem.admit(BEFORE, 2, 8, 1)


def test_behind_the_stem_the_predecessor_passes_epochs_on() -> None:
    middle = session(4, has_stem=False)
    assert middle.admit(BEFORE, 2, 0, 7)
    assert (middle.epoch, middle.position) == (2, 7)
    assert not middle.admit(BEFORE, 1, 7, 1)
    with pytest.raises(RefusedError, match="may not send"):
        middle.admit(STRANGER, 3, 0, 1)
