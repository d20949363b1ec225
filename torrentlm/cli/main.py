"""The entry point, almost free of imports: Ctrl-C while the rest is imported ends as quietly as any other."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Entry point of the installed command."""
    try:
        from torrentlm.cli.parent import end_with_parent

        end_with_parent()
        from torrentlm.cli import commands, log

        log.configure()
        status = commands.run()
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
