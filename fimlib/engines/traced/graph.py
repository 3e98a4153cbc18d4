"""The graph that autograd records of one forward pass: how tensors depend on the parameters.

The graph holds all that first derivatives pass through, and nothing else. So what an engine knows
about every node of it holds for the network, whatever its Python looks like. The one thing that a
graph cannot show is where somebody cut it (detach, .data, no_grad); ``Watch`` sees that.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode

from fimlib.engines.checks import check_outputs, failed
from fimlib.engines.model import kept_random_state, private_copy, tensors
from fimlib.engines.rewrite import Activation, rewritten
from fimlib.memory import raise_if_out_of_memory

Edge = tuple[Node, int]  # a tensor, as autograd knows it: the node that made it, which output

# These read the shape or the order of their first argument, not its values.
FORMS = re.compile(
    r"(zeros|ones|full|empty|rand\w*)_like|new_(zeros|ones|full|empty)\w*|arg(max|min|sort)"
)
# Nor do these read the values of any argument but the first.
LIKE_ANOTHER = ("to", "type_as", "expand_as", "view_as", "reshape_as")
# Autograd itself clears these, and cannot pass on errors raised there.
SILENT = ("_backward_hooks",)


@dataclass(frozen=True)
class Trace:
    """One forward pass.

    Attributes:
        outputs: h, [B, T].
        root: h, as autograd knows it; None if it depends on no parameter.
        names: The parameter at each leaf of the graph.
        made: Which function, in which module, made each node.
        nodes: All nodes between the chosen parameters and h, in the order of the forward pass.
        users: For every node or leaf, the nodes that use its result, and as which argument.
        ancestors: For every node or leaf, the parameters that it depends on.
        unused: Parameters in question that h does not depend on, by their names.
    """

    outputs: Tensor
    root: Edge | None
    names: dict[Node, str]
    made: dict[Node, str]
    nodes: list[Node]
    users: dict[Node, list[Edge]]
    ancestors: dict[Node, frozenset[str]]
    unused: dict[str, Tensor]

    def dependent(self, node: Node) -> dict[int, Edge]:
        """The node's arguments that depend on parameters, by position."""
        edges = enumerate(node.next_functions)
        return {i: (n, k) for i, (n, k) in edges if n is not None and self.ancestors[n]}

    def refusal(self, node: Node, why: str) -> NotImplementedError:
        """The error that names a node by the function that the user called."""
        name = self.made.get(node, f"{node.name()}, of no function of torch")
        return NotImplementedError(f"{name}: {why}")


class CapturedError(NotImplementedError):
    """A module uses a parameter that belongs to another."""


class Uncaptured(TorchFunctionMode):
    """Refuses parameters that a module reaches otherwise than by their names.

    Attributes:
        foreign: Names of tensors that must not be used, by id.
        place: Where it is looked for.
    """

    def __init__(self, foreign: Mapping[int, str], place: str = "the model") -> None:
        super().__init__()
        self.foreign, self.place = foreign, place

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the arguments, then call func."""
        if name_of(func) not in SILENT:
            self.look(tensors((args, kwargs)))
        return func(*args, **(kwargs or {}))

    def look(self, arguments: Iterable[Tensor]) -> None:
        """Raise a CapturedError if one is foreign."""
        for name in (self.foreign[id(t)] for t in arguments if id(t) in self.foreign):
            raise CapturedError(
                f"{self.place} uses parameter {name!r}, not by its name in the module tree (but "
                "out of a closure, a list or a replaced forward()): make it an attribute of the "
                "module that uses it."
            )


class Watch(Uncaptured):
    """Records which function of which module made each node; refuses cuts of the graph."""

    def __init__(self, names: Mapping[Node, str], foreign: Mapping[int, str]) -> None:
        super().__init__(foreign)
        self.names = names
        self.made: dict[Node, str] = {}
        self.stack: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call func; inspect its arguments that depend on parameters, and its result."""
        name = name_of(func)
        self.place = f"{name}() in {self.stack[-1] if self.stack else 'the model'}"
        arguments = [] if name in SILENT else list(tensors((args, kwargs)))
        self.check_arguments(arguments)
        followed = [(t, t._version, made_by(t)) for t in arguments if t.requires_grad]
        read = tensors(read_by(name, args, kwargs or {}))
        before = {made_by(t) for t in read if t.requires_grad}
        result = func(*args, **(kwargs or {}))
        if name == "__iter__":
            result = list(result)
        is_cut = name == "data" or any(  # autograd does not see what is written there
            t._version != version and t.requires_grad and made_by(t) == node
            for t, version, node in followed
        )
        if before and not is_shape_or_condition(result):
            is_cut |= not before <= self.note(result, before)
        if is_cut:
            raise NotImplementedError(
                f"{self.place} cuts the derivatives off or hides how they come about, as detach(), "
                ".data, .item(), torch.no_grad(), assignments into a tensor and your own "
                "autograd.Function do."
            )
        return iter(result) if name == "__iter__" else result

    def check_arguments(self, arguments: list[Tensor]) -> None:
        """Refuse tensors that no recorded function made."""
        self.look(arguments)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise NotImplementedError(
                f"{self.place} is called under torch.vmap or torch.func, where nothing shows what "
                "cuts the derivatives off: write it for the whole batch."
            )
        for t in arguments:
            if t.requires_grad:
                self.check_known(made_by(t))

    def check_known(self, node: Any) -> None:
        """Refuse a node that appeared unseen: inside it, derivatives may have been cut off."""
        is_leaf = hasattr(node, "variable")
        if node in self.names or (node in self.made and not is_leaf):
            return
        if is_leaf:
            self.look([node.variable])
            raise NotImplementedError(
                f"{self.place} uses a tensor that requires grad and is no parameter of the model: "
                "make it a parameter, or a buffer that does not."
            )
        raise NotImplementedError(
            f"{node.name()}, of no function of torch: {self.place} uses what a script function, "
            "your own autograd.Function or an earlier call has made, or a view of what was "
            "overwritten since."
        )

    def note(self, result: Any, before: set[Node]) -> set[Node]:
        """Name the new nodes; return all nodes met, old ones included."""
        stack: list[Node | None] = [made_by(t) for t in tensors(result) if t.requires_grad]
        met: set[Node] = set()
        while stack:
            node = stack.pop()
            if node is None or node in met:
                continue
            met.add(node)
            if node not in before and node not in self.made:
                self.made[node] = f"{node.name()} of {self.place}"
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
            with self, rewritten(node=True):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def made_by(t: Tensor) -> Node:
    """The node whose output a tensor is; of a parameter, its leaf."""
    return get_gradient_edge(t).node


