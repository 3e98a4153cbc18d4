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

# Section 4, Appendices B and C: bounds.
from fimlib.bounds import (
    SoftmaxBounds,
    corollary_4_2,
    corollary_b_3,
    corollary_q_1,
    lemma_b_2,
    off_diagonal,
    proposition_4_3,
    table_1,
    theorem_4_1,
    theorem_5_2,
    theorem_b_1,
)

# Section 3: derivatives of the network.
from fimlib.derivatives import Block, Derivatives
from fimlib.diagonal import Diagonal
from fimlib.distributed import all_reduce

# Section 6, Appendix F: the data Fisher information ("empirical Fisher").
from fimlib.empirical import (
    data_fisher,
    data_fisher_covariance,
    data_fisher_matrix,
    data_fisher_variance,
    kl_gradient,
    reparameterise,
)
from fimlib.engines.choose import differentiate

# Any network, any number of outputs: an estimate with its standard error.
from fimlib.estimate import Estimate, LayerEstimate, estimate, variance_importance, variance_signs

# Sections 1 and 5: output families.
from fimlib.families import Bernoulli, Categorical, Independent, Poisson
from fimlib.families.base import Family, Labels
from fimlib.families.gaussian import Gaussian, GaussianHead

# Sections 1 and 3, Appendix A: the Fisher information, its estimators, their variances.
from fimlib.fisher import (
    covariance_i1_i2,
    estimate_i1,
    estimate_i2,
    fisher_information,
    sample_variance_i1,
    sample_variance_i2,
    variance_i1,
    variance_i2,
)

# Section 3, where there is no exact S: an estimate of V₂.
from fimlib.hutchinson import HutchinsonEstimate, hutchinson_variance_i2
from fimlib.intervals import Bounds, Interval

# Section 4.1: random inputs and labels.
from fimlib.joint import Joint, joint_covariance

# Section 1: full matrices on chosen parameters.
from fimlib.matrices import estimate_i1_matrix, estimate_i2_matrix, fisher_matrix

# Engines: which takes a network, and its cost.
from fimlib.plan import Plan, plan

# Section 3's remark on Chebyshev: how many labels, and which estimator.
from fimlib.precision import Comparison, compare_estimators, num_samples_needed

# Eq. 13, Corollary 4.2, Appendix E: eigenvalues.
from fimlib.spectra import (
    Spectrum,
    fourth_moment_spectrum,
    lambda_max,
    shifted_power_method,
    spectrum,
)

# Section 4.1 at scale: a data set in batches, over processes.
from fimlib.streaming import accumulate

# All of it in one table: how wrong, which estimator, how many samples.
from fimlib.summary import LayerSummary, Summary, summarise
from fimlib.trace_bounds import (
    TraceBound,
    corollary_4_6,
    theorem_c_1,
    theorem_c_2,
)

__version__ = "0.2.0"
__all__ = [
    "Bernoulli",
    "Block",
    "Bounds",
    "Categorical",
    "Comparison",
    "Derivatives",
    "Diagonal",
    "Estimate",
    "Family",
    "Gaussian",
    "GaussianHead",
    "HutchinsonEstimate",
    "Independent",
    "Interval",
    "Joint",
    "Labels",
    "LayerEstimate",
    "LayerSummary",
    "Plan",
    "Poisson",
    "SoftmaxBounds",
    "Spectrum",
    "Summary",
    "TraceBound",
    "accumulate",
    "all_reduce",
    "compare_estimators",
    "corollary_4_2",
    "corollary_4_6",
    "corollary_b_3",
    "corollary_q_1",
    "covariance_i1_i2",
    "data_fisher",
    "data_fisher_covariance",
    "data_fisher_matrix",
    "data_fisher_variance",
    "differentiate",
    "estimate",
    "estimate_i1",
    "estimate_i1_matrix",
    "estimate_i2",
    "estimate_i2_matrix",
    "fisher_information",
    "fisher_matrix",
    "fourth_moment_spectrum",
    "hutchinson_variance_i2",
    "joint_covariance",
    "kl_gradient",
    "lambda_max",
    "lemma_b_2",
    "num_samples_needed",
    "off_diagonal",
    "plan",
    "proposition_4_3",
    "reparameterise",
    "sample_variance_i1",
    "sample_variance_i2",
    "shifted_power_method",
    "spectrum",
    "summarise",
    "table_1",
    "theorem_4_1",
    "theorem_5_2",
    "theorem_b_1",
    "theorem_c_1",
    "theorem_c_2",
    "variance_i1",
    "variance_i2",
    "variance_importance",
    "variance_signs",
]
