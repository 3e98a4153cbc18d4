"""Section 9, beyond the paper: random projections, important labels, mixtures, sequences.

The other side of each comparison is a sum over all labels, classes and signs, weighted by their
probabilities, of a small network that autograd differentiates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fimlib
from fimlib import Categorical, Derivatives, Diagonal, Family, Interval, projections
from fimlib.families import Positions
from support.checks import cases as make
from support.checks.check import Check, at_most, equal, finding, together
from support.checks.exact import Oracle, flat, oracle, variance_over_labels

FAMILY = Categorical()
SIGNS = (-1.0, 1.0)
Variance = Callable[[Derivatives, Family], Diagonal]
VARIANCES: dict[str, Variance] = {
    "signs": lambda derivs, family: projections.variance_signs(derivs, family),
    "labels": lambda derivs, family: fimlib.variance_i1(derivs, family),
    "importance": lambda derivs, family: projections.variance_importance(derivs, family),
}
Weighted = list[tuple[float, Tensor]]


def important(o: Oracle) -> Tensor:
    """q_k ∝ p_k ‖e_k − p‖, [m, C]."""
    residuals = torch.eye(3, dtype=torch.float64) - o.p[:, None]
    q: Tensor = o.p * residuals.norm(dim=2)
    return q / q.sum(1, keepdim=True)


def scores(o: Oracle, kind: str, x: int) -> Weighted:
    """All values of w·J at an input, [P] each, with their probabilities."""
    p, c, q = o.p[x], o.gradients[x], important(o)[x]
    if kind == "labels":
        return [(float(p[k]), c[k]) for k in range(3)]
    if kind == "importance":
        found = ((k, sign) for k in range(3) for sign in SIGNS)
        return [(float(q[k]) / 2, sign * (p[k] / q[k]).sqrt() * c[k]) for k, sign in found]
    columns = p.sqrt()[:, None] * c
    return [
        (1 / 8, torch.tensor(signs, dtype=torch.float64) @ columns)
        for signs in itertools.product(SIGNS, repeat=3)
    ]


def moments(weighted: Weighted) -> tuple[Tensor, Tensor]:
    """Mean and variance."""
    weights = torch.tensor([weight for weight, _ in weighted], dtype=torch.float64)
    values = torch.stack([value for _, value in weighted])
    mean = torch.einsum("a,ai->i", weights, values)
    return mean, torch.einsum("a,ai->i", weights, (values - mean).square())


def combined(each: Sequence[Weighted], form: Callable[[Sequence[Tensor]], Tensor]) -> Weighted:
    """A function of independent variables, for every combination of their values."""
    found = []
    for parts in itertools.product(*each):
        weight = math.prod(weight for weight, _ in parts)
        found.append((weight, form([value for _, value in parts])))
    return found


def total(parts: Sequence[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack(list(parts)).sum(0)


def mean_of(parts: Sequence[Tensor]) -> Tensor:
    """Their mean."""
    return torch.stack(list(parts)).mean(0)


# Propositions 9.1 and 9.2: one projection.


def per_input(o: Oracle, kind: str) -> tuple[Tensor, Tensor]:
    """I and the variance of (w·J)² at every input by fimlib, [m, P] each."""
    I = flat(fimlib.fisher_information(o.derivs, FAMILY), o.names)
    return I, flat(VARIANCES[kind](o.derivs, FAMILY), o.names)


def variance_of_squared_sum(I: Tensor, V: Tensor) -> Tensor:
    """Var (Σ_a s_a)² of independent s_a with mean 0, E s_a² = I_a and Var s_a² = V_a: 2(ΣI)² + Σκ₄.

    The first axis counts them: inputs (Proposition 9.1) or positions (Proposition 9.6).
    """
    return V.sum(0) + 2 * (I.sum(0).square() - I.square().sum(0))


def one_projection_of_a_batch(_cases: int) -> Check:
    """(Σ_x w_x·J(x))² has the mean Σ I and the variance 2 (Σ I)² + Σ κ₄, for three kinds of w."""
    o, parts = oracle(), []
    for kind in VARIANCES:
        I, V = per_input(o, kind)
        every = [scores(o, kind, x) for x in range(len(o.x))]
        mean, variance = moments(combined(every, lambda parts: total(parts).square()))
        parts += [equal(I.sum(0), mean), equal(variance_of_squared_sum(I, V), variance)]
    return together(*parts)


def one_projection_of_every_input(_cases: int) -> Check:
    """Σ_x (w_x·J(x))² has the mean Σ I and the variance Σ Var: no cross terms."""
    o, parts = oracle(), []
    for kind in VARIANCES:
        joint = fimlib.Joint(FAMILY, quantities=["I", "Var_x I", "V1", "signs", "importance"])
        joint.update(fimlib.differentiate(o.net, o.x))
        m = len(o.x)
        ours = joint.variance(1 if kind == "labels" else kind, m, replacement=False)
        every = [[(w, s.square()) for w, s in scores(o, kind, x)] for x in range(m)]
        mean, variance = moments(combined(every, mean_of))
        parts += [equal(flat(joint.fisher_information(), o.names), mean)]
        parts += [equal(flat(ours, o.names), variance)]
    return together(*parts)


# Proposition 9.3: signs.


def signs_scatter_less_than_twice(cases: int) -> Check:
    """Var (w·J)² ≤ 2 I² for signs: one pass has a relative standard deviation of √2 at most."""
    groups: list[tuple[Family, Derivatives]] = []
    groups += [(FAMILY, group.derivs) for group in make.grid(cases)]
    groups += [(family, group.derivs) for family, group in make.other_groups(cases)]
    parts = []
    for family, derivs in groups:
        I = fimlib.fisher_information(derivs, family)
        V = projections.variance_signs(derivs, family)
        parts += [at_most(V[name], 2 * I[name].square(), 0) for name in I]
    return together(*parts)


# Proposition 9.4: important labels.


def important_labels(_cases: int) -> Check:
    """Î₁ and Î₂ on one important class, weighted by p/q: no bias, and the variances as stated."""
    o, q, parts = oracle(), important(oracle()), []
    I = flat(fimlib.fisher_information(o.derivs, FAMILY), o.names)
    for j, values in ((1, o.i1), (2, o.i2 - I[:, None])):  # Î₂ = I − (p/q) S·δ
        V = flat(projections.variance_importance(o.derivs, FAMILY, estimator=j), o.names)
        for x in range(len(o.x)):
            weighted = [(float(q[x, k]), o.p[x, k] / q[x, k] * values[x, k]) for k in range(3)]
            mean, variance = moments(weighted)
            parts.append(equal(mean, I[x] if j == 1 else torch.zeros_like(mean), I.max()))
            parts.append(equal(V[x], variance))
    return together(*parts)


def important_labels_bound_the_noise(_cases: int) -> Check:
    """As a softmax becomes certain, V₁/I² grows without bound; on important labels it does not."""
    h = torch.zeros(30, 4, dtype=torch.float64)
    h[:, 0] = torch.arange(1, 31)
    J = make.normal(30, 4, 8, seed=3)
    derivs = Derivatives(h, (fimlib.Block("", J, None, {"w": None}),))
    I = fimlib.fisher_information(derivs, FAMILY)["w"].square().sum(1)
    labels, important_ones = (
        VARIANCES[kind](derivs, FAMILY)["w"].sum(1) / I for kind in ("labels", "importance")
    )
    shown = bool(labels[-1] > 1e9) and bool((important_ones < 20).all())
    return finding(shown, float(important_ones.max()), cases=len(h))


# Proposition 9.5: both estimators on one label.


def best_mixture(_cases: int) -> Check:
    """α Î₁ + (1 − α) Î₂ has the variance that ``Joint.combination`` states, layer by layer."""
    o, parts = oracle(), []
    joint = fimlib.Joint(FAMILY, quantities=["I", "V1", "V2", "C12"])
    joint.update(o.derivs)
    for layer, found in joint.combination().items():
        at = torch.cat([
            torch.full((p.numel(),), name.rpartition(".")[0] == layer)
            for name, p in o.net.named_parameters()
        ])  # fmt: skip
        mixed = (found.weight_i1 * o.i1 + (1 - found.weight_i1) * o.i2)[..., at]
        variance = variance_over_labels(o.p, mixed)
        ours = torch.tensor([found.variance], dtype=torch.float64)
        size = (o.p[..., None] * o.i1.square())[..., at].sum(1).mean(0).sum()
        parts.append(equal(ours, variance.mean(0).sum()[None], size))
    return together(*parts)


def mixture_is_never_worse(cases: int) -> Check:
    """Its variance is at most V₁ and at most V₂."""
    v1, v2 = (make.normal(cases, seed=s).exp() for s in (4, 5))
    c12 = (2 * make.normal(cases, seed=6).sigmoid() - 1) * (v1 * v2).sqrt()
    _, v = fimlib.precision.mixture(v1, v2, c12)
    return together(at_most(v, v1, v1), at_most(v, v2, v2))


# Proposition 9.6: sequences.


class AtPositions(nn.Module):
    """A network at every position of an input, [B, L, n] → [B, L·T]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        outputs: Tensor = self.net(x.flatten(0, 1))
        return outputs.view(len(x), -1)


