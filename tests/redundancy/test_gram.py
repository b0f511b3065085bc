"""Products of matrices with their transposes, by blocks."""

import pytest
import torch

from convpare.redundancy.gram import gram, lower_gram


@pytest.mark.parametrize("rows", [1, 7, 255, 256, 259, 1023, 1024, 1031])
def test_blocks_make_up_the_product(rows: int):
    matrix = torch.randn(2, rows, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = matrix @ matrix.mT
    torch.testing.assert_close(gram(matrix), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(lower_gram(matrix).tril(), whole.tril(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gram(matrix[0]), whole[0], rtol=0, atol=1e-12)
