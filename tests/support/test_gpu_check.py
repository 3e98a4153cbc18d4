"""The comparison of CPU and GPU, as far as it can be seen without a GPU."""

import fake_device
import pytest
import torch
from support import gpu_check


@pytest.mark.parametrize("dtype", gpu_check.TOLERANCE)
def test_a_device_agrees_with_itself_and_disagrees_when_it_is_wrong(dtype, monkeypatch):
    differences = gpu_check.largest_differences("cpu", dtype)
    assert set(differences.values()) == {0.0}
    assert {"max_outer", "certified", "I 0.weight", "V2 6.bias", "V1 bound 2.weight"} <= set(
        differences
    )
    honest, calls, right = gpu_check.quantities, [], {}

    def wrong_the_second_time(net, x):
        calls.append(x)
        right.update(right or honest(net, x))
        for name, value in right.items():
            yield name, value * 1.5 if len(calls) == 2 and name == "V1 0.weight" else value

    monkeypatch.setattr(gpu_check, "quantities", wrong_the_second_time)
    wrong = {k: v for k, v in gpu_check.largest_differences("cpu", dtype).items() if v}
    assert wrong == {"V1 0.weight": pytest.approx(0.5)}


@pytest.mark.full
@pytest.mark.parametrize("dtype", gpu_check.TOLERANCE)
def test_the_comparison_runs_on_another_device(dtype):
    with fake_device.installed() as device:
        differences = gpu_check.largest_differences(device.type, dtype)
    assert max(differences.values()) <= gpu_check.TOLERANCE[dtype]


@pytest.mark.parametrize(("worst", "status", "word"), [(1e-12, 0, "ok"), (1e-2, 1, "FAILED")])
def test_the_verdict_is_the_exit_status(worst, status, word, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    found = {"I": 0.0, "V1": worst}
    monkeypatch.setattr(gpu_check, "largest_differences", lambda _device, _dtype: found)
    assert gpu_check.main() == status
    assert f"(V1), tolerance 1e-09: {word}" in capsys.readouterr().out
