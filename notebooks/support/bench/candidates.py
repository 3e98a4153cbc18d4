"""What is measured: fimlib, and what other libraries offer for the same quantities.

A candidate's ``prepare`` gets a model and returns a function of inputs and targets. That function
returns averages over the inputs, quantity → parameter → tensor; it alone is timed. Quantities:
those of ``fimlib.Joint``, and "I" again for estimates of I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fimlib
from fimlib.families import Positions
from support.bench import approximate
from support.bench.networks import Network

Values = dict[str, dict[str, Tensor]]
Call = Callable[[Tensor, Tensor], Values]
Prepare = Callable[[nn.Module, Network], Call]
OF_THE_PAPER = ("I", "Var_x I", "V1", "V2")  # C₁₂ is not
LABELS = (1, 10, 100, 1000, 5000, 100_000)  # N
CHUNK = 2**22  # numbers that a peer without bounds of its own keeps at a time, 16 MB
DENSE, CONVOLUTIONS = ("mlp", "wide"), ("lenet", "resnet")
CLASSIFIERS = (*DENSE, *CONVOLUTIONS, "vit")
PASSES = 32  # of ``estimate``, by default


@dataclass(frozen=True)
class Candidate:
    """Something that can be measured."""

    name: str  # in the tables
    computes: str  # what, in words
    prepare: Prepare  # from a model, which it may change, and a network to the function timed
    on: tuple[str, ...] = CLASSIFIERS  # the networks that it is measured on
    package: str = ""  # what pip calls the library that it needs; "" for torch and fimlib
    estimate: bool = False  # whether its values are random, with the exact ones as their mean
    passes: int = 1  # what the cost of a call is divided by


def unit(model: nn.Module, network: Network) -> Call:
    """The yardstick: forward, mean loss, backward to all parameters."""

    def call(x: Tensor, y: Tensor) -> Values:
        model.zero_grad()
        network.loss(model(x), y).backward()
        return {}

    return call


# fimlib.


READ: dict[str, Callable[[fimlib.Joint], dict[str, Tensor]]] = {
    "I": lambda joint: joint.fisher_information(),
    "Var_x I": lambda joint: joint.input_variance(),
    "V1": lambda joint: joint.label_variance(1),
    "V2": lambda joint: joint.label_variance(2),
}


def read(joint: fimlib.Joint, *quantities: str) -> Values:
    """Averages over the inputs."""
    return {quantity: READ[quantity](joint) for quantity in quantities}


def ours(*quantities: str) -> Prepare:
    """The call of the README, with everything that ``quantities`` name."""

    def prepare(model: nn.Module, network: Network) -> Call:
        def call(x: Tensor, _: Tensor) -> Values:
            joint = fimlib.accumulate(model, x, network.family, quantities=quantities)
            return read(joint, *quantities)

        return call

    return prepare


def our_passes(model: nn.Module, network: Network) -> Call:
    """Random projections, as many as by default."""

    def call(x: Tensor, _: Tensor) -> Values:
        seed = int(torch.randint(2**31, ()))  # another one at each call, to compare averages
        return {"I": fimlib.estimate(model, x, network.family, seed=seed).value}

    return call


def diagonal_recursion(model: nn.Module, network: Network) -> Call:
    """I and V₂ with S by a recursion of diagonals."""

    def call(x: Tensor, _: Tensor) -> Values:
        joint = fimlib.Joint(network.family, quantities=("I", "V2"))
        joint.update(approximate.differentiate(model, x))
        return read(joint, "I", "V2")

    return call


def our_labels(estimator: int, num_labels: int) -> Prepare:
    """Î₁ or Î₂ from N labels for every input, drawing them included."""
    formula = (fimlib.estimate_i1, fimlib.estimate_i2)[estimator - 1]

    def prepare(model: nn.Module, network: Network) -> Call:
        def call(x: Tensor, _: Tensor) -> Values:
            derivs = fimlib.differentiate(model, x, order=estimator)
            labels = network.family.sample(derivs.outputs, num_labels)
            return {"I": formula(derivs, labels).mean_over_inputs()}

        return call

    return prepare


# The others.


def in_chunks(call: Call, model: nn.Module, rows: int) -> Call:
    """The same over parts of the batch, averaged; ``rows`` gradients of an input are kept."""
    size = max(2, CHUNK // (rows * sum(p.numel() for p in model.parameters())))

    def parts(x: Tensor, y: Tensor) -> Iterator[tuple[Values, int]]:
        for one, targets in zip(x.split(size), y.split(size), strict=True):
            yield call(one, targets), len(one)

    return lambda x, y: average(parts(x, y))


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


def per_input(model: nn.Module, loss: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    """torch.func's gradients at each input of ``loss``, of outputs [T] and more arguments."""
    from torch.func import functional_call, grad, vmap

    def at_one(weights: dict[str, Tensor], one: Tensor, *more: Tensor) -> Tensor:
        return loss(functional_call(model, weights, (one[None],))[0], *more)

    weights = {name: p.detach() for name, p in model.named_parameters()}
    gradients = vmap(grad(at_one), in_dims=(None, 0, 0))
    return partial(gradients, weights)


