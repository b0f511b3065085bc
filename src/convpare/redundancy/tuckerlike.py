"""A convolution, average pooling and a fully connected layer as one linear model of the input: y = <Z, W>.

Source: Huang, Si, Li (ICLR 2021 submission uUlGTEbBRL) and arXiv 2112.04857. For an input X (d_1 ... d_N), kernels
A_k (l_1 ... l_N), average pooling to p_1 ... p_N and weights B_k (p_1 ... p_N) of the fully connected layer,

    Z = X x_1 U_1^T ... x_N U_N^T,   W = sum_k B_k (x) A_k   (Kronecker product, mode j of size p_j l_j),

with U_j (d_j, p_j l_j) fixed by window length, stride and pooling. The form is that of a Tucker decomposition of the
weights on X with known factors U_j and unknown core W. See `convpare.redundancy.complexity.Design` for the notation.

Factors are a tuple of tensors, in the order and of the shapes of `factor_shapes`. All functions are differentiable and
work in the dtype and on the device of what they are given.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.redundancy.complexity import Design

Factors = tuple[Tensor, ...]

_CLEAR_GAP = 1e4  # between the last singular value that counts and the first that does not


def input_length(length: int, stride: int, pool: int, pooled: int) -> int:
    """d, the shortest input of one mode that gives `pooled` averages of `pool` windows each."""
    return (pooled * pool - 1) * stride + length


def window_matrices(size: int, length: int, stride: int) -> Tensor:
    """U_i, which cut the windows out of one mode: x^T U_i is the i-th of m = floor((size - length)/stride) + 1 windows.

    Returns (m, size, length), zeros and ones in float64.

    Raises:
        ConvpareError: no window fits.
    """
    if not 1 <= length <= size or stride < 1:
        raise ConvpareError(f"no window of length {length}, stride {stride} fits into {size}; give 1 <= length <= size")
    start = stride * torch.arange((size - length) // stride + 1)
    row = torch.arange(size)[:, None] - start[:, None, None]
    return (row == torch.arange(length)).double()


def pooled_windows(size: int, length: int, stride: int = 1, pool: int = 1) -> Tensor:
    """U_F of one mode: means of `pool` neighbouring window matrices, side by side; windows left over are dropped.

    Returns (size, p length) in float64, with p = floor(m / pool).

    Raises:
        ConvpareError: no window fits, or fewer than `pool`.
    """
    windows = window_matrices(size, length, stride)
    pooled = len(windows) // pool if pool >= 1 else 0
    if pooled == 0:
        raise ConvpareError(f"pooling is over {pool} of {len(windows)} windows; give 1 to {len(windows)}")
    means = windows[: pooled * pool].reshape(pooled, pool, size, length).mean(1)
    return means.transpose(0, 1).reshape(size, pooled * length)


def features(x: Tensor, windows: Sequence[Tensor]) -> Tensor:
    """Z (n, p_1 l_1, ..., p_N l_N) of inputs x (n, d_1, ..., d_N), for the N matrices of `pooled_windows`."""
    for matrix in windows:
        x = x.movedim(1, -1) @ matrix.to(x)  # the mode comes back as the last, so that all return in order
    return x


def predict(x: Tensor, weight: Tensor, windows: Sequence[Tensor]) -> Tensor:
    """y = <Z, W>, (n,), the output of the network: see `features` and `kronecker_sum`."""
    return features(x, windows).flatten(1) @ weight.flatten()


def kronecker_sum(kernels: Tensor, heads: Tensor) -> Tensor:
    """W = sum_k B_k (x) A_k, (p_1 l_1, ..., p_N l_N), of kernels A (K, l_1 ... l_N) and heads B (K, p_1 ... p_N)."""
    lengths, pooled = kernels.shape[1:], heads.shape[1:]
    product: Tensor = torch.tensordot(heads, kernels, dims=([0], [0]))
    interleaved = [axis for j in range(len(lengths)) for axis in (j, len(lengths) + j)]
    return product.permute(interleaved).reshape([p * length for p, length in zip(pooled, lengths, strict=True)])


def rearranged(weight: Tensor, lengths: Sequence[int]) -> Tensor:
    """The L x P matrix sum_k vec(A_k) vec(B_k)^T of W = sum_k B_k (x) A_k, a reordering of its entries.

    Its rank is at most K, which is why K kernels are a matrix regression of rank K (Van Loan, Pitsianis 1993).
    """
    split = [part for size, length in zip(weight.shape, lengths, strict=True) for part in (size // length, length)]
    axes = range(len(split))
    return weight.reshape(split).permute(*axes[1::2], *axes[::2]).reshape(prod(lengths), -1)


def factor_shapes(design: Design) -> tuple[tuple[int, ...], ...]:
    """The shapes of the factors of a design.

    CNN: A (K, l_1 ... l_N), B (K, p_1 ... p_N). Tucker: core (R_1 ... R_N, R), H_j (l_j, R_j) for every mode, expansion
    (K, R), B. CP: H_j (l_j, R) for every mode, expansion (K, R), B.
    """
    head = (design.K, *design.pooled)
    if design.R is None:
        return (design.K, *design.lengths), head
    expansion = (design.K, design.R)
    if design.ranks is None:
        return *((length, design.R) for length in design.lengths), expansion, head
    return (*design.ranks, design.R), *zip(design.lengths, design.ranks, strict=True), expansion, head


def random_factors(design: Design, generator: torch.Generator) -> Factors:
    """Standard normal factors of a design, in float64 on the device of the generator."""
    device = generator.device
    return tuple(
        torch.randn(shape, generator=generator, device=device, dtype=torch.float64) for shape in factor_shapes(design)
    )


def kernels_of(design: Design, factors: Factors) -> Tensor:
    """The kernels A (K, l_1 ... l_N) that the factors make; the last factor, the heads B, is not used."""
    if design.kind == "cnn":
        return factors[0]
    *inner, expansion, _ = factors
    return _tucker(inner, expansion) if design.kind == "tucker" else _cp(inner, expansion)


def weight_tensor(design: Design, factors: Factors) -> Tensor:
    """W (p_1 l_1, ..., p_N l_N) of the factors of a design."""
    return kronecker_sum(kernels_of(design, factors), factors[-1])


def jacobian(design: Design, factors: Factors) -> Tensor:
    """The derivative of W in the factors, (entries of W, entries of all factors), W and factors flattened in order."""
    parts = torch.func.jacfwd(lambda *f: weight_tensor(design, f).flatten(), tuple(range(len(factors))))(*factors)
    return torch.cat([part.flatten(1) for part in parts], 1)


def jacobian_rank(design: Design, seed: int = 0) -> int:
    """The dimension of the set of all W, measured: the rank of `jacobian` at random factors, in float64.

    The rank is where the singular values fall the furthest.

    Raises:
        ConvpareError: they do not fall by 10⁴ anywhere; another seed may give factors that are better conditioned.
    """
    derivative = jacobian(design, random_factors(design, torch.Generator().manual_seed(seed)))
    values = torch.linalg.svdvals(derivative)
    floor = float(values[0]) * torch.finfo(values.dtype).eps * max(derivative.shape)
    values = torch.cat([values, values.new_zeros(1)]).clamp(min=floor)
    fall = values[:-1] / values[1:]
    if fall.max() < _CLEAR_GAP:
        raise ConvpareError(f"the singular values of the Jacobian of {design} have no clear gap; give another seed")
    return int(fall.argmax()) + 1


def _tucker(inner: Sequence[Tensor], expansion: Tensor) -> Tensor:
    core, *modes = inner
    for factor in (*modes, expansion):
        core = torch.tensordot(core, factor, dims=([0], [1]))
    return core.movedim(-1, 0)


def _cp(modes: Sequence[Tensor], expansion: Tensor) -> Tensor:
    product, *others = modes
    for factor in others:
        product = product[..., None, :] * factor
    return (product @ expansion.T).movedim(-1, 0)
