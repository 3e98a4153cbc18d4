"""What public code computes under the name of a diagonal Fisher, each in a few lines of autograd.

Every function takes a classifier and its batches (x, y), and returns one tensor for each parameter.
None uses fimlib: they are what ``fimlib.identify`` has to tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Batches = Sequence[tuple[Tensor, Tensor]]
Diagonal = dict[str, Tensor]
Way = Callable[[nn.Module, Batches], Diagonal]


def gradient(net: nn.Module, value: Tensor) -> Diagonal:
    """Of one number, in every parameter."""
    named = dict(net.named_parameters())
    found = torch.autograd.grad(value, list(named.values()), retain_graph=True)
    return dict(zip(named, found, strict=True))


def mean(parts: Iterable[Diagonal]) -> Diagonal:
    """Of many tensors, parameter by parameter."""
    parts = list(parts)
    return {n: torch.stack([part[n] for part in parts]).mean(0) for n in parts[0]}


def square(g: Diagonal) -> Diagonal:
    """Entry by entry."""
    return {n: t.square() for n, t in g.items()}


def plus(a: Diagonal, b: Diagonal) -> Diagonal:
    """Entry by entry."""
    return {n: a[n] + b[n] for n in a}


def log_p(net: nn.Module, x: Tensor) -> Tensor:
    """Log-probabilities of the classes, for one input [C]."""
    logs: Tensor = net(x[None]).log_softmax(-1)[0]
    return logs


def examples(batches: Batches) -> list[tuple[Tensor, Tensor]]:
    """One by one."""
    return [pair for x, y in batches for pair in zip(x, y, strict=True)]


def drawn(logits: Tensor) -> Tensor:
    """Labels of the model."""
    return torch.multinomial(logits.softmax(-1), 1)[..., 0]


# One square for every example.


def exact(net: nn.Module, batches: Batches) -> Diagonal:
    """Σ_k p_k (∂ log p_k)²: squares of all classes, weighted by p(y|x)."""

    def of(x: Tensor) -> Diagonal:
        logs = log_p(net, x)
        total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
        for value in logs:
            weight = value.exp().detach()
            squares = square(gradient(net, value))
            total = plus(total, {n: weight * t for n, t in squares.items()})
        return total

    return mean(of(x) for x, _ in examples(batches))


def sampled(net: nn.Module, batches: Batches) -> Diagonal:
    """(∂ log p(ŷ))² with ŷ drawn from the model: Î₁ with one label."""

    def of(x: Tensor) -> Diagonal:
        logs = log_p(net, x)
        return square(gradient(net, logs[drawn(logs)]))

    return mean(of(x) for x, _ in examples(batches))


def data_labels(net: nn.Module, batches: Batches) -> Diagonal:
    """(∂ log p(y))² with the labels of the data."""
    return mean(square(gradient(net, log_p(net, x)[y])) for x, y in examples(batches))


def weighted(net: nn.Module, batches: Batches) -> Diagonal:
    """The same, times p(y|x) of the observed label."""

    def of(x: Tensor, y: Tensor) -> Diagonal:
        value = log_p(net, x)[y]
        weight = value.exp().detach()
        return {n: weight * t for n, t in square(gradient(net, value)).items()}

    return mean(of(x, y) for x, y in examples(batches))


def likeliest(net: nn.Module, batches: Batches) -> Diagonal:
    """(∂ max_k log p_k)²: the likeliest class is taken for a sample."""
    return mean(square(gradient(net, log_p(net, x).max())) for x, _ in examples(batches))


def no_label(net: nn.Module, batches: Batches) -> Diagonal:
    """(∂ Σ_k log p_k)²: the log-probabilities are summed, and no label is chosen."""
    return mean(square(gradient(net, log_p(net, x).sum())) for x, _ in examples(batches))


def summed_first(net: nn.Module, batches: Batches) -> Diagonal:
    """(Σ_k √p_k ∂ log p_k)²: classes are summed before the square."""

    def of(x: Tensor) -> Diagonal:
        logs = log_p(net, x)
        return square(gradient(net, (logs.exp().sqrt().detach() * logs).sum()))

    return mean(of(x) for x, _ in examples(batches))


def of_the_outputs(net: nn.Module, batches: Batches) -> Diagonal:
    """Σ_t (∂h_t)²: the Gauss–Newton diagonal of a squared error."""

    def of(x: Tensor) -> Diagonal:
        parts = [square(gradient(net, value)) for value in net(x[None])[0]]
        return {n: torch.stack([part[n] for part in parts]).sum(0) for n in parts[0]}

    return mean(of(x) for x, _ in examples(batches))


def of_the_probabilities(net: nn.Module, batches: Batches) -> Diagonal:
    """Σ_k (∂p_k)²: the same of the error of the probabilities."""

    def of(x: Tensor) -> Diagonal:
        parts = [square(gradient(net, value)) for value in log_p(net, x).exp()]
        return {n: torch.stack([part[n] for part in parts]).sum(0) for n in parts[0]}

    return mean(of(x) for x, _ in examples(batches))


# One square for every batch.


def batch_gradient(net: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
    """Of the mean loss."""
    return gradient(net, nn.functional.cross_entropy(net(x), y))


def batch_mean(net: nn.Module, batches: Batches) -> Diagonal:
    """The square of a batch's mean gradient, as training leaves it in ``p.grad``."""
    return mean(square(batch_gradient(net, x, y)) for x, y in batches)


