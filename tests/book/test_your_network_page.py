"""The page "Bring your own network": its code runs as it stands there, and comes from one place."""

import contextlib
import io
import re
from pathlib import Path

import nbformat
import pytest
import torch
from support import book, excerpts, runs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "book" / "your-network.md").read_text()
NOTEBOOK = ROOT / "notebooks" / "your-network.ipynb"
INCLUDED = re.findall(r"```\{include\} _generated/([\w-]+)\.md", PAGE)
FOUND = excerpts.read(NOTEBOOK, executed=False)


def code(name):
    [block] = re.findall(r"```python\n(.*?)```", FOUND[name], flags=re.DOTALL)
    return block


@pytest.fixture(scope="module")
def ran():
    """All blocks one after the other, with less training: its names, and what each printed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    names, said = {}, {}
    for name in INCLUDED:
        text = code(name).replace("steps = 200 ", "steps = 10 ")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(text, name, "exec"), names)
        said[name] = out.getvalue()
    torch.set_num_threads(before)
    return names, said


def test_the_page_shows_all_that_the_notebook_has_for_it():
    assert list(FOUND) == INCLUDED
    pictures = re.findall(r"```\{figure\} _generated/([\w-]+)\.svg", PAGE)
    assert pictures == [name for name, _ in book.pictures(NOTEBOOK)]
    assert "```python" not in PAGE  # no code by hand
    assert "steps = 200 " in code("your-network-start")


def test_the_code_runs_and_answers(ran):
    names, said = ran
    for name, layers in (
        ("your-network-cnn", ["0", "4", "6"]),
        ("your-network-gaussian", ["0", "2"]),
        ("your-network-head", ["0", "2"]),
        ("your-network-dict", ["model.tokens", "model.places", "model.classifier"]),
    ):
        rows = [line.split()[0] for line in said[name].splitlines() if line[-2:] in ("Î₁", "Î₂")]
        assert {*layers} <= {*rows}, name
        assert "labels per input are enough" in said[name]
        assert "all exact" in said[name]
    assert "GaussianHead outputs" in said["your-network-head"]
    assert sum(bool(ax.get_title()) for ax in names["figure"].axes) == 6


def test_the_reference_shows_the_table_of_today(ran):
    """The page explains its columns, and shows what the committed run printed."""
    shown = excerpts.read(ROOT / "data/reference/your-network/notebook.ipynb", executed=True)
    for name, text in ran[1].items():
        titles, there = (
            [line.split() for line in t.splitlines() if line.startswith(("layer ", "of "))]
            for t in (text, shown[name].rpartition("```text")[2])
        )
        assert titles == there, name


def test_from_a_network_to_an_answer_takes_less_than_15_lines():
    for name in ("your-network-cnn", "your-network-gaussian", "your-network-head"):
        assert len(code(name).splitlines()) < 15
    network, answer = code("your-network-dict").split("found = ")
    assert len(answer.splitlines()) < 5
    assert "class OneTensor" in network


def test_the_wrapper_changes_nothing(ran):
    names, _ = ran
    reader, batch = names["reader"], names["batch"]
    direct = reader.model(**{key: value[:5] for key, value in batch.items()}).logits
    assert torch.equal(reader(names["x"][:5]), direct)


def test_what_is_masked_does_not_matter(ran):
    """Else the example would be none of a module with a mask."""
    names, _ = ran
    ids, mask = names["x"][:20].unbind(1)
    other = torch.where(mask == 0, 9, ids)
    assert (mask == 0).any()
    reader = names["reader"].model
    torch.testing.assert_close(
        reader(input_ids=other, attention_mask=mask).logits,
        reader(input_ids=ids, attention_mask=mask).logits,
    )


def test_commands_on_the_page_are_known():
    from fimlib.__main__ import estimate_parser, parser

    commands = re.findall(r"^python -m fimlib (.*)$", PAGE, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        first, *others = words = command.split()
        if first == "estimate":
            estimate_parser().parse_args(others)
        else:
            parser().parse_args(words)


def notebook(path, *cells):
    made = nbformat.v4.new_notebook()
    for tag, source, *outputs in cells:
        cell = nbformat.v4.new_code_cell(source, outputs=outputs, metadata={"tags": ["x", tag]})
        made.cells.append(cell)
    nbformat.write(made, path)
    return path


def test_excerpts_are_code_and_what_it_printed(tmp_path):
    printed = nbformat.v4.new_output("stream", name="stdout", text="1\n2\n")
    warned = nbformat.v4.new_output("stream", name="stderr", text="no\n")
    table = nbformat.v4.new_output("display_data", {"text/markdown": "| a |", "text/plain": "x"})
    path = notebook(
        tmp_path / "n.ipynb",
        ("excerpt:one", "a = 1"), ("other", "b = 2"), ("excerpt:one", "print(a)", warned, printed),
        ("excerpt:two", "c = 3"), ("table:three", "display()", table),
    )  # fmt: skip
    done = excerpts.read(path, executed=True)
    assert done == {
        "one": "```python\na = 1\n\nprint(a)\n```\n\n```text\n1\n2\n```\n",
        "two": "```python\nc = 3\n```\n\n",
        "three": "| a |\n",
    }
    promised = excerpts.read(path, executed=False)
    assert promised["three"] == excerpts.MISSING
    assert promised["two"] == "```python\nc = 3\n```\n\n" + excerpts.MISSING


def test_what_was_run_is_not_overwritten_by_a_promise(tmp_path):
    path = notebook(tmp_path / "n.ipynb", ("excerpt:one", "a = 1"))
    folder = tmp_path / "generated"
    folder.mkdir()
    assert excerpts.write(folder, path, executed=False) == ["one"]
    assert "Not run yet" in (folder / "one.md").read_text()
    excerpts.write(folder, path, executed=True)
    excerpts.write(folder, path, executed=False)
    assert (folder / "one.md").read_text() == "```python\na = 1\n```\n\n"
    assert excerpts.write(folder, tmp_path / "none.ipynb", executed=True) == []


@pytest.mark.parametrize("name", ["your-network", "recipes", "shortcuts"])
def test_a_page_shows_what_its_notebook_makes_and_nothing_else(name):
    """All of it is there before the run as well, so that the book can always be built."""
    page, source = (ROOT / "book" / f"{name}.md").read_text(), ROOT / "notebooks" / f"{name}.ipynb"
    assert source in [spec.notebook for spec in runs.specs().values()]
    included = re.findall(r"\{include\} _generated/([\w-]+)\.md", page)
    pictures = re.findall(r"\{figure\} _generated/([\w-]+)\.svg", page)
    assert sorted(included) == sorted(excerpts.read(source, executed=False))
    assert sorted(pictures) == sorted(picture for picture, _ in book.pictures(source))
