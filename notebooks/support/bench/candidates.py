"""What is measured: fimlib, and what other libraries offer for the same quantities.

A candidate's ``prepare`` gets a model and returns a function of inputs and labels. That function
returns averages over the inputs, quantity → parameter → tensor; it alone is timed. What it cannot
compute stays NaN. Quantities: those of ``fimlib.Joint``, "Hessian" (the diagonal of the loss's
Hessian at the labels given, which is Î₂ of one label), and "I" again for estimates of I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

import fimlib
from fimlib.engines.confirm import INPUTS
from fimlib.memory import BATCH_BYTES, live_bytes
from fimlib.streaming import accumulate
from support.bench import approximate
from support.bench.networks import Network

Values = dict[str, dict[str, Tensor]]
Call = Callable[[Tensor, Tensor], Values]
Prepare = Callable[[nn.Module, Network], Call]
ALL = ("I", "Var_x I", "V1", "V2", "C12")
OF_THE_PAPER = ALL[:-1]  # C₁₂ is not
LABELS = (1, 10, 100, 1000, 5000, 100_000)  # N
COLUMNS = 8  # basis vectors at a time


@dataclass(frozen=True)
class Candidate:
    """Something that can be measured.

    Attributes:
        name: In the tables.
        computes: What, in words.
        prepare: From a model, which it may change, and a network to the function that is timed.
        package: What pip calls the library that it needs; "" for torch and fimlib.
        estimate: Whether its values are random, with the exact ones as their mean.
        passes: How many times the timed function must run for the whole answer.
        chunk: Inputs at a time, more being streamed; None: all at once.
        bounded: Whether it streams by itself, in memory that stays the same.
        only: The networks that it is measured on; empty: all.
    """

    name: str
    computes: str
    prepare: Prepare
    package: str = ""
    estimate: bool = False
    passes: Callable[[nn.Module], int] = lambda _: 1
    chunk: Callable[[Network], int | None] = lambda _: None
    bounded: bool = False
    only: tuple[str, ...] = ()


def unit(model: nn.Module, _: Network | None = None) -> Call:
    """The yardstick: forward, mean cross-entropy, backward to all parameters."""

    def call(x: Tensor, y: Tensor) -> Values:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        return {}

    return call


# fimlib.


def ours(*quantities: str) -> Prepare:
    """Averages over the inputs, streamed: everything that ``quantities`` name."""

    def prepare(model: nn.Module, _: Network) -> Call:
        def joint(x: Tensor, size: int) -> fimlib.Joint:
            return accumulate(
                model,
                x,
                fimlib.Categorical(),
                quantities=quantities,
                batch_size=size,
                dtype=torch.float32,
            )

        size = chosen_once(lambda x: joint(x, len(x)))

        def call(x: Tensor, _: Tensor) -> Values:
            total = joint(x, size(x))
            return {quantity: READ[quantity](total) for quantity in quantities}

        return call

    return prepare


def diagonal_recursion(method: str) -> Prepare:
    """I and V₂ as in ``ours``, in float32 and streamed, with S by a recursion of diagonals."""
    quantities = ("I", "V2")

    def prepare(model: nn.Module, _: Network) -> Call:
        def joint(x: Tensor, size: int) -> fimlib.Joint:
            total = fimlib.Joint(fimlib.Categorical(), quantities=quantities, dtype=torch.float32)
            approximate.confirmed(model, x[:INPUTS], order=2)  # as ``accumulate`` does, once
            for part in x.split(size):
                total.update(approximate.carried_back(model, part, method=method))
            return total

        size = chosen_once(lambda x: joint(x, len(x)))

        def call(x: Tensor, _: Tensor) -> Values:
            total = joint(x, size(x))
            return {quantity: READ[quantity](total) for quantity in quantities}

        return call

    return prepare


def chosen_once(work: Callable[[Tensor], object]) -> Callable[[Tensor], int]:
    """The number of inputs at a time that fit, as in ``accumulate``; chosen at the first call."""
    sizes: list[int] = []

    def size(x: Tensor) -> int:
        if not sizes:
            few = x[:INPUTS]
            sizes.append(max(1, len(few) * BATCH_BYTES // live_bytes(lambda: work(few))))
        return sizes[0]

    return size


READ: dict[str, Callable[[fimlib.Joint], dict[str, Tensor]]] = {
    "I": lambda joint: joint.fisher_information(),
    "Var_x I": lambda joint: joint.input_variance(),
    "V1": lambda joint: joint.label_variance(1),
    "V2": lambda joint: joint.label_variance(2),
    "C12": lambda joint: joint.label_covariance(),
}


def our_estimate(estimator: int, num_labels: int) -> Prepare:
    """Î₁ or Î₂ from N labels for every input, drawing them included."""
    estimate = (fimlib.estimate_i1, fimlib.estimate_i2)[estimator - 1]
    family = fimlib.Categorical()

    def prepare(model: nn.Module, _: Network) -> Call:
        def part(x: Tensor) -> Values:
            derivs = fimlib.differentiate(model, x, order=estimator)
            labels = family.sample(derivs.outputs, num_labels)
            return {"I": estimate(derivs, labels).mean_over_inputs()}

        size = chosen_once(part)
        return lambda x, _: average((part(piece), len(piece)) for piece in x.split(size(x)))

    return prepare


def average(parts: Iterable[tuple[Values, int]]) -> Values:
    """The average over inputs that come in parts of different sizes."""
    result: Values = {}
    total = 0
    for values, size in parts:
        total += size
        if not result:
            result = values
        for quantity, tensors in values.items() if total > size else ():
            for name, tensor in tensors.items():
                result[quantity][name] += (tensor - result[quantity][name]) * (size / total)
    return result


# The others.


def backpack_fisher(monte_carlo: bool) -> Prepare:
    """BackPACK's diagonal of the generalised Gauss-Newton matrix, which is I here."""

    def prepare(model: nn.Module, _: Network) -> Call:
        from backpack import backpack, extend
        from backpack.extensions import DiagGGNExact, DiagGGNMC

        net, loss = extend(model), extend(nn.CrossEntropyLoss())
        extension = DiagGGNMC(mc_samples=1) if monte_carlo else DiagGGNExact()
        field = "diag_ggn_mc" if monte_carlo else "diag_ggn_exact"

        def call(x: Tensor, y: Tensor) -> Values:
            with backpack(extension):
                loss(net(x), y).backward()
            return {"I": take(model, field)}

        return call

    return prepare


