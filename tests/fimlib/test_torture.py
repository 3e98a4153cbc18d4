"""Networks on which a diagonal easily goes wrong: fimlib is right, or refuses where it must."""

import json
import re

import pytest
import torch
from support import torture

pytestmark = pytest.mark.long
TRAPS = {trap.what: trap for trap in torture.traps()}


@pytest.mark.parametrize("what", TRAPS)
def test_fimlib_is_right_or_refuses(what):
    trap = TRAPS[what]
    found = torture.answer(trap, "fimlib", torture.right(trap))
    assert found["answer"] == ("refused" if trap.refused else "right"), found


def test_there_are_enough_of_them():
    assert len(TRAPS) == len(list(torture.traps())) >= 60


def test_the_right_value_needs_no_autograd():
    trap = TRAPS["a detached factor"]
    with torch.no_grad():
        expected = torture.right(trap)
    model, x = torture.problem(trap)
    inner = torch.func.functional_call

    def h(weight):  # without the detach()
        s = inner(model[0], {"weight": weight, "bias": model[0].bias}, (x,))
        return model[3](torch.tanh(s * s.sigmoid()))

    J = torch.func.jacrev(h)(model[0].weight.detach())
    I = torture.CLASSES.information(h(model[0].weight).detach(), J).mean(0)
    assert torch.allclose(expected["0.weight"], I, rtol=1e-8, atol=1e-12)
    assert torture.right(TRAPS["dropout by hand"]) is None
    assert torture.right(TRAPS["batch norm in training mode"]) is None


def test_wrong_answers_are_told_from_right_ones():
    expected = {"w": torch.ones(3).double(), "b": torch.zeros(2).double()}
    assert torture.distance(expected, expected) == 0
    assert torture.distance(expected | {"w": 1.1 * expected["w"]}, expected) == pytest.approx(0.1)
    assert torture.distance({"w": expected["w"]}, expected) == 0  # left out, and 0
    assert torture.distance(expected | {"b": torch.ones(2)}, expected) > 1
    assert torture.distance(expected | {"w": torch.full((3,), torch.nan)}, expected) == torch.inf


def test_the_page_shows_what_was_found():
    found = json.loads(torture.FOUND.read_text("utf-8"))
    assert [row["network"] for row in found["rows"]] == list(TRAPS)
    page = torture.page(found)
    ours = [row["answers"]["fimlib"]["answer"] for row in found["rows"]]
    assert re.search(rf"\| fimlib +\| {ours.count('right')} ", page)
    assert not {"wrong", "no value"} & set(ours)
    assert "**wrong**, 31 %" in page
    assert torture.page(None).startswith("Nothing was tried yet")
