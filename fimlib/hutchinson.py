r"""V₂ of networks whose S = ∂²h no engine knows: an unbiased estimate, with its error bar.

The diagonal of a Hessian H^a of output a is the mean of ``v ⊙ (H^a v)`` over random signs v, one
product for all outputs together (Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007). V₂ is
quadratic in S, and the square of an unbiased estimate is too large on average, by its variance.
The bilinear form 𝓘[s, s'] of two *independent* estimates is right on average, and all pairs of
estimates have a part in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fimlib._checks import check_integer, check_num_samples
from fimlib.derivatives import Block, Derivatives, flat, slices
from fimlib.diagonal import Diagonal, Term
from fimlib.engines.checks import check_module
from fimlib.engines.choose import differentiate_checked
from fimlib.engines.confirm import STRENGTHS
from fimlib.engines.forward_mode import twice_differentiable
from fimlib.engines.functional import (
    PerParameter,
    one_by_one,
    outputs_from,
    private,
    quiet,
    split,
    values_of,
)
from fimlib.engines.model import perturb_weights, private_copy, selected
from fimlib.engines.rewrite import exact_lookups
from fimlib.engines.truth import Truth, shifted, step_of
from fimlib.families.base import Family, random_signs
from fimlib.memory import PROBE_NUMBERS, raise_if_out_of_memory

BLOCKS = 32  # means of probes that are kept, at most
OFFSETS = 4  # pairs of every block, for the error bar

Products = Callable[[nn.Module, Tensor, list[str], PerParameter], PerParameter]


@dataclass(frozen=True)
class HutchinsonEstimate:
    """An unbiased *estimate* of V₂(θᵢ|x), with its standard error.

    Attributes:
        value: [B, *shape] per parameter, in nat²/θ⁴. It may be negative where V₂ is small.
        standard_error: [B, *shape] per parameter, of the probes alone.
        layer_means: Layer → (mean of ``value`` over its parameters, standard error of that), [B]
            each. The entries of a layer share their probes: that error is no mean of errors.
        num_probes: The probes used for every input.
    """

    value: Diagonal
    standard_error: Diagonal
    layer_means: Mapping[str, tuple[Tensor, Tensor]]
    num_probes: int


def hutchinson_variance_i2(
    model: nn.Module,
    x: Tensor,
    family: Family,
    *,
    num_probes: int,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    layers: Sequence[str] | str | None = None,
) -> HutchinsonEstimate:
    r"""An unbiased *estimate* of V₂(θᵢ|x), for any network that autograd differentiates twice.

    ``V₂ = (1/N) 𝓘[S, S]`` (Eq. 25) with S estimated from random signs, ``s_k = v_k ⊙ (H v_k)``.
    The probes are put into R ≤ 32 blocks of equal size, with means s̄_r, and all pairs of blocks
    are used:

        ``V₂ ≈ (1/N) Σ_{r≠q} 𝓘[s̄_r, s̄_q] / (R (R − 1))``

    (with one probe per block the U-statistic of all pairs of probes). The error bar comes from the
    same blocks: the jackknife, and a term for the pairs (see ``estimate``). On average its square
    is not below the variance of the estimate, and at most 2 + 2 (R − 1)/(R − 2) times as large:
    that much where noise hides V₂. It is no Gaussian one: where noise brings an estimate near 0,
    its bar is too small (64 probes, a small transformer: 2 entries of 10⁴ were off by more than
    five bars, all below). Take 32 probes or more. Inputs have independent probes. Tied parameters
    are taken with their cross terms.

    Args:
        model: Maps x to outputs [B, T] of the family, each input alone; in eval mode.
        x: [B, ...], of the model's dtype, or integers where it embeds them.
        family: The output family. Where the outputs are not its natural parameters, S of those is
            affine in S of the outputs, and the estimate still unbiased.
        num_probes: m ≥ 3; beyond 32, those used are the largest multiple of ⌈m/32⌉ up to m.
        num_samples: N ≥ 1, labels that Î₂ averages.
        generator: For the signs; torch's global one by default.
        layers: Names of modules: only parameters inside them are estimated. The error then comes
            from these alone, and is smaller.

    Raises:
        ValueError: too few probes; N < 1; the outputs do not fit the family; or what
            ``fimlib.differentiate`` refuses.
        NotImplementedError: the outputs are random or depend on the other inputs; autograd cannot
            differentiate twice; or what it says are not the derivatives, because something cuts
            the graph.

    Cost: per probe about three times that of J (T backward passes); memory R × T float64 numbers
    per parameter for one input, and J of all inputs: choose ``layers`` where that is too much.

    Example: a linear layer has H = 0, so that every probe finds V₂ = 0 (Remark 4.4).
        >>> from fimlib import Categorical
        >>> net = nn.Linear(1, 2)
        >>> V2 = hutchinson_variance_i2(net, torch.ones(1, 1), Categorical(), num_probes=3)
        >>> float(V2.value["weight"].sum()), float(V2.standard_error["weight"].sum())
        (0.0, 0.0)
    """
    n = check_num_samples(num_samples)
    size, num_blocks = blocks_of(num_probes)
    model = check_module(model)
    wanted = selected(model, layers)
    derivs = differentiate_checked(model, x, "auto", 1, wanted).batch.derivatives()
    h = family.natural(derivs.outputs)
    outputs = derivs.outputs
    with torch.inference_mode(False), twice_differentiable():
        x = x.detach().clone()
        own, _ = private(model, x)
        names = [name for name, _ in own.named_parameters() if wanted is None or name in wanted]
        J = {name: derivs.jacobian(name) for name in names}
        products = checked_products(own, x, names, outputs)
        parts = []
        of_one = num_blocks * sum(J[name][0].numel() for name in names)
        for rows in slices(len(x), max(1, PROBE_NUMBERS // max(1, of_one))):
            means = block_means(products, own, x[rows], names, size, num_blocks, generator)
            here = {name: J[name][rows] for name in names}
            parts.append(summary(pairs(family, outputs[rows], h[rows], here, means), n))
    return joined(parts, size * num_blocks)


def blocks_of(num_probes: int) -> tuple[int, int]:
    """Probes per block, and how many blocks."""
    why = "two independent probes make an unbiased estimate, three one with an error bar."
    num_probes = check_integer(num_probes, "num_probes", 3, remedy=why)
    size = -(-num_probes // BLOCKS)
    return size, num_probes // size


# The estimate, from the probes.


def block_means(
    products: Products,
    own: nn.Module,
    x: Tensor,
    names: list[str],
    size: int,
    num_blocks: int,
    generator: torch.Generator | None,
) -> list[PerParameter]:
    """s̄_r for every block r: [B, T, *shape] per parameter, float64."""
    means = []
    for _ in range(num_blocks):
        total: PerParameter = {}
        for _ in range(size):
            v = draw_signs(own, len(x), names, generator)
            for n, product in products(own, x, names, v).items():
                s = (v[n][:, None] * product).double() / size
                total[n] = total[n] + s if n in total else s
        means.append(total)
    return means


def draw_signs(
    own: nn.Module, batch: int, names: list[str], generator: torch.Generator | None
) -> PerParameter:
    """Independent random signs for every parameter and input: [B, *shape]."""
    alike = {n: own.get_parameter(n).detach() for n in names}
    return {n: random_signs(p.expand(batch, *p.shape), generator).to(p) for n, p in alike.items()}


def pairs(
    family: Family, outputs: Tensor, h: Tensor, J: PerParameter, means: list[PerParameter]
) -> dict[str, tuple[Tensor, Tensor]]:
    """For every parameter r, [R, B, *shape], and k, [R · D, B, *shape].

    r_r = Σ_{q≠r} 𝓘[s̄_r, s̄_q] for every block r. With Σ the sum over all blocks it is
    𝓘[s̄_r, Σ − s̄_r], and by polarisation (𝓘[Σ, Σ] − 𝓘[2s̄_r − Σ, 2s̄_r − Σ])/4. And k holds
    𝓘[s̄_r, s̄_q] for the pairs of blocks r and q that are 1, …, D places apart.
    """

    def natural(mean: PerParameter) -> PerParameter:
        blocks = (Block(n, J[n], s, {n: None}) for n, s in mean.items())
        derivs = family.natural_derivatives(Derivatives(outputs, tuple(blocks)))
        return {block.layer: block.second.double() for block in derivs.blocks}

    natural_means = [natural(mean) for mean in means]

    def square(s: Tensor) -> Tensor:
        """𝓘[s, s]: [B, T, *shape, R] → [R, B, *shape]."""
        return family.variance2(h, s).double().movedim(-1, 0)

    def of_parameter(n: str) -> tuple[Tensor, Tensor]:
        s = torch.stack([mean[n] for mean in natural_means], dim=-1)
        total, own = s.sum(-1, keepdim=True), square(s)
        others = [
            (s.roll(d, -1), own.roll(d, 0)) for d in range(1, min(OFFSETS, len(means) // 2) + 1)
        ]
        k = torch.cat([(square(s + t) - own - q) / 2 for t, q in others])
        return (square(total) - square(2 * s - total)) / 4, k

    return {n: of_parameter(n) for n in J}


Part = dict[str, tuple[Tensor, Tensor]]


def summary(found: dict[str, tuple[Tensor, Tensor]], n: int) -> tuple[Part, Part]:
    """Estimates of V₂ for N = n labels and their errors, by parameter and by layer."""
    parameters, layers = {}, {}
    inside: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, (r, k) in found.items():
        parameters[name] = estimate(r / n, k / n)
        inside.setdefault(name.rpartition(".")[0], []).append((flat(r), flat(k)))
    for layer, both in inside.items():
        r, k = (torch.cat(parts, 2).mean(2) / n for parts in zip(*both, strict=True))
        layers[layer] = estimate(r, k)
    return parameters, layers


def joined(parts: list[tuple[Part, Part]], num_probes: int) -> HutchinsonEstimate:
    """The estimates of all inputs."""

    def cat(parts: list[Part], which: int) -> PerParameter:
        return {name: torch.cat([part[name][which] for part in parts]) for name in parts[0]}

    def diagonal(entries: PerParameter) -> Diagonal:
        return Diagonal(tuple(Term(n.rpartition(".")[0], d, {n: None}) for n, d in entries.items()))

    parameters, layers = ([part[i] for part in parts] for i in (0, 1))
    means, errors = cat(layers, 0), cat(layers, 1)
    return HutchinsonEstimate(
        diagonal(cat(parameters, 0)),
        diagonal(cat(parameters, 1)),
        {layer: (means[layer], errors[layer]) for layer in means},
        num_probes,
    )


def estimate(r: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    r"""U = Σ_r r / R(R − 1), and its standard error: [R, ...] and [K, ...] → [...] each.

    Let 𝓘[s, s'] = V₂ + g + g' + φ with g of one block and φ of both, all of mean 0 and
    uncorrelated: ``Var U = 4 Var(g)/R + 2 Var(φ)/(R(R − 1))``. The jackknife (without block k the
    estimate is (Σr − 2r_k)/((R − 1)(R − 2))) has mean ``4 Var(g)/R + 4 Var(φ)/(R(R − 2))``, no less
    (Efron and Stein 1981). But it vanishes together with Σ_r s̄_r, where U is too small. The
    spread of the pairs k does not, and ``4 Var(k)/(R(R − 1))`` is added.
    """
    count = len(r)
    value = r.sum(0) / (count * (count - 1))
    spread = (r - r.mean(0)).square().sum(0)
    jackknife = 4 / ((count - 1) * (count - 2)) ** 2 * (count - 1) / count * spread
    of_pairs = 4 / (count * (count - 1)) * k.var(0, correction=0)
    return value, (jackknife + of_pairs).sqrt()


# Products H^a v, for all outputs a.


def forward_over_reverse(
    own: nn.Module, x: Tensor, names: list[str], v: PerParameter
) -> PerParameter:
    """H^a v at all inputs at once, [B, T, *shape]: the derivative of J along v."""
    jacobian = torch.func.jacrev(outputs_from(own, names))
    values = values_of(own, names)

    def product(v: PerParameter, one: Tensor) -> PerParameter:
        tangent: PerParameter = torch.func.jvp(lambda w: jacobian(w, one), (values,), (v,))[1]
        return tangent

    with quiet(), torch.enable_grad():
        found: PerParameter = torch.func.vmap(product)(v, x)
    return {n: d.detach() for n, d in found.items()}


def twice_backward(own: nn.Module, x: Tensor, names: list[str], v: PerParameter) -> PerParameter:
    """H^a v at one input after the other: the gradient of J^a·v, by plain autograd."""
    parameters = [own.get_parameter(n) for n in names]

    def row(output: Tensor, direction: list[Tensor]) -> tuple[Tensor, ...]:
        zeros = tuple(torch.zeros_like(p) for p in parameters)
        if not output.requires_grad:
            return zeros
        first = torch.autograd.grad(
            output, parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        slope = torch.stack([(g * d).sum() for g, d in zip(first, direction, strict=True)]).sum()
        if not slope.requires_grad:
            return zeros
        return torch.autograd.grad(
            slope, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    found = []
    for b, one in enumerate(x.split(1)):
        with torch.enable_grad(), exact_lookups():
            h = own(one.clone())[0]
            rows = [row(output, [v[n][b] for n in names]) for output in h]
        found.append([torch.stack(d) for d in zip(*rows, strict=True)])
    return {n: torch.stack(d) for n, d in zip(names, zip(*found, strict=True), strict=True)}


def checked_products(own: nn.Module, x: Tensor, names: list[str], outputs: Tensor) -> Products:
    """The first of two ways whose H v is the derivative of J along v."""
    why = ""
    for way in (forward_over_reverse, twice_backward):
        try:
            if is_derivative(way, own, x, names, outputs.shape[1]):
                return way
        except ValueError:
            raise
        except Exception as error:  # whatever autograd or torch.func does not know
            raise_if_out_of_memory(error)
            why = f" {type(error).__name__}: {error}"
    raise NotImplementedError(
        f"autograd does not give second derivatives of {type(own).__name__} (H·v differs from the "
        "difference quotient of J along v): a backward() of your own that autograd cannot follow, "
        f"or an operation with first derivatives only.{why}"
    )


def is_derivative(
    way: Products, own: nn.Module, x: Tensor, names: list[str], num_outputs: int
) -> bool:
    """Whether H v is the derivative of J along v, at each input, here or at weights close by.

    As in the functional engine: kinks go away when the weights move, a cut does not.
    """
    for strength in (0.0, *STRENGTHS):
        moved = private_copy(own)
        if strength:
            perturb_weights(moved, strength)
        parts = split(own, x, names, num_outputs)
        x = torch.cat([part[~confirmed(way, moved, part, names)] for part in parts])
        if not len(x):
            return True
    return False


def confirmed(way: Products, own: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    """At which inputs v·(H v) is the difference quotient of J·v, parameter by parameter: [B]."""
    truth = Truth.of(own, x)
    v = {n: truth.v[n] for n in names}
    step = step_of(truth.dtype)

    def slopes(sign: int) -> Tensor:
        with shifted(truth.own, v, sign * step):
            J = one_by_one(truth.own, truth.x, names)
        return torch.cat([flat(J[n]) @ v[n].flatten() for n in names], dim=1).double()

    plus, minus = slopes(1), slopes(-1)
    batched = {n: d.expand(len(truth.x), *d.shape) for n, d in v.items()}
    products = way(truth.own, truth.x, names, batched)
    terms = [flat(products[n] * v[n]).double() for n in names]
    claim = torch.cat([t.sum(2) for t in terms], dim=1)
    scale = torch.cat([t.square().sum(2).sqrt() for t in terms], dim=1)
    eps = torch.finfo(truth.dtype).eps
    rounding = truth.noise.double().repeat(len(names)) / step
    slack = eps**0.35 * scale + rounding + 16 * eps * (plus.abs() + minus.abs()) / step
    fine: Tensor = ((claim - (plus - minus) / (2 * step)).abs() <= slack).all(1)
    return fine
