"""What the client asks its proxy for besides peers, such as an HTTP tracker: bytes to and fro, unread."""

from __future__ import annotations

import trio

from torrentlm.errors import NetworkError
from torrentlm.gateway import tcp
from torrentlm.gateway.policy import Policy
from torrentlm.gateway.tcp import TcpStream
from torrentlm.records import Endpoint
from torrentlm.swarm.addresses import resolve

_CHUNK = 64 << 10


async def tunnel(client: TcpStream, target: Endpoint, head: bytes, policy: Policy) -> None:
    """Connect to ``target``, give it ``head`` and copy both ways until either side breaks or both have finished.

    NetworkError if it cannot be reached. The client's stream stays its owner's to close.
    """
    remote = await _dial_any(target, policy)
    try:
        await remote.send_all(head)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_copy, client, remote, nursery.cancel_scope)
            nursery.start_soon(_copy, remote, client, nursery.cancel_scope)
    finally:
        remote.close()


async def _dial_any(target: Endpoint, policy: Policy) -> TcpStream:
    for address in await resolve([target]):
        if policy.allows(address.host):
            with trio.move_on_after(policy.dial_limit):
                return await tcp.dial(address)
    raise NetworkError(f"{target} cannot be reached")


async def _copy(source: TcpStream, sink: TcpStream, broken: trio.CancelScope) -> None:
    try:
        while data := await source.receive(_CHUNK):
            await sink.send_all(data)
        sink.finish()
    except NetworkError:
        broken.cancel()
