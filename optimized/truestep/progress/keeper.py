"""What puts the cursor below a live display when the process that draws it has been killed."""

import subprocess
from contextlib import suppress
from typing import IO

# It waits for its input to end, which happens however the process at the other end dies, and has been told how far
# down it is. It does so in the background, and is nobody's child.
_SCRIPT = r"""
exec 3<&0
{
    down=0
    while read -r line; do
        [ "$line" = end ] && exit
        down=$line
    done
    [ "$down" -gt 0 ] && printf '\033[?25h\033[?2026l\033[%dB\r\n' "$down"
} <&3 &
"""


class Keeper:
    """A shell that outlives this process by a moment.

    Args:
        terminal: The file descriptor of the terminal.
    """

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._told = 0
        self._input: IO[bytes] | None = None

    def begin(self) -> None:
        """Start it, if there is a shell."""
        with suppress(OSError):
            shell = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT],
                stdin=subprocess.PIPE,
                stdout=self._terminal,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what ends the process by a key does not end it
            )
            self._input = shell.stdin
            shell.wait()

    def tell(self, down: int) -> None:
        """Say how many rows below the cursor the display ends."""
        if down != self._told:
            self._told = down
            self._say(f"{down}\n")

    def end(self) -> None:
        """End it; there is nothing to do for it."""
        self._say("end\n")
        if self._input is not None:
            with suppress(OSError):
                self._input.close()
            self._input = None

    def _say(self, line: str) -> None:
        if self._input is not None:
            with suppress(OSError):  # it has been killed
                self._input.write(line.encode())
                self._input.flush()
