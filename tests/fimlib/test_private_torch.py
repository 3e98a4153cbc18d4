"""Every private name of torch that the project uses is there.

torch promises none of them. A new torch that drops one breaks this test, and the message says which
name is missing and which lines use it.
"""

import ast
import importlib
import os
import re
import weakref
from collections import defaultdict
from typing import NamedTuple

import lying
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from support import results
from torch import nn

pytestmark = pytest.mark.long

FOLDERS = ("fimlib", "notebooks/support", "book/_ext", "tests")
PRIVATE = re.compile(r"_(?!_)\w*[a-zA-Z]\w*(?<!__)")
PATH = re.compile(r"torch(\.\w+)+")


def has_private_part(path):
    return any(PRIVATE.fullmatch(part) for part in path.split("."))


def defined(nodes):
    """The names of functions, classes, attributes and variables that a file itself defines."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(getattr(node, "ctx", None), ast.Store):
            yield getattr(node, "attr", getattr(node, "id", None))


def imports(nodes):
    """(name in the file, path, line) of everything imported from torch."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    yield alias.asname or "torch", alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}", node.lineno


def path_of(node, start):
    """``torch._C.x`` for a chain of attributes of something imported from torch, else None."""
    if isinstance(node, ast.Attribute):
        path = path_of(node.value, start)
        return path and f"{path}.{node.attr}"
    return start.get(node.id) if isinstance(node, ast.Name) else None


def private_names(nodes, strings):
    """(name, line): a path from torch on, or an attribute of an object that is not known.

    Args:
        nodes: Those of a parsed file.
        strings: Whether names within strings count, as in ``getattr(node, "_saved_self")``.
    """
    imported = list(imports(nodes))
    yield from ((path, line) for _, path, line in imported if has_private_part(path))
    start = {n: "torch" if n == "torch" else path for n, path, _ in imported}
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    inner |= {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            path = path_of(node, start)
            if path and id(node) not in inner and has_private_part(path):
                yield path, node.lineno
            elif not path and PRIVATE.fullmatch(node.attr):
                yield node.attr, node.lineno
        elif strings and isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = "" if id(node) in inner else node.value  # no ending of an f-string
            if PRIVATE.fullmatch(text) or (PATH.fullmatch(text) and has_private_part(text)):
                yield text, node.lineno


def used(files):
    """Name → the places that use it, for names that none of the files defines."""
    parsed = {file: list(ast.walk(ast.parse(text))) for file, text in files.items()}
    own = {name for nodes in parsed.values() for name in defined(nodes)}
    found = defaultdict(list)
    for file, nodes in parsed.items():
        for name, line in private_names(nodes, strings=file.startswith("fimlib/")):
            if name not in own:
                found[name].append(f"{file}, line {line}")
    return dict(found)


def autograd_nodes():
    """One autograd node of each kind of which the engines read what it has saved."""
    w, z = (torch.ones(2, 2, requires_grad=True) for _ in "wz")
    kernel, image = (torch.ones(2, 2, 2, 2, requires_grad=True) for _ in "ki")
    mean, var = torch.zeros(2), torch.ones(2)
    made = [
        torch.addmm(w, w, z), w @ z, torch.bmm(image[0], kernel[0]), w + z, w * z, w**z, w**3,
        torch.div(w, z, rounding_mode="floor"), lying.Sine.apply(z), F.prelu(w, z[0]),
        F.conv2d(image, kernel), F.avg_pool2d(image, 2), F.max_pool2d(image, 2),
        F.batch_norm(image, mean, var, mean + w[0], var + w[1]), F.layer_norm(w, (2,)),
        F.group_norm(image, 2), F.embedding(mean.long(), w),
    ]  # fmt: skip
    return [result.grad_fn for result in made]


def missing(names):
    """The lines that use what is not there, and what it is."""
    compiled = torch.compile(nn.Linear(1, 1), backend="eager")
    of_python = (os, weakref.finalize, NamedTuple("Empty", []))
    of_torch = [compiled._orig_mod, compiled, torch.ones(1), torch.ops.aten.add.Tensor]
    holders = [*of_torch, *autograd_nodes(), *of_python]
    return [
        f"{', '.join(places)}: torch {torch.__version__} has no {name}"
        for name, places in names.items()
        if not (is_there(name) if "." in name else any(hasattr(h, name) for h in holders))
    ]


def is_there(path):
    module, *attributes = path.split(".")
    found = importlib.import_module(module)
    for name in attributes:
        module = f"{module}.{name}"
        if not hasattr(found, name):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError:
                return False
        found = getattr(found, name)
    return True


def sources():
    return {
        path.relative_to(results.ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in FOLDERS
        for path in sorted((results.ROOT / folder).rglob("*.py"))
    }


def test_every_private_name_of_torch_in_use_is_there():
    names = used(sources())
    assert names.keys() >= {"_saved_mat1", "_forward_hooks", "_version", "torch._weight_norm"}
    assert not missing(names)


def test_what_is_gone_is_named_with_its_place():
    text = """
import torch
from torch import nn as layers
from torch.gone._inner import thing
from elsewhere import _other

class Own:
    def _method(self):
        self._value = torch._C.gone(layers._gone), layers.Linear, torch.nn._reduction
        return self._method(), self._value, self._modules, self.x._saved_gone, self.__dict__

getattr(Own(), "_saved_old"), "torch._old", "some _text", "_"
"""
    assert sorted(missing(used({"fimlib/a.py": text}))) == [
        f"fimlib/a.py, line {line}: torch {torch.__version__} has no {name}"
        for line, name in (
            (10, "_saved_gone"), (12, "_saved_old"), (12, "torch._old"),
            (4, "torch.gone._inner.thing"), (9, "torch._C.gone"), (9, "torch.nn._gone"),
        )
    ]  # fmt: skip
    assert "_saved_old" not in used({"tests/a.py": text})
