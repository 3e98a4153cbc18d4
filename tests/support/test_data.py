import errno
import gzip
import hashlib
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
from support import data, results

IMAGES = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2) * 10
LABELS = np.array([3, 1, 4, 9], dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


FILES = dict(zip(data.SHA256, map(idx, (IMAGES, LABELS, IMAGES[:2] + 5, LABELS[2:])), strict=True))
REAL, TIMEOUT = data.SHA256, data.TIMEOUT  # before the tests shrink them
FIRST, *_, LAST = FILES


@pytest.fixture(scope="session")
def real_mnist():
    folder = data.find_mnist()
    if folder is None:
        pytest.skip("needs the real MNIST: run the tests with MNIST_DIR=/folder/with/idx/files")
    return folder


@pytest.fixture(autouse=True)
def tiny_mnist(request, tmp_path, monkeypatch):
    """MNIST of six images, nothing in data/mnist, no network, and no patience."""
    monkeypatch.delenv("MNIST_DIR", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(data, "DATA_DIR", tmp_path / "data")
    monkeypatch.setattr(data, "MIRRORS", ["http://127.0.0.1:1/", "http://127.0.0.1:2/"])
    monkeypatch.setattr(data, "TIMEOUT", (0.3, 0.3))
    monkeypatch.setattr(pooch.core.time, "sleep", lambda _seconds: None)
    if "real_mnist" not in request.fixturenames:
        digests = {name: hashlib.sha256(raw).hexdigest() for name, raw in FILES.items()}
        monkeypatch.setattr(data, "SHA256", digests)


@pytest.fixture
def folder(tmp_path):
    """Give a complete folder, gzipped."""
    return fill(tmp_path / "named")


def fill(folder: Path, form: str = "gz") -> Path:
    folder.mkdir()
    for name, raw in FILES.items():
        if form == "gz":
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / (name if form == "plain" else name.replace("-idx", ".idx"))).write_bytes(raw)
    return folder


@pytest.fixture
def mirror():
    """Start mirrors on this machine; `mirror.asked` lists the files that were asked for."""
    servers, over = [], threading.Event()

    def start(behaviour: str = "good") -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                if behaviour == "swallows":
                    over.wait(20)
                self.send_response(403 if behaviour == "forbids" else 200)
                self.end_headers()

            def do_GET(self):
                name = self.path.rsplit("/", 1)[-1].removesuffix(".gz")
                start.asked.append(name)
                body = gzip.compress(FILES[name])
                body = gzip.compress(b"<html>Log in first") if behaviour == "wrong" else body
                self.send_response(404 if behaviour == "absent" else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if behaviour not in ("stalls", "cut") else body[:20])
                if behaviour == "stalls":
                    self.wfile.flush()
                    over.wait(20)

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    start.asked = []
    yield start
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("form", ["gz", "plain", "dotted"])
def test_reads_idx_files_gzipped_or_not(tmp_path, monkeypatch, form):
    monkeypatch.setenv("MNIST_DIR", str(fill(tmp_path / "named", form)))
    got = data.load("mnist")
    np.testing.assert_array_equal(got.train_images, IMAGES.reshape(4, 6) / np.float32(255))
    np.testing.assert_array_equal(got.test_images, (IMAGES[:2] + 5).reshape(2, 6) / np.float32(255))
    np.testing.assert_array_equal(got.train_labels, LABELS)
    np.testing.assert_array_equal(got.test_labels, LABELS[2:])
    assert (got.train_images.dtype, got.train_labels.dtype) == (np.float32, np.int64)
    assert (got.name, got.is_mnist, got.image_shape) == ("mnist", True, (3, 2))
    parts = (IMAGES, LABELS, IMAGES[:2] + 5, LABELS[2:])
    assert got.digest == hashlib.sha256(b"".join(p.tobytes() for p in parts)).hexdigest()


def test_reads_what_was_decompressed_on_the_way_but_kept_its_name(folder, monkeypatch):
    monkeypatch.setenv("MNIST_DIR", str(folder))
    (folder / f"{FIRST}.gz").write_bytes(FILES[FIRST])
    assert data.load("mnist").image_shape == (3, 2)


def test_digits_are_whole_stratified_and_the_same_each_time():
    got, again = data.load("digits"), data.load("digits")
    assert got.digest == again.digest
    assert got.digest == "28d636f2f47ec885bab6c1d883c883cd3f85cb5f6d0f1457558c6b672cc71adf"
    assert (got.name, got.is_mnist, got.image_shape) == ("digits", False, (8, 8))
    assert "NOT MNIST" in got.title
    assert got.train_images.shape == (1437, 64)
    assert got.test_images.shape == (360, 64)
    assert (got.train_images.min(), got.train_images.max()) == (0.0, 1.0)
    assert (got.train_images.dtype, got.train_labels.dtype) == (np.float32, np.int64)
    assert np.ptp(np.bincount(got.test_labels, minlength=10)) <= 3


def test_real_mnist(real_mnist, monkeypatch):
    monkeypatch.setenv("MNIST_DIR", str(real_mnist))
    got = data.load("mnist")
    assert got.train_images.shape == (60000, 784)
    assert got.test_images.shape == (10000, 784)
    assert got.image_shape == (28, 28)
    assert np.bincount(got.train_labels)[:3].tolist() == [5923, 6742, 5958]
    assert got.train_images.mean() == pytest.approx(0.1307, abs=1e-4)


def test_readme_lists_the_digests():
    readme = (results.ROOT / "data" / "README.md").read_text()
    assert all(f"| `{name}` | `{digest}` |" in readme for name, digest in REAL.items())


@pytest.mark.parametrize("where", ["named", "data"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "no gzip"])
def test_refuses_a_damaged_file_and_leaves_it(tmp_path, capsys, mirror, monkeypatch, damage, where):
    path = fill(tmp_path / where) / f"{LAST}.gz"
    whole, other = path.read_bytes(), idx(LABELS[:2])
    damaged = {
        "cut": whole[:-9],
        "flipped": whole[:12] + bytes([whole[12] ^ 255]) + whole[13:],
        "other": gzip.compress(other),
        "no gzip": other,
    }[damage]
    path.write_bytes(damaged)
    monkeypatch.setattr(data, "MIRRORS", [mirror()])
    if where == "named":
        monkeypatch.setenv("MNIST_DIR", str(path.parent))
    with pytest.raises(data.DataError, match="damaged") as caught:
        data.resolve("auto")
    assert {path.name, data.SHA256[LAST]} <= set(str(caught.value).replace("/", " ").split())
    if damage in ("other", "no gzip"):
        assert hashlib.sha256(other).hexdigest() in str(caught.value)
    assert "Delete the file" in str(caught.value)
    assert path.read_bytes() == damaged
    assert not mirror.asked
    assert "NOT MNIST" not in capsys.readouterr().out


def test_swapped_files_are_named(folder, monkeypatch):
    monkeypatch.setenv("MNIST_DIR", str(folder))
    one, two = folder / f"{FIRST}.gz", folder / f"{LAST}.gz"
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)
    with pytest.raises(data.DataError, match=f"{FIRST}.gz is another file of MNIST: {LAST}"):
        data.load("mnist")


