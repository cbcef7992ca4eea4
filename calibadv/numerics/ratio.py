"""The exponent of a probability ratio, bounded."""

from __future__ import annotations

from torch import Tensor

# exp(20) = 4.9e8: far beyond what any clip lets pass, and far from where float32 ends (exp(88)).
_MAX_EXPONENT = 20.0


def bounded_exponent(log_ratio: Tensor) -> Tensor:
    """Bound a log-ratio to +-20 before ``exp`` or ``expm1`` is taken of it; within the bounds nothing changes.

    Unbounded, a log-ratio of 90 is infinite as a ratio, and makes all gradients NaN: 0 x inf where the advantage is 0,
    and even where a clip or a dual clip has left the token without gradient.

    Only the value is bounded. The gradient passes as if it were not, so that d exp/dx = exp(20) beyond the bound, which
    is finite and keeps its sign. A clamp with a gradient of 0 would do harm: that of k3 = exp(-d) + d - 1 below d = -20
    would be +1 instead of 1 - exp(20), and push the policy away from the reference where the pull back matters
    most.

    Args:
        log_ratio: logp - logp of another policy, of any shape.

    Returns:
        The same shape.
    """
    fixed = log_ratio.detach()
    return fixed.clamp(-_MAX_EXPONENT, _MAX_EXPONENT) + (log_ratio - fixed)
