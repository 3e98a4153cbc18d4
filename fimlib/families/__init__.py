"""Families of distributions of the labels, by their natural parameters (Sections 1 and 5)."""

from fimlib.families.base import Family, Labels
from fimlib.families.categorical import Categorical
from fimlib.families.gaussian import Gaussian, GaussianHead
from fimlib.families.independent import Bernoulli, Independent, Poisson
from fimlib.families.product import Heads, Positions, Product

__all__ = [
    "Bernoulli",
    "Categorical",
    "Family",
    "Gaussian",
    "GaussianHead",
    "Heads",
    "Independent",
    "Labels",
    "Poisson",
    "Positions",
    "Product",
]
