"""What a verification leaves: JSON, a page to look at, a document to keep."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truestep_spec_tests.verify.report.document import document
from truestep_spec_tests.verify.report.page import page


def write(contents: Mapping[str, Any], directory: Path, markdown: Path | None) -> list[Path]:
    """Write a report.

    Args:
        contents: Of `truestep_spec_tests.verify.report.contents`.
        directory: Where to.
        markdown: A file for the document, if there is to be one.

    Returns:
        The files.
    """
    texts = {directory / "index.html": page(contents), directory / "report.json": json.dumps(contents, indent=2)}
    if markdown is not None:
        texts[markdown] = document(contents)
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
    return list(texts)
