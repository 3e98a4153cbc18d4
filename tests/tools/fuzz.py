"""Random networks as code to paste, what is right of them, and whether fimlib says so.

A seed gives a script (``draw``) that defines ``model``, ``x`` and ``family``. The oracle knows
autograd, difference quotients and sums over labels, and nothing of fimlib. What fimlib returns is
exact, refused (an error of its own, that says why) or wrong.

    python tests/tools/fuzz.py --seeds 0 300            # smooth almost everywhere
    python tests/tools/fuzz.py --seeds 0 300 --traps    # with graphs that lie, or mixed inputs
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import reference
import torch
from random_networks import HOPELESS, draw, run
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fimlib
from fimlib.engines import choose

ENGINES = [("auto", 1), ("auto", 2), ("layerwise", 1), ("layerwise", 2), ("traced", 1)]
ENGINES += [("traced", 2), ("functional", 1), ("functional", 2), ("backpack", 2)]
REFUSALS = (ValueError, NotImplementedError, TypeError, ImportError)

# The oracle.


HARDSIGMOID = F.hardsigmoid


def exact_hardsigmoid(z, inplace=False):
    """Torch rounds the slope, 1/6, to float32."""
    return HARDSIGMOID(z, inplace) if inplace else F.relu6(z + 3) / 6


@dataclass
class Truth:
    """What is right, at each input alone; NaN where nothing is.

    Attributes:
        J, S: Parameter → [B, T, *shape].
        J_slack, S_slack: How far off a right answer may be.
        h: The outputs, [B, T].
        judges: Who said so at each input: "autograd"; "quotients of J" (of S) or "quotients" of the
            outputs (of both) where these disagree with it.
    """

    J: dict
    S: dict
    J_slack: dict
    S_slack: dict
    h: torch.Tensor
    judges: list


class Point:
    """A model at one input, as a function of all its parameters in a row."""

    def __init__(self, model, one):
        self.model = copy.deepcopy(model).requires_grad_()
        self.one = one
        self.parameters = dict(self.model.named_parameters())
        self.at = torch.cat([p.detach().flatten() for p in self.parameters.values()])
        self.row = self.at.clone()  # the parameters are parts of it
        sizes = [p.numel() for p in self.parameters.values()]
        for p, values in zip(self.parameters.values(), self.row.split(sizes), strict=True):
            p.data = values.view(p.shape)

    def set(self, flat):
        self.row.copy_(flat)

    def outputs(self, flat):
        self.set(flat)
        with torch.no_grad():
            return self.model(self.one.clone())[0]

    def gradients(self, flat, create_graph=False):
        """J, [T, P], by autograd, output by output."""
        self.set(flat)
        h = self.model(self.one.clone())[0]
        return h, [self.gradient(one, create_graph) for one in h]

    def jacobian(self, flat):
        return torch.stack([row.detach() for row in self.gradients(flat)[1]])

    def gradient(self, value, create_graph=False):
        """Of one number, [P]."""
        if not value.requires_grad:
            return torch.zeros_like(self.at)
        found = torch.autograd.grad(
            value,
            list(self.parameters.values()),
            create_graph=create_graph,
            retain_graph=True,
            materialize_grads=True,
            allow_unused=True,
        )
        return torch.cat([g.flatten() for g in found])

    def hessians(self):
        """h, J and H, [T, P, P], by autograd twice, all rows of H at once."""
        h, first = self.gradients(self.at, create_graph=True)
        size = len(self.at)
        H = torch.zeros(len(first), size, size, dtype=torch.float64)
        for rows, row in zip(H, first, strict=True):
            if row.requires_grad:
                found = torch.autograd.grad(
                    row,
                    list(self.parameters.values()),
                    torch.eye(size, dtype=torch.float64),
                    is_grads_batched=True,
                    retain_graph=True,
                    allow_unused=True,
                )
                pairs = zip(found, self.parameters.values(), strict=True)
                parts = [row.new_zeros(size, p.numel()) if g is None else g for g, p in pairs]
                rows[:] = torch.cat([part.reshape(size, -1) for part in parts], 1)
        return h.detach(), torch.stack([row.detach() for row in first]), H

    def named(self, rows):
        """[T, P] → parameter → [T, *shape]."""
        sizes = [p.numel() for p in self.parameters.values()]
        pieces = rows.split(sizes, -1)
        pairs = zip(self.parameters.items(), pieces, strict=True)
        return {n: piece.reshape(-1, *p.shape) for (n, p), piece in pairs}


def truth_of(model, x, trusted=True):
    """J and S at each input alone, by autograd where difference quotients agree, else by these."""
    exact = mock.patch.object(F, "hardsigmoid", exact_hardsigmoid)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), exact:
        warnings.simplefilter("ignore")
        found = [truth_at(Point(model, one), trusted) for one in x.split(1)]
    fields = [{n: torch.stack([f[k][n] for f in found]) for n in found[0][k]} for k in range(4)]
    return Truth(*fields, torch.stack([f[4] for f in found]), [f[5] for f in found])


def truth_at(point, trusted):
    """J, S, what they may be off by, h, and whose word it is."""
    h, J = point.outputs(point.at), point.jacobian(point.at) if trusted else None
    if J is None or not is_derivative(J, point.outputs, point.at):
        J, S, J_doubt, S_doubt = quotients_of_outputs(point)
        J_slack, S_slack = slack(point, J, S, 1e-5)
        slacks = J_slack + J_doubt, S_slack + S_doubt
        return *map(point.named, (J, S, *slacks)), h, "quotients"
    try:
        _, _, H = point.hessians()
    except RuntimeError:  # an operation that is differentiable once
        H = J.new_full((*J.shape, len(point.at)), float("nan"))
    J_doubt = rounding(point, J)
    if is_derivative(H, point.jacobian, point.at):
        S = H.diagonal(dim1=1, dim2=2)
        J_slack, S_slack = slack(point, J, S, 1e-7)
        return *map(point.named, (J, S, J_slack + J_doubt, S_slack)), h, "autograd"
    S, S_doubt = quotients_of_jacobian(point)
    J_slack, S_slack = slack(point, J, S, 1e-7)
    return *map(point.named, (J, S, J_slack + J_doubt, S_slack + S_doubt)), h, "quotients of J"


def rounding(point, J):
    """How far J moves when all weights are rounded otherwise, with a margin.

    A norm of one number has the derivative 0, where autograd has 4e-12 for any such weights.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, point.at.shape, generator=generator, dtype=torch.float64) * 2 - 1
    moved = 16 * (point.jacobian(point.at * (1 + 2**-51 * signs)) - J).abs()
    return moved + 2e-11 * J.abs().amax()


