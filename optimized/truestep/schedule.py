"""When BEMA acts and with which weights: its hyperparameters, checked, and the formulas on them."""

import math
from dataclasses import asdict, dataclass
from numbers import Integral

from truestep.arguments import require_integer, require_real


@dataclass(frozen=True)
class BEMASchedule:
    r"""The hyperparameters of BEMA and what follows from them at a step `t`.

    .. math::

        β_t = \max((ρ + γ t)^{-κ}, β_{min}), \qquad
        α_t = (ρ + γ t)^{-η} \text{ if } η > 0 \text{ else } 0

    Args:
        update_freq: φ, steps between two updates; an integer of at least 1.
        ema_power: κ, power of the EMA weight; finite and not negative. 0 disables the EMA (β = 1).
        bias_power: η, power of the bias weight; finite and not negative. 0 disables the bias correction (α = 0).
        lag: ρ, offset of the schedule in steps; finite and not negative.
        update_after: τ, the step of the snapshot; an integer of at least 0.
        multiplier: γ, speed of the schedule; finite and not negative.
        min_ema_multiplier: β_min, lower bound of β; in [0, 1].

    Raises:
        ValueError: An argument is outside its range, or ρ + γ·(τ + φ) < 1, where β could exceed 1.

    References:
        Block and Zhang (2025), arXiv 2508.00180, algorithm 1.
    """

    update_freq: int
    ema_power: float
    bias_power: float
    lag: float
    update_after: int
    multiplier: float
    min_ema_multiplier: float

    def __post_init__(self) -> None:
        require_integer("update_freq", self.update_freq, minimum=1)
        require_integer("update_after", self.update_after, minimum=0)
        for name in ("ema_power", "bias_power", "lag", "multiplier"):
            require_real(name, getattr(self, name), maximum=math.inf)
        require_real("min_ema_multiplier", self.min_ema_multiplier, maximum=1)
        first_base = self._base(self.update_after + self.update_freq)
        if first_base < 1:
            raise ValueError(
                f"lag={self.lag!r} and multiplier={self.multiplier!r}: lag + multiplier * (update_after + update_freq) "
                f"must be at least 1, got {first_base!r} (the EMA weight would exceed 1); raise lag or multiplier"
            )

    def is_update(self, step: int) -> bool:
        """Whether the shadow moves at `step`: t > τ and (t − τ) mod φ = 0."""
        return step > self.update_after and (step - self.update_after) % self.update_freq == 0

    def ema_weight(self, step: int) -> float:
        """The weight β_t of θ_t in the EMA, in [β_min, 1]."""
        return float(max(self._base(step) ** -self.ema_power, self.min_ema_multiplier))

    def bias_weight(self, step: int) -> float:
        """The weight α_t of the bias correction, in [0, 1]."""
        return float(self._base(step) ** -self.bias_power) if self.corrects_bias else 0.0

    @property
    def corrects_bias(self) -> bool:
        """Whether there is a bias correction at all: η > 0."""
        return self.bias_power > 0

    def hyperparameters(self) -> dict[str, float]:
        """The constructor's arguments by name, as JSON can hold them."""
        return {
            name: int(value) if isinstance(value, Integral) else float(value) for name, value in asdict(self).items()
        }

    def _base(self, step: int) -> float:
        return float(self.lag + self.multiplier * step)
