"""Where a printed claim is false, loose or in need of a hypothesis: a case that shows it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fimlib
from fimlib import Categorical, Gaussian
from fimlib.spectra.search import minimize
from support.checks import cases as make
from support.checks.check import Check, equal, finding, together
from support.checks.exact import oracle

FAMILY = Categorical()


def single(D: Tensor, h: Tensor) -> fimlib.Derivatives:
    """One parameter whose J and S are D, at one output."""
    return make.as_derivatives(h, D[None, :, None], D[None, :, None])


def softmax_lower_bounds_are_zero(cases: int) -> Check:
    """1. 𝓘1 = 0 and M(1,1,1,1) = 0: the lower bounds of Theorem 4.1 say ≥ 0.

    Shows the largest |𝓘1| and M(1,1,1,1), computed.
    """
    largest, tried = 0.0, 0
    for num_classes in make.CLASSES:
        h = make.logits(num_classes, -(-cases // 100))
        ones = torch.ones(len(h), num_classes, 1, dtype=torch.float64)
        image = (FAMILY.covariance(h) @ ones).abs().max()
        largest = max(largest, float(image), float(FAMILY.variance1(h, ones).max()))
        tried += len(h)
    return finding(largest <= 1e-14, largest, tried)


def centring_helps(_cases: int) -> Check:
    """1. After centring, the lower bound of I is positive and the upper one smaller.

    Shows uncentred over centred upper bound, for one class of ten at the uniform softmax.
    """
    h = torch.zeros(1, 10, dtype=torch.float64)
    e = torch.eye(10, dtype=torch.float64)[0]
    plain = fimlib.theorem_4_1(single(e, h), FAMILY).fisher
    centred = fimlib.theorem_4_1(single(e, h), FAMILY, centred=True).fisher
    ratio = float(plain.upper["theta"] / centred.upper["theta"])
    return finding(float(centred.lower["theta"]) > 0.05 and ratio > 1.05, ratio)


def corollary_4_2_lower_is_negative(cases: int) -> Check:
    """2. Eq. 14 is −λ_max(𝓘)² < 0 for softmax. Shows the largest value seen."""
    h = make.logits(5, -(-cases // 100))
    lower = fimlib.corollary_4_2(FAMILY, h).lower
    return finding(bool((lower < 0).all()), float(lower.max()), len(h))


def eq_30_lower_is_zero(cases: int) -> Check:
    """2. The lower bound of Eq. 30 is 0 for softmax, whatever J. Shows the largest, relatively."""
    h = make.logits(4, -(-cases // 100))
    J = make.normal(len(h), 4, 12, seed=0)
    derivs = make.as_derivatives(h, J, J)
    lower, upper = fimlib.trace_bounds.theorem_c_1(derivs, FAMILY).variance_i1
    ratio = float((lower / upper.clamp_min(1e-300)).max())
    return finding(ratio <= 1e-12, ratio, len(h))


def eq_30_is_not_always_tighter(_cases: int) -> Check:
    """2. Eq. 30's upper bound can exceed the second term of Eq. 18. Shows by what factor."""
    h = make.logits(3, 500)
    J = make.normal(len(h), 3, 2, seed=1)
    derivs = make.as_derivatives(h, J, J)
    fine = fimlib.trace_bounds.theorem_c_1(derivs, FAMILY).variance_i1[1]
    coarse = fimlib.corollary_4_6(derivs, FAMILY).variance_i1.norm
    ratio = float((fine / coarse).nan_to_num(0).max())
    return finding(ratio > 1.001, ratio, len(h))


def fourth_cumulant(F: object, h: Tensor) -> Tensor:
    """∇⁴F by autograd, four times."""
    return torch.func.hessian(torch.func.hessian(F))(h)  # type: ignore[arg-type, no-any-return]


