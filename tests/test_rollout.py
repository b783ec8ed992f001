"""The Rollout record, its metrics, and the alarm for an engine that is not the trainer."""

import json

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing as mp

from nanopost.batch import Example, batch_of, padded
from nanopost.rollout import (
    GAP,
    LogpGap,
    Rollout,
    length_metrics,
    sample_records,
    staleness_metrics,
    unsampled,
)


def rollout(prompt=(5, 6), ids=(7, 8, 9), logp=(-1.0, -2.0, -3.0), finish="stop", sampled=None):
    return Rollout([*prompt], [*ids], np.array(logp, np.float32), finish, 3, sampled)


# A tool's answer, 40 and 41, stands between two turns of the policy; the engine gives it logp 0.
TWO_TURNS = rollout(
    ids=(7, 1, 40, 41, 8, 1),
    logp=(-1.0, -2.0, 0.0, 0.0, -3.0, -4.0),
    sampled=np.array([True, True, False, False, True, True]),
)


# ------------------------------------------------------------------------------------- the record
def test_all_of_a_completion_is_sampled_unless_it_says_otherwise():
    one = rollout()
    assert one.sampled.dtype == bool and one.sampled.tolist() == [True, True, True]
    assert one.length == 3 and TWO_TURNS.length == 4
    assert rollout(ids=(), logp=()).length == 0


def test_an_example_is_prompt_and_completion_with_the_completion_as_its_mask():
    e = rollout().example()
    assert e.ids.tolist() == [5, 6, 7, 8, 9]
    assert e.mask.tolist() == [False, False, True, True, True]
    assert e.columns.keys() == {"engine_logp", "version"}
    assert e.columns["version"].tolist() == [-1, -1, 3, 3, 3]
    assert e.columns["engine_logp"].dtype == np.float32
    assert e.columns["engine_logp"].tolist() == [0, 0, -1, -2, -3]


def test_what_the_environment_said_is_context_and_no_action():
    e = TWO_TURNS.example()
    assert e.ids.tolist() == [5, 6, 7, 1, 40, 41, 8, 1]
    assert e.mask.tolist() == [False, False, True, True, False, False, True, True]
    assert e.columns["engine_logp"].tolist() == [0, 0, -1, -2, 0, 0, -3, -4]
    assert e.columns["version"].tolist() == [-1, -1, 3, 3, -1, -1, 3, 3]
    assert e.num_targets == TWO_TURNS.length == 4
    assert padded([e], "engine_logp").tolist() == [[-1, -2, -3, -4]]


def test_log_probs_of_what_was_not_sampled_are_not_read():
    """Whatever an engine reports for the environment's tokens."""
    noisy = rollout(ids=TWO_TURNS.ids, logp=(-1, -2, 9, 9, -3, -4), sampled=TWO_TURNS.sampled)
    expected = TWO_TURNS.example().columns["engine_logp"]
    assert noisy.example().columns["engine_logp"].tolist() == expected.tolist()


def test_in_a_batch_each_action_is_at_the_token_that_predicts_it():
    batch = batch_of([TWO_TURNS.example(), rollout().example()])
    targets = batch.target_N[batch.mask_N].tolist()
    assert targets == [7, 1, 8, 1, 7, 8, 9] and batch.num_targets == 7
    assert batch["engine_logp"][batch.mask_N].tolist() == [-1, -2, -3, -4, -1, -2, -3]
    assert not batch["engine_logp"][~batch.mask_N].any()


def test_records_are_text_and_a_number_of_each_column():
    def decode(ids):
        return " ".join(map(str, ids))

    rollouts = [rollout(), rollout(ids=(9,), logp=(-1.0,), finish="length")]
    columns = {"reward": torch.tensor([0.5, 1.0, 9.0]), "advantage": np.array([-1.0, 1.0])}
    records = sample_records(decode, rollouts, **columns)
    assert json.loads(json.dumps(records)) == [
        {
            "prompt": "5 6",
            "completion": "7 8 9",
            "finish": "stop",
            "reward": 0.5,
            "advantage": -1.0,
        },
        {"prompt": "5 6", "completion": "9", "finish": "length", "reward": 1.0, "advantage": 1.0},
    ]
    assert sample_records(decode, [], **columns) == []
    rollouts[0].answer = "42"
    assert [record.get("answer") for record in sample_records(decode, rollouts)] == ["42", None]
    (unrewarded,) = sample_records(decode, rollouts[:1], reward=torch.tensor([torch.nan]))
    assert unrewarded["reward"] is None  # NaN is no JSON


