"""Accumulators of several processes become one, by torchrun and gloo on the CPU."""

import copy
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import fimlib
from fimlib import Categorical, Gaussian, Joint
from fimlib.distributed import all_reduce
from fimlib.streaming import accumulate

pytestmark = pytest.mark.long

TIME_LIMIT = 120  # seconds; a process that waits in vain is one that fails

# Every case goes through in the same processes: starting them takes longest.
CASES = """
import copy, json, sys, torch, fimlib
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from fimlib import accumulate, all_reduce

torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
x = torch.randn(9, 4, dtype=torch.float64)
family = fimlib.Categorical()


def state(joint):
    found = joint.state_dict()
    tensors = {**found["means"], "Var_x I": found["scatter"]}
    flat = {k: {n: t.tolist() for n, t in v.items()} for k, v in tensors.items()}
    return {"count": joint.count, "layers": joint.layers, "state": flat}


def unequal():
    mine = accumulate(model, (x[:2], x[2:])[rank], family, bounds="certified")
    before = state(mine)
    total = all_reduce(mine)
    assert state(mine) == before
    return state(total)


def batches():
    return state(all_reduce(accumulate(model, (x[:2], x[2:])[rank], family, batch_size=1)))


def some_quantities():
    part = (x[:2], x[2:])[rank]
    return state(all_reduce(accumulate(model, part, family, quantities=["V1"])))


def first_empty():
    return state(all_reduce(accumulate(model, (x[:0], x)[rank], family)))


def last_empty():
    return state(all_reduce(accumulate(model, (x, x[:0])[rank], family)))


def all_empty():
    return state(all_reduce(fimlib.Joint(family)))


def labels():
    joint, part = fimlib.Joint(family), (x[:4], x[4:])[rank]
    derivs = fimlib.differentiate(model, part)
    y = (torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 1, 2, 0]))[rank]
    joint.update(derivs, family.observed(derivs.outputs, y))
    return state(all_reduce(joint))


def twice():
    total = all_reduce(accumulate(model, (x[:2], x[2:5])[rank], family))
    more = all_reduce(accumulate(model, (x[5:6], x[6:])[rank], family))
    total.merge(more)
    return state(total)


def subgroup():
    group = torch.distributed.new_group([1])
    mine = accumulate(model, (x[:2], x)[rank], family)
    return state(all_reduce(mine, group)) if rank else state(mine)


def outside():
    group = torch.distributed.new_group([0])
    return state(all_reduce(fimlib.Joint(family), group))


def other_family():
    return all_reduce(accumulate(model, x, (family, fimlib.Bernoulli())[rank]))


def other_settings():
    covariance = torch.eye(3, dtype=torch.float64) * (1 + rank)
    return all_reduce(accumulate(model, x, fimlib.Gaussian(covariance)))


def other_family_and_empty():
    return all_reduce(accumulate(model, x[:0], (family, fimlib.Bernoulli())[rank]))


def same_settings():
    covariance = torch.eye(3, dtype=torch.float64) * 2
    return state(all_reduce(accumulate(model, x[rank::2], fimlib.Gaussian(covariance))))


def other_layers():
    return all_reduce(accumulate(model, x, family, layers=(["0"], ["2"])[rank]))


def other_shapes():
    net = nn.Linear(4, 3 + rank).double()
    return all_reduce(accumulate(net, x, family))


def other_quantities():
    return all_reduce(accumulate(model, x, family, bounds=("certified", None)[rank]))


def other_order():
    joint = fimlib.Joint(family)
    joint.update(fimlib.differentiate(model, x, order=1 + rank))
    return all_reduce(joint)


def estimate(part, **options):
    return fimlib.estimate(model, part, family, passes=5, batch_size=2, **options)


def numbers(found):
    found = dict(vars(found))
    for k in ("value", "standard_error"):
        found[k] = {n: t.tolist() for n, t in found[k].items()}
    return found


def estimates():
    mine = estimate((x[:4], x[4:])[rank])
    before = numbers(mine)
    total = all_reduce(mine)
    assert numbers(mine) == before
    return numbers(total), before


def fsdp_1(net):
    return fsdp.FullyShardedDataParallel(
        net, sharding_strategy=fsdp.ShardingStrategy.FULL_SHARD, device_id=torch.device("cpu")
    )


def fsdp_2(net):
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    fsdp.fully_shard(net[0], mesh=mesh)
    return fsdp.fully_shard(net, mesh=mesh)


def trained(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().mean().backward()
    optimizer.step()
    return net


def sharded(wrap):
    found, part = {}, (x[:4], x[4:])[rank]
    net = trained(wrap(copy.deepcopy(model)))
    for call in (fimlib.estimate, accumulate):
        try:
            call(net, part, family)
        except NotImplementedError as error:
            found[call.__name__] = str(error)
    # its remedy
    plain = copy.deepcopy(model)
    options = StateDictOptions(full_state_dict=True)
    plain.load_state_dict(get_model_state_dict(net, options=options))
    found["joint"] = state(all_reduce(accumulate(plain, part, family)))
    estimates = (
        all_reduce(fimlib.estimate(m, part, family, passes=5))
        for m in (plain, trained(copy.deepcopy(model)))
    )
    found["estimates"] = [numbers(one)["value"] for one in estimates]
    return found


def fsdp_1_sharded():
    return sharded(fsdp_1)


def fsdp_2_sharded():
    return sharded(fsdp_2)


def own_signs():
    return estimate(x).value["0.weight"].tolist()


def other_estimator():
    return all_reduce(estimate(x, estimator=("signs", "labels")[rank]))


def estimate_and_joint():
    return all_reduce(estimate(x) if rank else accumulate(model, x, family))


results = {}
for case in json.loads(sys.argv[2]):
    try:
        results[case] = globals()[case]()
    except ValueError as error:
        results[case] = {"error": str(error)}
open(f"{sys.argv[1]}/{rank}.json", "w").write(json.dumps(results))
torch.distributed.destroy_process_group()
"""
ANSWERS = ["unequal", "batches", "first_empty", "last_empty", "twice", "subgroup", "all_empty"]
ANSWERS += ["some_quantities", "labels", "same_settings", "outside", "estimates", "own_signs"]
ANSWERS += ["fsdp_1_sharded", "fsdp_2_sharded"]
REFUSALS = {
    "other_estimator": r"rank 1 .*estimates with different estimator= cannot be merged",
    "estimate_and_joint": r"rank 1 .*an estimate and an accumulator cannot be merged",
    "other_family": r"rank 1 .*is for Categorical outputs, the other side for Bernoulli outputs",
    "other_settings": r"rank 1 .*for Gaussian outputs, .* Gaussian outputs or the same with other",
    "other_family_and_empty": r"rank 1 .*is for Categorical outputs, .* for Bernoulli outputs",
    "other_layers": r"rank 1 .*other parameters than before: \{'2.weight'.*instead of \{'0.weight'",
    "other_shapes": r"rank 1 .*other parameters than before: \{'weight': \(4, 4\).* \(3, 4\)",
    "other_quantities": r"rank 1 .*different settings: .*'certified'.* and .*None",
    "other_order": r"rank 1 .*second derivatives or other quantities on one side only",
}


