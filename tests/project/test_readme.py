"""The README: two commands, a true picture, messages that exist, links that lead somewhere."""

import inspect
import json
import re
import shutil
from types import SimpleNamespace

import matplotlib as mpl
import nbclient
import pytest
import torch
from jupyter_client.kernelspec import NoSuchKernel
from support import reference, report, results
from torch import nn

ROOT = results.ROOT
TEXT = (ROOT / "README.md").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def section(title):
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_there_are_two_commands():
    [block] = re.findall(r"```sh\n(.*?)```", section("Two commands"), re.DOTALL)
    assert [line.partition("#")[0].strip() for line in block.splitlines()] == [
        "make reproduce",
        "make test",
    ]
    assert "Two commands: make reproduce, make test." in MAKEFILE


@pytest.mark.skipif(
    f"matplotlib=={mpl.__version__}\n" not in (ROOT / "requirements.txt").read_text("utf-8"),
    reason="another matplotlib draws other bytes",
)
def test_the_picture_is_what_the_reference_gives(tmp_path):
    reference.draw(tmp_path / "drawn.svg")
    assert (tmp_path / "drawn.svg").read_bytes() == reference.PICTURE.read_bytes(), (
        "python -m support.reference --picture"
    )


def test_another_reference_gives_another_picture(tmp_path):
    run = tmp_path / "reference" / reference.SHOWN
    shutil.copytree(report.REFERENCE / reference.SHOWN, run)
    values = (run / "values.csv").read_text("utf-8")
    first = re.search(r"^(.*,1,1,V2,)(\S+)$", values, re.MULTILINE)
    (run / "values.csv").write_text(values.replace(first[0], f"{first[1]}1.0"))
    made = json.loads((run / "record.json").read_text())
    made["files"] = results.file_digests(run)
    results.save(run, None, made)
    reference.draw(tmp_path / "drawn.svg", tmp_path / "reference")
    assert (tmp_path / "drawn.svg").read_bytes() != reference.PICTURE.read_bytes()


def test_the_picture_is_shown_and_small():
    assert "](data/figure-1.svg)" in TEXT
    assert 10_000 < reference.PICTURE.stat().st_size < 200_000
    assert "seed 0" in TEXT
    assert reference.SHOWN == "sigmoid-seed-0"


# Messages of other programs: Python, jupyter_client, torch, nbclient.
FOREIGN = {
    "No module named 'fimlib'", "No module named 'support'", "No such kernel named python3",
    "CUDA out of memory",
}  # fmt: skip


def test_messages_of_the_table_exist():
    rows = re.findall(r"^\| `(.+?)` \|", section("If something goes wrong"), re.MULTILINE)
    assert len(rows) >= 12
    code = MAKEFILE + "".join(p.read_text("utf-8") for p in (ROOT / "notebooks").rglob("*.py"))
    assert {message for message in rows if message not in code} == FOREIGN
    assert str(NoSuchKernel("python3")) in FOREIGN
    assert '"Kernel died' in inspect.getsource(nbclient.client)


def test_what_it_names_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"(?:`|^)make (?:-j ?\d+ )?([a-z-]+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
    for path in re.findall(r"`((?:notebooks|book|data|tests)/[\w./-]*)`", TEXT):
        made = ("book/_build", "data/mnist", "notebooks/forks.yml")
        assert (ROOT / path).exists() or path.startswith(made), path


def test_the_example_runs(capsys):
    first, second, third = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    torch.manual_seed(0)
    exec(first + second, names)
    assert names["found"].relative_error <= 0.25  # 50 passes are enough, and estimate their error
    assert re.match(r"layer 0: I = .*\nlayer 2: I = .*sd of Î₂ 0.0e\+00\n", capsys.readouterr().out)
    assert "50257" in third
    exec(third.replace("50257", "7"), names | language_model())


def language_model():
    """A tiny one with a frozen table, called as those of transformers are, and two texts."""
    model = nn.Sequential(nn.Embedding(7, 4).requires_grad_(False), nn.Linear(4, 7)).eval()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = model

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=self.inside(input_ids * attention_mask))

    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    return {"gpt": Model().eval(), "texts": [{"input_ids": ids, "attention_mask": ids.sign()}]}
