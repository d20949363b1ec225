"""Which precision each block of a span is kept in on one device: pure functions of the manifest, the settings, the
device's budget and what it can do.

What fits the budget stays as it was published: exact, mapped from the disk, and decided without asking the device. So
does what is only more than a guess of ours: blocks that find no room are loaded when they are asked for. Where the
operator has named both a span and a budget, and the span is too large as published, as little of it as must be is
kept in fewer bits. And a processor that has no instructions for what was published is measured: where F32, which loses
nothing, is clearly faster and fits, it is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import ceil

from torrentlm.compute.costs import PrecisionCost
from torrentlm.compute.precision import (
    COMPUTED,
    FINEST_FIRST,
    STORED,
    BlockSize,
    Cost,
    Precisions,
    TooLargeError,
    choose,
    configured,
)
from torrentlm.compute.processor import computes_slowly
from torrentlm.config import NodeConfig
from torrentlm.errors import ConfigError
from torrentlm.manifest.manifest import Manifest
from torrentlm.node.memory import WEIGHTS_SHARE, weights_budget, weights_bytes
from torrentlm.records import Span, spans_of

UNLIMITED = 1 << 62
FASTER = 1.3
"""How much faster F32 must be than what was published: it takes twice the memory, and copies what is mapped."""
NOT_ASKED: Mapping[str, Cost] = {name: PrecisionCost(name) for name in FINEST_FIRST}
"""For a device that need not be asked: it has every precision."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a device has for weights, in bytes, and for more of them in RAM (``aside``). ``option`` is the setting that
    it follows from, ``given`` what the operator wrote there, if anything. One that ``binds`` is kept to; a guess of
    ours need not be.
    """

    weights: int
    option: str = "ram"
    given: int | None = None
    binds: bool = True
    aside: int = 0

    @property
    def accelerates(self) -> bool:
        return self.option == "vram"

    @property
    def limit(self) -> int:
        """Bytes that a span must keep within."""
        return self.weights + self.aside if self.binds else UNLIMITED

    @classmethod
    def of(cls, config: NodeConfig, accelerator: int | None, aside: int = 0) -> Budget:
        """``accelerator``: the bytes for weights of the one that computes; None: the processor does. ``aside``: what
        offloaded blocks add to them."""
        if accelerator is None:
            return cls(weights_budget(config), "ram", config.ram, config.ram is not None)
        return cls(accelerator, "vram", config.vram, config.vram is not None, aside)


def asked_for(manifest: Manifest, config: NodeConfig) -> Precisions:
    """What the operator asked for, block by block, "auto" being what was published.

    Raises ConfigError for what the model's floor forbids, and for blocks that the model does not have.
    """
    wanted = [(range(blocks.first, blocks.last + 1), precision) for blocks, precision in config.precision_of]
    layers = [block for block, entry in enumerate(manifest.blocks) if entry.kind == "layers"]
    for blocks, _ in config.precision_of:
        if blocks.last >= len(manifest.blocks):
            raise ConfigError(
                f"precision_of names blocks {blocks}, past this model's end: it has blocks 0-{len(manifest.blocks) - 1}"
            )
    return configured(config.precision, wanted, manifest.dtype, layers, manifest.floor)


def must_ask(manifest: Manifest, config: NodeConfig, span: Span, budget: Budget) -> bool:
    """Whether what the device can do may change the decision, or make it a refusal.

    Asking a processor means importing torch before anything is fetched, so it is asked only then; an accelerator is
    always asked, since some cannot even compute in what models are published in.
    """
    wanted = asked_for(manifest, config)
    used = {wanted.compute, *(wanted.of(block) for block in span)}
    may_lack = budget.accelerates or config.precision != "auto" or bool(used.intersection(STORED))
    return (may_lack and used != {"F32"}) or bytes_of(manifest, span, wanted) > budget.limit


def must_measure(
    manifest: Manifest, config: NodeConfig, span: Span, budget: Budget, instructions: Collection[str]
) -> bool:
    """Whether F32 may be faster than what was published, on a processor with these instruction sets, and could be
    held."""
    wanted, wide = asked_for(manifest, config), Precisions("F32")
    free = config.precision == "auto" and not config.precision_of and not budget.accelerates
    slow = free and computes_slowly(wanted.compute, instructions)
    return slow and bytes_of(manifest, span, wide) <= budget.weights


def decide(
    manifest: Manifest, config: NodeConfig, span: Span, budget: Budget, costs: Mapping[str, Cost] = NOT_ASKED
) -> Precisions:
    """The precisions of one device's span. ``costs`` are the device's, as measured or only tried.

    Raises ConfigError for what the device lacks, what the floor forbids, and a span that must fit and cannot.
    """
    wanted = asked_for(manifest, config)
    _require_there(config, wanted, span, costs)
    needed = bytes_of(manifest, span, wanted)
    if config.precision != "auto":
        if needed > budget.limit:
            raise ConfigError(_too_large(span, budget, needed, wanted, "needs"))
        return wanted
    if needed <= budget.limit and not costs[wanted.compute].lacking:
        return Precisions("F32") if _slower(manifest, config, span, budget, costs) > FASTER else wanted
    try:
        return _choose(manifest, config, span, budget.limit, costs)
    except TooLargeError as error:
        raise ConfigError(_too_large(span, budget, error.least, error.precisions, "needs at least")) from error


def _slower(manifest: Manifest, config: NodeConfig, span: Span, budget: Budget, costs: Mapping[str, Cost]) -> float:
    """How many times as long as in F32 a token takes in what was published, by measurement; 0 where that is nothing to
    go by."""
    published, wide = costs[asked_for(manifest, config).compute], costs["F32"]
    held = not config.precision_of and bytes_of(manifest, span, Precisions("F32")) <= budget.weights
    return wide.decode / published.decode if held and published.decode and not wide.lacking else 0.0


def smallest(manifest: Manifest, config: NodeConfig, costs: Mapping[str, Cost] = NOT_ASKED) -> Precisions:
    """The least in which a device may keep the model's blocks. Raises ConfigError as ``decide`` does."""
    wanted = asked_for(manifest, config)
    if config.precision != "auto":
        return wanted
    try:
        return _choose(manifest, config, Span(0, len(manifest.blocks) - 1), -1, costs)
    except TooLargeError as error:
        return error.precisions


