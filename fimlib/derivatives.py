r"""First and second derivatives J = ∂h, S = ∂²h of a network's outputs, per parameter (Section 3).

For one scalar parameter θᵢ, J = ∂ᵢh and S = ∂²ᵢᵢh are vectors of length T. For a linear layer with
input z, both factor: ``J[W_oj] = J_o z_j`` and ``S[W_oj] = S_o z_j²``, where J_o and S_o are first
and second derivatives with respect to the layer's o-th output (its pre-activation). So that is
what is kept; nothing of size outputs × parameters is built unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fimlib.diagonal import Diagonal, Term


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite; mostly one sum shows it."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def power(z: Tensor, degree: int) -> Tensor:
    """The power 1, 2 or 4 of z, by squaring."""
    return z if degree == 1 else power(z.square(), degree // 2)


def flat(D: Tensor) -> Tensor:
    """J or S with a parameter's numbers in a row, [B, T, K]; a scalar is one of them."""
    return D.reshape(*D.shape[:2], -1)


@dataclass(frozen=True)
class Block:
    """J and S of parameters that share their left factors.

    Attributes:
        layer: Name of the layer in the network.
        J: [B, T, *K], left factor of the first derivatives.
        S: [B, T, *K], left factor of the second derivatives; None where only first ones were
            asked for.
        inputs: For every parameter its right factor z, [B, n], or None where it is 1
            (a bias, or a parameter whose derivatives are kept dense).
    """

    layer: str
    J: Tensor
    S: Tensor | None
    inputs: Mapping[str, Tensor | None]

    def at(self, inputs: slice | Tensor) -> Block:
        """The same at some of the inputs."""
        S = None if self.S is None else self.S[inputs]
        factors = {n: None if z is None else z[inputs] for n, z in self.inputs.items()}
        return Block(self.layer, self.J[inputs], S, factors)

    @property
    def second(self) -> Tensor:
        """S; a ValueError where there is none."""
        if self.S is None:
            raise ValueError(
                "these derivatives are of first order only, and this quantity needs the second: "
                "differentiate(..., order=2), or for a network whose second derivatives no engine "
                "knows, fimlib.hutchinson_variance_i2."
            )
        return self.S


@dataclass(frozen=True)
class Derivatives:
    """J and S of all parameters at B inputs.

    Attributes:
        outputs: The network's outputs h, [B, T].
        blocks: From the first layer to the last.
        engine: Which engine made them.
    """

    outputs: Tensor
    blocks: tuple[Block, ...]
    engine: str = ""

    def at(self, inputs: slice | Tensor) -> Derivatives:
        """The same at some of the inputs."""
        blocks = tuple(block.at(inputs) for block in self.blocks)
        return replace(self, outputs=self.outputs[inputs], blocks=blocks)

    def contract(self, form: Callable[[Block], Tensor], degree: int) -> Diagonal:
        """Apply a form to every parameter's derivatives.

        Args:
            form: Maps a block to [B, *K]; it reads J and S along their axis 1. It must be
                homogeneous, of the given degree if J counts once and S twice: then the form of
                an outer product is the outer product of the forms.
            degree: That degree.
        """

        def term(block: Block) -> Term:
            left = form(block)
            factors = block.inputs.items()
            return Term(
                block.layer,
                left,
                {n: None if z is None else power(z.to(left.dtype), degree) for n, z in factors},
            )

        return Diagonal(tuple(map(term, self.blocks)))

    def jacobian(self, name: str) -> Tensor:
        """J of one parameter, dense: [B, T, *shape]."""
        return self._dense(name, "J", 1)

    def second(self, name: str) -> Tensor:
        """S of one parameter, dense: [B, T, *shape]."""
        return self._dense(name, "second", 2)

    def _dense(self, name: str, which: str, degree: int) -> Tensor:
        for block in self.blocks:
            if name in block.inputs:
                left, z = getattr(block, which), block.inputs[name]
                if z is None:
                    return left.clone()  # type: ignore[no-any-return]
                return torch.einsum("bt...,bn->bt...n", left, power(z, degree))
        known = ", ".join(n for block in self.blocks for n in block.inputs)
        raise KeyError(f"no parameter {name!r}; there are: {known}")


