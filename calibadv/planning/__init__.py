"""Estimate memory and time of a training step by arithmetic: nothing is loaded and nothing is run.

Every formula names its source; every number that is not in a config is in ``Assumptions`` or is a named constant.
"""
