"""Whether a candidate's values are those that it is measured for."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

import fimlib
from support.bench import approximate
from support.bench.candidates import Candidate, Values, read
from support.bench.networks import Network

TOLERANCE = 1e-3  # relative, of float32 values; a factor forgotten shows, rounding does not
CHECKED, OUTPUTS = 16, 4096  # inputs and outputs of the comparison, at most
Scale = dict[str, float]  # parameter → norm
DRAWS, FEW_DRAWS, STANDARD_ERRORS = 20, 8, 6.0  # of estimates; few where each is of many


def compare(
    candidate: Candidate, model: nn.Module, network: Network, x: Tensor, y: Tensor
) -> dict[str, float | bool]:
    """The candidate's values against the exact ones in float64, at a few inputs.

    Estimates are random: their averages over some draws may be off by a few standard errors of
    these draws, in the sum over each parameter's entries.
    """
    few = min(CHECKED, OUTPUTS // network.outputs)
    call = candidate.prepare(copy.deepcopy(model), network)
    x, y = x[:few], y[:few]
    if not few or not (values := call(x, y)):
        return {}
    exact = reference(model, network, x, [*values])
    wanted = {q: {n: t.double() for n, t in tensors.items()} for q, tensors in values.items()}
    if not candidate.estimate:
        worst = max(largest_difference(wanted[q], exact[q], scales(q, exact)) for q in wanted)
        return {"difference": worst, "agrees": worst <= TOLERANCE}
    torch.manual_seed(0)
    draws = [call(x, y)["I"] for _ in range(DRAWS if candidate.passes == 1 else FEW_DRAWS)]
    error = difference(wanted["I"], exact["I"])
    sums = {n: torch.stack([d[n].double().sum() for d in draws]) for n in draws[0]}
    agrees = all(
        bool((s.mean() - exact["I"][n].sum()).abs() <= spread(s) + TOLERANCE * exact["I"][n].sum())
        for n, s in sums.items()
    )
    return {"difference": error, "agrees": agrees}


def spread(draws: Tensor) -> Tensor:
    """How far the average of the draws may be off."""
    return STANDARD_ERRORS * draws.std() / math.sqrt(len(draws))


def reference(model: nn.Module, network: Network, x: Tensor, wanted: list[str]) -> Values:
    """Quantities, exactly and in float64, by the library's ways that are tested for that."""
    x = x.double() if x.is_floating_point() else x
    quantities = {"I", *wanted}
    joint = fimlib.accumulate(
        copy.deepcopy(model).double(), x, network.family, quantities=quantities
    )
    return read(joint, *quantities)


def largest_difference(found: dict[str, Tensor], exact: dict[str, Tensor], scale: Scale) -> float:
    """The largest over the parameters, each relative to its own norm.

    Where that is tiny, or 0 as of V₂ in the last layer, a thousandth of the largest one counts.
    ``scale`` is what a norm is at least, by parameter.
    """
    largest = max(float(t.norm()) for t in exact.values())
    worst = 0.0
    for name, tensor in exact.items():
        apart = found[name] - tensor
        norm = max(float(tensor.norm()), 1e-3 * largest, scale.get(name, 0.0), 1e-300)
        worst = max(worst, float(apart.norm()) / norm)
    return worst


def scales(quantity: str, exact: Values) -> Scale:
    """Var_x I is a difference of E_x I² and (E_x I)², and as exact as these are."""
    squares = {name: float(t.square().norm()) for name, t in exact["I"].items()}
    return squares if quantity == "Var_x I" else {}


def difference(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all parameters together, relative to their norm."""
    apart = torch.cat([(found[n] - t).flatten() for n, t in exact.items()]).norm()
    return float(apart / torch.cat([t.flatten() for t in exact.values()]).norm())


def layer_errors(model: nn.Module, x: Tensor) -> dict[str, float]:
    """The error of E_x V₂ by a recursion of diagonals, in float64, relative to a layer's norm."""
    model, x, errors = copy.deepcopy(model).double(), x.double(), {}
    derivs = fimlib.differentiate(model, x), approximate.differentiate(model, x)
    exact, found = (fimlib.variance_i2(d, fimlib.Categorical()).mean_over_inputs() for d in derivs)
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in exact):
        names = [n for n in exact if n.rpartition(".")[0] == layer]
        norm = sum(float(exact[n].square().sum()) for n in names)
        error = sum(float((found[n] - exact[n]).square().sum()) for n in names)
        errors[layer] = math.sqrt(error / norm) if norm else math.sqrt(error)
    return errors
