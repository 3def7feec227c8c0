"""The trainings of a verification, one after the other."""

import argparse
import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from truestep_fixtures.models import MODELS

from truestep_spec_tests.implementation import CALLBACKS, Implementation
from truestep_spec_tests.recording import Trajectory
from truestep_spec_tests.runs import Setup
from truestep_spec_tests.verify.launch import Launcher
from truestep_spec_tests.verify.trainings.check import Result, check, keep_for_replay
from truestep_spec_tests.verify.trainings.display import Display
from truestep_spec_tests.verify.trainings.plan import identity, plan

WITHOUT_WEAVE = "WeaveCallback is not trained with, as Weave is not installed: pip install weave"


def choose_trainings(options: argparse.Namespace, ranks: Launcher) -> list[Setup]:
    """The trainings that are asked for.

    Args:
        options: The command's arguments.
        ranks: Where ranks come from.

    Raises:
        ValueError: The arguments do not fit.
        OSError: There is no such file to replay.
    """
    if options.replay is not None:
        trajectory = Trajectory.load(options.replay)
        setup = Setup(**trajectory.about["setup"])
        setup = setup.on(steps=max(trajectory.steps), training={"max_steps": setup.steps} | setup.training)
        if ranks.world_sizes and setup.ranks not in ranks.world_sizes:
            raise ValueError(f"--replay {options.replay}: it is of {setup.ranks} ranks")
        return [setup.on(implementation=Implementation(options.implementation or setup.implementation).name)]
    implementation = Implementation(options.implementation)
    callbacks = [name for name in implementation.offered if name in (options.callback or CALLBACKS)]
    if not callbacks:
        raise ValueError(f"--callback {' '.join(options.callback)}: {implementation.name} does not have it")
    if leaves_out_weave(options):
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
            "--topology, --ranks and --dtype: no training has these together; single needs --ranks 1, all others more, "
            "and LogCompletionsCallback is compared in float64, and so is WeaveCallback, RichProgressCallback in "
            "float32, these two in few topologies only unless --ranks is given"
        )
    return setups


def leaves_out_weave(options: argparse.Namespace) -> bool:
    """Whether there would be trainings with evaluations in Weave, but for Weave, which is not installed."""
    if options.replay is not None or importlib.util.find_spec("weave") is not None:
        return False
    is_asked_for = "WeaveCallback" in (options.callback or CALLBACKS)
    return is_asked_for and "WeaveCallback" in Implementation(options.implementation).offered


def verify_trainings(
    setups: Sequence[Setup], ranks: Launcher, console: Console, directory: Path, trajectory: Path | None
) -> list[Result]:
    """Make trainings, whatever comes of each; those that are left at an interrupt are not run.

    Args:
        setups: The trainings.
        ranks: Where ranks come from; all of them call this.
        console: Where progress is shown.
        directory: Where the trajectory of a training that fails goes.
        trajectory: A recorded trajectory to follow instead of training.
    """
    workspace = Path(ranks.run_alone(tempfile.mkdtemp, prefix="truestep-verify-"))
    counter = workspace / "step"
    results = []
    try:
        with Display(console, len(setups), counter) as display:
            for number, setup in enumerate(setups):
                display.begin(setup)
                own = workspace / str(number)
                result = check(setup, ranks, own, counter, trajectory)
                if ranks.is_main and trajectory is None and result.can_be_replayed:
                    file = directory / f"{'-'.join(identity(setup)).lower()}.safetensors"
                    keep_for_replay(result, own, file)
                    result = replace(result, replay=file)
                results.append(result)
                display.end(result)
                if ranks.is_main:
                    shutil.rmtree(own, ignore_errors=True)
    except KeyboardInterrupt:
        results += [Result(setup) for setup in setups[len(results) :]]
    finally:
        if ranks.is_main:
            shutil.rmtree(workspace, ignore_errors=True)
    return results
