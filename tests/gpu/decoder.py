"""A small random decoder, published as a real one is, and its parts on any device."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from torrentlm.compute.border import Border, Logits
from torrentlm.compute.measure import PRECISIONS
from torrentlm.compute.precision import STORED
from torrentlm.compute.sizes import Point
from torrentlm.compute.span import SpanRunner
from torrentlm.config import Recipe
from torrentlm.errors import ConfigError
from torrentlm.holder.model import HeldModel
from torrentlm.node.memory import offloadable, weights_bytes
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.records import Span
from torrentlm.swarm.store import Store
from torrentlm.wire.messages import Want

LAYERS, WIDTH, VOCABULARY = 4, 512, 1000
PROMPT, STEPS = 33, 16
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 1408,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
IDS = torch.randint(3, VOCABULARY, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
WHOLE = Span(0, LAYERS + 1)
MIDDLE = Span(1, LAYERS)


@dataclass(frozen=True)
class Decoder:
    """``reference`` are the logits of F32 on the processor at the prompt's end and behind every further token."""

    published: Published
    paths: dict[str, Path]
    reference: torch.Tensor

    def held(
        self, precision: str, device: torch.device, span: Span = WHOLE, offloaded: Collection[int] = ()
    ) -> HeldModel:
        """``INT8`` and ``INT4``: what blocks of layers are kept in, computed in BF16."""
        made, compute, stored = self.published, precision, {}
        if precision in STORED:
            compute, stored = "BF16", dict.fromkeys(MIDDLE, precision)
        id, sizes = made.magnet.v2 or b"", weights_bytes(made.manifest, compute, stored)
        may = offloadable(made.manifest, sizes, span)
        aside = {block: may[block] for block in offloaded}
        return HeldModel(
            id, made.manifest, made.folder, self.paths, span, compute, device,
            sizes=sizes, stored=stored, offloaded=aside,
        )  # fmt: skip


def require_precision(name: str, device: torch.device) -> str:
    """``name``; skips the test where the device or torch lacks it, as some cards lack BF16."""
    try:
        PRECISIONS[name](torch.eye(64), device)
    except ConfigError as lacking:
        pytest.skip(str(lacking))
    return name


def make_decoder(folder: Path) -> Decoder:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with Store(folder / "data") as store:
        published = publish(Recipe("random", config=folder / "config.json", tokenizer=False), store)
        paths = {file.name: store.path(file.name) for file in published.manifest.files}
    unfinished = Decoder(published, paths, torch.empty(0))
    runner = unfinished.held("F32", torch.device("cpu")).runner(WHOLE)
    return Decoder(published, paths, logits([runner]))


def logits(runners: list[SpanRunner]) -> torch.Tensor:
    """F32 [1 + STEPS, vocabulary] on the processor: behind the prompt, and behind each of the tokens after it."""
    caches = [runner.open(1, 64) for runner in runners]
    rows = []
    for start, stop in ((0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))):
        given: torch.Tensor | Border | Logits = IDS[:, start:stop]
        for runner, cache in zip(runners, caches, strict=True):
            assert not isinstance(given, Logits)
            given = runner.forward(cache, given, stop - start, want=Want.LOGITS_LAST)
        assert isinstance(given, Logits)
        rows.append(given.logits[0, -1].float().cpu())
    return torch.stack(rows)


def error(found: torch.Tensor, due: torch.Tensor) -> float:
    """Root mean square of the difference, relative to what is due; NaN if there is one."""
    return float((found - due).norm() / due.norm())


def hidden(runner: SpanRunner, tokens: int) -> Border:
    """A random border before the middle layers, on the runner's device."""
    zeros = runner.split.borders[runner.layers.start].zeros(Point(1, tokens), runner.dtype, runner.device)
    return Border(tuple(torch.randn_like(each) if each.is_floating_point() else each for each in zeros.tensors))


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_per_block(runner: SpanRunner) -> float:
    """What one layer takes for one token behind the prompt, the best of several rounds."""
    cache, given, best = runner.open(1, 64), hidden(runner, 1), float("inf")
    runner.forward(cache, hidden(runner, PROMPT), PROMPT)
    for _ in range(4):
        finish(runner.device)
        begun = time.perf_counter()
        for _ in range(8):
            runner.forward(cache, given, 1)
        finish(runner.device)
        best = min(best, (time.perf_counter() - begun) / 8 / len(runner.layers))
        runner.trim(cache, PROMPT)
    return best
