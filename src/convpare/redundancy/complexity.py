"""How many samples a convolutional layer needs, beside how many numbers it is stored in.

Source: Huang, Si, Zheng, Li (arXiv 2112.04857) and Huang, Si, Li (ICLR 2021 submission uUlGTEbBRL), who write a
convolution, average pooling and a fully connected layer as one linear model y = <Z, W> + noise; see
`convpare.redundancy.tuckerlike`. Counts of the papers' form are `Design.naive_count` and `Design.sample_complexity`;
`Design.intrinsic_dimension` is the dimension of the set of all W, derived here.

Notation: K kernels (output channels) of lengths l_1 ... l_N, pooled outputs of lengths p_1 ... p_N, L = l_1 ... l_N,
P = p_1 ... p_N, ranks R_1 ... R_N of the kernels' modes, rank R of their output channels (Tucker) or of all (CP).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from operator import gt
from typing import Literal, NamedTuple, get_args

from convpare.errors import ConvpareError

Kind = Literal["cnn", "tucker", "cp"]


@dataclass(frozen=True)
class Design:
    """The sizes of a model; everything that is counted follows from them.

    Attributes:
        kind: "cnn": K kernels without structure. "tucker", "cp": kernels stacked to a tensor (l_1 ... l_N, K) of this
            decomposition.
        lengths: l_1 ... l_N, the lengths of a kernel.
        pooled: p_1 ... p_N, the lengths of a channel after pooling, where the fully connected layer reads it.
        K: output channels.
        R: Tucker: the rank of the output channels, at most K. CP: the rank, which may exceed K. None for "cnn".
        ranks: Tucker: R_1 ... R_N, R_j at most l_j. None for the others.

    Raises:
        ConvpareError: sizes that are missing, not positive or impossible.
    """

    kind: Kind
    lengths: tuple[int, ...]
    pooled: tuple[int, ...]
    K: int
    R: int | None = None
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConvpareError(f"kind is {self.kind!r}; give one of {', '.join(map(repr, get_args(Kind)))}")
        sizes = [*self.lengths, *self.pooled, self.K, *(self.ranks or ()), *([] if self.R is None else [self.R])]
        if any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ConvpareError(f"{self} has a size that is no positive integer; give positive integers")
        if not self.lengths or len(self.lengths) != len(self.pooled):
            raise ConvpareError(
                f"lengths are {self.lengths} and pooled {self.pooled}; give one of each for every mode, at least one"
            )
        if (self.R is None) != (self.kind == "cnn") or (self.ranks is None) != (self.kind != "tucker"):
            raise ConvpareError(
                f"a design of kind {self.kind!r} has R={self.R}, ranks={self.ranks}; "
                "give none for 'cnn', R for 'cp', R and ranks for 'tucker'"
            )
        if self.ranks is not None:
            self._check_ranks(self.ranks)

    def _check_ranks(self, ranks: tuple[int, ...]) -> None:
        if len(ranks) != len(self.lengths) or any(map(gt, ranks, self.lengths)):
            raise ConvpareError(f"ranks are {ranks} for lengths {self.lengths}; give one for each, at most as large")
        if self._rank > self.K:
            raise ConvpareError(f"R is {self.R}, but K={self.K} output channels have a rank of at most {self.K}")

    @property
    def order(self) -> int:
        """N, the number of modes of the input."""
        return len(self.lengths)

    @property
    def L(self) -> int:  # noqa: N802
        """Weights of a kernel."""
        return prod(self.lengths)

    @property
    def P(self) -> int:  # noqa: N802
        """Outputs of a channel after pooling."""
        return prod(self.pooled)

    @property
    def _rank(self) -> int:
        return self.K if self.R is None else self.R

    @property
    def _kernel_count(self) -> int:
        """Entries of the factors of the kernels, without the factor of the output channels."""
        R, ranks = self._rank, self.ranks or ()
        if self.kind == "tucker":
            return R * prod(ranks) + sum(length * rank for length, rank in zip(self.lengths, ranks, strict=True))
        return R * (self.L if self.kind == "cnn" else sum(self.lengths))

    @property
    def naive_count(self) -> int:
        """d_#: entries of all factors and of the fully connected layer, K P of them."""
        expansion = 0 if self.kind == "cnn" else self.K * self._rank
        return self._kernel_count + expansion + self.K * self.P

    def sample_complexity(self, *, cp_core: bool = False) -> int:
        """d_M: the estimation error of the model falls as the square root of d_M over the number of samples.

        K(L + P + 1) for a CNN; R R_1...R_N + sum l_j R_j + R P for Tucker; R(sum l_j + P) for CP. The number of output
        channels K of a compressed model is not in it. For K > min(L, P) (CNN), where more kernels add no functions,
        and for R > P (Tucker, CP), it stays the papers' expression, an upper bound.

        Args:
            cp_core: add R^(N+1) for CP: the count where CP is treated as a Tucker model with a full core. The papers'
                reading is not certain here; without it d_M counts only what CP has.
        """
        if self.kind == "cnn":
            return self.K * (self.L + self.P + 1)
        core: int = self._rank ** (self.order + 1) if cp_core and self.kind == "cp" else 0
        return core + self._kernel_count + self._rank * self.P

    def gap(self, *, cp_core: bool = False) -> int:
        """d_# - d_M, the papers' sign of redundancy: K R + (K - R) P for Tucker, and for CP without `cp_core`.

        At K = R it is R², which is freedom of the factors alone; with K it grows by R + P for every further channel.
        For a CNN it is -K.
        """
        return self.naive_count - self.sample_complexity(cp_core=cp_core)

    @property
    def intrinsic_dimension(self) -> int:
        """The dimension of the set of all W, the rank of the Jacobian of (factors -> W) at generic factors.

        Rearranged, W is an L x P matrix of rank at most k = min(K, R, L, P); its column space is spanned by kernels of
        the given structure, its row space is free. So it is dim(kernels of k outputs) + k(P - k), where the first is:

        * CNN: k L, hence k(L + P - k) in all, for any K.
        * Tucker: k r_1...r_N + sum r_j(l_j - r_j) with each r_j clipped to what the other ranks leave, hence in the
          regular case d_M - sum R_j² - R².
        * CP: that of tensors (l_1 ... l_N, k) of rank R, hence in the regular case R(sum l_j + P) - N R. Where that
          exceeds the dimension of an unfolding of rank R, the latter holds (Catalisano, Geramita, Gimigliano 2008:
          one length far above the others). The known formats that fall one short are taken into account (Abo,
          Ottaviani, Peterson 2009); that there are no others is proven for small formats, and conjectured.
        """
        k = min(self.K, self._rank, self.L, self.P)
        free = k * (self.P - k)
        if self.kind == "cnn":
            return k * self.L + free
        if self.kind == "cp":
            return _cp_dimension([*self.lengths, k], self._rank) + free
        assert self.ranks is not None
        *inner, k = _multilinear_ranks([*self.ranks, k])
        factors = sum(r * (length - r) for length, r in zip(self.lengths, inner, strict=True))
        return prod(inner) * k + factors + k * (self.P - k)


