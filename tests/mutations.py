"""Breaks the code in one place at a time and expects the tests to notice.

    python tests/mutations.py                     # all of them, about ten minutes on one core
    python tests/mutations.py bos clip            # those with bos or clip in their names

The tree is copied to a temporary folder. There the tests named below are first seen green, and then each mutation
replaces one piece of text (found exactly once, or this script is to be mended: it must follow the code) and has to turn
its tests red. Tests of real data do not count, as a clone has none. Exits with 1 if a mutation survives.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # of which one must fail


def mutation(name, file, old, new, *tests):
    return Mutation(name, file, old, new, tests)


MUTATIONS = [
    # ---- masks and templates
    mutation(
        "mask-not-shifted",
        "nanopost/data.py",
        "_shift(np.concatenate([e.mask for e in examples]), end_S)",
        "np.concatenate([e.mask for e in examples])",
        "test_data.py::test_batch_of_equals_a_golden_token_by_token",
    ),
    mutation(
        "mask-begins-a-token-early",
        "nanopost/chat.py",
        "(start_T < end) & (end_T > start)",
        "(start_T < end) & (end_T >= start)",
        "test_chat.py::test_a_mask_spelled_out",
    ),
    mutation(
        "first-sampled-token-untrained",
        "nanopost/rollout.py",
        "len(self.ids)) >= len(self.prompt)",
        "len(self.ids)) > len(self.prompt)",
        "test_trl_parity.py::test_two_optimizer_steps_of_train_grpo_are_those_of_trl",
    ),
    mutation(
        "end-of-turn-dropped",
        "nanopost/chat.py",
        "return closed.end() if closed else max(start, content_end)",
        "return max(start, content_end)",
        "test_chat.py::test_a_mask_spelled_out",
    ),
    mutation(
        "newline-behind-end-of-turn-trained",
        "nanopost/chat.py",
        "inside.end(1) if inside",
        "inside.end() if inside",
        "test_chat.py::test_masks_are_right_token_by_token_whatever_the_contents",
    ),
    mutation(
        "eos-of-text-dropped",
        "nanopost/chat.py",
        "ids.append(self.eos_id)",
        "pass",
        "test_chat.py::test_text_is_trained_whole_with_one_bos_and_one_eos",
    ),
    mutation(
        "bos-of-text-doubled",
        "nanopost/chat.py",
        "return ids if ids[:len(self.prefix)] == self.prefix else self.prefix + ids",
        "return self.prefix + ids",
        "test_chat.py::test_text_is_trained_whole_with_one_bos_and_one_eos",
    ),
    mutation(
        "bos-of-prompt-doubled",
        "nanopost/chat.py",
        "        return self.encode(text)\n",
        "        return self.prefix + self.encode(text)\n",
        "test_mutation_gaps.py::test_a_template_that_writes_bos_gets_no_second_from_the_tokenizer",
    ),
    mutation(
        "bos-of-example-doubled",
        "nanopost/chat.py",
        "encoding = self.raw.encode(text, add_special_tokens=False)",
        "encoding = self.raw.encode(''.join(map(self.raw.id_to_token, self.prefix)) + text)",
        "test_mutation_gaps.py::test_a_template_that_writes_bos_gets_no_second_from_the_tokenizer",
    ),
    # ---- the Triton kernel
    mutation(
        "kernel-phantom-vocabulary-tail",
        "kernels/logprob.py",
        "z = tl.where(column[None, :] < V, z, -1e30)",
        "z = z + 0",
        "test_kernels.py::test_values_and_gradients_are_those_of_float64_and_of_the_twin",
    ),
    mutation(
        "kernel-entropy-of-tiles-not-recentred",
        "kernels/logprob.py",
        "(s_JM + (m_JM - m_M) * l_JM)",
        "s_JM",
        "test_kernels.py::test_values_and_gradients_are_those_of_float64_and_of_the_twin",
    ),
    mutation(
        "kernel-target-of-a-later-chunk",
        "kernels/logprob.py",
        "(column + first)[None, :] == target",
        "column[None, :] == target",
        "test_kernels.py::test_chunks_of_the_vocabulary_change_nothing_and_unwritten_memory_is_never_read",
    ),
    mutation(
        "kernel-stored-exponentials-of-another-tile",
        "kernels/logprob.py",
        "(first // BLOCK_V + j).to(tl.int64)",
        "j.to(tl.int64)",
        "test_kernels.py::test_chunks_of_the_vocabulary_change_nothing_and_unwritten_memory_is_never_read",
    ),
    mutation(
        "kernel-upstream-gradient-of-the-first-token",
        "kernels/logprob.py",
        "tl.load(g_ptr + row, mask=real, other=0.0)",
        "tl.load(g_ptr + row * 0, mask=real, other=0.0)",
        "test_kernels.py::test_values_and_gradients_are_those_of_float64_and_of_the_twin",
    ),
    mutation(
        "kernel-stores-without-a-backward-pass-to-come",
        "kernels/logprob.py",
        "store and torch.is_grad_enabled() and",
        "store and",
        "test_kernels.py::test_exponentials_are_stored_only_for_a_backward_pass_and_where_they_fit",
    ),
    # ---- order, packing and attention
    mutation(
        "positions-not-reset",
        "nanopost/data.py",
        "position_N = np.arange(len(token_N)) - np.repeat(end_S - length_S, length_S)",
        "position_N = np.arange(len(token_N))",
        "test_data.py::test_batch_of_equals_a_golden_token_by_token",
    ),
    mutation(
        "a-bin-of-the-epoch-dropped",
        "nanopost/data.py",
        "for b in rng.permutation(len(bins))]",
        "for b in rng.permutation(len(bins))[1:]]",
        "test_data.py::test_an_epoch_of_steps_visits_every_row_once",
    ),
    mutation(
        "only-the-first-micro-batch-of-a-rank",
        "nanopost/data.py",
        "[rows[i] for i in b] for b in bins[rank::size]]",
        "[rows[i] for i in b] for b in bins[rank:rank + 1]]",
        "test_data.py::test_a_step_is_the_same_on_any_number_of_ranks_and_at_any_resumption",
    ),
    mutation(
        "order-ignores-the-epoch",
        "nanopost/data.py",
        "return _random(seed, epoch).permutation(n)",
        "return _random(seed, 0).permutation(n)",
        "test_data.py::test_each_epoch_is_a_permutation_of_its_own",
    ),
    mutation(
        "no-causal-mask",
        "nanopost/attention.py",
        "is_causal=band is None",
        "is_causal=False",
        "test_attention.py::test_packed_equals_the_dense_block_diagonal_softmax_forward_and_backward",
    ),
    mutation(
        "window-off-by-one",
        "nanopost/attention.py",
        "at[:, None] - at < window",
        "at[:, None] - at <= window",
        "test_attention.py::test_packed_equals_the_dense_block_diagonal_softmax_forward_and_backward",
    ),
    mutation(
        "window-of-the-cache-off-by-one",
        "nanopost/attention.py",
        "at_T >= length_B[:, None] - window",
        "at_T > length_B[:, None] - window",
        "test_attention.py::test_cached_equals_the_last_row_of_packed",
    ),
    mutation(
        "prompts-in-other-rows-of-the-cache",
        "nanopost/attention.py",
        "new_PGTK.repeat_interleave(self.copies, 0)",
        "new_PGTK.repeat(self.copies, 1, 1, 1)",
        "test_attention.py::test_a_cache_holds_each_prompt_once_a_copy_and_what_is_appended_behind_it",
    ),
    # ---- the model and its log-probs
    mutation(
        "llama3-rope-unscaled",
        "nanopost/model.py",
        "(1 - smooth) * freq / factor",
        "(1 - smooth) * freq",
        "test_model.py::test_logits_equal_those_of_transformers_packed_and_alone[llama3.1]",
    ),
    mutation(
        "yarn-ramp-reversed",
        "nanopost/model.py",
        "freq / factor * ramp + freq * (1 - ramp)",
        "freq / factor * (1 - ramp) + freq * ramp",
        "test_model.py::test_logits_equal_those_of_transformers_packed_and_alone[llama_yarn]",
    ),
    mutation(
        "entropy-missing-from-its-gradient",
        "nanopost/logprob.py",
        "(log_p_MC + entropy_M[:, None])",
        "log_p_MC",
        "test_logprob.py::test_gradcheck",
    ),
    mutation(
        "temperature-missing-from-the-gradient",
        "nanopost/logprob.py",
        "dz_MC.div_(ctx.temperature)",
        "dz_MC",
        "test_logprob.py::test_values_and_gradients_equal_those_of_log_softmax",
    ),
    mutation(
        "entropy-of-chunks-without-that-between-them",
        "nanopost/logprob.py",
        "(entropy_JM - log_w_JM)",
        "entropy_JM",
        "test_logprob.py::test_values_and_gradients_equal_those_of_log_softmax",
    ),
    mutation(
        "target-of-another-chunk-gets-its-gradient",
        "nanopost/logprob.py",
        "g_M.where(inside_M, 0)",
        "g_M",
        "test_logprob.py::test_values_and_gradients_equal_those_of_log_softmax",
    ),
    mutation(
        "log-probs-not-moved-to-their-tokens",
        "nanopost/logprob.py",
        "forward(batch).roll(1)",
        "forward(batch)",
        "test_mutation_gaps.py::test_old_log_probs_of_the_trainer_are_those_of_the_engine",
    ),
    # ---- advantages and losses
    mutation(
        "baseline-of-another-group",
        "nanopost/advantages.py",
        "reward_PG - reward_PG.mean(1, keepdim=True)",
        "reward_PG - reward_PG.mean(1, keepdim=True).roll(1, 0)",
        "test_advantages.py::test_advantages_equal_trl",
        "test_advantages.py::test_the_z_score_uses_bessel_and_groups_stand_alone",
    ),
    mutation(
        "leave-one-out-upside-down",
        "nanopost/advantages.py",
        "(num_samples / (num_samples - 1))",
        "((num_samples - 1) / num_samples)",
        "test_advantages.py::test_leave_one_out_is_an_unbiased_policy_gradient",
    ),
    mutation(
        "clip-bounds-swapped",
        "nanopost/losses.py",
        "ratio_N.clamp(1 - clip_low, 1 + clip_high)",
        "ratio_N.clamp(1 - clip_high, 1 + clip_low)",
        "test_losses.py::test_clip_cases_by_hand",
    ),
    mutation(
        "cispo-through-the-ratio",
        "nanopost/losses.py",
        "log_ratio_N.detach().exp()",
        "log_ratio_N.exp()",
        "test_losses.py::test_cispo_cap_bounds_the_ratio_and_no_token_loses_its_gradient",
    ),
    mutation(
        "kl-of-the-wrong-sign",
        "nanopost/losses.py",
        "log_q_N = ref_logp_N - logp_N",
        "log_q_N = logp_N - ref_logp_N",
        "test_losses.py::test_k1_is_unbiased_in_value_and_its_expected_gradient_is_zero",
        "test_losses.py::test_k3_is_unbiased_in_value_and_its_expected_gradient_is_that_of_the_forward_kl",
    ),
    mutation(
        "importance-weights-inverted",
        "nanopost/losses.py",
        "masked(trainer_logp_N - engine_logp_N, mask_N)",
        "masked(engine_logp_N - trainer_logp_N, mask_N)",
        "test_losses.py::test_importance_weights_equal_trl_and_metrics_describe_the_ratios_before_the_cap",
    ),
    mutation(
        "sequence-ratio-summed",
        "nanopost/losses.py",
        'return sum_N / sequence_length(mask_N, seq_N, num_sequences) if level == "sequence" else sum_N',
        "return sum_N",
        "test_losses.py::test_grpo_family_equals_trl_in_value_gradient_and_clip_ratios",
    ),
    # ---- the engine
    mutation(
        "temperature-missing-from-the-log-prob",
        "nanopost/rollout.py",
        "return token_B1[:, 0], log_p_BV.gather(1, token_B1)[:, 0]",
        "return token_B1[:, 0], logits_BV.log_softmax(-1).gather(1, token_B1)[:, 0]",
        "test_rollout.py::test_draws_have_the_frequencies_of_the_distribution",
    ),
    mutation(
        "stop-token-thrown-away",
        "nanopost/rollout.py",
        "length_B[row_A[ended_A]] = t + 1",
        "length_B[row_A[ended_A]] = t",
        "test_rollout.py::test_stop_tokens_end_a_completion_and_stay_in_it",
    ),
    mutation(
        "samples-of-a-group-alike",
        "nanopost/rollout.py",
        "_uniforms(s + i,",
        "_uniforms(s,",
        "test_rollout.py::test_a_rollout_depends_on_its_seed_and_not_on_its_neighbours",
    ),
    # ---- the optimizer and checkpoints
    mutation(
        "weight-decay-on-norms",
        "nanopost/optim.py",
        "0.0 if vector else weight_decay",
        "weight_decay",
        "test_mutation_gaps.py::test_weight_decay_leaves_norms_and_biases_alone",
    ),
    mutation(
        "tied-head-written",
        "nanopost/dist.py",
        "for name, p in model.state_dict().items():",
        'for name, p in {**model.state_dict(), "lm_head.weight": model.head_weight}.items():',
        "test_mutation_gaps.py::test_full_weights_of_a_tied_model_have_no_head",
    ),
    mutation(
        "moments-not-loaded",
        "nanopost/checkpoint.py",
        "dcp.load(stored, checkpoint_id=path)",
        'dcp.load({"model": weights}, checkpoint_id=path)',
        "test_mutation_gaps.py::test_a_checkpoint_brings_back_weights_moments_and_random_state",
    ),
    mutation(
        "random-state-not-restored",
        "nanopost/checkpoint.py",
        'if state["ranks"] == dist.get_world_size():',
        "if False:",
        "test_mutation_gaps.py::test_a_checkpoint_brings_back_weights_moments_and_random_state",
    ),
    mutation(
        "data-order-not-resumed",
        "train_sft.py",
        'consumed, seen = state["consumed"], state["seen"]',
        'consumed, seen = 0, state["seen"]',
        "test_scripts.py::test_sft_killed_five_times_ends_with_the_weights_of_one_never_killed",
    ),
    # ---- ranks
    mutation(
        "token-count-of-one-rank",
        "nanopost/dist.py",
        "return _reduce(values, dist.ReduceOp.SUM)",
        "return [float(v) for v in values]",
        "test_dist.py::test_ranks_do_not_change_the_gradient",
    ),
    mutation(
        "token-count-of-one-rank-in-sft",
        "train_sft.py",
        "(loss * world.size / trained)",
        "(loss * world.size / sum(b.mask_N.sum() for b in batches))",
        "test_mutation_gaps.py::test_sft_on_two_ranks_is_sft_on_one",
    ),
    mutation(
        "token-count-of-a-micro-batch-in-sft",
        "train_sft.py",
        "(loss * world.size / trained)",
        "(loss * world.size / batch.mask_N.sum() / len(batches))",
        "test_mutation_gaps.py::test_sft_on_two_ranks_is_sft_on_one",
    ),
    mutation(
        "world-size-missing-in-sft",
        "train_sft.py",
        "(loss * world.size / trained)",
        "(loss / trained)",
        "test_mutation_gaps.py::test_sft_on_two_ranks_is_sft_on_one",
    ),
    mutation(
        "token-count-of-one-rank-in-grpo",
        "train_grpo.py",
        "dist.all_sum(sum(int(e.mask.sum()) for e in minibatch), len(minibatch))",
        "(sum(int(e.mask.sum()) for e in minibatch) * world.size, len(minibatch) * world.size)",
        "test_scripts.py::test_grpo_on_two_ranks_is_grpo_on_one",
    ),
    mutation(
        "world-size-missing-in-grpo",
        "train_grpo.py",
        "(loss * world.size / max(1, divisor))",
        "(loss / max(1, divisor))",
        "test_scripts.py::test_grpo_on_two_ranks_is_grpo_on_one",
    ),
    mutation(
        "head-left-out-of-fsdp2",
        "nanopost/dist.py",
        "for module in (*blocks, model):",
        "for module in blocks:",
        "test_dist.py::test_ranks_do_not_change_the_gradient",
    ),
    mutation(
        "head-read-outside-the-forward",
        "nanopost/logprob.py",
        "    return per_token(lambda batch: model(batch, temperature)[0], examples, tokens, device)\n",
        "    def outside(batch):\n"
        "        model(batch, temperature)\n"
        "        where = batch.position_N, batch.cu_seqlens, batch.max_seqlen\n"
        "        hidden_ND = model.model.packed(batch.token_N, *where)\n"
        "        return logprob(hidden_ND, model.head_weight, batch.target_N, temperature)[0]\n"
        "    return per_token(outside, examples, tokens, device)\n",
        "test_dist.py::test_the_head_is_neither_a_shard_nor_stale",
    ),
    mutation(
        "stale-head-in-the-engine",
        "train_grpo.py",
        "engine.sync_weights(dist.full_weights(model), step)",
        'engine.sync_weights(((n, w) for n, w in dist.full_weights(model) if "embed" not in n), step)',
        "test_scripts.py::test_grpo_on_two_ranks_is_grpo_on_one",
    ),
    # ---- the loop of GRPO
    mutation(
        "rewards-of-two-groups-mixed",
        "nanopost/rewards.py",
        ".reshape(len(functions), len(groups), size)",
        ".reshape(len(functions), size, len(groups)).swapaxes(1, 2)",
        "test_trl_parity.py::test_two_optimizer_steps_of_train_grpo_are_those_of_trl",
    ),
    mutation(
        "old-log-probs-after-the-update",
        "train_grpo.py",
        'for name in ("engine_logp", "old_logp", "adv"))\n',
        'for name in ("engine_logp", "old_logp", "adv"))\n            old_logp_N = logp_N.detach()\n',
        "test_mutation_gaps.py::test_old_log_probs_of_the_trainer_are_those_of_the_engine",
    ),
    # ---- preferences
    mutation(
        "chosen-and-rejected-swapped",
        "nanopost/losses.py",
        "chosen_P, rejected_P = self.score_2P\n",
        "rejected_P, chosen_P = self.score_2P\n",
        "test_preference.py::test_losses_and_gradients_are_those_of_trl[sigmoid-sigmoid-0.0]",
    ),
    mutation(
        "reference-forgotten",
        "nanopost/losses.py",
        "(self.logp_S - self.ref_logp_S)",
        "self.logp_S",
        "test_preference.py::test_losses_and_gradients_are_those_of_trl[sigmoid-sigmoid-0.0]",
    ),
    mutation(
        "kl-of-kto-forgotten",
        "nanopost/losses.py",
        "desirable * torch.sigmoid(beta * (kl - ratio_P))",
        "desirable * torch.sigmoid(-beta * ratio_P)",
        "test_preference.py::test_kto_is_that_of_trl",
    ),
    mutation(
        "slopes-of-another-rank",
        "nanopost/pairs.py",
        "slice(before, before + len(table))",
        "slice(0, len(table))",
        "test_preference.py::test_dpo_on_two_ranks_is_dpo_on_one[kto]",
    ),
    mutation(
        "pair-count-of-one-rank",
        "train_dpo.py",
        "(loss * world.size / max(1, count))",
        "(loss * world.size / max(1, len(step_pairs)))",
        "test_preference.py::test_dpo_on_two_ranks_is_dpo_on_one[sigmoid]",
    ),
    mutation(
        "prompts-of-pairs-may-differ",
        "nanopost/chat.py",
        "if prompts[0] != prompts[1]:",
        "if False:",
        "test_preference.py::test_a_prompt_that_depends_on_the_answer_is_refused_by_its_row",
    ),
    mutation(
        "worst-of-the-sampled-answers-chosen",
        "nanopost/pairs.py",
        "(group[int(reward_G.argmax())], group[int(reward_G.argmin())])",
        "(group[int(reward_G.argmin())], group[int(reward_G.argmax())])",
        "test_preference.py::test_of_sampled_answers_the_best_is_chosen_and_the_worst_rejected",
    ),
    mutation(
        "a-missing-end-rewarded",
        "train_dpo.py",
        "reward_PG -= args.eos_penalty",
        "reward_PG += args.eos_penalty",
        "test_preference.py::test_online_an_answer_without_an_end_loses",
    ),
    # ---- PPO and reward models
    mutation(
        "value-of-the-state-behind-the-token",
        "train_ppo.py",
        "values = per_token(lambda batch: model(batch, value_alone=True)[2],",
        "values = per_token(lambda batch: model(batch, value_alone=True)[2].roll(-1),",
        "test_ppo.py::test_two_rollout_batches_of_train_ppo_are_those_of_a_slow_twin",
    ),
    mutation(
        "advantages-whitened-with-the-padding",
        "train_ppo.py",
        "mean, std = dist.mean_and_std(adv_BT[sampled_BT])",
        "mean, std = dist.mean_and_std(adv_BT)",
        "test_ppo.py::test_two_rollout_batches_of_train_ppo_are_those_of_a_slow_twin",
    ),
    mutation(
        "score-one-past-the-end",
        "train_ppo.py",
        "[len(r.ids) - 1 for r in flat]] +=",
        "[min(len(r.ids), reward_BT.shape[1] - 1) for r in flat]] +=",
        "test_ppo.py::test_two_rollout_batches_of_train_ppo_are_those_of_a_slow_twin",
    ),
    mutation(
        "kl-in-the-reward-with-the-wrong-sign",
        "train_ppo.py",
        'reward_BT = -state["beta"] * kl_BT',
        'reward_BT = state["beta"] * kl_BT',
        "test_ppo.py::test_two_rollout_batches_of_train_ppo_are_those_of_a_slow_twin",
    ),
    mutation(
        "values-of-after-the-update",
        "nanopost/losses.py",
        "clipped_N = value_N.clamp(old_value_N - clip, old_value_N + clip)",
        "clipped_N = value_N",
        "test_ppo.py::test_value_loss_and_its_gradient_are_those_of_a_loop",
    ),
    mutation(
        "gae-bootstraps-behind-the-end",
        "nanopost/advantages.py",
        "next_B = later_B\n",
        "next_B = value_BT[:, -1]\n",
        "test_ppo.py::test_gae_is_the_sum_of_its_definition_whatever_stands_behind_shorter_rows",
    ),
    mutation(
        "statistics-of-one-rank-in-ppo",
        "nanopost/dist.py",
        "total, squares, count = all_sum(x.sum(), x.square().sum(), x.numel())",
        "total, squares, count = float(x.sum()), float(x.square().sum()), x.numel()",
        "test_ppo.py::test_ppo_on_two_ranks_is_ppo_on_one",
    ),
    mutation(
        "kl-in-the-loss-forgotten",
        "train_ppo.py",
        'loss = loss + state["beta"] * (weight_N * kl_N).sum()',
        "pass",
        "test_ppo.py::test_two_rollout_batches_of_train_ppo_are_those_of_a_slow_twin",
    ),
    mutation(
        "flags-of-the-checkpoint-win",
        "nanopost/checkpoint.py",
        "        group.update(own)\n",
        "        pass\n",
        "test_checkpoint.py::test_a_part_that_has_not_learnt_yet_is_saved_too_and_the_flags_of_now_stay",
    ),
    mutation(
        "score-of-the-first-token",
        "train_rm.py",
        "model(batch)[batch.cu_seqlens[1:].long() - 1]",
        "model(batch)[batch.cu_seqlens[:-1].long()]",
        "test_preference.py::test_a_reward_model_is_one_of_transformers",
    ),
]


def chosen(names):
    unknown = [name for name in names if not any(name in m.name for m in MUTATIONS)]
    if unknown:
        sys.exit(
            f"no mutation is named {', '.join(unknown)}; there are {', '.join(m.name for m in MUTATIONS)}."
        )
    return [m for m in MUTATIONS if not names or any(name in m.name for name in names)]


def mutated(m, tree):
    """The text of the mutation's file, before and after."""
    text = (tree / m.file).read_text()
    if text.count(m.old) != 1:
        sys.exit(f"{m.name}: {m.file} has {text.count(m.old)} times, not once: {m.old!r}")
    return text, text.replace(m.old, m.new)


