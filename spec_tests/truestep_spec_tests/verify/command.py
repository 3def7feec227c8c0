"""The command `truestep verify`."""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from truestep_fixtures.models import MODELS
from truestep_fixtures.topologies import TOPOLOGIES

from truestep_spec_tests.implementation import CALLBACKS, Implementation
from truestep_spec_tests.recording import Trajectory
from truestep_spec_tests.runs import Setup
from truestep_spec_tests.verify.check import Result, check, keep_for_replay
from truestep_spec_tests.verify.clauses.command import add_arguments, verify_clauses
from truestep_spec_tests.verify.display import Display, show
from truestep_spec_tests.verify.environment import environment
from truestep_spec_tests.verify.launch import Launcher, launcher
from truestep_spec_tests.verify.plan import DTYPES, plan

WITHOUT_WEAVE = "WeaveCallback is not verified, as Weave is not installed: pip install weave"


def main(arguments: Sequence[str]) -> int:
    """Verify an implementation.

    Args:
        arguments: The command's arguments; `--help` lists them.

    Returns:
        0 if every run equals the reference, or every clause holds, 1 if one does not, 2 if the arguments do not fit.
    """
    understood = parser()
    options = understood.parse_args(arguments)
    if options.clauses:
        try:
            return verify_clauses(options)
        except (ValueError, OSError) as error:
            understood.error(str(error))
        except RuntimeError as error:
            sys.exit(f"truestep verify: {error}")
    if options.only or options.expect:
        understood.error("--only and --expect: can be given together with --clauses only")
    with launcher(options.timeout) as ranks:
        try:
            setups = _setups(options, ranks)
        except ValueError as error:
            understood.error(str(error))
        results = _run(setups, ranks, options)
    return 0 if all(result.passed for result in results) else 1


def parser() -> argparse.ArgumentParser:
    """The arguments that the command takes."""
    arguments = argparse.ArgumentParser(
        prog="truestep verify",
        description="Train small models in every topology, with the implementation and the reference side by side, and "
        "compare them at every step. Under torchrun it uses the ranks and devices that it was started with.",
    )
    add = arguments.add_argument
    add("--implementation", help="a package (truestep, the default; trl; …) or the path of a class")
    add("--callback", action="append", choices=CALLBACKS, help="only this one (may be repeated)")
    add("--topology", action="append", choices=TOPOLOGIES, help="only this one (may be repeated)")
    add("--ranks", action="append", type=int, metavar="N", help="only this world size (may be repeated)")
    add("--dtype", action="append", choices=DTYPES, help="only this one (may be repeated)")
    add("--model", default="qwen2", metavar="NAME|DIR", help=f"{', '.join(MODELS)}, or a local model directory")
    add("--seed", type=int, default=0, help="seeds weights, data and hyperparameters (default 0)")
    add("--steps", type=int, default=12, help="optimizer steps of each training (default 12)")
    add("--timeout", type=float, default=300.0, help="seconds that one run may take (default 300)")
    add("--output", type=Path, default=Path("truestep-verify"), help="where the report goes (default truestep-verify)")
    add("--replay", type=Path, metavar="FILE", help="follow the trajectory of a failed run again")
    add_arguments(arguments)
    return arguments


def _setups(options: argparse.Namespace, ranks: Launcher) -> list[Setup]:
    if options.replay is not None:
        trajectory = Trajectory.load(options.replay)
        setup = Setup(**trajectory.about["setup"]).on(steps=max(trajectory.steps))
        if ranks.world_sizes and setup.ranks not in ranks.world_sizes:
            raise ValueError(f"--replay {options.replay}: it is of {setup.ranks} ranks")
        return [setup.on(implementation=Implementation(options.implementation or setup.implementation).name)]
    implementation = Implementation(options.implementation or "truestep")
    callbacks = [name for name in implementation.offered if name in (options.callback or CALLBACKS)]
    if not callbacks:
        raise ValueError(f"--callback {' '.join(options.callback)}: {implementation.name} does not have it")
    if _leaves_out_weave(options):
        callbacks.remove("WeaveCallback")
    if not callbacks:
        raise ValueError(f"--callback WeaveCallback: {WITHOUT_WEAVE}")
    if options.model not in MODELS and not Path(options.model, "config.json").is_file():
        raise ValueError(
            f"--model {options.model}: neither {', '.join(MODELS)} nor a model directory with a config.json"
        )
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps}: must be at least 1")
    for size in options.ranks or ():
        if size < 1:
            raise ValueError(f"--ranks {size}: must be at least 1")
        if ranks.world_sizes and size not in ranks.world_sizes:
            raise ValueError(f"--ranks {size}: the launcher has started {ranks.world_sizes[0]}")
    setups = plan(
        implementation=implementation.name,
        callbacks=callbacks,
        topologies=options.topology or (),
        ranks=options.ranks or ranks.world_sizes,
        dtypes=options.dtype or (),
        model=options.model,
        seed=options.seed,
        steps=options.steps,
    )
    if not setups:
        raise ValueError(
            "--topology, --ranks and --dtype: no run has these together; single needs --ranks 1, all others more, and "
            "LogCompletionsCallback is compared in float64, and so is WeaveCallback, RichProgressCallback in float32, "
            "these two in few topologies only unless --ranks is given"
        )
    return setups


def _leaves_out_weave(options: argparse.Namespace) -> bool:
    """Whether evaluations in Weave would be verified, but for Weave, which is not installed."""
    implementation = Implementation(options.implementation or "truestep")
    is_asked_for = "WeaveCallback" in implementation.offered and "WeaveCallback" in (options.callback or CALLBACKS)
    return is_asked_for and options.replay is None and importlib.util.find_spec("weave") is None


def _run(setups: Sequence[Setup], ranks: Launcher, options: argparse.Namespace) -> list[Result]:
    console = Console(quiet=not ranks.is_main)
    workspace = Path(ranks.run_alone(tempfile.mkdtemp, prefix="truestep-verify-"))
    counter = workspace / "step"
    results = []
    try:
        with Display(console, len(setups), counter) as display:
            for number, setup in enumerate(setups):
                display.begin(setup)
                directory = workspace / str(number)
                result = check(setup, ranks, directory, counter, options.replay)
                if ranks.is_main and not result.passed and result.crash is None and options.replay is None:
                    name = f"{CALLBACKS[setup.callback]}-{setup.topology}-{setup.ranks}-{setup.dtype}.safetensors"
                    file = options.output / name
                    keep_for_replay(result, directory, file)
                    result = replace(result, replay=file)
                results.append(result)
                display.end(result)
                if ranks.is_main:
                    shutil.rmtree(directory, ignore_errors=True)
    finally:
        if ranks.is_main:
            shutil.rmtree(workspace, ignore_errors=True)
    if ranks.is_main:
        _report(console, results, options)
    return results


def _report(console: Console, results: Sequence[Result], options: argparse.Namespace) -> None:
    found = environment()
    implementation = Implementation(results[0].setup.implementation)
    console.print(f"implementation: {implementation}")
    show(console, results, found)
    if _leaves_out_weave(options):
        console.print(WITHOUT_WEAVE)
    contents: dict[str, Any] = {
        "implementation": str(implementation),
        "environment": found,
        "passed": all(result.passed for result in results),
        "runs": [result.as_dict() for result in results],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "report.json"
    file.write_text(json.dumps(contents, indent=2), encoding="utf-8")
    console.print(f"report: {file}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
