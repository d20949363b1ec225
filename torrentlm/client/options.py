"""What a script may ask of a generation, checked before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TypedDict

from torrentlm.client.generation import Options
from torrentlm.records import MAX_STOP_BYTES, MAX_STOPS, RANGES, Sampling, Stop


class How(TypedDict, total=False):
    """How to generate. Temperature 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.

    ``stop``: texts that end the generation when they appear, or one such text.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: str | Sequence[str]


def options_of(how: How) -> Options:
    """The options as the client takes them. Raises TypeError for a name or type, ValueError for a value."""
    given: Mapping[str, object] = how
    stop = _stop_of(given.get("stop", ()))
    checked = {name: _checked(name, value) for name, value in given.items() if name != "stop"}
    length = checked.pop("max_new_tokens", Options().max_new_tokens)
    return Options(int(length), Sampling(**checked), Stop(strings=stop))  # type: ignore[arg-type]


def text_of(prompt: object) -> str:
    """The prompt; TypeError if it is no text."""
    if not isinstance(prompt, str):
        raise TypeError(f"the prompt is a str, not {type(prompt).__name__}")
    return prompt


def _checked(name: str, value: object) -> int | float:
    if name not in RANGES:
        near = get_close_matches(name, How.__annotations__, n=1, cutoff=0.4)
        raise TypeError(f"there is no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    lowest, highest = RANGES[name]
    kind, types = ("a whole number", int) if isinstance(lowest, int) else ("a number", (int, float))
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"{name} is {kind}, not {type(value).__name__}")
    if not math.isfinite(value) or not lowest <= value <= highest:
        limits = f"{lowest} to {highest}" if isinstance(lowest, int) else f"{lowest:g} to {highest:g}"
        raise ValueError(f"{name} is {kind} from {limits}, not {value}")
    return value


def _stop_of(value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError("stop is a text or a list of texts")
    if not all(0 < len(text.encode()) <= MAX_STOP_BYTES for text in texts) or len(texts) > MAX_STOPS:
        raise ValueError(f"stop is up to {MAX_STOPS} texts of 1 to {MAX_STOP_BYTES} bytes each")
    return tuple(texts)