OneBlock = Callable[[int, slice | Tensor], Callable[[slice], Block]]


@dataclass(frozen=True)
class Sweep:
    """B inputs after their forward pass, whose J and S come when they are asked for.

    What is carried or multiplied for a few inputs at a time stays in the processor's cache; for
    small networks that decides the speed, for large ones the memory.

    Attributes:
        outputs: The network's outputs h at all of them, [B, T].
        inputs: The layer of every block, and its right factors at all of them, as in ``Block``.
        sweep: From some of the inputs, a slice or positions, to the derivatives there.
        size: How many inputs to take at a time.
        engine: As in ``Derivatives``.
        one: From a block's number and some of the inputs to a function, from some of the numbers
            along the first axis of K to that part of the block; None where all blocks come
            together.
        shares: How much of each block to take at a time, where these come one by one.
        combined: From a function of outputs [b, T] that returns L [b, T, A], to the same inputs
            with LᵀJ in the place of J, and without S; None where J costs no more.
    """

    outputs: Tensor
    inputs: tuple[tuple[str, Mapping[str, Tensor | None]], ...]
    sweep: Callable[[slice | Tensor], Derivatives]
    size: int
    engine: str = ""
    one: OneBlock | None = None
    shares: tuple[Share, ...] = ()
    combined: Callable[[Callable[[Tensor], Tensor]], Sweep] | None = None

    @classmethod
    def from_derivatives(cls, derivs: Derivatives) -> Sweep:
        """Derivatives that are there already, in one piece."""
        inputs = tuple((block.layer, block.inputs) for block in derivs.blocks)
        size = max(1, len(derivs.outputs))
        return cls(derivs.outputs, inputs, derivs.at, size, derivs.engine)

    def derivatives(self) -> Derivatives:
        """Those at all inputs."""
        return replace(self.sweep(slice(None)), engine=self.engine)

    def pieces(self) -> Iterator[Piece]:
        """Every block at all inputs, piece by piece; without inputs it is one piece.

        Of each part of a block the inputs come in order.
        """
        count = max(1, len(self.outputs))
        if self.one is None:
            for at in slices(count, self.size):
                derivs = self.sweep(at)
                for i, block in enumerate(derivs.blocks):
                    one = replace(derivs, blocks=(block,))
                    yield Piece(i, at, slice(None), one, at.stop == count)
            return
        for i, share in enumerate(self.shares):
            parts = list(slices(share.rows, share.rows_at_a_time)) if share.rows else [slice(None)]
            for at in slices(count, share.inputs_at_a_time):
                part = self.one(i, at)
                for rows in parts:
                    one = Derivatives(self.outputs[at], (part(rows),))
                    is_last = rows.stop in (None, share.rows) and at.stop == count
                    yield Piece(i, at, rows, one, is_last)


class Share(NamedTuple):
    """How much of a block to take at a time.

    Attributes:
        inputs_at_a_time: Inputs.
        rows: The length of the first axis of K; 0 where that is not to be divided.
        rows_at_a_time: Along that axis.
    """

    inputs_at_a_time: int
    rows: int = 0
    rows_at_a_time: int = 0


class Piece(NamedTuple):
    """A part of one block, at some of the inputs.

    Attributes:
        block: Its number.
        at: The inputs.
        rows: Which part of the first axis of K, if not all of it.
        derivs: The outputs there, and this block alone.
        is_last: Whether it is the last piece of its block.
    """

    block: int
    at: slice
    rows: slice
    derivs: Derivatives
    is_last: bool


def slices(count: int, size: int) -> Iterator[slice]:
    """From 0 to ``count``, so many at a time."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
