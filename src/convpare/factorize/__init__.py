"""A trained kernel as a chain of plain layers: one file a form, one registry."""

from convpare.factorize import cp, tensor_train, tucker, two_factors
from convpare.factorize.chain import Layout
from convpare.factorize.factors import Factors, chain, factorize, layout
from convpare.factorize.forms import Form, form, forms_of, get_form
from convpare.factorize.ranks import Ranks

__all__ = [
    "Factors", "Form", "Layout", "Ranks", "chain", "cp", "factorize", "form", "forms_of", "get_form", "layout",
    "tensor_train", "tucker", "two_factors",
]  # fmt: skip