def sequence_of_labels(_cases: int) -> Check:
    """I, V₁, V₂ and C₁₂ of a sequence, against all 27 sequences of three labels."""
    o = oracle()
    derivs = fimlib.differentiate(AtPositions(o.net), o.x[None])
    family = Positions(FAMILY, 3)
    names = [f"net.{name}" for name in o.names]
    labels = [[(float(o.p[t, k]), torch.stack([o.gradients[t, k], -o.i2[t, k]])) for k in range(3)]
              for t in range(len(o.x))]  # fmt: skip
    every = combined(labels, total)
    i1, v1 = moments([(w, g.square()) for w, (g, _) in every])
    i2, v2 = moments([(w, -H) for w, (_, H) in every])
    _, difference = moments([(w, g.square() + H) for w, (g, H) in every])
    ours = [
        flat(quantity(derivs, family), names)[0]
        for quantity in (
            fimlib.fisher_information, fimlib.variance_i1, fimlib.variance_i2,
            fimlib.covariance_i1_i2,
        )
    ]  # fmt: skip
    expected = (i1, v1, v2, (v1 + v2 - difference) / 2)
    return together(equal(i1, i2), *map(equal, ours, expected, (None, None, None, v1.max())))


def position_by_position(_cases: int) -> Check:
    """Σ_t s_t² is unbiased, too, and has only Σ V₁,t: without the pairs of positions."""
    o = oracle()
    every = [[(w, s.square()) for w, s in scores(o, "labels", t)] for t in range(len(o.x))]
    mean, variance = moments(combined(every, total))
    I, V = per_input(o, "labels")
    return together(equal(I.sum(0), mean), equal(V.sum(0), variance))