def name_of(func: Any) -> str:
    """The name of the called function; of a property its own name, e.g. ``data``."""
    name = getattr(func, "__name__", str(func))
    is_property = name in ("__get__", "__set__")
    return str(getattr(func.__self__, "__name__", name) if is_property else name)


def read_by(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments whose values a function reads."""
    if name in LIKE_ANOTHER:
        return args[:1]
    if name in SILENT:
        return ()
    return (args[1:] if FORMS.fullmatch(name) else args, kwargs)


def is_shape_or_condition(result: Any) -> bool:
    """Whether the result is a shape, a dtype or a condition, constant almost everywhere."""
    if isinstance(result, Tensor):
        return result.dtype == torch.bool
    if isinstance(result, list | tuple):
        return all(is_shape_or_condition(r) for r in result)
    return isinstance(result, int | str | torch.dtype | torch.device | torch.layout)


def trace(model: nn.Module, x: Tensor, wanted: frozenset[str] | None = None) -> Trace:
    """Run a copy of the model and read the graph, as if no others than the wanted were parameters.

    Raises:
        ValueError: the input does not fit, or the outputs are not [B, T] and finite.
        NotImplementedError: the pass is random, or cuts the graph.
    """
    private = private_copy(model).requires_grad_(False)
    parameters = {n: p for n, p in private.named_parameters() if wanted is None or n in wanted}
    names = {made_by(p.requires_grad_()): n for n, p in parameters.items()}
    watch = Watch(names, {id(p): n for n, p in model.named_parameters()})

    def run() -> Tensor:
        with torch.enable_grad(), watch.follow(private):
            h: Tensor = private(x.clone())
        return h

    outputs = without_randomness(run, x)
    check_outputs(outputs, len(x))
    nodes, users = walk(outputs.grad_fn)
    watch.place = "the end of the forward pass"
    for node in (*nodes[-1:], *(n for n in nodes if hasattr(n, "variable"))):
        watch.check_known(node)
    ancestors: dict[Node, frozenset[str]] = {}
    for node in nodes:
        below = (ancestors[n] for n, _ in node.next_functions if n is not None)
        own = (names[node],) if node in names else ()
        ancestors[node] = frozenset(own).union(*below)
    unused = {n: parameters[n].detach() for leaf, n in names.items() if leaf not in ancestors}
    names = {leaf: n for leaf, n in names.items() if leaf in ancestors}
    inner = [node for node in nodes if node.next_functions and ancestors[node]]
    root = (nodes[-1], outputs.output_nr) if nodes else None
    return Trace(outputs, root, names, watch.made, inner, users, ancestors, unused)


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

    def states() -> list[Tensor]:
        on_cpu = torch.get_rng_state()
        if x.device.type == "cpu":
            return [on_cpu]
        return [on_cpu, torch.get_device_module(x.device).get_rng_state(x.device)]

    with kept_random_state(x):
        before = states()
        try:
            outputs = run()
        except RuntimeError as error:
            raise_if_out_of_memory(error)
            if isinstance(error, NotImplementedError):
                raise
            raise failed(x, error) from error
        if not all(map(torch.equal, before, states())):
            raise NotImplementedError(
                "the forward pass draws random numbers: make it deterministic, e.g. replace "
                "F.dropout(x) by F.dropout(x, training=self.training)."
            )
    return outputs


def shape(edge: Edge) -> tuple[int, ...]:
    """The shape of the tensor at an edge."""
    node, output = edge
    return tuple(node._input_metadata[output].shape)


def kind(node: Node) -> str:
    """The node's operation as autograd calls it, e.g. "Addmm"; "" if it is none of torch's.

    An activation is called "Activation", and a copy into all of a tensor "Copy".
    """
    if getattr(node, "_forward_cls", None) is Activation:
        return "Activation"
    match = re.fullmatch(r"(\w+?)Backward\d+|torch::autograd::(Copy)Backwards", node.name())
    return (match[1] or match[2]) if match else ""
