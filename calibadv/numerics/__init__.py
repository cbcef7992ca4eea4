"""The formulas: pure functions of tensors, each small enough to check with a pencil.

Import them from their modules: ``advantages``, ``credit``, ``kl``, ``logprobs``, ``losses``, ``masked``, ``ratio``,
``rng``.
"""