def backpack_hessian(model: nn.Module, _: Network) -> Call:
    """One pass of BackPACK's BatchDiagHessian at the labels given, averaged over the inputs."""
    from backpack import backpack, extend
    from backpack.extensions import BatchDiagHessian

    net, loss = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))

    def call(x: Tensor, y: Tensor) -> Values:
        with backpack(BatchDiagHessian()):
            loss(net(x), y).backward()
        return {"Hessian": {n: t.mean(0) for n, t in take(model, "diag_h_batch").items()}}

    return call


def backpack_everything(model: nn.Module, _: Network) -> Call:
    """The paper's way: for each output a pass of BatchGrad and BatchDiagHessian gives J and S.

    The loss of output a is ‖h − y‖² at h − y = e_a/2: gradient J^a, Hessian 2‖J‖² + S^a.
    """
    from backpack import backpack, extend
    from backpack.extensions import BatchDiagHessian, BatchGrad

    net, loss = extend(model), extend(nn.MSELoss(reduction="sum"))

    def call(x: Tensor, _: Tensor) -> Values:
        gradients: dict[str, list[Tensor]] = {n: [] for n, _ in model.named_parameters()}
        hessians: dict[str, list[Tensor]] = {n: [] for n in gradients}
        with torch.no_grad():
            outputs = net(x)
        for a in range(outputs.shape[1]):
            target = outputs.clone()
            target[:, a] -= 0.5
            with backpack(BatchGrad(), BatchDiagHessian()):
                loss(net(x), target).backward()
            for field, found in (("grad_batch", gradients), ("diag_h_batch", hessians)):
                for name, tensor in take(model, field).items():
                    found[name].append(tensor)
        blocks = []
        for name, rows in gradients.items():
            J = torch.stack(rows, dim=1)
            S = torch.stack(hessians[name], dim=1) - 2 * J.square().sum(1, keepdim=True)
            blocks.append(fimlib.Block(name.rpartition(".")[0], J, S, {name: None}))
        joint = fimlib.Joint(fimlib.Categorical(), dtype=torch.float32)
        joint.update(fimlib.Derivatives(outputs, tuple(blocks)))
        # Var_x I does not add up over streamed parts, and is left out
        return {
            quantity: READ[quantity](joint) for quantity in OF_THE_PAPER if quantity != "Var_x I"
        }

    return call


