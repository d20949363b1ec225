"""The receiving side of one stream: reads on while there is something, and lets other tasks have their turn."""

from __future__ import annotations

import trio

from torrentlm.gateway.tcp import TcpStream


class Inlet:
    """Reads ``stream`` in as few calls as possible."""

    def __init__(self, stream: TcpStream) -> None:
        self._stream = stream
        self._reads = 0
        self._drained = False

    async def read(self, limit: int, reads: int) -> bytes:
        """The next bytes, at most ``limit``; b"" at the end.

        After ``reads`` full reads at the latest others have a turn.
        """
        if self._drained:
            await self._stream.readable()
            self._reads = 0
        elif self._reads >= reads:
            await trio.lowlevel.checkpoint()
            self._reads = 0
        while (data := self._stream.receive_nowait(limit)) is None:
            await self._stream.readable()
        self._reads += 1
        self._drained = len(data) < limit  # asking again at once would be in vain
        return data
