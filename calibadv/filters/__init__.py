"""Group filters, one per file: which groups a rollout step trains on."""

from calibadv.filters.dynamic_sampling import DynamicSampling

__all__ = ["DynamicSampling"]
