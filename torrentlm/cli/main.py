"""The entry point, almost free of imports: Ctrl-C while the rest is imported ends as quietly as any other."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, NoReturn


def main() -> NoReturn:
    """Entry point of the installed command."""
    sys.unraisablehook = _again
    try:
        from torrentlm.cli.parent import end_with_parent

        end_with_parent()
        from torrentlm.cli import commands, log

        log.configure()
        status = commands.run()
    except KeyboardInterrupt:
        status = 130
    # Python puts the system's own handler back while it ends: one that comes then would kill, and hide the status.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)


def _again(report: Any) -> None:
    """Python drops a KeyboardInterrupt that meets one of its own callbacks, such as an import's: deliver it again."""
    if report.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(report)