def is_derivative(D, function, at):
    """Whether D·v is the difference quotient of a function along two random directions v."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        v = torch.randn(at.shape, generator=generator, dtype=torch.float64)
        found = (first_difference(function, at, step * v, step) for step in (1e-5, 1e-6))
        scale = 1e-5 * (D.abs() @ v.abs() + 1e-3 * D.abs().amax())
        scale += 1e-9 * (1 + function(at).abs())
        if not any(((D @ v - quotient).abs() <= scale).all() for quotient in found):
            return False
    return True


def first_difference(function, at, shift, step):
    """Difference quotient of fourth order along a shift of so many steps."""
    f = {k: function(at + k * shift) for k in (-2, -1, 1, 2)}
    return (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * step)


def both_differences(function, at, shift, step, value):
    """First and second difference quotient of fourth order; ``value`` is that at no shift."""
    f = {k: function(at + k * shift) for k in (-2, -1, 1, 2)}
    first = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * step)
    return first, (16 * (f[1] + f[-1]) - (f[2] + f[-2]) - 30 * value) / (12 * step**2)


STEPS = (4e-3, 2e-3, 1e-3, 4e-4, 1e-4, 2e-5, 1e-5)


def settled(values, rounding, powers):
    """Of quotients with several steps those where two neighbours agree best, and their doubt.

    NaN where they never do, at a kink.
    """
    noises = torch.stack([8 * rounding / step**powers for step in STEPS])
    doubt = (values[1:] - values[:-1]).abs() + noises[1:]
    best = doubt.argmin(0, keepdim=True)
    value, doubt = values[1:].gather(0, best)[0], doubt.gather(0, best)[0]
    unsure = doubt > 1e-4 * value.abs() + 1e-4 + 4e7 * rounding
    return value.masked_fill(unsure, float("nan")), 10 * doubt


def quotients_of_outputs(point):
    """J and S of every entry, and their doubt, from nothing but outputs."""
    h, found = point.outputs(point.at), []
    rounding = 2**-52 * h.abs()
    for unit in torch.eye(len(point.at), dtype=torch.float64):
        table = [both_differences(point.outputs, point.at, step * unit, step, h) for step in STEPS]
        first, second = map(torch.stack, zip(*table, strict=True))
        J, S = settled(first, rounding, 1), settled(second, 4 * rounding, 2)
        jump = second[-1].abs() * STEPS[-1]  # of the slope, if S has no limit
        kink = S[0].isnan() & (jump > 1e-3 * J[0].abs())
        found.append((J[0].masked_fill(kink, float("nan")), S[0], J[1], S[1]))
    return [torch.stack(column, 1) for column in zip(*found, strict=True)]


def quotients_of_jacobian(point):
    """S of every entry, and its doubt, from a J that is right."""
    found = []
    for i, unit in enumerate(torch.eye(len(point.at), dtype=torch.float64)):

        def column(flat, i=i):
            return point.jacobian(flat)[:, i]

        near, far = (
            (column(point.at + s * unit) - column(point.at - s * unit)) / (2 * s)
            for s in (2e-4, 4e-4)
        )
        value, doubt = (4 * near - far) / 3, 2 * (near - far).abs()
        if (doubt > 2e-4 * (1 + value.abs())).any():  # a kink is close
            table = [first_difference(column, point.at, step * unit, step) for step in STEPS]
            value, doubt = settled(torch.stack(table), 2**-52 * table[0].abs(), 1)
            value = value.masked_fill(doubt > 1e-5 * (1 + value.abs()), float("nan"))
        found.append((value, doubt))
    return [torch.stack(column, 1) for column in zip(*found, strict=True)]


def slack(point, J, S, relative):
    """In units of the largest number of the same output and parameter, and of rounding."""
    J, S = J.nan_to_num(), S.nan_to_num()

    def own(D):
        largest = {n: v.abs().flatten(1).amax(1) for n, v in point.named(D).items()}
        parts = [v[:, None].expand(-1, point.parameters[n].numel()) for n, v in largest.items()]
        return relative * torch.cat(parts, 1)

    largest_J = J.abs().amax(1, keepdim=True)
    curvature = largest_J + largest_J.max() ** 2 + S.abs().amax(1, keepdim=True)
    tiny = 1e-13 if relative < 1e-6 else 1e-9
    return own(J) + 10 * tiny * largest_J + tiny, own(S) + 100 * tiny * curvature + tiny


def log_density(family, h, y):
    if isinstance(family, fimlib.Categorical):
        return (y * torch.log_softmax(h, 0)).sum()
    precision = torch.eye(len(h), dtype=h.dtype)
    if isinstance(family, fimlib.Gaussian) and family.root is not None:
        precision = torch.linalg.inv(family.root @ family.root.mT)
    return reference.log_density(family, h, y, precision)


def labels_of(family, h):
    """Labels and their probabilities: all of them, or the nodes of a quadrature."""
    if isinstance(family, fimlib.Categorical):
        return torch.eye(len(h), dtype=h.dtype), torch.softmax(h, 0)
    if isinstance(family, fimlib.Bernoulli):
        return reference.bernoulli(h)[:2]
    if isinstance(family, fimlib.Poisson):
        return reference.poisson(h)[:2]
    if isinstance(family, fimlib.GaussianHead):
        return reference.gaussian_head(h)[:2]
    covariance = torch.eye(len(h), dtype=h.dtype)
    if family.root is not None:
        covariance = family.root @ family.root.mT
    return reference.gaussian(covariance)(h)[:2]


QUANTITIES = {
    "I": fimlib.fisher_information,
    "V1": fimlib.variance_i1,
    "V2": fimlib.variance_i2,
    "C12": fimlib.covariance_i1_i2,
}


def moments(truth, family):
    """I, V₁, V₂ and C₁₂ of one label, quantity → parameter → [B, *shape], by their definitions."""
    found = {q: {n: [] for n in truth.J} for q in QUANTITIES}
    for b, h in enumerate(truth.h):
        y, p = labels_of(family, h)

        def score(h, y):
            return log_density(family, h, y)

        g = torch.func.vmap(torch.func.grad(score), (None, 0))(h, y)
        G = torch.func.vmap(torch.func.hessian(score), (None, 0))(h, y)
        for n in truth.J:
            J, S = (D[n][b].flatten(1) for D in (truth.J, truth.S))
            i1 = (g @ J).square()
            i2 = -torch.einsum("tp,atu,up->ap", J, G, J) - g @ S
            I = p @ i1
            values = {"I": I, "V1": p @ (i1 - I) ** 2, "V2": p @ (i2 - I) ** 2}
            values["C12"] = p @ ((i1 - I) * (i2 - I))
            for q, value in values.items():
                found[q][n].append(value.reshape(truth.J[n].shape[2:]))
    return {q: {n: torch.stack(v) for n, v in of.items()} for q, of in found.items()}


def doubts(truth, family, right):
    """How far the moments move with J and S within their doubt, for the mean over inputs, too."""
    generator = torch.Generator().manual_seed(0)

    def moved(D, slack):
        signs = {n: torch.randint(2, v.shape, generator=generator) * 2 - 1 for n, v in D.items()}
        return {n: v + signs[n] * slack[n] for n, v in D.items()}

    other = replace(truth, J=moved(truth.J, truth.J_slack), S=moved(truth.S, truth.S_slack))
    found = moments(other, family)
    return {
        q: {n: (v - right[q][n]).abs().nan_to_num().amax() for n, v in of.items()}
        for q, of in found.items()
    }


# The judge.


class WrongError(Exception):
    """A number that is not right, or the caller's things have changed."""


