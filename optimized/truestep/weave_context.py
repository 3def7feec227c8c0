"""What this process has to do with Weave already.

Weave is not imported here: that takes a second, draws random numbers and sets up reports to its makers.
"""

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def obstacle(project_name: str | None) -> str | None:
    """Why nothing can or should be logged, if that is so: Weave is not installed, or the user has turned it off.

    Args:
        project_name: The project that was asked for, if any. Otherwise a run of Weights & Biases that is turned off
            turns this off too.
    """
    if importlib.util.find_spec("weave") is None:
        return "Weave is not installed (pip install weave)"
    if os.environ.get("WEAVE_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "WEAVE_DISABLED is set"
    if _client() is not None and (_settings() or {}).get("disabled"):
        return "Weave is turned off in its settings"
    if project_name is None and _client() is None and getattr(_run(), "disabled", False):
        return "Weights & Biases is turned off"
    return None


def project_of_this_process() -> str | None:
    """The project of the Weave client that there is, or else of the active Weights & Biases run, if there is one."""
    client = _client()
    if client is not None:
        return f"{client.entity}/{client.project}"
    run = _run()
    if run is None or not run.project:
        return None
    return f"{run.entity}/{run.project}" if run.entity else str(run.project)  # an offline run has no entity


def of_this_process() -> dict[str, Any]:
    """What another process has to know to log as this one would, as JSON.

    Returns:
        `sys_path`, and where this process has set up Weave, its `settings` and its calls' `attributes`.
    """
    client = _client()
    return {
        "sys_path": list(map(str, sys.path)),
        "settings": None if client is None else _settings(),
        "attributes": getattr(client, "attributes", None),
    }


def active_run() -> tuple[str, int] | None:
    """The id of the active Weights & Biases run and its step, if there is one."""
    run = _run()
    return None if run is None else (str(run.id), int(run.step))


def as_the_client_would(prompt: str, completion: str) -> tuple[dict[str, Any], Any]:
    """The inputs and the output of a prediction, after the functions that an existing client has been given for that.

    They may be there to take out what must not leave the machine.
    """
    client = _client()
    inputs: dict[str, Any] = {"prompt": prompt}
    output: Any = completion
    change: Callable[[Any], Any] | None = getattr(client, "postprocess_inputs", None)
    if change is not None:
        inputs = change({"inputs": inputs}).get("inputs", {})
    change = getattr(client, "postprocess_output", None)
    if change is not None:
        output = change(output)
    return inputs, output


def _client() -> Any:
    weave: Any = sys.modules.get("weave")
    return None if weave is None else weave.get_client()


def _settings() -> dict[str, Any] | None:
    """Weave's settings in this thread, if there are any."""
    with suppress(AttributeError, KeyError, TypeError):
        return dataclasses.asdict(sys.modules["weave.trace.settings"]._current_settings.get())
    return None


def _run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)
