"""Ordinary clients, as Debian packages them, against our node: aria2 and qBittorrent, both ways, byte for byte.

Skipped where they are not installed (``apt-get install aria2 qbittorrent-nox``). Both are kept on loopback by their
own settings.
"""

from __future__ import annotations

import json
import shutil
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from subprocess import DEVNULL
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
import trio

from tests.swarm.nodes import in_trio, make_block, open_node
from torrentlm import bencode
from torrentlm.manifest.torrent import Torrent
from torrentlm.records import Endpoint

START_LIMIT = 20.0


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@asynccontextmanager
async def tracker(peers: list[Endpoint]) -> AsyncIterator[str]:
    """An HTTP tracker that knows these peers; aria2 has no other way to be told. Its URL."""
    listed = [{"ip": peer.host, "port": peer.port, "peer id": b"-XX0000-" + b"x" * 12} for peer in peers]
    body = bencode.encode({"interval": 60, "peers": listed})

    async def serve(stream: trio.SocketStream) -> None:
        while not (await stream.receive_some(4096)).endswith(b"\r\n\r\n"):
            pass
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
        await stream.send_all(head + body)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}/announce"
        nursery.cancel_scope.cancel()


# -- aria2 -------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def aria2(torrent: Path, folder: Path, announce: str) -> AsyncIterator[None]:
    """aria2 with one torrent, fetching or seeding."""
    command = [
        "aria2c", "--no-conf", "--quiet", f"--dir={folder}", "--interface=127.0.0.1", f"--listen-port={free_port()}",
        "--enable-dht=false", "--enable-dht6=false", "--bt-enable-lpd=false", "--enable-peer-exchange=false",
        f"--bt-tracker={announce}", "--follow-torrent=false", "--seed-ratio=0.0", "--allow-overwrite=true",
        "--check-integrity=true", str(torrent),
    ]  # fmt: skip
    async with running(command):
        yield


@needs("aria2c")
@in_trio(60)
async def test_aria2_fetches_from_us(tmp_path: Path) -> None:
    torrent, content = make_block(tmp_path / "a")
    file = write(torrent, tmp_path)
    async with open_node() as holder, tracker([holder.endpoint]) as announce:
        holder.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        async with aria2(file, tmp_path / "b", announce):
            await until_there(tmp_path / "b" / torrent.name, content)


@needs("aria2c")
@in_trio(60)
async def test_we_fetch_from_aria2(tmp_path: Path) -> None:
    """It dials us: greeted by the torrent's right name, it would not know what we mean."""
    torrent, content = make_block(tmp_path / "a")
    file = write(torrent, tmp_path)
    async with open_node() as joiner, tracker([joiner.endpoint]) as announce:
        transfer = joiner.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")
        async with aria2(file, tmp_path / "a", announce):
            await transfer.wait_complete(40)
    assert (tmp_path / "b" / torrent.name).read_bytes() == content


# -- qBittorrent -------------------------------------------------------------------------------------------------------

SETTINGS = r"""
[LegalNotice]
Accepted=true
[BitTorrent]
Session\DHTEnabled=false
Session\LSDEnabled=false
Session\PeXEnabled=false
Session\QueueingSystemEnabled=false
Session\Interface=lo
Session\InterfaceAddress=127.0.0.1
Session\Port={port}
[Network]
PortForwardingEnabled=false
[Preferences]
Connection\ResolvePeerCountries=false
Connection\UPnP=false
WebUI\Address=127.0.0.1
WebUI\CSRFProtection=false
WebUI\LocalHostAuth=false
WebUI\Port={web_port}
WebUI\UseUPnP=false
"""


