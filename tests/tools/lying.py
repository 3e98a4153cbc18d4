"""Functions of one's own for autograd: with the right gradient, a wrong one, or one that is cut.

The name says what backward() does; tests put these between two layers. ``random_networks`` prints
the source of some, so each stands for itself.
"""

import torch


class Sine(torch.autograd.Function):
    """sin z, right to every order."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return z.cos() * g


class SineWithRules(torch.autograd.Function):
    """sin z, with rules for vmap and for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return z.sin()

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0].cos() * g

    @staticmethod
    def jvp(ctx, t):
        return ctx.saved_tensors[0].cos() * t


# The first derivative is wrong.


class DoubledSquare(torch.autograd.Function):
    """z² with twice its derivative."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**2

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return 4 * z * g


class EnlargedSine(Sine):
    """sin z with 1.5 times its derivative."""

    @staticmethod
    def backward(ctx, g):
        return 1.5 * Sine.backward(ctx, g)


class WrongCube(torch.autograd.Function):
    """z³ with the derivative z."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return z * g


class ForgottenFactor(torch.autograd.Function):
    """2z with the derivative 1."""

    @staticmethod
    def forward(_ctx, z):
        return 2 * z

    @staticmethod
    def backward(_ctx, g):
        return g


class StraightThrough(torch.autograd.Function):
    """z, rounded, with the derivative 1, also under vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return z.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(_ctx, g):
        return g


class Sigmoid(torch.autograd.Function):
    """z with the derivative 2; its node is named as that of torch.sigmoid, but for "Backward"."""

    @staticmethod
    def forward(ctx, z):
        ctx.mark_dirty(z)
        return z

    @staticmethod
    def backward(_ctx, g):
        return 2 * g


# The first derivative is right, and autograd does not see how it depends on z.


class CutSine(Sine):
    """sin z, whose derivative is detached."""

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0].detach().cos() * g


class OnceSine(torch.autograd.Function):
    """sin z, differentiable once."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return z.cos() * g


class CutCube(torch.autograd.Function):
    """z³ with the right derivative, which is cut off from its own."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return 3 * z.detach() ** 2 * g


class CutCubeWithRules(torch.autograd.Function):
    """The same with a rule for vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return z**3

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.save_for_backward(*inputs)

    backward = CutCube.backward


class CutSquare(torch.autograd.Function):
    """z², whose backward() makes no graph at all."""

    @staticmethod
    def forward(ctx, z):
        ctx.slope = 2 * z.detach()
        return z**2

    @staticmethod
    def backward(ctx, g):
        return g.detach() * ctx.slope


class HiddenWeight(torch.autograd.Function):
    """z times the sum of a weight, which gets no gradient."""

    @staticmethod
    def forward(ctx, z, weight):
        ctx.factor = weight.sum()
        return z * ctx.factor

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


class NoBackward(torch.autograd.Function):
    """2z; backward() fails."""

    @staticmethod
    def forward(_ctx, z):
        return 2 * z

    @staticmethod
    def backward(_ctx, _g):
        raise TypeError("no such thing")


class CutSineWithRules(SineWithRules):
    """The same with a second derivative by forward mode alone."""

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0].detach().cos() * g