# Of moments, by who says what is right.
TOLERANCES = {"autograd": 5e-7, "quotients of J": 1e-5, "quotients": 1e-4}


class Judge:
    """What is right of a case, and what fimlib makes of it."""

    def __init__(self, case):
        self.case = case
        self.hopeless = bool(set(case.traps) & set(HOPELESS))
        self.truth = None
        if not self.hopeless:
            try:
                self.truth = truth_of(case.truth, case.x, trusted=not case.traps)
            except Exception:  # alone, an input is not taken
                if not case.traps:
                    raise
                self.hopeless = True
        judges = self.truth.judges if self.truth else []
        self.tolerance = max((TOLERANCES[judge] for judge in judges), default=0.0)
        self.moments, self.doubts, self.attempts = None, {}, {}
        if self.truth is not None:
            self.moments = moments(self.truth, case.family)
        if case.traps and self.moments:
            self.doubts = doubts(self.truth, case.family, self.moments)

    def verdict(self, engine, order, joint=False):
        """("exact" or "refused" or "wrong", and why)."""
        case = self.case
        before = everything(case)
        ask = self.ask_joint if joint else self.ask
        try:
            with warnings.catch_warnings(), self.attempted_once():
                warnings.simplefilter("ignore")
                ask(engine, order)
            result = ("exact", "")
        except WrongError as error:
            result = ("wrong", str(error))
        except Exception as error:  # the one that is being judged
            result = ("refused" if is_own(error) else "wrong", f"{type(error).__name__}: {error}")
            if result[0] == "wrong":
                last = traceback.extract_tb(error.__traceback__)[-1]
                result = ("wrong", f"from inside ({Path(last.filename).name}): {result[1]}")
        changed = [k for k, v in everything(case).items() if not same(v, before[k])]
        if changed:
            also = f"{result[1]}; and " if result[0] == "wrong" else ""
            result = ("wrong", f"{also}the caller's {changed[0]} has changed")
            torch.set_rng_state(before["RNG state"])
            run(case)
        return result

    @contextmanager
    def attempted_once(self):
        """An engine by its name, "auto" and a remedy share what one attempt found or refused."""
        tried = choose.tried

        def remembered(name, attempt, model, x, order, wanted):
            inputs = (x.dtype, x.shape, *x.flatten().tolist())
            key = (name, attempt, id(model), inputs, order, wanted)
            if key not in self.attempts:
                try:
                    found = tried(name, attempt, model, x, order, wanted)
                except Exception as error:  # to be judged at every call
                    found = error
                self.attempts[key] = (found, model)  # which keeps its id
            found = self.attempts[key][0]
            if isinstance(found, Exception):
                raise found
            return found

        with mock.patch.object(choose, "tried", remembered):
            yield

    def ask(self, engine, order):
        case, truth = self.case, self.truth
        derivs = fimlib.differentiate(case.model, case.x, engine=engine, order=order)
        if self.hopeless:
            raise WrongError("an answer, where there is none")
        names = {n for block in derivs.blocks for n in block.inputs}
        if names != set(truth.J):
            raise WrongError(f"other parameters: {sorted(names ^ set(truth.J))}")
        for n in truth.J:
            compare("J", n, derivs.jacobian(n), truth.J[n], truth.J_slack[n])
            if order == 2:
                compare("S", n, derivs.second(n), truth.S[n], truth.S_slack[n])
        for q, function in QUANTITIES.items():
            if order == 2 or q in ("I", "V1"):
                self.compare_moment(q, function(derivs, case.family), self.moments[q])

    def ask_joint(self, engine, order):
        case = self.case
        quantities = quantities_of(case, order)
        joint = fimlib.accumulate(
            case.model,
            case.x,
            case.family,
            quantities=quantities,
            batch_size=1 + case.seed % 3,
            engine=engine,
        )
        if self.hopeless:
            raise WrongError("an answer, where there is none")
        mean = {q: {n: v.mean(0) for n, v in of.items()} for q, of in self.moments.items()}
        spread = {n: v.var(0, correction=0) for n, v in self.moments["I"].items()}
        self.compare_moment("joint I", joint.fisher_information(), mean["I"])
        for q, ours in (("V1", joint.variance_i1), ("V2", joint.variance_i2))[:order]:
            if q not in quantities:
                continue
            total = {n: (spread[n] + v / 3) / 2 for n, v in mean[q].items()}
            self.compare_moment(f"joint {q}", ours(num_inputs=2, num_labels=3), total)

    def compare_moment(self, q, ours, right):
        """In units of the largest of the same parameter; rounding, of that of all."""

        def largest(values):
            return max(float(v.nan_to_num().abs().max()) for v in values.values())

        floor = largest(right)
        if q in ("C12", "V2", "joint V2"):  # S is off by what is rounded in products of J
            floor += largest(self.moments["V1"]) + largest(self.moments["I"]) ** 2
        if q == "joint V1":
            floor += largest(self.moments["I"]) ** 2
        for n, value in right.items():
            own = self.tolerance * value.nan_to_num().abs().amax()
            doubt = self.doubts.get(q.removeprefix("joint "), {}).get(n, 0.0)
            compare(q, n, ours[n], value, own + 1e-3 * self.tolerance * floor + doubt + 1e-14)