def test_refuses_a_damaged_file_among_missing_ones(mirror, monkeypatch):
    monkeypatch.setattr(data, "MIRRORS", [mirror()])
    data.DATA_DIR.mkdir()
    (data.DATA_DIR / FIRST).write_bytes(b"half")
    with pytest.raises(data.DataError, match=f"{FIRST} is damaged"):
        data.resolve("auto")
    assert not mirror.asked


@pytest.mark.parametrize("call", [data.resolve, lambda: data.load("mnist")])
def test_a_named_folder_that_lacks_a_file_is_an_error(folder, mirror, monkeypatch, call):
    monkeypatch.setattr(data, "MIRRORS", [mirror()])
    (folder / f"{LAST}.gz").unlink()
    monkeypatch.setenv("MNIST_DIR", str(folder))
    with pytest.raises(data.DataError) as caught:
        call()
    assert str(folder) in str(caught.value)
    assert LAST in str(caught.value)
    assert FIRST not in str(caught.value)
    assert not mirror.asked


def test_an_empty_mnist_dir_names_nothing(monkeypatch):
    monkeypatch.setenv("MNIST_DIR", "")
    assert data.find_mnist() is None
    with pytest.raises(data.DataError, match="make reproduce MNIST_DIR="):
        data.load("mnist")
    fill(data.DATA_DIR)
    assert data.find_mnist() == data.DATA_DIR


