r"""What the paper's quantities need of an output family: its moments, and labels drawn from it.

A family is its log-partition function F and a way to draw labels. All moments are derivatives of F
at the natural parameters h (Eqs 7–9), so they have defaults by automatic differentiation: dense
ones, for teaching, tests and small T, and their *contractions* with derivatives of h. Families with
closed forms override them.

Shapes: h is [B, T] (B inputs, T outputs). A derivative array D, be it J = ∂h or S = ∂²h, is
[B, T, ...]: one column of length T for every entry of its trailing shape. All results are float64.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fimlib._checks import check_num_samples
from fimlib.derivatives import Block, Derivatives, all_finite

# What ``moments`` knows: I and, of one label, N V₁, N V₂ and the covariance of Î₁ and Î₂.
QUANTITIES = ("I", "V1", "V2", "C12")
Moments = Callable[..., dict[str, Tensor]]
NO_CLASSES = (
    "importance sampling needs classes, Categorical(); got {}. Take random signs, "
    "estimator='signs', which need no labels."
)


@dataclass(frozen=True)
class Labels:
    """Labels of B inputs, as ``sample``, ``observed`` or ``expected`` of a family makes them.

    Each label has a share of the whole of its input; equal ones may be counted together.

    Attributes:
        family: The family that they belong to.
        outputs: The network's outputs h, [B, T], float64.
        weights: [B, A], float64, the share of each of A distinct labels in the N of an input.
        num_samples: N, labels per input; 0 where the weights are an exact expectation.
        values: The sufficient statistics t(y), [B, A, T]; None: the T classes in order.
    """

    family: Family
    outputs: Tensor
    weights: Tensor
    num_samples: int
    values: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError unless the weights are shares, and the values fit them."""
        size, num_outputs = self.outputs.shape
        total = self.weights.sum(-1)
        if len(self.weights) != size or not torch.allclose(total, total.new_ones(())):
            raise ValueError(
                f"weights must have shape [B, A] with B = {size} and rows that sum to "
                f"1, got {list(self.weights.shape)} with sums {total.tolist()}."
            )
        if (self.weights < 0).any():
            raise ValueError("weights are shares of the labels: they must not be negative.")
        if self.values is None and self.weights.shape[1] != num_outputs:
            raise ValueError(
                f"labels without values are the {num_outputs} classes in order: weights must have "
                f"shape {[size, num_outputs]}, got {list(self.weights.shape)}."
            )
        expected = [*self.weights.shape, num_outputs]
        if self.values is not None and list(self.values.shape) != expected:
            raise ValueError(
                f"values must have shape [B, A, T] = {expected}, one row t(y) for each weight, "
                f"got {list(self.values.shape)}."
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
    """The distribution of the labels. A subclass needs ``log_partition`` and ``draw``.

    Functions take an instance of a subclass, as ``Categorical()``. The outputs of the network are
    the natural parameters h, unless ``link`` says otherwise; then the defaults do not hold.

    Attributes:
        min_outputs: The least T that the family has a meaning for.
        shift_invariant: Whether p(y|h) stays the same if all outputs are shifted by one number.
    """

    min_outputs = 1
    shift_invariant = False

    def natural(self, h: Tensor) -> Tensor:
        """Check the outputs h and return a copy of them in float64, without a graph.

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
        if not all_finite(h):
            raise ValueError(
                f"{name}: the outputs hold NaN or infinite values. Check the weights and the input."
            )
        return h.detach().to(torch.float64, copy=True)

    def natural_unseen(self, h: Tensor) -> Tensor:
        """``natural`` without its check for NaN, which waits for a GPU, if that is its only one."""
        is_common = type(self).natural is Family.natural
        if is_common and h.ndim == 2 and h.shape[1] >= self.min_outputs:
            return h.detach().double()
        return self.natural(h)

    def link(self, h: Tensor, at: Tensor) -> Tensor:  # noqa: ARG002
        """The natural parameters as a differentiable function of the outputs: [B, T] → [B, T].

        Args:
            h: The outputs, [B, T].
            at: The outputs, without a graph, where derivatives are taken: a family may measure
                its natural parameters in units of that point. All moments belong to h = at.
        """
        return h

    @property
    def is_natural(self) -> bool:
        """Whether the outputs are the natural parameters."""
        return type(self).link is Family.link

    def unmasked(self, h: Tensor) -> Tensor:
        """Replace outputs of −∞ by finite ones, if the family allows them: [B, T] → [B, T]."""
        return h

    def natural_derivatives(self, derivs: Derivatives) -> Derivatives:
        """J and S of the natural parameters from those of the outputs; these stay as they are.

        ``derivs`` itself where the outputs are the natural parameters. Else the second-order
        chain rule through ``link``, L: J' = L'J and S' = L'S + L''[J, J], in float64.

        Raises:
            ValueError: the outputs do not fit the family.
        """
        if self.is_natural:
            return derivs
        h = self.natural(derivs.outputs)

        def through_link(block: Block) -> Block:
            # without S, its place is taken by zeros, and what comes of them is not kept
            S = torch.zeros_like(block.J) if block.S is None else block.S
            J, S = self._chain_rule(h, block.J, S)
            inputs = {n: None if z is None else z.double() for n, z in block.inputs.items()}
            return Block(block.layer, J, None if block.S is None else S, inputs)

        return dataclasses.replace(derivs, blocks=tuple(map(through_link, derivs.blocks)))

    def _chain_rule(self, h: Tensor, J: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative at 0 of τ ↦ link(h + τJ + τ²S/2), for every column."""
        zero, one = h.new_zeros(()), h.new_ones(())

        def column(J: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
            def curve(tau: Tensor) -> Tensor:
                return self.link(h + tau * J + tau.square() / 2 * S, at=h)

            def velocity(tau: Tensor) -> Tensor:
                tangent: Tensor = torch.func.jvp(curve, (tau,), (one,))[1]
                return tangent

            derivatives = torch.func.jvp(velocity, (zero,), (one,))
            return derivatives[0], derivatives[1]

        columns = [D.double().reshape(*h.shape, -1) for D in (J, S)]
        first, second = torch.func.vmap(column, in_dims=-1, out_dims=-1)(*columns)
        return first.reshape(J.shape), second.reshape(S.shape)

    @abstractmethod
    def log_partition(self, h: Tensor) -> Tensor:
        """F(h) of Eq. 1, [B]."""

    def mean(self, h: Tensor) -> Tensor:
        """η = E[t(y)] = ∇F, [B, T] (Eq. 7)."""
        return self._cumulant(h, 1)

    def covariance(self, h: Tensor) -> Tensor:
        """𝓘 = E[δδᵀ] = ∇²F, [B, T, T] (Eq. 8)."""
        return self._cumulant(h, 2)

    def fourth_moment(self, h: Tensor) -> Tensor:
        """𝓚 = E[δ⊗δ⊗δ⊗δ], [B, T, T, T, T] (Eq. 9). Dense: for teaching, tests and small T."""
        return self._cumulant(h, 4) + pairings(self.covariance(h))

    def _cumulant(self, h: Tensor, order: int) -> Tensor:
        """∇ⁿF, the n-th cumulant of t(y): [B, T, …, T]."""
        derivative: Callable[[Tensor], Tensor] = lambda row: self.log_partition(row[None])[0]  # noqa: E731
        for _ in range(order):
            derivative = torch.func.jacfwd(derivative)
        return torch.func.vmap(derivative)(h.detach().double())

    def outer_covariance(self, h: Tensor) -> Tensor:
        """M = 𝓚 − 𝓘⊗𝓘, the covariance of δ⊗δ (Eq. 11), [B, T, T, T, T]. Dense, like 𝓚."""
        cov = self.covariance(h)
        return self.fourth_moment(h) - torch.einsum("bij,bkl->bijkl", cov, cov)

    # Labels.

    def sample(
        self, h: Tensor, num_samples: int, generator: torch.Generator | None = None
    ) -> Labels:
        """Draw N labels for every input from p(y|h).

        Args:
            h: The outputs, [B, T].
            num_samples: N ≥ 1.
            generator: Of the device of h; torch's global one by default.

        Raises:
            ValueError: N < 1, h does not fit the family, or the generator is of another device.
        """
        if generator is not None and generator.device != h.device:
            raise ValueError(
                f"the generator is on {generator.device}, the outputs are on {h.device}: make it "
                f'by torch.Generator("{h.device}").'
            )
        return self.draw(self.natural(h), check_num_samples(num_samples), generator)

    @abstractmethod
    def draw(self, h: Tensor, num_samples: int, generator: torch.Generator | None) -> Labels:
        """What ``sample`` does once its arguments are checked."""

    def observed(self, h: Tensor, y: Tensor | Sequence[Any]) -> Labels:
        """Labels that were observed, as a sample like those of ``sample``.

        Args:
            h: The outputs, [B, T].
            y: [B, L], one label for every input, or [B, N, L], with L = ``label_size(h)``, which
                is T unless the family says otherwise. ``Categorical`` takes classes, [B] or [B, N].

        Raises:
            ValueError: h or the shape of y does not fit the family, or y holds a value that a
                label cannot take.
        """
        h, name = self.natural(h), type(self).__name__
        y = y if isinstance(y, Tensor) else torch.as_tensor(y, device=h.device)
        size, width = len(h), self.label_size(h)
        labels = y.detach().to(h, copy=True)
        labels = labels[:, None] if y.ndim == 2 else labels
        if labels.ndim != 3 or 0 in labels.shape or labels.shape[::2] != (size, width):
            raise ValueError(
                f"{name}: observed labels must have shape {[size, width]}, or "
                f"[{size}, N, {width}] for N ≥ 1 per input, got {list(y.shape)}."
            )
        if not torch.isfinite(labels).all():
            raise ValueError(f"{name}: the observed labels hold NaN or infinite values.")
        self.check_support(labels)
        return self.equally_weighted(h, self.statistics(h, labels))

    def label_size(self, h: Tensor) -> int:
        """L, the length of one label y at outputs [B, T]."""
        return h.shape[1]

    def check_support(self, y: Tensor) -> None:  # noqa: B027
        """Raise a ValueError if a finite y, [B, N, L], is none of the family's labels."""

    def statistics(self, h: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """t(y): labels [B, N, L] → [B, N, T]."""
        return y

    def equally_weighted(self, h: Tensor, values: Tensor) -> Labels:
        """N labels per input with the statistics t(y) = ``values``, [B, N, T]."""
        size, num_samples, _ = values.shape
        weights = torch.full((size, num_samples), 1 / num_samples, dtype=h.dtype, device=h.device)
        return Labels(self, h, weights, num_samples, values)

    def project(self, h: Tensor, D: Tensor, values: Tensor | None) -> Tensor:
        """D·(t(y) − η) for every distinct label: [B, T, ...] → [B, A, ...]."""
        if values is None:
            raise ValueError(
                f"{type(self).__name__} labels need their values t(y), [B, A, T]: make them by "
                "sample() or observed()."
            )
        return torch.einsum("bat,bt...->ba...", self.residuals(h, values), D.double())

    def residuals(self, h: Tensor, values: Tensor) -> Tensor:
        """δ = t(y) − η for the labels with t(y) = ``values``: [B, A, T] → [B, A, T]."""
        return values - self.mean(h)[:, None]

    # Contractions with derivatives of the natural parameters.

    def _contracted(self, h: Tensor, *D: Tensor) -> Tensor:
        """∇ⁿF[D₁, …, D_n], for n arrays [B, T, ...] → [B, ...], by forward mode."""
        h = h.detach().double()

        def column(*D: Tensor) -> Tensor:
            derivative = self.log_partition
            for direction in D:
                derivative = partial(along, derivative, direction)
            return derivative(h)

        columns = [d.double().reshape(*h.shape, -1) for d in D]
        found: Tensor = torch.func.vmap(column, in_dims=-1, out_dims=-1)(*columns)
        return found.reshape(len(h), *D[0].shape[2:])

    def information(self, h: Tensor, J: Tensor) -> Tensor:
        """𝓘[J, J] (Eq. 23): [B, T, ...] → [B, ...]."""
        return self._contracted(h, J, J).clamp_min(0)  # but for rounding

    def variance1(self, h: Tensor, J: Tensor) -> Tensor:
        """M[J, J, J, J], N·V₁ (Eq. 24): [B, T, ...] → [B, ...]."""
        found = self._contracted(h, J, J, J, J) + 2 * self.information(h, J).square()
        return found.clamp_min(0)

    def variance2(self, h: Tensor, S: Tensor) -> Tensor:
        """𝓘[S, S], N·V₂ (Eq. 25): [B, T, ...] → [B, ...]."""
        return self.information(h, S)

    def covariance12(self, h: Tensor, J: Tensor, S: Tensor) -> Tensor:
        """C₁₂ = −∇³F[J, J, S], the covariance of Î₁ and Î₂ on one label: → [B, ...]."""
        return -self._contracted(h, J, J, S)

    def moments(
        self,
        h: Tensor,
        *,
        quantities: Collection[str] = QUANTITIES,
        dtype: torch.dtype = torch.float64,  # noqa: ARG002
    ) -> Moments:
        """Several contractions of one label at once; a family may share work between them.

        Args:
            h: The natural parameters, [B, T].
            quantities: Which of "I", "V1", "V2", "C12"; I always comes.
            dtype: Of the contractions, where the family has a choice.

        Returns:
            A function of J and S, [B, T, ...]: quantity → [B, ...]. Without S, V₂ and C₁₂ are
            left out.
        """

        def contract(J: Tensor, S: Tensor | None = None) -> dict[str, Tensor]:
            found = {"I": self.information(h, J)}
            if "V1" in quantities:
                found["V1"] = self.variance1(h, J)
            if S is not None and "V2" in quantities:
                found["V2"] = self.variance2(h, S)
            if S is not None and "C12" in quantities:
                found["C12"] = self.covariance12(h, J, S)
            return found

        return contract

    # Random vectors w with E w = 0 and E wwᵀ = 𝓘, for ``estimate``.

    def factor(self, h: Tensor) -> Tensor:
        """L with 𝓘 = LLᵀ, [B, T, R]."""
        values, vectors = torch.linalg.eigh(self.covariance(h))
        factor: Tensor = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
        return factor

    def variance_signs(self, h: Tensor, J: Tensor) -> Tensor:
        """Var (w·J)² = 4 Σ_{r<s} a_r² a_s², a = LᵀJ, for w = Lξ: [B, T, ...] → [B, ...]."""
        a = torch.einsum("btr,bt...->br...", self.factor(h), J.double())
        return 4 * sum_of_pairs(a.square())

    def variance_importance(self, h: Tensor, J: Tensor) -> Tensor:  # noqa: ARG002
        """The same where classes are drawn by importance; see ``Categorical``.

        Raises:
            ValueError: the labels are no classes.
        """
        raise ValueError(NO_CLASSES.format(type(self).__name__))

    def variance2_importance(self, h: Tensor, S: Tensor) -> Tensor:  # noqa: ARG002
        """Of Î₂ on such a class; as ``variance_importance``."""
        raise ValueError(NO_CLASSES.format(type(self).__name__))

    def draw_important(self, h: Tensor, generator: torch.Generator | None) -> Tensor:  # noqa: ARG002
        """Random vectors w of classes that are drawn by importance; as ``variance_importance``."""
        raise ValueError(NO_CLASSES.format(type(self).__name__))

    def draw_signs(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Lξ with a random sign ξ_r for every column of L, [B, T]."""
        factor = self.factor(h)
        return torch.einsum("btr,br->bt", factor, random_signs(factor[:, 0], generator))

    def draw_residual(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """δ = t(y) − η of one label, [B, T]."""
        labels = self.draw(h, 1, generator)
        if labels.values is None:
            return labels.mean_residual()
        return self.residuals(h, labels.values)[:, 0]

    # What the spectra need of M (Eq. 13), and Proposition 4.3 of δ.

    def outer_covariance_min(self, h: Tensor) -> Tensor:
        """λ_min(M) of Eq. 13, [B], or a certified lower bound, as 0 ≤ Var((u·δ)²) is."""
        return h.new_zeros(len(h), dtype=torch.float64)

    def outer_covariance_at(self, h: Tensor, u: Tensor) -> Tensor:
        """M(u, u, ·, ·) for R directions of each input: [B, R, T] → [B, R, T, T]."""
        return torch.einsum("bijkl,bri,brj->brkl", self.outer_covariance(h), u, u)

    def directions(self, h: Tensor) -> Tensor:
        """Directions from which a search for λ_max(M) starts, [B, R, T]: outputs and axes of 𝓘.

        The ascent may never leave the outputs that its start has a part in, so that all starts have
        a small part of every output.
        """
        axes = torch.linalg.eigh(self.covariance(h)).eigenvectors.mT
        outputs = torch.eye(h.shape[1], dtype=torch.float64, device=h.device).expand_as(axes)
        return torch.cat([outputs, axes], dim=1) + 0.05

    def unfolding(self, h: Tensor) -> Tensor:
        """A symmetric matrix with the nonzero eigenvalues of M unfolded to T²×T²: [B, n, n]."""
        return self.outer_covariance(h).flatten(3, 4).flatten(1, 2)

    def residual_bound(self, h: Tensor) -> Tensor:  # noqa: ARG002
        """Largest ‖t(y) − η‖² over y, the bound of Proposition 4.3: [B].

        Raises:
            ValueError: t(y) is unbounded.
        """
        raise ValueError(
            f"{type(self).__name__}: ‖t(y) − η‖² has no upper bound over the labels, so "
            "Proposition 4.3 does not apply. Use the spectrum of 𝓚 itself."
        )


def check_family(family: object) -> None:
    """Raise a TypeError unless this is an output family."""
    if isinstance(family, Family):
        return
    name, remedy = f"a {type(family).__name__}", "pass e.g. fimlib.Categorical()"
    if isinstance(family, str):
        name = repr(family)
    elif isinstance(family, type):
        name = family.__name__
        remedy = f"make an instance, {name}()" if issubclass(family, Family) else remedy
    elif isinstance(family, Derivatives):
        remedy = "the order is derivatives, family"
    elif hasattr(family, "__iter__"):  # a tensor, a loader
        remedy = "the order is model, inputs, family"
    raise TypeError(f"{name} is no output family: {remedy}.")


def along(function: Callable[[Tensor], Tensor], direction: Tensor, h: Tensor) -> Tensor:
    """The derivative of a function at h along a direction."""
    tangent: Tensor = torch.func.jvp(function, (h,), (direction,))[1]
    return tangent


def random_signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """±1 with equal chances, float64; a random integer gives 63 of them."""
    device = like.device if generator is None else generator.device
    count = -(-like.numel() // 63)
    words = torch.empty(count, 1, dtype=torch.int64, device=device).random_(generator=generator)
    bits = (words >> torch.arange(63, device=device)).bitwise_and_(1)
    signs = bits.flatten()[: like.numel()].double().mul_(2).sub_(1)
    return signs.view(like.shape).to(like.device)


def sum_of_pairs(x: Tensor) -> Tensor:
    """Σ_{a<b} x_a x_b, [B, T, ...] → [B, ...]; of numbers ≥ 0 nothing cancels."""
    before = running_sums(torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1))
    return (before * x).sum(1)


def running_sums(x: Tensor) -> Tensor:
    """Σ_{b≤a} x_b, [B, T, ...]; in T steps where CUDA's kernel, not deterministic, is refused."""
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(1)
    return torch.stack(list(accumulate(x.unbind(1))), dim=1)


def weighted_mean(weights: Tensor, x: Tensor) -> Tensor:
    """Σ_a w_a x_a: [B, A] and [B, A, ...] → [B, ...]."""
    return torch.einsum("ba,ba...->b...", weights, x)


def weighted_variance(weights: Tensor, x: Tensor) -> Tensor:
    """Σ_a w_a (x_a − Σ_b w_b x_b)², centred before it is squared: [B, A, ...] → [B, ...]."""
    return weighted_mean(weights, (x - weighted_mean(weights, x).unsqueeze(1)).square())


def pairings(cov: Tensor) -> Tensor:
    """𝓘_ab 𝓘_cd + 𝓘_ac 𝓘_bd + 𝓘_ad 𝓘_bc: 𝓚 less the fourth cumulant ∇⁴F. [B, T, T] → [B, T⁴]."""
    ab_cd = torch.einsum("bij,bkl->bijkl", cov, cov)
    return ab_cd + ab_cd.transpose(2, 3) + ab_cd.transpose(2, 4)
