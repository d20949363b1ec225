"""One row: a family's tiny model, whole and in three parts, and what was found when the two were compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from parts import thirds
from transformers import PretrainedConfig, PreTrainedModel
from whole import (
    CHUNKS,
    IDS,
    LONG,
    MASK,
    PADS,
    PAIR,
    TOKENS,
    Decoded,
    Unbuildable,
    build,
    close,
    decode,
    in_chunks,
    reloaded,
    said,
    whole_logits,
)

from torrentlm.compute.chain import Chain
from torrentlm.compute.inputs import Encoded
from torrentlm.compute.span import SpanRunner
from torrentlm.errors import TorrentLMError, UnsupportedModelError
from torrentlm.wire.messages import Want

HINTS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("hints.json").read_text(encoding="utf-8"))
"""For models that do not agree with themselves: what they decode step by step, or for a prompt in parts, is not what
their forward gives for the whole text. Without its hint each must be refused."""
Outcome = Literal["exact", "refused", "wrong", "unbuildable"]
OUTCOMES: tuple[Outcome, ...] = ("exact", "refused", "wrong", "unbuildable")


@dataclass
class Row:
    """``checks``: what was compared, each with "exact" or what differed. ``hints``: what the recipe says under
    [model.split]; with ``replay`` the reference is ``generate(use_cache=False)``.
    """

    kind: str
    name: str
    model: str
    outcome: Outcome
    reason: str = ""
    checks: dict[str, str] = field(default_factory=dict)
    hints: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def check(kind: str, name: str, model_class: str, folder: Path, whole_runs: Callable[[], None]) -> Row:
    """Build, cut, run and compare one family; ``whole_runs`` is called when what follows is the splitter's doing."""
    hints = HINTS.get(f"{kind}:{name}", {})
    row = Row(kind, name, model_class, "exact", hints=hints)
    try:
        model = reloaded(build(kind, name, folder), folder)
        if kind != "masked":
            decode(model, IDS)
    except Unbuildable as error:
        row.outcome, row.reason = "unbuildable", str(error)
        return row
    except Exception as error:  # any model's own code runs here
        row.outcome, row.reason = "unbuildable", f"generate: {said(error)}"
        return row
    whole_runs()
    if hints and not _is_refused(kind, folder):
        row.outcome, row.reason = "wrong", "published without the hint that it needs"
        return row
    try:
        sides = thirds(kind, folder, hints)
    except UnsupportedModelError as error:
        row.outcome, row.reason = "refused", str(error)
        return row
    except Exception as error:
        row.outcome, row.reason = "wrong", f"cutting: {said(error)}"
        return row
    for what, difference in _differences(kind, model, sides, bool(hints.get("replay"))):
        row.checks[what] = difference or "exact"
        if difference:
            row.outcome = "wrong"
    row.reason = "; ".join(f"{what}: {found}" for what, found in row.checks.items() if found != "exact")
    return row


def _is_refused(kind: str, folder: Path) -> bool:
    """Whether publishing without any hint is."""
    try:
        thirds(kind, folder, {})
    except UnsupportedModelError:
        return True
    return False


def _differences(
    kind: str, model: PreTrainedModel, sides: list[list[SpanRunner]], replay: bool
) -> Iterator[tuple[str, str]]:
    """(what was compared, what differed or "")."""
    if len(sides) > 1:
        checks = _seq2seq_checks(model, *sides, partial(decode, model, replay=replay))
    elif kind == "masked":
        checks = _masked_checks(kind, model, sides[0])
    else:
        checks = _causal_checks(model, sides[0], partial(decode, model, replay=replay))
    for what, compare in checks:
        try:
            yield what, compare()
        except TorrentLMError as error:
            yield what, f"failed: {error}"
        except Exception as error:  # any model's own code runs here
            yield what, f"failed: {said(error)}"


Check = tuple[str, Callable[[], str]]


MAX_LENGTH = 64


def _session(
    runners: list[SpanRunner], batch: int = 1, pads: tuple[int, ...] = (), encoded: Encoded | None = None
) -> Chain:
    return Chain(runners, batch, MAX_LENGTH, pads, encoded)


def _decoded(session: Chain, ids: torch.Tensor) -> Decoded:
    return Decoded(*session.decode(ids, TOKENS))


