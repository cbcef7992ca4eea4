"""Group filters, one per file: which groups a rollout step trains on."""

from calibadv.filters.dynamic_sampling import DynamicSampling
from calibadv.training.sampling import Group, check_filter, refill

__all__ = ["DynamicSampling", "Group", "check_filter", "refill"]
