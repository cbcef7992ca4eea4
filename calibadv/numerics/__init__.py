"""The formulas: pure functions of tensors, each small enough to check with a pencil.

Import them from their modules: ``advantage``, ``credit``, ``draws``, ``kl``, ``logprobs``, ``loss``, ``masked``,
``ratio``, ``shapes``.
"""
