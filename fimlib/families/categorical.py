r"""Labels that are one of T classes: the softmax (Sections 5 and 5.2, Appendix D)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fimlib.families.base import (
    QUANTITIES,
    Family,
    Labels,
    Moments,
    random_signs,
    running_sums,
    sum_of_pairs,
    weighted_mean,
    weighted_variance,
)

MASKED = -1e4  # exp(MASKED) is 0, and sums with it keep their digits


class Categorical(Family):
    """Classification: h = logits, t(y) = one-hot, σ = softmax(h) (Section 5.2, Appendix D).

    Every contraction goes through the C projections ``D_k − σ·D``: the derivative of
    log p(k|x) for D = J. A sample of N labels enters only by its C class counts. ``observed``
    takes classes, integers [B] or [B, N]; rows that look one-hot are refused.

    A logit of −∞ masks a class, which then has σ = J = S = 0: where a function takes the data and
    the family, as ``accumulate`` does. Elsewhere mask by −10⁴.

    Class weights and label smoothing change the loss of a training, and not p(y|x): I stays as it
    is, at given weights of the network.
    """

    min_outputs = 2
    shift_invariant = True

    def unmasked(self, h: Tensor) -> Tensor:
        """Logits of −∞, of classes that cannot occur, as −10⁴: σ = 0, J = S = 0.

        NaN where no other logit of the row is larger than −9000, so that σ would not be 0.
        """
        is_possible = h.detach().amax(-1, keepdim=True) > 0.9 * MASKED
        fill = torch.where(is_possible, MASKED, math.nan).to(h)
        return torch.where(torch.isneginf(h), fill, h)

    def log_partition(self, h: Tensor) -> Tensor:  # noqa: D102
        return torch.logsumexp(h.double(), dim=1)

    def mean(self, h: Tensor) -> Tensor:  # noqa: D102
        return torch.softmax(h.double(), dim=1)

    def covariance(self, h: Tensor) -> Tensor:
        """𝓘 = diag σ − σσᵀ (Appendix D)."""
        return softmax_covariance(self.mean(h))

    def fourth_moment(self, h: Tensor) -> Tensor:
        """𝓚 = Σ_k σ_k (e_k − σ)^{⊗4}."""
        sigma = self.mean(h)
        residuals = (
            torch.eye(sigma.shape[1], dtype=sigma.dtype, device=sigma.device) - sigma[:, None]
        )
        return torch.einsum("bk,bki,bkj,bkl,bkm->bijlm", sigma, *[residuals] * 4)

    def draw(self, h: Tensor, num_samples: int, generator: torch.Generator | None) -> Labels:
        """Draw the class counts of N labels, one conditional binomial per class: O(C) for any N."""
        sigma = self.mean(h)
        remaining_mass = running_sums(sigma.flip(1)).flip(1)
        share = (sigma / remaining_mass.clamp_min(torch.finfo(sigma.dtype).tiny)).clamp_max(1)
        share[:, -1] = 1  # the last class takes what is left
        left = sigma.new_full((len(sigma),), num_samples)
        counts = torch.zeros_like(sigma)
        for k in range(sigma.shape[1]):
            counts[:, k] = torch.binomial(left, share[:, k], generator=generator)
            left = left - counts[:, k]
        return Labels(self, h, counts / num_samples, num_samples)

    def observed(self, h: Tensor, y: Tensor | Sequence[Any]) -> Labels:
        """Classes that were observed, by their counts.

        Args:
            h: The logits, [B, C].
            y: Integers from 0 to C − 1, [B], one for every input, or [B, N].

        Raises:
            ValueError: y is not of an integer type, has another shape, or holds no class; or it
                looks one-hot, [B, C] with a single 1 in every row and else 0, where C > 2 and the
                rows are not all alike. If each row really is N = C labels, all of class 0 but one
                of class 1, give ``expected`` their shares.
        """
        h = self.natural(h)
        y = y if isinstance(y, Tensor) else torch.as_tensor(y, device=h.device)
        size, num_classes = h.shape
        if looks_one_hot(y, num_classes):
            raise ValueError(
                f"y, {list(y.shape)}, looks one-hot: use y{'.int()' * (y.dtype == torch.bool)}"
                f".argmax(1). If these are {num_classes} labels for each input, give their shares: "
                "family.expected(h, counts / N)."
            )
        if y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
            raise ValueError(f"classes must be integers, got {y.dtype}: use y.long().")
        if y.ndim not in (1, 2) or len(y) != size or y.numel() == 0:
            raise ValueError(
                f"observed classes must have shape [{size}], or [{size}, N] for N ≥ 1 per input, "
                f"got {list(y.shape)}."
            )
        if y.min() < 0 or y.max() >= num_classes:
            raise ValueError(
                f"classes must lie between 0 and {num_classes - 1}, the outputs being "
                f"{num_classes}; got values from {int(y.min())} to {int(y.max())}."
            )
        y = y.reshape(size, -1).long().to(h.device)
        counts = torch.zeros_like(h).scatter_add_(1, y, torch.ones_like(y, dtype=h.dtype))
        return Labels(self, h, counts / y.shape[1], y.shape[1])

    def expected(self, h: Tensor, q: Tensor) -> Labels:
        """A whole distribution q(y|x) of the label, [B, C], in the place of a sample from it.

        The exact expectation over y ~ q; its ``num_samples`` is 0, for no label was drawn.

        Raises:
            ValueError: q is not [B, C], negative or NaN, or a row is off 1 by more than 1e-9.
        """
        h = self.natural(h)
        if q.shape != h.shape:
            raise ValueError(f"q must have the logits' shape {list(h.shape)}, got {list(q.shape)}.")
        q = q.detach().to(h, copy=True)
        if not (q >= 0).all():
            raise ValueError("q holds negative or NaN values: it must be a probability per class.")
        if ((q.sum(1) - 1).abs() > 1e-9).any():
            raise ValueError(
                f"the rows of q must sum to 1 within 1e-9, got {q.sum(1).tolist()}: normalise them "
                "in float64, q = q.double() / q.double().sum(1, keepdim=True)."
            )
        return Labels(self, h, q, num_samples=0)

    def project(self, h: Tensor, D: Tensor, values: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """``D_k − σ·D`` for every class k: [B, C, ...] → [B, C, ...].

        D counts from the likeliest class: what is left for that class is then the small sum over
        the others, with all its digits, and not the difference of two large numbers.
        """
        likeliest = self.natural(h).argmax(1).reshape(-1, *[1] * (D.ndim - 1))
        D = D.double() - torch.take_along_dim(D.double(), likeliest, dim=1)
        return D - weighted_mean(self.mean(h), D).unsqueeze(1)

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

    def moments(
        self,
        h: Tensor,
        *,
        quantities: Collection[str] = QUANTITIES,
        dtype: torch.dtype = torch.float64,
    ) -> Moments:
        """As for every family, from one c and one s; Σσ_k s_k = 0 centres C₁₂."""
        sigma = self.mean(h).to(dtype)

        def centre(D: Tensor) -> Tensor:
            D = D.to(dtype)
            return D - weighted_mean(sigma, D).unsqueeze(1)

        def contract(J: Tensor, S: Tensor | None = None) -> dict[str, Tensor]:
            c = centre(J)
            deviations = c.square_()
            found = {"I": weighted_mean(sigma, deviations)}
            if not {"V1", "V2", "C12"} & set(quantities):
                return found
            deviations -= found["I"].unsqueeze(1)
            if S is not None:
                s = centre(S)
                if "C12" in quantities:
                    found["C12"] = -weighted_mean(sigma, deviations * s)
                if "V2" in quantities:
                    found["V2"] = weighted_mean(sigma, s.square())
            if "V1" in quantities:
                found["V1"] = weighted_mean(sigma, deviations.square_())
            return found

        return contract

    def factor(self, h: Tensor) -> Tensor:
        """Columns √σ_k (e_k − σ)."""
        sigma = self.mean(h)
        off_diagonal = 1 - torch.eye(h.shape[1], dtype=sigma.dtype, device=sigma.device)
        residuals = torch.diag_embed(sigma @ off_diagonal) - sigma[:, :, None] * off_diagonal
        return residuals * sigma.sqrt().unsqueeze(1)

    def variance_signs(self, h: Tensor, J: Tensor) -> Tensor:
        """4 Σ_{k<l} σ_k c_k² σ_l c_l², with c = ``project(J)``."""
        squares = self.project(h, J).square()
        return 4 * sum_of_pairs(torch.einsum("bk,bk...->bk...", self.mean(h), squares))

    def variance_importance(self, h: Tensor, J: Tensor) -> Tensor:
        """Σ_k q_k (σ_k c_k²/q_k − I)², for a class k ~ q = ``importance``."""
        sigma, q = self.mean(h), self.importance(h)
        squares = self.project(h, J).square()
        ratio = torch.where(q > 0, sigma / q, 0)
        return weighted_variance(q, torch.einsum("bk,bk...->bk...", ratio, squares))

    def variance2_importance(self, h: Tensor, S: Tensor) -> Tensor:
        """Σ_k σ_k² s_k²/q_k, with s = ``project(S)``, for a class k ~ q = ``importance``."""
        sigma, q = self.mean(h), self.importance(h)
        weight = torch.where(q > 0, sigma.square() / q, 0)
        return torch.einsum("bk,bk...->b...", weight, self.project(h, S).square())

    def draw_signs(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Σ_k ξ_k √σ_k (e_k − σ), without the columns."""
        sigma = self.mean(h)
        signed = random_signs(sigma, generator).mul_(sigma.sqrt())
        return signed.addcmul_(sigma, signed.sum(1, keepdim=True), value=-1)

    def draw_residual(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """e_k − σ for one class k."""
        sigma = self.mean(h)
        return residual_of(sigma, torch.multinomial(sigma, 1, generator=generator))

    def draw_important(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """ξ √(σ_k/q_k) (e_k − σ) of one class k ~ ``importance``, with a random sign ξ."""
        sigma, q = self.mean(h), self.importance(h)
        k = torch.multinomial(q, 1, generator=generator)
        weight = (sigma.gather(1, k) / q.gather(1, k)).sqrt()
        return residual_of(sigma, k) * weight * random_signs(weight, generator)

    def importance(self, h: Tensor) -> Tensor:
        """q_k ∝ σ_k ‖e_k − σ‖, [B, C]; σ where the likeliest class has probability 1."""
        sigma = self.mean(h)
        top = sigma.argmax(1, keepdim=True)
        norms = (1 - 2 * sigma + sigma.square().sum(1, keepdim=True)).clamp_min(0)
        of_top = residual_of(sigma, top).square().sum(1, keepdim=True)  # which would cancel
        q = sigma * norms.scatter(1, top, of_top).sqrt()
        total = q.sum(1, keepdim=True)
        return torch.where(total > 0, q / total, sigma)

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

    def residual_bound(self, h: Tensor) -> Tensor:
        """‖e_k − σ‖² for the least likely class k: 1 − 2 min σ + ‖σ‖²."""
        sigma = self.mean(h)
        residual = torch.zeros_like(sigma).scatter_(1, sigma.argmin(1, keepdim=True), 1) - sigma
        return residual.square().sum(1)


def residual_of(sigma: Tensor, k: Tensor) -> Tensor:
    """e_k − σ for classes k, [B, 1]; 1 − σ_k is summed up from the others: [B, C]."""
    others = sigma.scatter(1, k, 0)
    return (-others).scatter(1, k, others.sum(1, keepdim=True))


def looks_one_hot(y: Tensor, num_classes: int) -> bool:
    """Whether rows [B, C] have a single 1 and else 0, C > 2 and not the same place in all rows.

    With two classes half of all pairs of labels look so; and the same labels may be meant for all
    inputs. Else, C labels that are drawn for each of B inputs look so with probability (4/9)^B at
    most, from two classes with odds of 2 to 1.
    """
    if y.ndim != 2 or y.shape[1] != num_classes or num_classes == 2 or not len(y):
        return False
    is_single = ((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all()
    return bool(is_single) and not bool((y == y[0]).all())


def softmax_covariance(sigma: Tensor) -> Tensor:
    """Diag σ − σσᵀ with σ_k(1 − σ_k) from the sum of the others: nothing cancels. [B, C, C]."""
    off_diagonal = 1 - torch.eye(sigma.shape[1], dtype=sigma.dtype, device=sigma.device)
    outer = torch.einsum("bi,bj->bij", sigma, sigma)
    return torch.diag_embed(sigma * (sigma @ off_diagonal)) - outer * off_diagonal