def eq_11_lower_is_not_negative(cases: int) -> Check:
    """2. Eq. 11: M is positive semidefinite, so its lower bound is never negative, as Eq. 14 is.

    Shows the smallest difference between both lower bounds on λ_min(M).
    """
    gaps, semidefinite = [], True
    for num_classes in (2, 3, 5):
        h = make.logits(num_classes, -(-cases // 1000))
        fourth, cov = FAMILY.fourth_moment(h), FAMILY.covariance(h)
        M = fourth - torch.einsum("bij,bkl->bijkl", cov, cov)
        eigenvalues = torch.linalg.eigvalsh(M.reshape(len(h), num_classes**2, num_classes**2))
        semidefinite &= bool((eigenvalues[:, 0] >= -1e-15).all())
        gaps.append(fimlib.spectrum(FAMILY, h).min_outer - fimlib.corollary_4_2(FAMILY, h).lower)
    gap = torch.cat(gaps)
    return finding(semidefinite and bool((gap > 0).all()), float(gap.min()), len(gap))


def mean_and_covariance_are_cumulants(_cases: int) -> Check:
    """3. η = ∇F and 𝓘 = ∇²F. Shows the largest relative error."""
    h = make.logits(4, 1)[0]
    mean = torch.func.grad(lambda v: FAMILY.log_partition(v[None])[0])(h)
    cov = torch.func.hessian(lambda v: FAMILY.log_partition(v[None])[0])(h)
    found = together(
        equal(mean, FAMILY.mean(h[None])[0]), equal(cov, FAMILY.covariance(h[None])[0])
    )
    return finding(found.holds, found.worst, found.cases)


def moments_are_not_cumulants(_cases: int) -> Check:
    """3. 𝓚 = ∇⁴F + three pairings of 𝓘. Shows ‖𝓚 − ∇⁴F‖/‖𝓚‖: the pairings are not small."""
    h = make.logits(4, 1)[0]
    fourth = FAMILY.fourth_moment(h[None])[0]
    cov = FAMILY.covariance(h[None])[0]
    cumulant = fourth_cumulant(lambda v: FAMILY.log_partition(v[None])[0], h)
    pairs = sum(torch.einsum(p, cov, cov) for p in ("ab,cd->abcd", "ac,bd->abcd", "ad,bc->abcd"))
    exact = equal(cumulant + pairs, fourth)
    gap = float((fourth - cumulant).norm() / fourth.norm())
    return finding(exact.holds and gap > 0.1, gap)


def variance_by_kurtosis(cases: int) -> Check:
    """3. N V₁ = ∇⁴F[J,J,J,J] + 2I²: an equality, at random and adversarial softmax vectors."""
    parts = []
    for num_classes in (2, 3, 4):
        for h in make.logits(num_classes, -(-cases // 1000)):
            J = make.unit(make.normal(1, num_classes, 1, seed=0))
            cumulant = fourth_cumulant(lambda v: FAMILY.log_partition(v[None])[0], h)
            u = J[0, :, 0]
            slow = torch.einsum("abcd,a,b,c,d->", cumulant, u, u, u, u)
            slow = slow + 2 * FAMILY.information(h[None], J)[0, 0].square()
            parts.append(equal(FAMILY.variance1(h[None], J)[0], slow[None], 1.0))
    return together(*parts)


def relu_second_estimator_is_exact(_cases: int) -> Check:
    """4. ReLU away from kinks: S = 0, V₂ = 0 at every weight. Shows the largest V₂."""
    derivs = make.trained_derivatives(nn.ReLU)
    largest = max(float(v.max()) for v in fimlib.variance_i2(derivs, FAMILY).values())
    tried = sum(v.numel() for v in fimlib.variance_i2(derivs, FAMILY).values())
    return finding(largest == 0, largest, tried)


def relu_keeps_the_equality(_cases: int) -> Check:
    """4. ReLU away from kinks: E[∂ℓ ∂ℓᵀ] = −E[∂²ℓ] as ever. Shows the gap, relative."""
    o = oracle(nn.ReLU)
    outer = torch.einsum("xy,xyi,xyj->xij", o.p, o.gradients, o.gradients)
    curvature = -torch.einsum("xy,xyij->xij", o.p, o.hessians)
    both = equal(curvature, outer)
    return finding(both.holds, both.worst, both.cases)


def relu_at_a_kink(_cases: int) -> Check:
    """4. At a kink of ReLU −E[∂²ℓ] has one value from the left and another from the right.

    Shows the relative gap between both.
    """
    out = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)

    def curvature(side: float) -> float:
        def log_likelihood(weight: Tensor) -> Tensor:
            return torch.log_softmax(weight.relu() * out, 0)

        kink = torch.zeros((), dtype=torch.float64)
        second = torch.func.jacfwd(torch.func.jacrev(log_likelihood))(kink + side)
        return -float((log_likelihood(kink).exp() * second).sum())

    left, right = curvature(-1e-9), curvature(1e-9)
    gap = abs(right - left) / max(abs(right), abs(left))
    return finding(gap > 0.1, gap, 2)


def saturation_favours_the_first_estimator(_cases: int) -> Check:
    """5. As a sigmoid saturates, both variances vanish, V₁ faster.

    Shows V₂/V₁ of its incoming weight at the pre-activation 6, over that at 2.
    """
    variances = []
    for s in (2.0, 6.0):
        inward, outward = nn.Linear(1, 1, bias=False), nn.Linear(1, 3, bias=False)
        inward.weight.data.fill_(s)
        outward.weight.data.copy_(torch.tensor([[1.0], [-0.5], [0.0]]))
        net = nn.Sequential(inward, nn.Sigmoid(), outward).double()
        derivs = fimlib.differentiate(net, torch.ones(1, 1, dtype=torch.float64))
        V1, V2 = (v(derivs, FAMILY) for v in (fimlib.variance_i1, fimlib.variance_i2))
        variances.append((float(V1["0.weight"]), float(V2["0.weight"])))
    (first, second), (first_6, second_6) = variances
    growth = (second_6 / first_6) / (second / first)
    return finding(first_6 < first and second_6 < second and growth > 1e3, growth, 2)


def log_sigma_head_has_variance_in_its_last_layer(_cases: int) -> Check:
    """5. Remark 4.4 needs natural parameters: the log s row of a (μ, log s) head has V₂ ≠ 0.

    Shows its largest V₂/I².
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    derivs, head = fimlib.differentiate(net, make.normal(5, 3, seed=0)), fimlib.GaussianHead()
    V2 = fimlib.variance_i2(derivs, head)["2.weight"]
    I = fimlib.fisher_information(derivs, head)["2.weight"]
    plain = fimlib.variance_i2(derivs, Gaussian())["2.weight"]
    ratio = float((V2 / I.square()).max())
    zero = float(plain.max()) == 0 and float(V2[:, 0].max()) == 0  # mean rows
    return finding(zero and bool((V2[:, 1] > 0).all()), ratio, V2.numel())


def trace_bounds_scale_alike(_cases: int) -> Check:
    """6. Both terms of Eq. 18 are of degree 4 in J: J → 10 J changes no winner.

    Shows the largest relative change of their ratio.
    """
    h = make.logits(4, 100)
    J = make.normal(len(h), 4, 9, seed=3)
    ratios = []
    for factor in (1, 10):
        derivs = make.as_derivatives(h, factor * J, factor * J)
        bound = fimlib.corollary_4_6(derivs, FAMILY).variance_i1
        ratios.append(bound.spectral / bound.norm.clamp_min(1e-300))
    change = float((ratios[1] / ratios[0].clamp_min(1e-300) - 1).abs().nan_to_num(0).max())
    return finding(change < 1e-9, change, len(h))


def off_diagonal_lower_bound_of_i(cases: int) -> Check:
    """7. I off the diagonal: its least value for unit derivatives is −s_max(𝓘) < 0.

    Shows the largest such value over many softmax vectors.
    """
    h = make.logits(5, -(-cases // 100))
    u = torch.linalg.eigh(FAMILY.covariance(h)).eigenvectors[:, :, -1:]
    values = fimlib.bounds.off_diagonal(u, -u, u, FAMILY, h).fisher
    return finding(bool((values < 0).all()), float(values.max()), values.numel())


def off_diagonal_lower_bound(_cases: int) -> Check:
    """7. V₁ off the diagonal is a variance, never negative; Gaussian: ≥ ‖J_i‖²‖J_j‖².

    Shows the smallest value for unit vectors, at right angles where it is attained.
    """
    family, num_outputs = Gaussian(), 3
    h = torch.zeros(1, num_outputs, dtype=torch.float64)
    u, v = (make.unit(make.normal(1, num_outputs, 2000, seed=s)) for s in (1, 2))
    v[:, :, 0] = torch.linalg.cross(u[:, :, 0], v[:, :, 0])
    v = make.unit(v)
    values = fimlib.bounds.off_diagonal(u, v, u, family, h).variance_i1
    return finding(float(values.min()) > 1 - 1e-12, float(values.min()), values.numel())


def one_search_is_not_enough(cases: int) -> Check:
    """8. One random start for λ_max(M) often ends below it. Shows the share of failures."""
    h = 0.5 * make.normal(1, 10, seed=3)
    best = float(fimlib.lambda_max(FAMILY, h))
    starts = max(20, cases // 500)
    found = [float(minimize(FAMILY, h, num_starts=1, seed=seed)) for seed in range(starts)]
    failures = sum(value < best * (1 - 1e-3) for value in found) / starts
    return finding(failures > 0.2 and max(found) <= best * (1 + 1e-9), failures, starts)


def single_precision_loses_the_spread(_cases: int) -> Check:
    """9. 1 − ‖σ‖² in float32 at σ_max = 1 − 1e-6. Shows its relative error."""
    h = torch.tensor([[1 - 1e-6, 1e-6 / 2, 1e-6 / 2]], dtype=torch.float64).log()
    exact = float(fimlib.theorem_5_2(FAMILY.mean(h)).max_cov)
    single = float(1 - torch.softmax(h.float(), 1).square().sum())
    error = abs(single / exact - 1)
    return finding(error > 0.01, error)


def separated_expectation_is_false(_cases: int) -> Check:
    """Lemma 4.8 with E[λ²]·E[‖J‖⁴] fails. Shows Var_x I over that product."""
    confident, unsure = [20.0, 0.0], [0.0, 0.0]
    h = torch.tensor([unsure] + [confident] * 99, dtype=torch.float64)
    J = torch.zeros(100, 2, 1, dtype=torch.float64)
    J[0, 0], J[0, 1] = 1, -1  # a large derivative where the softmax is unsure, none elsewhere
    joint = fimlib.Joint(FAMILY, bounds="certified")
    joint.update(make.as_derivatives(h, J, J))
    lam = fimlib.spectrum(FAMILY, h).max_cov
    product = lam.square().mean() * J.square().sum(1).square().mean()
    ratio = float(joint.input_variance()["theta"] / product)
    upper = joint.lemma_4_8().upper["theta"]
    return finding(ratio > 10 and bool(joint.input_variance()["theta"] <= upper), ratio)


def observed_labels_bias(_cases: int) -> Check:
    """Section 6: with the observed labels Ĩ has no variance but a bias. Shows ΣĨ/ΣI."""
    derivs = make.trained_derivatives(inputs=200)
    labels = FAMILY.observed(derivs.outputs, make.digits()[1][:200])
    variance = fimlib.data_fisher_variance(derivs, labels).total()
    ratio = float(
        fimlib.data_fisher(derivs, labels).total().sum()
        / fimlib.fisher_information(derivs, FAMILY).total().sum()
    )
    return finding(float(variance.max()) == 0 and abs(ratio - 1) > 0.1, ratio, 200)
