"""What numbers may be given for arguments."""

import math
from numbers import Integral, Real


def require_integer(name: str, value: object, minimum: int) -> None:
    """Check an integer; a truth value is none.

    Raises:
        ValueError: It is something else, or smaller than `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {minimum}")


def require_real(name: str, value: object, maximum: float) -> None:
    """Check a finite number of at least 0; a truth value is none.

    Raises:
        ValueError: It is something else, or larger than `maximum`.
    """
    allowed = "a finite number of at least 0" if maximum == math.inf else f"a number in [0, {maximum}]"
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and 0 <= number <= maximum):
        raise ValueError(f"{name}={value!r}: must be {allowed}")