# ----------------------------------------------------------------------------------------- lengths
def test_lengths_are_of_sampled_tokens(alone):
    short = rollout(ids=(9,), logp=(-1.0,), finish="length")
    assert length_metrics([[rollout(), TWO_TURNS], [short], []]) == {
        "completions/duplicate_ratio": 0,
        "completions/mean_length": pytest.approx(8 / 3),
        "completions/min_length": 1,
        "completions/max_length": 4,
        "completions/clipped_ratio": pytest.approx(1 / 3),
    }


def test_duplicates_repeat_an_earlier_completion_of_their_group(alone):
    a, b, longer = rollout(), rollout(logp=(-2.0, -2.0, -2.0)), rollout(ids=(7, 8, 9, 9))
    found = length_metrics([[a, b, longer, a], [a, longer, longer], [b]])
    assert found["completions/duplicate_ratio"] == pytest.approx(3 / 8)


# --------------------------------------------------------------------------------------- staleness
def test_staleness_is_in_steps_over_sampled_tokens(alone):
    mixed = rollout()
    mixed.versions = np.array([3, 4, 5])
    found = staleness_metrics([mixed, TWO_TURNS], 5)
    assert found == {"staleness/mean": pytest.approx((2 + 1 + 0 + 4 * 2) / 7), "staleness/max": 2}
    assert staleness_metrics([], 5) == {"staleness/max": 0}


# --------------------------------------------------------------------------------------------- gap
ALL = torch.ones(1, dtype=torch.bool)


def test_the_limit_is_for_tokens_that_the_trainers_weights_have_drawn(alone):
    """The metrics are of all tokens; older weights are another policy by design."""
    gap = LogpGap(None, torch.float32)
    trainer_N, engine_N = torch.tensor([-1.0, -2.0, -3.0, 5.0]), torch.tensor([-1.0, -2.6, -3.0, 0])
    mask_N = torch.tensor([True, True, True, False])
    for same, alarm in (([1, 0, 1, 1], False), ([1, 1, 0, 1], True), ([0, 0, 0, 1], False)):
        gap.add(trainer_N, engine_N, mask_N, torch.tensor(same, dtype=torch.bool))
        assert gap.metrics() == {
            f"{GAP}/mean": pytest.approx(0.2),
            f"{GAP}/max": pytest.approx(0.6),
        }
        if alarm:
            with pytest.raises(RuntimeError, match="differ by 0.3 on average"):
                gap.check(2)
        else:
            gap.check(2)


def test_the_gap_is_over_sampled_tokens_and_starts_anew_each_step(alone):
    gap = LogpGap(None, torch.float32)
    trainer_N = torch.tensor([-1.0, -2.0, 5.0, -3.0], requires_grad=True)
    engine_N = torch.tensor([-1.1, -1.8, 0.0, -3.0])
    gap.add(trainer_N, engine_N, torch.tensor([True, True, False, True]), ALL)
    gap.add(torch.tensor([-1.0]), torch.tensor([-0.5]), torch.tensor([True]), ALL)
    found = gap.metrics()
    assert found == {
        f"{GAP}/mean": pytest.approx((0.1 + 0.2 + 0.0 + 0.5) / 4),
        f"{GAP}/max": pytest.approx(0.5),
    }
    gap.add(torch.tensor([-1.0]), torch.tensor([-1.25]), torch.tensor([True]), ALL)
    assert gap.metrics() == {f"{GAP}/mean": 0.25, f"{GAP}/max": 0.25}


def test_a_step_without_a_forward_pass_has_no_gap(alone):
    """As where all advantages are 0: nothing to compare is no alarm."""
    gap = LogpGap(None, torch.float32)
    assert gap.metrics() == {f"{GAP}/max": 0.0}
    gap.check(1)


