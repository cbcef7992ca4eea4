"""Open a corpus file, folder or index."""

from __future__ import annotations
