"""The graph that autograd records of one forward pass: what depends on which parameter, and how.

The graph holds all that first derivatives pass through, and nothing else. So what an engine knows
about every node of it holds for the network, whatever its Python looks like. The one thing that a
graph cannot show is where somebody cut it (detach, .data, no_grad); ``Watch`` sees that.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode

Edge = tuple[Node, int]  # a tensor, as autograd knows it: the node that made it, which output

REMEDY = (
    "This engine follows operations that are linear in each parameter, and elementwise functions; "
    "where such a network ends in a softmax, remove that: the outputs are natural parameters."
)
# These read the shape or the order of a tensor, not its values; autograd itself clears its hooks.
FORMS = re.compile(
    r"(zeros|ones|full|empty|rand\w*)_like|new_\w+|arg(max|min|sort)|__iter__|_backward_hooks"
)
# Nor do these read the values of any argument but the first.
LIKE_ANOTHER = ("to", "type_as", "expand_as", "view_as", "reshape_as")


@dataclass(frozen=True)
class Trace:
    """One forward pass.

    Attributes:
        outputs: h, [B, T].
        root: h, as autograd knows it.
        names: The parameter at each leaf of the graph.
        made: Which function, in which module, made each node.
        nodes: Those between the parameters and h, in the order of the forward pass.
        users: For every node or leaf, the nodes that take what it made, and as which argument.
        ancestors: For every node or leaf, the parameters that it depends on.
    """

    outputs: Tensor
    root: Edge
    names: dict[Node, str]
    made: dict[Node, str]
    nodes: list[Node]
    users: dict[Node, list[Edge]]
    ancestors: dict[Node, frozenset[str]]

    def dependent(self, node: Node) -> dict[int, Edge]:
        """Of the node's arguments, by position, those that depend on parameters."""
        edges = enumerate(node.next_functions)
        return {i: (n, k) for i, (n, k) in edges if n is not None and self.ancestors[n]}

    def refusal(self, node: Node, why: str) -> NotImplementedError:
        """The error that names a node by what the user wrote."""
        name = self.made.get(node, f"{node.name()}, of no function of torch")
        return NotImplementedError(f"{name}: {why} {REMEDY}")