def take(model: nn.Module, field: str) -> dict[str, Tensor]:
    """What BackPACK has left at every parameter, taken away from there."""
    return {n: p.__dict__.pop(field).detach() for n, p in model.named_parameters()}


class Whole(torch.utils.data.Dataset[tuple[Tensor, ...]]):
    """A batch as a data set that a loader takes in one piece."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, _: list[int]) -> list[Tensor]:
        return [tensor.detach() for tensor in self.tensors]


def nngeometry_fisher(model: nn.Module, _: Network) -> Call:
    """FIM of nngeometry in the representation PMatDiag, closed form over the classes."""
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag

    def call(x: Tensor, y: Tensor) -> Values:
        data = Whole(x, y)
        loader = torch.utils.data.DataLoader(data, batch_size=len(x), collate_fn=lambda t: t)
        fim = FIM(model, loader, PMatDiag, variant="classif_logits", device=x.device)
        return {"I": split(model, fim.get_diag())}

    return call


def split(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """A vector over all parameters, cut into one tensor for each."""
    named = dict(model.named_parameters())
    pieces = flat.detach().split([p.numel() for p in named.values()])
    return {n: t.view_as(named[n]) for n, t in zip(named, pieces, strict=True)}


def jacrev_fisher(model: nn.Module, _: Network) -> Call:
    """torch.func: Jacobians of all outputs by vmap(jacrev), then Σσ_k c_k²."""
    from torch.func import functional_call, jacrev, vmap

    weights = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(weights: dict[str, Tensor], one: Tensor) -> tuple[Tensor, Tensor]:
        h: Tensor = functional_call(model, weights, (one[None],))[0]
        return h, h

    jacobians = vmap(jacrev(outputs, has_aux=True), in_dims=(None, 0))

    def call(x: Tensor, _: Tensor) -> Values:
        J, h = jacobians(weights, x)
        sigma = torch.softmax(h, dim=1)

        def contract(D: Tensor) -> Tensor:
            c = D - torch.einsum("bk,bk...->b...", sigma, D).unsqueeze(1)
            return torch.einsum("bk,bk...->...", sigma, c.square()) / len(x)

        return {"I": {name: contract(D) for name, D in J.items()}}

    return call


def gauss_newton(model: nn.Module, x: Tensor, y: Tensor) -> object:
    """The curvlinops operator whose diagonal is I."""
    from curvlinops import GGNLinearOperator

    parameters = list(model.parameters())
    return GGNLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False
    )


def curvlinops_estimate(model: nn.Module, _: Network) -> Call:
    """Hutchinson's estimate of the operator's diagonal from one random vector."""
    from curvlinops import hutchinson_diag

    def call(x: Tensor, y: Tensor) -> Values:
        return {"I": split(model, hutchinson_diag(gauss_newton(model, x, y), 1))}

    return call


def curvlinops_exact(model: nn.Module, _: Network) -> Call:
    """Some entries of the operator's diagonal, by products with basis vectors; others each call."""
    import curvlinops  # noqa: F401  # missing: say so before anything is measured

    size = sum(p.numel() for p in model.parameters())
    starts: Iterator[int] = count(0, COLUMNS)

    def call(x: Tensor, y: Tensor) -> Values:
        first, entries = next(starts) % size, x.new_full((size,), float("nan"))
        index = torch.arange(first, min(first + COLUMNS, size), device=x.device)
        basis = x.new_zeros(size, len(index))
        basis[index, torch.arange(len(index))] = 1
        entries[index] = (gauss_newton(model, x, y) @ basis)[index].diag()  # type: ignore[operator]
        return {"I": split(model, entries)}

    return call


