"""Group filters, one per file: which groups a rollout step trains on."""

from calibadv.filters.dynamic_sampling import DynamicSampling
from calibadv.filters.refill import Group, check_filter, refill

__all__ = ["DynamicSampling", "Group", "check_filter", "refill"]
