"""The proxy that only this process's client may use."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.swarm.nodes import in_trio
from tests.unit.gateway.fakes import Wire, dial_proxy, dial_public, fake_node
from torrentlm.gateway.socks import pack_endpoint, unwrap_datagram, wrap_datagram
from torrentlm.records import Endpoint


@in_trio(10)
async def test_it_listens_on_loopback_only() -> None:
    async with fake_node() as node:
        assert node.gateway.proxy.host == "127.0.0.1"


@in_trio(10)
async def test_a_wrong_password_is_refused() -> None:
    async with fake_node() as node:
        with pytest.raises(PermissionError):
            await dial_proxy(node.gateway.proxy, Endpoint("127.0.0.1", 9), password="guess")


@in_trio(10)
async def test_no_password_is_refused() -> None:
    async with fake_node() as node:
        stream = await trio.open_tcp_stream(node.gateway.proxy.host, node.gateway.proxy.port)
        await stream.send_all(b"\x05\x01\x00")
        assert await stream.receive_some(10) == b"\x05\xff"
        assert await Wire(stream).ended()


@in_trio(10)
async def test_every_process_makes_its_own_password() -> None:
    async with fake_node() as one, fake_node() as other:
        assert one.gateway.proxy.password != other.gateway.proxy.password


@pytest.mark.parametrize("said", [b"", b"\x05", b"GET / HTTP/1.1\r\n\r\n", b"\x05\x02\x00\x02\x01\xff"])
@in_trio(10)
async def test_a_client_that_says_nothing_useful_is_closed_in_time(said: bytes) -> None:
    async with fake_node() as node:
        stream = await trio.open_tcp_stream(node.gateway.proxy.host, node.gateway.proxy.port)
        await stream.send_all(said)
        assert await Wire(stream).ended()


@pytest.mark.parametrize("host", ["8.8.8.8", "10.0.0.1"])
@in_trio(10)
async def test_nothing_but_loopback_is_dialed(host: str) -> None:
    async with fake_node() as node:
        with pytest.raises(ConnectionRefusedError, match="2"):
            await dial_proxy(node.gateway.proxy, Endpoint(host, 80))


@in_trio(10)
async def test_our_own_port_is_not_dialed() -> None:
    async with fake_node() as node:
        with pytest.raises(ConnectionRefusedError, match="5"):
            await dial_proxy(node.gateway.proxy, node.endpoint)


@in_trio(10)
async def test_what_is_no_greeting_is_tunnelled() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        assert await stream.receive_some(100) == b"GET /announce HTTP/1.0\r\n\r\n"
        await stream.send_all(b"HTTP/1.0 200 OK\r\n\r\n")
        await stream.aclose()

    async with fake_node() as node, trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        tracker = Endpoint("127.0.0.1", listener.socket.getsockname()[1])
        stream = await dial_proxy(node.gateway.proxy, tracker)
        await stream.send_all(b"GET /announce HTTP/1.0\r\n\r\n")
        assert await stream.receive_some(100) == b"HTTP/1.0 200 OK\r\n\r\n"
        assert await stream.receive_some(100) == b""
        nursery.cancel_scope.cancel()


@in_trio(10)
async def test_a_source_port_is_not_dialed_once_its_connection_is_gone() -> None:
    """libtorrent believes that an incoming peer's port is one to dial."""
    async with fake_node() as node:
        stranger = await dial_public(node.endpoint)
        await stranger.greet()
        _, source = await node.torrents.asked.receive()
        await stranger.close()
        await trio.sleep(0.6)
        with pytest.raises(ConnectionRefusedError, match="5"):
            await dial_proxy(node.gateway.proxy, source)


HOSTS = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)


@given(HOSTS, st.integers(0, 65535), st.binary(max_size=100))
def test_datagrams_round_trip(host: str, port: int, data: bytes) -> None:
    assert unwrap_datagram(wrap_datagram(Endpoint(host, port), data)) == (Endpoint(host, port), data)


@given(st.binary(max_size=40))
def test_other_datagrams_are_refused_with_a_reason(data: bytes) -> None:
    try:
        target, rest = unwrap_datagram(data)
    except ValueError:
        return
    assert data.endswith(rest) and 0 <= target.port < 65536


@pytest.mark.parametrize(
    "datagram", [b"", b"\0\0\1" + pack_endpoint(Endpoint("127.0.0.1", 1)), b"\0\0\0\x07" + bytes(20)]
)
def test_fragments_and_strangers(datagram: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        unwrap_datagram(datagram)
