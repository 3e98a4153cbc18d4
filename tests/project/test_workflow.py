"""The workflow: it is YAML, calls targets that exist, and may do no more than it needs."""

import re

import pytest
import yaml
from support import results

PATHS = sorted((results.ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (results.ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^#   ([A-Z_]+) ", MAKEFILE, re.MULTILINE))


def read(path):
    return yaml.load(path.read_text("utf-8"), Loader=yaml.BaseLoader)  # "on" stays a word


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def made(command):
    """Targets and variables of a make command."""
    words = [word for word in command.split()[1:] if not word.startswith("-")]
    targets = {word for word in words if "=" not in word}
    return targets, {word.partition("=")[0] for word in words if "=" in word}


def test_there_is_one_workflow():
    assert [path.name for path in PATHS] == ["book.yml"]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_it_calls_what_there_is(path):
    commands = [step["run"] for step in steps(read(path)) if step.get("run", "").startswith("make")]
    targets = set()
    for command in commands:
        called, variables = made(command)
        assert called <= TARGETS, f"{command}: the Makefile has no {called - TARGETS}"
        assert variables <= VARIABLES
        targets |= called
    assert targets == {"test", "book", "reproduce"}


def test_made_reads_a_command():
    assert made("make reproduce DATASET=mnist PY=python") == ({"reproduce"}, {"DATASET", "PY"})
    assert {"test", "book", "reproduce", "lint"} <= TARGETS
    assert {"DATASET", "PY"} <= VARIABLES


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_rights_are_the_least_and_there_are_no_secrets(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    rights = {name: job["permissions"] for name, job in workflow["jobs"].items()
              if "permissions" in job}  # fmt: skip
    assert rights == {"publish": {"pages": "write", "id-token": "write"}}
    assert "secrets." not in path.read_text("utf-8")
    assert "pull_request_target" not in workflow["on"]
    for step in steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_every_job_ends_and_is_meant_for_an_event(path):
    workflow = read(path)
    events = set(workflow["on"])
    assert events == {"push", "pull_request", "schedule", "workflow_dispatch"}
    assert workflow["on"]["push"] == {"branches": ["main"]}
    for name, job in workflow["jobs"].items():
        assert 0 < int(job["timeout-minutes"]) <= 180, name
        assert set(re.findall(r"event_name == '(\w+)'", job["if"])) <= events
        assert set(job.get("needs", [])) <= set(workflow["jobs"])


def test_it_publishes_only_what_was_tested_and_built():
    jobs = read(PATHS[0])["jobs"]
    assert set(jobs["publish"]["needs"]) == {"test", "build"}
    assert re.findall(r"event_name == '(\w+)'", jobs["publish"]["if"]) == ["push"]
    [upload] = [s for s in jobs["build"]["steps"] if "upload-pages" in s.get("uses", "")]
    assert upload["with"]["path"] == "book/_build/html"


def test_every_week_it_is_made_from_the_lock_and_apart_from_it_without():
    jobs = read(PATHS[0])["jobs"]
    commands = {name: [s.get("run", "") for s in job["steps"]] for name, job in jobs.items()}
    for name in ("reproduce", "latest"):
        assert "schedule" in jobs[name]["if"]
        assert "needs" not in jobs[name]  # neither waits for the other
        assert "continue-on-error" not in str(jobs[name])  # a failure shows
        assert any("make reproduce DATASET=mnist" in command for command in commands[name])
    assert any("PY=" in command for command in commands["latest"])  # no lock
    assert not any("PY=" in command or "pip" in command for command in commands["reproduce"])
