"""Before blocks are served: one of them is compared with the recorded sample, so that a library that computes this
model in another way is caught before anybody gets its garbage.

A sidecar that this node made itself is believed. What peers send is advice: whoever invents one must not keep an honest
holder from serving. So several peers are asked; one sidecar that the block agrees with is enough; and where none does,
the node refuses only if it has other library versions than all of them name, since that is the fault that is looked
for. ``recheck = false`` leaves the check out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import trio

from torrentlm.compute.machine import libraries
from torrentlm.errors import UnsupportedModelError
from torrentlm.holder.model import HeldModel, Rechecked
from torrentlm.manifest.sidecar import Libraries
from torrentlm.node.sidecars import Found, Sidecars


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a block's check against one sidecar gave; ``made_with`` is what that was recorded with."""

    made_with: Libraries
    own: bool
    rechecked: Rechecked


@dataclass(frozen=True, slots=True)
class Verdict:
    """``why`` is a sentence, empty where there is nothing to say."""

    outcome: Literal["same", "unknown", "differs", "refused"]
    why: str = ""


def judge(opinions: Sequence[Opinion], here: Libraries) -> Verdict:
    """Whether to serve. Those that agree count more than those that do not, and the node's own more than all others."""
    own = [opinion for opinion in opinions if opinion.own]
    opinions = own or opinions
    if not opinions:
        return Verdict("unknown")
    if any(opinion.rechecked.good for opinion in opinions):
        return Verdict("same")
    said = opinions[0]
    block = (
        f"block {said.rechecked.block} does not compute here what was recorded with {said.made_with} "
        f"({said.rechecked.share:.0%} of its values differ; here: {here})"
    )
    if own or all(opinion.made_with.decisive != here.decisive for opinion in opinions):
        return Verdict("refused", f"{block}: install those versions, or serve all the same with --no-recheck")
    return Verdict("differs", f"{block}, as a peer says that has no better versions; it is served all the same")


async def recheck(
    model: HeldModel, blocks: Sequence[int], sidecars: Sidecars, say: Callable[[dict[str, Any]], None]
) -> None:
    """Compare one of ``blocks`` and say how it went.

    Raises UnsupportedModelError if what was computed must not be served, StorageError.
    """
    here = libraries()
    opinions: list[Opinion] = []
    stored = await sidecars.stored()
    await _compare(model, blocks, [] if stored is None else [stored], opinions)
    heard: list[Found] = []
    if not any(opinion.own or opinion.rechecked.good for opinion in opinions):
        heard = await sidecars.ask()
        agreeing = await _compare(model, blocks, heard, opinions)
        if agreeing is not None:
            await sidecars.keep(agreeing)
    verdict = judge(opinions, here)
    if verdict.outcome == "refused":
        raise UnsupportedModelError(verdict.why)
    say({"event": "rechecked", "outcome": verdict.outcome, "why": verdict.why})


async def _compare(
    model: HeldModel, blocks: Sequence[int], found: Sequence[Found], opinions: list[Opinion]
) -> Found | None:
    """Add an opinion for each sidecar that has a sample of one of the blocks; the first that agrees, which ends it."""
    for one in found:
        rechecked = await trio.to_thread.run_sync(model.recheck, blocks, one.sidecar)
        if rechecked is not None:
            opinions.append(Opinion(one.sidecar.made_with, one.own, rechecked))
            if rechecked.good:
                return one
    return None
