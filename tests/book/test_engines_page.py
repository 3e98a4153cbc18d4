"""The code of the page on engines runs as it stands there."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "book" / "engines.md"


@pytest.mark.long
def test_the_code_on_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["found"].engine == "traced"
    said = capsys.readouterr().out
    assert "J and S by engine 'traced': " in said
    assert said.count("±") == 2
    assert names["joint"].count == 64


def test_the_table_names_every_engine():
    from fimlib.engines.choose import ENGINES

    table = PAGE.read_text().split("## Ask first")[0]
    for engine in ENGINES:
        assert f"`{engine}`" in table, engine
    assert set(re.findall(r"^\| `([\w-]+)`", table, flags=re.MULTILINE)) <= set(ENGINES)


def test_the_supported_layers_are_layers_and_engines():
    from torch import nn

    from fimlib.engines.choose import ENGINES

    table = PAGE.read_text().partition("## Supported layers\n")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:-1] for row in table.splitlines() if row.startswith("| ")][2:]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert {"BatchNorm2d", "Conv2d", "LSTM", "MultiheadAttention"} <= set(names)
    assert all(hasattr(nn, name) for name in names)
    assert {row[-1].strip(" `") for row in rows} <= {*ENGINES, "none"}


@pytest.mark.parametrize("name", ["plan", "accumulate", "all_reduce", "hutchinson_variance_i2"])
def test_what_the_page_calls_is_public(name):
    import fimlib

    assert f"fimlib.{name}(" in PAGE.read_text()
    assert name in fimlib.__all__
