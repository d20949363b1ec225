"""One torrent in the session: its metadata, its progress, its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

import libtorrent as lt
import trio

from torrentlm.errors import ArtifactError, NetworkError, TorrentLMError
from torrentlm.records import Endpoint, InfoHash
from torrentlm.swarm.addresses import is_address
from torrentlm.swarm.alerts import Alert, AlertPump, torrent_key, translate
from torrentlm.wire.alias import misnomer

_CONNECT_SOURCE = int(lt.peer_info.tracker)
"""Told that a tracker named a peer, libtorrent forgives it an earlier failure; of other sources it does not."""

_PLAIN_TCP = 0
"""connect_peer's default flags say uTP and encryption; none of them means plain TCP, greeting by v1 if there is one."""
_BY_V2 = 0x80
"""libtorrent's pex_lt_v2: greet by the truncated v2 info-hash."""

_MAX_HURRIED = 1000
_MAX_DEADLINES = 1024
"""Pieces that are given one: all of a block file (manifest.torrent.piece_length), not all of what anybody may name."""


class Urgency(IntEnum):
    """How much somebody waits for a torrent.

    ``NOW``: a session does; its pieces have deadlines, so that libtorrent asks a second peer where the first is slow.
    ``NORMAL``: nobody yet. ``BACKGROUND``: it may be of use one day; it has no connection while anything that is needed
    now is incomplete, or anything normal is coming, and keeps to ``Swarm.background_rate`` otherwise.
    """

    BACKGROUND = 0
    NORMAL = 1
    NOW = 2


@dataclass(frozen=True, slots=True)
class Progress:
    """``done`` and ``total`` in bytes (total 0: metadata not here yet), rates in bytes per second."""

    done: int = 0
    total: int = 0
    download_rate: int = 0
    upload_rate: int = 0
    peers: int = 0
    state: str = "starting"


class Owner(Protocol):
    """What a transfer tells the session that it is part of."""

    def renamed(self, transfer: Transfer) -> None:
        """A magnet's metadata has arrived: there may be more info-hashes than before."""

    def hurry(self) -> None:
        """Somebody is to be dialled now, not at libtorrent's next full second."""

    def reconsider(self) -> None:
        """A transfer has become more or less urgent, or has ended: others may have to wait, or no longer."""


