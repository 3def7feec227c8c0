r"""How far rounding may take another implementation from the reference.

A *subject* evaluates the same formulas on the same trajectory θ_t in a dtype with unit roundoff u (2⁻²⁴ for
float32, 2⁻⁵³ for float64), in an order of its own. This module bounds |subject − reference|, element by
element, step by step. It is a running (a posteriori) analysis: the bounds are made of the values that
occurred, not of norms.

**Assumptions.** θ_t is finite and the subject's dtype holds it exactly. Nothing overflows. Each operation
obeys fl(a ∘ b) = (a ∘ b)(1 + δ) + ζ with |δ| ≤ u and |ζ| ≤ 3λ, where λ is the smallest normal number:
subnormal operands and results may be flushed to zero. A fused multiply-add has one δ less. Where θ_t is NaN
or infinite the bound is NaN or infinite too, and claims nothing.

**Two roundings.** The reference rounds too, with u₆₄ = 2⁻⁵³. Both depart from exact arithmetic on the
reference's own values, so what separates them grows by the subject's local error plus the reference's.

**Weights.** A subject computes β in float64 from (ρ + γ·t)^(−κ) and then rounds it to its dtype. In float64
the base has two roundings, which the power multiplies by κ; the power itself errs by one unit in the last
place, 2u₆₄; a reciprocal, if there is one, adds a rounding. Together (2κ + 3)u₆₄, and (2κ + 4)u₆₄ covers the
products of these for κ ≤ 10⁷. Subject and reference may both err by that, and the cast adds u:

    |β̂ − β| ≤ w = (u + 2(2κ + 4)u₆₄)·β + 4λ

The clamp at β_min does not increase a difference. The same holds for α with η in κ's place.

**EMA.** Let E and E′ be the reference's averages before and after an update, θ the weights, Ê = E + ε with
|ε| ≤ e the subject's, and D = |θ − E| + e ≥ |θ − Ê|. Exactly evaluated, Ê would become (1 − β)E + βθ + (1 −
β)ε: the recurrence contracts old errors. To (1 − β)e each order of evaluation adds its own:

    Ê + β̂·(θ − Ê)          [w(1 + u)² + β(2u + u²)]·D                             (incremental)
    (1 − β̂)·Ê + β̂·θ        [c(1 + u) + u(1 − β)](|E| + e) + [w(1 + u) + uβ]·|θ|   (convex)
    θ − (θ − Ê)·(1 − β̂)    [c(1 + u)² + (1 − β)(2u + u²)]·D                       (complementary)

Each line is the error of a weight times its operand, plus the roundings of all operations but the last; the
weight 1 − β̂, formed in either dtype, errs by at most c = (1 + u)(w + u(1 − β)). ``torch.lerp`` is the
incremental form below β = ½ and the complementary one from there on. Let g be the largest of the three. The
reference evaluates the convex form: its h is that line with u = u₆₄, w = 0 and e = 0. The last addition
rounds by at most u times its result: u(|E′| + e′) in the subject, u₆₄|E′| in the reference. In all

    e′ = [(1 − β)e + g + h + (u + u₆₄)|E′|] / (1 − u) + 32λ

where 32λ is for at most four operations on either side with 3λ each.

**Shadow.** S = E + α(θ − θ₀) may be evaluated as the sum of E, α·θ and −α·θ₀ in any order. With M = |θ| +
|θ₀| the weight errs by w·|θ − θ₀|, the two products round by u(α + w)M, and the first of the two additions by
u times the size of all terms:

    g = w·|θ − θ₀| + u(α + w)M + u[|E| + e + (α + w)(1 + u)M]

To subtract first and multiply then, as the reference does, errs by [w(1 + u)² + α(2u + u²)]·|θ − θ₀|. That is
less, since |θ − θ₀| ≤ M. So, with h again the same line for u = u₆₄, w = 0 and e = 0,

    s = [e + g + h + (u + u₆₄)|S|] / (1 − u) + 32λ

**Reading.** The subject may round its shadow once to a narrower dtype with unit roundoff r, maybe on the way
through float32, as the conversion from float64 to bfloat16 does; then r stands for r + u₃₂(1 + r). Where s =
0 and the narrower dtype holds S exactly, the error is zero; where S may exceed that dtype's range it is
infinite; elsewhere it is at most

    s + r(|S| + s) + μ

with μ for underflow: the narrower dtype's smallest subnormal, and 3λ for the way through float32.

The bounds are themselves evaluated in float64, some thirty roundings of terms that are all positive; a factor
1 + 2⁻⁴⁰ pays for those.

References:
    N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002: section 2.2 for the
    model of arithmetic, section 3.3 for running error analysis.
"""

