"""What a verification ran on."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("truestep", "torch", "transformers", "accelerate", "deepspeed", "peft", "safetensors", "weave")


def environment() -> dict[str, str]:
    """Versions, processors and the source tree's commit, by name."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cpu"] = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str | None:
    """The commit of the tree that this file is in, if it is in one; with a mark if the tree has changes."""
    is_tracked = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    return _git("describe", "--always", "--dirty", "--exclude", "*") if is_tracked else None


def _git(*arguments: str) -> str | None:
    """What git says in the folder of this file, if there is git and it has something to say."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
