"""The command `truestep verify`."""

import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.verify.arguments import parser, understand
from truestep_spec_tests.verify.clauses.display import show_clauses
from truestep_spec_tests.verify.clauses.verifying import choose_clauses, verify_clauses
from truestep_spec_tests.verify.expectations import Expectations
from truestep_spec_tests.verify.launch import launcher
from truestep_spec_tests.verify.report import prepare, write
from truestep_spec_tests.verify.report.contents import contents
from truestep_spec_tests.verify.trainings.display import show_trainings
from truestep_spec_tests.verify.trainings.verifying import (
    WITHOUT_WEAVE,
    choose_trainings,
    leaves_out_weave,
    verify_trainings,
)


def main(arguments: Sequence[str]) -> int:
    """Verify an implementation.

    Args:
        arguments: The command's arguments; `--help` lists them.

    Returns:
        0 if every training equals the reference and every clause that was tested holds, or was known not to; 1
        otherwise; 2 if the arguments do not fit.
    """
    options = understand(arguments)
    with launcher(options.timeout) as ranks, _ending_as_by_interrupt():
        try:
            expected = Expectations.read(options.expect) if options.expect else Expectations()
            setups = choose_trainings(options, ranks) if options.trainings else []
            clauses = choose_clauses(options.only, options.callback) if options.clauses else []
            implementation = Implementation(setups[0].implementation if setups else options.implementation)
            prepare(options.report, options.markdown)
        except (ValueError, OSError) as error:
            parser().error(str(error))
        console = Console(quiet=not ranks.is_main)
        console.print(f"implementation: {implementation}")
        results = verify_trainings(setups, ranks, console, options.report, options.replay) if setups else []
        if results:
            show_trainings(console, results, expected.has_training)
        if options.trainings and leaves_out_weave(options):
            console.print(WITHOUT_WEAVE)
        was_interrupted = any(result.verdict == "not run" for result in results)
    with _ending_as_by_interrupt():
        verdicts, tests = verify_clauses(
            implementation,
            [] if was_interrupted else clauses,
            expected.has_test,
            console,
            options.report / "pytest.log",
            seed=options.seed,
            timeout=options.timeout,
            seconds=options.time,
        )
    if verdicts:
        show_clauses(console, verdicts, implementation.name, options.seed)
    found = contents(implementation, shlex.join(arguments), options.seed, results, verdicts, tests, expected)
    _show_summary(console, found)
    if ranks.is_main:
        files = write(found, options.report, options.markdown)
        console.print(f"report: {', '.join(map(str, files))}", soft_wrap=True)
    return 0 if found["passed"] else 1


@contextmanager
def _ending_as_by_interrupt() -> Iterator[None]:
    """Has what ends the process, such as a limit of time or a lost connection, do as Ctrl-C does: there is a report."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _show_summary(console: Console, found: Mapping[str, Any]) -> None:
    environment = ", ".join(f"{name} {value}" for name, value in found["environment"].items())
    console.print(environment, style="dim", soft_wrap=True)
    for problem in found["known_failures"]["problems"]:
        console.print(f"known failures: {problem}", style="red", markup=False, soft_wrap=True)
    for part in ("runs", "clauses"):
        verdicts = Counter(f"{row['verdict']} (known)" if row["known"] else row["verdict"] for row in found[part])
        if verdicts:
            console.print(f"{part}: {', '.join(f'{verdict} {count}' for verdict, count in verdicts.items())}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
