"""What a verification leaves: JSON, a page to look at, a document to keep."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from truestep_spec_tests.verify.report.document import document
from truestep_spec_tests.verify.report.page import page


def prepare(directory: Path, markdown: Path | None) -> None:
    """Make the directory of a report, and see that all can be written.

    Raises:
        OSError: It cannot.
    """
    if markdown is not None:
        markdown.open("a").close()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").open("a").close()


def write(contents: Mapping[str, Any], directory: Path, markdown: Path | None) -> list[Path]:
    """Write a report.

    Args:
        contents: Of `truestep_spec_tests.verify.report.contents`.
        directory: Where to.
        markdown: A file for the document, if there is to be one.

    Returns:
        The files.
    """
    makers = {directory / "report.json": partial(json.dumps, indent=2), directory / "index.html": page}
    if markdown is not None:
        makers[markdown] = document
    for file, make in makers.items():
        file.write_text(make(contents), encoding="utf-8", errors="backslashreplace")
    return list(makers)
