"""The node's one libtorrent session, wholly behind the gateway's SOCKS5 proxy."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import libtorrent as lt
import trio

from torrentlm.errors import ArtifactError
from torrentlm.manifest.magnet import Magnet
from torrentlm.records import Endpoint, InfoHash
from torrentlm.swarm.addresses import is_address, loopback_only
from torrentlm.swarm.alerts import Alert, AlertPump, torrent_key
from torrentlm.swarm.dht import Dht
from torrentlm.swarm.identity import Identity
from torrentlm.swarm.settings import IDLE_TICK_MS, PUBLIC_BOOTSTRAP, TICK_MS, Proxy, session_settings
from torrentlm.swarm.transfer import Transfer, Urgency

_UPDATE_INTERVAL = 0.5
_IDLE_INTERVAL = 2.0
"""The same while nothing comes or goes: then libtorrent looks at its clock less often, too."""
NICER = 5
"""By how much libtorrent's threads give way to the gateway's; see tools/bench pipe."""
_HURRY_INTERVAL = 0.1
_NO_DEFAULT_PLUGINS = 0
_PLUGINS = ("ut_metadata", "smart_ban")
_MAX_TORRENT_FILE = 32 << 20
_FLAGS = (
    lt.torrent_flags.update_subscribe
    | lt.torrent_flags.disable_dht
    | lt.torrent_flags.disable_lsd
    | lt.torrent_flags.disable_pex
)
"""Neither auto-managed nor paused: runs at once. Announcing is ours (``Dht``): libtorrent would spread dead ports."""
_SEED_FLAGS = lt.torrent_flags.seed_mode | lt.torrent_flags.no_verify_files


class Swarm:
    """Torrents and the DHT behind ``proxy``. ``run`` is a service of the node's nursery; the rest works while it runs.

    ``canonical`` and ``connect_peer`` are what the gateway needs to hand an incoming connection to libtorrent. Rate
    limits in bytes per second, 0 for none, hold for peers of the local network too; ``background_rate`` is what all
    background transfers together may download, and may be changed at any time.
    """

    def __init__(
        self,
        proxy: Proxy,
        identity: Identity,
        bootstrap: Sequence[Endpoint] = PUBLIC_BOOTSTRAP,
        *,
        download_limit: int = 0,
        upload_limit: int = 0,
    ) -> None:
        if loopback_only():
            # The gateway refuses foreign addresses; a name would be looked up before anybody is asked.
            bootstrap = [endpoint for endpoint in bootstrap if is_address(endpoint.host) or endpoint.is_loopback]
        self._settings = session_settings(proxy, bootstrap)
        self._settings |= {"download_rate_limit": download_limit, "upload_rate_limit": upload_limit}
        self._background_rate = 0
        self._bootstrap = tuple(bootstrap)
        self._identity = identity
        self._transfers: dict[InfoHash, Transfer] = {}
        self._session: Any = None
        self._hurried = trio.Event()
        self._added = trio.Event()
        self._tick = TICK_MS
        self._pump: AlertPump
        self.dht: Dht

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the session until cancelled; whatever was fetched by then is on disk when this returns."""
        # libtorrent's threads inherit the priority of the one that starts them.
        with ThreadPoolExecutor(1, initializer=_give_way) as starter:
            self._session = starter.submit(_open_session, self._settings).result()
        self._pump = AlertPump(self._session)
        self.dht = Dht(self._session, self._pump, self._identity)
        try:
            async with trio.open_nursery() as nursery:
                self._pump.add("updates", self._on_updates)
                await nursery.start(self._pump.run)
                nursery.start_soon(self._request_updates)
                nursery.start_soon(self._hurry)
                nursery.start_soon(self.dht.run, self._bootstrap)
                task_status.started()
        finally:
            for transfer in self.transfers:
                self._forget(transfer)
            with trio.CancelScope(shield=True):
                await self._close_session()

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        return tuple(dict.fromkeys(self._transfers.values()))

    @property
    def background_rate(self) -> int:
        """Bytes per second of all background transfers together, 0 for no limit."""
        return self._background_rate

    @background_rate.setter
    def background_rate(self, rate: int) -> None:
        if rate != self._background_rate:
            self._background_rate = rate
            self.reconsider()

    def add_torrent(
        self,
        torrent: bytes | Magnet,
        folder: Path,
        *,
        verified: bool = False,
        limit: int | None = None,
        urgency: Urgency = Urgency.NORMAL,
    ) -> Transfer:
        """Start a torrent whose content lies, or shall lie, in ``folder``; the one already there if it runs.

        ``verified``: the content is known to be good and is seeded without a check; otherwise what is on disk is hashed
        first. A magnet whose torrent turns out to have more than ``limit`` bytes fails instead of being fetched. One
        that runs already becomes as urgent as asked for, if it was less.
        Raises ArtifactError for a damaged torrent file.
        """
        params = _params_of_magnet(torrent) if isinstance(torrent, Magnet) else _params_of_file(torrent)
        hashes = params.ti.info_hashes() if params.ti else params.info_hashes
        for info_hash in (hashes.v1.to_bytes(), hashes.v2.to_bytes()[:20]):
            if known := self._transfers.get(InfoHash(info_hash)):
                if urgency > known.urgency:
                    known.urge(urgency)
                return known
        params.save_path = str(folder)
        params.flags = _FLAGS | (_SEED_FLAGS if verified else 0)
        try:
            handle = self._session.add_torrent(params)
        except RuntimeError as error:
            raise ArtifactError(f"this torrent cannot be started ({error})") from error
        transfer = Transfer(handle, self._pump, folder, self, limit, had_first=verified)
        self.renamed(transfer)
        transfer.urge(urgency)
        self._added.set()
        return transfer

    def remove(self, transfer: Transfer) -> None:
        """Stop a torrent; its files stay."""
        self._forget(transfer)
        if self._session is not None:  # all of them end with it
            self._session.remove_torrent(transfer.handle)
            self.reconsider()

    def canonical(self, info_hash: bytes) -> InfoHash | None:
        """The hash by which libtorrent greets for this torrent (v1 if it has one); None if it is not ours."""
        transfer = self._transfers.get(InfoHash(info_hash))
        return transfer.info_hashes[0] if transfer else None

    def had_first(self, info_hash: bytes) -> bool:
        """Whether it was all here, and known to be good, when it was started."""
        transfer = self._transfers.get(InfoHash(info_hash))
        return transfer is not None and transfer.had_first

    def connect_peer(self, info_hash: bytes, endpoint: Endpoint) -> None:
        """Have libtorrent dial ``endpoint`` through the proxy, and greet it by this hash."""
        transfer = self._transfers.get(InfoHash(info_hash))
        if transfer:
            transfer.connect_peer(endpoint, info_hash)
            self.hurry()

    def hurry(self) -> None:
        """Have libtorrent dial the peers that it was just told of now, not at its next full second."""
        self._hurried.set()

    def reconsider(self) -> None:
        """Background transfers wait while any other is pressing, and share ``background_rate`` otherwise.

        libtorrent's priorities share out what its own limits allow, which is nothing to go by where the network is the
        limit, and deadlines order the pieces of one torrent; between torrents, nothing yields but by being paused.
        """
        transfers = self.transfers
        waiting = any(transfer.pressing for transfer in transfers)
        background = [each for each in transfers if each.urgency is Urgency.BACKGROUND and not each.complete]
        for transfer in background:
            rate = max(1, self._background_rate // len(background)) if self._background_rate else 0
            transfer.hold_back(waiting, rate)

    def renamed(self, transfer: Transfer) -> None:
        """Find the transfer by all names that it has by now."""
        for info_hash in transfer.names:
            self._transfers[info_hash] = transfer

    def _forget(self, transfer: Transfer) -> None:
        transfer.close()
        for info_hash in transfer.names:
            self._transfers.pop(info_hash, None)

    async def _request_updates(self) -> None:
        """Ask for the progress of whatever changed; the answer comes as an alert."""
        while True:
            self._session.post_torrent_updates(0)
            with trio.move_on_after(_UPDATE_INTERVAL if self._busy else _IDLE_INTERVAL):
                await self._added.wait()
            if self._added.is_set():
                self._added = trio.Event()
                await trio.sleep(_UPDATE_INTERVAL)
            self._set_tick(TICK_MS if self._busy else IDLE_TICK_MS)

    @property
    def _busy(self) -> bool:
        """Something comes or goes, or soon may under a limit, which libtorrent shares out at each tick."""
        limited = self._settings["upload_rate_limit"] or self._settings["download_rate_limit"]
        return bool(limited) or any(not each.complete or each.progress.upload_rate for each in self.transfers)

    def _set_tick(self, tick: int) -> None:
        if tick != self._tick:
            self._tick = tick
            self._session.apply_settings({"tick_interval": tick})

    async def _hurry(self) -> None:
        """A negative tick interval makes libtorrent do at once, and each millisecond, what it does once a second.

        Dialling is among that: two ends that each wait half a second for it would make a second of every first contact.
        """
        while True:
            await self._hurried.wait()
            self._hurried = trio.Event()
            self._session.apply_settings({"tick_interval": -1})
            await trio.sleep(1.5 * TICK_MS / 1000)
            self._tick = TICK_MS
            self._session.apply_settings({"tick_interval": TICK_MS})
            await trio.sleep(_HURRY_INTERVAL)

    def _on_updates(self, alert: Alert) -> None:
        by_key = {torrent_key(transfer.handle): transfer for transfer in self.transfers}
        for status in alert.status:
            if transfer := by_key.get(torrent_key(status.handle)):
                transfer.update(status)
        self.reconsider()

    async def _close_session(self) -> None:
        """libtorrent's destructor flushes to disk and joins its threads, so it runs in a thread of ours."""
        holder = [self._session]
        self._session = None
        self.dht.close()
        self._pump.close()
        await trio.to_thread.run_sync(holder.clear)


def _give_way() -> None:
    """Lower this thread's priority: pieces can wait, activations that wait for the gateway's thread cannot."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICER)


def _open_session(settings: dict[str, Any]) -> Any:
    session: Any = lt.session(cast(Any, settings), _NO_DEFAULT_PLUGINS)
    for plugin in _PLUGINS:
        session.add_extension(plugin)
    # Peers on local networks are in a class of their own, which the global rate limits do not bind.
    limits = {"download_limit": settings["download_rate_limit"], "upload_limit": settings["upload_rate_limit"]}
    session.set_peer_class(session.local_peer_class_id, session.get_peer_class(session.local_peer_class_id) | limits)
    return session


def _params_of_file(torrent: bytes) -> Any:
    if len(torrent) > _MAX_TORRENT_FILE:
        limit = _MAX_TORRENT_FILE >> 20
        raise ArtifactError(f"a torrent file of {len(torrent) >> 20} MiB is refused; the limit is {limit} MiB")
    try:
        return lt.load_torrent_buffer(torrent)
    except RuntimeError as error:
        raise ArtifactError(f"this is not a torrent file ({error})") from error


def _params_of_magnet(magnet: Magnet) -> Any:
    params = lt.add_torrent_params()
    v1 = lt.sha1_hash(magnet.v1) if magnet.v1 else lt.sha1_hash()
    v2 = lt.sha256_hash(magnet.v2) if magnet.v2 else lt.sha256_hash()
    params.info_hashes = lt.info_hash_t(v1, v2)
    params.name = magnet.name
    return params
