import pytest
import torch
from hypothesis import given, settings
from strategies import ADVERSARIAL, inputs, logits, logits_of, mlp
from torch import nn

import fimlib
from fimlib import Categorical, Gaussian, differentiate
from fimlib.derivatives import Block, Derivatives
from fimlib.families import Bernoulli, GaussianHead, Poisson
from fimlib.trace_bounds import TraceBound, corollary_4_6, theorem_c_1, theorem_c_2

FAMILIES = [Categorical(), Gaussian(), Bernoulli(), Poisson(), GaussianHead()]


def by_hand(h, J, S=None):
    """Derivatives of n parameters, [B, T, n] each, that no network needs to have."""
    return Derivatives(h, (Block("layer", J, J if S is None else S, {"p": None}),))


def totals(derivs, family, num_samples):
    """ΣI, ΣV₁ and ΣV₂."""
    return [
        fimlib.fisher_information(derivs, family).total(),
        fimlib.variance_i1(derivs, family, num_samples=num_samples).total(),
        fimlib.variance_i2(derivs, family, num_samples=num_samples).total(),
    ]


def test_totals_and_squares_of_a_diagonal():
    derivs = differentiate(mlp([3, 5, 4], nn.Tanh), inputs(2, 3))
    I = fimlib.fisher_information(derivs, Categorical())
    assert torch.allclose(I.total(), sum(I[name].flatten(1).sum(1) for name in I), rtol=1e-13)
    assert list(I.square()) == list(I)
    for name in I:
        assert torch.allclose(I.square()[name], I[name] ** 2, rtol=1e-13)
    square = sum((I[name] ** 2).flatten(1).sum(1) for name in I)
    assert torch.allclose(I.square().total(), square, rtol=1e-13)
    assert list(I.square().layer_means()) == list(I.layer_means()) == ["0", "2"]


def dense_bounds(derivs, family, num_samples):
    """(17)–(19) and (29)–(31) from dense matrices, numpy's way: all columns, one SVD."""
    derivs = family.natural_derivatives(derivs)
    names = [name for block in derivs.blocks for name in block.inputs]
    J, S = (
        torch.cat([get(name).flatten(2).double() for name in names], dim=2)
        for get in (derivs.jacobian, derivs.second)
    )
    outer = torch.einsum("bap,bcp->bacp", J, J).flatten(1, 2)
    lam, h = fimlib.spectrum(family, derivs.outputs), derivs.outputs
    M = family.outer_covariance(h).flatten(3, 4).flatten(1, 2)
    cases = [
        (J, family.covariance(h), lam.max_cov, 1),
        (outer, M, lam.max_outer, num_samples),
        (S, family.covariance(h), lam.max_cov, num_samples),
    ]
    coarse, fine = [], []
    for D, moments, largest, n in cases:
        s = torch.zeros(D.shape[:2], dtype=torch.float64)
        found = torch.linalg.svdvals(D).square()
        s[:, : found.shape[1]] = found
        m = torch.linalg.svdvals(moments)
        trace = moments.diagonal(dim1=1, dim2=2).sum(1)
        coarse.append((s[:, 0] * trace / n, D.square().sum((1, 2)) * largest / n))
        fine.append(((s * m.flip(1)).sum(1) / n, (s * m).sum(1) / n))
    return coarse, fine


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh])
def test_bounds_of_networks_hold_and_agree_with_dense_matrices(family, activation):
    net = mlp([3, 5, 4, 4], activation, scale=2.0)
    derivs = differentiate(net, inputs(3, 3))
    coarse, fine = dense_bounds(derivs, family, 5)
    ours, theirs = (
        corollary_4_6(derivs, family, num_samples=5),
        theorem_c_1(derivs, family, num_samples=5),
    )
    for total, bound, expected in zip(totals(derivs, family, 5), ours, coarse, strict=True):
        assert torch.allclose(bound.spectral, expected[0], rtol=1e-9)
        assert torch.allclose(bound.norm, expected[1], rtol=1e-9)
        assert torch.equal(bound.upper, torch.minimum(bound.spectral, bound.norm))
        assert (total <= bound.upper * (1 + 1e-10)).all()
    for total, interval, expected in zip(totals(derivs, family, 5), theirs, fine, strict=True):
        slack = 1e-12 * interval.upper
        assert torch.allclose(interval.upper, expected[1], rtol=1e-9)
        assert ((interval.lower - expected[0]).abs() <= 1e-9 * expected[0] + slack).all()
        assert (interval.lower - slack <= total).all()
        assert (total <= interval.upper + slack).all()