def torchrun(script, *arguments, processes=2):
    """Run a script in several processes, and give what each of them prints, in any order."""
    root = str(Path(fimlib.__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr"]
    command += ["127.0.0.1", "--nproc-per-node", str(processes)]
    logs = script.parent / "logs"  # on one pipe, their lines would mix
    command += ["--redirects", "1", "--log-dir", str(logs), str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agent = subprocess.Popen(command, env=environment, **pipes)
    try:
        _, errors = agent.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        agent.terminate()  # which ends its workers, each in a session of its own; kill would not
        agent.communicate()
        pytest.fail(f"the processes hang: nothing after {TIME_LIMIT} s")
    assert agent.returncode == 0, errors[-4000:]
    return [log.read_text() for log in logs.rglob("stdout.log")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Case → what rank 0 and rank 1 came to."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "cases.py"
    script.write_text(CASES)
    torchrun(script, str(folder), json.dumps(ANSWERS + list(REFUSALS)))
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return {case: [rank[case] for rank in ranks] for case in ranks[0]}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    return model, torch.randn(9, 4, dtype=torch.float64)


def assert_is(result, joint):
    """To 1e-12 of the largest entry; of the largest I², where Var_x I is the difference."""
    assert "error" not in result, result
    assert result["count"] == joint.count
    assert result["layers"] == joint.layers
    whole = joint.state_dict()
    expected = {**whole["means"], "Var_x I": whole["scatter"]}
    assert result["state"].keys() == expected.keys()
    for key, tensors in expected.items():
        assert result["state"][key].keys() == tensors.keys()
        for name, tensor in tensors.items():
            scale = tensor.abs().max()
            if key == "Var_x I":
                scale = scale + joint.count * whole["means"]["I"][name].square().max()
            found = torch.tensor(result["state"][key][name], dtype=torch.float64)
            assert (found - tensor).abs().max() <= 1e-12 * scale, (key, name)


def test_estimates_of_two_processes_become_one(results, network):
    model, x = network
    (total, first), (same, second) = results["estimates"]
    assert total == same
    assert total["num_inputs"] == 9
    assert (
        total["origin"]["data"] == fimlib.estimate(model, x, Categorical(), passes=2).origin["data"]
    )
    for name in total["value"]:
        a, b = (torch.tensor(part["value"][name]).double() for part in (first, second))
        torch.testing.assert_close(torch.tensor(total["value"][name]).double(), (4 * a + 5 * b) / 9)
        a, b = (torch.tensor(part["standard_error"][name]).double() for part in (first, second))
        torch.testing.assert_close(
            torch.tensor(total["standard_error"][name]).double(), torch.hypot(4 * a, 5 * b) / 9
        )
    values = results["own_signs"]
    alone = fimlib.estimate(model, x, Categorical(), passes=5, batch_size=2)
    assert values[0] == alone.value["0.weight"].tolist() != values[1]


@pytest.mark.parametrize(
    "case", ["unequal", "batches", "first_empty", "last_empty", "twice", "subgroup"]
)
def test_two_processes_give_the_answer_of_one(case, results, network):
    model, x = network
    ranks = results[case]
    if case != "subgroup":
        assert ranks[0] == ranks[1]  # to the bit
    bounds = "certified" if case == "unequal" else None
    assert_is(ranks[1], accumulate(model, x, Categorical(), bounds=bounds))


@pytest.mark.parametrize("case", ["fsdp_1_sharded", "fsdp_2_sharded"])
def test_the_full_weights_of_a_sharded_network(case, results, network):
    model, x = network
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    for result in results[case]:
        for call in ("estimate", "accumulate"):
            assert re.search(r"is sharded.* load get_model_state_dict\(model, opti", result[call])
        assert_is(result["joint"], accumulate(model, x, Categorical()))
        found, expected = result["estimates"]
        for name, values in expected.items():
            a, b = (torch.tensor(v, dtype=torch.float64) for v in (found[name], values))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_other_kinds_of_accumulators(results, network):
    model, x = network
    some = accumulate(model, x, Categorical(), quantities=["V1"])
    assert_is(results["some_quantities"][0], some)
    family, labelled = Categorical(), Joint(Categorical())
    derivs = fimlib.differentiate(model, x)
    labelled.update(
        derivs, family.observed(derivs.outputs, torch.tensor([0, 1, 2, 0, 1, 1, 1, 2, 0]))
    )
    assert_is(results["labels"][0], labelled)
    gaussian = Gaussian(torch.eye(3, dtype=torch.float64) * 2)
    assert_is(results["same_settings"][1], accumulate(model, x, gaussian))
    for case in ("some_quantities", "labels", "same_settings"):
        assert results[case][0] == results[case][1]


def test_a_subgroup(results, network):
    model, x = network
    assert_is(results["subgroup"][0], accumulate(model, x[:2], Categorical()))
    assert results["outside"][0]["count"] == 0
    assert "this process does not belong to the group" in results["outside"][1]["error"]


def test_nobody_has_seen_anything(results):
    assert [result["count"] for result in results["all_empty"]] == [0, 0]


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_on_every_process(case, results):
    first, second = (result["error"] for result in results[case])
    assert first == second
    assert re.match(REFUSALS[case], first), first


def test_the_example_of_the_docstring(tmp_path):
    example = all_reduce.__doc__.split("being::\n")[1]
    example = textwrap.dedent(example.rstrip())
    assert len(example.strip().splitlines()) == 9
    script = tmp_path / "example.py"
    script.write_text(example)
    lines = sorted(torchrun(script))
    model = nn.Linear(4, 3).double()
    nn.init.eye_(model.weight), nn.init.zeros_(model.bias)
    x = torch.linspace(-1, 1, 28).double().view(7, 4)
    expected = accumulate(model, x, Categorical()).variance_i1(num_inputs=100)["bias"]
    assert [line.split(" ", 2)[:2] for line in lines] == [["0", "7"], ["1", "7"]]
    values = [json.loads(line.split(" ", 2)[2]) for line in lines]
    assert values[0] == values[1]
    assert (torch.tensor(values[0], dtype=torch.float64) - expected).abs().max() <= 1e-12


def test_a_single_process_needs_to_say_so():
    with pytest.raises(ValueError, match=r"not initialised: call torch\.distributed\.init_process"):
        all_reduce(Joint(Categorical()))