class Watch(TorchFunctionMode):
    """Notes which function of which module made each node; refuses what cuts the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[Node, str] = {}
        self.stack: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call func; look at what depends on parameters before, and at what came of it."""
        name = name_of(func)
        read = args[:1] if name in LIKE_ANOTHER else (args, kwargs)
        before = {get_gradient_edge(t).node for t in tensors(read) if t.requires_grad}
        result = func(*args, **(kwargs or {}))
        if before and not FORMS.fullmatch(name) and not is_shape_or_condition(result):
            place = f"{name}() in {self.stack[-1] if self.stack else 'the model'}"
            if not before <= self.note(result, before, place):
                raise NotImplementedError(
                    f"{place} cuts the derivatives off or hides how they come about, as detach(), "
                    ".data, .item(), torch.no_grad(), assignments into a tensor and your own "
                    f"autograd.Function do: write it without. {REMEDY}"
                )
        return result

    def note(self, result: Any, before: set[Node], place: str) -> set[Node]:
        """Name the nodes that were just made; return all that were met, those before included."""
        stack: list[Node | None] = [t.grad_fn for t in tensors(result) if t.requires_grad]
        met: set[Node] = set()
        while stack:
            node = stack.pop()
            if node is None or node in met:
                continue
            met.add(node)
            if node not in before and node not in self.made:
                self.made[node] = f"{node.name()} of {place}"
                stack += [n for n, _ in node.next_functions]
        return met

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator[None]:
        """Know the module that is being called."""
        names = {module: name for name, module in model.named_modules()}

        def enter(module: nn.Module, _args: Any) -> None:
            self.stack.append(f"module {names.get(module, '')!r} ({type(module).__name__})")

        def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
            self.stack.pop()

        hooks = [
            modules.register_module_forward_pre_hook(enter),
            modules.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()


def name_of(func: Any) -> str:
    """What the user called: of a property its own name, e.g. ``data``."""
    name = getattr(func, "__name__", str(func))
    is_property = name in ("__get__", "__set__")
    return str(getattr(func.__self__, "__name__", name) if is_property else name)


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors(value)


def is_shape_or_condition(result: Any) -> bool:
    """Whether the result tells of a tensor what does not change with its values, a.e."""
    if isinstance(result, Tensor):
        return result.dtype == torch.bool
    if isinstance(result, list | tuple):
        return all(is_shape_or_condition(r) for r in result)
    return isinstance(result, int | str | torch.dtype | torch.device | torch.layout)


def trace(model: nn.Module, x: Tensor) -> Trace:
    """Run the model on a copy of its parameters and read the graph.

    Raises:
        ValueError: the input does not fit, or the outputs are not [B, T] and finite.
        NotImplementedError: the pass is random, cuts the graph, or leaves a parameter out.
    """
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    names = {get_gradient_edge(p).node: n for n, p in parameters.items()}
    watch = Watch()

    def run() -> Tensor:
        with torch.enable_grad(), watch.follow(model):
            h: Tensor = torch.func.functional_call(model, {**parameters, **buffers}, (x.clone(),))
        return h

    outputs = without_randomness(run, x)
    check_outputs(outputs, len(x))
    nodes, users = walk(outputs.grad_fn)
    ancestors: dict[Node, frozenset[str]] = {}
    for node in nodes:
        below = (ancestors[n] for n, _ in node.next_functions if n is not None)
        own = (names[node],) if node in names else ()
        ancestors[node] = frozenset(own).union(*below)
    for node, name in names.items():
        if node not in ancestors:
            raise NotImplementedError(f"parameter {name!r} has no part in the outputs: remove it.")
    inner = [node for node in nodes if node.next_functions and ancestors[node]]
    return Trace(
        outputs, (nodes[-1], outputs.output_nr), names, watch.made, inner, users, ancestors
    )


def walk(root: Node | None) -> tuple[list[Node], dict[Node, list[Edge]]]:
    """All nodes below the root, each after its arguments, and who uses them."""
    users: dict[Node, list[Edge]] = defaultdict(list)
    order: dict[Node, None] = {}
    stack = [] if root is None else [(root, False)]
    while stack:
        node, is_ready = stack.pop()
        if node in order:
            continue
        arguments = [n for n, _ in node.next_functions if n is not None]
        if is_ready:
            order[node] = None
            for i, (n, _) in enumerate(node.next_functions):
                if n is not None:
                    users[n].append((node, i))
        else:
            stack += [(node, True), *((n, False) for n in reversed(arguments))]
    return list(order), users


def without_randomness(run: Callable[[], Tensor], x: Tensor) -> Tensor:
    """Run, and refuse if a random number was drawn; the generators are left as they were."""
    devices = [x.device] if x.is_cuda else []

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]

    with torch.random.fork_rng(devices):
        before = states()
        try:
            outputs = run()
        except RuntimeError as error:
            if isinstance(error, NotImplementedError):
                raise
            raise ValueError(f"the input {list(x.shape)} does not fit: {error}") from error
        if not all(map(torch.equal, before, states())):
            raise NotImplementedError(
                "the forward pass draws random numbers: make it deterministic, e.g. replace "
                "F.dropout(x) by F.dropout(x, training=self.training)."
            )
    return outputs


def check_outputs(outputs: Any, size: int) -> None:
    """A ValueError unless the outputs are a finite [B, T] tensor."""
    shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != size:
        raise ValueError(
            f"the model must return one [B, T] tensor, got {shape}: flatten it (nn.Flatten)."
        )
    if outputs.shape[1] == 0:
        raise ValueError("the model returns no outputs: T must be at least 1.")
    if not torch.isfinite(outputs).all():
        raise ValueError("the outputs hold NaN or infinite values: the weights are too large.")


def kind(node: Node) -> str:
    """The node's operation as autograd calls it, e.g. "Sigmoid"; "" if it is none of torch's."""
    match = re.fullmatch(r"(\w+?)Backward\d+", node.name())
    return match[1] if match else ""
