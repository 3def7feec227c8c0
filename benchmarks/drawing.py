"""Pictures that the same figures give again, byte for byte."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """Matplotlib's pyplot, for files only."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "truestep"
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path, conditions: Mapping[str, str], width: int = 190) -> None:
    """Write a figure and close it.

    Args:
        figure: From `pyplot()`.
        path: Where to, with a suffix that Matplotlib knows.
        conditions: What the figures depend on, for the lines below.
        width: Characters in such a line.
    """
    text = "; ".join(f"{key} {value}" for key, value in conditions.items())
    figure.supxlabel(textwrap.fill(text, width), fontsize=7, x=0.01, ha="left")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot().close(figure)
