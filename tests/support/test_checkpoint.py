"""A run that was killed goes on from its checkpoint: its values are the same, bit for bit."""

import random
import subprocess
import sys

import pytest
import torch
from support import checkpoint, results, runs, training
from torch import nn

LOOP = """\
import os, random, signal, sys, time
import torch
from support import checkpoint, results, training

def run(out, epochs=30):
    torch.manual_seed(0)
    net = training.mlp([5, 4, 3], "Sigmoid", dropout=0.5)
    step, shuffle = torch.optim.Adam(net.parameters()), torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 5), torch.randint(3, (400,))
    table, tables, seen = results.Table("a"), [], {}
    progress = checkpoint.Progress(
        out, net=net, step=step, shuffle=shuffle, table=table, tables=tables, seen=seen
    )
    for epoch in range(progress.next, epochs):
        loss = training.train_epoch(net, step, x, y, batch_size=20, shuffle=shuffle)
        table.add(epoch, "loss", {"1": loss, "2": torch.rand(()).item()})
        tables.append(results.Table(f"epoch {epoch}"))
        tables[-1].add(epoch, "accuracy", training.accuracy(net, x, y))
        seen[epoch] = sum(seen.values()) + 1
        progress.save(epoch, f"epoch {epoch}")
    return [t.frame().to_csv() for t in [table, *tables]] + [repr(seen), repr(net.state_dict())]

torch.set_num_threads(1)
out, seed, kills = sys.argv[1], int(sys.argv[2]), 0
whole = run("")  # torch imports some of itself here
begun = time.monotonic()
assert run("") == whole
longest = (time.monotonic() - begun) / 6
delays = random.Random(seed)
while True:
    pid = os.fork()
    if pid == 0:
        same = run(out) == whole
        os._exit(0 if same else 1)
    time.sleep(delays.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        break
    kills += 1
print("kills:", kills, "same:", os.WEXITSTATUS(status) == 0)
"""


def killed(out, seed):
    """Kill a loop at random points until it comes to its end; how often, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", LOOP, str(out), str(seed)], cwd=runs.NOTEBOOKS,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.endswith("same: True\n"), done.stderr or done.stdout[-500:]
    return int(done.stdout.split("kills: ")[1].split()[0]), done.stdout


def test_killed_at_random_points(tmp_path):
    kills, printed = killed(tmp_path, seed=0)
    assert kills >= 1
    assert "continues after epoch" in printed
    assert [p.name for p in tmp_path.iterdir() if p.name[0] != "."] == ["checkpoint.pt"]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_at_many_random_points(tmp_path, seed):
    assert killed(tmp_path, seed)[0] >= 1


def begun(out, seed=0, width=3):
    """A small network with its optimizer, and their checkpoint in a folder."""
    torch.manual_seed(seed)
    net = nn.Linear(width, 2)
    step = torch.optim.Adam(net.parameters())
    return net, checkpoint.Progress(str(out), net=net, step=step)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
def test_half_a_checkpoint_counts_as_none(tmp_path, capsys, share):
    net, progress = begun(tmp_path)
    start = net.weight.tolist()
    nn.init.zeros_(net.weight)
    progress.save(4)
    whole = progress.path.read_bytes()
    progress.path.write_bytes(whole[: int(share * len(whole))])
    net, progress = begun(tmp_path)
    assert (progress.next, net.weight.tolist()) == (0, start)
    assert "checkpoint.pt is damaged: starts anew" in capsys.readouterr().out
    progress.path.write_bytes(whole)
    net, progress = begun(tmp_path)
    assert (progress.next, net.weight.tolist()) == (5, [[0.0] * 3] * 2)


@pytest.mark.parametrize("other", [{"seed": 1}, {"width": 4}])
def test_a_checkpoint_of_another_start_counts_as_none(tmp_path, capsys, other):
    """Somebody may change the seed or the network in a folder of their own."""
    begun(tmp_path)[1].save(4)
    assert begun(tmp_path, **other)[1].next == 0
    assert "another start: starts anew" in capsys.readouterr().out
    assert begun(tmp_path)[1].next == 5


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    progress = checkpoint.Progress("", values=[1.0])
    progress.save(0)
    assert progress.next == 1
    assert list(tmp_path.iterdir()) == []


def test_lines_of_earlier_attempts_are_printed_again(tmp_path, capsys):
    progress = checkpoint.Progress(str(tmp_path), values=[])
    progress.save(0, "configuration one")
    capsys.readouterr()
    checkpoint.Progress(str(tmp_path), "configuration", values=[])
    assert capsys.readouterr().out == "configuration one\ncontinues after configuration 0\n"


def test_what_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"total cannot be kept .* a float cannot be set back in"):
        checkpoint.Progress(str(tmp_path), total=1.0)
    progress = checkpoint.Progress(str(tmp_path), nets=[nn.Linear(1, 1)])
    with pytest.raises(TypeError, match="a checkpoint keeps numbers, texts, tensors"):
        progress.save(0)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    values = [1.0]
    progress = checkpoint.Progress(str(tmp_path), values=values)
    progress.save(0)
    whole = progress.path.read_bytes()

    def full(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        progress.save(1)
    assert progress.path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [progress.path]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_goes_on_as_well(tmp_path):
    def run(out, stop=6):
        torch.manual_seed(0)
        net = training.mlp([5, 4, 3], "Sigmoid", dropout=0.5).cuda()
        step, shuffle = torch.optim.Adam(net.parameters()), torch.Generator().manual_seed(0)
        x, y = torch.randn(100, 5).cuda(), torch.randint(3, (100,)).cuda()
        losses = []
        progress = checkpoint.Progress(out, net=net, step=step, shuffle=shuffle, losses=losses)
        for epoch in range(progress.next, stop):
            losses.append(training.train_epoch(net, step, x, y, batch_size=10, shuffle=shuffle))
            progress.save(epoch)
        return losses

    run(str(tmp_path), stop=random.Random(0).randrange(1, 6))
    assert run(str(tmp_path)) == run("")
