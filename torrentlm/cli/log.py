"""What the engine logs, on standard error: a line for each warning, or with TORRENTLM_DEBUG=1 everything."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

EVERYTHING = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure() -> None:
    """Set up the root logger; once, by whoever owns the process."""
    debug = bool(os.environ.get("TORRENTLM_DEBUG"))
    handler = _Stderr()
    handler.setFormatter(logging.Formatter(EVERYTHING) if debug else _OneLine())
    logging.captureWarnings(capture=True)  # libraries' own remarks, which would bring a line of source with them
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler])


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment: a live display puts itself there, to print above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _OneLine(logging.Formatter):
    """``torrentlm: what happened (ValueError: why)``, without a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        said = record.getMessage()
        if record.exc_info and (error := record.exc_info[1]) is not None:
            said += f" ({type(error).__name__}: {error}".rstrip(": ") + "); set TORRENTLM_DEBUG=1 to see where"
        return f"torrentlm: {' '.join(said.split())}"