# Proposition 9.7: how many labels.


def bernstein_is_enough(cases: int) -> Check:
    """With the labels of rule="bernstein", ‖Î₁ − I‖ ≥ ε‖I‖ is rare enough, at ten inputs."""
    derivs, confidence, repeats = make.trained_derivatives(inputs=10), 0.9, -(-cases // 10)
    needed = fimlib.num_samples_needed(
        derivs, FAMILY, relative_error=0.5, confidence=confidence, rule="bernstein"
    )
    generator, parts = torch.Generator().manual_seed(0), []
    for block in derivs.blocks:
        c = FAMILY.project(derivs.outputs, block.J).square()  # [B, C, n], of the biases
        for x, n in enumerate(needed[block.layer].int().tolist()):
            p = FAMILY.mean(derivs.outputs[x : x + 1])
            drawn = torch.multinomial(
                p.expand(repeats, -1), n, replacement=True, generator=generator
            )
            shares = torch.zeros(repeats, p.shape[1], dtype=torch.float64)
            shares.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / n, dtype=torch.float64))
            off = ((shares - p) @ c[x]).norm(dim=1) >= 0.5 * (p @ c[x]).norm()
            parts.append(at_most(off.double().mean()[None], torch.tensor([1 - confidence]), 0))
    return together(*parts)._replace(cases=repeats * len(parts))


# Proposition 9.8: bounds of the metric (Sun).


def metric_bounds(derivs: Derivatives) -> Interval[Diagonal]:
    """λ_max (v·J)² and Σ_k p_k J_k², with the top eigenpair of diag(p) − ppᵀ."""
    h = derivs.outputs
    values, vectors = torch.linalg.eigh(FAMILY.covariance(h))
    root, p = values[:, -1:].sqrt() * vectors[:, :, -1], FAMILY.mean(h)
    return Interval(
        derivs.contract(lambda b: torch.einsum("bt,bt...->b...", root, b.J).square(), degree=2),
        derivs.contract(lambda b: torch.einsum("bt,bt...->b...", p, b.J.square()), degree=2),
    )


def metric_between_its_bounds(cases: int) -> Check:
    """I lies between the bounds, which are those of diag(p) ⪰ diag(p) − ppᵀ ⪰ λ_max vvᵀ."""
    parts = []
    for group in make.grid(cases):
        I, bounds = fimlib.fisher_information(group.derivs, FAMILY), metric_bounds(group.derivs)
        for name in I:
            squares = group.derivs.jacobian(name).square().sum(1)
            parts += [at_most(bounds.lower[name], I[name], squares)]
            parts += [at_most(I[name], bounds.upper[name], 0)]
    return together(*parts)


def metric_eigenvalues_interlace(cases: int) -> Check:
    """p_(k) ≥ λ_k ≥ p_(k+1), both in falling order: the spectrum lies between probabilities."""
    parts = []
    for num_classes in make.CLASSES[:7]:
        h = make.logits(num_classes, -(-cases // 50))
        p = FAMILY.mean(h).sort(descending=True).values
        values = torch.linalg.eigvalsh(FAMILY.covariance(h)).flip(1)
        parts += [at_most(values, p, 1.0), at_most(p[:, 1:], values[:, :-1], 1.0)]
    return together(*parts)


def upper_bound_is_never_tight(cases: int) -> Check:
    """diag(p) exceeds the metric by ppᵀ, whose eigenvalue ‖p‖² is at least 1/C."""
    parts = []
    for num_classes in make.CLASSES:
        p = FAMILY.mean(make.logits(num_classes, -(-cases // len(make.CLASSES))))
        parts.append(at_most(torch.full_like(p[:, 0], 1 / num_classes), p.square().sum(1), 1.0))
    return together(*parts)
