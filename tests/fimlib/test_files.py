"""An estimate in a file: whole or not there, for the model it fits; passes go on after a stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from strategies import inputs, mlp
from torch import nn
from torch.utils.data import DataLoader

import fimlib
from fimlib import _files, estimates
from fimlib.estimates import merged
from fimlib.families import Heads

pytestmark = pytest.mark.long

FAMILY = fimlib.Categorical()


def network():
    return mlp([4, 5, 3], nn.Sigmoid)


def ask(net=None, x=None, family=FAMILY, **options):
    x = inputs(12, 4) if x is None else x
    options = {"passes": 6, "batch_size": 5, **options}
    return fimlib.estimate(network() if net is None else net, x, family, **options)


def numbers(found):
    """Everything in an estimate, for comparison by ==."""
    tensors = {"value": found.value, "standard_error": found.standard_error}
    plain = {n: v for n, v in vars(found).items() if n not in tensors}
    return plain, {k: {n: t.tolist() for n, t in D.items()} for k, D in tensors.items()}


# Saved and loaded.


def test_what_is_loaded_is_what_was_saved(tmp_path):
    found = ask()
    found.save(tmp_path / "I.safetensors")
    for model in (None, network()):
        again = fimlib.load(tmp_path / "I.safetensors", model)
        assert numbers(again) == numbers(found)
        assert list(again.value) == list(found.value)
    assert os.listdir(tmp_path) == ["I.safetensors"]


def test_others_can_read_the_file(tmp_path):
    found = ask()
    found.save(tmp_path / "I.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "I.safetensors")
    assert torch.equal(tensors["value/0.weight"], found.value["0.weight"])
    assert torch.equal(tensors["standard_error/2.bias"], found.standard_error["2.bias"])
    with safetensors.safe_open(tmp_path / "I.safetensors", "pt") as file:
        told = json.loads(file.metadata()["estimate"])
    assert told["passes"] == 6
    assert told["origin"]["torch"] == torch.__version__
    assert told["origin"]["fimlib"] == fimlib.__version__


def other_format(path, notes):
    safetensors.torch.save_file({"a": torch.ones(1)}, path, notes)


def truncated(path):
    ask().save(path)
    path.write_bytes(path.read_bytes()[:-8])


NO_ESTIMATES = {
    "missing": (Path, "there is no file"),
    "text": (lambda path: path.write_text("no tensors"), "no whole safetensors file"),
    "truncated": (truncated, "no whole safetensors file"),
    "another file": (lambda path: other_format(path, None), "something else"),
    "another version": (
        lambda path: other_format(path, {"format": "fimlib estimate, format 9", "fimlib": "7.1"}),
        "format 9.*use the version that wrote it, 7.1",
    ),
    "checkpoint": (lambda path: ask(checkpoint=path), "is a checkpoint: pass it to"),
}


@pytest.mark.parametrize("kind", NO_ESTIMATES)
def test_what_is_no_estimate_is_refused(kind, tmp_path):
    make, words = NO_ESTIMATES[kind]
    make(tmp_path / "file")
    with pytest.raises(ValueError, match=words):
        fimlib.load(tmp_path / "file")


def test_another_model_is_refused_and_other_weights_are_told(tmp_path):
    ask().save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"'0.weight' is \[5, 4\] in the file, and \[5, 6\] there"):
        fimlib.load(tmp_path / "file", mlp([6, 5, 3], nn.Sigmoid))
    with pytest.raises(ValueError, match="'0.weight' .*missing there"):
        fimlib.load(tmp_path / "file", nn.Linear(4, 3))
    net = network()
    net[0].weight.data[0, 0] += 1
    with pytest.warns(UserWarning, match="at other weights or buffers of this model"):
        fimlib.load(tmp_path / "file", net)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_the_one_inside(tmp_path):
    ask().save(tmp_path / "file")
    loaded = fimlib.load(tmp_path / "file", torch.compile(network()))
    assert loaded.passes == 6
    with pytest.raises(TypeError, match="must be an nn.Module"):
        fimlib.load(tmp_path / "file", "model")


def test_others_may_read_the_file(tmp_path):
    ask().save(tmp_path / "file")
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    found = ask()
    found.save(tmp_path / "file")
    before = (tmp_path / "file").read_bytes()

    def half(_tensors, path, _notes):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="no space"):
        found.save(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["save", "checkpoint"])
def test_a_path_that_cannot_be_written_is_said_at_once(call, tmp_path):
    for path in (tmp_path / "no" / "file", tmp_path):
        with pytest.raises(ValueError, match="cannot be written .*give the path of a file"):
            ask().save(path) if call == "save" else ask(checkpoint=path)


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (
        lambda: ask().save(tmp_path / "file"),
        lambda: ask(checkpoint=tmp_path / "file"),
        lambda: fimlib.load(tmp_path / "file"),
    ):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call()


# Checkpoints.


class Shared(list):
    """The same list in every copy."""

    def __deepcopy__(self, memo):
        return self


class Stops(nn.Module):
    """A network that raises an error at a call."""

    def __init__(self, at, error):
        super().__init__()
        self.net, self.left, self.error = network(), Shared([at]), error

    def forward(self, x):
        self.left[0] -= 1
        if self.left[0] == 0:
            raise self.error
        return self.net(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"squares": "input"}, {"estimator": "importance"}, {"layers": ["2"]}],
    ids=str,
)
def test_what_goes_on_ends_at_the_same_numbers(options, tmp_path):
    whole = ask(**options)
    ask(checkpoint=tmp_path / "file", **options | {"passes": 2})
    assert ask(checkpoint=tmp_path / "file", **options | {"passes": 4}).passes == 4
    assert numbers(ask(checkpoint=tmp_path / "file", **options)) == numbers(whole)
    assert numbers(ask(checkpoint=tmp_path / "file", **options)) == numbers(whole)  # no new pass
    assert os.listdir(tmp_path) == ["file"]


def test_a_batch_of_any_kind_goes_on_as_well(tmp_path):
    batches = [{"x": part} for part in inputs(12, 4).split(5)]
    forward = lambda net, batch: net(batch["x"])  # noqa: E731
    whole = ask(x=batches, forward=forward)
    ask(x=batches, forward=forward, checkpoint=tmp_path / "file", passes=3)
    found = ask(x=batches, forward=forward, checkpoint=tmp_path / "file")
    assert numbers(found) == numbers(whole)
    assert whole.origin["data"] == ask().origin["data"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_stop_loses_no_pass(error, tmp_path):
    whole = ask(Stops(-1, error), passes=40)
    is_error = isinstance(error, RuntimeError)
    stopped = (
        pytest.raises(ValueError, match="memory") if is_error else pytest.warns(match="interrupted")
    )
    with stopped:
        ask(Stops(100, error), passes=40, checkpoint=tmp_path / "file")
    saved = safetensors.torch.load_file(tmp_path / "file")["sums/net.0"]
    assert 2 < len(saved) < 40
    found = ask(Stops(-1, error), passes=40, checkpoint=tmp_path / "file")
    assert numbers(found) == numbers(whole)
    assert list(found.value) == list(whole.value)


LONG = """\
import sys, torch, fimlib
from fimlib import projections
projections.SECONDS_BETWEEN_CHECKPOINTS = 0.0
torch.manual_seed(0)
net = torch.nn.Linear(4, 3)
x = torch.linspace(-1, 1, 48).view(12, 4)
found = fimlib.estimate(net, x, fimlib.Categorical(), passes=int(sys.argv[1]), checkpoint="file")
print(found.passes, found.value["weight"].tolist())
"""


def test_a_process_that_is_killed_goes_on(tmp_path):
    command = [sys.executable, "-c", LONG]
    root = str(Path(fimlib.__file__).parents[1])
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": root}}
    with subprocess.Popen([*command, "1000000"], **options) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "file").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
    passes = len(safetensors.torch.load_file(tmp_path / "file")["sums/"])
    more = [*command, str(passes + 5)]
    outputs = [subprocess.check_output(more, **options)]
    (tmp_path / "file").unlink()
    outputs.append(subprocess.check_output(more, **options))
    assert outputs[0] == outputs[1]
    assert outputs[0].split()[0] == str(passes + 5).encode()


def other_weights():
    net = network()
    net[0].bias.data[0] += 1
    return net


OTHERS = {
    "model": {"net": other_weights()},
    "seed": {"seed": 1},
    "estimator": {"estimator": "labels"},
    "squares": {"squares": "input"},
    "parameters": {"layers": ["2"]},
    "family": {"family": fimlib.Gaussian(torch.eye(3))},
    "batch_size": {"batch_size": 4},
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_checkpoint_of_another_estimate_is_refused(what, tmp_path):
    ask(checkpoint=tmp_path / "file")
    with pytest.raises(ValueError, match=f"with another {what}: give another path"):
        ask(checkpoint=tmp_path / "file", **OTHERS[what])


def test_an_estimate_is_no_checkpoint(tmp_path):
    ask().save(tmp_path / "file")
    with pytest.raises(ValueError, match="is an estimate, no checkpoint"):
        ask(checkpoint=tmp_path / "file")


@pytest.mark.parametrize("passes", [6, 8])  # none are left, or some
def test_other_inputs_are_refused_and_leave_no_trace(passes, tmp_path):
    ask(checkpoint=tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    for x in (inputs(11, 4), inputs(12, 4) + 1e-9, inputs(12, 4).flip(1)):
        with pytest.raises(ValueError, match="of another estimate, with another data"):
            ask(x=x, checkpoint=tmp_path / "file", passes=passes)
    assert (tmp_path / "file").read_bytes() == before


def test_another_forward_pass_is_refused(tmp_path):
    """With the same weights, and the same inputs."""
    batches = [{"x": part} for part in inputs(12, 4).split(5)]
    options = {"x": batches, "checkpoint": tmp_path / "file"}
    ask(forward=lambda net, batch: net(batch["x"]), **options)
    with pytest.raises(ValueError, match="with another forward pass"):
        ask(forward=lambda net, batch: net(2 * batch["x"]), **options)
    other = nn.Sequential(network()[0], nn.Tanh(), network()[2])
    ask(checkpoint=tmp_path / "other")
    with pytest.raises(ValueError, match="with another forward pass"):
        ask(other, checkpoint=tmp_path / "other")


def test_the_order_of_heads_counts(tmp_path):
    heads = {"a": (FAMILY, 2), "b": (fimlib.Gaussian(torch.eye(1)), 1)}
    ask(family=Heads(heads), checkpoint=tmp_path / "file")
    other = Heads({"b": heads["b"], "a": heads["a"]})
    with pytest.raises(ValueError, match="with another family"):
        ask(family=other, checkpoint=tmp_path / "file")


def test_a_signal_in_the_middle_of_a_pass_waits(tmp_path, monkeypatch):
    whole, real, left = ask(passes=8), estimates.layer_of, [20]

    def layer_of(name):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return real(name)

    monkeypatch.setattr(estimates, "layer_of", layer_of)
    with pytest.warns(match="interrupted: this estimate rests on 5 of 8 passes"):
        assert ask(passes=8, checkpoint=tmp_path / "file").passes == 5
    monkeypatch.undo()
    saved = safetensors.torch.load_file(tmp_path / "file")["sums/0"]
    assert len(saved) == 5
    assert numbers(ask(passes=8, checkpoint=tmp_path / "file")) == numbers(whole)


def test_a_full_disk_costs_the_file_and_not_the_estimate(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    whole = ask()
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.warns(UserWarning, match="cannot be written now: no space left"):
        assert numbers(ask(checkpoint=tmp_path / "file")) == numbers(whole)


def test_inputs_in_another_order_are_the_same(tmp_path):
    x = inputs(12, 4)
    shuffled = DataLoader(x, 5, shuffle=True, generator=torch.Generator())
    for passes in (3, 8):
        found = ask(x=shuffled, checkpoint=tmp_path / "file", passes=passes)
    assert (
        found.origin["data"] == ask(batch_size=12).origin["data"] == ask(x=x.flip(0)).origin["data"]
    )
    assert found.origin["data"] != ask(x=x + 1e-15).origin["data"]


# Checksums.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.int64])
def test_a_checksum_sees_every_number(dtype):
    t = torch.ones(3, 2).to(dtype)

    def checksum(*tensors):
        digest = _files.DataDigest()
        digest.add(tensors)
        return str(digest)

    other = t.clone()
    other[2, 1] = 0
    assert checksum(t) == checksum(t.clone().T.contiguous().T) != checksum(other)
    assert checksum(t, t) != checksum(t)
    assert checksum(t[:2]) != checksum(t[:0])  # equal rows count
    model = nn.Linear(2, 2)
    model.register_buffer("t", t)
    before = _files.model_digest(model)
    model.t = other
    assert _files.model_digest(model) != before


@pytest.mark.parametrize(
    "buffer",
    [
        torch.empty(0, 3),
        torch.tensor(1.0),
        torch.eye(2).to_sparse(),
        torch.ones(3, dtype=torch.cfloat).conj(),
        torch.ones(3, dtype=torch.cfloat).imag.neg(),
        torch.empty(2, device="meta"),
        torch.ones(2, dtype=torch.bool),
    ],
    ids=str,
)
def test_a_checksum_takes_every_tensor(buffer):
    model = nn.Linear(2, 2)
    model.register_buffer("b", buffer)
    assert len(_files.model_digest(model)) == 64


def test_a_wider_type_has_the_same_checksum():
    model = nn.Linear(2, 2).bfloat16()
    assert _files.model_digest(model) == _files.model_digest(model.float())


# Merged.


def test_the_merged_estimate_is_that_of_all_inputs():
    net, x = network(), inputs(12, 4)
    parts = [ask(net, part, passes=64, seed=i) for i, part in enumerate((x[:4], x[4:]))]
    found = merged(*parts)
    exact = fimlib.fisher_information(fimlib.differentiate(net, x), FAMILY).mean_over_inputs()
    assert found.num_inputs == 12
    assert found.origin["data"] == ask(net, x).origin["data"]
    for name, value in found.value.items():
        a, b = parts[0].value[name], parts[1].value[name]
        torch.testing.assert_close(value, (4 * a + 8 * b) / 12)
        a, b = parts[0].standard_error[name], parts[1].standard_error[name]
        torch.testing.assert_close(
            found.standard_error[name], ((4 * a) ** 2 + (8 * b) ** 2).sqrt() / 12
        )
        assert ((value - exact[name]).abs() <= 6 * found.standard_error[name]).all()
    for layer, (total, spread, _) in found.layers.items():
        right = sum(float(v.sum()) for n, v in exact.items() if n.startswith(layer))
        assert abs(total - right) <= 5 * spread
    assert found.relative_error < max(part.relative_error for part in parts)


def test_estimates_of_different_things_are_not_merged():
    one = ask()
    for other, words in (
        (ask(), "same random vectors"),
        (ask(layers=["2"]), "different parameters"),
        (ask(estimator="labels"), "different estimator"),
        (ask(squares="input"), "different squares"),
        (ask(other_weights()), "different model"),
        (ask(family=fimlib.Gaussian()), "different family"),
    ):
        with pytest.raises(ValueError, match=words):
            merged(one, other)