def basis_passes(model: nn.Module) -> int:
    """How many calls give the whole diagonal."""
    return -(-sum(p.numel() for p in model.parameters()) // COLUMNS)


EXACT_FISHER = "exact diagonal Fisher information"
EVERYTHING = "I, V₁, V₂"
BACKPACK = "backpack-for-pytorch"
CURVLINOPS = "curvlinops-for-pytorch"

CANDIDATES = {
    "unit": Candidate("forward + backward", "gradient of the mean loss: the unit", unit),
    "ours-fisher": Candidate("fimlib", EXACT_FISHER, ours("I"), bounded=True),
    "ours-first": Candidate("fimlib", "I, Varₓ I, V₁", ours("I", "Var_x I", "V1"), bounded=True),
    "ours-all": Candidate(
        "fimlib", "everything: I, Varₓ I, V₁, V₂", ours(*OF_THE_PAPER), bounded=True
    ),
    **{
        f"ours-i{j}-{n}": Candidate(
            "fimlib",
            f"{'Î₁Î₂'[2 * j - 2 : 2 * j]}, N = {n:,}",
            our_estimate(j, n),
            estimate=True,
            bounded=True,
            only=("mlp",),
        )
        for j in (1, 2)
        for n in LABELS
    },
    "auto": Candidate("fimlib", "I, V₂", ours("I", "V2")),
    **{
        method: Candidate(method, "I, V₂ of an approximate S", diagonal_recursion(method))
        for method in approximate.METHODS
    },
    "backpack-fisher": Candidate(
        "BackPACK DiagGGNExact", EXACT_FISHER, backpack_fisher(False), BACKPACK
    ),
    "nngeometry-fisher": Candidate(
        "nngeometry PMatDiag", EXACT_FISHER, nngeometry_fisher, "nngeometry"
    ),
    "jacrev-fisher": Candidate(
        "torch.func vmap(jacrev)", EXACT_FISHER, jacrev_fisher, chunk=lambda n: n.dense
    ),
    "curvlinops-exact": Candidate(
        f"curvlinops GGN, basis vectors ({COLUMNS} at a time)",
        EXACT_FISHER,
        curvlinops_exact,
        CURVLINOPS,
        passes=basis_passes,
    ),
    "backpack-mc": Candidate(
        "BackPACK DiagGGNMC", "Î₁, N = 1", backpack_fisher(True), BACKPACK, estimate=True
    ),
    "curvlinops-hutchinson": Candidate(
        "curvlinops GGN, Hutchinson",
        "estimate of I from one random vector",
        curvlinops_estimate,
        CURVLINOPS,
        estimate=True,
    ),
    "backpack-hessian": Candidate(
        "BackPACK BatchDiagHessian, one pass",
        "Î₂ of the labels given",
        backpack_hessian,
        BACKPACK,
        chunk=lambda n: n.dense,
    ),
    "backpack-all": Candidate(
        "BackPACK BatchDiagHessian, a pass for each output",
        EVERYTHING,
        backpack_everything,
        BACKPACK,
        chunk=lambda n: n.dense,
    ),
}