@pytest.mark.parametrize(
    "limit, dtype, expected",
    [
        (None, torch.float32, 1e-3),
        (None, torch.bfloat16, 0.1),
        (0.5, torch.float32, 0.5),
        (0.5, torch.bfloat16, 0.5),
    ],
)
def test_the_limit_is_given_or_that_of_the_precision(limit, dtype, expected):
    gap = LogpGap(limit, dtype)
    gap.same = expected
    gap.check(3)
    gap.same = expected * 1.1
    with pytest.raises(RuntimeError) as raised:
        gap.check(3)
    sentence = str(raised.value)
    assert sentence.startswith("step 3: ") and f"--max_logp_gap {expected:g}" in sentence
    assert f"differ by {expected * 1.1:.2g} " in sentence


def test_a_gap_that_is_no_number_is_an_alarm(alone):
    gap = LogpGap(None, torch.float32)
    gap.add(torch.tensor([torch.nan]), torch.tensor([-1.0]), torch.tensor([True]), ALL)
    gap.metrics()
    with pytest.raises(RuntimeError, match="differ by nan on average"):
        gap.check(1)


def _rank(rank, size, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size
    )
    gap = LogpGap(None, torch.float32)
    if rank == 1:
        engine_N = torch.tensor([-1.1, -1.2, -1.3])
        gap.add(torch.full((3,), -1.0), engine_N, torch.ones(3, dtype=torch.bool), ALL)
    lengths = [[rollout()]] if rank == 0 else [[TWO_TURNS], [rollout(ids=(9,), logp=(-1.0,))]]
    found = gap.metrics(), length_metrics(lengths)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_gap_and_lengths_are_those_of_all_ranks_on_each(tmp_path):
    """A rank may have had nothing to compare."""
    mp.start_processes(_rank, (2, tmp_path), nprocs=2, start_method="fork")
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    gap, lengths = one
    assert gap == {f"{GAP}/mean": pytest.approx(0.2), f"{GAP}/max": pytest.approx(0.3)}
    assert lengths == {
        "completions/mean_length": pytest.approx(8 / 3),
        "completions/min_length": 1,
        "completions/max_length": 4,
        "completions/clipped_ratio": 0.0,
        "completions/duplicate_ratio": 0.0,
    }


def kept(*ids_T):
    return [np.array(ids, np.int32) for ids in ids_T]


def test_what_a_cut_kept_follows_its_tokens_into_the_example():
    first = Rollout([1, 2], [5, 6], np.zeros(2), "stop", 3, kept=kept((5, 9), (6,)))
    first.extend([7], Rollout([], [8], np.zeros(1), "stop", 3, kept=kept((3, 8))))
    e = first.example()
    assert [ids.tolist() for ids in e.kept] == [[], [], [5, 9], [6], [], [3, 8]]
    assert rollout().example().kept is None


def test_a_turn_and_the_answer_to_it_extend_a_completion():
    first = Rollout([1], [5, 6], np.array([-1, -2], np.float32), "stop", 3)
    first.extend([7], Rollout([1, 5, 6, 7], [8], np.array([-3], np.float32), "length", 4))
    assert first.ids == [5, 6, 7, 8] and first.finish == "length" and first.length == 3
    assert first.logp.tolist() == [-1, -2, 0, -3] and first.sampled.tolist() == [1, 1, 0, 1]
    assert first.versions.tolist() == [3, 3, 3, 4] and first.version == 3


def test_a_stored_answer_follows_the_prompt_that_rollouts_follow():
    """A template may write more before an answer that is to come than before one that is there."""
    e = Example([1, 2, 7, 8, 3, 9], [0, 0, 1, 1, 0, 1])
    found = unsampled([1, 2, 5], e, 4)
    assert found.ids.tolist() == [1, 2, 5, 7, 8, 3, 9]
    assert found.mask.tolist() == [False] * 3 + [True, True, False, True]
    assert found.columns["engine_logp"].tolist() == [0.0] * 7
    assert found.columns["version"].tolist() == [-1] * 7
    assert unsampled([1, 2, 5], e, 2).ids.tolist() == [1, 2, 5, 7, 8]