class Complexity(NamedTuple):
    """Numbers that a layer is stored in, and numbers that its samples have to determine."""

    d_naive: int
    d_sample: int

    @property
    def gap(self) -> int:
        """d_naive - d_sample."""
        return self.d_naive - self.d_sample


def layer_complexity(
    shape: Sequence[int], rank_out: int, ranks: Sequence[int] | None = None, pooled: int = 1
) -> Complexity:
    """The two counts for one convolution of a network, K kernels over C input channels.

    The input channels are one more mode of the input, which the window covers at once, so it keeps one position: the
    kernel is a tensor (C, l_1 ... l_N, K), and L = C l_1 ... l_N. The layer behind is taken to be what the theory has
    there, pooling and one linear output: K `pooled` weights. The nonlinearity between is outside the theory.

    Args:
        shape: (K, C, *kernel), as PyTorch's weight. Of a grouped convolution give one group: (K/groups, C/groups, ...).
        rank_out: R, the rank of the output channels, such as a numerical rank of the unfolding K x L.
        ranks: None: the weight is stored dense, d_naive = K(L + P), and its rank is R, d_sample = R(L + P).
            (R_C, R_1 ... R_N): it is stored as a Tucker decomposition, and both counts are those of `Design`. A mode
            of full rank counts its square factor, as in the papers.
        pooled: P, positions of a channel that are read behind the layer; 1: global average pooling.

    Raises:
        ConvpareError: sizes that are not positive, or ranks above their sizes.
    """
    if len(shape) < 2:
        raise ConvpareError(f"the shape of a convolution's weight is {tuple(shape)}; give (K, C, *kernel)")
    K, *lengths = shape
    if ranks is None:
        dense = Design("cnn", (prod(lengths),), (pooled,), K)
        if not 1 <= rank_out <= min(K, dense.L):
            raise ConvpareError(f"rank_out is {rank_out}; give 1 to {min(K, dense.L)} for a weight {tuple(shape)}")
        return Complexity(dense.naive_count, rank_out * (dense.L + dense.P))
    design = Design("tucker", tuple(lengths), (pooled, *[1] * (len(lengths) - 1)), K, rank_out, tuple(ranks))
    return Complexity(design.naive_count, design.sample_complexity())


def _multilinear_ranks(ranks: Sequence[int]) -> list[int]:
    """The ranks that a generic core of this size has: none exceeds the product of the others."""
    return [min(rank, prod(ranks) // rank) for rank in ranks]


def _cp_dimension(sizes: Sequence[int], rank: int) -> int:
    """The dimension of the tensors of this size that have CP rank `rank` or less, or are limits of such."""
    sizes = sorted(size for size in sizes if size > 1)
    total = prod(sizes)
    expected = rank * (sum(sizes) - len(sizes) + 1)
    unfoldings = [k * (total // size + size - k) for size in sizes for k in [min(rank, size, total // size)]]
    return min([expected, total, *unfoldings]) - _is_defective(sizes, rank)


def _is_defective(sizes: Sequence[int], rank: int) -> bool:
    """The balanced formats known to have one dimension less than the numbers suggest."""
    match sizes:
        case [3, 4, 4]:
            return rank == 5
        case [3, m, n] if m == n and n % 2 == 1:
            return 2 * rank == 3 * n - 1
        case [2, 2, m, n] if m == n:
            return rank == 2 * n - 1
    return False