class QBittorrent:
    """A running qBittorrent, told what to do over its web interface."""

    def __init__(self, endpoint: Endpoint, web: str) -> None:
        self.endpoint = endpoint
        self._web = web

    async def add(self, torrent: bytes, folder: Path, peer: Endpoint | None = None) -> None:
        """Start a torrent; what lies in ``folder`` is checked first."""
        boundary = uuid.uuid4().hex
        fields = {"savepath": str(folder), "root_folder": "false"}
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()
        ]
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="torrents"; filename="x.torrent"\r\n'
        head += "Content-Type: application/x-bittorrent\r\n\r\n"
        body = "".join(parts).encode() + head.encode() + torrent + f"\r\n--{boundary}--\r\n".encode()
        await self._post("torrents/add", body, f"multipart/form-data; boundary={boundary}")
        while not (known := json.loads(await self._post("torrents/info"))):
            await trio.sleep(0.1)
        if peer is not None:
            fields = {"hashes": known[0]["hash"], "peers": str(peer)}
            await self._post("torrents/addPeers", urlencode(fields).encode())

    async def until_seeding(self) -> None:
        while not all(each["progress"] == 1 for each in json.loads(await self._post("torrents/info"))):
            await trio.sleep(0.1)

    async def ready(self) -> None:
        with trio.fail_after(START_LIMIT):
            while not await self._answers():
                await trio.sleep(0.1)

    async def _answers(self) -> bool:
        try:
            await self._post("app/version")
        except URLError:
            return False
        return True

    async def _post(self, path: str, body: bytes = b"", kind: str = "application/x-www-form-urlencoded") -> bytes:
        request = Request(f"{self._web}/api/v2/{path}", body, {"Content-Type": kind})

        def ask() -> bytes:
            with urlopen(request, timeout=10) as answer:
                data: bytes = answer.read()
                return data

        return await trio.to_thread.run_sync(ask)


@asynccontextmanager
async def qbittorrent(profile: Path) -> AsyncIterator[QBittorrent]:
    port, web_port = free_port(), free_port()
    folder = profile / "qBittorrent" / "config"
    folder.mkdir(parents=True)
    (folder / "qBittorrent.conf").write_text(SETTINGS.format(port=port, web_port=web_port))
    async with running(["qbittorrent-nox", f"--profile={profile}", f"--webui-port={web_port}"]):
        client = QBittorrent(Endpoint("127.0.0.1", port), f"http://127.0.0.1:{web_port}")
        await client.ready()
        yield client


@needs("qbittorrent-nox")
@in_trio(120)
async def test_qbittorrent_fetches_from_us(tmp_path: Path) -> None:
    torrent, content = make_block(tmp_path / "a")
    async with open_node() as holder, qbittorrent(tmp_path / "profile") as client:
        holder.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        await client.add(torrent.to_bytes(), tmp_path / "b", holder.endpoint)
        await until_there(tmp_path / "b" / torrent.name, content)


@needs("qbittorrent-nox")
@in_trio(120)
async def test_we_fetch_from_qbittorrent(tmp_path: Path) -> None:
    torrent, content = make_block(tmp_path / "a")
    async with open_node() as joiner, qbittorrent(tmp_path / "profile") as client:
        await client.add(torrent.to_bytes(), tmp_path / "a")
        await client.until_seeding()
        transfer = joiner.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")
        transfer.connect_peer(client.endpoint)
        await transfer.wait_complete(60)
    assert (tmp_path / "b" / torrent.name).read_bytes() == content


# -- both --------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running(command: list[str]) -> AsyncIterator[None]:
    """A program for as long as the context lasts."""
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, stdin=b"", stdout=DEVNULL, stderr=DEVNULL, check=False)
        process = await nursery.start(run, command)
        yield
        process.terminate()
        with trio.move_on_after(10):
            await process.wait()
        nursery.cancel_scope.cancel()


def write(torrent: Torrent, folder: Path) -> Path:
    path = folder / "block.torrent"
    path.write_bytes(torrent.to_bytes())
    return path


async def until_there(path: Path, content: bytes) -> None:
    """The file is complete, byte for byte."""
    file = trio.Path(path)
    while not await file.exists() or await file.read_bytes() != content:
        await trio.sleep(0.2)