class Transfer:
    """A torrent of this node, made by ``Swarm.add_torrent``.

    ``v1`` is the 20-byte SHA-1 info-hash, ``v2`` the 32-byte SHA-256 one; None where the torrent (or so far the magnet)
    has none. ``had_first``: it was all here when it was started.
    ``error`` is set once something stopped it (disk full, file gone).
    """

    def __init__(
        self,
        handle: Any,
        pump: AlertPump,
        folder: Path,
        owner: Owner,
        limit: int | None = None,
        *,
        had_first: bool = False,
    ) -> None:
        self.folder = folder
        self.had_first = had_first
        self.error: TorrentLMError | None = None
        self.progress = Progress()
        self.urgency = Urgency.NORMAL
        self.handle = handle
        self._held_back = False
        self._rate = 0
        self._pump = pump
        self._owner = owner
        self._limit = limit
        self._dialled: set[Endpoint] = set()
        self._read_identity()
        self._finished = False
        self._flushed = False
        self._changed = trio.Event()
        pump.add(torrent_key(handle), self._on_alert)

    @property
    def info_hashes(self) -> tuple[InfoHash, ...]:
        """The 20-byte hashes by which peers greet and the DHT knows it: v1 first, then the truncated v2 (BEP 52)."""
        hashes = (self.v1, self.v2[:20] if self.v2 else None)
        return tuple(InfoHash(info_hash) for info_hash in hashes if info_hash)

    @property
    def names(self) -> tuple[InfoHash, ...]:
        """Every hash that peers may greet by: ``info_hashes``, and the wrong one by which some clients know hybrids."""
        return (*self.info_hashes, self._misnomer) if self._misnomer else self.info_hashes

    @property
    def complete(self) -> bool:
        """Every piece is verified and on disk."""
        return self._finished and self._flushed

    async def wait_metadata(self, within: float) -> bytes:
        """The torrent file (BEP 3, without piece layers), from a peer if it was added as a magnet.

        Raises NetworkError if none arrives ``within`` so many seconds.
        """
        with trio.move_on_after(within):
            await self._wait(lambda: self._torrent_info() is not None)
        info = self._torrent_info()
        if info is None:
            raise NetworkError(
                f"no peer sent the metadata of {self.name} within {within:.0f} s; "
                "check the magnet, and that a peer that has it is running and reachable"
            )
        return b"d4:info" + bytes(info.info_section()) + b"e"

    async def wait_complete(self, stall_timeout: float = 120.0) -> None:
        """Return once everything is verified and on disk.

        Raises StorageError or ArtifactError if that cannot be, and NetworkError after ``stall_timeout`` seconds without
        any progress; the transfer goes on nevertheless.
        """
        while not self.complete:
            before = self._mark()
            with trio.move_on_after(stall_timeout):
                await self._wait(lambda before=before: self.complete or self._mark() != before)  # type: ignore[misc]
                continue
            raise NetworkError(
                f"no peer has sent anything of {self.name} for {stall_timeout:.0f} s "
                f"({self.progress.peers} connected); check that a peer that has it is running and reachable"
            )
        if self.error:
            raise self.error

    def connect_peer(self, endpoint: Endpoint, info_hash: bytes | None = None) -> None:
        """Dial ``endpoint`` through the proxy. Returns at once; host names are passed over.

        ``info_hash`` is the one of ``info_hashes`` to greet by, the first if not given. A peer that greeted us by the
        v2 hash must be greeted by it: only then may it ask for hashes (BEP 52).
        """
        if not is_address(endpoint.host) or not self.handle.is_valid():
            return
        by_v2 = self.v2 is not None and info_hash == self.v2[:20]
        flags = _BY_V2 if by_v2 else _PLAIN_TCP
        self.handle.connect_peer((endpoint.host, endpoint.port), _CONNECT_SOURCE, flags)
        if endpoint not in self._dialled and len(self._dialled) < _MAX_HURRIED:
            self._dialled.add(endpoint)
            self._owner.hurry()

    @property
    def pressing(self) -> bool:
        """Whether background transfers have to make way for it."""
        if self.complete or self.error or self.urgency is Urgency.BACKGROUND:
            return False
        return self.urgency is Urgency.NOW or self.progress.download_rate > 0

    def urge(self, urgency: Urgency) -> None:
        """Say how much somebody waits for it from now on."""
        if urgency is not self.urgency:
            before, self.urgency = self.urgency, urgency
            if before is Urgency.NOW and self.handle.is_valid():
                self.handle.clear_piece_deadlines()
            self._set_deadlines()
            if before is Urgency.BACKGROUND:
                self.hold_back(False, 0)
            self._owner.reconsider()

    def hold_back(self, held: bool, rate: int) -> None:
        """Stop at once, dropping all connections, or go on with at most ``rate`` bytes per second (0: no limit)."""
        if not self.handle.is_valid():
            return
        if rate != self._rate:
            self._rate = rate
            self.handle.set_download_limit(rate)
        if held != self._held_back:
            self._held_back = held
            if held:
                self.handle.pause()
            else:
                self.handle.resume()

    def _set_deadlines(self) -> None:
        """In the file's order, all at once: whoever waits for a block waits for its last piece."""
        info = self._torrent_info()
        if self.urgency is Urgency.NOW and info is not None and not self.complete:
            for piece in range(min(info.num_pieces(), _MAX_DEADLINES)):
                self.handle.set_piece_deadline(piece, piece)

    async def recheck(self) -> None:
        """Hash everything on disk again and fetch what does not match. Returns when the check is through."""
        self._finished = self._flushed = False
        self.error = None
        checked = trio.Event()

        def on_alert(alert: Alert) -> None:
            if isinstance(alert, lt.torrent_checked_alert):
                checked.set()

        with self._pump.handle(torrent_key(self.handle), on_alert):
            self.handle.force_recheck()
            self._held_back = False
            self.handle.resume()  # paused, it would not be checked
            await self._wait(checked.is_set)

    def resume(self) -> None:
        """Go on after an error, such as a full disk; what was being written is asked for again."""
        self.error = None
        if self.handle.is_valid():
            self.handle.clear_error()
            self.handle.unset_flags(lt.torrent_flags.upload_mode)  # where libtorrent puts what it could not write
            if not self._held_back:
                self.handle.resume()  # it is paused if a read failed, too

    def stop_serving(self) -> None:
        """Neither give nor take anything until ``recheck``: what lies there is not what it should be."""
        self._finished = self._flushed = False
        if self.handle.is_valid():
            self.handle.pause()

    def close(self) -> None:
        """Called by the swarm when the torrent leaves the session."""
        self._pump.remove(torrent_key(self.handle), self._on_alert)
        self._fail(NetworkError(f"{self.name} was removed while something waited for it"))

    def update(self, status: Any) -> None:
        """Take over a fresh torrent_status."""
        self.progress = Progress(
            done=status.total_wanted_done,
            total=status.total_wanted,
            download_rate=status.download_payload_rate,
            upload_rate=status.upload_payload_rate,
            peers=status.num_peers,
            state=str(status.state),
        )
        self._notify()

    def _on_alert(self, alert: Alert) -> None:
        match alert:
            case lt.torrent_finished_alert():
                # Finished is said when the last piece is verified; it may still be on its way to the disk.
                self._finished = True
                self.handle.flush_cache()
            case lt.cache_flushed_alert():
                self._flushed = self._finished
                if self.complete:
                    self.update(self.handle.status(0))
                    self.urge(Urgency.NORMAL)
                    self._owner.reconsider()
            case lt.metadata_received_alert():
                self._read_identity()
                self._owner.renamed(self)
                self._set_deadlines()
                self._refuse_too_large()
            case lt.file_error_alert():
                self._fail(translate(alert.error, Path(self.folder, alert.filename()), self.name))
            case lt.torrent_error_alert() | lt.metadata_failed_alert():
                self._fail(translate(alert.error, self.folder, self.name))
        self._notify()

    def _refuse_too_large(self) -> None:
        size = self._torrent_info().total_size()
        if self._limit is not None and size > self._limit:
            self.handle.pause()
            self._fail(
                ArtifactError(f"{self.name} has {size:,} bytes, where {self._limit:,} are the most: not fetched")
            )

    def _fail(self, error: TorrentLMError) -> None:
        self._finished = self._flushed = False
        self.error = self.error or error
        self._notify()

    def _mark(self) -> tuple[object, ...]:
        """Differs whenever something moved."""
        return self.progress.state, self.progress.done, self._finished

    def _torrent_info(self) -> Any:
        return self.handle.torrent_file() if self.handle.is_valid() else None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _read_identity(self) -> None:
        hashes, info = self.handle.info_hashes(), self._torrent_info()
        self.v1 = hashes.v1.to_bytes() if hashes.has_v1() else None
        self.v2 = hashes.v2.to_bytes() if hashes.has_v2() else None
        self._misnomer = _misnomer(bytes(info.info_section())) if info and self.v1 and self.v2 else None
        self.name = (info.name() if info else self.handle.status().name) or str(hashes.v1)

    async def _wait(self, ready: Callable[[], bool]) -> None:
        while not ready():
            if self.error:
                raise self.error
            await self._changed.wait()


def _misnomer(info: bytes) -> InfoHash | None:
    try:
        return misnomer(info)
    except ValueError:
        return None  # bencoded less strictly than we do: not one of ours