def compare(what, name, ours, right, slack):
    """Raise where a number is not right."""
    if ours.shape != right.shape:
        raise WrongError(
            f"{what} of {name!r} has shape {list(ours.shape)}, not {list(right.shape)}"
        )
    off = (ours.detach() - right).abs()
    known = ~right.isnan()
    bad = known & ~(off <= slack)
    if bad.any():
        at = (off / slack).where(bad, off.new_zeros(())).argmax()
        found = f"{float(ours.flatten()[at]):.10g}, right: {float(right.flatten()[at]):.10g}"
        place = tuple(map(int, torch.unravel_index(at, right.shape)))
        raise WrongError(f"{what} of {name!r} at {place}: {found}")


def is_own(error):
    """Whether an error is one of fimlib's, raised there on purpose."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_inside = Path(last.filename).is_relative_to(Path(fimlib.__file__).parent)
    return type(error) in REFUSALS and is_inside and last.line.startswith("raise ")


def everything(case):
    """What is the caller's, and must stay."""
    model = case.model
    found = {"RNG state": torch.get_rng_state(), "x": case.x.clone()}
    for n, p in model.named_parameters():
        found[f"parameter {n}"] = p.detach().clone()
        found[f"identity of parameter {n}"] = (id(p), p.requires_grad, p.data_ptr())
        found[f"gradient of {n}"] = None if p.grad is None else p.grad.clone()
    found |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    for n, m in model.named_modules():
        hooks = [len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)]
        found[f"module {n}"] = (m.training, sorted(vars(m)), hooks)
    found["settings"] = (torch.is_grad_enabled(), torch.get_default_dtype())
    return found


