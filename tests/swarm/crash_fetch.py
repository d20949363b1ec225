"""Run by test_disk.py: fetches block files into a store that is too small for all of them, until it is killed.

python crash_fetch.py DATA TORRENTS HOST:PORT
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.swarm.shelves import open_keeper
from torrentlm.manifest.torrent import Torrent
from torrentlm.records import Endpoint


async def main(data: Path, torrents: list[Torrent], endpoint: Endpoint) -> None:
    async with open_keeper(data, 4 * torrents[0].size, download_limit=1_000_000) as keeper:
        files = keeper.model(torrents, [endpoint])
        while True:
            print("fetching", flush=True)
            await files.fetch(random.sample(files._manifest.files, 2))


if __name__ == "__main__":
    found = [Torrent.from_bytes(path.read_bytes()) for path in sorted(Path(sys.argv[2]).glob("*.torrent"))]
    trio.run(main, Path(sys.argv[1]), found, Endpoint.parse(sys.argv[3]))
