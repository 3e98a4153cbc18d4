"""``python -m fimlib``: the table of a saved network, and one line for every mistake."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import fimlib
from fimlib import _progress
from fimlib.__main__ import as_json, main

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
NETWORK = """\
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Sigmoid(), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2)
    )

network = build()
number = 3
softmax = torch.nn.Sequential(network, torch.nn.Softmax(dim=1))

def broken():
    return [1, 2]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a network and inputs in all forms, and importable."""
    name = f"network_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_progress, "SECONDS_BEFORE_PROGRESS", 1e9)  # no bar on a slow machine
    x = torch.linspace(-1, 1, 12).view(4, 3)
    torch.save(x, "x.pt")
    np.save("x.npy", x.double().numpy())
    np.savez("x.npz", x=x.numpy(), y=np.ones(4))
    np.savez("two.npz", a=x.numpy(), b=np.ones(4))
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    np.save("text.npy", np.array(["a"]))
    Path("empty.npy").touch()
    np.savez("empty.npz")
    Path("broken.npz").write_bytes(Path("x.npz").read_bytes()[:100])
    Path("wrong_code.py").write_text("def build(:\n")
    Path("folder.svg").mkdir()
    torch.save({"x": x}, "dict.pt")
    Path("x.csv").write_text("1,2,3\n")
    Path("damaged.pt").write_bytes(b"nothing")
    model = __import__(name).build()
    model[0].weight.data.mul_(3)
    torch.save(model.state_dict(), "state.pt")
    torch.save(model, "model.pt")
    return f"{name}:build", model.eval(), x


def printed(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("file", ["x.pt", "x.npy", "x.npz"])
def test_it_prints_what_summarise_finds(here, capsys, file):
    build, model, x = here
    text = printed(capsys, build, "--weights", "state.pt", "--inputs", file)
    assert text == f"{fimlib.summarise(model, x, fimlib.Categorical())}\n"
    assert text == printed(capsys, "model.pt", "--trust", "--inputs", file)


def test_every_option_arrives(here, capsys):
    build, model, x = here
    text = printed(
        capsys, build, "--weights", "state.pt", "--inputs", "x.pt", "--family", "gaussian-head",
        "--num-samples", "7", "--relative-error", "0.3", "--confidence", "0.8", "--layers", "3",
        "--engine", "traced", "--rule", "approximate",
    )  # fmt: skip
    expected = fimlib.summarise(
        model, x, fimlib.GaussianHead(), num_samples=7, relative_error=0.3, confidence=0.8,
        layers=["3"], engine="traced", rule="approximate",
    )  # fmt: skip
    assert text == f"{expected}\n"


def test_the_numbers_for_machines(here, capsys):
    build, model, x = here
    found = json.loads(
        printed(capsys, build, "--weights", "state.pt", "--inputs", "x.pt", "--json")
    )
    expected = fimlib.summarise(model, x, fimlib.Categorical())
    assert (found["family"], found["num_inputs"], found["engine"]) == (
        "Categorical", 4, "layerwise",
    )  # fmt: skip
    assert found["layers"] == [row._asdict() for row in expected.layers]
    endless = expected.layers[0]._replace(labels_needed_i1=float("inf"))
    [row] = as_json(dataclasses.replace(expected, layers=(endless,)))["layers"]
    assert row["labels_needed_i1"] is None


def test_a_network_may_stand_in_a_module(here, capsys):
    build, *_ = here
    name = build.partition(":")[0]
    text = printed(capsys, f"{name}:network", "--inputs", "x.pt")
    assert text == printed(capsys, build, "--inputs", "x.pt")


def test_whose_weights_they_are_is_said_where_none_were_given(here, capsys):
    build, *_ = here
    for given, is_said in (
        ([build], True),
        ([build, "--weights", "state.pt"], False),
        (["model.pt", "--trust"], False),
    ):
        assert main([*given, "--inputs", "x.pt"]) == 0
        assert ("without --weights" in capsys.readouterr().err) == is_said


def test_it_prints_and_saves_an_estimate(here, capsys):
    build, model, x = here
    asked = [build, "--weights", "state.pt", "--inputs", "x.pt", "--passes", "5", "--seed", "2"]
    found = fimlib.estimate(model, x, fimlib.Categorical(), passes=5, seed=2)
    text = printed(capsys, "estimate", *asked, "--output", "I.safetensors")
    assert text == f"{found}\n"
    assert re.search(
        r"^3 +10 +\S+ +\S+ +\S+$", text, re.MULTILINE
    )  # the layer 3 with 10 parameters
    saved = fimlib.load("I.safetensors", model)
    assert all(torch.equal(saved.value[n], found.value[n]) for n in found.value)
    told = json.loads(printed(capsys, "estimate", *asked, "--json", "--layers", "3"))
    assert told["passes"] == 5
    assert told["layers"]["3"]["relative_error"] > 0
    printed(capsys, "estimate", *asked, "--checkpoint", "c.safetensors")
    more = [*asked, "--checkpoint", "c.safetensors", "--passes", "9"]
    assert "from 9 passes" in printed(capsys, "estimate", *more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--passes", "1"], "passes must be an integer ≥ 2"),
        (["--output", "none/I"], "none/I cannot be written"),
        (["--checkpoint", "a", "--output", "./a"], "--output and --checkpoint need a file each"),
        (["--checkpoint", "x.pt"], "x.pt is no whole safetensors file"),
        (
            ["--estimator", "importance", "--family", "gaussian"],
            "batch 1: importance sampling needs classes",
        ),
    ],
)
def test_mistakes_of_an_estimate_are_one_line(here, capsys, more, words):
    build, *_ = here
    assert main(["estimate", build, "--weights", "state.pt", "--inputs", "x.pt", *more]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m fimlib: error: {words}")


def test_help_says_what_is_assumed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "gaussian has the identity as its covariance" in text
    assert "without it, the weights that build() gives" in text


def test_a_warning_is_one_line(here, capsys):
    build, *_ = here
    name = build.partition(":")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main([f"{name}:softmax", "--inputs", "x.pt", "--num-probes", "4"]) == 0
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("python -m fimlib: warning: the outputs look like probabilities")
    assert len(others) == 1  # on the weights


def test_it_draws(here, capsys):
    build, *_ = here
    printed(capsys, build, "--inputs", "x.pt", "--plot", "figure.svg")
    assert "<svg" in Path("figure.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.pt", "--inputs", "x.pt"], "Add --trust if you know where it comes from"),
        (["state.pt", "--trust", "--inputs", "x.pt"], "build --weights state.pt"),
        (["damaged.pt", "--trust", "--inputs", "x.pt"], "damaged.pt was not written by torch.save"),
        (["model.pt", "--trust", "--weights", "state.pt", "--inputs", "x.pt"], "has its weights"),
        (["nothing.pt", "--trust", "--inputs", "x.pt"], "there is no file nothing.pt"),
        (["no_such_module:build", "--inputs", "x.pt"], "No module named 'no_such_module'"),
        (["NAME:build_it", "--inputs", "x.pt"], "has no attribute 'build_it'"),
        (["NAME:broken", "--inputs", "x.pt"], "is a list, not a torch.nn.Module"),
        (["NAME:number", "--inputs", "x.pt"], "number is of type int: name a function without arg"),
        (["BUILD", "--inputs", "x.pt", "--weights", "model.pt"], "save a state_dict"),
        (["BUILD", "--inputs", "x.pt", "--weights", "x.pt"], "x.pt is a Tensor, no state_dict"),
        (["BUILD", "--inputs", "x.pt", "--weights", "dict.pt"], "Missing key(s) in state_dict"),
        (["BUILD", "--inputs", "y.pt"], "No such file"),
        (["BUILD", "--inputs", "x.csv"], "inputs are a .pt, .npy or .npz file"),
        (["BUILD", "--inputs", "two.npz"], "two.npz holds a, b: keep one array, or name it x"),
        (["BUILD", "--inputs", "objects.npy"], "objects.npy holds no plain array of numbers"),
        (["BUILD", "--inputs", "text.npy"], "text.npy holds <U1, no numbers that torch takes"),
        (["BUILD", "--inputs", "dict.pt"], "dict.pt holds a dict: save one tensor"),
        (["BUILD", "--inputs", "model.pt"], "may hold other objects, which would run code"),
        (["BUILD", "--inputs", "x.pt", "--layers", "9"], "no layer '9' with parameters"),
        (["BUILD", "--inputs", "x.pt", "--num-samples", "0"], "must be an integer ≥ 1"),
        (["BUILD", "--inputs", "empty.npy"], "empty.npy holds no plain array of numbers: "),
        (["BUILD", "--inputs", "empty.npz"], "empty.npz holds nothing: keep one array"),
        (["BUILD", "--inputs", "broken.npz"], "broken.npz holds no plain array of numbers: "),
        (["wrong_code:build", "--inputs", "x.pt"], "SyntaxError: invalid syntax (wrong_code.py, "),
        (["BUILD", "--inputs", "x.pt", "--plot", "no/such.svg"], "there is no such folder"),
        (["BUILD", "--inputs", "x.pt", "--plot", "folder.svg"], "cannot be written"),
        (["BUILD", "--inputs", "x.pt", "--plot", "a.xyz"], "an ending such as .svg, .png or .pdf"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(here, capsys, arguments, message):
    build, name = here[0], here[0].partition(":")[0]
    given = [a.replace("BUILD", build).replace("NAME", name) for a in arguments]
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m fimlib: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_plot_that_cannot_be_saved_is_noticed_before_anything_is_computed(here, monkeypatch):
    monkeypatch.setattr("fimlib.__main__.summarise", None)
    assert main([here[0], "--inputs", "x.pt", "--plot", "no/such.svg"]) == 2


def test_the_table_survives_a_plot_that_fails(here, capsys, monkeypatch):
    def fail(_summary):
        raise RuntimeError("no figure today")

    monkeypatch.setattr(fimlib.Summary, "plot", fail)
    assert main([here[0], "--inputs", "x.pt", "--plot", "a.svg"]) == 2
    out, err = capsys.readouterr()
    assert "4 inputs, Categorical outputs" in out
    assert "RuntimeError: no figure today" in err


def test_a_file_without_trust_is_never_unpickled(here, capsys, tmp_path):
    """Code in a pickle does not run, be it given as network, weights or inputs."""
    build, *_ = here

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save(Evil(), "evil.pt")
    for arguments in (
        ["evil.pt", "--inputs", "x.pt"],
        [build, "--inputs", "evil.pt"],
        [build, "--weights", "evil.pt", "--inputs", "x.pt"],
    ):
        assert main(arguments) == 2
        assert not (tmp_path / "ran").exists()
    assert main(["evil.pt", "--trust", "--inputs", "x.pt"]) == 2  # it is no module, and it ran
    assert (tmp_path / "ran").exists()
    capsys.readouterr()


def test_a_reader_that_leaves_early_is_no_error(here):
    command = [sys.executable, "-m", "fimlib", here[0], "--inputs", "x.pt"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0
    assert "BrokenPipe" not in errors


def test_as_a_command(here):
    """In a process of its own, on a terminal that knows ASCII only."""
    build, *_ = here
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    environment["TQDM_DISABLE"] = "1"  # a slow machine would draw a bar
    command = [sys.executable, "-m", "fimlib", build, "--inputs"]
    good, bad = (
        subprocess.run(
            [*command, file], capture_output=True, text=True, env=environment, check=False
        )
        for file in ("x.pt", "nothing.npy")
    )
    assert good.returncode == 0, good.stderr
    assert "4 inputs, Categorical outputs" in good.stdout
    assert good.stderr == (
        f"python -m fimlib: note: without --weights, these are the weights that {build} gives.\n"
    )
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.startswith("python -m fimlib: error: FileNotFoundError: ")
    assert "Traceback" not in bad.stderr


SLOW_TO_IMPORT = ("torch._dynamo", "sympy", "scipy.stats")
FIRST_CALL = """
import sys, torch, fimlib
net = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
fimlib.accumulate(net.eval(), torch.rand(20, 1, 4), fimlib.Categorical(), quantities=["I"])
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""


def test_the_first_call_of_a_process_imports_nothing_slow():
    command = [sys.executable, "-c", FIRST_CALL, *SLOW_TO_IMPORT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
