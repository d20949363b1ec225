"""Run by test_crash.py: adds, verifies, uses and evicts block files in a loop, and is killed at random instants.

    python crash.py DATA KILLS SEED

Each round is a process of its own, forked so that it costs milliseconds. Afterwards the folder must open, and all that
it says it holds must match its hash. Prints what was seen, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from torrentlm.errors import StorageError
from torrentlm.manifest.torrent import Hasher
from torrentlm.records import Endpoint
from torrentlm.swarm.space import Space
from torrentlm.swarm.store import Store

BUDGET = 400_000
FILES = 12
LONGEST_S = 0.12


def content_of(number: int) -> bytes:
    return random.Random(number).randbytes(20_000 + 15_000 * number)


def name_of(content: bytes) -> str:
    hasher = Hasher(1 << 24)
    hasher.update_v2(content)
    return f"{hasher.finish().root.hex()}.safetensors"


CONTENTS = {name_of(content): content for content in map(content_of, range(FILES))}


def work(data: Path) -> None:
    """Until killed."""
    chance = random.Random()
    with Store(data) as store:
        space = Space(store, BUDGET)
        while True:
            name = chance.choice(list(CONTENTS))
            if store.holds(name):
                space.used([name])
                store.save_peers([Endpoint("127.0.0.1", chance.randrange(1, 60_000))])
                continue
            content = CONTENTS[name]
            for gone in space.make_room({name: len(content)}):
                space.withdraw(gone)
                space.remove(gone)
            space.promise({name: len(content)})
            with store.path(name).open("wb") as file:
                for at in range(0, len(content), 16_384):
                    file.write(content[at : at + 16_384])
                    file.flush()
            if not store.verify(name):
                raise AssertionError("what was just written does not match")
            space.take_back([name])
            space.used([name])


def check(data: Path, seen: Counter[str]) -> None:
    with Store(data) as store:
        held = store.held()
        for name in held:
            if not store.matches(name):
                raise AssertionError(f"{name} is said to be here and is not")
        files = {path.name for path in store.blocks.iterdir()}
        seen["held"] += len(held)
        seen["unfinished"] += len(files - held)
        seen["temporary"] += sum(path.name.endswith(".new") for path in data.iterdir())
        seen["over"] += sum(path.stat().st_size for path in store.blocks.iterdir()) > BUDGET
        Space(store, BUDGET).make_room({next(iter(CONTENTS)): 20_000})
        store.load_peers()


def main(data: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    Store(data).close()
    for _ in range(kills):
        child = os.fork()
        if not child:
            with contextlib.suppress(StorageError):
                work(data)
            os._exit(3)
        time.sleep(chance.uniform(0, LONGEST_S))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise AssertionError(f"ended by itself: {status}")
        seen["kills"] += 1
        check(data, seen)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
