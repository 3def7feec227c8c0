"""Names for callbacks of one kind in one training, which do not know of each other."""

import weakref
from typing import Any

from transformers import TrainerCallback, TrainerState


def numbered(name: str, callback: TrainerCallback, state: TrainerState) -> str:
    """A name that is this callback's own in this training: `name` of the first that asks, then `name_2` and so on.

    All callbacks see the one state of the training, on which they sign.
    """
    signed: list[weakref.ref[Any]] = vars(state).setdefault(f"_truestep_{name}", [])
    if weakref.ref(callback) not in signed:
        signed.append(weakref.ref(callback))
    number = signed.index(weakref.ref(callback))
    return name if number == 0 else f"{name}_{number + 1}"
