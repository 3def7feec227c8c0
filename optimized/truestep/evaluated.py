"""Which dataset an evaluation was of, which no event says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from truestep.trainer_frames import variables_of_trainer

OWN_PREFIX = "eval"
"""The prefix of metrics that `Trainer.evaluate` has by default."""


@dataclass(frozen=True)
class Evaluated:
    """A dataset that was evaluated.

    Attributes:
        dataset: The dataset.
        is_own: Whether it is the trainer's evaluation dataset.
        key: Where that is a dict of datasets, the one that it has; otherwise None.
        prefix: Of its metrics.
    """

    dataset: Any
    is_own: bool
    key: str | None
    prefix: str

    def name(self, own: str) -> str:
        """What the dataset is called.

        Args:
            own: What the trainer's is called.
        """
        if self.is_own:
            return own if self.key is None else f"{own}/{self.key}"
        if self.prefix != OWN_PREFIX:
            return self.prefix.removeprefix(f"{OWN_PREFIX}_") or own
        return getattr(getattr(self.dataset, "info", None), "dataset_name", None) or own


def evaluated_by(trainer: Any) -> list[Evaluated]:
    """What the `Trainer.evaluate` that has called us has evaluated; in a loop of one's own, the trainer's dataset.

    Returns:
        Usually one; the parts of a dict of datasets where they were evaluated at once.
    """
    for variables in variables_of_trainer():
        if "eval_dataset" in variables and "metric_key_prefix" in variables:
            found = variables["eval_dataset"]
            return _parts(trainer.eval_dataset if found is None else found, variables["metric_key_prefix"], trainer)
    return _parts(trainer.eval_dataset, OWN_PREFIX, trainer)


def _parts(dataset: Any, prefix: str, trainer: Any) -> list[Evaluated]:
    own = trainer.eval_dataset
    for key, part in own.items() if isinstance(own, Mapping) else ():
        if dataset is part or (isinstance(dataset, str) and dataset == key):
            return [Evaluated(part, True, str(key), prefix)]
    if isinstance(dataset, Mapping):
        return [one for key, part in dataset.items() for one in _parts(part, f"{prefix}_{key}", trainer)]
    return [Evaluated(dataset, dataset is own, None, prefix)]
