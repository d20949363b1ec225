"""Encoders in the swarm: texts in, hidden states out, in one step each; and embeddings of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torrentlm.client.generation import RouteHop, route_of
from torrentlm.client.pooling import Array, as_float32, pool, read_pooling
from torrentlm.errors import RefusedError
from torrentlm.wire.messages import Want
from torrentlm.wire.tensors import Tensor

if TYPE_CHECKING:
    from torrentlm.client.model import ModelClient

BATCH = 32
"""Texts that travel together."""


async def encode(
    client: ModelClient, rows: Sequence[Sequence[int]], filler: int, adapter: str | None = None
) -> tuple[Tensor, tuple[RouteHop, ...]]:
    """The encoder's hidden states, [rows, tokens of the longest, width], and who made them; shorter rows are padded
    behind their end.

    Raises as ModelClient.open.
    """
    width = max(map(len, rows))
    pads = tuple(len(row) - width for row in rows)
    padded = [[*row, *[filler] * (width - len(row))] for row in rows]
    async with client.session(batch=len(rows), max_length=width, pads=pads, side=0, adapter=adapter) as session:
        return await session.step(padded, want=Want.LOGITS_ALL), route_of(session)


async def embed(client: ModelClient, texts: Sequence[str], folder: Path, adapter: str | None = None) -> Array:
    """One vector a text, float32 [texts, width], pooled as the files in ``folder`` say.

    Raises RefusedError for a model that gives no hidden states or an empty text, ArtifactError, and as
    ModelClient.open.
    """
    if client.manifest.task != "encoder":
        raise RefusedError("this model writes text: embeddings come from an encoder", "bad_request")
    pooling = read_pooling(folder)
    limits = [limit for limit in (pooling.limit, client.max_length) if limit is not None]
    how = {"truncation": True, "max_length": min(limits)} if limits else {}
    rows = [[int(token) for token in client.tokenizer(text, **how)["input_ids"]] for text in texts]
    if not all(rows):
        raise RefusedError("a text is empty: there is nothing to embed", "bad_request")
    filler = client.tokenizer.pad_token_id or 0
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    vectors: dict[int, Array] = {}
    for start in range(0, len(rows), BATCH):
        picked = by_length[start : start + BATCH]
        batch = [rows[row] for row in picked]
        states = as_float32((await encode(client, batch, filler, adapter))[0])
        if states.shape[-1] == client.vocabulary:
            raise RefusedError(
                "this model ends in logits, not in hidden states: publish it with its base class in architectures",
                "bad_request",
            )
        vectors.update(zip(picked, pool(states, [len(row) for row in batch], pooling), strict=True))
    return np.stack([vectors[row] for row in range(len(rows))])
