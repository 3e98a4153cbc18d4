r"""T independent labels, one for each output, by their cumulants (Section 1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fimlib.families.base import (
    Family,
    Labels,
    pairings,
    random_signs,
    sum_of_pairs,
    weighted_mean,
)


class Independent(Family):
    """T independent labels, one for each output: all moments are built from univariate cumulants.

    The fourth cumulant is diagonal, so ``𝓚 = pairings of 𝓘 + Σ_a κ₄ e_a^{⊗4}`` and, with x = u²,
    ``M(u,u,u,u) = Σ_a Var(δ_a²) x_a² + 4 Σ_{a<b} κ₂_a κ₂_b x_a x_b``.

    Example: a family of one's own, the heads in ten tosses, with the logit of a head for h.
        >>> class Heads(Independent):
        ...     def log_partition(self, h):
        ...         return 10 * torch.nn.functional.softplus(h.double()).sum(1)
        ...     def draw(self, h, num_samples, generator):
        ...         p = h.double().sigmoid()[:, None, None].expand(-1, num_samples, 10, -1)
        ...         return self.equally_weighted(h, torch.bernoulli(p, generator=generator).sum(2))
        >>> Heads().information(torch.zeros(1, 1), torch.ones(1, 1)).item()  # 10 p (1 − p), p = ½
        2.5
    """

    def cumulants(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """κ₂, κ₃ and κ₄ of each t_a(y), [B, T] each: derivatives of η, output by output."""
        derivative: Callable[[Tensor], Tensor] = self.log_partition
        found = []
        for _ in range(4):
            derivative = partial(slopes, derivative)
            found.append(derivative(h.detach().double()))
        return found[1], found[2], found[3]

    def squares_variance(self, h: Tensor) -> Tensor:
        """Var(δ_a²) = 2κ₂² + κ₄ of each output, [B, T]; override it where that cancels."""
        k2, _, k4 = self.cumulants(h)
        return 2 * k2.square() + k4

    def covariance(self, h: Tensor) -> Tensor:
        """𝓘 = diag κ₂."""
        return torch.diag_embed(self.cumulants(h)[0])

    def fourth_moment(self, h: Tensor) -> Tensor:
        """𝓚 = 𝓘_ab 𝓘_cd + 𝓘_ac 𝓘_bd + 𝓘_ad 𝓘_bc, and κ₄ where a = b = c = d."""
        fourth, a = pairings(self.covariance(h)), torch.arange(h.shape[1], device=h.device)
        fourth[:, a, a, a, a] += self.cumulants(h)[2]
        return fourth

    def information(self, h: Tensor, J: Tensor) -> Tensor:
        """Σκ₂J²."""
        return weighted_mean(self.cumulants(h)[0], J.double().square())

    def variance1(self, h: Tensor, J: Tensor) -> Tensor:
        """2I² + Σκ₄J⁴ as ΣVar(δ_a²)J_a⁴ + 4Σ_{a<b}κ₂_aκ₂_bJ_a²J_b², where nothing cancels."""
        squares = J.double().square()
        terms = torch.einsum("bt,bt...->bt...", self.cumulants(h)[0], squares)
        own = weighted_mean(self.squares_variance(h), squares.square())
        return own + 4 * sum_of_pairs(terms)

    def covariance12(self, h: Tensor, J: Tensor, S: Tensor) -> Tensor:
        """−Σκ₃J²S."""
        return -weighted_mean(self.cumulants(h)[1], J.double().square() * S.double())

    def factor(self, h: Tensor) -> Tensor:
        """Diag √κ₂."""
        return torch.diag_embed(self.cumulants(h)[0].sqrt())

    def draw_signs(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """√κ₂ ξ."""
        scale = self.cumulants(h)[0].sqrt()
        return scale * random_signs(scale, generator)

    def outer_covariance_min(self, h: Tensor) -> Tensor:
        """A certified lower bound 1 / Σ_a 1/Var(δ_a²) on λ_min(M); exact for T = 1.

        The products of different outputs in M(u,u,u,u) are not negative, and by Cauchy–Schwarz
        ``1 = (Σx_a)² ≤ Σ_a Var(δ_a²) x_a² · Σ_a 1/Var(δ_a²)``. It is 0 where one variance is 0.
        """
        return 1 / (1 / self.squares_variance(h)).sum(1)

    def outer_covariance_at(self, h: Tensor, u: Tensor) -> Tensor:
        """Var(δ_a²)u_a² on the diagonal, 2κ₂_aκ₂_b u_a u_b off it."""
        scaled = self.cumulants(h)[0][:, None] * u
        diagonal = torch.diag_embed(self.squares_variance(h)[:, None] * u.square())
        off_diagonal = 1 - torch.eye(h.shape[1], dtype=torch.float64, device=h.device)
        return diagonal + 2 * torch.einsum("bri,brj->brij", scaled, scaled) * off_diagonal

    def directions(self, h: Tensor) -> Tensor:
        """Each output, and each set of the outputs with the largest variances.

        The ascent never leaves the outputs that its start has a part in, so that all starts have a
        small part of every output.
        """
        rank = self.cumulants(h)[0].argsort(1, descending=True).argsort(1)
        singles = torch.eye(h.shape[1], dtype=torch.float64, device=h.device)
        prefixes = torch.ones_like(singles).tril()[:, rank].transpose(0, 1)
        return torch.cat([singles.expand(len(h), -1, -1), prefixes], dim=1) + 0.05

    def unfolding(self, h: Tensor) -> Tensor:
        """Diagonal: Var(δ_a²) for every a, and 2κ₂_aκ₂_b for every pair a < b; n = T(T + 1)/2."""
        k2 = self.cumulants(h)[0]
        a, b = torch.triu_indices(h.shape[1], h.shape[1], offset=1, device=h.device)
        return torch.diag_embed(torch.cat([self.squares_variance(h), 2 * k2[:, a] * k2[:, b]], 1))


def slopes(function: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """Of a function of each number by itself, or their sums: its derivatives, in the shape of h."""
    found: Tensor = torch.func.grad(lambda h: function(h).sum())(h)
    return found


class Bernoulli(Independent):
    """T independent yes/no labels y ∈ {0, 1}: h = logits, t(y) = y, p = sigmoid(h)."""

    def log_partition(self, h: Tensor) -> Tensor:
        """Σ log(1 + e^h)."""
        h = h.double()
        return torch.logaddexp(h, torch.zeros_like(h)).sum(1)

    def mean(self, h: Tensor) -> Tensor:  # noqa: D102
        return torch.sigmoid(h.double())

    def cumulants(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The variance v = p(1 − p), then v(1 − 2p) and v(1 − 6v)."""
        v = torch.sigmoid(h.double()) * torch.sigmoid(-h.double())  # 1 − p would cancel
        return v, -v * torch.tanh(h.double() / 2), v * (1 - 6 * v)

    def squares_variance(self, h: Tensor) -> Tensor:
        """v(1 − 2p)², small near p = ½."""
        return self.cumulants(h)[0] * torch.tanh(h.double() / 2).square()

    def draw(self, h: Tensor, num_samples: int, generator: torch.Generator | None) -> Labels:
        """Draw N labels per input."""
        p = self.mean(h)[:, None].expand(-1, num_samples, -1)
        return self.equally_weighted(h, torch.bernoulli(p, generator=generator))

    def residuals(self, h: Tensor, values: Tensor) -> Tensor:
        """δ = ±(1 − p or p), the smaller one with all its digits: (2y − 1) sigmoid((1 − 2y)h)."""
        sign = 2 * values - 1
        return sign * torch.sigmoid(-sign * h.double()[:, None])

    def check_support(self, y: Tensor) -> None:
        """Raise a ValueError unless all labels are 0 or 1."""
        if not ((y == 0) | (y == 1)).all():
            raise ValueError("Bernoulli labels must be 0 or 1: for classes use Categorical.")

    def residual_bound(self, h: Tensor) -> Tensor:
        """Σ max(p, 1 − p)²."""
        return torch.sigmoid(h.double().abs()).square().sum(1)


