"""What the engine logs, as the command shows it."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

SCRIPT = """
import io, logging, sys
from torrentlm.cli import log
log.configure()
logger = logging.getLogger("torrentlm.holder")
logger.info("a step")
logger.warning("two\\nlines")
try:
    raise ValueError("by\\nzero")
except ValueError:
    logger.exception("session %s failed", "ab")
sys.stderr = io.StringIO()
logger.warning("later")
sys.stdout.write(sys.stderr.getvalue())
"""


def logged(debug: str) -> tuple[str, str]:
    environment = os.environ | {"TORRENTLM_DEBUG": debug}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return found.stdout, found.stderr


def test_warnings_are_a_line_each():
    out, err = logged("")
    assert err.splitlines() == [
        "torrentlm: two lines",
        "torrentlm: session ab failed (ValueError: by zero); set TORRENTLM_DEBUG=1 to see where",
    ]
    assert out == "torrentlm: later\n"  # where sys.stderr is now, as a live display wants it


def test_debug_shows_everything():
    _, err = logged("1")
    assert "INFO torrentlm.holder: a step" in err
    assert "Traceback" in err and "ValueError: by" in err


def test_a_warning_stands_above_the_live_display(monkeypatch: pytest.MonkeyPatch):
    import logging

    from rich.console import Console

    from torrentlm.cli import log
    from torrentlm.cli.live import live_view

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, beside = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", beside)
    logger = logging.Logger("torrentlm.holder")
    handler = log._Stderr()
    handler.setFormatter(log._OneLine())
    logger.addHandler(handler)
    with live_view(Console(file=terminal, width=60, force_terminal=True)):
        logger.warning("a disk is slow")
    assert "torrentlm: a disk is slow\n" in terminal.getvalue()
    assert beside.getvalue() == ""
