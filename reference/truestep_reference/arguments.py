"""What arguments may be."""

import math
from numbers import Integral, Real

import torch


def integer(name: str, value: object, *, at_least: int) -> int:
    """Checks an integer argument.

    Args:
        name: Name of the argument.
        value: What was given for it.
        at_least: The smallest allowed value.

    Returns:
        The value as an ``int``.

    Raises:
        ValueError: ``value`` is no integer (a ``bool`` is none), or is too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    return int(value)


def real(name: str, value: object, *, at_most: float = math.inf) -> float:
    """Checks a real argument that is finite and not negative.

    Args:
        name: Name of the argument.
        value: What was given for it.
        at_most: The largest allowed value.

    Returns:
        The value as a ``float``.

    Raises:
        ValueError: ``value`` is no number (a ``bool`` is none), not finite, negative or too large.
    """
    allowed = "finite and not negative" if at_most == math.inf else f"in [0, {at_most:g}]"
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and 0 <= number <= at_most):
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
    return number


def name(name: str, value: object) -> str:
    """Checks an argument that names something.

    Args:
        name: Name of the argument.
        value: What was given for it.

    Returns:
        The value.

    Raises:
        ValueError: ``value`` is no string, or there is nothing but space in it.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a string with something in it, got {value!r}")
    return value


def existing_device(name: str, value: object) -> torch.device:
    """Checks an argument that names a device on which float64 tensors can live.

    Args:
        name: Name of the argument.
        value: What was given for it.

    Returns:
        The device.

    Raises:
        ValueError: There is no such device here, or it stores no values.
    """
    allowed = 'a device of this machine that stores float64 tensors, such as "cpu" or "cuda:0"'
    if not isinstance(value, str | torch.device):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    try:
        probe = torch.zeros((), dtype=torch.float64, device=value)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{name} must be {allowed}, got {value!r}: {error}") from error
    if probe.is_meta:
        raise ValueError(f"{name} must be {allowed}, got {value!r}, which stores nothing")
    return torch.device(value)


def schedule_base(*, lag: float, multiplier: float, update_after: int, update_freq: int) -> float:
    """Checks that ρ + γ·t, the base of both weights, is at least one from the first update on.

    The base grows with t, so its value at the first update, t = τ + φ, decides. A smaller base would make
    β_t exceed one: an extrapolation, not an average.

    Args:
        lag: ρ.
        multiplier: γ.
        update_after: τ, in steps.
        update_freq: φ, in steps.

    Returns:
        ρ + γ·(τ + φ).

    Raises:
        ValueError: The base is below one.
    """
    base = lag + multiplier * (update_after + update_freq)
    if base < 1:
        raise ValueError(
            "lag + multiplier * (update_after + update_freq) must be at least 1, so that no weight "
            f"exceeds 1: got {base!r} from lag={lag!r}, multiplier={multiplier!r}, "
            f"update_after={update_after!r}, update_freq={update_freq!r}"
        )
    return base
