"""Options of constructors that TRL's documentation does not have, so that an implementation may lack them."""

import inspect
from collections.abc import Iterable
from typing import Any

import pytest


def lacking(constructor: type[Any], options: Iterable[str]) -> list[str]:
    """Which of some options a constructor lacks."""
    known = inspect.signature(constructor).parameters
    return [option for option in options if option not in known]


def takes(constructor: type[Any], option: str) -> bool:
    """Whether a constructor has an option."""
    return not lacking(constructor, [option])


def require(constructor: type[Any], options: Iterable[str]) -> None:
    """Skips the test if a constructor lacks one of some options."""
    missing = lacking(constructor, options)
    if missing:
        pytest.skip(f"{constructor.__name__} of {constructor.__module__} takes no {', '.join(missing)}")