def loop(model: nn.Module, network: Network) -> Call:
    """Most people's way: for each class, or number, the squared gradients of every input."""
    is_classifier = isinstance(network.family, fimlib.Categorical)

    def loss(h: Tensor, basis: Tensor) -> Tensor:
        return (h.log_softmax(0) if is_classifier else h) @ basis

    gradients = per_input(model, loss)

    def call(x: Tensor, _: Tensor) -> Values:
        with torch.no_grad():
            weights = model(x).softmax(1) if is_classifier else torch.ones(1, network.outputs)
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for basis, p in zip(torch.eye(network.outputs).to(x), weights.to(x).T, strict=True):
            for name, g in gradients(x, basis.expand(len(x), -1)).items():
                total[name] += torch.einsum("b,b...->...", p.expand(len(x)), g.square()) / len(x)
        return {"I": total}

    return in_chunks(call, model, 1)


def loop_labels(model: nn.Module, network: Network) -> Call:
    """The squared gradients of every input at one label that the model draws."""
    gradients = per_input(model, network.loss)
    scale = 1  # the loss is a mean over positions, and I their sum
    if isinstance(network.family, Positions):
        gradients = per_input(model, lambda h, y: network.loss(h[None], y))
        scale = network.shape[0]

    def call(x: Tensor, _: Tensor) -> Values:
        with torch.no_grad():
            y = torch.distributions.Categorical(logits=model(x)).sample()
        return {"I": {n: (scale * g).square().mean(0) for n, g in gradients(x, y).items()}}

    return in_chunks(call, model, 1)


def jacobians(model: nn.Module, network: Network) -> Call:
    """torch.func: Jacobians of all outputs by vmap(jacrev), then Σσ_k c_k², or ΣJ²."""
    from torch.func import functional_call, jacrev, vmap

    weights = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(weights: dict[str, Tensor], one: Tensor) -> tuple[Tensor, Tensor]:
        h: Tensor = functional_call(model, weights, (one[None],))[0]
        return h, h

    rows = vmap(jacrev(outputs, has_aux=True), in_dims=(None, 0))

    def call(x: Tensor, _: Tensor) -> Values:
        J, h = rows(weights, x)
        if isinstance(network.family, fimlib.Gaussian):
            return {"I": {name: D.square().sum(1).mean(0) for name, D in J.items()}}
        sigma = torch.softmax(h, dim=1)

        def contract(D: Tensor) -> Tensor:
            c = D - torch.einsum("bk,bk...->b...", sigma, D).unsqueeze(1)
            return torch.einsum("bk,bk...->...", sigma, c.square()) / len(x)

        return {"I": {name: contract(D) for name, D in J.items()}}

    return in_chunks(call, model, network.outputs)


def backpack_fisher(monte_carlo: bool) -> Prepare:
    """BackPACK's diagonal of the generalised Gauss-Newton matrix, in proportion to I."""

    def prepare(model: nn.Module, network: Network) -> Call:
        from backpack import backpack, extend
        from backpack.extensions import DiagGGNExact, DiagGGNMC

        is_classifier = isinstance(network.family, fimlib.Categorical)
        loss = extend(nn.CrossEntropyLoss() if is_classifier else nn.MSELoss())
        net = extend(model, use_converter=not isinstance(model, nn.Sequential) or has_blocks(model))
        extension = DiagGGNMC(mc_samples=1) if monte_carlo else DiagGGNExact()
        field = "diag_ggn_mc" if monte_carlo else "diag_ggn_exact"
        scale = 1 if is_classifier else network.outputs / 2  # of a mean of squares

        def call(x: Tensor, y: Tensor) -> Values:
            with backpack(extension):
                loss(net(x), y).backward()
            return {"I": {n: scale * t for n, t in take(net, field).items()}}

        return call

    return prepare


def has_blocks(model: nn.Module) -> bool:
    """Whether there are modules of our own, which BackPACK must convert."""
    return any(not type(m).__module__.startswith("torch.") for m in model.modules())


def backpack_everything(model: nn.Module, network: Network) -> Call:
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
        joint = fimlib.Joint(network.family)
        joint.update(fimlib.Derivatives(outputs, tuple(blocks)))
        return read(joint, "I", "V1", "V2")  # Var_x I does not add up over parts

    return in_chunks(call, model, 2 * network.outputs)


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


