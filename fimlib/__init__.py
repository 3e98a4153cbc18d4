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

Here are the names that most people need. ``fimlib.bounds``, ``fimlib.trace_bounds``,
``fimlib.spectra``, ``fimlib.empirical``, ``fimlib.projections`` and ``fimlib.families`` have more.
"""

# Imports in the order of the paper.
# isort: off
from fimlib._version import __version__ as __version__

# Sections 1 and 5: output families.
from fimlib.families import (
    Bernoulli as Bernoulli,
    Categorical as Categorical,
    Family as Family,
    Gaussian as Gaussian,
    GaussianHead as GaussianHead,
    Labels as Labels,
    Poisson as Poisson,
)

# Section 3: derivatives of a network, and which engine computes them.
from fimlib.derivatives import (
    Block as Block,
    Derivatives as Derivatives,
)
from fimlib.diagonal import Diagonal as Diagonal
from fimlib.engines.choose import differentiate as differentiate
from fimlib.plan import (
    Plan as Plan,
    plan as plan,
)

# Sections 1 and 3, Appendix A: the Fisher information, its estimators, their variances.
from fimlib.fisher import (
    covariance_i1_i2 as covariance_i1_i2,
    estimate_i1 as estimate_i1,
    estimate_i2 as estimate_i2,
    fisher_information as fisher_information,
    sample_variance_i1 as sample_variance_i1,
    sample_variance_i2 as sample_variance_i2,
    variance_i1 as variance_i1,
    variance_i2 as variance_i2,
)
from fimlib.estimates import load as load
from fimlib.projections import estimate as estimate
from fimlib.hutchinson import hutchinson_variance_i2 as hutchinson_variance_i2
from fimlib.matrices import (
    estimate_i1_matrix as estimate_i1_matrix,
    estimate_i2_matrix as estimate_i2_matrix,
    fisher_matrix as fisher_matrix,
)
from fimlib.precision import (
    compare_estimators as compare_estimators,
    num_samples_needed as num_samples_needed,
)

# Sections 4 and 5: bounds, and the eigenvalues in them.
from fimlib.bounds import (
    corollary_4_2 as corollary_4_2,
    proposition_4_3 as proposition_4_3,
    table_1 as table_1,
    theorem_4_1 as theorem_4_1,
    theorem_5_2 as theorem_5_2,
)
from fimlib.intervals import (
    Bounds as Bounds,
    Interval as Interval,
)
from fimlib.spectra import (
    Spectrum as Spectrum,
    lambda_max as lambda_max,
    spectrum as spectrum,
)
from fimlib.trace_bounds import corollary_4_6 as corollary_4_6

# Section 4.1: random inputs and labels; whole data sets.
from fimlib.distributed import all_reduce as all_reduce
from fimlib.joint import (
    Joint as Joint,
    joint_covariance as joint_covariance,
)
from fimlib.streaming import accumulate as accumulate

# Section 6: the labels of the data ("empirical Fisher").
from fimlib.empirical import (
    data_fisher as data_fisher,
    data_fisher_variance as data_fisher_variance,
    kl_gradient as kl_gradient,
)

# Which formula somebody's diagonal follows.
from fimlib.audit import identify as identify

# All of it in one table.
from fimlib.summary import (
    Summary as Summary,
    summarise as summarise,
)

__all__ = sorted(
    name
    for name, value in globals().items()
    if getattr(value, "__module__", "").startswith("fimlib.")
)
