"""How a holder tells a client that something went wrong: a code, one sentence, within the wire's bounds."""

from __future__ import annotations

import logging

from torrentlm.errors import NetworkError, RefusedError, TorrentLMError
from torrentlm.records import SessionId
from torrentlm.wire.messages import FAIL_CODES, Fail

log = logging.getLogger(__name__)

MAX_SENTENCE = 512
"""Bytes; the bound of Fail's message."""


def explain(error: Exception) -> tuple[str, str]:
    """Code and sentence for what a step or an Open raised. Bugs are logged here and told as "internal"."""
    match error:
        case RefusedError():
            return error.code, str(error)
        case NetworkError():
            return "lost_next", str(error)
        case TorrentLMError():
            return "bad_request", str(error)
        case MemoryError():
            return "memory", "this holder ran out of memory: close a session or choose another holder"
        case _:
            log.error("a bug, or a model that this holder cannot run", exc_info=error)
            return "internal", "this holder failed while it ran the step: its log says why"


def failure(session: SessionId, epoch: int, code: str, sentence: str, block: int | None) -> Fail:
    """A Fail that can be sent whatever ``code`` and ``sentence`` are."""
    short = sentence.encode("utf-8", "replace")[:MAX_SENTENCE].decode("utf-8", "ignore")
    return Fail(session, epoch, code if code in FAIL_CODES else "internal", short, block)
