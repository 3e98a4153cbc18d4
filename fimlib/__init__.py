"""Diagonal Fisher information of neural networks: estimators, exact variances, bounds.

After "Tradeoffs of Diagonal Fisher Information Matrix Estimators" (Soen & Sun, NeurIPS 2024,
arXiv:2402.05379); equation numbers in the docstrings are that paper's.

Example: how far can one trust Î₁ and Î₂ of a classifier, given one input and N labels?
    >>> import torch, fimlib
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 3))
    >>> family, derivs = fimlib.Categorical(), fimlib.differentiate(net, torch.randn(1, 4))
    >>> I = fimlib.fisher_information(derivs, family)
    >>> V2 = fimlib.variance_i2(derivs, family, num_samples=100)
    >>> float(V2["2.weight"].max())  # the last layer is linear: Î₂ is exact there (Remark 4.4)
    0.0
"""

# Section 1 and 5: output families.
# Section 4: bounds.
from fimlib.bounds import Bounds, Interval, theorem_4_1

# Section 3: derivatives of the network.
from fimlib.derivatives import Block, Derivatives, differentiate
from fimlib.diagonal import Diagonal
from fimlib.families import Categorical, Family, Gaussian, Labels

# Sections 1 and 3, Appendix A: the Fisher information, its estimators, their variances.
from fimlib.fisher import (
    covariance_i1_i2,
    estimate_i1,
    estimate_i1_matrix,
    estimate_i2,
    estimate_i2_matrix,
    fisher_information,
    fisher_matrix,
    sample_variance_i1,
    sample_variance_i2,
    variance_i1,
    variance_i2,
)

# Eq. 13, Appendix E: eigenvalues.
from fimlib.spectra import (
    Spectrum,
    lambda_max,
    lambda_max_certified,
    lambda_max_minimize,
    lambda_max_multistart,
    spectrum,
)

__version__ = "0.1.0"
__all__ = [
    "Block",
    "Bounds",
    "Categorical",
    "Derivatives",
    "Diagonal",
    "Family",
    "Gaussian",
    "Interval",
    "Labels",
    "Spectrum",
    "covariance_i1_i2",
    "differentiate",
    "estimate_i1",
    "estimate_i1_matrix",
    "estimate_i2",
    "estimate_i2_matrix",
    "fisher_information",
    "fisher_matrix",
    "lambda_max",
    "lambda_max_certified",
    "lambda_max_minimize",
    "lambda_max_multistart",
    "sample_variance_i1",
    "sample_variance_i2",
    "spectrum",
    "theorem_4_1",
    "variance_i1",
    "variance_i2",
]
