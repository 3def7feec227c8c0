"""Holds an implementation in Python against golden files."""

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from truestep_fixtures import topologies
from truestep_fixtures.ranks import RankFailure
from truestep_fixtures.topologies import Placed

from truestep_spec_tests.golden import driving
from truestep_spec_tests.golden.driving import Point
from truestep_spec_tests.golden.files import Json, marked, read, to_tensor, unmarked
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.observe import shows_bars
from truestep_spec_tests.options import lacking

Run = Callable[..., list[Any]]
"""Of a world size, a function and its arguments: what it returns on each rank."""

Differences = Callable[[Implementation, Json, Json, Path, Run], Iterator[str]]
"""Of an implementation, a file's contents, one of its cases and a directory to use: what differs, in order."""

WITHOUT_WEAVE = "Weave is not installed"

WITHOUT_BARS = "it shows neither a view nor bars"


class Result(NamedTuple):
    """What became of a case.

    Attributes:
        file: The name of its file, without suffix.
        case: Its name.
        difference: The first one, or None.
        omitted: Why it was left out, or None.
    """

    file: str
    case: str
    difference: str | None = None
    omitted: str | None = None


def consume(implementation: Implementation, directory: Path, files: Iterable[str], run: Run) -> Iterator[Result]:
    """Looks at each case.

    Args:
        implementation: What is tested.
        directory: Where the files are.
        files: Their names without suffix, some of `FILES`.
        run: Runs a function on ranks.

    Yields:
        The results in the order of the files.

    Raises:
        ValueError: A file cannot be read, or is of another version.
    """
    for file in files:
        contents = read(directory, file)
        for case in contents["cases"]:
            callback = contents.get("callback", case.get("callback"))
            if callback not in implementation.offered:
                yield Result(file, case["name"], omitted=f"{implementation.name} has no {callback}")
            elif callback == "WeaveCallback" and importlib.util.find_spec("weave") is None:
                yield Result(file, case["name"], omitted=WITHOUT_WEAVE)
            elif missing := _missing(implementation, file, case):
                yield Result(file, case["name"], omitted=f"{callback} of {implementation.name} takes no {missing}")
            elif callback == "RichProgressCallback" and not shows_bars(implementation.RichProgressCallback()):
                yield Result(file, case["name"], omitted=WITHOUT_BARS)
            else:
                yield Result(file, case["name"], _first(FILES[file], implementation, contents, case, run))


def _missing(implementation: Implementation, file: str, case: Json) -> str:
    """The arguments of a case that the constructor lacks, of which TRL's documentation has none."""
    if file != "log_completions":
        return ""
    return ", ".join(lacking(implementation.LogCompletionsCallback, case["arguments"]))


def _first(
    differences: Differences, implementation: Implementation, contents: Json, case: Json, run: Run
) -> str | None:
    with tempfile.TemporaryDirectory() as directory, driving.quietly():
        try:
            return next(differences(implementation, contents, case, Path(directory), run), None)
        except RankFailure as failure:
            return "; ".join(
                f"rank {report.rank} {report.outcome}: {_end(report.detail)}" for report in failure.reports
            )
        except Exception as error:
            return f"raised {error!r}"


def _end(detail: str) -> str:
    """What a traceback comes to."""
    return detail.strip().rpartition("\n")[2]


# What the cases of each file differ in


def bema(implementation: Implementation, contents: Json, case: Json, directory: Path, run: Run) -> Iterator[str]:
    """In what is shown at each step: averages, and the live values of all else."""
    trajectory = contents["trajectories"][case["trajectory"]]
    callback = implementation.BEMACallback(**case["arguments"])
    model = driving.policy_of(trajectory)
    for t, shown in enumerate(driving.shadows(callback, model, trajectory, directory)):
        live = driving.point(trajectory, trajectory["steps"][t])
        yield from _different(t, _under_every_name(trajectory, live, case["steps"][t]), shown)


def ref_sync(implementation: Implementation, contents: Json, case: Json, directory: Path, run: Run) -> Iterator[str]:
    """In what the reference model holds at each step."""
    trajectory = contents["trajectories"][case["trajectory"]]
    reference = driving.reference_of(trajectory)
    callback = implementation.SyncRefModelCallback(reference, None)
    model = driving.policy_of(trajectory)
    kept = driving.point(trajectory, trajectory["reference"])
    for t, _ in enumerate(driving.led(callback, model, trajectory, directory, **case["arguments"])):
        yield from _different(t, _under_every_name(trajectory, kept, case["steps"][t]), reference.state_dict())


def zero3(implementation: Implementation, contents: Json, case: Json, directory: Path, run: Run) -> Iterator[str]:
    """In what each rank holds at some steps."""
    trajectory, size = contents["trajectory"], len(case["ranks"])
    held = run(size, _held, implementation, trajectory, case, directory)
    for rank, expected in enumerate(case["ranks"]):
        for t, parts in expected["steps"].items():
            wanted = {
                name: tuple(to_tensor(parts[part][name], [-1]) for part in ("values", "bounds"))
                for name in parts["values"]
            }
            for difference in _different(int(t), wanted, held[rank][int(t)]):
                yield f"rank {rank}, {difference}"


