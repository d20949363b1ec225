"""A client in a lab's host: ``MAGNET DATA``. Asks again and again until there is a route; prints one line when the
first token is here.
"""

from __future__ import annotations

import contextlib
import sys
import time

import torrentlm
from torrentlm.errors import NetworkError, NoHolderError

PROMPT = "Once upon a time"
LIMIT_S = 900.0


def main() -> int:
    magnet, data = sys.argv[1:]
    until = time.monotonic() + LIMIT_S
    with torrentlm.connect(magnet, data=data, port=0, dht_bootstrap=["none"]) as model:
        while time.monotonic() < until:
            with contextlib.suppress(NetworkError, NoHolderError):  # a route is waited for half a minute
                for _ in model.generate(PROMPT, max_new_tokens=1, stream=True):
                    break
                print("token", flush=True)
                return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
