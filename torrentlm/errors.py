"""The few classes that errors are translated into at the boundary where they appear.

``str(error)`` is one sentence that says what is wrong and what to do; the command line prints just that. The class says
whose fault it is, so that callers decide by class and never by parsing the sentence.
"""

from __future__ import annotations


class TorrentLMError(Exception):
    """Base of everything that this package raises on purpose."""


class ConfigError(TorrentLMError):
    """What the operator wrote (model.toml, an option, the environment) cannot be used."""


class ArtifactError(TorrentLMError):
    """A magnet, torrent, manifest, block file or checkpoint is not what it should be."""


class UnsupportedModelError(TorrentLMError):
    """This model cannot be split exactly, so it is refused."""


class StorageError(TorrentLMError):
    """The data folder cannot be used: disk full, not writable, wrong version."""


class DiskFullError(StorageError):
    """There is no room on the disk; what was underway can go on once there is."""


class FolderInUseError(StorageError):
    """Another node has the data folder."""


class NetworkError(TorrentLMError):
    """A connection could not be made or did not last; nobody broke a rule."""


class LocalProtocolError(TorrentLMError):
    """Our own code asked the protocol for something that it does not allow: a bug here, not the peer's."""


class RemoteProtocolError(TorrentLMError):
    """The peer sent something that the protocol does not allow; its connection is closed."""


class RefusedError(TorrentLMError):
    """A holder will not do what was asked. ``code`` is one of those in docs/protocol.md ("max_length", "busy", …)."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class OutOfMemoryError(RefusedError):
    """A device could not give the memory that was asked of it. What was tried may be tried again once others let go."""

    def __init__(
        self, message: str = "this holder ran out of memory: close a session or choose another holder"
    ) -> None:
        super().__init__(message, "memory")


class NoHolderError(TorrentLMError):
    """No reachable peer holds a block that the route needs."""


class HolderLostError(TorrentLMError):
    """A holder on the route died or fell silent while it was needed."""
