"""train_sft.py and its twin."""

from functools import partialmethod

import pytest
import torch

from twins import common, sft

EXACT = [name for name in sft.RUNS if name not in ("compiled", "bf16")]


@pytest.mark.parametrize("name", EXACT)
def test_the_twin_agrees(place, tmp_path, name):
    common.check(sft, name, place, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", EXACT)
def test_each_flag_matters(place, tmp_path, name):
    args = common.check(sft, name, place, tmp_path)
    common.check_flags_matter(sft, args)


def test_compiled_blocks_change_nothing(place, tmp_path, monkeypatch):
    """What dynamo has traced, run without a C++ compiler, which takes minutes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    eager = partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    common.check(sft, "compiled", place, tmp_path)
    assert graphs


def test_in_bf16_it_agrees_to_the_digits_that_there_are(place, tmp_path):
    """Eight bits. Adam moves a weight by at most --lr in a step, whichever way."""
    args = common.check(sft, "bf16", place, tmp_path, rel=0.02, abs=2 * 2e-3)
    with pytest.raises(AssertionError, match="step 0: eval/loss"):
        common.agree(sft, args, rel=1e-5, abs=2 * 2e-3)


@pytest.mark.parametrize("name", EXACT)
def test_it_agrees_after_a_resume(place, tmp_path, name):
    common.check(sft, name, place, tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truncated", "split", "lora"])
def test_it_agrees_after_a_resume_on_two_ranks(place, tmp_path, name):
    common.check(sft, name, place, tmp_path, ranks=2, resume=True)


def test_its_metrics_are_those_that_it_logs():
    common.check_metrics(sft)
