"""Picking tokens: transformers' own warpers for the probabilities, our own noise for the draw.

The draw is the Gumbel-max trick: add noise -log(-log(u)) to every log-probability and take the largest. The u of a
token is a hash of (seed, position, row, token id) and of nothing else, so it does not depend on the route, on the rest
of the batch, on earlier draws or on a generator's state. And a small error in one probability seldom changes the pick,
unlike with a draw from cumulated probabilities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from torrentlm.compute.border import unpack
from torrentlm.errors import RefusedError
from torrentlm.records import Sampling
from torrentlm.wire.tensors import Tensor

MASK = 0xFFFF_FFFF


class Sampler:
    """Picks one token per row and step. Raises RefusedError for settings that no warper takes.

    ``pads[row]`` tokens at the start of a row's history are padding, which the repetition penalty passes over.
    """

    def __init__(self, sampling: Sampling, batch: int = 1, pads: Sequence[int] = ()) -> None:
        self._sampling = sampling
        self._history = torch.zeros((batch, 0), dtype=torch.long)
        try:
            self._warpers = _warpers(sampling, torch.tensor(pads) if any(pads) else None)
        except ValueError as error:
            raise RefusedError(f"The sampling settings cannot be used: {error}", "bad_request") from error

    def seen(self, ids: torch.Tensor | Tensor | Sequence[Sequence[int]]) -> None:
        """Tokens [batch, n] that came before, for the repetition penalty; picked ones are added without this."""
        if isinstance(ids, Tensor):
            ids = unpack(ids)
        more = torch.as_tensor(ids, dtype=torch.long)
        if more.dim() != 2 or more.shape[0] != self._history.shape[0] or (more < 0).any():
            raise RefusedError("The history for the repetition penalty does not fit the batch.", "bad_request")
        self._history = torch.cat([self._history, more], dim=1)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 [batch, vocabulary] on the CPU: what transformers' ``generate`` samples from, before the softmax."""
        if logits.dim() == 3:
            logits = logits[:, -1]
        scores = logits.to(device="cpu", dtype=torch.float32, copy=True)
        if scores.shape[0] != self._history.shape[0]:
            raise RefusedError("The batch has another number of rows than the sampler.", "bad_request")
        warped: torch.Tensor = self._warpers(self._history, scores)
        return warped

    def pick(self, logits: torch.Tensor, position: int) -> list[int]:
        """The next token of every row, from the last position's logits: [batch, vocabulary] or [batch, n, vocabulary].

        ``position`` is the new token's own place in its row; with the seed and the row it decides the draw.
        """
        with torch.inference_mode():
            scores = self.scores(logits)
            if not self._sampling.greedy:
                scores = torch.stack([self._with_noise(row, position, i) for i, row in enumerate(scores)])
            picked = scores.argmax(dim=-1)
            if self._sampling.repetition_penalty != 1.0:
                self._history = torch.cat([self._history, picked[:, None]], dim=1)
            return [int(token) for token in picked]

    def _with_noise(self, scores: torch.Tensor, position: int, row: int) -> torch.Tensor:
        candidates = scores.isfinite().nonzero().squeeze(1)
        noisy = torch.full(scores.shape, -torch.inf, dtype=torch.float64)
        noisy[candidates] = scores[candidates].double() + gumbel(self._sampling.seed, position, row, candidates)
        return noisy


def gumbel(seed: int, position: int, row: int, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64, for these token ids; the same wherever and whenever it is computed.

    u is the 32-bit hash of the token id under a 64-bit key, BLAKE2b of (seed, position, row).
    """
    text = f"torrentlm noise {seed} {position} {row}".encode()
    key = hashlib.blake2b(text, digest_size=8).digest()
    first, second = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")
    hashed = _mix(_mix(tokens.long() ^ first) + second & MASK)
    uniform = (hashed.double() + 0.5) / 2.0**32
    return -(-uniform.log()).log()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers; each input bit flips about half of the output's ("lowbias32" of C. Wellons)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB_352D & MASK
    x = x ^ (x >> 15)
    x = x * 0x846C_A68B & MASK
    return x ^ (x >> 16)


def _warpers(sampling: Sampling, pads: torch.Tensor | None) -> LogitsProcessorList:
    """Those of transformers' ``generate``, in its order."""
    warpers = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty, pads))
    if sampling.greedy:
        return warpers
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k != 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
