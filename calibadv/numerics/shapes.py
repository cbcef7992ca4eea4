"""Shape checks that read like the docstring they guard."""

from __future__ import annotations

from torch import Tensor


def check_shapes(spec: str, *tensors: Tensor) -> None:
    """Check that tensors have the shapes that the letters say; equal letters are equal sizes.

    Args:
        spec: one group of letters per tensor, as in ``"B T, B K, B"``.
        *tensors: the tensors, in the order of ``spec``.

    Raises:
        ValueError: a tensor has another rank, or a letter has two sizes.
    """
    sizes: dict[str, int] = {}
    shapes = [group.split() for group in spec.split(",")]
    assert len(shapes) == len(tensors), f"{len(shapes)} shapes for {len(tensors)} tensors"
    for place, (letters, tensor) in enumerate(zip(shapes, tensors, strict=True)):
        fits = len(letters) == tensor.dim() and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"tensor {place} of [{spec}] has shape {list(tensor.shape)}; known sizes are {sizes}")
