"""A BitTorrent-native swarm that stores and runs large language models.

    >>> import torrentlm
    >>> with torrentlm.connect("magnet:?…") as model:
    ...     for text in model.generate("Why is the sky blue?", chat=True, max_new_tokens=64, stream=True):
    ...         print(text, end="", flush=True)

The names below are the public interface; everything else may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torrentlm.errors import (
    ArtifactError,
    ConfigError,
    HolderLostError,
    NetworkError,
    NoHolderError,
    RefusedError,
    StorageError,
    TorrentLMError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from torrentlm.api import Chat, Model, Session, compare, connect, serve
    from torrentlm.client.generation import GenerationResult

__all__ = [
    "ArtifactError",
    "Chat",
    "ConfigError",
    "GenerationResult",
    "HolderLostError",
    "Model",
    "NetworkError",
    "NoHolderError",
    "RefusedError",
    "Session",
    "StorageError",
    "TorrentLMError",
    "UnsupportedModelError",
    "compare",
    "connect",
    "serve",
]

_OF_API = ("Chat", "GenerationResult", "Model", "Session", "compare", "connect", "serve")


def __getattr__(name: str) -> Any:
    """torrentlm.api imports torch, so it waits until somebody asks; the threads' settings must come before that."""
    if name not in _OF_API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import sys

    if "torch" not in sys.modules:
        from torrentlm.compute.threads import prepare_environment

        prepare_environment()
    from torrentlm import api

    return getattr(api, name)
