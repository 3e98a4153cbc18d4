"""All runs: as many at a time as fit, the longest first, one choice of data for all of them."""

import os
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest
from support import book, data, quote, reproduce, results, runs


def quoted(name, seconds=10.0, memory=100.0):
    return quote.Quote(name, "", seconds, memory, 1.0, "its own record")


class Process:
    """A process that ends when it is looked at for the second time."""

    alive: ClassVar = []
    most, status = 0, 0

    def __init__(self, name):
        self.name, self.returncode, self.looks = name, None, 0
        Process.alive.append(self)
        Process.most = max(Process.most, len(Process.alive))

    def poll(self):
        self.looks += 1
        if self.looks > 1 and self.returncode is None:
            self.returncode = self.status
            Process.alive.remove(self)
        return self.returncode

    def wait(self):
        while self.poll() is None:
            pass


@pytest.fixture
def worked(monkeypatch):
    """Let a pool make runs; which were started, what failed, how many went on at once."""
    monkeypatch.setattr(reproduce, "PAUSE", 0.0)
    monkeypatch.setattr(results, "peak_memory", lambda: 50)

    def work(queue, *, jobs=2, memory=1e9, failing=(), done=0, rough=False):
        started, Process.alive, Process.most = [], [], 0

        def start(name):
            started.append(name)
            process = Process(name)
            process.status = int(name in failing)
            return process

        pool = reproduce.Pool(queue, done, jobs, memory, start, rough=rough)
        return started, pool.work(), Process.most

    return work


def test_as_many_go_on_as_there_are_jobs(worked):
    queue = [quoted(name) for name in "abcde"]
    assert worked(queue, jobs=2) == (list("abcde"), [], 2)
    assert worked(queue, jobs=1) == (list("abcde"), [], 1)
    assert worked(queue, jobs=9) == (list("abcde"), [], 5)


def test_what_does_not_fit_into_memory_waits_and_smaller_ones_go_first(worked):
    queue = [quoted("a", memory=600), quoted("b", memory=600), quoted("c", memory=100)]
    assert worked(queue, jobs=3, memory=1000) == (["a", "c", "b"], [], 2)
    assert worked(queue, jobs=3, memory=10) == (["a", "b", "c"], [], 1)  # one goes on in any case
    assert worked([quoted(n, memory=None) for n in "ab"], memory=3000) == (["a", "b"], [], 1)


def test_after_a_failure_nothing_more_is_started(worked):
    started, failed, _ = worked([quoted(n) for n in "abcde"], failing={"b"})
    assert (started, failed) == (["a", "b"], ["b"])


def test_the_first_run_of_the_plan_comes_first_then_the_longest_ones():
    queue = [quoted("a", 1.0), quoted("b", 5.0), quoted("c", None), quoted("d", 9.0)]
    assert [q.name for q in reproduce.in_order(queue)] == ["a", "c", "d", "b"]
    assert reproduce.in_order([]) == []


def test_the_progress_of_all_runs_is_told(worked, capsys):
    worked([quoted(n, 120.0) for n in "abc"], done=4)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "=== 4 of 7 runs done, about 4.0 min left ==="
    assert last == "=== 7 of 7 runs done ==="
    worked([quoted("a", 120.0)], rough=True)
    assert capsys.readouterr().out.splitlines()[0] == "=== 0 of 1 runs done ==="


def test_the_time_left_follows_what_ended_runs_took(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now[0])
    pool = reproduce.Pool([quoted(n) for n in "abcd"], 0, 2, 1e9, Process)
    assert pool.seconds_left() == 20
    pool.start_more()
    now[0] += 4
    assert pool.seconds_left() == 6 + 10
    pool.took, pool.quoted = 30.0, 10.0  # ended ones took three times as long as quoted
    assert pool.seconds_left() == 26 + 30


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The commands that the runner starts, and the book's folders; nothing runs."""
    seen = {"commands": [], "books": [], "reports": []}

    def start(command, **_):
        seen["commands"].append(command)
        return Process(command[3])

    monkeypatch.setattr(reproduce, "PAUSE", 0.0)
    monkeypatch.setattr(reproduce.subprocess, "Popen", start)
    monkeypatch.setattr(
        reproduce.subprocess, "call", lambda command, **_: seen["commands"].append(command)
    )
    monkeypatch.setattr(book, "make", lambda folder, *_, **__: seen["books"].append(folder))
    monkeypatch.setattr(
        reproduce.report, "report", lambda folder, **__: seen["reports"].append(folder)
    )
    monkeypatch.setattr(reproduce.speed, "calibration", lambda: 0.2)
    return lambda *more: (reproduce.main(["--results", str(tmp_path), *more]), seen)


def test_one_choice_of_data_for_all_runs_the_book_and_the_report(asked, tmp_path, monkeypatch):
    """Another make chooses other data meanwhile: that changes nothing here."""
    real = data.load

    def load(name):
        results.write_text(tmp_path / ".dataset", "mnist\n")
        return real(name)

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(reproduce.speed, "cores", lambda: 3)
    status, seen = asked("--dataset", "digits")
    assert status == 0
    assert {c[3] for c in seen["commands"]} == set(runs.specs())
    assert all(c[4:8] == ["--dataset", "digits", "--results", str(tmp_path / "digits")]
               for c in seen["commands"])  # fmt: skip
    assert seen["books"] == seen["reports"] == [tmp_path / "digits"]
    assert (tmp_path / ".dataset").read_text() == "digits\n"


def test_a_single_run_does_not_choose_for_a_later_book(asked, tmp_path):
    (tmp_path / ".dataset").write_text("mnist\n")
    status, seen = asked("--dataset", "digits", "--name", "checks", "--run", "env -u A")
    assert status == 0
    [command] = seen["commands"]
    assert command[:2] == ["env", "-u"]
    assert command[-4:] == ["--dataset", "digits", "--results", str(tmp_path / "digits")]
    assert seen["books"] == [tmp_path / "digits"]
    assert (tmp_path / ".dataset").read_text() == "mnist\n"


def test_a_run_that_fails_ends_with_its_name_and_no_book(asked, capsys, monkeypatch):
    monkeypatch.setattr(Process, "status", 1)
    status, seen = asked("--dataset", "digits", "--jobs", "1")
    assert status == 1
    assert "error: not made: sigmoid-seed-0, see above." in capsys.readouterr().err
    assert seen["books"] == []


def test_a_scheduler_gets_all_runs_at_once(asked, capsys):
    asked("--dataset", "digits", "--run", "env", "--runs-only")
    assert f"{len(runs.specs())} runs at a time at most" in capsys.readouterr().out


def test_cores_and_memory_of_a_container_count(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(reproduce.speed, "CONTAINER", limit)
    free = reproduce.speed.free_memory()
    assert free > 100
    limit.write_text("50000000\n")
    assert reproduce.speed.free_memory() == 50
    limit.write_text("max\n")
    assert reproduce.speed.free_memory() > 100
    assert 1 <= reproduce.speed.cores() <= os.cpu_count()


SLEEPS = """\
import signal, subprocess, sys, time
from support import quote, reproduce
signal.signal(signal.SIGTERM, reproduce.tell_to_end)
def start(name):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    print("pid", process.pid, flush=True)
    time.sleep(0.5)  # the signal comes before the run is known
    return process
queue = [quote.Quote("a", "", 1.0, 1.0, 1.0, "")]
reproduce.Pool(queue, 0, 1, 1e9, start).work()
"""


def test_when_it_is_told_to_end_its_runs_end(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the run goes on")
