"""Hooks and replaced forward passes: the derivatives are those of the network as it is called."""

import functools

import pytest
import torch
from strategies import inputs, mlp
from torch import nn

from fimlib import Gaussian, accumulate, estimate

X = inputs(5, 4)


def network():
    torch.manual_seed(0)
    return mlp([4, 5, 1], nn.Tanh)


def recording(net):
    seen = []
    net[1].register_forward_hook(lambda _module, _args, out: seen.append(out))


def recording_by_name(net):
    kept = {}
    for name, module in net.named_modules():
        hook = functools.partial(lambda n, _m, _a, out: kept.update({n: out.detach()}), name)
        module.register_forward_hook(hook)


def scaled(net):
    net[1].register_forward_hook(lambda _module, _args, out: 3 * out)


def scaled_in_place(net):
    net[0].register_forward_hook(lambda _module, _args, out: out.mul_(3))


def shifted(net):
    net.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))


def requiring_grad(net):
    """As transformers does for adapters under gradient checkpointing."""

    def hook(_module, _args, out):
        out.requires_grad_()

    net[0].register_forward_hook(hook)


def as_accelerate(net):
    """Its add_hook_to_module, on every module."""

    def forward(module, *args):
        return 2 * module._old_forward(*args)

    for module in net.modules():
        module._old_forward = module.forward
        new = functools.partial(forward, module)
        module.forward = functools.update_wrapper(new, module._old_forward)


def as_a_method(net):
    net.forward = (lambda self, x: self[2](self[1](2 * self[0](x)))).__get__(net)


ACCEPTED = [recording, recording_by_name, scaled, scaled_in_place, shifted, as_accelerate]
ACCEPTED += [as_a_method]


def cut(net):
    net[0].register_forward_hook(lambda _module, _args, out: out.detach() + 0 * out)


def clipped(net):
    net[1].register_full_backward_hook(lambda _module, grads, _: (grads[0].clamp(-9, 9),))


def clipped_tensor(net):
    def hook(_module, _args, out):
        if out.requires_grad:
            out.register_hook(lambda g: g.clamp(-1e-3, 1e-3))

    net[1].register_forward_hook(hook)


def every_other_call(net):
    calls = []

    def hook(_module, _args, out):
        calls.append(None)
        return out * (1 + len(calls) % 2)

    net[1].register_forward_hook(hook)


def centred(net):
    net[1].register_forward_hook(lambda _module, _args, out: out - out.mean(0))


def elsewhere(net):
    net[1].register_forward_hook(lambda _module, _args, out: out + net[0].bias)


REFUSED = {
    cut: "autograd's derivative is not the derivative",
    clipped: r"'1' \(Tanh\) has a backward hook",
    clipped_tensor: "autograd's derivative is not the derivative",
    every_other_call: "how often the model was called",
    centred: "depend on the others of the batch",
    elsewhere: "'0.bias', not by its name",
}


def squares(net):
    """The mean of J² over the inputs, which is I of one Gaussian output of variance 1."""
    rows = [torch.autograd.grad(net(x)[0, 0], list(net.parameters())) for x in X.split(1)]
    found = (torch.stack(J).square().mean(0) for J in zip(*rows, strict=True))
    return dict(zip([n for n, _ in net.named_parameters()], found, strict=True))


CALLS = {
    "estimate": lambda net: estimate(net, X, Gaussian(), squares="input", passes=2).value,
    "accumulate": lambda net: accumulate(net, X, Gaussian(), quantities=["I"]).fisher_information(),
    "a held batch": lambda net: accumulate(
        net, [{"x": X}], Gaussian(), quantities=["I"], forward=lambda m, b: m(b["x"])
    ).fisher_information(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("change", ACCEPTED, ids=lambda f: f.__name__)
def test_the_information_is_that_of_the_network_as_called(change, call):
    net = network()
    change(net)
    expected = squares(net)
    for name, I in CALLS[call](net).items():
        assert torch.allclose(I, expected[name], rtol=1e-10, atol=1e-14), name
    if change not in (recording, recording_by_name):
        plain = squares(network())
        assert not torch.allclose(expected["0.weight"], plain["0.weight"])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__)
def test_hooks_that_hide_the_derivatives_are_refused(change, call):
    net = network()
    change(net)
    with pytest.raises(NotImplementedError, match=REFUSED[change]):
        CALLS[call](net)


def test_outputs_that_require_grad_under_a_frozen_layer():
    net = network()
    requiring_grad(net)
    net[0].requires_grad_(False)
    estimate(net, X, Gaussian(), passes=2, layers="trainable")
    joint = accumulate(net, X, Gaussian(), quantities=["I"], layers="trainable")
    found = joint.fisher_information()
    assert found.keys() == {"2.weight", "2.bias"}
    for name, I in found.items():
        assert torch.allclose(I, squares(network())[name], rtol=1e-10)


def test_what_distributed_data_parallel_wraps(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(network())
        wrapped(X).sum().backward()
        for call in CALLS.values():
            with pytest.raises(NotImplementedError, match=r"pass model\.module"):
                call(wrapped)
            for name, I in call(wrapped.module).items():
                assert torch.allclose(I, squares(network())[name], rtol=1e-10)
    finally:
        torch.distributed.destroy_process_group()
