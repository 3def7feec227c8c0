"""The templates of what a verification leaves."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def templates(*, autoescape: bool) -> Environment:
    """Those beside this file; a name that they use and nobody has given is an error.

    Args:
        autoescape: Whether all that is put into them is text, not markup.
    """
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
