"""Token ids as tensors of a message."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from torrentlm.errors import LocalProtocolError
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