from typing import NamedTuple

import torch
from torch import Tensor

OWN_ROUNDING = 1 + 2.0**-40


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error u of one rounding to nearest.

    Args:
        dtype: A floating dtype.

    Returns:
        Half the distance from one to the next number: 2⁻²⁴ for float32.
    """
    return torch.finfo(dtype).eps / 2


U32 = unit_roundoff(torch.float32)
U64 = unit_roundoff(torch.float64)


class Bound(NamedTuple):
    """Bounds on |subject − reference| of one parameter for one dtype, element by element, float64.

    Attributes:
        ema: e, for the EMA.
        shadow: s, for the shadow before it is rounded for reading.
    """

    ema: Tensor
    shadow: Tensor


def weight_error(weight: float, *, power: float, dtype: torch.dtype) -> float:
    """The bound w on how far the subject's weight is from the reference's.

    Args:
        weight: β or α as the reference computes it, in [0, 1].
        power: κ for β, η for α.
        dtype: The subject's dtype.

    Returns:
        A bound on the absolute difference.
    """
    u = unit_roundoff(dtype)
    λ = torch.finfo(dtype).smallest_normal
    return (u + 2 * (2 * power + 4) * U64) * weight + 4 * λ


def _incremental_ema(u: float, w: float, beta: float, d: Tensor) -> Tensor:
    """Local error of Ê + β̂·(θ − Ê), where d ≥ |θ − Ê|, before the last rounding."""
    return (w * (1 + u) ** 2 + beta * (2 * u + u**2)) * d


def _convex_ema(u: float, w: float, beta: float, old: Tensor, new: Tensor) -> Tensor:
    """Local error of (1 − β̂)·Ê + β̂·θ, where old ≥ |Ê| and new = |θ|, before the last rounding."""
    c = (1 + u) * (w + u * (1 - beta))
    return (c * (1 + u) + u * (1 - beta)) * old + (w * (1 + u) + u * beta) * new


def _complementary_ema(u: float, w: float, beta: float, d: Tensor) -> Tensor:
    """Local error of θ − (θ − Ê)·(1 − β̂), where d ≥ |θ − Ê|, before the last rounding."""
    c = (1 + u) * (w + u * (1 - beta))
    return (c * (1 + u) ** 2 + (1 - beta) * (2 * u + u**2)) * d


def ema_error(
    e: Tensor, *, before: Tensor, after: Tensor, theta: Tensor, beta: float, w: float, dtype: torch.dtype
) -> Tensor:
    """The bound e′ for the EMA after an update.

    Args:
        e: The bound before the update.
        before: E, the reference's EMA before it.
        after: E′, the reference's EMA after it.
        theta: θ_t.
        beta: β_t.
        w: ``weight_error`` of β_t.
        dtype: The subject's dtype.

    Returns:
        The bound, shaped like θ_t, for every order of evaluation that the module names.
    """
    u = unit_roundoff(dtype)
    λ = torch.finfo(dtype).smallest_normal
    d = (theta - before).abs() + e
    g = _incremental_ema(u, w, beta, d)
    g = torch.maximum(g, _convex_ema(u, w, beta, before.abs() + e, theta.abs()))
    g = torch.maximum(g, _complementary_ema(u, w, beta, d))
    h = _convex_ema(U64, 0.0, beta, before.abs(), theta.abs())
    return (((1 - beta) * e + g + h + (u + U64) * after.abs()) / (1 - u) + 32 * λ) * OWN_ROUNDING


def _expanded_shadow(u: float, w: float, alpha: float, ema: Tensor, theta: Tensor, theta_0: Tensor) -> Tensor:
    """Local error of E + α̂·θ − α̂·θ₀ in any order, where ema ≥ |Ê|, before the last rounding."""
    m = theta.abs() + theta_0.abs()
    return w * (theta - theta_0).abs() + u * (alpha + w) * m + u * (ema + (alpha + w) * (1 + u) * m)


def shadow_error(
    e: Tensor,
    *,
    ema: Tensor,
    shadow: Tensor,
    theta: Tensor,
    theta_0: Tensor,
    alpha: float,
    w: float,
    dtype: torch.dtype,
) -> Tensor:
    """The bound s for the shadow before it is rounded for reading.

    Args:
        e: The bound for the EMA.
        ema: E, the reference's EMA.
        shadow: S, the reference's shadow.
        theta: θ_t.
        theta_0: θ₀.
        alpha: α_t.
        w: ``weight_error`` of α_t.
        dtype: The subject's dtype.

    Returns:
        The bound, shaped like θ_t, for every order of evaluation that the module names.
    """
    u = unit_roundoff(dtype)
    λ = torch.finfo(dtype).smallest_normal
    g = _expanded_shadow(u, w, alpha, ema.abs() + e, theta, theta_0)
    h = _expanded_shadow(U64, 0.0, alpha, ema.abs(), theta, theta_0)
    return ((e + g + h + (u + U64) * shadow.abs()) / (1 - u) + 32 * λ) * OWN_ROUNDING


def read_error(s: Tensor, *, shadow: Tensor, dtype: torch.dtype, read_dtype: torch.dtype) -> Tensor:
    """The bound for a shadow that was rounded once, from the subject's dtype to the one it is read in.

    Args:
        s: The bound before that rounding.
        shadow: S, the reference's shadow, not rounded.
        dtype: The subject's dtype.
        read_dtype: The dtype that the subject's shadow is read in.

    Returns:
        The bound, shaped like the shadow.
    """
    if torch.promote_types(dtype, read_dtype) == read_dtype:
        return s
    target = torch.finfo(read_dtype)
    r = unit_roundoff(read_dtype)
    if dtype == torch.float64 and read_dtype != torch.float32:
        r = r + U32 * (1 + r)
    μ = target.smallest_normal * target.eps + 3 * torch.finfo(torch.float32).smallest_normal
    error = (s + r * (shadow.abs() + s) + μ) * OWN_ROUNDING
    error = torch.where(shadow.abs() + error > target.max, torch.inf, error)
    held_exactly = (s == 0) & (shadow.to(read_dtype) == shadow)
    return torch.where(held_exactly, 0.0, error)


def advance(
    bound: Bound,
    *,
    ema_before: Tensor,
    ema: Tensor,
    shadow: Tensor,
    theta: Tensor,
    theta_0: Tensor,
    beta: float,
    alpha: float,
    ema_power: float,
    bias_power: float,
    dtype: torch.dtype,
) -> Bound:
    """Both bounds after an update.

    Args:
        bound: The bounds before it.
        ema_before: E, the reference's EMA before it.
        ema: E′, the reference's EMA after it.
        shadow: S, the reference's shadow after it.
        theta: θ_t.
        theta_0: θ₀.
        beta: β_t.
        alpha: α_t.
        ema_power: κ.
        bias_power: η.
        dtype: The subject's dtype.

    Returns:
        The new bounds.
    """
    w_beta = weight_error(beta, power=ema_power, dtype=dtype)
    e = ema_error(bound.ema, before=ema_before, after=ema, theta=theta, beta=beta, w=w_beta, dtype=dtype)
    w_alpha = weight_error(alpha, power=bias_power, dtype=dtype)
    s = shadow_error(e, ema=ema, shadow=shadow, theta=theta, theta_0=theta_0, alpha=alpha, w=w_alpha, dtype=dtype)
    return Bound(ema=e, shadow=s)
