"""What a model says in one precision, compared with what it says in F32."""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from model import Model, weights_in_memory

from torrentlm.compute.chain import Chain
from torrentlm.compute.quantization import packed
from torrentlm.compute.quantization.rounding import nearest
from torrentlm.compute.span import SpanRunner
from torrentlm.wire.messages import Want

WINDOW = 512
"""Tokens of text at a time."""
DECODED = 512
TIMED = 32
"""Single steps whose fastest is the speed."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a model is run: the dtype computed in, what blocks are stored in, and whether INT4 is rounded to nearest."""

    name: str
    compute: str
    stored: Mapping[int, str]
    rounded: bool = False


@dataclass(frozen=True, slots=True)
class Said:
    """``logits`` F32 [tokens, vocabulary] behind each token of the text, ``next``: what it picks behind each token of
    the decoded text.
    """

    logits: torch.Tensor
    next: list[int]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``kl`` in nats per token; ``agreement``: the share of the tokens that F32 decodes which
    this one picks, too, behind the same text; ``bytes`` of weights in memory.
    """

    name: str
    perplexity: float
    kl: float
    agreement: float
    bytes: int
    tokens_per_second: float

    def described(self) -> dict[str, Any]:
        return asdict(self)


def settings(blocks: int) -> list[Setting]:
    """The table's lines, for a model of so many blocks with the stem and the head."""
    layers = range(1, blocks - 1)
    outer = {block for block in layers if block <= 4 or block > blocks - 6}
    every = {kind: dict.fromkeys(layers, kind) for kind in ("INT8", "INT4")}
    return [
        Setting("F32", "F32", {}),
        Setting("BF16", "BF16", {}),
        Setting("F16", "F16", {}),
        Setting("INT8", "BF16", every["INT8"]),
        Setting("INT4", "BF16", every["INT4"]),
        Setting("INT4, rounded to nearest", "BF16", every["INT4"], rounded=True),
        Setting("INT4, 4 layers at each end INT8", "BF16", every["INT4"] | dict.fromkeys(outer, "INT8")),
        Setting(
            "INT4, 4 layers at each end BF16",
            "BF16",
            {block: "INT4" for block in layers if block not in outer},
        ),
    ]


def rows(model: Model, text: torch.Tensor, prompt: torch.Tensor, cache: Path) -> list[Row]:
    """Measure every setting on ``text``, int [tokens], and on what F32 adds to ``prompt``, int [tokens].

    ``cache``: a folder for quantized blocks, which settings share.
    """
    made = []
    reference: Said | None = None
    for setting in settings(len(model.published.manifest.blocks)):
        patched = mock.patch.object(packed, "by_groups", nearest) if setting.rounded else nullcontext()
        with patched:
            held = model.held(setting.compute, dict(setting.stored), None if setting.rounded else cache)
            runner = held.runner(model.span)  # here the weights are loaded
        picked = _decode(runner, prompt) if reference is None else _picked(runner, prompt, reference.next)
        said = Said(_logits(runner, text), picked)
        speed = _speed(runner, prompt)
        reference = reference or said
        size = weights_in_memory(runner)
        del held, runner  # the next one may share its files' names, and must not share its weights
        gc.collect()
        made.append(_row(setting.name, said, reference, text, size, speed))
        print(json.dumps(made[-1].described()), file=sys.stderr)
    return made


def _row(name: str, said: Said, reference: Said, text: torch.Tensor, size: int, speed: float) -> Row:
    losses, divergences = [], []
    for ours, theirs, due in zip(
        said.logits.split(WINDOW), reference.logits.split(WINDOW), text.split(WINDOW), strict=True
    ):
        found, wanted = ours[:-1].log_softmax(-1), theirs[:-1].log_softmax(-1)
        losses.append(-found.gather(-1, due[1:, None]).squeeze(-1))
        divergences.append((wanted.exp() * (wanted - found)).sum(-1))
    same = sum(one == other for one, other in zip(said.next, reference.next, strict=True))
    return Row(
        name,
        math.exp(torch.cat(losses).double().mean().item()),
        torch.cat(divergences).double().mean().item(),
        same / len(said.next),
        size,
        speed,
    )


def _logits(runner: SpanRunner, text: torch.Tensor) -> torch.Tensor:
    windows = [
        Chain([runner], 1, WINDOW).step(window[None], Want.LOGITS_ALL)[0].float() for window in text.split(WINDOW)
    ]
    return torch.cat(windows)


def _decode(runner: SpanRunner, prompt: torch.Tensor) -> list[int]:
    """What greedy decoding adds to the prompt, token by token."""
    ids, _ = Chain([runner], 1, len(prompt) + DECODED).decode(prompt[None], DECODED)
    return ids[0].tolist()


def _picked(runner: SpanRunner, prompt: torch.Tensor, decoded: list[int]) -> list[int]:
    """What is picked behind the prompt and each token that F32 decoded, a few at a time, as kernels take them."""
    chain = Chain([runner], 1, len(prompt) + DECODED)
    picked = [int(chain.step(prompt[None])[0, -1].argmax())]
    for few in torch.tensor(decoded[:-1]).split(packed.FEW):
        picked += chain.step(few[None], Want.LOGITS_ALL)[0].argmax(-1).tolist()
    return picked


def _speed(runner: SpanRunner, prompt: torch.Tensor) -> float:
    """Tokens per second, decoded one by one: the fastest of the few, since other programs only ever slow it down."""
    chain = Chain([runner], 1, len(prompt) + TIMED + 1)
    chain.step(prompt[None])
    seconds = []
    for _ in range(TIMED):
        began = time.perf_counter()
        chain.step(prompt[None, -1:])
        seconds.append(time.perf_counter() - began)
    return 1 / min(seconds)
