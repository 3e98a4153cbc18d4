r"""Output families p(y|h) ∝ exp(t(y)ᵀh − F(h)) and the moments of t(y) (Sections 1, 3, 5, App. D).

A family knows its moments at the natural parameters h, and how to *contract* them with
derivatives of h. It has the dense tensors of the paper (Eqs 7–9), for teaching, tests and small T,
and closed forms that cost O(T) per parameter, for everything else.

Shapes: h is [B, T] (B inputs, T outputs). A derivative array D, be it J = ∂h or S = ∂²h, is
[B, T, ...]: one column of length T for every entry of its trailing shape. All results are float64.
"""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """N labels drawn for each of B inputs; equal labels are counted, not repeated.

    Attributes:
        family: The family that they were drawn from.
        outputs: The natural parameters h, [B, T], float64.
        weights: [B, A], float64, the share of the N labels that fell on each of A distinct values.
        values: What those values are, if not simply all classes in order: [B, A, T].
        num_samples: N, labels drawn per input.
    """

    family: Family
    outputs: Tensor
    weights: Tensor
    num_samples: int
    values: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError unless the weights are shares of one sample per input."""
        total = self.weights.sum(-1)
        if len(self.weights) != len(self.outputs) or not torch.allclose(total, total.new_ones(())):
            raise ValueError(
                f"weights must have shape [B, A] with B = {len(self.outputs)} and rows that sum to "
                f"1, got {list(self.weights.shape)} with sums {total.tolist()}."
            )

    def project(self, D: Tensor) -> Tensor:
        """D·δ for the residual δ = t(y) − η of every distinct label: [B, T, ...] → [B, A, ...]."""
        return self.family.project(self.outputs, D, self.values)

    def mean(self, scores: Tensor) -> Tensor:
        """(1/N) Σ over the labels of a score per distinct label: [B, A, ...] → [B, ...]."""
        return weighted_mean(self.weights, scores)

    def mean_residual(self) -> Tensor:
        """(1/N) Σ_k δ_k, [B, T]: zero on average, and all of y that Î₂ sees."""
        identity = torch.eye(self.outputs.shape[1], dtype=torch.float64, device=self.outputs.device)
        return self.mean(self.project(identity.expand(len(self.outputs), -1, -1)))


class Family(ABC):
    """What a quantity of the paper needs to know of the distribution of the labels."""

    min_outputs = 1

    def natural(self, h: Tensor) -> Tensor:
        """Check the natural parameters h and return them in float64.

        Raises:
            ValueError: h is not a finite [B, T] tensor with T ≥ ``min_outputs``.
        """
        name = type(self).__name__
        if h.ndim != 2 or h.shape[1] < self.min_outputs:
            raise ValueError(
                f"{name} needs outputs of shape [B, T] with T ≥ {self.min_outputs}, one row of "
                f"natural parameters per input; the model gave {list(h.shape)}. Check the last "
                "layer, or choose the family that fits it."
            )
        if not torch.isfinite(h).all():
            raise ValueError(
                f"{name}: the outputs hold NaN or infinite values. Check the weights and the input."
            )
        return h.detach().double()

    @abstractmethod
    def log_partition(self, h: Tensor) -> Tensor:
        """F(h) of Eq. 1, [B]."""

    @abstractmethod
    def mean(self, h: Tensor) -> Tensor:
        """η = E[t(y)] = ∇F, [B, T] (Eq. 7)."""

    @abstractmethod
    def covariance(self, h: Tensor) -> Tensor:
        """𝓘 = E[δδᵀ] = ∇²F, [B, T, T] (Eq. 8)."""

    @abstractmethod
    def fourth_moment(self, h: Tensor) -> Tensor:
        """𝓚 = E[δ⊗δ⊗δ⊗δ], [B, T, T, T, T] (Eq. 9). Dense: for teaching, tests and small T."""

    def outer_covariance(self, h: Tensor) -> Tensor:
        """M = 𝓚 − 𝓘⊗𝓘, the covariance of δ⊗δ (Eq. 11), [B, T, T, T, T]. Dense, like 𝓚."""
        cov = self.covariance(h)
        return self.fourth_moment(h) - torch.einsum("bij,bkl->bijkl", cov, cov)

    @abstractmethod
    def sample(
        self, h: Tensor, num_samples: int, generator: torch.Generator | None = None
    ) -> Labels:
        """Draw N labels for every input from p(y|h).

        Raises:
            ValueError: N < 1, or h does not fit the family.
        """

    @abstractmethod
    def project(self, h: Tensor, D: Tensor, values: Tensor | None) -> Tensor:
        """D·δ for every distinct label value: [B, T, ...] → [B, A, ...]."""

    @abstractmethod
    def information(self, h: Tensor, J: Tensor) -> Tensor:
        """𝓘[J, J] (Eq. 23): [B, T, ...] → [B, ...]."""

    @abstractmethod
    def variance1(self, h: Tensor, J: Tensor) -> Tensor:
        """M[J, J, J, J], N·V₁ (Eq. 24): [B, T, ...] → [B, ...]."""

    def variance2(self, h: Tensor, S: Tensor) -> Tensor:
        """𝓘[S, S], N·V₂ (Eq. 25): [B, T, ...] → [B, ...]."""
        return self.information(h, S)

    @abstractmethod
    def covariance12(self, h: Tensor, J: Tensor, S: Tensor) -> Tensor:
        """C₁₂, the covariance of Î₁ and Î₂ on one and the same label: → [B, ...]."""

    # What the spectra need of M (Eq. 13).

    @abstractmethod
    def outer_covariance_min(self, h: Tensor) -> Tensor:
        """λ_min(M) of Eq. 13, exactly: [B]."""

    @abstractmethod
    def outer_covariance_at(self, h: Tensor, u: Tensor) -> Tensor:
        """M(u, u, ·, ·) for R directions of each input: [B, R, T] → [B, R, T, T]."""

    @abstractmethod
    def directions(self, h: Tensor) -> Tensor:
        """Directions from which a search for λ_max(M) starts: [B, R, T]."""

    def unfolding(self, h: Tensor) -> Tensor:
        """A symmetric matrix with the nonzero eigenvalues of M unfolded to T²×T²: [B, n, n]."""
        return self.outer_covariance(h).flatten(3, 4).flatten(1, 2)


class Categorical(Family):
    """Classification: h = logits, t(y) = one-hot, σ = softmax(h) (Section 5.2, Appendix D).

    Every contraction goes through the C projections ``D_k − σ·D``: the derivative of
    log p(k|x) for D = J. A sample of N labels enters only by its C class counts.
    """

    min_outputs = 2

    def log_partition(self, h: Tensor) -> Tensor:  # noqa: D102
        return torch.logsumexp(h.double(), dim=1)

    def mean(self, h: Tensor) -> Tensor:  # noqa: D102
        return torch.softmax(h.double(), dim=1)

    def covariance(self, h: Tensor) -> Tensor:
        """𝓘 = diag σ − σσᵀ (Appendix D)."""
        sigma = self.mean(h)
        return torch.diag_embed(sigma) - torch.einsum("bi,bj->bij", sigma, sigma)

    def fourth_moment(self, h: Tensor) -> Tensor:
        """𝓚 = Σ_k σ_k (e_k − σ)^{⊗4}."""
        sigma = self.mean(h)
        residuals = (
            torch.eye(sigma.shape[1], dtype=sigma.dtype, device=sigma.device) - sigma[:, None]
        )
        return torch.einsum("bk,bki,bkj,bkl,bkm->bijlm", sigma, *[residuals] * 4)

    def sample(
        self, h: Tensor, num_samples: int, generator: torch.Generator | None = None
    ) -> Labels:
        """Draw the class counts of N labels, one conditional binomial per class: O(C), whatever N.

        Raises:
            ValueError: N < 1, or h does not fit the family.
        """
        h, num_samples = self.natural(h), check_num_samples(num_samples)
        sigma = self.mean(h)
        remaining_mass = sigma.flip(1).cumsum(1).flip(1)
        share = (sigma / remaining_mass.clamp_min(torch.finfo(sigma.dtype).tiny)).clamp(0, 1)
        share[:, -1] = 1  # the last class takes what is left
        left = torch.full_like(sigma[:, 0], num_samples)
        counts = torch.zeros_like(sigma)
        for k in range(sigma.shape[1]):
            counts[:, k] = torch.binomial(left, share[:, k], generator=generator)
            left = left - counts[:, k]
        return Labels(self, h, counts / num_samples, num_samples)

    def project(self, h: Tensor, D: Tensor, values: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """``D_k − σ·D`` for every class k: [B, C, ...] → [B, C, ...]."""
        return D.double() - weighted_mean(self.mean(h), D.double()).unsqueeze(1)

    def information(self, h: Tensor, J: Tensor) -> Tensor:
        """Σσ_k c_k², with c = ``project(J)``."""
        return weighted_mean(self.mean(h), self.project(h, J).square())

    def variance1(self, h: Tensor, J: Tensor) -> Tensor:
        """Σσ_k (c_k² − I)², the centred form: Σσc⁴ − I² would cancel."""
        sigma, squares = self.mean(h), self.project(h, J).square()
        return weighted_variance(sigma, squares)

    def covariance12(self, h: Tensor, J: Tensor, S: Tensor) -> Tensor:
        """−Σσ_k c_k² s_k, with s = ``project(S)``."""
        return -weighted_mean(self.mean(h), self.project(h, J).square() * self.project(h, S))

    def outer_covariance_min(self, h: Tensor) -> Tensor:
        """0, reached along u ∝ 1: the softmax does not see a common shift of the logits."""
        return h.new_zeros(len(h), dtype=torch.float64)

    def outer_covariance_at(self, h: Tensor, u: Tensor) -> Tensor:
        """Σ_k w_k δ_kδ_kᵀ with w_k = σ_k((u·δ_k)² − uᵀ𝓘u), written without the δ's."""
        sigma = self.mean(h)[:, None]
        squares = (u - (sigma * u).sum(-1, keepdim=True)).square()
        w = sigma * (squares - (sigma * squares).sum(-1, keepdim=True))  # sums to 0
        cross = torch.einsum("bri,brj->brij", w, sigma.expand_as(w))
        return torch.diag_embed(w) - cross - cross.mT

    def directions(self, h: Tensor) -> Tensor:
        """Centred e_k for every class, and e_a ± e_b for pairs among the ten likeliest classes."""
        num_classes = h.shape[1]
        singles = torch.eye(num_classes, dtype=torch.float64, device=h.device)
        top = h.topk(min(num_classes, 10), dim=1).indices
        a, b = torch.combinations(torch.arange(top.shape[1], device=h.device)).T
        e_a, e_b = singles[top[:, a]], singles[top[:, b]]
        u = torch.cat([singles.expand(len(h), -1, -1), e_a + e_b, e_a - e_b], dim=1)
        return u - u.mean(-1, keepdim=True)

    def unfolding(self, h: Tensor) -> Tensor:
        """Π^½(I − 1σᵀ)(G∘G)(I − σ1ᵀ)Π^½, [B, C, C], with G_kl = δ_k·δ_l and Π = diag σ."""
        sigma = self.mean(h)
        eye = torch.eye(h.shape[1], dtype=torch.float64, device=h.device)
        squared_norm = sigma.square().sum(1)[:, None, None]
        gram = (eye - sigma[:, :, None] - sigma[:, None, :] + squared_norm).square()
        centre = eye - sigma[:, None, :].expand_as(gram)
        root = sigma.sqrt()
        return root[:, :, None] * (centre @ gram @ centre.mT) * root[:, None, :]


