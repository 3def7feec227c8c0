"""What is written stays written."""

import os
from pathlib import Path


def to_disk(path: Path) -> None:
    """Have the operating system write out what it holds of a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