def _choose(manifest: Manifest, config: NodeConfig, span: Span, limit: int, costs: Mapping[str, Cost]) -> Precisions:
    """Raises TooLargeError, and ConfigError where the device lacks whatever the floor allows."""
    shared = _shared(manifest)

    def for_all(found: Precisions) -> Precisions:
        stored = {block: kind for first, kind in found.stored.items() for block in _with(shared, first)}
        return Precisions(found.compute, stored)

    sizes, fixed = _sizes(manifest, span, shared), _fixed(manifest, config, span, shared)
    try:
        return for_all(choose(sizes, limit, costs, manifest.dtype, floor=manifest.floor, fixed=fixed))
    except TooLargeError as error:
        raise TooLargeError(error.least, limit, for_all(error.precisions)) from error


def bytes_of(manifest: Manifest, span: Span, kept: Precisions) -> int:
    """What the weights of ``span`` take in memory when they are kept so."""
    sizes = weights_bytes(manifest, kept.compute, kept.stored)
    return sum(sizes[file.name] for file in manifest.span_files(span.first, span.last))


def reason(
    manifest: Manifest, config: NodeConfig, span: Span, budget: Budget, decided: Precisions, costs: Mapping[str, Cost]
) -> str:
    """A sentence about how blocks are kept that are not kept as published or as the operator asked; else ""."""
    wanted = asked_for(manifest, config)
    if all(decided.of(block) == wanted.of(block) for block in span):
        return ""
    if lacking := costs[wanted.compute].lacking:
        why = f"this device lacks {wanted.compute} ({lacking.rstrip('.')})"
    elif (slower := _slower(manifest, config, span, budget, costs)) > FASTER and decided == Precisions("F32"):
        why = f"{wanted.compute} takes this processor {slower:.1f} times as long as F32"
    else:
        why = (
            f"blocks {span} need {bytes_of(manifest, span, wanted) / 1e6:,.1f} MB for weights in {wanted.said(span)}, "
            f"and {budget.option} leaves {budget.weights / 1e6:,.1f} MB for them"
        )
    return f"{why}; held instead: {_spelled(decided, span)}, {bytes_of(manifest, span, decided) / 1e6:,.1f} MB"


