"""Whole nodes, libtorrent behind its gateway, as they look from outside: connections, listeners, frames between
pieces."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libtorrent as lt
import pytest
import trio

from tests.swarm.nodes import BareNode, in_trio, make_block, open_node
from torrentlm.errors import NetworkError
from torrentlm.gateway.pipe import Pipe
from torrentlm.records import Endpoint, InfoHash, SessionId
from torrentlm.wire.messages import Close, Step, Tensor, Want
from torrentlm.wire.peerwire import GREETING_BYTES, Demux, Greeting, Kind

LISTEN, ESTABLISHED = "0A", "01"
BY_V2 = 0x80
GREETED_BY = {"v1": 0, "v2": BY_V2}


def tcp_table() -> list[tuple[tuple[str, int], tuple[str, int], str, int]]:
    """(local, remote, state, inode) of every IPv4 TCP socket of this machine."""
    rows = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        rows.append((_address(fields[1]), _address(fields[2]), fields[3], int(fields[9])))
    return rows


def _address(field: str) -> tuple[str, int]:
    host, port = field.split(":")
    return ".".join(str(byte) for byte in reversed(bytes.fromhex(host))), int(port, 16)


def connections_at(port: int) -> int:
    """Established TCP connections whose one end is this listening port, seen from the listening side."""
    return sum(local[1] == port and state == ESTABLISHED for local, _, state, _ in tcp_table())


def own_inodes() -> set[int]:
    """Socket inodes of this process."""
    inodes = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(int(target[8:-1]))
    return inodes


class Recorder:
    """A forwarder in front of a node that keeps what passes, per connection and direction."""

    def __init__(self, target: Endpoint) -> None:
        self.target = target
        self.recordings: list[tuple[bytearray, bytearray]] = []
        self.endpoint: Endpoint

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.endpoint = Endpoint("127.0.0.1", listener.socket.getsockname()[1])
        task_status.started()
        await trio.serve_listeners(self._serve, [listener])

    async def _serve(self, near: trio.SocketStream) -> None:
        there, back = bytearray(), bytearray()
        self.recordings.append((there, back))
        far = await trio.open_tcp_stream(self.target.host, self.target.port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, near, far, there)
            nursery.start_soon(self._copy, far, near, back)

    @staticmethod
    async def _copy(source: trio.SocketStream, sink: trio.SocketStream, record: bytearray) -> None:
        try:
            while data := await source.receive_some(65536):
                record.extend(data)
                await sink.send_all(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await sink.aclose()


def contents(recording: bytearray) -> tuple[int, int]:
    """(bytes of piece messages, number of non-empty frames) in one direction of a recorded connection."""
    Greeting.parse(bytes(recording[:GREETING_BYTES]))
    parts = Demux(77).feed(bytes(recording[GREETING_BYTES:]))
    passed = b"".join(part.data for part in parts if part.kind in (Kind.RUN, Kind.OPEN))
    pieces = position = 0
    while position + 5 <= len(passed):
        length = int.from_bytes(passed[position : position + 4], "big")
        pieces += length if length and passed[position + 4] == 7 else 0
        position += 4 + length
    return pieces, sum(part.kind is Kind.FRAME and len(part.data) > 0 for part in parts)


def step(number: int) -> Step:
    return Step(
        SessionId(bytes(16)), 0, number, 0, Want.NONE, None, (Tensor("F32", (1, 1, 2048), os.urandom(8192)),), 1
    )


async def talk(near: Pipe, far: Pipe, count: int) -> None:
    """``count`` steps there and back, each answered before the next."""
    for number in range(count):
        sent = step(number)
        await near.send(sent, 1)
        stream, received = await far.receive()
        assert isinstance(received, Step) and bytes(received.tensors[0].data) == sent.tensors[0].data
        await far.send(received, stream)
        await near.receive()


async def pipes_of(one: BareNode, other: BareNode) -> tuple[Pipe, Pipe]:
    """Both ends of the pipe that a transfer brought about."""
    await one.gateway.incoming.receive()
    await other.gateway.incoming.receive()
    return one.gateway.pipes[other.identity.node], other.gateway.pipes[one.identity.node]


@in_trio(60)
async def test_pieces_and_activations_share_the_only_connection(tmp_path: Path) -> None:
    torrent, content = make_block(tmp_path / "a", 40_000_000)
    async with open_node() as holder, open_node() as joiner, trio.open_nursery() as nursery:
        recorder = Recorder(holder.endpoint)
        await nursery.start(recorder.run)
        holder.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        transfer = joiner.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")
        transfer.connect_peer(recorder.endpoint)
        near, far = await pipes_of(joiner, holder)
        counts: list[int] = []
        with trio.CancelScope() as counting:
            async with trio.open_nursery() as meanwhile:

                async def count() -> None:
                    while True:
                        counts.append(connections_at(holder.endpoint.port) + connections_at(joiner.endpoint.port))
                        await trio.sleep(0.02)

                meanwhile.start_soon(count)
                await talk(near, far, 20)
                await transfer.wait_complete(20)
                await talk(near, far, 20)
                counting.cancel()
        assert (tmp_path / "b" / torrent.name).read_bytes() == content
        assert set(counts) == {1}
        assert len(recorder.recordings) == 1
        there, back = recorder.recordings[0]
        assert contents(there)[1] >= 40 and contents(back)[1] >= 40
        assert contents(back)[0] >= len(content) > contents(there)[0]
        nursery.cancel_scope.cancel()


@in_trio(90)
async def test_many_torrents_have_a_connection_each_at_most_and_one_pipe_that_outlives_them(tmp_path: Path) -> None:
    blocks = [make_block(tmp_path / "a", 4_000_000) for _ in range(6)]
    async with open_node() as holder, open_node() as joiner:
        transfers = []
        for torrent, _ in blocks:
            holder.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
            transfers.append(joiner.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b"))
        near = await joiner.gateway.pipe_to(holder.endpoint, InfoHash(blocks[0][0].v1))
        far = await holder.gateway.incoming.receive()
        most, parted = 0, trio.Event()
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal most
                while True:
                    for node in (holder, joiner):
                        torrents = [c.link.torrent for c in node.gateway.connections if c.attached]
                        most = max(most, len(torrents))
                        assert len(set(torrents)) == len(torrents)
                    await trio.sleep(0.01)

            async def keep_talking() -> None:
                while not parted.is_set():
                    await talk(near, far, 1)
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            nursery.start_soon(keep_talking)
            for transfer in transfers:
                transfer.connect_peer(holder.endpoint)
            for transfer in transfers:
                await transfer.wait_complete(30)
            # Two seeds have nothing to trade: their clients part, the pipe stays, on one connection.
            while len(joiner.gateway.connections) > 1 or len(holder.gateway.connections) > 1:
                await trio.sleep(0.05)
            await trio.sleep(0.2)
            parted.set()
        await talk(near, far, 20)
        assert most > 1
        assert joiner.gateway.pipes[near.peer] is near and holder.gateway.pipes[far.peer] is far
        assert connections_at(holder.endpoint.port) + connections_at(joiner.endpoint.port) == 1


@in_trio(60)
async def test_two_nodes_that_dial_each_other_keep_one_connection(tmp_path: Path) -> None:
    torrent, _ = make_block(tmp_path / "a", 60_000_000)
    async with open_node() as holder, open_node() as joiner:
        seeding = holder.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        transfer = joiner.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")
        transfer.connect_peer(holder.endpoint)
        seeding.connect_peer(joiner.endpoint)
        most = 0
        while not transfer.complete:
            most = max(most, connections_at(holder.endpoint.port) + connections_at(joiner.endpoint.port))
            await trio.sleep(0.02)
        assert most == 1


@in_trio(30)
async def test_libtorrent_has_no_listening_tcp_socket(tmp_path: Path) -> None:
    before = own_inodes()
    torrent, _ = make_block(tmp_path / "a", 100_000)
    async with open_node() as node:
        node.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a")
        await trio.sleep(1)
        new = own_inodes() - before
        listening = {local for local, _, state, inode in tcp_table() if state == LISTEN and inode in new}
        assert listening == {("127.0.0.1", node.endpoint.port), ("127.0.0.1", node.gateway.proxy.port)}


@pytest.mark.parametrize("name", ["v1", "v2"])
@in_trio(60)
async def test_a_plain_client_fetches_from_us(tmp_path: Path, plain_session: Callable[..., Any], name: str) -> None:
    torrent, content = make_block(tmp_path / "a")
    async with open_node() as holder:
        holder.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        handle = add(plain_session(), torrent.to_bytes(), tmp_path / "b")
        handle.connect_peer(("127.0.0.1", holder.endpoint.port), 0, GREETED_BY[name])
        await until(lambda: handle.status().is_seeding)
        assert not holder.gateway.pipes
    handle.flush_cache()
    await until(lambda: (tmp_path / "b" / torrent.name).read_bytes() == content)


@pytest.mark.parametrize("name", ["v1", "v2"])
@in_trio(60)
async def test_we_fetch_from_a_plain_client(tmp_path: Path, plain_session: Callable[..., Any], name: str) -> None:
    torrent, content = make_block(tmp_path / "a")
    session = plain_session()
    add(session, torrent.to_bytes(), tmp_path / "a")
    info_hash = InfoHash(torrent.v1 if name == "v1" else torrent.v2[:20])
    async with open_node() as joiner:
        transfer = joiner.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")
        joiner.swarm.connect_peer(info_hash, Endpoint("127.0.0.1", session.listen_port()))
        await transfer.wait_complete(30)
    assert (tmp_path / "b" / torrent.name).read_bytes() == content


@pytest.mark.parametrize("name", ["v1", "v2"])
@in_trio(60)
async def test_two_nodes_by_either_name(tmp_path: Path, name: str) -> None:
    torrent, content = make_block(tmp_path / "a")
    info_hash = InfoHash(torrent.v1 if name == "v1" else torrent.v2[:20])
    async with open_node() as holder, open_node() as joiner:
        holder.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        transfer = joiner.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")
        joiner.swarm.connect_peer(info_hash, holder.endpoint)
        await transfer.wait_complete(30)
        near = await joiner.gateway.pipe_to(holder.endpoint, info_hash)
        far = await holder.gateway.incoming.receive()
        await talk(near, far, 3)
    assert (tmp_path / "b" / torrent.name).read_bytes() == content


@in_trio(60)
async def test_a_client_with_default_settings_falls_back_to_plain_tcp(
    tmp_path: Path, plain_session: Callable[..., Any]
) -> None:
    """It tries uTP, then an encrypted greeting, which is closed at once, then what we speak."""
    torrent, _ = make_block(tmp_path / "a")
    async with open_node() as holder:
        holder.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        handle = add(
            plain_session(enable_outgoing_utp=True, out_enc_policy=1, min_reconnect_time=1),
            torrent.to_bytes(),
            tmp_path / "b",
        )
        handle.connect_peer(("127.0.0.1", holder.endpoint.port))
        await until(lambda: handle.status().is_seeding)


@in_trio(60)
async def test_a_restarted_peer_gets_a_new_pipe(tmp_path: Path) -> None:
    torrent, _ = make_block(tmp_path / "a")
    async with open_node() as holder:
        holder.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        for _ in range(2):
            async with open_node() as joiner:
                near = await joiner.gateway.pipe_to(holder.endpoint, InfoHash(torrent.v1))
                far = await holder.gateway.incoming.receive()
                await near.send(Close(SessionId(bytes(16))))
                await far.receive()
            with trio.fail_after(5):
                await far.closed.wait()
            with pytest.raises(NetworkError):
                await far.send(Close(SessionId(bytes(16))))


def add(session: Any, torrent: bytes, folder: Path) -> Any:
    """Start a torrent in a plain libtorrent session; what lies in ``folder`` is checked first."""
    params = lt.load_torrent_buffer(torrent)
    params.save_path = str(folder)
    params.flags = 0
    return session.add_torrent(params)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.05)
