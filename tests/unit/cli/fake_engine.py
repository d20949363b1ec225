"""A stand-in for ``torrentlm.api``, for tests of arguments, rendering and the terminal alone.

``python -m tests.unit.cli.fake_engine ARGUMENTS`` is the torrentlm command with it in place. The model answers
"one two three four", stops in the middle when the message says "slowly", and fails when it says "fail".
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torrentlm.errors import HolderLostError

WORDS = ("one", " two", " three", " four")


@dataclass(frozen=True)
class Hop:
    peer: str
    first: int
    last: int


TENSOR = {"name": "norm.weight", "dtype": "F32", "shape": [5]}
ROUTE = (Hop("127.0.0.1:1", 0, 10), Hop("127.0.0.1:22", 11, 11))


@dataclass(frozen=True)
class Result:
    text: str = "one two"
    tokens: tuple[int, ...] = (1, 2)
    tokens_per_second: float = 9.2126
    time_to_first_token_s: float = 0.61234
    route: tuple[Hop, ...] = ROUTE
    finish: str = "length"


class Chat:
    def __init__(self, model: Model, system: str | None) -> None:
        self._model = model
        self.system = system

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.calls.append("close")

    def send(self, text: str, **how: Any) -> Iterator[str]:
        self._model.calls.append(("send", text, how))
        try:
            for word in WORDS:
                yield word
                if "fail" in text:
                    raise HolderLostError("a holder was lost")
                if "slowly" in text:
                    time.sleep(30 if word == WORDS[1] else 0)
            self._model.last = Result()
        finally:
            self._model.calls.append("left")

    def reset(self) -> None:
        self._model.calls.append("reset")


class Model:
    def __init__(self, target: str, settings: Any) -> None:
        self.target, self.settings = target, settings
        self.calls: list[Any] = []
        self.last: Result | None = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append("model closed")

    def chat(self, *, system: str | None = None, adapter: str | None = None) -> Chat:
        return Chat(self, system)

    def generate(self, prompt: str, *, stream: bool = False, **how: Any) -> Any:
        self.calls.append(("generate", prompt, how))
        self.last = Result()
        return iter(WORDS) if stream else "".join(WORDS)

    def route(self) -> tuple[Hop, ...]:
        routes = {"slow": lambda: time.sleep(30), "lost": self._lose}
        routes.get(os.environ.get("FAKE_ROUTE", ""), lambda: None)()
        return ROUTE

    def _lose(self) -> None:
        raise HolderLostError("no route")

    def stats(self) -> dict[str, Any]:
        pipes = [{"peer": "127.0.0.1:39183", "rtt_ms": 1.75}, {"peer": "127.0.0.1:1", "rtt_ms": None}]
        return {"peers": 2, "pipes": pipes, "bytes_sent": 10}

    def inspect(self) -> dict[str, Any]:
        return {
            "name": "Tiny",
            "size": 142_000_000,
            "blocks": [
                {"block": 0, "kind": "stem", "size": 113_000_000, "holders": ["127.0.0.1:1", "127.0.0.1:22"]},
                {"block": 1, "kind": "head", "size": 1, "holders": [], "tensors": [TENSOR, TENSOR]},
            ],
        }


def install() -> list[Model]:
    """Put the stand-in where the subcommands import from; returns the list of models that they connect to."""
    models: list[Model] = []

    def connect(target: str, *, settings: Any, on_event: Any = None) -> Model:
        if on_event is not None:
            on_event({"event": "waiting", "why": "no peer yet"})
        models.append(Model(target, settings))
        return models[-1]

    api, threads = ModuleType("torrentlm.api"), ModuleType("torrentlm.compute.threads")
    api.connect, threads.prepare_environment = connect, lambda threads=None: None  # type: ignore[attr-defined]
    sys.modules |= {"torrentlm.api": api, "torrentlm.compute.threads": threads}
    return models


if __name__ == "__main__":
    from torrentlm.cli.main import main

    install()
    main()