@settings(deadline=None, max_examples=15)
@given(logits(max_classes=7))
def test_bounds_of_adversarial_softmax(h):
    """Few and many parameters, along the family's directions, eigenvectors, and at random."""
    family, num_classes = Categorical(), h.shape[1]
    vectors = torch.linalg.eigh(family.covariance(h)).eigenvectors
    groups = (
        inputs(num_classes, 1)[None],
        inputs(num_classes, 30)[None],
        vectors[..., -1:],
        torch.cat([vectors, 5 * family.directions(h).mT], 2),
    )
    for J in groups:
        derivs = by_hand(h, J)
        coarse, fine = corollary_4_6(derivs, family), theorem_c_1(derivs, family)
        tight = theorem_c_1(derivs, family, symmetric=True)
        for k, total in enumerate(totals(derivs, family, 1)):
            slack = 1e-10 * coarse[k].upper + 1e-14 * J.square().sum().square()
            assert (total <= coarse[k].upper + slack).all()
            assert (fine[k].lower - slack <= total).all()
            assert (total <= fine[k].upper + slack).all()
            assert (fine[k].upper <= coarse[k].spectral + slack).all()
            assert (tight[k].lower - slack <= total).all()
            assert torch.allclose(tight[k].upper, fine[k].upper, rtol=1e-12)
        for k in (0, 2):  # by full spectra is never worse, except for V₁
            assert (fine[k].upper <= coarse[k].norm * (1 + 1e-10) + 1e-14).all()


def test_lower_bound_of_v1_is_zero_for_softmax():
    """Finding 2: M̃ has rank C − 1 at most among T² dimensions, and pairs with nothing."""
    J = inputs(4, 50).expand(3, -1, -1)
    lower, upper = theorem_c_1(by_hand(inputs(3, 4), J), Categorical()).variance_i1
    assert lower.tolist() == [0, 0, 0]
    assert (upper > 1).all()


def test_full_spectra_can_be_worse_than_the_norm():
    """Finding 2: one parameter along the worst direction, where s_max(M̃) exceeds λ_max(M)."""
    h = logits_of(ADVERSARIAL["two near half, C=10"])
    J = torch.zeros(1, 10, 1, dtype=torch.float64)
    J[0, 0] = 1
    fine = theorem_c_1(by_hand(h, J), Categorical()).variance_i1.upper.item()
    norm = corollary_4_6(by_hand(h, J), Categorical()).variance_i1.norm.item()
    assert fine > 1.9 * norm
    lam = fimlib.spectrum(Categorical(), h, method="certified")
    assert fine == pytest.approx(lam.max_outer.item(), rel=1e-10)
    bound = corollary_4_6(by_hand(h, J), Categorical(), eigenvalues=lam)
    assert bound.variance_i1.norm.item() == pytest.approx(fine, rel=1e-10)


def test_gaussian_norm_terms_are_equalities():
    """(17)–(19) by norms are exact where 𝓘 = identity; (29)–(31) too, on symmetric arrays."""
    derivs, family = differentiate(mlp([3, 6, 4], nn.Tanh), inputs(2, 3)), Gaussian()
    bounds = corollary_4_6(derivs, family, num_samples=3)
    full = theorem_c_1(derivs, family, num_samples=3, symmetric=True)
    for total, bound, interval in zip(totals(derivs, family, 3), bounds, full, strict=True):
        assert torch.allclose(bound.norm, total, rtol=1e-10)
        assert torch.allclose(interval.lower, total, rtol=1e-10)
        assert torch.allclose(interval.upper, total, rtol=1e-10)
    printed = theorem_c_1(derivs, family, num_samples=3).variance_i1
    assert (printed.lower < 0.5 * full.variance_i1.lower).all()
    assert torch.allclose(printed.upper, full.variance_i1.upper, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES[:4], ids=lambda family: type(family).__name__)