@pytest.mark.parametrize("dataset", ["auto", "mnist"])
def test_resolve_takes_what_it_finds(folder, monkeypatch, dataset):
    monkeypatch.setenv("MNIST_DIR", str(folder))
    assert data.resolve(dataset) == "mnist"
    assert not data.DATA_DIR.exists()


@pytest.mark.parametrize("dataset", ["auto", "mnist"])
def test_resolve_downloads_what_it_does_not_find(mirror, monkeypatch, dataset):
    monkeypatch.setattr(data, "MIRRORS", [mirror()])
    assert data.resolve(dataset) == "mnist"
    assert data.load("mnist").image_shape == (3, 2)


@pytest.mark.parametrize("behaviour", [None, "wrong"])
def test_without_mnist_auto_shouts_and_mnist_stops(capsys, mirror, monkeypatch, behaviour):
    if behaviour:
        monkeypatch.setattr(data, "MIRRORS", [mirror(behaviour)])
    assert data.resolve("auto") == "digits"
    notice = capsys.readouterr().out
    assert notice.count("#" * 100) == 2
    said = " ".join(notice.replace("#", "").split())
    for words in ("THIS IS NOT MNIST", "scikit-learn", "none of the paper's claims", *FILES):
        assert words in said
    for words in ("make reproduce MNIST_DIR=/folder/with/idx/files", "DATASET=mnist forbids"):
        assert words in said
    assert max(map(len, notice[notice.index("###") :].splitlines())) == 100
    with pytest.raises(data.DataError, match="make reproduce MNIST_DIR="):
        data.resolve("mnist")
    assert "NOT MNIST" not in capsys.readouterr().out


def test_digits_are_a_stand_in_even_when_asked_for(folder, capsys, monkeypatch):
    monkeypatch.setenv("MNIST_DIR", str(folder))
    assert data.resolve("digits") == "digits"
    assert "NOT MNIST" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["cifar", "", "MNIST"])
def test_an_unknown_data_set_is_an_error_that_lists_the_choices(dataset):
    with pytest.raises(data.DataError, match="auto, mnist, digits"):
        data.resolve(dataset)
    with pytest.raises(data.DataError, match="mnist or digits"):
        data.load(dataset)


@pytest.mark.parametrize(
    ("behaviour", "name"),
    [(None, "ConnectionError"), ("forbids", "HTTPError 403"), ("swallows", "ReadTimeout")],
)
def test_without_a_network_nobody_waits_for_retries(mirror, monkeypatch, behaviour, name):
    if behaviour:
        monkeypatch.setattr(data, "MIRRORS", [mirror(behaviour)])
    begin = time.monotonic()
    with pytest.raises(data.DownloadError, match=name):
        data.download_mnist()
    assert time.monotonic() - begin < 2
    assert not data.DATA_DIR.exists()
    assert not mirror.asked


@pytest.mark.parametrize("dead", ["http://127.0.0.1:1/", "swallows"])
def test_one_living_mirror_is_enough(mirror, monkeypatch, dead):
    living = mirror()
    monkeypatch.setattr(data, "MIRRORS", [dead if "/" in dead else mirror(dead), living])
    begin = time.monotonic()
    data.download_mnist()
    assert time.monotonic() - begin < 4
    assert mirror.asked == list(FILES)