class Gaussian(Family):
    """Regression: isotropic unit variance, h = mean, t(y) = y (Section 5.1)."""

    def log_partition(self, h: Tensor) -> Tensor:  # noqa: D102
        return h.double().square().sum(1) / 2

    def mean(self, h: Tensor) -> Tensor:  # noqa: D102
        return h.double()

    def covariance(self, h: Tensor) -> Tensor:
        """𝓘 = identity."""
        return torch.eye(h.shape[1], dtype=torch.float64, device=h.device).repeat(len(h), 1, 1)

    def fourth_moment(self, h: Tensor) -> Tensor:
        """𝓚_abcd = δ_ab δ_cd + δ_ac δ_bd + δ_ad δ_bc (Isserlis)."""
        eye = torch.eye(h.shape[1], dtype=torch.float64, device=h.device)
        pairings = ("ij,kl->ijkl", "ik,jl->ijkl", "il,jk->ijkl")
        return sum(torch.einsum(p, eye, eye) for p in pairings).expand(len(h), *[-1] * 4)  # type: ignore[union-attr]

    def sample(
        self, h: Tensor, num_samples: int, generator: torch.Generator | None = None
    ) -> Labels:
        """Draw N labels per input: no two are equal, so A = N, and the cost grows with N.

        Raises:
            ValueError: N < 1, or h does not fit the family.
        """
        h, num_samples = self.natural(h), check_num_samples(num_samples)
        shape = (len(h), num_samples, h.shape[1])
        noise = torch.randn(shape, generator=generator, dtype=h.dtype, device=h.device)
        weights = torch.full(shape[:2], 1 / num_samples, dtype=h.dtype, device=h.device)
        return Labels(self, h, weights, num_samples, values=h[:, None] + noise)

    def project(self, h: Tensor, D: Tensor, values: Tensor | None) -> Tensor:
        """``D·(y − h)`` for every label: [B, T, ...] → [B, N, ...]."""
        if values is None:
            raise ValueError("Gaussian labels need their values, [B, N, T]: draw them by sample().")
        return torch.einsum("bnt,bt...->bn...", values - h[:, None], D.double())

    def information(self, h: Tensor, J: Tensor) -> Tensor:  # noqa: ARG002
        """‖J‖²."""
        return J.double().square().sum(1)

    def variance1(self, h: Tensor, J: Tensor) -> Tensor:
        """2‖J‖⁴."""
        return 2 * self.information(h, J).square()

    def covariance12(self, h: Tensor, J: Tensor, S: Tensor) -> Tensor:  # noqa: ARG002
        """0: third moments of a Gaussian vanish."""
        return torch.zeros_like(J[:, 0], dtype=torch.float64)

    def outer_covariance_min(self, h: Tensor) -> Tensor:
        """2, like λ_max(M): every bound of Theorem 4.1 is an equality (Proposition 5.1)."""
        return h.new_full((len(h),), 2, dtype=torch.float64)

    def outer_covariance_at(self, h: Tensor, u: Tensor) -> Tensor:  # noqa: ARG002
        """2uuᵀ."""
        return 2 * torch.einsum("bri,brj->brij", u, u)

    def directions(self, h: Tensor) -> Tensor:
        """One direction: M looks the same in all of them."""
        return torch.eye(1, h.shape[1], dtype=torch.float64, device=h.device).expand(len(h), -1, -1)


def weighted_mean(weights: Tensor, x: Tensor) -> Tensor:
    """Σ_a w_a x_a: [B, A] and [B, A, ...] → [B, ...]."""
    return torch.einsum("ba,ba...->b...", weights, x)


def weighted_variance(weights: Tensor, x: Tensor) -> Tensor:
    """Σ_a w_a (x_a − Σ_b w_b x_b)², centred before it is squared: [B, A, ...] → [B, ...]."""
    return weighted_mean(weights, (x - weighted_mean(weights, x).unsqueeze(1)).square())


def check_num_samples(num_samples: int, at_least: int = 1) -> int:
    """Return N if it is an integer ≥ ``at_least``, else raise a ValueError that says so."""
    is_integer = isinstance(num_samples, numbers.Integral) and not isinstance(num_samples, bool)
    if not is_integer or num_samples < at_least:
        raise ValueError(f"num_samples (N) must be an integer ≥ {at_least}, got {num_samples!r}.")
    return int(num_samples)
