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
    where = Path(__file__).parent
    described = subprocess.run(
        ["git", "-C", str(where), "describe", "--always", "--dirty", "--exclude", "*"],
        capture_output=True,
        text=True,
        check=False,
    )
    tracked = subprocess.run(
        ["git", "-C", str(where), "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=False
    )
    return described.stdout.strip() if described.returncode == 0 and tracked.returncode == 0 else None