def weave_eval(implementation: Implementation, contents: Json, case: Json, directory: Path, run: Run) -> Iterator[str]:
    """In the summaries."""
    shown = driving.summaries(implementation.WeaveCallback, case, directory)
    for evaluation, summary in zip(case["evaluations"], shown, strict=True):
        expected = {name: float(number) for name, number in sorted(unmarked(evaluation["summary"]).items())}
        yield from _unequal(evaluation["name"], marked(expected), marked(summary))


def rich_progress(
    implementation: Implementation, contents: Json, case: Json, directory: Path, run: Run
) -> Iterator[str]:
    """In the view after each event, or in the bars where they are all that is seen."""
    shown = driving.views(implementation.RichProgressCallback(), case["events"], directory)
    for number, (event, view) in enumerate(zip(case["events"], shown, strict=True), start=1):
        expected = event["view"] if view is None else {part: event["view"][part] for part in view}
        yield from _unequal(f"event {number}, {event['event']}", expected, view)


def log_completions(
    implementation: Implementation, contents: Json, case: Json, directory: Path, run: Run
) -> Iterator[str]:
    """In the rows, all but the completions."""
    shown = driving.rows(implementation.LogCompletionsCallback, case, directory)
    for number, (expected, row) in enumerate(zip(case["rows"], shown, strict=False)):
        yield from _unequal(f"row {number}, columns", case["columns"], list(row))
        yield from _unequal(f"row {number}", expected, row)
    yield from _unequal("number of rows", len(case["rows"]), len(shown))


FILES: dict[str, Differences] = {
    "bema": bema,
    "ref_sync": ref_sync,
    "zero3": zero3,
    "weave_eval": weave_eval,
    "rich_progress": rich_progress,
    "log_completions": log_completions,
}
"""What finds the differences of a file's cases, by the file's name without suffix."""


# On ranks


def _held(implementation: Implementation, trajectory: Json, case: Json, directory: Path) -> dict[int, Point]:
    """What this rank holds at each step."""
    rank = torch.distributed.get_rank()
    ranges = {name: slice(*ends) for name, ends in case["ranks"][rank]["ranges"].items()}
    policy = topologies.place(driving.policy_of(trajectory), "zero3")
    if case["callback"] == "BEMACallback":
        callback = implementation.BEMACallback(**case["arguments"])
        shown = driving.shadows(callback, policy.model, trajectory, directory)
        return {t: {name: shadow[name].flatten()[ranges[name]] for name in ranges} for t, shadow in enumerate(shown)}
    reference = driving.reference_of(trajectory)
    placed = topologies.place_for_evaluation(reference, "zero3")
    callback = implementation.SyncRefModelCallback(placed.engine, None)
    steps = driving.led(callback, policy.model, trajectory, directory, policy.engine, **case["arguments"])
    return {t: _partitions(placed, ranges) for t, _ in enumerate(steps)}


def _partitions(placed: Placed, ranges: Mapping[str, slice]) -> Point:
    """The elements of a rank's own partitions, without what pads them."""
    partitions = {name: parameter.ds_tensor for name, parameter in placed.model.named_parameters()}
    return {name: partitions[name][: ends.stop - ends.start].clone() for name, ends in ranges.items()}


# Comparisons


def _under_every_name(trajectory: Json, others: Point, expected: Json) -> dict[str, tuple[Tensor, Tensor]]:
    """Values with their bounds by the keys of a state dict; what nothing is said of is as it is in `others`."""
    exact = {name: (value, torch.zeros_like(value)) for name, value in others.items()}
    values, bounds = (driving.point(trajectory, expected[part]) for part in ("values", "bounds"))
    found = exact | {name: (values[name], bounds[name]) for name in values}
    for name, about in trajectory["parameters"].items():
        found |= dict.fromkeys(about["also_named"], found[name])
    return found


def _different(t: int, expected: Mapping[str, tuple[Tensor, Tensor]], shown: Mapping[str, Tensor]) -> Iterator[str]:
    """Elements that are further from what they should be than their bounds allow; a bound of 0 minds a zero's sign."""
    for name, (value, bound) in expected.items():
        if name not in shown or shown[name].shape != value.shape:
            found = tuple(shown[name].shape) if name in shown else "nothing"
            yield f"step {t}, {name}: found {found}, expected the shape {tuple(value.shape)}"
            continue
        seen = shown[name].cpu().double()
        is_signed_alike = (seen.signbit() == value.signbit()) | (bound > 0)
        is_near = (seen == value) | ((seen - value).abs() <= bound)
        is_right = (is_near & is_signed_alike) | (seen.isnan() & value.isnan())
        for index in (~is_right).nonzero().tolist():
            at = tuple(index)
            yield (
                f"step {t}, {name}{index if index else ''}: found {seen[at].item().hex()}, "
                f"expected {value[at].item().hex()}, at most {bound[at].item().hex()} away"
            )


def _unequal(where: str, expected: Json, shown: Json) -> Iterator[str]:
    """Where JSON differs; the order of names is no difference."""
    if isinstance(expected, dict) and isinstance(shown, dict) and expected.keys() == shown.keys():
        for name in expected:
            yield from _unequal(f"{where}, {name}", expected[name], shown[name])
    elif isinstance(expected, list) and isinstance(shown, list) and len(expected) == len(shown):
        for number, parts in enumerate(zip(expected, shown, strict=True)):
            yield from _unequal(f"{where}[{number}]", *parts)
    elif (found := json.dumps(shown, ensure_ascii=False)) != (wanted := json.dumps(expected, ensure_ascii=False)):
        yield f"{where}: found {found}, expected {wanted}"