def nngeometry_fisher(monte_carlo: bool) -> Prepare:
    """FIM of nngeometry in the representation PMatDiag."""

    def prepare(model: nn.Module, network: Network) -> Call:
        from nngeometry.metrics import FIM, FIM_MonteCarlo
        from nngeometry.object import PMatDiag

        is_classifier = isinstance(network.family, fimlib.Categorical)
        kind = {"variant": "classif_logits" if is_classifier else "regression"}

        def call(x: Tensor, y: Tensor) -> Values:
            data = Whole(x, y)
            loader = torch.utils.data.DataLoader(data, batch_size=len(x), collate_fn=lambda t: t)
            function = FIM_MonteCarlo if monte_carlo else FIM
            fim = function(model, loader, PMatDiag, device=x.device, **kind)
            return {"I": split(model, fim.get_diag())}

        return call

    return prepare


def split(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """A vector over all parameters, cut into one tensor for each."""
    named = dict(model.named_parameters())
    pieces = flat.detach().split([p.numel() for p in named.values()])
    return {n: t.view_as(named[n]) for n, t in zip(named, pieces, strict=True)}


def curvlinops_estimate(model: nn.Module, _: Network) -> Call:
    """Hutchinson's estimate of the diagonal of the Gauss-Newton matrix from one random vector."""
    from curvlinops import GGNLinearOperator, hutchinson_diag

    def call(x: Tensor, y: Tensor) -> Values:
        parameters = list(model.parameters())
        operator = GGNLinearOperator(
            model, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False
        )
        return {"I": split(model, hutchinson_diag(operator, 1))}

    return call


I, FIRST, ALL = "I", "I, Varₓ I, V₁", "I, Varₓ I, V₁, V₂"
LABEL = "Î₁, one label"
EXACT_ON = (*CLASSIFIERS, "decoder")
LAYERS_ON = (*DENSE, *CONVOLUTIONS)  # without attention
BACKPACK = "backpack-for-pytorch"

CANDIDATES = {
    "unit": Candidate("training step", "the unit", unit, (*EXACT_ON, "gpt")),
    "ours-fisher": Candidate("fimlib", I, ours("I"), EXACT_ON),
    "ours-first": Candidate("fimlib", FIRST, ours(*OF_THE_PAPER[:3])),
    "ours-all": Candidate("fimlib", ALL, ours(*OF_THE_PAPER), LAYERS_ON),
    "ours-estimate": Candidate(
        "fimlib", "one of 32 random passes", our_passes, ("decoder", "gpt"), "", True, PASSES
    ),
    **{
        f"ours-i{j}-{n}": Candidate(
            "fimlib", f"{'Î₁Î₂'[2 * j - 2 : 2 * j]}, N = {n:,}", our_labels(j, n), (), "", True
        )
        for j in (1, 2)
        for n in LABELS
    },
    "ours-v2": Candidate("fimlib", "I, V₂", ours("I", "V2"), ()),
    "hesscale": Candidate("diagonals only", "I, V₂ of an approximate S", diagonal_recursion, ()),
    "loop": Candidate("loop over outputs, vmap(grad)", I, loop, EXACT_ON),
    "jacobians": Candidate("torch.func vmap(jacrev)", I, jacobians, EXACT_ON),
    "backpack-fisher": Candidate(
        "BackPACK DiagGGNExact", I, backpack_fisher(False), (*LAYERS_ON, "decoder"), BACKPACK
    ),
    "nngeometry-fisher": Candidate(
        "nngeometry FIM, PMatDiag", I, nngeometry_fisher(False), LAYERS_ON, "nngeometry"
    ),
    "backpack-all": Candidate(
        "BackPACK BatchDiagHessian, a pass for each output",
        "I, V₁, V₂",
        backpack_everything,
        (*DENSE, "lenet"),
        BACKPACK,
    ),
    "loop-label": Candidate("vmap(grad)", LABEL, loop_labels, (*CLASSIFIERS, "gpt"), estimate=True),
    "backpack-mc": Candidate(
        "BackPACK DiagGGNMC", LABEL, backpack_fisher(True), LAYERS_ON, BACKPACK, True
    ),
    "nngeometry-mc": Candidate(
        "nngeometry FIM_MonteCarlo", LABEL, nngeometry_fisher(True), LAYERS_ON, "nngeometry", True
    ),
    "curvlinops-hutchinson": Candidate(
        "curvlinops GGN, hutchinson_diag",
        "I from one random vector",
        curvlinops_estimate,
        LAYERS_ON,
        "curvlinops-for-pytorch",
        True,
    ),
}