def sampled_batch(net: nn.Module, batches: Batches) -> Diagonal:
    """The same with labels drawn from the model."""
    return mean(square(batch_gradient(net, x, drawn(net(x)))) for x, _ in batches)


def whole(net: nn.Module, batches: Batches) -> Diagonal:
    """The squared gradient of the loss of all data."""
    xs, ys = zip(*batches, strict=True)
    return square(batch_gradient(net, torch.cat(xs), torch.cat(ys)))


def second_moment(net: nn.Module, batches: Batches, beta: float = 0.95) -> Diagonal:
    """Adam's, with its correction for the start; the weights stay as they are."""
    v = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for x, y in batches:
        g = batch_gradient(net, x, y)
        v = {n: beta * v[n] + (1 - beta) * g[n].square() for n in v}
    return {n: t / (1 - beta ** len(batches)) for n, t in v.items()}


# Errors of a loop.


def last_example(net: nn.Module, batches: Batches) -> Diagonal:
    """A loop that overwrites instead of adding, example by example."""
    x, y = examples(batches)[-1]
    return square(gradient(net, log_p(net, x)[y]))


def last_batch(net: nn.Module, batches: Batches) -> Diagonal:
    """The same, batch by batch."""
    return square(batch_gradient(net, *batches[-1]))


def in_bfloat16(net: nn.Module, batches: Batches) -> Diagonal:
    """Squares with the labels of the data, in a sum of bfloat16: small terms are lost."""
    total = {n: torch.zeros_like(p, dtype=torch.bfloat16) for n, p in net.named_parameters()}
    for batch in batches:
        total = plus(total, {n: t.bfloat16() for n, t in data_labels(net, [batch]).items()})
    return {n: t / len(batches) for n, t in total.items()}


def one_mean_for_each_tensor(net: nn.Module, batches: Batches) -> Diagonal:
    """Squares with the labels of the data, then one number in place of all entries."""
    found = data_labels(net, batches)
    return {n: t.mean().expand_as(t) for n, t in found.items()}


def summed(net: nn.Module, batches: Batches) -> Diagonal:
    """Squares with the labels of the data, a sum over the examples."""
    m = len(examples(batches))
    return {n: m * t for n, t in data_labels(net, batches).items()}


def divided_by_the_batches(net: nn.Module, batches: Batches) -> Diagonal:
    """The same, divided by the number of batches."""
    return {n: t / len(batches) for n, t in summed(net, batches).items()}


def summed_batches(net: nn.Module, batches: Batches) -> Diagonal:
    """The squared gradient of a batch's summed loss, divided by the number of examples."""

    def of(x: Tensor, y: Tensor) -> Diagonal:
        return square(gradient(net, nn.functional.cross_entropy(net(x), y, reduction="sum")))

    m = len(examples(batches))
    return {n: t * len(batches) / m for n, t in mean(of(x, y) for x, y in batches).items()}


# Every way, with the formula that it follows and the reason for its factor.
WAYS: dict[Way, tuple[str, str]] = {
    exact: ("exact", ""),
    sampled: ("sampled", ""),
    data_labels: ("data", ""),
    weighted: ("weighted", ""),
    batch_mean: ("batch", ""),
    sampled_batch: ("sampled batch", ""),
    whole: ("whole", ""),
    likeliest: ("likeliest", ""),
    no_label: ("no label", ""),
    summed_first: ("root", ""),
    of_the_outputs: ("Gauss-Newton", ""),
    of_the_probabilities: ("Brier", ""),
    second_moment: ("Adam 0.95", ""),
    last_example: ("last", ""),
    last_batch: ("last batch", ""),
    in_bfloat16: ("data", ""),
    one_mean_for_each_tensor: ("data", ""),
    summed: ("data", "summed over the inputs"),
    divided_by_the_batches: ("data", "divided by the batches in place of the inputs"),
    summed_batches: ("batch", "times the batch size"),
}