def pytest(tree, tests, *flags):
    """-> (exit status, output). No bytecode is kept: a mutated file may have the size and second of the last one."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfEs", *flags]
    done = subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=tree,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def main(names):
    mutations, survived = chosen(names), 0
    for m in MUTATIONS:
        mutated(m, ROOT)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "nanopost"
        unwanted = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, tree, ignore=unwanted)
        for m in mutations:
            mutated(m, tree)
        status, output = pytest(tree, dict.fromkeys(test for m in mutations for test in m.tests))
        if status or "SKIPPED" in output:  # what is skipped notices nothing
            sys.exit(f"unmutated, these tests are not all green:\n{output[-5000:]}")
        print(f"unmutated: {output.splitlines()[-1]}", flush=True)
        width = max(len(m.name) for m in mutations)
        for m in mutations:
            before, after = mutated(m, tree)
            began = time.monotonic()
            (tree / m.file).write_text(after)
            status, output = pytest(tree, m.tests, "-x", "--tb=line")
            (tree / m.file).write_text(before)
            red = status == 1  # 2 and more: pytest could not run them
            survived += not red
            failed = re.search(r"^(?:FAILED|ERROR) tests/(.*)", output, re.M)
            row = (
                f"{m.name:{width}}  {m.file:22}  {'red' if red else 'SURVIVED'}  {time.monotonic() - began:4.0f} s  "
                f"{failed[1] if failed else output[-300:]}"
            )
            print(row[:240], flush=True)
    print(f"{len(mutations)} mutations, {survived} survived")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
