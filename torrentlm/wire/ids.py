"""Token ids as tensors of a message, and how many tokens a step brings."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from torrentlm.errors import LocalProtocolError, RemoteProtocolError
from torrentlm.wire.messages import Step
from torrentlm.wire.tensors import Tensor


def ids_tensor(rows: Sequence[Sequence[int]]) -> Tensor:
    """I32 [len(rows), n]; the rows must be equally long. Raises LocalProtocolError."""
    width = len(rows[0]) if rows else 0
    if any(len(row) != width for row in rows):
        raise LocalProtocolError("rows of a batch must be equally long: pad them on the left")
    values = array("i", [token for row in rows for token in row])
    if sys.byteorder == "big":
        values.byteswap()
    return Tensor("I32", (len(rows), width), values.tobytes())


def extent_of(step: Step) -> tuple[int, int]:
    """Rows and tokens per row of a step: the first two dimensions of its first tensor. Raises RemoteProtocolError."""
    if not step.tensors or len(step.tensors[0].shape) < 2:
        raise RemoteProtocolError("a step must bring a tensor with a row and a token dimension")
    rows, tokens = step.tensors[0].shape[:2]
    return rows, tokens
