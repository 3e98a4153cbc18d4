"""On random networks every number is right, or refused; and the judge sees what is wrong."""

import dataclasses
import random

import fuzz
import pytest
import random_networks
import reference
import torch
from strategies import inputs, mlp
from torch import nn

import fimlib
from fimlib.engines.truth import Unconfirmed

pytestmark = pytest.mark.long

# Of the networks without traps, at order 2, by all engines together.
MOST_REFUSED = 0.03


def check(tally):
    print(f"\n{tally}")
    reports = "\n".join(fuzz.report(*failure) for failure in list(tally.failures.values())[:3])
    assert not tally.failures, f"{len(tally.failures)} networks; the first:\n{reports}\n{tally}"


def some(count, most):
    """Some seeds, and the rest of them where there is time."""
    return [range(count), pytest.param(range(count, most), marks=pytest.mark.full)]


@pytest.mark.parametrize("seeds", some(150, 3000), ids=str)
def test_random_networks(seeds):
    tally = fuzz.fuzz(seeds)
    check(tally)
    reasons = [why for _, what, why in tally.refusals if what == "auto, order 2"]
    assert len(reasons) <= MOST_REFUSED * len(seeds), "\n".join(reasons)


@pytest.mark.parametrize("seeds", some(44, 880), ids=str)
def test_networks_whose_graph_lies_or_that_mix_their_inputs(seeds):
    check(fuzz.fuzz(seeds, traps=True))


def false_alarms(seeds):
    """Networks without a derivative, the check says, where it is autograd's."""
    found = []
    for seed in seeds:
        case = random_networks.draw(seed)
        try:
            fimlib.differentiate(case.model, case.x)
        except NotImplementedError as refusal:
            mixes = "depend on the others" in str(refusal)  # as it may, if there is one alone
            if mixes or not isinstance(refusal.__cause__, Unconfirmed):
                continue
            truth = fuzz.truth_of(case.model, case.x)
            if set(truth.judges) == {"autograd"}:
                found.append(f"{seed}: {refusal}")
    return found


@pytest.mark.full
def test_the_check_lets_right_networks_be():
    assert len(false_alarms(range(20_000, 30_000))) <= 1


@pytest.mark.parametrize("seed", [20_964])
def test_the_check_lets_these_networks_be(seed):
    """A rotation by matrix_exp() before a norm, which it does not change."""
    assert not false_alarms([seed])


@pytest.mark.parametrize("traps", [False, True])
def test_a_seed_is_one_network(traps):
    first, again, other = (random_networks.draw(seed, traps).source for seed in (7, 7, 8))
    assert first == again != other


def fits(step):
    """Whether a step runs on one of some shapes."""
    for shape in ((4,), (2, 4), (3, 3), (4, 2, 2)):
        drawing = random_networks.Drawing(random.Random(0), "graph")
        drawing.scope["z"] = torch.randn(2, *shape)
        drawing.scope["s0"] = drawing.scope["s1"] = torch.randn(2, *shape)
        if drawing.take(step):
            return True
    return False


@pytest.mark.parametrize("kind", ["FUNCTIONS", "OVER_UNITS", "REARRANGED", "REDUCTIONS", "SKIPS"])
def test_every_expression_is_of_use(kind):
    texts = getattr(random_networks, kind)
    steps = {text: ("", random_networks.expression(text, D="1", s="s0")) for text in texts}
    assert not [text for text, step in steps.items() if not fits(step)]


@pytest.mark.parametrize("kind", ["BROADCAST", "WEIGHTS", "OUTER", "SQUARE", "GATES", "SHARED"])
def test_every_expression_of_parameters_is_of_use(kind):
    first = [4] if kind in ("BROADCAST", "OUTER") else [4, 4]
    made = f"{random_networks.parameters(first, [4])}\n{random_networks.PAIR.format(n=4)}"
    names = {"P": "self.p#", "Q": "self.q#", "M": "self.m#", "N": "self.n#"}
    texts = getattr(random_networks, kind)
    steps = {text: (made, random_networks.expression(text, **names)) for text in texts}
    assert not [text for text, step in steps.items() if not fits(step)]


@pytest.mark.parametrize("line", random_networks.WRITES)
def test_every_write_is_of_use(line):
    assert fits(("", f"z = z.clone()\n{line}"))


@pytest.mark.parametrize("text", random_networks.ACTIVATIONS)
def test_every_activation_is_of_use(text):
    assert fits(random_networks.module(f"nn.{text}"))


@pytest.mark.parametrize("kind", random_networks.TRAPS)
def test_every_trap_is_of_use(kind):
    for step in random_networks.TRAPS[kind]:
        assert fits(step if isinstance(step, tuple) else random_networks.lines(step)), step


@pytest.mark.parametrize("block", random_networks.BLOCKS, ids=lambda block: block.__name__)
def test_every_block_is_of_use(block):
    shapes = [torch.Size(shape) for shape in ((4,), (2, 4), (3, 3), (4, 2, 2))]
    drawn = {block(random.Random(seed), shape) for seed in range(40) for shape in shapes} - {None}
    assert len([step for step in drawn if fits(step)]) > len(drawn) / 4


