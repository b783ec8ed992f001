"""Pairs of examples: cut, dropped and counted; mismatched for KTO; the best and worst of groups."""

import numpy as np
import pytest
import torch

from nanopost import InputError, pairs
from nanopost.batch import Example


def example(ids, prompt):
    return Example(ids, np.arange(len(ids)) >= prompt)


def test_pairs_are_cut_dropped_and_counted():
    good = example([1, 2, 3, 4, 5, 6], 2), example([1, 2, 7], 2)
    emptied = example([1, 2, 3, 4, 9], 4), example([1, 2, 3, 4, 8], 4)
    alike = example([1, 2], 1), example([1, 2], 1)
    mirrored = good[1], example([1, 2, 3, 4], 2)
    kept, counts = pairs.fit_to([good, emptied, alike, mirrored], 4, "truncate")
    assert [[len(e) for e in pair] for pair in kept] == [[4, 3], [3, 4]]
    wanted = {"overlong": 2, "truncated": 1, "emptied": 1, "alike": 1, "continued": 0, "swapped": 2}
    assert counts == wanted
    kept, counts = pairs.fit_to([good, emptied, alike, mirrored], 4, "drop")
    assert [[len(e) for e in pair] for pair in kept] == [[3, 4]]
    assert counts == {**wanted, "truncated": 0, "emptied": 0, "swapped": 0}
    assert pairs.fit_to([], 4, "drop")[0] == []


def test_a_side_that_goes_on_where_the_other_ends_makes_no_pair():
    short, long = example([1, 2, 7], 2), example([1, 2, 7, 3, 8], 2)
    other = example([1, 2, 9], 2)
    kept, counts = pairs.fit_to([(short, long), (other, short), (long, short)], 9, "truncate")
    assert len(kept) == 1 and counts["continued"] == 2 and not counts["alike"]


def test_where_no_pair_is_left_the_counts_are_said():
    emptied = example([1, 2, 3, 4, 9], 4), example([1, 2, 3, 4, 8], 4)
    said = r"none of 1 pairs is left within --max_length 4 \(--overlong truncate\): .*1 emptied"
    with pytest.raises(InputError, match=said):
        pairs.fit_to([emptied], 4, "truncate")


# ---------------------------------------------------------------------------------------------- KTO
def rows(n):
    """Row k is the prompt 10 k, 10 k + 1, k % 2 more tokens, and the answer 100 k, ..."""
    made = []
    for k in range(1, n + 1):
        prompt = [10 * k + i for i in range(2 + k % 2)]
        e = example(prompt + [100 * k + i for i in range(k)], len(prompt))
        e.columns["label"] = float(k % 2)
        made.append(e)
    return made


def test_kto_sees_each_prompt_with_another_rows_completion():
    made = rows(6)
    found = pairs.mismatched(made, 50)
    taken = []
    for row, (own, other) in zip(made, found, strict=True):
        assert own is row and other.columns == row.columns
        assert other.ids[~other.mask].tolist() == row.ids[~row.mask].tolist()
        answer = other.ids[other.mask].tolist()
        assert answer != row.ids[row.mask].tolist()
        taken.append(answer)
    assert sorted(taken) == sorted(e.ids[e.mask].tolist() for e in made)  # each answer once
    again = pairs.mismatched(made, 50)
    assert [b.ids.tolist() for _, b in again] == [b.ids.tolist() for _, b in found]


def test_a_mismatched_pair_is_cut_to_the_maximum_length_and_shares_no_columns_with_its_row():
    made = rows(6)
    for row, (_, other) in zip(made, pairs.mismatched(made, 5)):
        assert len(other) <= 5
        other.columns["ref_logp"] = 1.0
        assert "ref_logp" not in row.columns


def test_a_single_row_has_no_other():
    with pytest.raises(InputError, match="kto compares .* give 2 rows or more"):
        pairs.mismatched(rows(1), 50)
    assert pairs.mismatched([], 50) == []


# ------------------------------------------------------------------------------------------- online
def answers(*lengths):
    return [Example([1, 2] + [5] * n, [False] * 2 + [True] * n) for n in lengths]


def test_of_sampled_answers_the_best_is_chosen_and_the_worst_rejected():
    groups = [answers(1, 2, 3), answers(4, 5, 6), answers(3, 3, 3), answers(7, 8, 9)]
    reward_PG = torch.tensor(
        [
            [0.0, 2.0, -1.0],
            [1.0, 1.0, 1.0],  # a tie
            [1.0, 1.0 + 1e-6, 1.0],  # answers that are the same tokens
            [-3.0, -3.0, -2.0],  # the first of the two worst
        ]
    )
    found = pairs.best_and_worst(groups, reward_PG)
    assert [[int(e.mask.sum()) for e in pair] for pair in found] == [[2, 3], [9, 7]]
    assert found[0] == (groups[0][1], groups[0][2])  # these themselves, not their likes
    assert pairs.best_and_worst([], torch.zeros(0, 4)) == []


# ------------------------------------------------------------------------------------------ columns
@pytest.mark.parametrize("train_prompt", [False, True])
def test_weight_and_length_are_of_the_answer_even_where_the_prompt_is_trained(train_prompt):
    pair = example([1, 2, 3, 4], 2), example([1, 2, 9], 2)
    pairs.add_columns([pair], train_prompt)
    assert [e.columns["weight"].tolist() for e in pair] == [[0, 0, 1, 1], [0, 0, 1]]
    assert [e.columns["length"] for e in pair] == [2, 1]
    prompt = [train_prompt] * 2
    assert [e.mask.tolist() for e in pair] == [[*prompt, True, True], [*prompt, True]]
    assert pair[0].num_targets == (3 if train_prompt else 2)
