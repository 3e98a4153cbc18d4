r"""Approximate S by carrying only the diagonal of the Hessian back (Becker–LeCun, HesScale).

Going back through one linear layer s' = Wσ(s) + b, one output's Hessian H in the pre-activations
and its gradient g (a column) become

    g ← σ'(s) ∘ Wᵀg,    H ← D Wᵀ H W D + diag(σ''(s) ∘ Wᵀg),    D = diag σ'(s).

The approximation keeps d = diag H and drops the rest of H:

    d ← σ'(s)² ∘ (W∘W)ᵀ d + σ''(s) ∘ Wᵀg.

g, and with it J, stays exact. d is exact where the H that it comes from is diagonal. That of one
output h^a is 0 at the last linear layer, and diagonal at the one before; at the third from the end
it is full, but its diagonal came from a diagonal one. So S is exact in the last *three* linear
layers of an MLP, and approximate below. In general it is exact in a layer if at most one linear
layer lies between it and the last curved nonlinearity: in the last two only where the outputs
themselves are activated, everywhere where nothing is curved (ReLU).

The two methods differ in nothing but the diagonal that they start from at the outputs of a *loss*:

* Becker & LeCun, "Improving the convergence of back-propagation learning with second order
  methods", Proc. 1988 Connectionist Models Summer School (1989), take every output unit for itself,
  which is exact for squared errors. Outputs under a softmax are coupled. Elsayed et al. compare
  with the method, in ``core/run/approx_quality.py`` of github.com/mohmdelsayed/HesScale, as if the
  log-softmax were elementwise: d = σ_y(1 − σ_y) for the label y, and 0 for all other classes.
* HesScale: Elsayed & Mahmood, arXiv:2210.11639 (2022); with Farrahi and Dangel, "Revisiting
  scalable Hessian diagonal approximations for applications in reinforcement learning", ICML 2024,
  arXiv:2406.03276. They start from the exact diagonal: d_a = σ_a(1 − σ_a) for a softmax (in the
  same repository, ``CrossEntropyLossDerivativesHesScale`` of ``hesscale/core/derivatives.py``).

S starts from single outputs, h^a, whose Hessian at the outputs is 0 in either method. So **in S,
and in all that reads it here (V₂, C₁₂, Î₂), the two coincide**: ``differentiate`` is one recursion
under two names. ``hessian_diagonal_approximation`` shows where they differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fimlib.derivatives import Block, Derivatives
from fimlib.diagonal import Diagonal, Term
from fimlib.engines import layerwise
from fimlib.engines.checks import check_module
from fimlib.engines.choose import differentiate_checked
from fimlib.engines.layerwise import ElementwiseStep, LinearStep, Steps, identity, right_factors
from fimlib.engines.model import kept_random_state
from fimlib.families.base import Labels
from fimlib.families.categorical import Categorical
from fimlib.fisher import check_labels, family_of

METHODS = ("becker-lecun", "hesscale")


def differentiate(
    model: nn.Module,
    x: Tensor,
    *,
    order: int = 2,
    wanted: frozenset[str] | None = None,
    method: str = "becker-lecun",
) -> Derivatives:
    """J exactly, and S by its diagonal recursion.

    S is exact in the last three linear layers of an MLP, for the reason given at the head of this
    module. ``estimate_i2`` of these derivatives is not what the two papers compute: its Jᵀ𝓘J is
    exact, so that Î₂ has the right mean, and only its fluctuation is approximate.

    Check: first the layerwise engine passes all checks of ``fimlib.differentiate``. It reads the
    same steps by the same rules, so that its J and σ'' are those of the recursion, too.

    Args:
        model: A chain of ``Linear`` and elementwise activations, as for the layerwise engine.
        x: [B, ...].
        order: 2, or 1 for J alone, which is the layerwise engine's.
        wanted: Names of the parameters to report; None: all.
        method: "becker-lecun" or "hesscale": the same numbers.

    Raises:
        NotImplementedError: a module is neither linear nor elementwise; the message names it. Or
            what else ``fimlib.differentiate(engine="layerwise")`` refuses.
        ValueError: an unknown method; what ``fimlib.differentiate`` refuses.

    Cost: that of the check, and of ``carried_back``.
    """
    check_method(method)
    model, x = confirmed(model, x, order, wanted)
    return carried_back(model, x, order=order, wanted=wanted, method=method)


def carried_back(
    model: nn.Module,
    x: Tensor,
    *,
    order: int = 2,
    wanted: frozenset[str] | None = None,
    method: str = "becker-lecun",
) -> Derivatives:
    """``differentiate`` without its checks, for inputs like some that have passed them.

    Cost: one forward pass, and one backward sweep down to the first wanted layer that carries T
    rows and T diagonals for each input: two products with every weight matrix, and no row for any
    hidden unit.
    """
    with torch.inference_mode(False), torch.no_grad(), kept_random_state(x):
        if order == 1:
            exact = layerwise.differentiate(model, x, order=1, wanted=wanted).derivatives()
            return dataclasses.replace(exact, engine=method)
        outputs, steps = layerwise.record(model, x)
        blocks = []
        for step, J, S in recursion(steps, identity(outputs), None, wanted):
            if inputs := right_factors(step, wanted):
                blocks.append(Block(step.name, J, S, inputs))
    return Derivatives(outputs, tuple(reversed(blocks)), engine=method)


def hessian_diagonal_approximation(
    model: nn.Module, x: Tensor, labels: Labels, *, method: str = "hesscale"
) -> Diagonal:
    r"""Diagonal of the Hessian of −log p(y|x), as HesScale or Becker and LeCun approximate it.

    Averaged over the N labels of each input, so that it approximates Î₂(θᵢ|x) (Eq. 6). It is
    ``q(d) − S·δ`` with the S of ``differentiate``, where q carries the diagonal d of the loss'
    Hessian at the outputs back through the squared layers. The exact one is ``Jᵀ𝓘J − S·δ``, which
    ``estimate_i2`` gives.

    * "hesscale": d is exact, d_a = 𝓘_aa where the outputs are the natural parameters. If 𝓘 is
      diagonal (Bernoulli, Poisson, Gaussian with a diagonal Σ), the result is exact in the last two
      linear layers of an MLP; else (for a softmax 𝓘 = diag σ − σσᵀ) in the last one only.
    * "becker-lecun": the same, but for a softmax d_a = σ_a(1 − σ_a) for the label's class a, and 0
      for all others. That is wrong even in the last layer, depends on the label, and is too small
      on average: E d_a = σ_a²(1 − σ_a).

    Args:
        model: As for ``differentiate``; in eval mode.
        x: [B, ...].
        labels: Labels for the model's outputs at x, e.g. from ``family.observed``.
        method: "hesscale" or "becker-lecun".

    Returns:
        [B, *shape] per parameter, in nat/θ².

    Raises:
        ValueError: an unknown method; labels that were drawn for other outputs; what
            ``fimlib.differentiate`` refuses.
        NotImplementedError: a module is neither linear nor elementwise, or its derivatives by
            autograd are not those of its values.

    Cost: one forward pass, and one backward sweep that carries one row and one diagonal per input,
    whatever T and N; and the derivatives of the layerwise engine, which are confirmed first.

    Example: zero weights make σ = (⅓, ⅓, ⅓). The Hessian's diagonal is 2/9 for all classes, and
    Becker–LeCun sees it for the label's class, the first, alone.
        >>> from fimlib import Categorical
        >>> net = nn.Linear(1, 3, bias=False)
        >>> _ = nn.init.zeros_(net.weight)
        >>> x = torch.ones(1, 1)
        >>> labels = Categorical().observed(net(x), torch.tensor([0]))
        >>> for method in ("hesscale", "becker-lecun"):
        ...     d = hessian_diagonal_approximation(net, x, labels, method=method)
        ...     print([round(9 * v, 6) for v in d["weight"].flatten().tolist()])
        [2.0, 2.0, 2.0]
        [2.0, 0.0, 0.0]
    """
    check_method(method)
    family_of(labels)
    model, x = confirmed(model, x, order=2)
    with torch.inference_mode(False), kept_random_state(x):
        outputs, steps = layerwise.record(model, x)
    check_labels(outputs, labels)
    gradient, diagonal = at_the_outputs(labels, method)
    terms = []
    for step, _, d in recursion(steps, gradient.to(outputs), diagonal.to(outputs)):
        factors = right_factors(step, None).items()
        squares = {n: None if z is None else z.double().square() for n, z in factors}
        terms.append(Term(step.name, d[:, 0].double(), squares))
    return Diagonal(tuple(reversed(terms)))


def at_the_outputs(labels: Labels, method: str) -> tuple[Tensor, Tensor]:
    """Gradient of −log p in the outputs and the diagonal d to start from, [B, 1, T] each."""
    family, h = labels.family, labels.outputs
    eye = torch.eye(h.shape[1], dtype=h.dtype, device=h.device).expand(len(h), -1, -1)
    # the network whose parameters are its outputs
    identity = Derivatives(h, (Block("", eye, torch.zeros_like(eye), {"h": None}),))
    (natural,) = family.natural_derivatives(identity).blocks
    gradient = -labels.mean(labels.project(natural.J))
    # its second derivatives are 0 where the outputs are the natural parameters
    diagonal = family.information(h, natural.J) - labels.mean(labels.project(natural.second))
    if method == "becker-lecun" and isinstance(family, Categorical):
        diagonal = diagonal * labels.weights
    return gradient[:, None], diagonal[:, None]


def recursion(
    steps: Steps,
    rows: Tensor,
    diagonals: Tensor | None,
    wanted: frozenset[str] | None = None,
) -> Iterator[tuple[LinearStep, Tensor, Tensor]]:
    """Every linear layer from the last to the first wanted one, with what has come back to it.

    Args:
        steps: Of the forward pass.
        rows: Gradients of R functions in the outputs, [B, R, T].
        diagonals: The diagonals of their Hessians there, [B, R, T]; None where they are 0.
        wanted: Names of parameters; None: all.

    Yields:
        A layer, and the gradients and diagonals in its pre-activations, [B, R, n].
    """
    layers = [(i, step) for i, step in enumerate(steps) if isinstance(step, LinearStep)]
    first = min(i for i, layer in layers if right_factors(layer, wanted))
    for i, step in reversed(list(enumerate(steps[first:], first))):
        if isinstance(step, ElementwiseStep):
            if diagonals is not None:
                diagonals = diagonals * step.first.square()[:, None]
            if step.second is not None:
                fresh = rows * step.second[:, None]
                diagonals = fresh if diagonals is None else diagonals + fresh
            rows = rows * step.first[:, None]
            continue
        yield step, rows, torch.zeros_like(rows) if diagonals is None else diagonals
        if i > first:
            rows = rows @ step.weight
            diagonals = None if diagonals is None else diagonals @ step.squared_weight


def confirmed(
    model: nn.Module, x: Tensor, order: int, wanted: frozenset[str] | None = None
) -> tuple[nn.Module, Tensor]:
    """The network and a copy of the inputs, once the layerwise engine is confirmed at them."""
    model = check_module(model)
    x = x.detach().clone() if isinstance(x, Tensor) else x
    differentiate_checked(model, x, "layerwise", order, wanted)
    return model, x


def check_method(method: str) -> None:
    """Raise a ValueError for a method that there is not."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}.")