def test_downloads_through_a_proxy_where_no_name_can_be_looked_up(mirror, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", mirror())
    monkeypatch.setattr(data, "MIRRORS", ["http://mirror.invalid/mnist/"])
    assert sorted(os.listdir(data.download_mnist())) == sorted(FILES)


@pytest.mark.parametrize("behaviour", ["wrong", "absent", "stalls", "cut"])
def test_falls_back_to_the_next_mirror(mirror, monkeypatch, behaviour):
    monkeypatch.setattr(data, "MIRRORS", [mirror(behaviour), mirror()])
    begin = time.monotonic()
    target = data.download_mnist()
    assert time.monotonic() - begin < 10  # a mirror that stalls does so for 20
    assert {path.name: path.read_bytes() for path in target.iterdir()} == FILES
    assert mirror.asked == [FIRST] * (1 + data.RETRIES) + list(FILES)


def test_what_is_downloaded_has_the_permissions_of_any_new_file(mirror, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "MIRRORS", [mirror()])
    (tmp_path / "any").touch()
    modes = {path.stat().st_mode for path in data.download_mnist().iterdir()}
    assert modes == {(tmp_path / "any").stat().st_mode}


@pytest.mark.parametrize("behaviour", ["wrong", "absent", "cut"])
def test_keeps_nothing_of_what_no_mirror_delivers(mirror, monkeypatch, behaviour):
    monkeypatch.setattr(data, "MIRRORS", [mirror(behaviour)])
    with pytest.raises(data.DownloadError, match="MNIST cannot be downloaded"):
        data.download_mnist()
    assert os.listdir(data.DATA_DIR) == []
    assert mirror.asked == [FIRST] * (1 + data.RETRIES)


def test_an_interrupted_download_goes_on_with_the_missing_files(mirror, monkeypatch):
    monkeypatch.setattr(data, "MIRRORS", [mirror()])
    download = pooch.HTTPDownloader.__call__

    def interrupted(self, url, path, *rest):
        if LAST in url:
            Path(path).write_bytes(b"half of it")
            raise KeyboardInterrupt
        download(self, url, path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pooch.HTTPDownloader, "__call__", interrupted)
        assert data.main([]) == 130
    assert sorted(os.listdir(data.DATA_DIR)) == sorted(name for name in FILES if name != LAST)
    mirror.asked.clear()
    assert data.main([]) == 0
    assert mirror.asked == [LAST]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("culprit", [(pooch.HTTPDownloader, "__call__"), (shutil, "move")])
def test_a_full_disk_or_a_read_only_folder_stops_with_advice(mirror, monkeypatch, code, culprit):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(data, "MIRRORS", [mirror()])
    with monkeypatch.context() as patch:
        patch.setattr(*culprit, fail)
        with pytest.raises(data.DataError, match=f"{os.strerror(code)}.*\n.*Free some disk space"):
            data.resolve("auto")
    assert os.listdir(data.DATA_DIR) == []


@pytest.mark.parametrize("dataset", ["auto", "mnist"])
def test_the_command_line_says_what_was_found_where(folder, tmp_path, capsys, monkeypatch, dataset):
    monkeypatch.setenv("MNIST_DIR", str(folder))
    choice = tmp_path / "new" / "choice"
    assert data.main(["--dataset", dataset, "--print-choice-to", str(choice)]) == 0
    assert choice.read_text() == "mnist\n"
    assert os.listdir(choice.parent) == ["choice"]
    digest = data.load("mnist").digest[:12]
    line = f"MNIST, from {folder}: 4 training and 2 test images of 3x2, SHA-256 {digest}\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cifar"], "auto, mnist, digits"),
        (["--dataset", "mnist"], "MNIST cannot be downloaded"),
        (["--dataset", "digits", "--print-choice-to", "file/choice"], "Cannot write"),
    ],
)
def test_the_command_line_fails_without_a_traceback(
    tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert data.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_patience_is_limited():
    assert 5 <= sum(TIMEOUT) < 30
