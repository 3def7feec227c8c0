"""A live display in the output of a notebook's cell."""

import io
from typing import Any
from uuid import uuid4

from rich.console import Console
from rich.segment import Segment, Segments

from truestep.progress.drawing import Draw, Row
from truestep.progress.live import Live

COLUMNS, LINES = 100, 60

_STYLE = "white-space:pre;line-height:1.3;font-family:Menlo,Consolas,monospace"
_HTML = f'<pre style="{_STYLE}">{{code}}</pre>'


class Notebook(Live):
    """What the cell shows that was running when the display began. What the cell prints has a place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._name = f"truestep-{uuid4().hex}"
        self._is_new = True
        self._summaries: list[Row] = []
        self._drawn: object = None

    def _begin(self) -> None:
        pass

    def _refresh(self) -> None:
        drawn = [source.key() for source in self._sources]
        if drawn != self._drawn:
            self._drawn = drawn
            self._show([row for source in self._sources for row in source.draw(COLUMNS, LINES, True)])

    def _leave(self, draw_summary: Draw) -> None:
        self._summaries += draw_summary(COLUMNS, LINES, True)
        self._drawn = None
        self._show([row for source in self._sources for row in source.draw(COLUMNS, LINES, True)])

    def _finish(self) -> None:
        pass

    def _show(self, rows: list[Row]) -> None:
        import IPython.display

        console = Console(
            file=io.StringIO(), width=1000, record=True, force_jupyter=False, force_terminal=True, soft_wrap=True
        )
        parts = [part for row in (*self._summaries, *rows) for part in (*row, Segment.line())]
        console.print(Segments(parts), end="")
        plain = console.export_text(clear=False)
        contents = {"text/html": console.export_html(code_format=_HTML, inline_styles=True), "text/plain": plain}
        display: Any = IPython.display.display
        display(contents, raw=True, display_id=self._name, update=not self._is_new)
        self._is_new = False