def same(a, b):
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return torch.equal(a, b) if tensors else type(a) is type(b) and a == b


@dataclass
class Tally:
    """How many were exact, refused and wrong, by engine and order."""

    counts: Counter = field(default_factory=Counter)
    failures: dict = field(default_factory=dict)
    refusals: list = field(default_factory=list)

    def add(self, case, engine, order, joint, verdict, why):
        what = f"{engine}{' (joint)' if joint else ''}, order {order}"
        self.counts[what, verdict] += 1
        if verdict == "wrong":
            calls = self.failures.setdefault(case.seed, (case, []))[1]
            calls.append(f"{call_of(engine, order, joint, case)}\n# {why}")
        if verdict == "refused":
            self.refusals.append((case, what, why))

    def share(self, what, verdict):
        total = sum(n for (w, _), n in self.counts.items() if w == what)
        return self.counts[what, verdict] / max(1, total)

    def __str__(self):
        rows = dict.fromkeys(what for what, _ in self.counts)
        return "\n".join(
            f"{what + ':':32}"
            + "".join(f"{self.counts[what, v]:6} {v}" for v in ("exact", "refused", "wrong"))
            for what in rows
        )


def quantities_of(case, order):
    """I alone takes a way of its own."""
    if order == 1 and case.seed % 2:
        return ["I"]
    return ["I", "V1", "Var_x I"] + ["V2", "C12"] * (order == 2)


