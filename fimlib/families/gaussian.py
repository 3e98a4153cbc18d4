r"""Gaussian output families: a known covariance (Section 5.1), and a predicted spread."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fimlib.families.base import Family, Labels, pairings, random_signs


class Gaussian(Family):
    """Regression: h = mean of y, whose covariance Σ is known; t(y) = Σ⁻¹y (Section 5.1).

    Args:
        covariance: Σ, [T, T], symmetric and positive definite, in units of y²; None: the identity,
            as in the paper. Then 𝓘 = Σ⁻¹, and M(u,u,u,u) = 2(uᵀΣ⁻¹u)².

    Raises:
        ValueError: Σ is not such a matrix.
    """

    def __init__(self, covariance: Tensor | None = None) -> None:
        self.root = None if covariance is None else cholesky(covariance)

    def natural(self, h: Tensor) -> Tensor:
        """As for every family; and T must be the size of Σ."""
        h = super().natural(h)
        if self.root is not None and len(self.root) != h.shape[1]:
            size = len(self.root)
            raise ValueError(
                f"Gaussian: the covariance is {size}×{size}, but the model has {h.shape[1]} "
                "outputs: give the covariance of the whole label."
            )
        return h

    def scale(self, h: Tensor) -> Tensor:
        """The lower triangle L with Σ = LLᵀ, [T, T]."""
        eye = torch.eye(h.shape[1], dtype=torch.float64, device=h.device)
        return eye if self.root is None else self.root.to(h.device)

    def whiten(self, D: Tensor) -> Tensor:
        """L⁻¹D, whose squared norm is DᵀΣ⁻¹D: [B, T, ...] → [B, T, ...]."""
        D = D.double()
        if self.root is None:
            return D
        columns = D.reshape(*D.shape[:2], -1)
        white: Tensor = torch.linalg.solve_triangular(self.scale(D), columns, upper=False)
        return white.reshape(D.shape)

    def log_partition(self, h: Tensor) -> Tensor:
        """hᵀΣ⁻¹h/2."""
        return self.whiten(h).square().sum(1) / 2

    def mean(self, h: Tensor) -> Tensor:
        """η = Σ⁻¹h."""
        return self.statistics(h, h[:, None])[:, 0]

    def statistics(self, h: Tensor, y: Tensor) -> Tensor:
        """t(y) = Σ⁻¹y."""
        return y.double() @ self.covariance(h)

    def covariance(self, h: Tensor) -> Tensor:
        """𝓘 = Σ⁻¹."""
        return torch.cholesky_inverse(self.scale(h)).repeat(len(h), 1, 1)

    def fourth_moment(self, h: Tensor) -> Tensor:
        """𝓚_abcd = 𝓘_ab 𝓘_cd + 𝓘_ac 𝓘_bd + 𝓘_ad 𝓘_bc (Isserlis)."""
        return pairings(self.covariance(h[:1])).expand(len(h), *[-1] * 4)

    def draw(self, h: Tensor, num_samples: int, generator: torch.Generator | None) -> Labels:
        """Draw N labels per input: no two are equal, so A = N, and the cost grows with N."""
        shape = (len(h), num_samples, h.shape[1])
        noise = torch.randn(shape, generator=generator, dtype=h.dtype, device=h.device)
        y = h[:, None] + noise @ self.scale(h).mT
        return self.equally_weighted(h, self.statistics(h, y))

    def information(self, h: Tensor, J: Tensor) -> Tensor:  # noqa: ARG002
        """JᵀΣ⁻¹J."""
        return self.whiten(J).square().sum(1)

    def variance1(self, h: Tensor, J: Tensor) -> Tensor:
        """2(JᵀΣ⁻¹J)²."""
        return 2 * self.information(h, J).square()

    def covariance12(self, h: Tensor, J: Tensor, S: Tensor) -> Tensor:  # noqa: ARG002
        """0: third moments of a Gaussian vanish."""
        return torch.zeros_like(J[:, 0], dtype=torch.float64)

    def factor(self, h: Tensor) -> Tensor:
        """L⁻ᵀ."""
        eye = torch.eye(h.shape[1], dtype=torch.float64, device=h.device)
        return self.whiten(eye.expand(len(h), -1, -1)).mT

    def draw_signs(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """L⁻ᵀξ."""
        signs = random_signs(h, generator)
        if self.root is None:
            return signs
        found: Tensor = torch.linalg.solve_triangular(self.scale(h), signs, upper=False, left=False)
        return found

    def outer_covariance_min(self, h: Tensor) -> Tensor:
        """2λ_min(𝓘)²; for Σ = identity every bound of Theorem 4.1 is an equality (Prop. 5.1)."""
        eigenvalues: Tensor = torch.linalg.eigvalsh(self.covariance(h))
        return 2 * eigenvalues[:, 0].square()

    def outer_covariance_at(self, h: Tensor, u: Tensor) -> Tensor:
        """2(𝓘u)(𝓘u)ᵀ."""
        image = u @ self.covariance(h)
        return 2 * torch.einsum("bri,brj->brij", image, image)

    def directions(self, h: Tensor) -> Tensor:
        """The top eigenvector of 𝓘, the only local maximum."""
        vectors: Tensor = torch.linalg.eigh(self.covariance(h)).eigenvectors
        return vectors[:, None, :, -1]


class GaussianHead(Family):
    """Regression with a predicted spread: outputs are K means μ, then K logarithms ρ = log s.

    The K labels are independent, y_k ~ N(μ_k, s_k²), and T = 2K. The natural parameters are not the
    outputs but, measured in units of the point (μ₀, s₀) where derivatives are taken,
    ``(m/r², −1/(2r²))`` with m = (μ − μ₀)/s₀ and r = s/s₀, for the statistics
    ``t = (ε, ε² − 1)`` of ε = (y − μ₀)/s₀ (``link``). So η = 0, and all moments are constant.

    The contractions take derivatives of these natural parameters, ``natural_derivatives``. For one
    pair they are J = (a, b) with a = μ'/s and b = ρ', and S = (μ''/s − 4ab, ρ'' − 2b²): not 0 in a
    last layer that is linear, so that Remark 4.4 does not hold.
    """

    min_outputs = 2

    def natural(self, h: Tensor) -> Tensor:
        """As for every family; T must be even, and |ρ| ≤ 175, for powers of s up to the fourth."""
        h = super().natural(h)
        if h.shape[1] % 2:
            raise ValueError(
                f"GaussianHead needs an even number of outputs, K means and then K logarithms of "
                f"standard deviations; the model has {h.shape[1]}."
            )
        rho = h.chunk(2, dim=1)[1]
        if (rho.abs() > 175).any():
            raise ValueError(
                f"GaussianHead: log s, the second half of the outputs, reaches "
                f"±{rho.abs().max().item():.4g}, where powers of s overflow float64: keep it "
                "within ±175."
            )
        return h

    def link(self, h: Tensor, at: Tensor) -> Tensor:
        """(m/r², −1/(2r²)), with m = (μ − μ₀)/s₀, r = s/s₀ and (μ₀, log s₀) = ``at``."""
        (mu, rho), (mu_0, rho_0) = h.chunk(2, dim=1), at.chunk(2, dim=1)
        precision = torch.exp(-2 * (rho - rho_0))
        return torch.cat([(mu - mu_0) * torch.exp(-rho_0) * precision, -precision / 2], dim=1)

    def _chain_rule(self, h: Tensor, J: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        """(μ'/s, ρ') and (μ''/s − 4ab, ρ'' − 2b²), in closed form."""
        scale = torch.exp(-h.chunk(2, dim=1)[1])
        (mu, b), (curvature, d) = (D.double().chunk(2, dim=1) for D in (J, S))
        scale = scale.reshape(*scale.shape, *(1,) * (J.ndim - 2))
        a = scale * mu
        first = torch.cat([a, b], dim=1)
        second = torch.cat([scale * curvature - 4 * a * b, d - 2 * b.square()], dim=1)
        return first, second

    def log_partition(self, h: Tensor) -> Tensor:
        """Σ μ²/(2s²) + log s, that of t = (y, y²): the units of ``link`` play no part in it."""
        mu, rho = h.double().chunk(2, dim=1)
        return (mu.square() * torch.exp(-2 * rho) / 2 + rho).sum(1)

    def mean(self, h: Tensor) -> Tensor:
        """η = 0."""
        return torch.zeros_like(h, dtype=torch.float64)

    def covariance(self, h: Tensor) -> Tensor:
        """𝓘 = diag(1, …, 1, 2, …, 2): E ε² = 1 and E(ε² − 1)² = 2."""
        ones = torch.ones_like(h, dtype=torch.float64).chunk(2, dim=1)
        return torch.diag_embed(torch.cat([ones[0], 2 * ones[1]], dim=1))

    def fourth_moment(self, h: Tensor) -> Tensor:
        """The pairings of 𝓘, and the fourth cumulants of each pair: 8 of (ε, ε, q, q), 48 of q.

        With q = ε² − 1: E ε²q² = 10 = 8 + 2, E q⁴ = 60 = 48 + 3·2²; the others vanish or pair up.
        """
        fourth = pairings(self.covariance(h))
        pair = torch.arange(h.shape[1], device=h.device).chunk(2)
        for a, b, c, d in set(itertools.permutations((0, 0, 1, 1))):
            fourth[:, pair[a], pair[b], pair[c], pair[d]] += 8
        fourth[:, pair[1], pair[1], pair[1], pair[1]] += 48
        return fourth

    def label_size(self, h: Tensor) -> int:
        """K = T/2."""
        return h.shape[1] // 2

    def statistics(self, h: Tensor, y: Tensor) -> Tensor:
        """t(y) = (ε, ε² − 1) with ε = (y − μ)/s."""
        mu, rho = h[:, None].chunk(2, dim=2)
        return self._statistics_of((y - mu) * torch.exp(-rho))

    @staticmethod
    def _statistics_of(noise: Tensor) -> Tensor:
        return torch.cat([noise, noise.square() - 1], dim=2)

    def draw(self, h: Tensor, num_samples: int, generator: torch.Generator | None) -> Labels:
        """Draw N labels per input: no two are equal, so A = N, and the cost grows with N."""
        shape = (len(h), num_samples, self.label_size(h))
        noise = torch.randn(shape, generator=generator, dtype=h.dtype, device=h.device)
        return self.equally_weighted(h, self._statistics_of(noise))

    def information(self, h: Tensor, J: Tensor) -> Tensor:  # noqa: ARG002
        """Σa² + 2b²."""
        a, b = J.double().chunk(2, dim=1)
        return (a.square() + 2 * b.square()).sum(1)

    def variance1(self, h: Tensor, J: Tensor) -> Tensor:
        """2I² + Σ(48a²b² + 48b⁴)."""
        a, b = J.double().square().chunk(2, dim=1)
        return 2 * self.information(h, J).square() + 48 * (a * b + b.square()).sum(1)

    def covariance12(self, h: Tensor, J: Tensor, S: Tensor) -> Tensor:  # noqa: ARG002
        """−Σ(2a² + 8b²)d + 4abc, with J = (a, b) and S = (c, d)."""
        (a, b), (c, d) = J.double().chunk(2, dim=1), S.double().chunk(2, dim=1)
        return -((2 * a.square() + 8 * b.square()) * d + 4 * a * b * c).sum(1)

    def factor(self, h: Tensor) -> Tensor:
        """Diag(1, …, 1, √2, …, √2)."""
        return self.covariance(h).sqrt()

    def draw_signs(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """(ξ, √2 ξ')."""
        means, spreads = random_signs(h, generator).chunk(2, dim=1)
        return torch.cat([means, 2**0.5 * spreads], dim=1)

    def outer_covariance_min(self, h: Tensor) -> Tensor:
        """2, along a mean; λ_max(M) = 56, along a log s."""
        return h.new_full((len(h),), 2, dtype=torch.float64)

    def outer_covariance_at(self, h: Tensor, u: Tensor) -> Tensor:
        """2(𝓘u)(𝓘u)ᵀ and, for each pair, its fourth cumulants at u = (a, b)."""
        a, b = u.chunk(2, dim=2)
        image = torch.cat([a, 2 * b], dim=2)
        own = torch.cat([8 * b.square(), 8 * a.square() + 48 * b.square()], dim=2)
        matrix = 2 * torch.einsum("bri,brj->brij", image, image) + torch.diag_embed(own)
        e, q = torch.arange(h.shape[1], device=h.device).chunk(2)
        matrix[:, :, e, q] += 16 * a * b
        matrix[:, :, q, e] += 16 * a * b
        return matrix

    def directions(self, h: Tensor) -> Tensor:
        """One log s, which is a global maximum."""
        last = torch.eye(h.shape[1], dtype=torch.float64, device=h.device)[-1:]
        return last.expand(len(h), -1, -1)


def cholesky(covariance: Tensor) -> Tensor:
    """The lower triangle L with Σ = LLᵀ, float64, of a covariance that is checked first."""
    covariance = torch.as_tensor(covariance).detach().double()
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        remedy = "a variance s² of every output pass s² * torch.eye(T)"
        if covariance.ndim == 1:
            remedy = "variances v of the outputs pass torch.diag(v)"
        raise ValueError(
            f"the covariance must be [T, T], got {list(covariance.shape)}; for {remedy}."
        )
    if not torch.isfinite(covariance).all():
        raise ValueError("the covariance holds NaN or infinite values.")
    if (covariance - covariance.mT).abs().max() > 1e-10 * covariance.abs().max():
        raise ValueError("the covariance must be symmetric: give (Σ + Σᵀ)/2 in float64.")
    root: Tensor
    root, failure = torch.linalg.cholesky_ex(covariance)
    if failure:
        raise ValueError(
            "the covariance must be positive definite: drop labels that the others determine, or "
            "add a small multiple of the identity."
        )
    return root
