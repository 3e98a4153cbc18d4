"""A real Slurm on this machine, for a test: one node, as root, all files in one scratch folder.

``python tests/tools/slurm.py COMMAND …`` runs a command with it; ``--install`` before the command
installs Debian's packages first.
"""

import argparse
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "scancel", "squeue")
INSTALL = "apt-get install -y slurm-wlm munge"
PATIENCE = 20.0  # seconds until a daemon must have answered
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.log
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 Gres=gpu:2
PartitionName=test Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


class SlurmError(Exception):
    """Slurm cannot run here; the message says why."""


class Job(NamedTuple):
    """A job that ended."""

    number: str
    name: str
    state: str


class Slurm:
    """A running cluster of one node, for two jobs at a time; its two GPUs are mere names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, seconds: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """A command in whose environment Slurm's tools find this cluster."""
        return subprocess.run(
            command, env=os.environ | self.environment, text=True, timeout=seconds,
            capture_output=True, check=False,
        )  # fmt: skip

    def ended(self) -> list[Job]:
        """All jobs that ended so far, oldest first."""
        log = self.folder / "jobs.log"
        lines = log.read_text().splitlines() if log.exists() else []
        found = (re.match(r"JobId=(\d+) .* Name=(.*?) JobState=(\w+)", line) for line in lines)
        return [Job(*match.groups()) for match in found if match]

    def running(self) -> dict[str, str]:
        """The jobs' ids by name."""
        lines = self.run("squeue", "-h", "-t", "R", "-o", "%i %j").stdout.splitlines()
        return {name: job for job, name in (line.split(" ", 1) for line in lines)}


@contextlib.contextmanager
def slurm() -> Iterator[Slurm]:
    """Start a cluster, and stop it at the end.

    Raises:
        SlurmError: not root, not installed, or a daemon does not answer.
    """
    if os.geteuid() != 0:
        raise SlurmError("this test's Slurm needs root.")
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        raise SlurmError(f"there is no {', '.join(missing)} here: {INSTALL}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has 107 letters
    cluster = Slurm(folder)
    try:
        start(cluster)
        yield cluster
    finally:
        stop(folder)
        shutil.rmtree(folder, ignore_errors=True)


def start(cluster: Slurm) -> None:
    """Start the three daemons, each when the one before it answers."""
    folder = cluster.folder
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key, conf = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    conf.write_text(CONFIGURATION.format(folder=folder, ports=free_ports(2)))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid",
             "log-file": "munged.log", "seed-file": "munge.seed"}  # fmt: skip
    launch(cluster, "munged", "--force", *(f"--{k}={folder / v}" for k, v in files.items()))
    await_that(lambda: (folder / "munge.socket").exists(), "munged", folder)
    launch(cluster, "slurmctld", "-f", str(conf))
    launch(cluster, "slurmd", "-f", str(conf), "-N", "localhost")

    def idle() -> bool:
        return "idle" in cluster.run("sinfo", "-h", "-o", "%T").stdout

    await_that(idle, "slurmctld", folder)


def launch(cluster: Slurm, *command: str) -> None:
    """Start a daemon; it goes to the background by itself."""
    with (cluster.folder / f"{command[0]}.out").open("w") as log:
        code = subprocess.run(
            command, env=os.environ | cluster.environment, stdout=log, stderr=log,
            timeout=PATIENCE, check=False,
        ).returncode  # fmt: skip
    if code:
        raise SlurmError(f"{command[0]} does not start: {last_words(cluster.folder, command[0])}")


def await_that(answers: Callable[[], bool], daemon: str, folder: Path) -> None:
    """Wait until a daemon answers."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if answers():
                return
        time.sleep(0.1)
    words = last_words(folder, daemon)
    raise SlurmError(f"{daemon} does not answer within {PATIENCE:.0f} s: {words}")


def last_words(folder: Path, daemon: str) -> str:
    """The last lines that a daemon left."""
    texts = [path.read_text() for path in sorted(folder.glob(f"{daemon}.[lo][ou][gt]"))]
    return " | ".join("".join(texts).splitlines()[-5:])


def stop(folder: Path) -> None:
    """End the daemons by the ids in their files, the node's jobs with them."""
    ids = [int(path.read_text()) for path in folder.glob("*.pid") if path.read_text().strip()]
    for sign, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 1.0)):
        for number in ids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, sign)
        deadline = time.monotonic() + seconds
        while any(Path(f"/proc/{number}").exists() for number in ids):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)


def free_ports(number: int) -> list[int]:
    """Ports that nobody uses now."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", action="store_true", help=f"first: {INSTALL}")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    try:
        if arguments.install:
            subprocess.run(INSTALL.split(), check=True)
        with slurm() as cluster:
            command = arguments.command or ["srun", "-n1", "hostname"]
            code = subprocess.run(
                command, env=os.environ | cluster.environment, check=False
            ).returncode
            for job in cluster.ended():
                print(f"job {job.number}, {job.name}: {job.state}")
    except (SlurmError, subprocess.CalledProcessError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
