"""Section 9.7, blocks of the Fisher matrix: the variance of all entries of a block at once.

A block is a set of n parameters, J [B, T, n] and S [B, T, n, n] their derivatives. Everything that
Î₁ needs is in the Gram matrix G = JJᵀ of the outputs, [B, T, T], however large n is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fimlib
from fimlib import Categorical, Gaussian
from support.checks import cases as make
from support.checks.check import Check, at_most, equal, together
from support.checks.exact import (
    expectation,
    function_of_parameters,
    oracle,
    variance_over_labels,
)

FAMILY = Categorical()


class Block(NamedTuple):
    """A block's sums over all pairs of parameters, [B, …] each."""

    fisher: Tensor  # ‖I‖²_F, the sum of I(θ_ij)²
    variance_i1: Tensor  # the sum of V₁(θ_ij), with one label
    bound: Tensor  # its bound by Theorem B.1, λ_max(M) (Σ_i ‖J_i‖²)², with a certified λ_max(M)

    def relative_error(self) -> Tensor:
        """√(ΣV₁/ΣI²) over the entries of the block."""
        return (self.variance_i1 / self.fisher).sqrt()


def block(G: Tensor, h: Tensor) -> Block:
    """The sums of a classifier's block (Proposition 9.9).

    Args:
        G: [B, …, T, T], the Gram matrices JJᵀ of one block, or of several.
        h: [B, T], the outputs.
    """
    p = FAMILY.mean(h).view(len(h), *[1] * (G.ndim - 3), -1)
    residuals = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device) - p[..., None, :]
    K = residuals @ G @ residuals.mT  # of the scores of every pair of labels
    fisher = torch.einsum("...k,...l,...kl->...", p, p, K.square())
    fourth = (p * K.diagonal(dim1=-2, dim2=-1).square()).sum(-1)
    lam = fimlib.lambda_max(FAMILY, h, method="certified").view(len(h), *[1] * (G.ndim - 3))
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    return Block(fisher, (fourth - fisher).clamp_min(0), lam * trace.square())


def gram(J: Tensor) -> Tensor:
    """JJᵀ over a block's parameters: [B, …, T, n] → [B, …, T, T]."""
    return J @ J.mT


# Proposition 9.9.


def block_by_its_gram_matrix(_cases: int) -> Check:
    """Σ_ij V₁(θ_ij) = E‖s‖⁴ − ‖I‖²_F, by G alone, against a sum over pairs and labels."""
    o, parts = oracle(), []
    J = torch.cat([o.derivs.jacobian(name).flatten(2) for name in o.names], 2)
    found = block(gram(J), o.derivs.outputs)
    products = torch.einsum("xyi,xyj->xyij", o.gradients, o.gradients)
    parts.append(equal(found.variance_i1, variance_over_labels(o.p, products).sum((1, 2))))
    parts.append(equal(found.fisher, expectation(o.p, products).square().sum((1, 2))))
    return together(*parts)


def block_of_second_derivatives(_cases: int) -> Check:
    """Σ_ij V₂(θ_ij) = Σ_k p_k ‖Σ_a δ_k^a ∂²h_a‖²_F, against a sum over pairs and labels."""
    o = oracle()
    outputs, theta = function_of_parameters(o.net, o.x)
    second = torch.func.jacrev(torch.func.jacrev(outputs))(theta)  # [B, T, P, P]
    residuals = torch.eye(3, dtype=torch.float64) - o.p[:, None]
    noise = torch.einsum("xka,xaij->xkij", residuals, second)
    ours = torch.einsum("xk,xkij->x", o.p, noise.square())
    return equal(ours, variance_over_labels(o.p, o.hessians).sum((1, 2)))


def block_below_its_bound(cases: int) -> Check:
    """Σ_ij V₁(θ_ij) ≤ λ_max(M) (Σ_i ‖J_i‖²)²: Theorem B.1, summed over all pairs."""
    parts = []
    for num_classes in (2, 3, 5, 10):
        h = make.logits(num_classes, 25)
        for n in (1, 2, 20):
            J = make.normal(len(h), -(-cases // 300), num_classes, n, seed=n)
            found = block(gram(J), h)
            parts.append(at_most(found.variance_i1, found.bound, found.fisher))
    return together(*parts)


def unit_as_hard_as_its_diagonal(_cases: int) -> Check:
    """In a dense layer, at one input, Î₁ has one relative error for all weights of a unit.

    The block of these weights has it, too. Î₂ has one relative error for all weights of a unit.
    """
    derivs, parts = make.trained_derivatives(inputs=10), []
    I = fimlib.fisher_information(derivs, FAMILY)
    V1, V2 = fimlib.variance_i1(derivs, FAMILY), fimlib.variance_i2(derivs, FAMILY)
    for name in [name for name in I if name.endswith("weight")]:
        J = derivs.jacobian(name)  # [B, T, units, inputs]
        found = block(torch.einsum("btui,bsui->buts", J, J), derivs.outputs)
        whole = found.variance_i1 / found.fisher
        S = derivs.second(name)
        S_norms = torch.einsum("btui,bts,bsui->bui", S, FAMILY.covariance(derivs.outputs), S)
        parts.append(equal(V2[name], S_norms))
        for V, of_block in ((V1[name], whole), (V2[name], None)):
            ratio = (V / I[name].square()).where(I[name] > 1e-200, torch.nan)
            same = of_block if of_block is not None else ratio.nanmean(2)
            there = ~ratio.isnan()
            parts.append(
                equal(ratio[there], same[:, :, None].expand_as(ratio)[there], ratio[there])
            )
    return together(*parts)


def gaussian_block(cases: int) -> Check:
    """Gaussian outputs: Σ_ij V₁ = (tr I)² + ‖I‖²_F."""
    h = torch.zeros(-(-cases // 100), 3, dtype=torch.float64)
    J = make.normal(len(h), 3, 4, seed=0)
    I = J.mT @ J
    first, second = (J[:, :, k] for k in torch.meshgrid(*[torch.arange(4)] * 2, indexing="ij"))
    pairs = (first.flatten(2), second.flatten(2))
    V1 = fimlib.bounds.off_diagonal(*pairs, pairs[0], Gaussian(), h).variance_i1.sum(1)
    trace, norm = I.diagonal(dim1=1, dim2=2).sum(1), I.square().sum((1, 2))
    return equal(V1, trace.square() + norm)
