"""Which blocks are there when they are asked for: an LRU alone, with prefetching, and Belady's optimum.

A replayed trace (``_trace.py``): sessions that walk through 8 models, hop by hop, models drawn by Zipf's law with
popularity that drifts over the day. Everything is seeded and counted, nothing is timed: the same figures everywhere.
Belady's optimum knows the future but fetches only what is asked for; prefetching may beat it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _replay import SHARE, Blind, Outcome, Replay
from _trace import MODELS, belady, make_trace

from torrentlm.route.requests import Requests

EXPONENTS = (0.6, 1.0, 1.4)
SHARES = (0.125, 0.25, 0.5)
AGAIN = (0.0, 0.5)
HALF_LIVES_H = (2.0, 8.0, 32.0)
LINKS_S = (0.5, 2.0, 8.0)
USUAL = {"exponent": 1.0, "share": 0.25, "again": 0.5, "fetch_s": 2.0}
POLICIES: dict[str, Callable[[], Requests | None]] = {
    "lru": lambda: None,
    "adjacent": Blind,
    "popular": lambda: Requests(backoff=1e12),  # what followed what never counts against what is asked for at all
    "prefetch": Requests,
}
BEGIN, END = "<!-- tools/bench cache writes this -->", "<!-- up to here -->"


def run(runs: int, days: float = 1.0, write: str = "") -> dict[str, Any]:
    """``runs`` traces of ``days`` days for each row; ``write`` is a page whose tables are to be renewed."""
    main = [
        row(runs, days, USUAL | {"again": again, "exponent": exponent, "share": share})
        for again in AGAIN
        for exponent in EXPONENTS
        for share in SHARES
    ]
    links = [row(runs, days, USUAL | {"fetch_s": fetch_s}) for fetch_s in LINKS_S]
    half_lives = [
        {"half_life_h": hours} | mean(runs, days, USUAL, lambda hours=hours: Requests(hours * 3600))  # type: ignore[misc]
        for hours in HALF_LIVES_H
    ]
    if write:
        page = Path(write)
        before, _, rest = page.read_text().partition(BEGIN)
        tables = "\n".join((table(main), links_table(links), half_lives_table(half_lives)))
        page.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{rest.partition(END)[2]}")
    ours, reference = (statistics.fmean(each[name]["hits"] for each in main) for name in ("prefetch", "lru"))
    return {
        "unit": "hit rate, mean of all rows",
        "ours": ours,
        "reference": reference,
        "ratio": ours / reference,
        "rows": main,
        "links": links,
        "half_lives": half_lives,
    }


def row(runs: int, days: float, setting: dict[str, float]) -> dict[str, Any]:
    """Every policy on the same traces."""
    found = {name: mean(runs, days, setting, made) for name, made in POLICIES.items()}
    best = statistics.fmean(belady(trace(seed, days, setting), capacity(setting)) for seed in range(runs))
    return setting | found | {"belady": {"hits": best}}


def mean(runs: int, days: float, setting: dict[str, float], made: Callable[[], Requests | None]) -> dict[str, float]:
    """Of the blocks asked for: the share of hits, and fetches per block; seconds waited per session."""
    outcomes: list[tuple[Outcome, int]] = []
    for seed in range(runs):
        walks = trace(seed, days, setting)
        outcomes.append((Replay(made(), capacity(setting), setting["fetch_s"]).run(walks), len(walks)))
    return {
        "hits": statistics.fmean(outcome.hits / outcome.asked for outcome, _ in outcomes),
        "fetched": statistics.fmean(outcome.fetched / outcome.asked for outcome, _ in outcomes),
        "waited_s": statistics.fmean(outcome.waited_s / sessions for outcome, sessions in outcomes),
    }


def trace(seed: int, days: float, setting: dict[str, float]) -> Any:
    return make_trace(seed, setting["exponent"], days, setting["again"])


def capacity(setting: dict[str, float]) -> int:
    return int(sum(MODELS) * setting["share"])


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| the last model again | Zipf | cache | LRU | adjacency | popularity | Markov | Belady "
        "| fetched: LRU | Markov |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in rows:
        rates = " | ".join(f"{each[name]['hits']:.1%}" for name in (*POLICIES, "belady"))
        traffic = " | ".join(f"{each[name]['fetched']:.2f}" for name in ("lru", "prefetch"))
        lines.append(f"| {each['again']:.0%} | {each['exponent']} | {each['share']:.1%} | {rates} | {traffic} |")
    return "\n".join(lines) + "\n"


def links_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| seconds for a block: asked for, prefetched | LRU | adjacency | popularity | Markov "
        "| waited a session: LRU | Markov |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in rows:
        rates = " | ".join(f"{each[name]['hits']:.1%}" for name in POLICIES)
        waits = " | ".join(f"{each[name]['waited_s']:.1f} s" for name in ("lru", "prefetch"))
        lines.append(f"| {each['fetch_s']:g}, {each['fetch_s'] / SHARE:g} | {rates} | {waits} |")
    return "\n".join(lines) + "\n"


def half_lives_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| half-life | Markov | fetched |", "| --- | --- | --- |"]
    lines += [f"| {each['half_life_h']:g} h | {each['hits']:.1%} | {each['fetched']:.2f} |" for each in rows]
    return "\n".join(lines) + "\n"