class Poisson(Independent):
    """T independent counts y: h = logarithms of the rates μ, t(y) = y; all cumulants are μ."""

    def natural(self, h: Tensor) -> Tensor:
        """As for every family; the rates must not exceed 2⁵³, up to which float64 can count."""
        h = super().natural(h)
        if (h.exp() > 2**53).any():
            raise ValueError(
                f"Poisson: a log rate of {h.max().item():.4g} overflows: rates beyond 2^53 cannot "
                "be counted in float64. The outputs are logarithms of the rates; check the last "
                "layer, or measure the counts in a larger unit."
            )
        return h

    def log_partition(self, h: Tensor) -> Tensor:
        """Σ e^h."""
        return h.double().exp().sum(1)

    def mean(self, h: Tensor) -> Tensor:  # noqa: D102
        return h.double().exp()

    def cumulants(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rate μ, three times."""
        return (self.mean(h),) * 3

    def draw(self, h: Tensor, num_samples: int, generator: torch.Generator | None) -> Labels:
        """Draw N labels per input."""
        rate = self.mean(h)[:, None].repeat(1, num_samples, 1)
        return self.equally_weighted(h, torch.poisson(rate, generator=generator))

    def check_support(self, y: Tensor) -> None:
        """Raise a ValueError unless all labels are counts."""
        if not ((y >= 0) & (y == y.round())).all():
            raise ValueError("Poisson labels must be counts: integers ≥ 0.")