def test_spectral_terms_are_equalities_for_a_linear_model(family):
    """∂h = [z ⊗ identity, identity]: all singular values equal, so that (17)'s first is exact."""
    x = inputs(3, 5)
    derivs = differentiate(mlp([5, 4], nn.Tanh), x)
    bound = corollary_4_6(derivs, family).fisher
    trace = family.covariance(derivs.outputs).diagonal(dim1=1, dim2=2).sum(1)
    exact = (x.square().sum(1) + 1) * trace
    assert torch.allclose(bound.spectral, exact, rtol=1e-10)
    assert torch.allclose(totals(derivs, family, 1)[0], exact, rtol=1e-10)
    second = by_hand(
        derivs.outputs, torch.eye(4).expand(3, -1, -1), 2 * torch.eye(4).expand(3, -1, -1)
    )
    bound = corollary_4_6(second, family, num_samples=2).variance_i2
    assert torch.allclose(bound.spectral, 2 * trace, rtol=1e-10)
    assert torch.allclose(totals(second, family, 2)[2], 2 * trace, rtol=1e-10)


def test_bounds_by_hand():
    """T = 1 Poisson with rate 2, J = (1, 3), S = (2, −1): everything is a product."""
    h = torch.tensor([[2.0]]).double().log()
    derivs = by_hand(h, torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, -1.0]]]))
    for bound, exact in zip(
        corollary_4_6(derivs, Poisson(), num_samples=2), (20, 82 * 10 / 2, 5), strict=True
    ):
        assert (bound.spectral.item(), bound.norm.item()) == pytest.approx((exact,) * 2, rel=1e-12)
    for interval, exact in zip(theorem_c_1(derivs, Poisson()), (20, 820, 10), strict=True):
        assert (interval.lower.item(), interval.upper.item()) == pytest.approx((exact,) * 2)
    assert TraceBound(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.0])).upper.tolist() == [1, 3]


def test_which_term_wins_does_not_depend_on_the_scale():
    """Finding 6: both terms are of the same degree in J, 2 in (17) and 4 in (18)."""
    h, J = inputs(4, 5), inputs(5, 20).expand(4, -1, -1) * torch.tensor([1, 1, 1, 1, 9.0])[:, None]
    once = corollary_4_6(by_hand(h, J), Categorical())
    for scale in (1e-3, 10.0):
        scaled = corollary_4_6(by_hand(h, scale * J), Categorical())
        for a, b, degree in zip(once, scaled, (2, 4, 2), strict=True):
            assert torch.allclose(b.spectral, scale**degree * a.spectral, rtol=1e-9)
            assert torch.allclose(b.norm, scale**degree * a.norm, rtol=1e-9)


def test_either_term_can_win():
    h = torch.zeros(1, 4)
    spread = corollary_4_6(by_hand(h, torch.eye(4)[None]), Categorical()).fisher
    single = corollary_4_6(by_hand(h, torch.eye(4)[None, :, :1]), Categorical()).fisher
    assert spread.spectral.item() == pytest.approx(3 / 4)
    assert spread.norm.item() == pytest.approx(1)
    assert single.spectral.item() == pytest.approx(3 / 4)
    assert single.norm.item() == single.upper.item() == pytest.approx(1 / 4)


def test_bad_arguments():
    derivs = differentiate(mlp([3, 2], nn.Tanh), inputs(2, 3))
    for bound in (corollary_4_6, theorem_c_1):
        with pytest.raises(ValueError, match="num_samples"):
            bound(derivs, Categorical(), num_samples=0)
        with pytest.raises(ValueError, match="even number"):
            bound(by_hand(inputs(1, 3), inputs(3, 2)[None]), GaussianHead())
    lam = fimlib.spectrum(Categorical(), derivs.outputs[:1])
    with pytest.raises(ValueError, match="belong to 1 inputs"):
        corollary_4_6(derivs, Categorical(), eigenvalues=lam)
    large = by_hand(torch.zeros(2, 100), torch.zeros(2, 100, 1))
    with pytest.raises(ValueError, match=r"100 outputs at 2 inputs would take 1.5 GiB; at most 1"):
        theorem_c_1(large, Categorical())


