"""The proof that a model's parts compute what the model computes, before anybody is told that it can be split.

The whole model (transformers' own class) and the parts (spans, every border through its wire form) run the same steps:
a prompt of random token ids and, where there is a tokenizer, real text; then single tokens behind it. In F32 they must
agree, or the model is refused; in the published precision the difference is recorded. Both are attached to the block
files that are about to be published, so nothing is loaded twice.

A large model is compared in its published precision first, in which its files are mapped as they are. The same
operations on the same numbers give the same bits in any precision, so parts that are equal to the bit there need no
F32; whatever is not is settled in F32.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PretrainedConfig

from torrentlm.compute.border import DTYPES, pack, unpack
from torrentlm.compute.chain import Part, hints_of, part_of, step
from torrentlm.compute.inputs import Encoded
from torrentlm.compute.machine import available_memory, libraries
from torrentlm.compute.samples import ROOM, choose, record
from torrentlm.compute.split import Split
from torrentlm.compute.splitter import analyse_sides
from torrentlm.compute.tokenizer import has_tokenizer, load_tokenizer
from torrentlm.compute.whole import Whole
from torrentlm.errors import ArtifactError, RefusedError, RemoteProtocolError, UnsupportedModelError
from torrentlm.manifest.manifest import Manifest
from torrentlm.manifest.sidecar import Outcome, Samples, Sidecar
from torrentlm.publish.in_parts import require_same_in_parts
from torrentlm.records import Span
from torrentlm.wire.messages import Want
from torrentlm.wire.tensors import Tensor

TOLERANCE = {"F64": 1e-5, "F32": 1e-5, "F16": 1e-2, "BF16": 5e-2}
"""What the largest difference may be, as a share of the largest value. F32 is seldom anything but equal to the bit."""
PARTS = 3
SINGLE = 2
"""Steps of one token behind the prompt; one where the weights are streamed: each costs a pass over all of them."""
SAMPLED = 3
"""Blocks behind the stem in which a large model's prompt in parts is looked at; layers of one kind do alike."""
SAMPLED_BYTES = 256 << 20
"""Such a block with its largest matrix in F32 takes at most so many bytes, or twice those of the model's largest block:
more would be more memory than publishing has.
"""
DECODED = 3
"""Tokens that a model without a known state decodes by itself."""
ALIKE = 1e-3
"""How far apart its logits may then be, as a share of the largest."""
MEMORY = 128 << 20
"""Bytes of weights that are there at once, if they are at most half of what the machine has to give."""
LARGE = 1 << 30
"""Bytes of all weights in F32 from which on converting them to F32 takes longer than publishing."""
TEXT = 'In 1969, "two people" walked on the Moon: déjà vu? print(6 * 7)  # 42'


Report = Callable[[int, int], None]
"""Called with parts done and parts in all, for each precision; what it raises ends the proof."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What is known of a model's split, but not yet for which magnet."""

    parts: int
    text: bool
    streamed: bool
    outcomes: tuple[Outcome, ...]
    samples: tuple[Samples, ...]

    def sidecar(self, model: bytes) -> Sidecar:
        """``model`` is the model torrent's v2 info-hash."""
        return Sidecar(model, libraries(), self.parts, self.text, self.streamed, self.outcomes, self.samples)


