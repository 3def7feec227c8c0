"""SPEC.md as the suite reads it: its clauses, which callbacks are implemented, the documented constructors."""

import ast
import inspect
import re
from pathlib import Path

import truestep_spec_tests

PACKAGE = Path(truestep_spec_tests.__file__).parent


def text() -> str:
    """SPEC.md: of the source tree, or the copy that an installed package has beside it."""
    for directory in (PACKAGE, PACKAGE.parents[1]):
        if (directory / "SPEC.md").is_file():
            return (directory / "SPEC.md").read_text(encoding="utf-8")
    raise FileNotFoundError(f"SPEC.md is neither in {PACKAGE} nor in {PACKAGE.parents[1]}")


def clauses() -> list[str]:
    """Ids of all clauses, in the order of the text."""
    return re.findall(r"^\*\*([A-Z]+-\d+)\*\*", text(), flags=re.MULTILINE)


def titles() -> dict[str, str]:
    """Id of each clause → the words in italics that it begins with."""
    return dict(re.findall(r"^\*\*([A-Z]+-\d+)\*\* \*([^*]+)\.\*", text(), flags=re.MULTILINE))


def bodies() -> dict[str, str]:
    """Id of each clause → what it says after its title, in Markdown: up to the next clause or heading."""
    clause = r"^\*\*([A-Z]+-\d+)\*\* \*[^*]+\.\*\s+(.*?)\s*(?=^\*\*[A-Z]+-\d+\*\*|^#+ |\Z)"
    return dict(re.findall(clause, text(), flags=re.MULTILINE | re.DOTALL))


def statuses() -> dict[str, tuple[str, str]]:
    """The section "Status": prefix of the clauses → name of the callback, and whether it is implemented."""
    rows = re.findall(r"^\| `([A-Z]+)` \| `(\w+)` \| (\w+) \|$", text(), flags=re.MULTILINE)
    return {prefix: (callback, status) for prefix, callback, status in rows}


def sections() -> dict[str, str]:
    """Name of each callback → its section."""
    parts = re.split(r"^## (\w+)$", text(), flags=re.MULTILINE)
    names = {callback for callback, _ in statuses().values()}
    return {name: body for name, body in zip(parts[1::2], parts[2::2], strict=True) if name in names}


def constructor(callback: str) -> list[inspect.Parameter]:
    """The parameters that a callback's section shows, in order: names, and defaults where there are any."""
    shown = re.search(rf"^    {callback}\([^)]*\)", sections()[callback], flags=re.MULTILINE)
    if shown is None:
        raise ValueError(f"SPEC.md: the section {callback!r} shows no constructor")
    call = ast.parse(shown.group().strip(), mode="eval").body
    assert isinstance(call, ast.Call)
    required = [(ast.unparse(argument), inspect.Parameter.empty) for argument in call.args]
    optional = [(str(keyword.arg), ast.literal_eval(keyword.value)) for keyword in call.keywords]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [inspect.Parameter(name, kind, default=default) for name, default in required + optional]
