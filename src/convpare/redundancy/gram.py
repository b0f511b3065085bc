"""Products of matrices with their own transposes, at little more than half of the multiplications."""

import math

from torch import Tensor

LARGE = 256  # rows from which on blocks pay


def lower_gram(matrix: Tensor) -> Tensor:
    """The lower triangle of M·Mᵀ of (…, rows, columns), with what blocks of rows add to the upper one; all that
    `torch.linalg.eigh` looks at.
    """
    return _by_blocks(matrix, mirrored=False)


def gram(matrix: Tensor) -> Tensor:
    """M·Mᵀ of (…, rows, columns)."""
    return _by_blocks(matrix, mirrored=True)


def _by_blocks(matrix: Tensor, mirrored: bool) -> Tensor:
    rows = matrix.shape[-2]
    if rows < LARGE:
        return matrix @ matrix.mT
    size = math.ceil(rows / (8 if rows >= 4 * LARGE else 4))
    found = matrix.new_zeros(*matrix.shape[:-1], rows)
    for start in range(0, rows, size):
        stop = start + size
        block = matrix[..., start:, :] @ matrix[..., start:stop, :].mT
        found[..., start:, start:stop] = block
        if mirrored:
            found[..., start:stop, stop:] = block[..., size:, :].mT
    return found