def prove(
    manifest: Manifest,
    config: PretrainedConfig,
    folder: Path,
    paths: Mapping[str, Path],
    *,
    sides: Sequence[Split] | None = None,
    memory: int | None = None,
    large: int = LARGE,
    replay: bool = False,
    report: Report = lambda done, total: None,
) -> Proof:
    """Compare the parts of a model with the whole.

    ``folder`` has the tokenizer's files, ``paths`` says where the block files lie, by name. ``memory``: bytes of
    weights that may be there at once (or one block, if that is larger); a model that needs more is proven part by part,
    the whole as well as the parts. ``large``: bytes of all weights in F32 from which on F32 is only computed where the
    published precision settles nothing. ``replay``: a model that runs the whole text in every step here may decode
    otherwise by itself. Raises UnsupportedModelError if the parts are not what the whole is.
    """
    splits = sides or analyse_sides(config, hints_of(manifest))
    cuts = _cut(manifest, paths, min(MEMORY, available_memory() // 2) if memory is None else memory)
    published = manifest.dtype if manifest.dtype in TOLERANCE else "F32"
    by_itself = not replay and any(split.replays and split.inputs.causal for split in splits)  # which F32 must tell
    size = sum(_size(manifest, manifest.side_blocks(side)) for side in range(len(splits)))
    is_large = size > large and not by_itself
    text = _text(folder)
    runs: dict[str, _Run] = {}
    outcomes: dict[str, Outcome] = {}
    parts = [part for cut in cuts for part in cut.parts]
    for dtype in dict.fromkeys((published, "F32") if is_large else ("F32", published)):
        if is_large and published in outcomes and outcomes[published].exact:
            break
        run = runs[dtype] = _Run(config, dtype, text, lambda done: report(done, len(parts)))
        for split, cut in zip(splits, cuts, strict=True):
            run.side(split, cut, len(cuts), by_itself=by_itself and dtype == "F32")
        outcomes[dtype] = _compare(dtype, run.found, run.expected, runs["F32"].expected if "F32" in runs else None)
        if dtype == "F32":
            _require_good(outcomes[dtype])
    for side, (split, cut) in enumerate(zip(splits, cuts, strict=True)):
        if split.inputs.causal and split.chunks and not split.replays:
            some = _first_blocks(manifest, side, paths) if is_large else cut.parts
            if some:
                require_same_in_parts(config, hints_of(manifest), side, split, some, run.encoded)
    report(len(parts), len(parts))
    best = runs.get("F32", run)
    streamed = any(cut.streamed for cut in cuts)
    return Proof(len(parts), best.took_text, streamed, tuple(outcomes.values()), tuple(best.samples))


def _require_good(outcome: Outcome) -> None:
    if not outcome.good:
        raise UnsupportedModelError(
            "this model cannot be published: cut into parts it does not compute what it computes as a whole (its "
            f"{outcome.dtype} outputs differ by {outcome.max_rel:.1g} of the largest, of {outcome.tokens} tokens "
            f"{outcome.agreeing} agree)"
        )


@dataclass(frozen=True, slots=True)
class _Cut:
    """One side in parts; ``borders`` are those between its blocks. ``streamed``: too much to be there all at once."""

    parts: list[Part]
    borders: list[int]
    streamed: bool


def _cut(manifest: Manifest, paths: Mapping[str, Path], memory: int) -> list[_Cut]:
    """Each side in ``PARTS`` parts; where its weights in F32 are more than ``memory`` bytes, in so many that each part
    takes at most that or is one block.
    """
    cuts = []
    for side, entry in enumerate(manifest.sides):
        blocks = manifest.side_blocks(side)
        size = _size(manifest, blocks)
        streamed = size > memory
        if streamed:
            spans = _spans_within(manifest, blocks, min(memory, size // PARTS))
        else:
            ends = [blocks.first + len(blocks) * number // PARTS for number in range(PARTS + 1)]
            spans = [Span(first, stop - 1) for first, stop in pairwise(ends)]
        layers = [manifest.blocks[block].layers for block in blocks]
        borders = [*(span.first for span in layers if span is not None), entry.layers]
        cuts.append(_Cut([part_of(manifest, span, paths) for span in spans], borders, streamed))
    return cuts


def _spans_within(manifest: Manifest, blocks: Span, limit: int) -> list[Span]:
    """``blocks`` in spans of at most ``limit`` bytes in F32, or of one block."""
    spans = [Span(blocks.first, blocks.first)]
    for block in range(blocks.first + 1, blocks.last + 1):
        joined = Span(spans[-1].first, block)
        if _size(manifest, joined) <= limit:
            spans[-1] = joined
        else:
            spans.append(Span(block, block))
    return spans


def _first_blocks(manifest: Manifest, side: int, paths: Mapping[str, Path]) -> list[Part]:
    """The stem and the first layers, of as many kinds as there are among them, a part each; none if they are large."""
    blocks = manifest.side_blocks(side)
    spans = [Span(block, block) for block in range(blocks.first, min(blocks.first + SAMPLED, blocks.last - 1) + 1)]
    stored = [sum(file.size for file in manifest.block_files(block)) for block in range(len(manifest.blocks))]
    # Of a stem's table a few rows become wide, of a layer one matrix after the other.
    needed = [stored[blocks.first], *(stored[span.first] + _widest(manifest, span) for span in spans[1:])]
    if max(needed) > max(SAMPLED_BYTES, 2 * max(stored)):
        return []
    return [part_of(manifest, span, paths) for span in spans]


def _widest(manifest: Manifest, span: Span) -> int:
    """Bytes of the largest tensor in F32."""
    layouts = (manifest.layouts[file.layout] for file in manifest.span_files(span.first, span.last))
    return max((math.prod(spec.shape) * 4 for layout in layouts for spec in layout.specs), default=0)


def _size(manifest: Manifest, span: Span) -> int:
    """Bytes of the weights in F32, each file once; mapped ones, which need no conversion, count, too."""
    layouts = (manifest.layouts[file.layout] for file in manifest.span_files(span.first, span.last))
    return sum(math.prod(spec.shape) * 4 for layout in layouts for spec in layout.specs)


class _Run:
    """The whole model and its parts in one dtype, side by side: an encoder first, then the decoder that reads what the
    whole encoder made (``encoded``). ``found`` and ``expected`` are what all steps gave.
    """

    def __init__(
        self, config: PretrainedConfig, dtype: str, text: list[int] | None, report: Callable[[int], None]
    ) -> None:
        self.found: list[torch.Tensor] = []
        self.expected: list[torch.Tensor] = []
        self.samples: list[Samples] = []
        self.took_text = False
        self._config = config
        self._dtype = dtype
        self._text = text
        self._report = report
        self._done = 0
        self.encoded: Encoded | None = None

    def side(self, split: Split, cut: _Cut, sides: int, *, by_itself: bool) -> None:
        """Run one of so many sides. ``by_itself``: what replays has to be what the model decodes by itself."""
        whole = Whole(self._config, split, cut.parts, DTYPES[self._dtype], streamed=cut.streamed)
        chosen = choose(split, cut.borders, self._dtype, ROOM // sides)
        singles = 0 if not split.inputs.causal else 1 if cut.streamed else SINGLE
        steps = self._steps(whole.vocabulary, chosen.tokens, singles)
        expected, borders = whole.run(steps, self.encoded, chosen.positions)
        if by_itself and split.replays and split.inputs.causal:
            _require_same_decoding(whole, steps[0], self.encoded)
        self.samples.append(record(steps[0][0], borders, expected[0][:, -1:], self.encoded, chosen.dtype))
        if cut.streamed:
            whole.release()  # else the parts use the same
        self.found += self._run_parts(split, cut, steps)
        self.expected += expected
        whole.release()
        if sides > 1 and self.encoded is None:  # the encoder's
            self.encoded = Encoded(expected[0], torch.ones(expected[0].shape[:2], dtype=torch.long))

    def _steps(self, vocabulary: int, prompt: int, singles: int) -> list[torch.Tensor]:
        """A prompt of so many tokens, the first half of them random (always the same), the others from the text; and
        single tokens behind it.
        """
        ids = torch.randint(0, vocabulary, (prompt + singles,), generator=torch.Generator().manual_seed(0))
        if self._text is not None and max(self._text) < vocabulary:
            self.took_text = True
            rest = torch.tensor(self._text)[: len(ids) - prompt // 2]
            ids[prompt // 2 : prompt // 2 + len(rest)] = rest
        return [ids[None, :prompt], *(ids[None, at : at + 1] for at in range(prompt, len(ids)))]

    def _run_parts(self, split: Split, cut: _Cut, steps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One part after the other runs all of the steps, so that each is there only once."""
        tensors: list[tuple[Tensor, ...]] = [(pack(ids),) for ids in steps]
        for part in cut.parts:
            self._report(self._done)
            self._done += 1
            try:
                with _collected():
                    tensors = self._run_part(split, part, steps, tensors)
            except (RefusedError, RemoteProtocolError) as error:
                raise UnsupportedModelError(
                    f"this model cannot be published: cut into parts it does not run ({error})"
                ) from error
        return [unpack(made[0]) for made in tensors]

    def _run_part(
        self, split: Split, part: Part, steps: Sequence[torch.Tensor], tensors: Sequence[tuple[Tensor, ...]]
    ) -> list[tuple[Tensor, ...]]:
        runner = part.runner(self._config, split, DTYPES[self._dtype])
        length = sum(ids.shape[1] for ids in steps)
        cache = runner.open(steps[0].shape[0], length, encoded=self.encoded)
        made = zip(tensors, steps, strict=True)
        return [step(runner, cache, given, ids.shape[1], Want.LOGITS_ALL) for given, ids in made]


def _require_same_decoding(whole: Whole, ids: torch.Tensor, encoded: Encoded | None) -> None:
    """Some models keep a state between tokens and do not agree with themselves: with it they decode other tokens than
    their forward gives for the whole text, and no holder could give both.
    """
    rows = torch.cat([ids, ids.flip(1)])  # a batch: some states mix its rows
    if encoded is not None:
        encoded = Encoded(encoded.states.repeat(2, 1, 1), encoded.mask.repeat(2, 1))
    tokens, logits = whole.decode(rows, DECODED, encoded)
    for count in range(DECODED):
        text = torch.cat([rows, tokens[:, :count]], dim=1)
        [made], _ = whole.run([text], encoded)
        if _difference(made[:, -1].float(), logits[:, count].float()) > ALIKE * _largest(logits):
            raise UnsupportedModelError(
                "this model cannot be published as it is: what it decodes token by token differs from what it computes"
                " for the whole text; with replay = true in [model.split] it is published as what"
                " generate(use_cache=False) gives"
            )


def _text(folder: Path) -> list[int] | None:
    """Real text as token ids; None without a tokenizer."""
    if not has_tokenizer(folder):
        return None
    try:
        ids = load_tokenizer(folder)(TEXT)["input_ids"]
    except ArtifactError:
        return None
    return list(ids) or None


@contextmanager
def _collected() -> Iterator[None]:
    """What is made meanwhile and forms cycles, as a runner does, is gone afterwards; only that is walked through."""
    gc.freeze()
    try:
        yield
        gc.collect()
    finally:
        gc.unfreeze()


def _compare(
    dtype: str, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], exact: Sequence[torch.Tensor] | None
) -> Outcome:
    """The parts' outputs of all steps beside the whole model's; ``exact`` are the whole model's in F32, if known."""
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            raise UnsupportedModelError(
                f"this model cannot be published: cut into parts it gives {list(ours.shape)} where it gives "
                f"{list(theirs.shape)} as a whole"
            )
    pairs = [(ours.float(), theirs.float()) for ours, theirs in zip(found, expected, strict=True)]
    of_f32 = [] if exact is None else [(made.float(), best) for made, best in zip(expected, exact, strict=True)]
    return Outcome(
        dtype,
        max_abs=max(_difference(ours, theirs) for ours, theirs in pairs),
        max_rel=max(_difference(ours, theirs) / _largest(theirs) for ours, theirs in pairs),
        tolerance=TOLERANCE[dtype],
        tokens=sum(theirs[..., 0].numel() for _, theirs in pairs),
        agreeing=sum(int((ours.argmax(-1) == theirs.argmax(-1)).sum()) for ours, theirs in pairs),
        from_f32=max((_difference(theirs, best) / _largest(best) for theirs, best in of_f32), default=None),
    )


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest; infinite where one of the two is not a number and the other is."""
    same = (one == other) | (one.isnan() & other.isnan())
    return float((one - other).abs().nan_to_num(math.inf).masked_fill(same, 0.0).max())


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().nan_to_num(0.0, posinf=0.0).max()) or 1.0
