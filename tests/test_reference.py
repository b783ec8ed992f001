"""Reference log-probs of pairs: an answer's sum, fresh, or from a cache that any change misses."""

import json

import numpy as np
import pytest
import torch
from small import random_ids, small_model

from nanopost import dist, forward, hf, lora, pairs, reference
from nanopost.batch import Example, batch_of
from runs import toy

WORLD = dist.World(0, 1, torch.device("cpu"), torch.float32)


def made(seed=0, count=5):
    draw = np.random.default_rng(seed)
    found = []
    for p in range(count):
        prompt, *answers = (int(n) for n in draw.integers(1, 9, 3))
        lengths = [prompt + n for n in answers]
        sides = [Example(random_ids(n, seed + p), np.arange(n) >= prompt) for n in lengths]
        found.append(tuple(sides))
    pairs.add_columns(found)
    return found


def ref_logps(of):
    return [e.columns["ref_logp"] for pair in of for e in pair]


@pytest.mark.parametrize("tokens", [17, 1000])
@pytest.mark.parametrize("train_prompt", [False, True])
def test_a_reference_sums_the_log_probs_of_the_answer_alone(alone, tokens, train_prompt):
    """Even where the prompt's tokens are targets too, as for orpo."""
    model, found = small_model(3), made()
    expected = []
    for e in (e for pair in found for e in pair):
        logp_N, _ = model(batch_of([Example(e.ids, e.mask)]))
        expected.append(float(logp_N.detach().sum()))
    pairs.add_columns(found, train_prompt)
    reference.add_reference(found, model, tokens, "cpu")
    assert ref_logps(found) == pytest.approx(expected, rel=1e-5)


def test_without_a_reference_it_is_zero():
    found = made()
    reference.add_no_reference(found)
    assert ref_logps(found) == [0.0] * 10


@pytest.fixture
def folder(tmp_path):
    toy.write_model(tmp_path / "toy")
    return tmp_path / "toy"


def test_a_cached_reference_is_computed_once_and_equals_a_fresh_one(
    alone, folder, tmp_path, monkeypatch
):
    model, cache = hf.load_model(folder), tmp_path / "new" / "cache"
    found, fresh = made(), made()
    reference.add_reference(fresh, model, 100, "cpu")
    reference.add_cached_reference(found, model, folder, 100, WORLD, cache)
    assert ref_logps(found) == ref_logps(fresh)
    (path,) = cache.iterdir()
    assert path.suffix == ".npy" and "fp32" in path.name

    monkeypatch.setattr(forward, "logprobs", None)  # the second time nothing is computed
    again = made()
    reference.add_cached_reference(again, model, folder, 100, WORLD, cache)
    assert ref_logps(again) == ref_logps(fresh)


def test_another_model_precision_or_row_gets_numbers_of_its_own(alone, folder, tmp_path):
    model, cache = hf.load_model(folder), tmp_path / "cache"

    def count(of, world=WORLD):
        reference.add_cached_reference(of, model, folder, 100, world, cache)
        return len([*cache.iterdir()])

    assert count(made()) == 1
    assert count(made(1)) == 2
    assert count(made()[::-1]) == 3  # the order counts: the table has no names
    other_mask = made()
    other_mask[0][0].mask[-1] = False
    assert count(other_mask) == 4
    other_weight = made()
    other_weight[0][0].columns["weight"][-1] = 0.5
    assert count(other_weight) == 5
    assert count(made(), dist.World(0, 1, WORLD.device, torch.bfloat16)) == 6
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert count(made()) == 7
    toy.write_model(folder, seed=1)
    assert count(made()) == 8
    assert count(made()) == 8
    # A reference in NF4, of the same folder.
    packed = hf.load_model(folder, shard=lambda model: lora.quantize(lora.apply(model, 2)))
    model = lora.Reference(packed)
    assert count(made()) == 9


def test_ids_cut_at_another_place_have_another_hash():
    def hash_of(*ids):
        sides = [Example(list(part), [True] * len(part)) for part in ids]
        return reference.content_hash(list(zip(sides[0::2], sides[1::2])))

    assert hash_of((1, 2), (3,)) != hash_of((1,), (2, 3))
    assert hash_of((1, 2), (3,)) == hash_of((1, 2), (3,))
