"""Where progress is shown: on a terminal, in a notebook, or as plain lines."""

import os
import sys

from rich.console import Console

from truestep.progress.lines import Lines
from truestep.progress.live import Live
from truestep.progress.notebook import Notebook
from truestep.progress.streams import is_terminal
from truestep.progress.terminal import Terminal

_terminal: Terminal | None = None


def outlet(lines: Lines) -> Live | Lines:
    """What suits standard output; on a terminal there is one display for all. Needs `CHANGES` until that is on.

    Args:
        lines: What suits it where there is neither a terminal nor a notebook.
    """
    global _terminal
    if is_terminal(sys.stdout) and os.environ.get("TERM") not in ("dumb", "unknown"):
        if _terminal is None or not _terminal.is_on:
            _terminal = Terminal()
        return _terminal
    return Notebook() if Console().is_jupyter else lines
