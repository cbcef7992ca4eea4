"""Arrays on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibadv.run_folder import replace_durably


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as ``numpy.save`` does, whole or not at all.

    numpy hands a file to C, and does not notice where the last bytes find no space.

    Args:
        path: file to write.
        array: of at least one element, in the order of C.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data.cast("B"))
        replace_durably(partial, path)
    finally:
        partial.unlink(missing_ok=True)
