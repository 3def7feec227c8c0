"""Training time that is lost to evaluations in Weave, side by side with TRL's callback.

    python benchmarks/weave_eval.py [--rounds N] [--output DIRECTORY]

Measured is how much longer a training takes with a callback than without one, where it ends with an evaluation, and
where it goes on after each. Trainings without, with truestep's, with truestep's and `trace_scores=True`, and with TRL's
take turns, each in a process of its own. Weave's client is real; its service is a process on this machine, which is
asked afterwards whether everything has arrived. Needs TRL and Weave. Writes tables (plain text and Markdown) and all
samples (JSON). A round takes about two minutes.
"""

from __future__ import annotations

from running import PACKAGES, measured, options, write
from weave_eval_contest import CASES, compare
from weave_eval_report import tables


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and write the files."""
    parsed = options(__doc__.splitlines()[0], rounds=5).parse_args(arguments)
    results = measured(
        "weave_eval.py",
        arguments,
        lambda: {"trainings": [compare(case, parsed.rounds, parsed.patience) for case in CASES]},
        (*PACKAGES, "weave"),
    )
    write(results, tables(results["trainings"]), parsed.output, "weave_eval")


if __name__ == "__main__":
    main()