def test_the_oracle_is_that_of_the_other_tests():
    net, x = mlp([3, 4, 3], nn.Tanh, scale=2.0), inputs(2, 3)
    truth = fuzz.truth_of(net, x)
    assert truth.judges == ["autograd"] * 2
    moments = fuzz.moments(truth, fimlib.Categorical())
    for b, one in enumerate(x.split(1)):
        J, S = reference.derivatives(net, one)
        right = reference.categorical(net, one)
        right |= {"V1": right["v1"], "V2": right["v2"], "C12": right["c12"]}
        for name in J:
            torch.testing.assert_close(truth.J[name][b], J[name])
            torch.testing.assert_close(truth.S[name][b], S[name])
            for quantity, values in moments.items():
                torch.testing.assert_close(values[name][b], right[quantity][name])


class Signs(nn.Module):
    """Steps, with the derivative of a line."""

    def forward(self, z):
        return z + (torch.sign(z) - z).detach()


def test_quotients_overrule_a_graph_that_lies():
    net = nn.Sequential(nn.Linear(2, 3), Signs(), nn.Linear(3, 2)).double()
    truth = fuzz.truth_of(net, inputs(2, 2))
    assert truth.judges == ["quotients"] * 2
    assert not truth.J["0.weight"].any()
    assert truth.J["2.weight"].any()


def test_quotients_overrule_a_second_derivative_that_torch_gets_wrong():
    """Of a norm: w = g v/|v|, along v = (a, b) at g = 1, x = (1, 0): h = a/√(a² + b²)."""
    net = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1, bias=False)).double()
    names = "parametrizations.weight.original0", "parametrizations.weight.original1"
    with torch.no_grad():
        net.get_parameter(names[0]).fill_(1.0)
        net.get_parameter(names[1]).copy_(torch.tensor([[0.6, 0.8]]))
    truth = fuzz.truth_of(net, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert truth.judges == ["quotients of J"]
    right = torch.tensor([-3 * 0.6 * 0.8**2, 2 * 0.6 * 0.8**2 - 0.6**3], dtype=torch.float64)
    torch.testing.assert_close(truth.S[names[1]].flatten(), right)


def test_there_is_no_right_answer_at_a_kink():
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).double()
    nn.init.zeros_(net[0].bias)
    truth = fuzz.truth_of(net, torch.zeros(1, 1, dtype=torch.float64))
    assert truth.J["0.bias"].isnan().all()
    assert not truth.J["0.weight"].any()


def changed(monkeypatch, change):
    """A judge of a network that every engine takes, and a library that errs."""
    case = random_networks.Case(0, "")
    net, x = mlp([2, 3, 2], nn.Tanh, scale=2.0), inputs(2, 2)
    case.scope = {"model": net, "x": x, "family": fimlib.Categorical()}
    judge, differentiate = fuzz.Judge(case), fimlib.differentiate
    assert judge.verdict("auto", 2) == ("exact", "")

    def wrong(model, x, **options):
        return change(model, x, differentiate(model, x, **options))

    monkeypatch.setattr(fimlib, "differentiate", wrong)
    monkeypatch.setattr(fuzz, "run", lambda _: None)
    return judge.verdict("auto", 2)


def scaled(derivs, which, factor):
    blocks = list(derivs.blocks)
    blocks[0] = dataclasses.replace(blocks[0], **{which: getattr(blocks[0], which) * factor})
    return dataclasses.replace(derivs, blocks=tuple(blocks))


@pytest.mark.parametrize("which", ["J", "S"])
def test_the_judge_sees_a_derivative_that_is_off(monkeypatch, which):
    verdict, why = changed(monkeypatch, lambda _m, _x, d: scaled(d, which, 1 + 1e-5))
    assert verdict == "wrong"
    assert why.startswith(which)


def test_the_judge_sees_a_moment_that_is_off(monkeypatch):
    right = fuzz.QUANTITIES["V2"]

    def off(derivs, family):
        return {n: v * (1 + 1e-5) for n, v in right(derivs, family).items()}

    monkeypatch.setitem(fuzz.QUANTITIES, "V2", off)
    case = random_networks.draw(3)
    case.scope |= {"model": mlp([2, 3, 2], nn.Tanh, scale=2.0), "x": inputs(2, 2)}
    case.scope["family"] = fimlib.Categorical()
    verdict, why = fuzz.Judge(case).verdict("auto", 2)
    assert verdict == "wrong"
    assert why.startswith("V2")


CHANGES = {
    "x": lambda _, x: x.add_(1e-12),
    "parameter 0.bias": lambda m, _: m[0].bias.data.mul_(1.0001),
    "identity of parameter 0.bias": lambda m, _: m[0].bias.requires_grad_(False),
    "gradient of 0.bias": lambda m, _: setattr(m[0].bias, "grad", torch.zeros(3).double()),
    "module 1": lambda m, _: m[1].train(),
    "RNG state": lambda _, __: torch.rand(1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_judge_sees_what_is_done_to_the_callers_things(monkeypatch, what):
    def change(model, x, derivs):
        CHANGES[what](model, x)
        return derivs

    assert changed(monkeypatch, change) == ("wrong", f"the caller's {what} has changed")


def test_the_judge_tells_a_refusal_from_an_accident(monkeypatch):
    def accident(*_):
        return {}["no such key"]

    def own_words(*_):
        raise ValueError("raised outside of fimlib")

    def python_words(_, x, derivs):
        fimlib.Categorical().project(x, derivs.outputs, derivs)  # no tensor where one is due

    with monkeypatch.context() as patch:
        right = fimlib.differentiate
        verdict, why = changed(patch, lambda m, x, _: right(m, x[0]))
        assert verdict == "refused"
        assert "batch dimension" in why
    for change in (accident, own_words, python_words):
        with monkeypatch.context() as patch:
            verdict, why = changed(patch, change)
            assert verdict == "wrong"
            assert why.startswith("from inside")
