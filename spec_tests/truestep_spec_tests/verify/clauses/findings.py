"""What a test found: a verdict, and its evidence in few words."""

import re
import traceback
from collections.abc import Iterable
from typing import NamedTuple

import pytest
from truestep_fixtures.ranks import RankFailure, RankReport

from truestep_spec_tests.verify.texts import encodable

NOT_RUN = "not run"
"""The verdict of what did not come to its end; its message says why."""

VERDICTS = (NOT_RUN, "passes", "skipped", "crashes", "hangs", "fails")
"""What a test can come to; of several phases of a test, or failing tests of a clause, the last one of these counts."""

FAILURES = frozenset({"crashes", "hangs", "fails"})

_ASSERTIONS = (AssertionError, pytest.fail.Exception)


class Finding(NamedTuple):
    """What a test, or one phase of it, came to.

    Attributes:
        verdict: `fails` (an assertion), `hangs`, `crashes` (any other exception, or the end of the process), `passes`,
            `skipped` or `not run` (to its end).
        exception: The exception's class.
        message: Its message; of a skip, the reason; of what hangs, the stack.
        example: Code of Hypothesis's shortest example, if it found one.
    """

    verdict: str
    exception: str = ""
    message: str = ""
    example: str = ""


def severity(finding: Finding) -> int:
    """The larger, the worse."""
    return VERDICTS.index(finding.verdict)


def finding_of(error: BaseException, given: Iterable[str] = ()) -> Finding:
    """What an exception that ended a test says; of several that Hypothesis found, the most severe one.

    Args:
        error: The exception.
        given: Names of the arguments that pytest gives to the test; an example is of the others.
    """
    if isinstance(error, BaseExceptionGroup):
        return max((finding_of(one, given) for one in error.exceptions), key=severity)
    if isinstance(error, RankFailure):
        finding = max((_of_rank(report) for report in error.reports), key=severity)
    else:
        message = _said(error) or _statement(error)
        finding = Finding("fails" if isinstance(error, _ASSERTIONS) else "crashes", message=message)
    found = finding._replace(exception=type(error).__name__, example=_example(getattr(error, "__notes__", ()), given))
    return Finding(*map(encodable, found))


def _said(error: BaseException) -> str:
    """The message of an exception, which may be unable to say it."""
    try:
        return str(error)
    except Exception:
        return ""


def _statement(error: BaseException) -> str:
    """The line that raised an exception, for one that has no message."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].line or "" if frames else ""


def _of_rank(report: RankReport) -> Finding:
    """What a rank came to."""
    message = f"rank {report.rank} {report.outcome}\n{report.shortened()}"
    if report.outcome == "raised":
        exception = report.ending.partition(":")[0].rpartition(".")[2]
        names = {assertion.__name__ for assertion in _ASSERTIONS}
        return Finding("fails" if exception in names else "crashes", message=message)
    verdicts = {"finished": "passes", "skipped": "skipped", "died": "crashes", "hung": "hangs"}
    return Finding(verdicts[report.outcome], message=message)


def _example(notes: Iterable[str], given: Iterable[str]) -> str:
    """Hypothesis's shortest example as code, a call or a state machine's steps, from its notes on the exception."""
    text = "\n".join(notes)
    found = re.search(
        r"^(?:Falsifying|Failing)[\w ]+:\s*(?:<state machine>)?(?P<code>.*?)\s*"
        r"^(?:Explanation:.*?^)?You can reproduce.*?(?P<decorator>@reproduce_failure\(.*?\)) as",
        text,
        re.MULTILINE | re.DOTALL,
    )
    if found is None:
        return ""
    code = found["code"].strip()
    for name in given:
        code = re.sub(rf"^ {{4}}{name}=.*?(?=^ {{4}}\S|^\))", "", code, flags=re.MULTILINE | re.DOTALL)
    return f"{code}\n# or: {found['decorator']}"