def call_of(engine, order, joint, case):
    if joint:
        size = 1 + case.seed % 3
        quantities = quantities_of(case, order)
        arguments = f"batch_size={size}, engine={engine!r}, quantities={quantities}"
        return f"joint = fimlib.accumulate(model, x, family, {arguments})"
    return f"derivs = fimlib.differentiate(model, x, engine={engine!r}, order={order})"


def report(case, calls):
    """Code to paste: the network, the calls and what is wrong with each."""
    traps = f" ({', '.join(case.traps)})" if case.traps else ""
    return f"# seed {case.seed}{traps}\n{case.source}" + "\n".join(calls) + "\n"


def fuzz(seeds, traps=False, engines=ENGINES):
    """Draw the networks of the seeds, and judge "auto" on each, the others on a part of them."""
    tally = Tally()
    for seed in seeds:
        case = draw(seed, traps)
        judge, r = Judge(case), random.Random(seed)
        for engine, order in engines:
            rare = engine == "backpack" and not isinstance(case.model, nn.Sequential)
            share = 1.0 if engine == "auto" or len(engines) < 3 else 0.05 if rare else 0.5
            if r.random() > share:
                continue
            for joint in (False, True)[: 1 + (r.random() < (0.5 if engine == "auto" else 0.15))]:
                tally.add(case, engine, order, joint, *judge.verdict(engine, order, joint))
    return tally


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 100), metavar=("FROM", "TO"))
    parser.add_argument("--engine", help="this one alone")
    parser.add_argument("--order", type=int, choices=(1, 2), help="this one alone")
    parser.add_argument("--traps", action="store_true", help="networks that mislead autograd")
    parser.add_argument("--source", action="store_true", help="print the networks alone")
    parser.add_argument("--refusals", action="store_true", help="print what was refused, and why")
    options = parser.parse_args()
    engines = [
        (engine, order)
        for engine, order in ENGINES
        if options.engine in (None, engine) and options.order in (None, order)
    ]
    if options.source:
        for seed in range(*options.seeds):
            print(draw(seed, options.traps).source)
        return 0
    tally = fuzz(range(*options.seeds), options.traps, engines)
    for failure in tally.failures.values():
        print(report(*failure))
    if options.refusals:
        for case, what, why in tally.refusals:
            print(f"# seed {case.seed}, {what}: {why}")
    print(tally)
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
