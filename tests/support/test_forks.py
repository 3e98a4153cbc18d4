"""Forks: copied, changed, run on digits at a tiny size, and compared with their originals."""

import copy

import nbformat
import pytest
import yaml
from support import book, comparison, forks, report, results, runs

SIZE = {"epochs": 1, "train_limit": 100, "num_samples": 20, "hidden": [6, 5]}
CNN = """def build_model(pixels, num_classes):
    side = int(pixels**0.5)
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 2, 3, stride=2),
        training.named(nn, activation)(),
        nn.Flatten(),
        nn.Linear(2 * ((side - 1) // 2) ** 2, num_classes),
    )
"""


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A folder of notebooks in place of the project's, with a run of `mnist.ipynb`."""
    return pretend(tmp_path, monkeypatch)


def pretend(folder, monkeypatch):
    folder = folder / "notebooks"
    folder.mkdir()
    for name in ("mnist", "checks"):
        text = (runs.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
        (folder / f"{name}.ipynb").write_text(text, encoding="utf-8")
    (folder / "support").symlink_to(results.ROOT / "notebooks" / "support")
    spec = runs.Spec("first", "The first", folder / "mnist.ipynb", SIZE | {"seed": 0}, "first")
    monkeypatch.setattr(
        runs, "specs", lambda section="runs", **_: {"first": spec} if section == "runs" else {}
    )
    for module in (runs, forks):
        monkeypatch.setattr(module, "NOTEBOOKS", folder)
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The first run, an unchanged fork of it, and a convolutional one; executed on digits."""
    folder = tmp_path_factory.mktemp("forks")
    with pytest.MonkeyPatch.context() as patch:
        notebooks = pretend(folder, patch)
        for name in ("same", "cnn"):
            forks.new(name, "mnist")
            forks.set_parameters(name, " ".join(f"{k}={v}" for k, v in SIZE.items()))
        notebook = nbformat.read(notebooks / "cnn.ipynb", as_version=4)
        [cell] = [c for c in notebook.cells if c.source.startswith(forks.MARK)]
        cell.source = forks.MARK + CNN
        nbformat.write(notebook, notebooks / "cnn.ipynb")
        forks.set_parameters("cnn", "activation=tanh")
        for name in ("first", "same", "cnn"):
            forks.run(name, folder / "results", "digits")
        patch.setattr(report, "REFERENCE", folder / "nowhere")
        yield results.load(folder / "results")


def test_a_fork_is_a_copy_with_a_marked_cell(notebooks):
    path = forks.new("mynet", "mnist")
    old, new = (nbformat.read(notebooks / f"{n}.ipynb", as_version=4) for n in ("mnist", "mynet"))
    different = [(a.source, b.source) for a, b in zip(old.cells, new.cells, strict=True) if a != b]
    (title, new_title), (model, marked) = different
    assert new_title == title.replace("# The MNIST experiment", "# mynet, a fork of mnist.ipynb")
    assert marked == forks.MARK + model
    assert model.startswith("def build_model")
    assert yaml.safe_load((notebooks / "forks.yml").read_text()) == {
        "mynet": {
            "notebook": "mynet.ipynb",
            "from": "mnist.ipynb",
            "title": "mynet, a fork of mnist.ipynb",
            "parameters": {},
        }
    }
    assert path == notebooks / "mynet.ipynb"
    forks.new("again", "mynet.ipynb")
    assert nbformat.read(notebooks / "again.ipynb", as_version=4).cells[1:] == new.cells[1:]
    assert set(forks.specs()) == {"mynet", "again"}


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("mnist", "mnist", "already a notebook or a run named mnist"),
        ("first", "mnist", "already a notebook or a run named first"),
        ("mynet", "nothing", "there is no notebook nothing.ipynb; there are: checks.ipynb, mnist"),
        ("my net", "mnist", "'my net' is no name for a fork"),
        ("../mynet", "mnist", "is no name for a fork"),
        ("", "mnist", "is no name for a fork"),
    ],
)
def test_what_cannot_be_forked(notebooks, capsys, name, source, message):
    before = {path: path.read_bytes() for path in notebooks.glob("*.*")}
    assert forks.main(["new", name, "--source", source]) == 1
    assert message in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in notebooks.glob("*.*")}


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("other", "", "no fork and no run named 'other'. Forks: mynet. Runs: first"),
        ("mynet", "epoch=5", "mynet.ipynb has no parameter epoch; there are: activation, "),
        ("mynet", "epochs", "PARAMS: 'epochs' does not read name=value"),
        ("mynet", "epochs=", "PARAMS: 'epochs=' does not read name=value"),
        ("mynet", "epochs=many", "PARAMS: epochs is 20 in the notebook; 'many' does not suit"),
        ("mynet", "hidden=[3, 4", "does not read name=value"),
        ("mynet", "epochs=1 epochs=2", "PARAMS: epochs is given twice"),
        ("mynet", "epochs=-1", "PARAMS: epochs must not be negative, but is -1"),
        ("mynet", "dataset=digits", "the parameter dataset is chosen by `make … DATASET=`"),
        ("first", "epochs=5", "first is a run of runs.yml"),
    ],
)
def test_what_cannot_be_run(notebooks, tmp_path, capsys, name, parameters, message):
    forks.new("mynet", "mnist")
    before = (notebooks / "forks.yml").read_bytes()
    arguments = ["run", name, "--parameters", parameters, "--results", str(tmp_path / "results")]
    assert forks.main([*arguments, "--dataset", "digits"]) == 1
    assert message in capsys.readouterr().err
    assert (notebooks / "forks.yml").read_bytes() == before
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("notebooks")
def test_parameters_that_fail_are_not_kept(tmp_path, monkeypatch):
    made = []

    def execute(spec, *_):
        made.append(spec.parameters)
        if spec.parameters.get("activation") == "Tanhh" or spec.name == "first":
            raise runs.RunError(f"{spec.name}: a cell failed")

    forks.new("mynet", "mnist")
    monkeypatch.setattr(runs, "execute", execute)
    forks.run("mynet", tmp_path, "digits", given="epochs=5")
    with pytest.raises(runs.RunError, match=r"failed\nThe values in PARAMS are not kept.\nmynet k"):
        forks.run("mynet", tmp_path, "digits", given="activation=Tanhh")
    assert made[-1] == {"epochs": 5, "activation": "Tanhh"}
    forks.run("mynet", tmp_path, "digits")
    assert made[-1] == {"epochs": 5}
    forks.run("mynet", tmp_path, "digits", given="defaults seed=3")
    assert made[-1] == {"seed": 3}
    forks.run("mynet", tmp_path, "digits", given="defaults")
    assert made[-1] == forks.read()["mynet"]["parameters"] == {}
    with pytest.raises(runs.RunError, match="failed$"):
        forks.run("first", tmp_path, "digits")


@pytest.mark.usefixtures("notebooks")
def test_kept_parameters_are_named_with_a_way_to_forget_them(tmp_path, monkeypatch):
    def fail(*_):
        raise runs.RunError("a cell failed")

    forks.new("mynet", "mnist")
    forks.set_parameters("mynet", "epochs=5")
    monkeypatch.setattr(runs, "execute", fail)
    with pytest.raises(runs.RunError, match=r"mynet keeps .* epochs=5. PARAMS=defaults forgets"):
        forks.run("mynet", tmp_path, "digits")


@pytest.mark.usefixtures("notebooks")
def test_parameters_are_kept():
    forks.new("mynet", "mnist")
    forks.set_parameters("mynet", "activation=tanh  hidden=[64, 32] learning_rate=1e-2 seed=0")
    expected = {"activation": "tanh", "hidden": [64, 32], "learning_rate": 0.01}
    assert forks.read()["mynet"]["parameters"] == expected  # seed 0 is the notebook's own
    forks.set_parameters("mynet", "activation=Sigmoid learning_rate=1 input_index=7")
    expected = {"hidden": [64, 32], "learning_rate": 1.0, "input_index": 7}
    assert forks.specs()["mynet"].parameters == expected


ENTRY = "{notebook: a.ipynb, from: mnist.ipynb, title: A, parameters: {}}"


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "mynet: {notebook: a.ipynb}",
        "a: [",
        "mynet: 1",
        f"5: {ENTRY}",
        f"../../x: {ENTRY}",
        f"mynet: {ENTRY.replace('a.ipynb', '../a.ipynb')}",
        f"mynet: {ENTRY.replace('mnist.ipynb', '3')}",
        f"mynet: {ENTRY.replace('title: A', 'title: 7')}",
        f"mynet: {ENTRY.replace('{}', '[a]')}",
    ],
)
def test_a_damaged_file_is_named(notebooks, text):
    (notebooks / "forks.yml").write_text(text)
    with pytest.raises(runs.RunError, match=r"forks.yml"):
        forks.specs()


def test_parameters_may_be_empty(notebooks):
    (notebooks / "forks.yml").write_text(f"mynet: {ENTRY.replace('{}', '')}")
    assert forks.specs()["mynet"].parameters == {}


def test_a_fork_of_a_fork_is_small_at_smoke_size_and_has_an_original(notebooks, monkeypatch):
    small = {"smoke": {"parameters": {"mnist.ipynb": {"epochs": 1}}}}
    monkeypatch.setattr(runs, "read_plan", lambda _path: small)
    forks.new("child", "mnist")
    forks.new("grandchild", "child")
    assert forks.specs(smoke=True)["grandchild"].parameters == {"epochs": 1}
    assert forks.origins("grandchild", forks.read()) == ["child.ipynb", "mnist.ipynb"]

    def run(name, notebook):
        return results.Run(name, notebooks / "none", {"notebook": notebook, "parameters": {}})

    fork, first = run("grandchild", "grandchild.ipynb"), run("first", "mnist.ipynb")
    assert comparison.original(fork, [first]) == first
    parent = run("child", "child.ipynb")
    assert comparison.original(fork, [first, parent]) == parent


def test_a_circle_of_forks_ends():
    circle = {name: {"notebook": f"{name}.ipynb", "from": f"{other}.ipynb"}
              for name, other in ("ab", "ba")}  # fmt: skip
    assert forks.origins("a", circle) == ["b.ipynb", "a.ipynb"]


def test_an_unchanged_fork_shows_no_difference(found):
    text = comparison.compare(found["same"], found["first"], "x.ipynb")
    assert "Same settings." in text
    assert "**No difference: all " in text
    assert "What was changed" not in text


def test_the_original_is_the_nearest_run_of_the_notebook(found):
    pool = [found["first"]]
    for change in ({"seed": 1}, {"seed": 1, "epochs": 2}, {"dataset": "mnist"}):
        record = copy.deepcopy(found["first"].record)
        record["parameters"] |= change
        pool.insert(0, results.Run("other", found["first"].folder, record))
    assert comparison.original(found["same"], pool).name == "first"
    pool.pop()
    assert comparison.original(found["same"], pool).record["parameters"]["epochs"] == 1
    assert comparison.original(found["same"], [found["cnn"]]) is None  # of another notebook


def test_a_fork_with_other_layers(found):
    """A convolutional network with two layers: the first and the last are compared."""
    text = comparison.compare(found["cnn"], found["first"], "x.ipynb")
    assert "| `activation` | `Sigmoid` | `tanh` |" in text
    assert "Conv2d(1, 2, kernel_size=(3, 3), stride=(2, 2)), Tanh()" in text
    assert "The networks have 3 and 2 layers with parameters: the first and the last" in text
    assert "| the fork's value over the original's | first layer | last layer |" in text
    assert "After epoch 1, the last one that both have" in text
    assert "+        nn.Conv2d(1, 2, 3, stride=2)," in text
    assert "| `test_accuracy` |" in text
    assert (found["cnn"].values.query("quantity == 'V2' and layer == '2'").value == 0).all()


def test_forks_in_the_book(found, tmp_path, monkeypatch):
    """Beside the original, wherever that is shown."""
    own = book.forked(found["first"].folder.parent)
    assert own == {name: (found[name], found["first"]) for name in ("same", "cnn")}
    for main, original in (
        ({"first": found["first"]}, "notebooks/first.ipynb"),
        ({}, "forks/first.ipynb"),
    ):
        folder = tmp_path / original
        folder.mkdir(parents=True)
        monkeypatch.setattr(book, "GENERATED", folder)
        pages = book.write_pages(main, {}, own)
        assert pages.keys() == {original, "forks/same.ipynb", "forks/cnn.ipynb"}
        page = nbformat.read(folder / "forks/cnn.ipynb", as_version=4).cells[0].source
        assert page.startswith("# NOT MNIST: cnn, a fork of mnist.ipynb\n")
        assert f"[The first](../{original})" in page
        assert "No difference" in (folder / "forks/same.ipynb").read_text(encoding="utf-8")


def test_by_how_much():
    a, b = results.Table("a"), results.Table("b")
    for table, k in ((a, 1), (b, 3)):
        table.add(0, "V1", {"1": 5, "2": 0, "10": 1})
        table.add(1, "V1", {"1": 2 * k, "2": k - 1, "10": 7})
        table.add(1, "test_accuracy", k / 4)
    b.add(2, "V1", {"1": 9})
    merged = a.frame().assign(run="").merge(
        b.frame().assign(run=""), on=["run", *comparison.KEYS], suffixes=("_a", "_b")
    )  # fmt: skip
    last = merged[merged.epoch == 1]
    assert "| `V1` | × 3 | 0 → 2 | = |" in comparison.of_layers(last)
    assert "| `test_accuracy` | 0.25 | 0.75 | +0.5 |" in comparison.of_network(last, "mynet")
    assert list(comparison.ends(a.frame()).layer.unique()) == ["first", "last", results.NETWORK]
