"""Truncated decompositions of batches of matrices, in the precision that the result needs."""

import torch
from torch import Tensor

from convpare.redundancy.gram import lower_gram

COARSE = 1e-4
"""Share of the squared norm: where a truncation drops more, a Gram matrix in float32 is accurate enough.

Its rounding, some 1e-7 of the largest eigenvalue, moves the dropped share in second order only.
"""


def basis(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal (b, rows, rank): the left singular vectors of (b, rows, columns) with the largest singular values.

    float64 is decomposed itself; float32 through its Gram matrix, in float64 where little is dropped.
    """
    rows, columns = matrix.shape[-2:]
    if matrix.dtype == torch.float64:
        vectors: Tensor = torch.linalg.svd(matrix, full_matrices=False).U
        return vectors[..., :rank]
    if rows <= columns:
        return _eigenvectors(matrix, rank).to(matrix.dtype)
    vectors = torch.linalg.qr(matrix.double() @ _eigenvectors(matrix.mT, rank)).Q
    return vectors.to(matrix.dtype)


def split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of this rank as a product (b, rows, rank) · (b, rank, columns).

    Each factor carries the square roots of the singular values.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        right, left = split(matrix.mT, rank)
        return left.mT, right.mT
    left = basis(matrix, rank)
    right = left.mT @ matrix
    scale = right.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(right.dtype).tiny).sqrt()
    return left * scale.mT, right / scale


def truncate(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank."""
    if matrix.shape[-2] > matrix.shape[-1]:
        return truncate(matrix.mT, rank).mT
    left = basis(matrix, rank)
    return left @ (left.mT @ matrix)


def singular_values(matrix: Tensor) -> Tensor:
    """(b, min(rows, columns)) in float64, falling."""
    if matrix.dtype == torch.float64:
        values: Tensor = torch.linalg.svdvals(matrix)
        return values
    return energies(matrix).sqrt()


def energies(matrix: Tensor) -> Tensor:
    """The squares of the singular values, (b, min(rows, columns)) in float64, falling.

    Through the Gram matrix: accurate to a rounding of the largest, not each to one of its own.
    """
    wide = (matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT).double()
    squares: Tensor = torch.linalg.eigvalsh(lower_gram(wide))
    return squares.clamp_min(0).flip(-1)


def energy_of(tensor: Tensor) -> float:
    """The squared norm."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def project(tensor: Tensor, vectors: Tensor, axis: int) -> Tensor:
    """Coordinates along `axis` in a basis: vectors (b or 1, size, rank) applied to tensor (b, ..., size, ...)."""
    moved = tensor.movedim(axis, 1)
    seen = vectors.mT @ moved.flatten(2)
    return seen.reshape(moved.shape[0], seen.shape[1], *moved.shape[2:]).movedim(1, axis)


def _eigenvectors(short: Tensor, rank: int) -> Tensor:
    """Of M·Mᵀ, where M has no more rows than columns; float64, the largest first."""
    if short.device.type == "cpu":  # elsewhere a product in float32 may be one in TF32
        values, vectors = torch.linalg.eigh(lower_gram(short).double())
        if float(values[..., :-rank].sum()) > COARSE * float(values.sum()):
            return _last(vectors, rank)
    return _last(torch.linalg.eigh(lower_gram(short.double())).eigenvectors, rank)


def _last(vectors: Tensor, rank: int) -> Tensor:
    return vectors[..., -rank:].flip(-1)