def _masked_checks(kind: str, model: PreTrainedModel, runners: list[SpanRunner]) -> Iterator[Check]:
    def prefill() -> str:
        return _bits(_session(runners).step(IDS, Want.LOGITS_ALL), whole_logits(kind, model, IDS))

    def padded() -> str:
        ours = _session(runners, 2, PADS).step(PAIR, Want.LOGITS_ALL)
        theirs = whole_logits(kind, model, PAIR, MASK)
        real = MASK.bool() if ours.shape[1] == MASK.shape[1] else torch.ones(ours.shape[:2], dtype=torch.bool)
        return _bits(ours[real], theirs[real])

    def window() -> str:
        return _bits(_session(runners).step(LONG, Want.LOGITS_ALL), whole_logits(kind, model, LONG))

    yield "prefill", prefill
    yield "padded", padded
    if has_window(model.config):
        yield "window", window


def _seq2seq_checks(
    model: PreTrainedModel, encoder: list[SpanRunner], decoder: list[SpanRunner], whole: Callable[..., Decoded]
) -> Iterator[Check]:
    start = model.generation_config.decoder_start_token_id

    def decoding(ids: torch.Tensor, pads: tuple[int, ...] = ()) -> Chain:
        states = _session(encoder, len(ids), pads).step(ids, Want.LOGITS_ALL)
        steps = torch.arange(ids.shape[1])[None]
        mask = (steps >= torch.tensor(pads or (0,) * len(ids))[:, None]).long()
        return _session(decoder, len(ids), (), Encoded(states, mask))

    def begin(rows: int) -> torch.Tensor:
        return torch.full((rows, 1), start)

    def prefill() -> str:
        return _bits(decoding(IDS).step(begin(1)), whole(IDS, 1).logits)

    def greedy() -> str:
        return _same(_decoded(decoding(IDS), begin(1)), whole(IDS))

    def padded() -> str:
        return _same(_decoded(decoding(PAIR, PADS), begin(2)), whole(PAIR, mask=MASK))

    def window() -> str:
        return _same(_decoded(decoding(LONG), begin(1)), whole(LONG))

    yield "prefill", prefill
    yield "greedy", greedy
    yield "padded", padded
    if has_window(model.config):
        yield "window", window


def _causal_checks(model: PreTrainedModel, runners: list[SpanRunner], whole: Callable[..., Decoded]) -> Iterator[Check]:
    def prefill() -> str:
        return _bits(_session(runners).step(IDS), whole(IDS, 1).logits)

    def greedy() -> str:
        return _same(_decoded(_session(runners), IDS), whole(IDS))

    def padded() -> str:
        return _same(_decoded(_session(runners, 2, PADS), PAIR), whole(PAIR, mask=MASK))

    def window() -> str:
        ours = _decoded(_session(runners), LONG)
        theirs = whole(LONG)
        return _bits(ours.logits[:, :1], theirs.logits[:, :1]) or _same(ours, theirs)

    yield "prefill", prefill
    yield "greedy", greedy
    yield "padded", padded
    if has_window(model.config):
        yield "window", window
    if runners[0].split.chunks:  # then a long prompt comes in parts, whether or not the model agrees with itself there
        expected = whole(LONG, 1).logits
        in_parts = in_chunks(model, LONG)
        alone = in_parts is not None and close(in_parts, expected)
        yield "chunked", partial(_chunked, runners, in_parts if alone else expected)


def _chunked(runners: list[SpanRunner], theirs: torch.Tensor) -> str:
    chain = _session(runners)
    ours = [chain.step(LONG[:, start:stop]) for start, stop in pairwise((0, *CHUNKS))][-1]
    return "" if close(ours, theirs) else _distance(ours, theirs)


def has_window(config: PretrainedConfig) -> bool:
    """Whether some attention of this config sees only the latest tokens."""
    text = config.get_text_config()
    return any("window" in name and isinstance(value, int) and value > 1 for name, value in text.to_dict().items())


def _bits(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    return "" if torch.equal(ours, theirs) else _distance(ours, theirs)


def _same(ours: Decoded, theirs: Decoded) -> str:
    """Equal tokens, picked from logits that differ in no more than rounding."""
    if not torch.equal(ours.tokens, theirs.tokens):
        first = int((ours.tokens != theirs.tokens).any(dim=0).nonzero()[0])
        return (
            f"another token at step {first}; logits there {_distance(ours.logits[:, first], theirs.logits[:, first])}"
        )
    return "" if close(ours.logits, theirs.logits) else f"same tokens, logits {_distance(ours.logits, theirs.logits)}"


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    if ours.shape != theirs.shape:
        return f"have shape {list(ours.shape)} instead of {list(theirs.shape)}"
    return f"differ by {float((ours - theirs).abs().max()):.2g} of {float(theirs.abs().max()):.2g}"