def _spelled(kept: Precisions, span: Span) -> str:
    """``blocks 1-3 in INT8 and block 4 in INT4, computed in BF16``."""
    by_kind = {name: [block for block in span if kept.of(block) == name] for name in (*COMPUTED, *STORED)}
    parts = [
        f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, spans_of(blocks)))} in {name}"
        for name, blocks in by_kind.items()
        if blocks
    ]
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    return listed if by_kind[kept.compute] else f"{listed} (computed in {kept.compute})"


def enough(weights: int) -> float:
    """The setting, in MB, that leaves so many bytes for weights."""
    return ceil(weights / WEIGHTS_SHARE / 1e5) / 10


def _too_large(span: Span, budget: Budget, needed: int, kept: Precisions, verb: str) -> str:
    option, given, left = budget.option, (budget.given or 0) / 1e6, budget.limit / 1e6
    option += f" = {given:,.1f} MB" + (" with offload" if budget.aside else "")
    return (
        f"--blocks {span} {verb} {needed / 1e6:,.1f} MB for weights in {kept.said(span)}, but {option} "
        f"leaves {left:,.1f} MB for them: raise --{budget.option} to {enough(needed):,.1f} MB or name fewer blocks"
    )


def _require_there(config: NodeConfig, wanted: Precisions, span: Span, costs: Mapping[str, Cost]) -> None:
    """ConfigError for what the operator names and the device lacks; what "auto" stands for is not named."""
    named = {precision for blocks, precision in config.precision_of if set(blocks).intersection(span)}
    if config.precision != "auto":
        named |= {wanted.of(block) for block in span} | {wanted.compute}
    for name in sorted(named, key=FINEST_FIRST.index):
        if lacking := costs[name].lacking:
            there = [precision for precision in FINEST_FIRST if not costs[precision].lacking]
            told = f"{config.precision} computes in {name}, which" if name != config.precision in STORED else name
            choices = f"choose {' or '.join(there)}, or leave it to auto" if there else "compute on another device"
            raise ConfigError(f"{told} is not to be had on this device ({lacking.rstrip('.')}): {choices}")


def _shared(manifest: Manifest) -> list[int]:
    """For each block the first one that it shares a file with, directly or by way of others; itself if with none.

    A file is kept in one form, so such blocks are kept alike.
    """
    first = list(range(len(manifest.blocks)))
    owner: dict[str, int] = {}
    for block in first.copy():
        linked = {first[owner.setdefault(file.name, block)] for file in manifest.block_files(block)}
        home = min(linked | {block})
        first = [home if known in linked or number == block else known for number, known in enumerate(first)]
    return first


def _with(shared: list[int], block: int) -> Iterable[int]:
    """The blocks of the whole model that are kept as ``block`` is."""
    return (other for other, first in enumerate(shared) if first == shared[block])


def _sizes(manifest: Manifest, span: Span, shared: list[int]) -> dict[int, BlockSize]:
    """By the first block of the span among those that share files: all of their tensors, each once."""
    sizes: dict[int, BlockSize] = {}
    for group in dict.fromkeys(shared[block] for block in span):
        blocks = [block for block in span if shared[block] == group]
        files = {file.name: file for block in blocks for file in manifest.block_files(block)}
        specs = tuple(spec for file in files.values() for spec in manifest.layouts[file.layout].specs)
        layers = all(manifest.blocks[block].kind == "layers" for block in _with(shared, group))
        sizes[blocks[0]] = BlockSize(specs, layers)
    return sizes


def _fixed(manifest: Manifest, config: NodeConfig, span: Span, shared: list[int]) -> dict[int, str]:
    """What the operator named, by the blocks of ``_sizes``. Where INT8 or INT4 cannot be, naming them means nothing."""
    wanted = asked_for(manifest, config)
    found: dict[int, str] = {}
    for blocks, precision in config.precision_of:
        for block in set(blocks).intersection(span):
            if wanted.of(block) == precision:
                found[next(other for other in span if shared[other] == shared[block])] = precision
    return found
