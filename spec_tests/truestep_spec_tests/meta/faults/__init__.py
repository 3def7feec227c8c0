"""What checks run on each rank: functions that return a fault of a subject, or None. Here is what they share."""

from collections.abc import Callable, Mapping

from torch import Tensor

from truestep_spec_tests.runs import same_bits

Values = Mapping[str, Tensor]


def first_difference(found: Values, expected: Values) -> str | None:
    """The first name whose values are not the same to the last bit."""
    for name, value in expected.items():
        if name not in found:
            return f"{name} is missing"
        if not same_bits(found[name], value):
            return f"{name} differs"
    return None


def unless_it_raises(action: Callable[[], object]) -> str | None:
    """An action that should be refused raises nothing."""
    try:
        action()
    except Exception:
        return None
    return "it goes on as if nothing were wrong"
