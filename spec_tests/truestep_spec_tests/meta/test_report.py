"""What a verification leaves: a page that any browser shows, in which nothing is markup, and a document to keep."""

import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from truestep_fixtures.ranks import RankFailure, RankReport

from truestep_spec_tests.implementation import CALLBACKS
from truestep_spec_tests.lockstep import Comparison, Comparisons, Divergence
from truestep_spec_tests.meta import specification
from truestep_spec_tests.runs import Setup
from truestep_spec_tests.verify.report.document import document
from truestep_spec_tests.verify.report.page import page
from truestep_spec_tests.verify.trainings.check import Result

VOID = {"meta", "br", "hr"}
# In HTML these end where what they are in does.
IMPLIED = {"th"}
MARKUP = "</script></svg></pre><script src='https://example.org/x.js'></script>&amp;<b id=\"x\">"


class Elements(HTMLParser):
    """All elements of a page, and its text; fails where one ends that has not begun."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID | IMPLIED:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert tag == self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, *names: str) -> list[str]:
        """The values of attributes."""
        return [value for name, value in self.attributes if name in names]


def comparisons(steps: int, error: float = 1e-9, bound: float = 3e-9, divergence: Any = None) -> Comparisons:
    return Comparisons({step: Comparison(error * step, bound, 5, 0) for step in range(steps)}, divergence)


def run(setup: Setup | None = None, known: bool = False, **result: Any) -> dict[str, Any]:
    """A run as the report has it."""
    return Result(setup or Setup(steps=2), **{"comparisons": comparisons(3), "seconds": 1.0, **result}).as_dict() | {
        "known": known
    }


def divergence(**changes: Any) -> Divergence:
    return Divergence(2, 1, "a.weight", (1, 0), 0.5, 0.25, 3e-9, "float32")._replace(**changes)


DIVERGES = comparisons(3, divergence=divergence())
FRAME = 'Traceback (most recent call last):\n  File "mine.py", line 1, in callback'

CRASH = RankFailure(
    "train",
    [
        RankReport(0, "raised", f"{FRAME}\nKeyError: 1\n\n{FRAME}\nmine.Mismatch: {MARKUP}\nsize: 3"),
        RankReport(1, "finished"),
        RankReport(2, "raised", f"{FRAME}\nConnectionError: closed by the other one"),
    ],
)

RUNS = [
    run(),
    run(Setup(topology="zero3", ranks=3, dtype="bfloat16", steps=2)),
    run(Setup(topology="ddp", ranks=2, steps=2), comparisons=DIVERGES, replay=Path("out of/bema ddp#2.safetensors")),
    run(Setup(topology="ddp", ranks=3, steps=2), difference="step 1, a.weight"),
    run(Setup(topology="fsdp2", ranks=2, steps=2), comparisons=None, seconds=math.nan, crash=CRASH),
    run(Setup(callback="LogCompletionsCallback", dtype="float64", steps=2), comparisons=comparisons(3, 0.0, 0.0)),
]


def of_clause(clause: str, verdict: str, evidence: str | None = None, known: bool = False) -> dict[str, Any]:
    found = {"title": specification.titles()[clause], "verdict": verdict, "known": known}
    return {"clause": clause, **found, "note": "2 tests", "evidence": evidence}


def of_test(test: str, verdict: str, *clauses: str, **finding: str) -> dict[str, Any]:
    found = {"exception": "", "message": "", "example": "", **finding}
    return {"test": test, "clauses": clauses, "verdict": verdict, "command": f"python -m pytest '{test}'", **found}


CLAUSES = [
    of_clause("BEMA-5", "fails", "test_a.py::test_wrong"),
    of_clause("BEMA-6", "fails", "test_a.py::test_wrong"),
    of_clause("SYNC-4", "passes"),
    of_clause("RICH-3", "not offered"),
]
TESTS = [
    of_test("test_a.py::test_right", "passes", "BEMA-5"),
    of_test("test_a.py::test_skipped", "skipped", "BEMA-6", message="no device"),
    of_test("test_a.py::test_hangs", "hangs", "BEMA-6"),
    of_test(
        "test_a.py::test_wrong",
        "fails",
        "BEMA-6",
        "BEMA-5",
        exception="AssertionError",
        message="1 != 2",
        example="f(x=1)",
    ),
    of_test("test_b.py::test_right", "passes", "SYNC-4"),
]


def contents(**changes: Any) -> dict[str, Any]:
    return {
        "implementation": "truestep 0.1.0",
        "command": "truestep verify",
        "environment": {"python": "3.11", "cpu": "8 × A & B"},
        "passed": False,
        "runs": RUNS,
        "clauses": CLAUSES,
        "tests": TESTS,
        "known_failures": {"ids": [], "problems": []},
        **changes,
    }


@pytest.fixture(scope="module")
def everything() -> Elements:
    return Elements(page(contents()))


def test_the_page_needs_nothing_but_itself_and_files_beside_it(everything: Elements) -> None:
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(everything.tags)
    assert everything.of("src", "srcset", "data", "action") == []
    elsewhere = [address for address in everything.of("href", "xlink:href") if not address.startswith("#")]
    assert elsewhere == ["bema%20ddp%232.safetensors"]
    text = page(contents())
    assert "@import" not in text
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", text))


def test_what_is_linked_within_the_page_exists_once(everything: Elements) -> None:
    ids = Counter(everything.of("id"))
    assert set(ids.values()) == {1}
    linked = [address[1:] for address in everything.of("href", "xlink:href") if address.startswith("#")]
    linked += re.findall(r"url\(#([^)]*)\)", page(contents()))
    assert set(linked) <= ids.keys()


def test_every_clause_and_run_has_an_anchor(everything: Elements) -> None:
    ids = everything.of("id")
    assert all(clause["clause"] in ids for clause in CLAUSES)
    for number, of_run in enumerate(RUNS, start=1):
        assert len([anchor for anchor in ids if anchor.startswith(f"run-{number}-")]) == 1
        assert of_run["setup"]["topology"] in everything.text


def test_a_clause_is_shown_with_its_text(everything: Elements) -> None:
    assert "turns the correction off, and the shadow is the EMA." in everything.text


def test_a_failing_test_is_shown_once_and_linked_from_its_other_clauses(everything: Elements) -> None:
    assert everything.text.count("1 != 2") == everything.text.count("f(x=1)") == 1
    assert everything.of("href").count("#test-4") == 1
    assert "python -m pytest 'test_a.py::test_wrong'" in everything.text


def test_a_divergence_and_a_crash_are_shown_with_what_repeats_them(everything: Elements) -> None:
    for shown in ("a.weight[1, 0]", "0.5", "0.25", "3e-09", f"mine.Mismatch: {MARKUP}", "step 1, a.weight"):
        assert shown in everything.text
    assert "truestep verify --replay 'out of/bema ddp#2.safetensors'" in everything.text


def test_the_same_contents_give_the_same_bytes() -> None:
    assert page(contents()) == page(contents())


def test_what_looks_like_markup_is_text() -> None:
    text_differs = divergence(shown_as="text", subject=MARKUP, reference=f"reference{MARKUP}", parameter=f"p{MARKUP}")
    found = page(
        contents(
            implementation=f"i{MARKUP}",
            command=f"c{MARKUP}",
            environment={f"n{MARKUP}": f"v{MARKUP}"},
            runs=[run(Setup(model=f"m{MARKUP}", steps=2), comparisons=comparisons(3, divergence=text_differs))],
            clauses=[of_clause("BEMA-5", "fails", f"t{MARKUP}") | {"title": f"title{MARKUP}", "note": f"note{MARKUP}"}],
            tests=[
                of_test(
                    f"t{MARKUP}", "fails", "BEMA-5", exception=f"e{MARKUP}", message=f"s{MARKUP}", example=f"x{MARKUP}"
                )
            ],
            known_failures={"ids": [f"k{MARKUP}"], "problems": [f"l{MARKUP}"]},
        )
    )
    elements = Elements(found)
    for before in ("i", "c", "n", "v", "m", "p", "reference", "title", "note", "t", "e", "s", "x", "k", "l"):
        assert f"{before}{MARKUP}" in elements.text
    assert "script" not in elements.tags
    assert "x" not in elements.of("id")


@pytest.mark.parametrize(
    ("changes", "headline"),
    [
        ({}, "does not do what the specification says"),
        ({"clauses": [], "tests": []}, "does not do what the reference does"),
        ({"clauses": [], "tests": [], "runs": RUNS[:2], "passed": True}, "does what the reference does"),
        ({"clauses": CLAUSES[2:], "tests": TESTS[4:], "runs": [], "passed": True}, "does what the specification says"),
        (
            {"clauses": [of_clause("BEMA-5", "fails", known=True)], "tests": [], "runs": RUNS[:1], "passed": True},
            "does what the specification says, but for what was known to fail",
        ),
        (
            {"clauses": CLAUSES[2:3], "tests": [], "runs": [run(comparisons=DIVERGES, known=True)], "passed": True},
            "does what the specification says, but for what was known to fail",
        ),
        (
            {
                "clauses": CLAUSES[2:],
                "tests": TESTS[4:],
                "runs": [],
                "known_failures": {"ids": ["SYNC-4"], "problems": ["SYNC-4: passes now"]},
            },
            "did not come out as expected",
        ),
        ({"clauses": [], "tests": [], "runs": [], "passed": True}, "was not verified"),
    ],
)
def test_the_headline_answers_whether_the_specification_is_met(changes: dict[str, Any], headline: str) -> None:
    text = Elements(page(contents(**changes))).text
    assert f"truestep 0.1.0 {headline}." in " ".join(text.split())


@pytest.mark.parametrize(
    "result",
    [
        {"comparisons": Comparisons()},
        {"comparisons": comparisons(1)},
        {"comparisons": comparisons(3, error=math.nan)},
        {"comparisons": comparisons(3, error=math.inf)},
        {"comparisons": comparisons(3, error=0.0, bound=0.0)},
        {"comparisons": comparisons(3, error=math.inf, bound=0.0)},
        {"comparisons": comparisons(3, divergence=divergence(subject=math.nan, reference=math.inf))},
        {"comparisons": comparisons(3, divergence=divergence(index=(), shown_as="nothing of that shape"))},
        {"comparisons": None, "crash": CRASH},
    ],
    ids=["0 steps", "1 step", "NaN", "infinite", "exact", "another text", "not finite", "nothing shown", "crash"],
)
def test_any_run_can_be_shown(result: dict[str, Any]) -> None:
    elements = Elements(page(contents(clauses=[], tests=[], runs=[run(**result)])))
    assert "BEMACallback" in elements.text


def test_plots_have_marks_by_world_size() -> None:
    sizes = [run(Setup(topology="ddp", ranks=size, steps=2)) for size in range(2, 10)]
    text = Elements(page(contents(clauses=[], tests=[], runs=sizes))).text
    assert all(f"{mark} {size} ranks: 0.667" in text for mark, size in zip("●■▲◆▼★●■", range(2, 10), strict=True))


# The document


def test_the_document_has_a_row_for_every_run_and_clause_and_the_evidence_once() -> None:
    text = document(contents())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    of_runs = [row for row in rows if row[0] in CALLBACKS]
    assert [row[1:5] for row in of_runs] == [
        ["single", "1", "float32", "equal"],
        ["zero3", "3", "bfloat16", "equal"],
        ["ddp", "2", "float32", "diverges"],
        ["ddp", "3", "float32", "differs"],
        ["fsdp2", "2", "float32", "crashes"],
        ["single", "1", "float64", "equal"],
    ]
    assert [row[-1] for row in of_runs[2:5]] == [
        "step 2, a.weight: 0.5, reference 0.25",
        "step 1, a.weight",
        f"mine.Mismatch: {MARKUP}",
    ]
    assert [row[::2] for row in rows if "-" in row[0] and row[0] != "---"] == [
        ["BEMA-5", "fails"],
        ["BEMA-6", "fails"],
        ["SYNC-4", "passes"],
        ["RICH-3", "not offered"],
    ]
    assert text.count("\n### BEMA-5, BEMA-6\n") == text.count("1 != 2") == text.count("f(x=1)") == 1


def test_the_document_has_neither_paths_nor_what_says_where_it_goes(tmp_path: Path) -> None:
    files = f"--report={tmp_path} --markdown '{tmp_path}/of mine.md'"
    command = f"truestep verify --implementation mine {files} --seed 3"
    file = Path(specification.__file__)
    message = f'File "{file}", line 3, in "{tmp_path}/x", <object at {hex(id(file))}>'
    tests = [of_test("test_a.py::test_wrong", "fails", "BEMA-5", message=message)]
    clauses = [of_clause("BEMA-5", "fails", "test_a.py::test_wrong")]
    text = document(contents(command=command, runs=[], clauses=clauses, tests=tests))
    assert "truestep verify --implementation mine --seed 3\n" in text
    assert re.search(
        r'File "(spec_tests/)?truestep_spec_tests/meta/specification.py", line 3, in "x", <object at 0x…>', text
    )
    assert str(tmp_path) not in text
