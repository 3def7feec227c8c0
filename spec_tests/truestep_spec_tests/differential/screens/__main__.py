"""Writes the screens and the picture anew."""

import io
import re
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text
from truestep_fixtures.terminal import Terminal

from truestep_spec_tests.differential.rich_progress_cases import train_for_a_picture
from truestep_spec_tests.differential.screens import SCREENS, WIDTHS

PICTURED = 100
"""Columns of the terminal that the picture is of."""


def main() -> None:
    """Run the training once, and look at it in each width."""
    with tempfile.TemporaryDirectory() as directory, Terminal(columns=WIDTHS[0], rows=30) as terminal:
        go_on = Path(directory, "go on")
        child = terminal.start(train_for_a_picture, "truestep", Path(directory), go_on)
        terminal.wait_for("5/8")
        for width in WIDTHS:
            terminal.resize(width, 30)
            time.sleep(1)  # in which it is drawn again
            _write(f"during_{width}.txt", terminal.lines)
            if width == PICTURED:
                (SCREENS / "training.svg").write_text(_picture(terminal.raw), encoding="utf-8")
        go_on.touch()
        child.wait()
        _write("after.txt", terminal.history)


def _write(name: str, lines: list[str]) -> None:
    (SCREENS / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _picture(written: bytes) -> str:
    """The last frame that was drawn, as SVG."""
    frame = written.decode().rpartition("\x1b[?25l")[2].partition("\x1b[?25h")[0]
    without_moves = re.sub(r"\x1b\[[0-9;?]*[A-LJK]|\r", "", frame)
    console = Console(file=io.StringIO(), record=True, width=PICTURED, force_terminal=True)
    console.print(Text.from_ansi(without_moves.strip("\n")))
    svg = console.export_svg(title="python train.py", unique_id="truestep")
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # which would be fetched


if __name__ == "__main__":
    main()
