"""What a training step will take, in memory and in time, from arithmetic alone: nothing is loaded and nothing is run.

Every formula names its source; every number that is not in a config is in ``Assumptions`` or is a named constant.
"""
