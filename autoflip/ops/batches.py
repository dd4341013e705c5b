"""Batch sizes as the kernels see them: rows, or images, side by side in vectors."""

from __future__ import annotations

__all__ = ["LANES", "bucket", "filled"]

LANES = 16  # rows or images that a vector holds; AVX2's hold half as many


def bucket(n_rows: int, most: int = 512) -> int:
    """Return the batch size that stands for ``n_rows``: the fewest rows that share its half of a doubling.

    A vector of rows costs the kernels as much half empty as full, while dense pays for each: what pays for 64 rows cost
    33 of them up to 1.27 times dense, what pays for 8 images cost 5 of them 1.4 times. Powers of two stand for
    themselves. More than ``most`` are taken for that many where they fill their vectors, else for one more.
    """
    if n_rows > most:
        return most + (n_rows % LANES > 0)
    whole = 1 << max(0, n_rows - 1).bit_length()
    if n_rows <= 4 or n_rows == whole:
        return max(1, n_rows)
    return 1 + (3 * whole // 4 if n_rows > 3 * whole // 4 else whole // 2)


def filled(n_rows: int) -> float:
    """Return the share of their vectors' lanes that so many rows fill."""
    return n_rows / (-(-n_rows // LANES) * LANES)