def test_ruhe():
    """Random matrices of all ranks; equalities where the eigenvectors agree or are reversed."""
    for rank in range(1, 6):
        roots = inputs(200 * 2 * 5, rank, seed=rank).view(2, 200, 5, rank)
        A, B = roots @ roots.mT
        lower, upper = theorem_c_2(A, B)
        trace = (A * B).sum((1, 2))
        assert (lower - 1e-12 * upper <= trace).all()
        assert (trace <= upper * (1 + 1e-12)).all()
        assert (lower >= 0).all()
    a, b = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 4.0, 2.0])
    lower, upper = theorem_c_2(torch.diag(a), torch.diag(b))
    assert (lower.item(), upper.item()) == pytest.approx((3 + 4 + 4, 12 + 4 + 1))
    assert lower.dtype == torch.float64


def test_ruhe_refuses_other_matrices():
    eye = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"same shape: \[3, 3\], \[2, 2\]"):
        theorem_c_2(eye, eye[:2, :2])
    for bad in (eye[:2], eye[0]):
        with pytest.raises(ValueError, match=r"matrix \[..., n, n\] is needed"):
            theorem_c_2(bad, bad)
    tilted = eye.clone()
    tilted[0, 1] = 1e-6
    for bad in (tilted, eye * torch.nan):
        for pair in ((bad, eye), (eye, bad)):
            with pytest.raises(ValueError, match="not symmetric, or not finite"):
                theorem_c_2(*pair)
    with pytest.raises(ValueError, match=r"not positive semidefinite.*-0.5"):
        theorem_c_2(eye, torch.diag(torch.tensor([1.0, 1.0, -0.5]).double()))
    almost = torch.diag(torch.tensor([1.0, 1.0, -1e-12]).double())
    assert theorem_c_2(almost, almost).upper.item() == pytest.approx(2)


def test_ruhes_matrices_are_judged_one_by_one():
    """Each by its own size: a batch of a tiny and of a huge matrix, in two batch dimensions."""
    root = inputs(4, 4)
    base = root @ root.T
    sizes = torch.tensor([[1e-6], [1e6], [1.0]], dtype=torch.float64)[..., None, None]
    batch = sizes * base  # [3, 1, 4, 4]
    lower, upper = theorem_c_2(batch, batch)
    assert lower.shape == upper.shape == (3, 1)
    eigenvalues = torch.linalg.eigvalsh(base)
    assert torch.allclose(upper[:, 0], sizes[:, 0, 0, 0] ** 2 * eigenvalues.square().sum())
    opposite = (eigenvalues * eigenvalues.flip(0)).sum()
    assert torch.allclose(lower[:, 0], sizes[:, 0, 0, 0] ** 2 * opposite)
    rounded = batch.clone()
    rounded[1, 0, 0, 1] += 1e-6  # 1e-12 of the huge one
    theorem_c_2(rounded, rounded)
    crooked = batch.clone()
    crooked[0, 0, 0, 1] += 1e-9  # 1e-3 of the tiny one
    with pytest.raises(ValueError, match="not symmetric"):
        theorem_c_2(crooked, crooked)
    shift = torch.eye(4, dtype=torch.float64) * torch.linalg.eigvalsh(base)[0]
    theorem_c_2(batch - sizes * shift * (1 + 1e-12), batch)
    negative = batch.clone()
    negative[0, 0] -= 1.5e-6 * shift
    with pytest.raises(ValueError, match="not positive semidefinite"):
        theorem_c_2(negative, batch)


def test_forty_five_outputs_are_not_too_many():
    J = inputs(1, 45, seed=1).view(1, 45, 1)
    derivs = Derivatives(inputs(1, 45), (Block("layer", J, J, {"p": None}),))
    lower, upper = theorem_c_1(derivs, Categorical()).fisher
    I = fimlib.fisher_information(derivs, Categorical()).total()
    assert (lower <= I).all()
    assert (upper >= I).all()
