"""Breaks the code in one place at a time and expects the tests to notice.

    python tests/mutations.py                     # all of them, about forty minutes on one core
    python tests/mutations.py bos clip            # those with bos or clip in their names

The tree is copied to a temporary folder. There the tests named below are first seen green. Then
each mutation replaces one piece of text, which must occur exactly once, and has to turn its tests
red. Where the code has changed, this script must follow it. Tests of real data do not count, as a
clone has none. Exits with 1 if a mutation survives.

Mutations of what needs a vLLM server are left out, which is said, unless NANOPOST_VLLM_PYTHON names
the python of an environment that has vLLM: NANOPOST_VLLM_PYTHON=PYTHON python tests/mutations.py
vllm runs those alone, about two minutes each.
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
        "nanopost/batch.py",
        "_shift(np.concatenate([e.mask for e in examples]), end_S)",
        "np.concatenate([e.mask for e in examples])",
        "test_batch.py::test_batch_of_equals_a_golden_token_by_token",
    ),
    mutation(
        "mask-begins-a-token-early",
        "nanopost/tokenizer.py",
        "(start_T < end) & (end_T > start)",
        "(start_T < end) & (end_T >= start)",
        "test_spans.py::test_a_mask_spelled_out",
    ),
    mutation(
        "end-of-turn-dropped",
        "nanopost/spans.py",
        "return closed.end() if closed else answer_end",
        "return answer_end",
        "test_spans.py::test_a_mask_spelled_out",
    ),
    mutation(
        "newline-after-end-of-turn-trained",
        "nanopost/spans.py",
        "return start, inside.end(1)",
        "return start, inside.end()",
        "test_spans.py::test_masks_are_right_token_by_token_whatever_the_contents",
    ),
    mutation(
        "eos-of-text-dropped",
        "nanopost/tokenizer.py",
        "ids.append(self.eos_id)",
        "pass",
        "test_tokenizer.py::test_text_is_trained_whole_with_one_bos_and_one_eos",
    ),
    mutation(
        "bos-of-text-doubled",
        "nanopost/tokenizer.py",
        "return ids\n        return self.prefix + ids",
        "return self.prefix + ids\n        return self.prefix + ids",
        "test_tokenizer.py::test_text_is_trained_whole_with_one_bos_and_one_eos",
    ),
    mutation(
        "bos-of-prompt-doubled",
        "nanopost/tokenizer.py",
        "        return self.encode(text)\n",
        "        return self.prefix + self.encode(text)\n",
        "test_mutation_gaps.py::test_a_template_that_writes_bos_gets_no_second_from_the_tokenizer",
    ),
    mutation(
        "bos-of-example-doubled",
        "nanopost/tokenizer.py",
        "encoding = self.raw.encode(text, add_special_tokens=False)",
        "encoding = self.raw.encode(''.join(map(self.raw.id_to_token, self.prefix)) + text)",
        "test_mutation_gaps.py::test_a_template_that_writes_bos_gets_no_second_from_the_tokenizer",
    ),
    mutation(
        "prompts-of-pairs-may-differ",
        "nanopost/tokenizer.py",
        "if at < min(map(len, prompts)):",
        "if False:",
        "test_tokenizer.py::test_a_prompt_that_depends_on_the_answer_is_refused_by_its_row",
    ),
    mutation(
        "merged-token-not-trained",
        "nanopost/tokenizer.py",
        "e.mask[at : e.mask.argmax()] = True",
        "pass",
        "test_tokenizer.py::test_an_answer_that_merges_with_the_end_of_the_prompt_keeps_its_pair",
    ),
    mutation(
        "continued-pairs-kept",
        "nanopost/pairs.py",
        "elif _begins(chosen, rejected) or _begins(rejected, chosen):",
        "elif _begins(chosen, rejected):",
        "test_pairs.py::test_a_side_that_goes_on_where_the_other_ends_makes_no_pair",
    ),
    mutation(
        "probes-without-the-trimmed-ones",
        "nanopost/spans.py",
        "{k: self.content(k).rstrip() + PROBE for k in self.probed}",
        "{}",
        "test_spans.py::test_a_message_is_not_rendered_more_often_in_a_longer_conversation",
    ),
    mutation(
        "prompts-rendered-whole",
        "nanopost/spans.py",
        "if len(question) < k and self.asks_alike:",
        "if False:",
        "test_spans.py::test_a_message_is_not_rendered_more_often_in_a_longer_conversation",
    ),
    mutation(
        "tokenizers-compared-without-merges",
        "nanopost/tokenizer.py",
        "if v is not None and v is not False and v != ",
        "if k != 'merges' and v is not None and v is not False and v != ",
        "test_tokenizer.py::test_what_decides_ids_makes_another_tokenizer",
    ),
    # ---- rows as people have them
    mutation(
        "alpaca-input-lost",
        "nanopost/normalize.py",
        'f"{question}\\n\\n{context}" if context else question',
        "question",
        "test_normalize.py::test_alpaca_keeps_its_input_also_where_it_is_renamed",
    ),
    mutation(
        "exported-nulls-trained",
        "nanopost/normalize.py",
        "if from_arrow or _looks_filled_in(rows):",
        "if from_arrow:",
        "test_normalize.py::test_parquet_and_jsonl_exported_from_it_train_the_tokens_of_the_jsonl",
    ),
    mutation(
        "nulls-of-the-author-dropped",
        "nanopost/normalize.py",
        "if keys.setdefault(path, struct.keys()) != struct.keys():",
        "if False:",
        "test_normalize.py::test_nulls_that_the_author_wrote_stay",
    ),
    mutation(
        "arguments-stay-text",
        "nanopost/normalize.py",
        'if isinstance(inner.get("arguments"), str):',
        "if False:",
        "test_normalize.py::test_json_text_of_calls_and_tools_is_the_object_that_it_says",
    ),
    mutation(
        "escape-sequences-printed",
        "nanopost/terminal.py",
        'if unicodedata.category(character) == "Cc" or character in BIDI:',
        "if character in BIDI:",
        "test_terminal.py::test_control_characters_are_written_out_and_text_stays",
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
        "test_kernels.py::"
        "test_chunks_of_the_vocabulary_change_nothing_and_unwritten_memory_is_never_read",
    ),
    mutation(
        "kernel-stored-exponentials-of-another-tile",
        "kernels/logprob.py",
        "(first // BLOCK_V + j).to(tl.int64)",
        "j.to(tl.int64)",
        "test_kernels.py::"
        "test_chunks_of_the_vocabulary_change_nothing_and_unwritten_memory_is_never_read",
    ),
    mutation(
        "kernel-upstream-gradient-of-the-first-token",
        "kernels/logprob.py",
        "tl.load(g_ptr + row, mask=real, other=0.0)",
        "tl.load(g_ptr + row * 0, mask=real, other=0.0)",
        "test_kernels.py::test_values_and_gradients_are_those_of_float64_and_of_the_twin",
    ),
    mutation(
        "kernel-stores-with-no-backward-pass-to-come",
        "kernels/logprob.py",
        "store and wanted and torch.is_grad_enabled()",
        "store and wanted",
        "test_kernels.py::test_exponentials_are_stored_only_for_a_backward_pass_and_where_they_fit",
    ),
    # ---- rows, order and packing
    mutation(
        "held-out-rows-trained",
        "nanopost/rows.py",
        "enumerate(rows) if i not in held_out]",
        "enumerate(rows)]",
        "test_rows.py::test_load_holds_rows_out_without_losing_one",
    ),
    mutation(
        "positions-not-reset",
        "nanopost/batch.py",
        "position_N = np.arange(len(token_N)) - np.repeat(end_S - length_S, length_S)",
        "position_N = np.arange(len(token_N))",
        "test_batch.py::test_batch_of_equals_a_golden_token_by_token",
    ),
    mutation(
        "a-bin-of-the-epoch-dropped",
        "nanopost/packing.py",
        "for b in rng.permutation(len(bins))]",
        "for b in rng.permutation(len(bins))[1:]]",
        "test_packing.py::test_an_epoch_of_steps_visits_every_row_once",
    ),
    mutation(
        "only-the-first-micro-batch-of-a-rank",
        "nanopost/packing.py",
        "[rows[i] for i in b] for b in bins[rank::size]]",
        "[rows[i] for i in b] for b in bins[rank : rank + 1]]",
        "test_packing.py::test_a_step_is_the_same_on_any_number_of_ranks_and_at_any_resumption",
    ),
    mutation(
        "order-ignores-the-epoch",
        "nanopost/packing.py",
        "return _random(seed, epoch).permutation(n)",
        "return _random(seed, 0).permutation(n)",
        "test_packing.py::test_each_epoch_is_a_permutation_of_its_own",
    ),
    mutation(
        "rows-of-each-step-alike-in-sft",
        "train_sft.py",
        '    state["consumed"] += per_step\n',
        "",
        "test_loops.py::test_each_step_takes_the_rows_after_those_of_the_last[train_sft.py]",
    ),
    mutation(
        "rows-of-each-step-alike-in-kto",
        "train_kto.py",
        '    state["consumed"] += args.rows\n',
        "",
        "test_loops.py::test_each_step_takes_the_rows_after_those_of_the_last[train_kto.py]",
    ),
    mutation(
        "prompts-of-each-step-alike-in-grpo",
        "train_grpo.py",
        '    state["consumed"] += drawn\n',
        "",
        "test_loops.py::test_each_step_takes_the_rows_after_those_of_the_last[train_grpo.py]",
    ),
    # ---- attention
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
        "(back_LL < window)",
        "(back_LL <= window)",
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
        "= new_PGTK[prompt_B]",
        "= new_PGTK[prompt_B.flip(0)]",
        "test_engine.py::test_a_rollout_depends_on_its_seed_and_not_on_its_neighbours",
    ),
    # ---- the model and its log-probs
    mutation(
        "llama3-rope-unscaled",
        "nanopost/rope.py",
        "(1 - smooth) * freq / factor",
        "(1 - smooth) * freq",
        "test_model.py::test_logits_equal_those_of_transformers_packed_and_alone[llama3.1]",
    ),
    mutation(
        "yarn-ramp-reversed",
        "nanopost/rope.py",
        'freq / rope["factor"] * ramp + freq * (1 - ramp)',
        'freq / rope["factor"] * (1 - ramp) + freq * ramp',
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
        "nanopost/batch.py",
        "x_N.roll(1)",
        "x_N",
        "test_forward.py::test_log_probs_are_those_of_each_example_alone_and_aligned_with_its_ids",
    ),
    mutation(
        "log-probs-of-another-example",
        "nanopost/forward.py",
        "for i, x_T in zip(part, batch.split(x_N)):",
        "for i, x_T in zip(part[::-1], batch.split(x_N)):",
        "test_forward.py::test_log_probs_are_those_of_each_example_alone_and_aligned_with_its_ids",
    ),
    mutation(
        "score-of-the-first-token",
        "nanopost/batch.py",
        "self.cu_seqlens[1:].long() - 1",
        "self.cu_seqlens[:-1].long()",
        "test_forward.py::test_a_score_is_the_number_at_the_last_token_whatever_the_budget",
    ),
    mutation(
        "value-of-the-state-after-the-token",
        "nanopost/forward.py",
        "model(batch, value_alone=True)[2]",
        "model(batch, value_alone=True)[2].roll(-1)",
        "test_forward.py::test_a_value_is_that_of_the_state_before_the_token",
    ),
    # ---- advantages
    mutation(
        "baseline-of-another-group",
        "nanopost/advantages.py",
        "return (reward_PG - reward_PG.nanmean(1, keepdim=True)).nan_to_num(0)",
        "return (reward_PG - reward_PG.nanmean(1, keepdim=True).roll(1, 0)).nan_to_num(0)",
        "test_advantages.py::test_advantages_equal_trl",
        "test_advantages.py::test_the_z_score_uses_bessel_and_groups_stand_alone",
    ),
    mutation(
        "leave-one-out-upside-down",
        "nanopost/advantages.py",
        "(num_samples_P1 / (num_samples_P1 - 1).clamp(min=1))",
        "((num_samples_P1 - 1) / num_samples_P1)",
        "test_advantages.py::test_leave_one_out_is_an_unbiased_policy_gradient",
    ),
    mutation(
        "gae-bootstraps-after-the-end",
        "nanopost/advantages.py",
        "next_value_B = next_adv_B = value_BT.new_zeros(len(value_BT))",
        "next_value_B, next_adv_B = value_BT[:, -1], value_BT.new_zeros(len(value_BT))",
        "test_ppo.py::test_gae_is_the_sum_of_its_definition_whatever_follows_shorter_rows",
    ),
    mutation(
        "gae-of-the-value-of-the-same-state",
        "nanopost/advantages.py",
        "gamma * next_value_B - value_BT[:, t]",
        "gamma * value_BT[:, t] - value_BT[:, t]",
        "test_ppo.py::test_gae_is_the_sum_of_its_definition_whatever_follows_shorter_rows",
    ),
    mutation(
        "whitened-rewards-lose-their-mean",
        "nanopost/advantages.py",
        "return whitened_BT + mean",
        "return whitened_BT",
        "test_advantages.py::test_whitened_numbers_have_mean_0_or_their_own_and_deviation_1",
    ),
    # ---- losses
    mutation(
        "clip-bounds-swapped",
        "nanopost/losses.py",
        "ratio_N.clamp(1 - low, 1 + high)",
        "ratio_N.clamp(1 - high, 1 + low)",
        "test_losses.py::test_clip_cases_by_hand",
    ),
    mutation(
        "two-sided-clip-on-no-side",
        "forks/two_sided_clip.diff",
        "+            log_ratio_N = log_ratio_N.clamp(max=math.log(args.delta))",
        "+            log_ratio_N = log_ratio_N.clamp(max=80.0)",
        "test_forks_grpo.py::test_two_sided_clip_cases_by_hand",
    ),
    mutation(
        "cispo-through-the-ratio",
        "nanopost/losses.py",
        "log_ratio_N.detach().exp()",
        "log_ratio_N.exp()",
        "test_losses.py::test_cispo_cap_bounds_the_ratio_and_no_token_loses_its_gradient",
    ),
    mutation(
        "k1-of-the-wrong-sign",
        "nanopost/losses.py",
        "return logp_N - ref_logp_N",
        "return ref_logp_N - logp_N",
        "test_losses.py::test_k1_is_unbiased_in_value_and_its_expected_gradient_is_zero",
    ),
    mutation(
        "k3-of-the-wrong-sign",
        "nanopost/losses.py",
        "log_q_N = ref_logp_N - logp_N",
        "log_q_N = logp_N - ref_logp_N",
        "test_losses.py::"
        "test_k3_is_unbiased_in_value_and_its_expected_gradient_is_that_of_the_forward_kl",
    ),
    mutation(
        "importance-weights-inverted",
        "nanopost/losses.py",
        "masked(trainer_logp_N - engine_logp_N, sequences.mask_N)",
        "masked(engine_logp_N - trainer_logp_N, sequences.mask_N)",
        "test_losses.py::"
        "test_importance_weights_equal_trl_and_metrics_describe_the_ratios_before_the_cap",
    ),
    mutation(
        "sequence-ratio-summed",
        "nanopost/losses.py",
        "return sum_N / sequences.spread(sequences.length_S())",
        "return sum_N",
        "test_losses.py::test_grpo_family_equals_trl_in_value_gradient_and_clip_ratios",
    ),
    mutation(
        "old-values-forgotten",
        "nanopost/losses.py",
        "clipped_N = value_N.clamp(old_value_N - clip, old_value_N + clip)",
        "clipped_N = value_N",
        "test_ppo.py::test_value_loss_and_its_gradient_are_those_of_a_loop",
    ),
    # ---- the engine and its rollouts
    mutation(
        "temperature-missing-from-the-log-prob",
        "nanopost/engine.py",
        "return token_B1[:, 0], log_p_BV.gather(1, token_B1)[:, 0]",
        "return token_B1[:, 0], logits_BV.log_softmax(-1).gather(1, token_B1)[:, 0]",
        "test_engine.py::test_draws_have_the_frequencies_of_the_distribution",
    ),
    mutation(
        "stop-token-thrown-away",
        "nanopost/engine.py",
        "seen + hits_AT.argmax(1) + 1, 0",
        "seen + hits_AT.argmax(1), 0",
        "test_engine.py::test_stop_tokens_end_a_completion_and_stay_in_it",
    ),
    mutation(
        "samples-of-a-group-alike",
        "nanopost/engine.py",
        "seeds[b // n] + b % n for",
        "seeds[b // n] for",
        "test_engine.py::test_a_rollout_depends_on_its_seed_and_not_on_its_neighbours",
    ),
    mutation(
        "first-sampled-token-untrained",
        "nanopost/rollout.py",
        "mask = np.concatenate([np.zeros(prompt, bool), self.sampled])",
        "mask = np.concatenate([np.zeros(prompt + 1, bool), self.sampled[1:]])",
        "test_rollout.py::test_an_example_is_prompt_and_completion_with_the_completion_as_its_mask",
    ),
    mutation(
        "answers-of-the-environment-trained",
        "nanopost/rollout.py",
        "mask = np.concatenate([np.zeros(prompt, bool), self.sampled])",
        "mask = np.arange(prompt + len(self.ids)) >= prompt",
        "test_rollout.py::test_what_the_environment_said_is_context_and_no_action",
    ),
    # ---- cuts
    mutation(
        "cut-missing-from-the-log-prob",
        "nanopost/logprob.py",
        "logp_M, log_mass_M = z_y_M - kept_lse_M,",
        "logp_M, log_mass_M = logp_M,",
        "test_logprob.py::test_over_kept_ids_values_and_gradients_are_those_of_a_masked_softmax",
    ),
    mutation(
        "mass-of-a-cut-without-a-gradient",
        "nanopost/logprob.py",
        "_cut(log_p_MC - log_mass_M[:, None], kept_E).exp_()",
        "log_p_MC.exp()",
        "test_logprob.py::test_gradcheck_over_kept_ids",
    ),
    mutation(
        "cut-ids-of-other-chunks-kept",
        "nanopost/logprob.py",
        "kept_E = ctx.kept[part.start // ctx.chunk]",
        "kept_E = ctx.kept[0]",
        "test_logprob.py::test_over_kept_ids_values_and_gradients_are_those_of_a_masked_softmax",
    ),
    mutation(
        "kept-ids-not-shifted",
        "nanopost/batch.py",
        ".repeat(lengths) - 1",
        ".repeat(lengths)",
        "test_batch.py::test_kept_ids_are_those_of_targets_where_these_are_predicted",
    ),
    mutation(
        "target-may-be-cut-away",
        "nanopost/batch.py",
        "& (found_N != 1)",
        "& False",
        "test_batch.py::test_a_target_that_is_not_among_its_kept_ids_is_an_error",
    ),
    mutation(
        "reference-over-the-whole-distribution",
        "nanopost/forward.py",
        "Example(e.ids, e.mask, kept=e.kept)",
        "Example(e.ids, e.mask)",
        "test_forward.py::test_over_kept_ids_log_probs_are_those_of_each_example_alone",
    ),
    mutation(
        "kept-ids-not-given-to-the-head",
        "nanopost/model.py",
        "kept=batch.kept,",
        "kept=None,",
        "test_loops.py::"
        "test_with_a_cut_engine_and_trainer_are_one_policy_and_ratios_are_finite[train_ppo.py-cut0]",
    ),
    mutation(
        "kept-ids-of-earlier-tokens-again",
        "nanopost/engine.py",
        "                masks.clear()\n",
        "                pass\n",
        "test_engine.py::test_kept_ids_are_those_of_the_cut_whenever_the_host_looks",
    ),
    mutation(
        "held-out-prompts-answered-with-the-cut",
        "nanopost/engine.py",
        "temperature=temperature, top_k=0, top_p=1.0, min_p=0.0",
        "temperature=temperature",
        "test_loops.py::"
        "test_held_out_prompts_are_answered_once_at_temperature_1_and_once_greedily[train_ppo.py]",
    ),
    mutation(
        "kept-ids-of-a-second-answer-lost",
        "nanopost/rollout.py",
        "[NO_IDS] * len(turn) + answer.kept",
        "[NO_IDS] * (len(turn) + len(answer.ids))",
        "test_rollout.py::test_what_a_cut_kept_follows_its_tokens_into_the_example",
    ),
    mutation(
        "dpo-over-the-ids-that-a-cut-kept",
        "train_online_dpo.py",
        "cli.sampling(args, kept=False)",
        "cli.sampling(args)",
        "twins/test_online_dpo.py::test_the_twin_agrees_and_each_flag_matters[judge]",
    ),
    # ---- the optimizer and checkpoints
    mutation(
        "weight-decay-on-norms",
        "nanopost/optim.py",
        "0.0 if is_vector else weight_decay",
        "weight_decay",
        "test_mutation_gaps.py::test_weight_decay_leaves_norms_and_biases_alone",
    ),
    mutation(
        "tied-head-written",
        "nanopost/dist.py",
        "for name, p in self.model.state_dict().items():",
        'for name, p in {**self.model.state_dict(), "lm_head.weight": self.model.head_weight}'
        ".items():",
        "test_mutation_gaps.py::test_full_weights_of_a_tied_model_have_no_head",
    ),
    mutation(
        "moments-not-loaded",
        "nanopost/checkpoint.py",
        '    _set_optimizer_state(model, optimizer, tensors | state.pop("numbers"))\n',
        "",
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
        "flags-of-the-optimizer-lost",
        "nanopost/checkpoint.py",
        '{**optimizer.state_dict(), "state": state}',
        '{"param_groups": [g | {"weight_decay": 0.01} for g in '
        'optimizer.state_dict()["param_groups"]], "state": state}',
        "test_checkpoint.py::test_hyperparameters_are_those_of_the_optimizer_given",
    ),
    mutation(
        "a-part-that-has-not-learnt-gets-the-state-of-another",
        "nanopost/checkpoint.py",
        "        if name_of[p] in state_of:\n            state[i] = state_of[name_of[p]]",
        "        state[i] = state_of.get(name_of[p]) or next(iter(state_of.values()))",
        "test_checkpoint.py::test_parameters_that_have_not_learnt_yet_have_no_state_and_get_none",
    ),
    # ---- the folder of a run
    mutation(
        "data-order-not-resumed",
        "nanopost/run.py",
        "state = state | checkpoint.load(found, model, optimizer, **others)",
        'state = state | checkpoint.load(found, model, optimizer, **others) | {"consumed": 0}',
        "test_run.py::test_a_resumed_run_begins_from_its_checkpoint",
    ),
    mutation(
        "lines-after-the-checkpoint-stay",
        "nanopost/run.py",
        'if _number_of(line, "step") <= resumed_at]',
        'if _number_of(line, "step") < float("inf")]',
        "test_run.py::test_a_resumed_log_has_every_step_once_whatever_was_sampled",
    ),
    mutation(
        "files-of-others-replaced",
        "nanopost/run.py",
        "if not ours and any(",
        "if False and any(",
        "test_run.py::test_what_no_run_wrote_is_never_replaced",
    ),
    mutation(
        "what-a-run-reads-replaced",
        "nanopost/run.py",
        "read.is_relative_to(out / name)",
        "read == out / name",
        "test_run.py::test_what_a_run_reads_is_never_replaced",
    ),
    mutation(
        "due-a-step-early",
        "nanopost/run.py",
        "step % every == 0",
        "(step + 1) % every == 0",
        "test_run.py::test_due_every_so_many_steps_and_at_the_last",
    ),
    mutation(
        "last-step-saved-twice",
        "nanopost/run.py",
        "if step >= self.steps:",
        "if step > self.steps:",
        "test_run.py::test_a_checkpoint_has_the_flags_and_the_last_step_has_none",
    ),
    mutation(
        "an-error-saves-the-middle-of-a-step",
        "nanopost/run.py",
        "    def _weights_change(self, *_):\n        self.boundary = None",
        "    def _weights_change(self, *_):\n        pass",
        "test_run.py::test_after_an_error_in_the_middle_of_the_update_nothing_is_saved_and_it_says_so",
    ),
    mutation(
        "an-error-saves-what-the-next-step-has-drawn",
        "nanopost/run.py",
        "step, copy.deepcopy(self.state), checkpoint.random_state()",
        "step, self.state, checkpoint.random_state()",
        "test_run.py::test_after_an_error_before_the_update_the_last_step_is_saved_as_it_was",
    ),
    mutation(
        "an-error-saves-the-random-state-of-now",
        "nanopost/run.py",
        "self._save(step, state, drawn)",
        "self._save(step, state)",
        "test_run.py::test_after_an_error_before_the_update_the_last_step_is_saved_as_it_was",
    ),
    mutation(
        "a-signal-of-one-rank-is-its-own",
        "nanopost/run.py",
        "map(int, dist.all_max(late, self.signal))",
        "map(int, (late, self.signal))",
        "test_run.py::test_a_signal_that_reaches_one_rank_stops_all_of_them",
    ),
    mutation(
        "a-damaged-checkpoint-is-loaded",
        "nanopost/checkpoint.py",
        "        elif found != sums.get(name):",
        "        elif False:",
        "test_run.py::test_a_damaged_checkpoint_is_skipped_aloud_and_the_one_before_it_taken",
    ),
    mutation(
        "folders-of-others-deleted",
        "nanopost/checkpoint.py",
        r'OURS = re.compile(r"step-\d{6,}(\.tmp|\.damaged)?")',
        'OURS = re.compile("step-.*")',
        "test_run.py::test_as_many_checkpoints_as_asked_are_kept_and_others_folders_stay",
    ),
    mutation(
        "metadata-runs-code",
        "nanopost/checkpoint.py",
        "if name not in METADATA.get(module, ()) and not is_dtype:",
        "if False:",
        "test_checkpoint.py::test_loading_a_checkpoint_runs_no_code_of_its_metadata",
    ),
    mutation(
        "no-lock",
        "nanopost/run.py",
        "fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "test_run.py::test_a_second_run_in_the_folder_is_refused_until_the_first_one_is_gone",
    ),
    mutation(
        "blind-ranks-not-noticed",
        "nanopost/run.py",
        "        if blind:\n",
        "        if False:\n",
        "test_run.py::test_ranks_that_do_not_see_the_same_folder_say_so_in_seconds",
    ),
    mutation(
        "weights-not-finite-loaded",
        "nanopost/hf.py",
        "    _check_finite(folder, wanted)\n",
        "",
        "test_hf.py::test_weights_that_are_not_finite_are_refused",
    ),
    mutation(
        "dtype-of-config-json-believed",
        "nanopost/hf.py",
        "    model.config.hf.update(dtype=kind, torch_dtype=kind)\n",
        "",
        "test_run.py::test_a_model_is_written_in_the_dtype_asked_for_and_a_change_is_said",
    ),
    mutation(
        "resampled-minibatches-depend-on-ranks",
        "nanopost/packing.py",
        "np.array_split(sorted(all_serials), parts)",
        "np.array_split(sorted(serials), parts)",
        "test_dist.py::test_minibatches_of_groups_do_not_depend_on_which_rank_has_them",
    ),
    # ---- ranks
    mutation(
        "sums-of-one-rank",
        "nanopost/dist.py",
        "return _reduce(values, dist.ReduceOp.SUM)",
        "return [float(v) for v in values]",
        "test_mutation_gaps.py::test_sft_on_two_ranks_is_sft_on_one",
    ),
    mutation(
        "a-sum-of-one-rank",
        "nanopost/dist.py",
        "return _reduce([value], dist.ReduceOp.SUM)[0]",
        "return float(value)",
        "test_preference_scripts.py::test_two_ranks_are_one[train_dpo.py-more0]",
    ),
    mutation(
        "means-of-one-rank",
        "nanopost/dist.py",
        "in gather(list(mine.items())):",
        "in mine.items():",
        "test_rollout.py::test_gap_and_lengths_are_those_of_all_ranks_on_each",
    ),
    mutation(
        "meter-counts-its-calls",
        "nanopost/dist.py",
        "self.counts.get(name, 0) + count",
        "self.counts.get(name, 0) + 1",
        "test_dist.py::test_a_meter_divides_each_metric_by_what_it_counts",
    ),
    mutation(
        "head-missing-from-fsdp2",
        "nanopost/dist.py",
        "for module in (*blocks, model):",
        "for module in blocks:",
        "test_mutation_gaps.py::test_sft_on_two_ranks_is_sft_on_one",
    ),
    mutation(
        "head-read-outside-the-forward",
        "nanopost/forward.py",
        "    return per_token(lambda batch: model(batch, temperature)[0], examples,",
        "    from nanopost.logprob import logprob\n\n"
        "    def outside(batch):\n"
        "        model(batch, temperature)\n"
        "        where = batch.position_N, batch.cu_seqlens, batch.max_seqlen\n"
        "        hidden_ND = model.model.packed(batch.token_N, *where)\n"
        "        return logprob(hidden_ND, model.head_weight, batch.target_N, temperature)[0]\n\n"
        "    return per_token(outside, examples,",
        "test_preference_scripts.py::test_two_ranks_are_one[train_dpo.py-more0]",
    ),
    mutation(
        "no-dummy-for-a-rank-without-data",
        "nanopost/forward.py",
        "micro_batches(lengths, tokens) or [[]]",
        "micro_batches(lengths, tokens)",
        "test_forward.py::test_single_examples_are_units_too_and_nothing_gives_a_dummy",
    ),
    mutation(
        "fewer-batches-on-a-rank",
        "nanopost/forward.py",
        "even(micro_batches(lengths, tokens) or [[]])",
        "(micro_batches(lengths, tokens) or [[]])",
        "test_forward.py::test_every_rank_has_as_many_batches_as_the_one_with_most",
    ),
    mutation(
        "a-dummy-in-the-loss-of-a-reward-model",
        "train_rm.py",
        "loss_P * (not batch.dummy)",
        "loss_P",
        "test_loops.py::test_empty_micro_batches_change_nothing[train_rm.py]",
    ),
    mutation(
        "a-dummy-in-the-metrics-of-dpo",
        "train_dpo.py",
        "        if not batch.dummy:  # its empty pair would be a tie\n",
        "        if True:\n",
        "test_loops.py::test_empty_micro_batches_change_nothing[train_dpo.py]",
    ),
    mutation(
        "statistics-of-one-rank",
        "nanopost/dist.py",
        "total, count = all_sums(x.sum(), x.numel())",
        "total, count = float(x.sum()), x.numel()",
        "twins/test_ppo.py::test_it_agrees_after_a_resume_on_two_ranks[ppo]",
    ),
    mutation(
        "whitened-on-each-rank",
        "nanopost/advantages.py",
        "mean, std = dist.mean_and_std(x_BT[mask_BT])",
        "mean, std = float(x_BT[mask_BT].mean()), float(x_BT[mask_BT].std())",
        "twins/test_ppo.py::test_it_agrees_after_a_resume_on_two_ranks[ppo]",
    ),
    # ---- SFT
    mutation(
        "token-count-of-one-rank-in-sft",
        "train_sft.py",
        "(loss * world.size / targets)",
        "(loss * world.size / sum(e.num_targets for e in examples))",
        "test_mutation_gaps.py::test_sft_on_two_ranks_is_sft_on_one",
    ),
    mutation(
        "token-count-of-a-micro-batch-in-sft",
        "train_sft.py",
        "(loss * world.size / targets)",
        "(loss * world.size / max(1, batch.num_targets) / len(step_batches))",
        "test_loops.py::test_a_step_of_sft_is_a_mean_over_its_trained_tokens",
    ),
    mutation(
        "world-size-missing-in-sft",
        "train_sft.py",
        "(loss * world.size / targets)",
        "(loss / targets)",
        "test_mutation_gaps.py::test_sft_on_two_ranks_is_sft_on_one",
    ),
    mutation(
        "meter-counts-all-tokens-in-sft",
        "train_sft.py",
        "meter.add(batch.num_targets, loss=loss,",
        "meter.add(len(batch.token_N), loss=loss,",
        "test_loops.py::test_a_step_of_sft_is_a_mean_over_its_trained_tokens",
    ),
    # ---- rewards and sampling
    mutation(
        "rewards-of-two-groups-mixed",
        "nanopost/rewards.py",
        ".reshape(len(functions), len(groups), size)",
        ".reshape(len(functions), size, len(groups)).swapaxes(1, 2)",
        "test_rewards.py::test_each_rollout_is_scored_with_the_columns_of_its_row",
    ),
    mutation(
        "weights-of-rewards-forgotten",
        "nanopost/rewards.py",
        "np.tensordot(weight_F,",
        "np.tensordot(np.ones_like(weight_F),",
        "test_advantages.py::test_several_rewards_with_weights_and_none_equal_trl",
    ),
    mutation(
        "reward-reads-the-token-that-ended-it",
        "nanopost/rollout.py",
        "if ids and ids[-1] in tokenizer.stop_ids:",
        "if False:",
        "test_rewards.py::test_a_reward_reads_what_samples_jsonl_shows_but_for_the_token_that_ended_it",
    ),
    mutation(
        "reward-reads-no-special-tokens",
        "nanopost/rollout.py",
        "    return tokenizer.decode(ids)\n",
        "    return tokenizer.decode(ids, skip_special=True)\n",
        "test_rewards.py::test_a_reward_reads_what_samples_jsonl_shows_but_for_the_token_that_ended_it",
    ),
    mutation(
        "reward-gets-the-run-s-own-lists",
        "nanopost/rewards.py",
        "[copy.deepcopy(value) for value in column]",
        "column",
        "test_rewards.py::test_a_reward_gets_copies_of_its_own",
    ),
    mutation(
        "reward-ends-the-run-unheard",
        "nanopost/rewards.py",
        "        raise SystemExit(status)\n",
        "        return\n",
        "test_rewards.py::test_a_reward_cannot_end_the_run[leaves_at_once]",
    ),
    mutation(
        "reward-changes-the-folder",
        "nanopost/rewards.py",
        "        os.chdir(folder)\n",
        "",
        "test_rewards.py::test_a_reward_leaves_folder_output_and_autograd_as_they_were",
    ),
    mutation(
        "evaluation-feeds-a-reward",
        "nanopost/rewards.py",
        "        yield\n    finally:\n        _restore(functions, before)",
        "        yield\n    finally:\n        pass",
        "test_rewards.py::test_an_evaluation_leaves_the_state_of_a_reward_alone",
    ),
    mutation(
        "state-of-rewards-not-saved",
        "train_grpo.py",
        '    state["rewards"] = rewards.states(reward_functions)\n',
        "",
        "test_loops.py::test_the_state_of_a_reward_survives_a_kill_and_no_evaluation_feeds_it[train_grpo.py]",
    ),
    mutation(
        "evaluation-feeds-a-reward-of-ppo",
        "train_ppo.py",
        "with rewards.held_out(reward_functions):",
        "with rewards.held_out([]):",
        "test_loops.py::test_the_state_of_a_reward_survives_a_kill_and_no_evaluation_feeds_it[train_ppo.py]",
    ),
    mutation(
        "unrewarded-learns",
        "nanopost/advantages.py",
        ".nan_to_num(0)",
        ".nan_to_num(-1)",
        "test_loops.py::test_grpo_learns_nothing_from_what_no_reward_scores",
    ),
    mutation(
        "unrewarded-counts-as-zero",
        "nanopost/rewards.py",
        "    reward_PG[np.isnan(reward_FPG).all(0)] = np.nan\n",
        "",
        "test_rewards.py::test_where_no_reward_applies_the_sum_is_nan",
    ),
    mutation(
        "unrewarded-trained-by-ppo",
        "train_ppo.py",
        "            e.mask[:] = False\n",
        "            pass\n",
        "test_loops.py::test_ppo_learns_nothing_from_what_no_reward_scores",
    ),
    mutation(
        "step-without-trained-tokens",
        "train_ppo.py",
        "        if targets:\n",
        "        if True:\n",
        "test_loops.py::test_a_minibatch_without_trained_tokens_takes_no_step[train_ppo.py]",
    ),
    mutation(
        "kl-of-ppo-from-the-engine",
        "train_ppo.py",
        'padded(examples, "policy_logp"), padded',
        'padded(examples, "engine_logp"), padded',
        "test_loops.py::test_both_log_probs_of_the_kl_in_ppos_reward_are_the_trainers",
    ),
    mutation(
        "simpo-s-rewards-are-sums",
        "nanopost/preference.py",
        "    if normalised(losses):\n",
        "    if False:\n",
        "test_preference.py::test_rewards_are_per_token_where_the_loss_is",
    ),
    mutation(
        "ties-count-as-right",
        "nanopost/preference.py",
        '"rewards/accuracies": (chosen_P > rejected_P).sum()',
        '"rewards/accuracies": (chosen_P >= rejected_P).sum()',
        "test_preference.py::test_metrics_of_pairs_are_sums_of_rewards_and_log_probs",
    ),
    mutation(
        "a-run-that-learns-something-is-called-idle",
        "nanopost/optim.py",
        "            self.left = -1",
        "            self.left = self.left",
        "test_loops.py::test_a_run_that_learns_nothing_says_so_once[train_grpo.py]",
    ),
    mutation(
        "engine-not-synced-at-the-start",
        "train_grpo.py",
        'engine.sync_weights(dist.full_weights(model), state["step"])\n',
        "",
        "test_loops.py::"
        "test_an_engine_of_its_own_samples_with_the_weights_of_the_trainer[train_grpo.py]",
    ),
    mutation(
        "stale-head-in-the-engine",
        "train_grpo.py",
        "engine.sync_weights(dist.full_weights(model), step)",
        "named = dict(dist.full_weights(model))\n"
        '    named.pop("model.embed_tokens.weight")\n'
        "    engine.sync_weights(named.items(), step)",
        "test_loops.py::"
        "test_an_engine_of_its_own_samples_with_the_weights_of_the_trainer[train_grpo.py]",
    ),
    mutation(
        "engine-not-synced-after-an-update-of-ppo",
        "train_ppo.py",
        '    engine.sync_weights(dist.full_weights(model, "policy."), step)\n',
        "",
        "test_loops.py::"
        "test_an_engine_of_its_own_samples_with_the_weights_of_the_trainer[train_ppo.py]",
    ),
    mutation(
        "engine-not-synced-after-an-update-of-online-dpo",
        "train_online_dpo.py",
        "    engine.sync_weights(dist.full_weights(model), step)\n",
        "",
        "test_loops.py::"
        "test_an_engine_of_its_own_samples_with_the_weights_of_the_trainer[train_online_dpo.py]",
    ),
    mutation(
        "held-out-prompts-answered-greedily-twice",
        "train_grpo.py",
        "sampling.held_out(temperature)",
        "sampling.held_out(0.0)",
        "test_loops.py::"
        "test_held_out_prompts_are_answered_once_at_temperature_1_and_once_greedily[train_grpo.py]",
    ),
    mutation(
        "held-out-prompts-seeded-like-training",
        "train_ppo.py",
        "[2**32 + i for i in mine]",
        "[i for i in mine]",
        "test_loops.py::"
        "test_held_out_prompts_are_answered_once_at_temperature_1_and_once_greedily[train_ppo.py]",
    ),
    # ---- the loop of GRPO
    mutation(
        "old-log-probs-after-the-update",
        "train_grpo.py",
        'losses.log_ratio(logp_N, batch["old_logp"],',
        "losses.log_ratio(logp_N, logp_N.detach(),",
        "test_mutation_gaps.py::test_old_log_probs_of_the_trainer_are_those_of_the_engine",
    ),
    mutation(
        "token-count-of-one-rank-in-grpo",
        "train_grpo.py",
        "targets, sequences = dist.all_sums(sum(e.num_targets for e in minibatch), len(minibatch))",
        "targets, sequences = sum(e.num_targets for e in minibatch), len(minibatch)",
        "test_scripts.py::test_grpo_on_two_ranks_is_grpo_on_one",
    ),
    mutation(
        "world-size-missing-in-grpo",
        "train_grpo.py",
        "(loss * world.size / divisor)",
        "(loss / divisor)",
        "test_scripts.py::test_grpo_on_two_ranks_is_grpo_on_one",
    ),
    mutation(
        "kl-in-the-loss-of-grpo-forgotten",
        "train_grpo.py",
        "loss = loss + args.beta * (weight_N * kl_N).sum()",
        "pass",
        "test_trl_parity.py::test_two_optimizer_steps_of_train_grpo_are_those_of_trl",
    ),
    mutation(
        "correction-weighs-nothing",
        "train_grpo.py",
        "weight_N * correction_N)",
        "weight_N)",
        "test_loops.py::test_the_correction_weighs_the_loss_of_each_token",
    ),
    mutation(
        "groups-of-equal-rewards-skipped-by-the-kl",
        "train_grpo.py",
        "        if reference is None:\n",
        "        if True:\n",
        "test_loops.py::test_the_kl_and_the_entropy_are_of_groups_of_equal_rewards_too",
    ),
    mutation(
        "groups-of-equal-rewards-kept-in-resampling",
        "train_grpo.py",
        "keep_P = varied_P | (args.resample == 0)",
        "keep_P = varied_P | True",
        "test_loops.py::test_groups_of_equal_rewards_are_replaced_by_others",
    ),
    mutation(
        "resampling-draws-the-same-prompts",
        "train_grpo.py",
        "engine.share(consumed + drawn, missing)",
        "engine.share(consumed, missing)",
        "test_loops.py::test_groups_of_equal_rewards_are_replaced_by_others",
    ),
    mutation(
        "gap-measured-after-the-update",
        "train_grpo.py",
        "if k == 0:",
        "if k > 0:",
        "test_mutation_gaps.py::test_old_log_probs_of_the_trainer_are_those_of_the_engine",
    ),
    mutation(
        "gap-never-checked",
        "train_grpo.py",
        "    gap.check(step)\n",
        "",
        "test_loops.py::test_an_engine_that_is_not_the_trainer_stops_the_run[train_grpo.py]",
    ),
    # ---- rollouts that run ahead
    mutation(
        "ahead-by-a-step-too-many",
        "nanopost/ahead.py",
        "end = first + count + steps_ahead * self.prompts",
        "end = first + count + (steps_ahead + 1) * self.prompts",
        "test_ahead.py::test_no_rollout_is_older_than_it_may_be_and_groups_come_in_order",
    ),
    mutation(
        "ahead-past-the-last-step",
        "nanopost/ahead.py",
        "min(self.staleness, self.steps - self.step)",
        "self.staleness",
        "test_ahead.py::test_the_prompts_of_the_next_steps_begin_and_no_more",
    ),
    mutation(
        "ahead-takes-what-finished-first",
        "nanopost/ahead.py",
        "return [self.finished.pop(key) for key in keys]",
        "return [self.finished.pop(key) for key in [*self.finished] if key in keys]",
        "test_ahead.py::test_groups_come_in_the_order_of_the_request",
    ),
    mutation(
        "ahead-samples-with-the-trainers-own-weights",
        "nanopost/engine.py",
        "shared = whole and not ahead",
        "shared = whole",
        "test_engine.py::test_a_scripts_engine_shares_the_weights_of_one_process_in_fp32",
    ),
    mutation(
        "ahead-error-is-lost",
        "nanopost/ahead.py",
        "                    self.error = error\n",
        "                    pass\n",
        "test_ahead.py::test_an_error_of_the_thread_is_raised_at_once_where_the_loop_waits",
    ),
    mutation(
        "share-depends-on-where-a-round-begins",
        "nanopost/packing.py",
        "(world.rank - consumed) % world.size",
        "world.rank",
        "test_dist.py::test_ranks_share_out_the_rows_of_a_step_with_their_serials",
    ),
    mutation(
        "sync-between-tokens-keeps-old-keys-and-values",
        "nanopost/engine.py",
        "                logits_AV, cache = self._prefill(prefixes_A, most - t + 1)\n",
        "                pass\n",
        "test_engine.py::test_a_sync_between_two_tokens_changes_the_weights_of_the_rest",
    ),
    mutation(
        "sync-between-tokens-keeps-the-old-version",
        "nanopost/engine.py",
        "versions.append(self.version)",
        "versions.append(versions[0] if versions else self.version)",
        "test_engine.py::test_a_sync_between_two_tokens_changes_the_weights_of_the_rest",
    ),
    mutation(
        "gap-of-older-weights-is-an-alarm",
        "nanopost/rollout.py",
        "same_N = same_N & mask_N",
        "same_N = mask_N",
        "test_rollout.py::test_the_limit_is_for_tokens_that_the_trainers_weights_have_drawn",
    ),
    mutation(
        "staleness-of-the-version-before",
        "train_grpo.py",
        "staleness_metrics(rollouts, step - 1)",
        "staleness_metrics(rollouts, step)",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "resume-keeps-what-the-lost-steps-took",
        "nanopost/recording.py",
        'if line["step"] <= step]',
        'if line["version"] <= step]',
        "test_recording.py::test_a_resume_drops_what_the_lost_steps_had_taken",
    ),
    mutation(
        "replay-whatever-the-prompt",
        "nanopost/recording.py",
        'if line["prompt"] != prompt:',
        "if False:",
        "test_recording.py::test_what_the_recorded_run_did_not_ask_for_is_refused_in_a_sentence",
    ),
    mutation(
        "evaluation-is-recorded-as-of-the-next-step",
        "nanopost/ahead.py",
        "self.version = self.step = version",
        "self.version, self.step = version, version + 1",
        "test_ahead.py::test_what_is_recorded_belongs_to_the_step_that_takes_it",
    ),
    # ---- preferences
    mutation(
        "chosen-and-rejected-swapped",
        "nanopost/preference.py",
        'pairs[f"rejected_{name}_P"] = x_S.view(-1, 2).T',
        'pairs[f"rejected_{name}_P"] = x_S.view(-1, 2).flip(1).T',
        "test_preference.py::"
        "test_chosen_and_rejected_come_in_turn_and_the_divergence_makes_the_score",
    ),
    mutation(
        "reference-forgotten",
        "nanopost/preference.py",
        'ratio_S = sequences["logp"] - sequences["ref_logp"]',
        'ratio_S = sequences["logp"]',
        "test_preference.py::"
        "test_chosen_and_rejected_come_in_turn_and_the_divergence_makes_the_score",
    ),
    mutation(
        "weights-of-losses-forgotten",
        "nanopost/preference.py",
        "total_P + weight * loss(",
        "total_P + loss(",
        "test_preference.py::test_a_loss_gets_just_what_it_names_and_losses_add_up_with_their_weights",
    ),
    mutation(
        "kl-of-kto-forgotten",
        "nanopost/preference.py",
        "desirable * torch.sigmoid(beta * (kl - chosen_ratio_P))",
        "desirable * torch.sigmoid(beta * -chosen_ratio_P)",
        "test_preference.py::test_kto_is_that_of_trl",
    ),
    mutation(
        "label-weights-swapped",
        "nanopost/preference.py",
        "desirable, undesirable = label_weights",
        "undesirable, desirable = label_weights",
        "test_preference.py::test_kto_is_that_of_trl",
    ),
    mutation(
        "label-weights-swapped-in-the-script",
        "train_kto.py",
        "label_weights=args.label_weights,",
        "label_weights=args.label_weights[::-1],",
        "test_preference_scripts.py::test_a_step_of_a_coupled_loss_is_one_pass_with_every_log_prob"
        "_in_one_graph[kto-0.0-5]",
    ),
    mutation(
        "slopes-of-another-rank",
        "nanopost/forward.py",
        "slice(before, before + len(mine))",
        "slice(0, len(mine))",
        "test_preference_scripts.py::test_two_ranks_are_one[train_kto.py-more1]",
    ),
    mutation(
        "world-size-missing-in-the-second-pass",
        "train_kto.py",
        "(loss * world.size / args.rows)",
        "(loss / args.rows)",
        "test_preference_scripts.py::test_two_ranks_are_one[train_kto.py-more1]",
    ),
    mutation(
        "pair-count-of-one-rank",
        "train_dpo.py",
        "(loss * world.size / args.rows)",
        "(loss * world.size / max(1, len(step_pairs)))",
        "test_preference_scripts.py::test_two_ranks_are_one[train_dpo.py-more0]",
    ),
    mutation(
        "nll-of-dpo-by-the-tokens-of-the-step",
        "train_dpo.py",
        "dist.all_sum(chosen_targets) / args.rows",
        "dist.all_sum(chosen_targets)",
        "test_preference_scripts.py::"
        "test_a_step_of_dpo_is_one_pass_over_its_pairs[losses1-more1-options1]",
    ),
    mutation(
        "nll-of-online-dpo-by-the-tokens-of-the-step",
        "train_online_dpo.py",
        "nll_tokens = targets / max(1, num_pairs)",
        "nll_tokens = targets",
        "test_loops.py::test_the_nll_of_online_pairs_is_a_mean_over_the_tokens_of_the_best",
    ),
    mutation(
        "meter-counts-sequences-in-dpo",
        "train_dpo.py",
        "meter.add(batch.num_examples // 2,",
        "meter.add(batch.num_examples,",
        "test_preference_scripts.py::"
        "test_a_step_of_dpo_is_one_pass_over_its_pairs[losses0-more0-options0]",
    ),
    mutation(
        "best-and-worst-swapped",
        "nanopost/pairs.py",
        "group[int(high_G.argmax())], group[int(low_G.argmin())]",
        "group[int(low_G.argmin())], group[int(high_G.argmax())]",
        "test_pairs.py::test_of_sampled_answers_the_best_is_chosen_and_the_worst_rejected",
    ),
    mutation(
        "a-missing-end-rewarded",
        "train_online_dpo.py",
        "reward_PG -= args.eos_penalty",
        "reward_PG += args.eos_penalty",
        "test_preference_scripts.py::test_online_an_answer_without_an_end_loses",
    ),
    # ---- PPO
    mutation(
        "kl-in-the-reward-with-the-wrong-sign",
        "train_ppo.py",
        "reward_BT = -args.beta * kl_estimate(policy_BT, ref_BT)",
        "reward_BT = args.beta * kl_estimate(policy_BT, ref_BT)",
        "test_loops.py::test_ppo_credits_a_token_with_its_kl_and_what_follows",
    ),
    mutation(
        "score-at-the-first-token",
        "train_ppo.py",
        "reward_BT[scored_B, length_B[scored_B] - 1] +=",
        "reward_BT[scored_B, 0] +=",
        "test_loops.py::test_ppo_credits_a_token_with_its_kl_and_what_follows",
    ),
    mutation(
        "score-one-past-the-end",
        "train_ppo.py",
        "reward_BT[scored_B, length_B[scored_B] - 1] +=",
        "last_B = length_B.clamp(max=reward_BT.shape[1] - 1)\n"
        "    reward_BT[scored_B, last_B[scored_B]] +=",
        "test_loops.py::test_ppo_credits_a_token_with_its_kl_and_what_follows",
    ),
    mutation(
        "advantages-whitened-with-the-padding",
        "train_ppo.py",
        "advantages.whiten(adv_BT, sampled_BT)",
        "advantages.whiten(adv_BT, torch.ones_like(sampled_BT))",
        "test_loops.py::test_ppo_credits_a_token_with_its_kl_and_what_follows",
    ),
    mutation(
        "score-scale-forgets-earlier-scores",
        "train_ppo.py",
        'state["score_sums"], scale = advantages.running_std',
        "_, scale = advantages.running_std",
        "test_loops.py::test_ppo_credits_a_token_with_its_kl_and_what_follows",
    ),
    mutation(
        "returns-are-advantages",
        "train_ppo.py",
        'add_column(examples, "ret", ret_BT)',
        'add_column(examples, "ret", adv_BT)',
        "test_loops.py::test_ppo_credits_a_token_with_its_kl_and_what_follows",
    ),
    mutation(
        "value-warm-up-inverted",
        "train_ppo.py",
        "model.policy.requires_grad_(step > args.value_warmup)",
        "model.policy.requires_grad_(step <= args.value_warmup)",
        "test_loops.py::test_in_value_warm_up_the_value_model_alone_has_a_gradient",
    ),
    mutation(
        "token-count-of-one-rank-in-ppo",
        "train_ppo.py",
        "targets = dist.all_sum(sum(e.num_targets for e in minibatch))",
        "targets = sum(e.num_targets for e in minibatch)",
        "twins/test_ppo.py::test_it_agrees_after_a_resume_on_two_ranks[ppo]",
    ),
    mutation(
        "value-loss-without-its-coefficient",
        "train_ppo.py",
        "policy_loss + args.value_coef * value_loss",
        "policy_loss + value_loss",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "kl-in-the-loss-of-ppo-forgotten",
        "forks/ppo_kl_loss.diff",
        "+            loss = loss + args.beta * (weight_N * kl_N).sum()",
        "+            pass",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[fork ppo_kl_loss]",
    ),
    # ---- the twins of train_sft.py and train_rm.py
    mutation(
        "sft-evaluates-its-training-rows",
        "train_sft.py",
        "batches(eval_examples[world.rank",
        "batches(train_examples[world.rank",
        "twins/test_sft.py::test_the_twin_agrees_and_each_flag_matters[truncated]",
    ),
    mutation(
        "sft-evaluates-other-targets-than-it-trains",
        "train_sft.py",
        'tokenizer.example(row, args.train_on) for row in progress(eval_rows, "',
        'tokenizer.example(row) for row in progress(eval_rows, "',
        "twins/test_sft.py::test_the_twin_agrees_and_each_flag_matters[truncated]",
    ),
    mutation(
        "sft-evaluates-rows-that-it-would-split",
        "train_sft.py",
        "packing.fit_to(eval_encoded, max_length, args.overlong)",
        'packing.fit_to(eval_encoded, max_length, "truncate")',
        "twins/test_sft.py::test_the_twin_agrees_and_each_flag_matters[split]",
    ),
    mutation(
        "sft-evaluation-divided-by-its-sequences",
        "train_sft.py",
        "batch.num_targets, **{",
        "batch.num_examples, **{",
        "twins/test_sft.py::test_the_twin_agrees_and_each_flag_matters[truncated]",
    ),
    mutation(
        "sft-order-begins-anew-on-resume",
        "train_sft.py",
        'parts_of_step(state["consumed"],',
        'parts_of_step((step - state["step"] - 1) * per_step,',
        "twins/test_sft.py::test_it_agrees_after_a_resume[truncated]",
    ),
    mutation(
        "sft-evaluates-again-on-resume",
        "train_sft.py",
        "if not run.resumed:\n",
        "if True:\n",
        "twins/test_sft.py::test_it_agrees_after_a_resume[truncated]",
    ),
    mutation(
        "dft-is-nll",
        "train_sft.py",
        '"dft": losses.sft_dft',
        '"dft": losses.sft_nll',
        "twins/test_sft.py::test_the_twin_agrees_and_each_flag_matters[split]",
    ),
    mutation(
        "bins-whatever-the-seed",
        "train_sft.py",
        "packing.by_bins(lengths, args.tokens, args.seed)",
        "packing.by_bins(lengths, args.tokens, 0)",
        "twins/test_sft.py::test_the_twin_agrees_and_each_flag_matters[bins]",
    ),
    mutation(
        "epochs-of-bins-counted-in-rows",
        "train_sft.py",
        'state["consumed"] / per_epoch',
        'state["consumed"] / len(train_examples)',
        "twins/test_sft.py::test_the_twin_agrees_and_each_flag_matters[split]",
    ),
    mutation(
        "weight-decay-flag-ignored-in-sft",
        "train_sft.py",
        "optim.adamw(model, args.weight_decay)",
        "optim.adamw(model, 0.01)",
        "twins/test_sft.py::test_the_twin_agrees_and_each_flag_matters[truncated]",
    ),
    mutation(
        "reward-model-evaluates-its-training-pairs",
        "train_rm.py",
        "batches(eval_pairs[world.rank",
        "batches(train_pairs[world.rank",
        "twins/test_rm.py::test_the_twin_agrees_and_each_flag_matters[truncated]",
    ),
    mutation(
        "reward-model-order-begins-anew-on-resume",
        "train_rm.py",
        'parts_of_step(state["consumed"],',
        'parts_of_step((step - state["step"] - 1) * args.rows,',
        "twins/test_rm.py::test_it_agrees_after_a_resume[truncated]",
    ),
    mutation(
        "margins-of-pairs-not-read",
        "train_rm.py",
        'rows.number(row, "margin", default=0.0)',
        "0.0",
        "twins/test_rm.py::test_the_twin_agrees_and_each_flag_matters[truncated]",
    ),
    mutation(
        "centre-flag-ignored",
        "train_rm.py",
        'batch["margin"][0::2], args.centre)',
        'batch["margin"][0::2], 0.0)',
        "twins/test_rm.py::test_the_twin_agrees_and_each_flag_matters[truncated]",
    ),
    mutation(
        "accuracy-of-a-reward-model-upside-down",
        "train_rm.py",
        "accuracy=(chosen_P > rejected_P)",
        "accuracy=(chosen_P < rejected_P)",
        "twins/test_rm.py::test_the_twin_agrees_and_each_flag_matters[truncated]",
    ),
    mutation(
        "mean-reward-counts-pairs-for-sequences",
        "train_rm.py",
        "(chosen_P + rejected_P).sum() / 2",
        "(chosen_P + rejected_P).sum()",
        "twins/test_rm.py::test_the_twin_agrees_and_each_flag_matters[truncated]",
    ),
    mutation(
        "quantiles-of-chosen-scores-alone",
        "train_rm.py",
        "np.quantile(score_P2,",
        "np.quantile(score_P2[:, 0],",
        "twins/test_rm.py::test_the_twin_agrees_and_each_flag_matters[truncated]",
    ),
    mutation(
        "reward-model-loss-a-mean-of-micro-batches",
        "train_rm.py",
        "world.size / args.rows)",
        "world.size / len(part))",
        "twins/test_rm.py::test_the_twin_agrees_and_each_flag_matters[truncated]",
    ),
    mutation(
        "reward-model-cuts-pairs-that-it-should-drop",
        "train_rm.py",
        "pairs.fit_to(pairs_P, max_length, args.overlong)",
        'pairs.fit_to(pairs_P, max_length, "truncate")',
        "twins/test_rm.py::test_the_twin_agrees_and_each_flag_matters[dropped]",
    ),
    mutation(
        "scores-of-dummies-in-the-metrics",
        "train_rm.py",
        ".T[:, : len(part)])",
        ".T)",
        "twins/test_rm.py::test_it_agrees_after_a_resume_on_two_ranks[dropped]",
    ),
    mutation(
        "accuracy-divided-by-all-ranks-pairs-on-each",
        "train_rm.py",
        "len(chosen_P),\n        accuracy",
        "args.rows,\n        accuracy",
        "twins/test_rm.py::test_it_agrees_after_a_resume_on_two_ranks[dropped]",
    ),
    mutation(
        "quantiles-of-one-rank",
        "train_rm.py",
        "np.array(dist.gather(score_P2))",
        "np.array(score_P2)",
        "twins/test_rm.py::test_it_agrees_after_a_resume_on_two_ranks[dropped]",
    ),
    # ---- branches of CUDA, and the engine's memory and waits
    mutation(
        "cuda-window-off-by-one",
        "nanopost/attention.py",
        "-1 if window is None else window - 1",
        "-1 if window is None else window",
        "test_rehearsal.py::test_attention_calls_the_cuda_kernel_for_what_the_cpu_computes",
    ),
    mutation(
        "cuda-keys-of-other-groups",
        "nanopost/attention.py",
        "k_NGK.repeat_interleave(repeat, 1)",
        "k_NGK.repeat(1, repeat, 1)",
        "test_rehearsal.py::test_attention_calls_the_cuda_kernel_for_what_the_cpu_computes",
    ),
    mutation(
        "cuda-score-by-a-product-without-a-derivative",
        "nanopost/model.py",
        "return hidden_ND.to(precision) @ weight_1D[0].to(precision)",
        "return matmul_fp32(hidden_ND, weight_1D.T)[:, 0]",
        "test_rehearsal.py::test_every_model_has_gradients_in_bf16_on_cuda",
    ),
    mutation(
        "yarn-rounds-the-other-way",
        "nanopost/rope.py",
        "math.floor(low), math.ceil(high)",
        "math.ceil(low), math.floor(high)",
        "test_model.py::test_frequencies_of_a_real_width_are_those_of_transformers",
    ),
    mutation(
        "ids-that-no-token-has-are-drawn",
        "nanopost/engine.py",
        "return x_BV.index_fill(1, ids, -torch.inf)",
        "return x_BV",
        "test_engine.py::test_ids_that_no_token_has_are_never_drawn",
    ),
    mutation(
        "a-cache-of-any-size",
        "nanopost/engine.py",
        "count > self.rows or count * (longest + max_tokens) > self.tokens",
        "count > self.rows",
        "test_engine.py::test_prefill_and_cache_stay_within_their_tokens",
    ),
    mutation(
        "a-prefill-of-any-size",
        "nanopost/engine.py",
        "if prompts and tokens + len(prompt) > most:",
        "if False:",
        "test_engine.py::test_prefill_and_cache_stay_within_their_tokens",
    ),
    mutation(
        "the-host-waits-at-each-token",
        "nanopost/engine.py",
        "if t == most or t % self.check_every == 0:",
        "if True:",
        "test_engine.py::test_the_host_waits_for_the_device_once_in_so_many_tokens",
    ),
    mutation(
        "a-stop-string-in-a-window-too-short",
        "nanopost/engine.py",
        "            size *= 2",
        "            return False",
        "test_engine.py::test_a_stop_string_is_found_however_little_its_tokens_say",
    ),
    mutation(
        "weights-copied-into-the-trainer",
        "nanopost/engine.py",
        "if not self.shared:\n                    own",
        "if True:\n                    own",
        "test_engine.py::test_a_shared_engine_refuses_weights_that_are_not_its_own",
    ),
    mutation(
        "a-kept-row-loses-its-last-token",
        "nanopost/engine.py",
        "int(prompt_B[living_A].max()) + t - 1",
        "int(prompt_B[living_A].max()) + t - 2",
        "test_engine.py::test_log_probs_are_the_trainers_at_every_temperature",
    ),
    mutation(
        "both-copies-of-a-cache-at-once",
        "nanopost/attention.py",
        "        for layer in range(len(self.k)):\n",
        "        old = self.k[:]\n        for layer in range(len(old)):\n",
        "test_engine.py::test_a_cache_drops_rows_layer_by_layer",
    ),
    # ---- slow twins of train_dpo.py, train_kto.py and train_online_dpo.py
    mutation(
        "dpo-order-begins-anew-on-resume",
        "train_dpo.py",
        'indices, _ = packing.share(per_epoch, args.seed, state["consumed"], args.rows, world)',
        'state["consumed"] *= not run.resumed\n'
        '    indices, _ = packing.share(per_epoch, args.seed, state["consumed"], args.rows, world)',
        "twins/test_dpo.py::test_it_agrees_after_a_resume[forward_kl]",
    ),
    mutation(
        "dpo-evaluates-its-training-pairs",
        "train_dpo.py",
        "mine = eval_pairs[world.rank :: world.size]",
        "mine = train_pairs[world.rank :: world.size]",
        "twins/test_dpo.py::test_the_twin_agrees_and_each_flag_matters[forward_kl]",
    ),
    mutation(
        "cached-reference-of-another-model",
        "nanopost/reference.py",
        "{hf.content_hash(reference_folder)}",
        "any",
        "twins/test_kto.py::test_the_twin_agrees_and_each_flag_matters[aot]",
        "twins/test_kto.py::test_the_twin_agrees_and_each_flag_matters[aot_unpaired]",
    ),
    mutation(
        "kl-of-kto-not-clamped",
        "nanopost/preference.py",
        "rejected_ratio_P.detach().mean().clamp(min=0)",
        "rejected_ratio_P.detach().mean()",
        "twins/test_kto.py::test_the_twin_agrees_and_each_flag_matters[kto]",
    ),
    mutation(
        "mean-of-good-rows-over-all-rows",
        "nanopost/preference.py",
        '"rewards/chosen": (reward_P[good_P].sum(), good_P.sum())',
        '"rewards/chosen": (reward_P[good_P].sum(), len(good_P))',
        "twins/test_kto.py::test_the_twin_agrees_and_each_flag_matters[kto]",
    ),
    mutation(
        "boundary-of-bco-begins-anew-on-resume",
        "train_kto.py",
        "args.resume, args.overwrite, fingerprint(tokenizer))",
        "args.resume, args.overwrite, fingerprint(tokenizer))\n"
        'state |= {"reward_sum": 0.0, "reward_count": 0}',
        "twins/test_kto.py::test_it_agrees_after_a_resume[bco]",
    ),
    mutation(
        "constant-of-the-js-score-dropped",
        "nanopost/preference.py",
        "math.log(2) + F.logsigmoid(log_ratio)",
        "F.logsigmoid(log_ratio)",
        "twins/test_dpo.py::test_the_twin_agrees_and_each_flag_matters[js]",
    ),
    mutation(
        "reference-of-tr-dpo-not-resumed",
        "forks/tr_dpo.diff",
        "+state = run.start(model, optimizer, fresh, args.resume, args.overwrite, about, **moving)",
        "+state = run.start(model, optimizer, fresh, args.resume, args.overwrite, about)",
        "twins/test_dpo.py::test_it_agrees_after_a_resume[fork tr_dpo]",
    ),
    mutation(
        "engine-of-online-dpo-not-synced-on-resume",
        "train_online_dpo.py",
        'engine.sync_weights(dist.full_weights(model), state["step"])\n',
        "",
        "twins/test_online_dpo.py::test_it_agrees_after_a_resume_on_two_ranks[all]",
    ),
    mutation(
        "held-out-answers-of-online-dpo-as-hot-as-in-training",
        "train_online_dpo.py",
        '("accuracy", 1.0)',
        '("accuracy", args.temperature)',
        "twins/test_online_dpo.py::test_the_twin_agrees_and_each_flag_matters[all]",
    ),
    mutation(
        "ties-of-a-judge-won",
        "nanopost/rewards.py",
        "elif verdict == 1:",
        "else:",
        "twins/test_online_dpo.py::test_the_twin_agrees_and_each_flag_matters[judge]",
    ),
    # ---- train_grpo.py, train_ppo.py and their forks, under their twins
    mutation(
        "grpo-kl-rewarded-in-the-loss",
        "train_grpo.py",
        "loss = loss + args.beta * (weight_N",
        "loss = loss - args.beta * (weight_N",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "grpo-engine-not-synced-on-resume",
        "train_grpo.py",
        'engine.sync_weights(dist.full_weights(model), state["step"])',
        'engine.version = state["step"]',
        "twins/test_grpo.py::test_it_agrees_after_a_resume_on_two_ranks[grpo]",
    ),
    mutation(
        "grpo-engine-of-other-ranks-never-synced",
        "train_grpo.py",
        "engine.sync_weights(dist.full_weights(model), step)",
        "engine.version = step",
        "twins/test_grpo.py::test_it_agrees_after_a_resume_on_two_ranks[grpo]",
    ),
    mutation(
        "grpo-equal-groups-per-group-kept",
        "train_grpo.py",
        "meter.add(drawn / world.size, frac",
        "meter.add(len(groups), frac",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[resampled]",
    ),
    mutation(
        "grpo-kl-not-weighted-by-length",
        "train_grpo.py",
        "(weight_N * kl_N).sum()",
        "kl_N.sum()",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "grpo-loss-summed-over-minibatches",
        "train_grpo.py",
        '"loss": dist.all_sum(loss_sum) / args.minibatches',
        '"loss": dist.all_sum(loss_sum)',
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "grpo-metrics-per-packed-token",
        "train_grpo.py",
        "meter.add(batch.num_targets, entropy",
        "meter.add(len(batch.token_N), entropy",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "grpo-correction-of-the-kl-too",
        "train_grpo.py",
        "loss = loss + args.beta * (weight_N * kl_N)",
        "loss = loss + args.beta * (weight_N * correction_N * kl_N)",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[token-mask]",
    ),
    mutation(
        "grpo-reference-at-temperature-1",
        "train_grpo.py",
        '"ref_logp", reference, args.tokens, args.temperature',
        '"ref_logp", reference, args.tokens, 1.0',
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "grpo-redrawn-prompts-are-drawn-again",
        "train_grpo.py",
        'state["consumed"] += drawn',
        'state["consumed"] += args.prompts',
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[resampled]",
    ),
    mutation(
        "grpo-learning-rate-by-batch",
        "train_grpo.py",
        "update = (step - 1) * args.minibatches + k + 1",
        "update = step * args.minibatches",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "grpo-evaluates-training-prompts",
        "train_grpo.py",
        "rows_P = [eval_rows[i] for i in mine]",
        "rows_P = [train_rows[i] for i in mine]",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "grpo-evaluates-at-the-training-temperature",
        "train_grpo.py",
        '("accuracy", 1.0)',
        '("accuracy", args.temperature)',
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "grpo-entropy-of-samples-without-advantage-too",
        "train_grpo.py",
        "if reference is None:\n            minibatch",
        "if False:\n            minibatch",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[luspo]",
    ),
    mutation(
        "grpo-clip-low-and-high-swapped",
        "train_grpo.py",
        "low=args.clip[0], high=args.clip[1]",
        "low=args.clip[1], high=args.clip[0]",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "grpo-tokens-not-summed-over-steps",
        "train_grpo.py",
        'state["num_tokens"] += sampled',
        'state["num_tokens"] = sampled',
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "grpo-rewards-not-weighted",
        "train_grpo.py",
        "reward_PG = rewards.total(reward_FPG, reward_weights)",
        "reward_PG = rewards.total(reward_FPG, [1.0] * len(reward_weights))",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "grpo-reward-std-over-all",
        "train_grpo.py",
        "meter.add(len(reward_PG), reward_std=advantages.std(reward_PG).sum())",
        "meter.add(reward_PG.numel(), reward_std=advantages.std(reward_PG).sum())",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[grpo]",
    ),
    mutation(
        "grpo-batch-std-of-one-rank",
        "nanopost/advantages.py",
        "_, std = dist.mean_and_std(reward_PG[~reward_PG.isnan()])",
        "std = reward_PG[~reward_PG.isnan()].std()",
        "twins/test_grpo.py::test_it_agrees_after_a_resume_on_two_ranks[resampled]",
    ),
    mutation(
        "grpo-mean-reward-over-unrewarded-too",
        "train_grpo.py",
        "meter.add((~unrewarded_PG).sum(), reward",
        "meter.add(reward_PG.numel(), reward",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[luspo]",
    ),
    mutation(
        "grpo-ids-that-no-token-has-are-drawn",
        "nanopost/engine.py",
        "(logits_BV / sampling.temperature).log_softmax(-1), unused_ids)",
        "(logits_BV / sampling.temperature).log_softmax(-1), None)",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[other rows]",
    ),
    mutation(
        "grpo-minibatches-of-one-rank",
        "nanopost/packing.py",
        "np.array_split(sorted(all_serials), parts)",
        "np.array_split(sorted(serials), parts)",
        "twins/test_grpo.py::test_it_agrees_after_a_resume_on_two_ranks[resampled]",
    ),
    mutation(
        "grpo-old-log-probs-at-temperature-1",
        "train_grpo.py",
        '"old_logp", model, args.tokens, args.temperature',
        '"old_logp", model, args.tokens, 1.0',
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[token-mask]",
    ),
    mutation(
        "fork-kl-reward-rewards-the-kl",
        "forks/kl_reward.diff",
        "reward_PG - args.beta",
        "reward_PG + args.beta",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[fork kl_reward]",
    ),
    mutation(
        "fork-overlong-keeps-what-is-cut-off",
        "forks/overlong_mask.diff",
        'r.finish == "length"',
        'r.finish != "length"',
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[fork overlong_mask]",
    ),
    mutation(
        "fork-top-entropy-trains-the-rest",
        "forks/top_entropy.diff",
        "(entropy >= threshold)",
        "(entropy < threshold)",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[fork top_entropy]",
    ),
    mutation(
        "fork-top-entropy-of-one-rank",
        "forks/top_entropy.diff",
        "quantile(dist.gather(sampled) or [0.0]",
        "quantile(sampled or [0.0]",
        "twins/test_grpo.py::test_it_agrees_after_a_resume_on_two_ranks[fork top_entropy]",
    ),
    mutation(
        "fork-two-sided-clip-from-below",
        "forks/two_sided_clip.diff",
        "clamp(max=math.log(args.delta))",
        "clamp(min=-math.log(args.delta))",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[fork two_sided_clip]",
    ),
    mutation(
        "fork-gdpo-std-of-the-sum",
        "forks/gdpo.diff",
        "advantages.std(reward_PG)[:, None]",
        "reward_PG.nanmean(1, keepdim=True)",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[fork gdpo]",
    ),
    mutation(
        "fork-gdpo-weights-ignored",
        "forks/gdpo.diff",
        "sum_PG += weight * (",
        "sum_PG += (",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[fork gdpo]",
    ),
    mutation(
        "fork-multi-turn-draws-twice-from-one-seed",
        "forks/multi_turn.diff",
        "[seed + n + i for",
        "[seed + i for",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[fork multi_turn]",
    ),
    mutation(
        "fork-multi-turn-trains-the-turn",
        "nanopost/rollout.py",
        "np.zeros(len(turn), bool)",
        "np.ones(len(turn), bool)",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[fork multi_turn]",
    ),
    mutation(
        "fork-off-policy-mask-inverted",
        "forks/off_policy_mask.diff",
        "(fallen_N <= args",
        "(fallen_N > args",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[fork off_policy_mask]",
    ),
    mutation(
        "fork-curriculum-repeats-the-least-varied",
        "forks/curriculum.diff",
        "sorted(spreads, reverse=True)",
        "sorted(spreads)",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[fork curriculum]",
    ),
    mutation(
        "fork-curriculum-forgets-on-resume",
        "forks/curriculum.diff",
        'enumerate(state["again"], consumed)',
        'enumerate(state["again"] if not run.resumed else [], consumed)',
        "twins/test_grpo.py::test_it_agrees_after_a_resume[fork curriculum]",
    ),
    mutation(
        "fork-median-is-a-quartile",
        "forks/median_baseline.diff",
        "quantile(0.5, 1",
        "quantile(0.25, 1",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[fork median_baseline]",
    ),
    mutation(
        "fork-entropy-penalty",
        "forks/entropy_bonus.diff",
        "loss - args.entropy_coef",
        "loss + args.entropy_coef",
        "twins/test_grpo.py::test_the_twin_agrees_and_each_flag_matters[fork entropy_bonus]",
    ),
    mutation(
        "ppo-kl-rewarded",
        "train_ppo.py",
        "reward_BT = -args.beta * kl_estimate",
        "reward_BT = args.beta * kl_estimate",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-value-learning-rate-upside-down",
        "train_ppo.py",
        "args.value_lr / args.lr",
        "args.lr / args.value_lr",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-whitened-rewards-lose-their-mean",
        "train_ppo.py",
        "sampled_BT, shift_mean=False)",
        "sampled_BT)",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[warmed up]",
    ),
    mutation(
        "ppo-engine-not-synced-on-resume",
        "train_ppo.py",
        'engine.sync_weights(dist.full_weights(model, "policy."), state["step"])',
        'engine.version = state["step"]',
        "twins/test_ppo.py::test_it_agrees_after_a_resume_on_two_ranks[ppo]",
    ),
    mutation(
        "ppo-scores-per-prompt",
        "train_ppo.py",
        "meter.add(scored_B.sum(), **objective)",
        "meter.add(len(rows_P), **objective)",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-penalty-for-answers-that-end",
        "train_ppo.py",
        'r.finish == "length" for',
        'r.finish == "stop" for',
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-value-warmup-one-batch-longer",
        "train_ppo.py",
        "requires_grad_(step > args.value_warmup)",
        "requires_grad_(step > args.value_warmup + 1)",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[warmed up]",
    ),
    mutation(
        "ppo-value-warmup-ignored",
        "train_ppo.py",
        "requires_grad_(step > args.value_warmup)",
        "requires_grad_(True)",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[head]",
    ),
    mutation(
        "ppo-returns-are-monte-carlo",
        "train_ppo.py",
        'add_column(examples, "ret", ret_BT)',
        'add_column(examples, "ret", advantages.gae(reward_BT, value_BT, args.gamma, 1.0)[1])',
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-explained-variance-of-gae-returns",
        "train_ppo.py",
        "monte_carlo_BT, value_BT, sampled_BT",
        "ret_BT, value_BT, sampled_BT",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-score-multiplied-by-the-scale",
        "train_ppo.py",
        "score_B[scored_B] / scale",
        "score_B[scored_B] * scale",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-approxkl-without-its-half",
        "train_ppo.py",
        "log_ratio_N.square().sum() / 2",
        "log_ratio_N.square().sum()",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-ratio-of-masked-tokens-too",
        "train_ppo.py",
        "(log_ratio_N.exp() * batch.mask_N).sum()",
        "log_ratio_N.exp().sum()",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-old-value-and-return-swapped",
        "train_ppo.py",
        'batch["value"], batch["ret"], batch.mask_N',
        'batch["ret"], batch["value"], batch.mask_N',
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-gamma-and-lambda-swapped",
        "train_ppo.py",
        "value_BT, args.gamma, args.lam)",
        "value_BT, args.lam, args.gamma)",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-epochs-in-the-same-order",
        "train_ppo.py",
        "seed = args.seed, step",
        "seed = args.seed, 0",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-learning-rate-ends-at-half",
        "train_ppo.py",
        "optim.learning_rate(step, args.steps, args.lr",
        "optim.learning_rate(step, 2 * args.steps, args.lr",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-ended-and-unended-swapped",
        "train_ppo.py",
        "(~unended_B).sum())",
        "unended_B.sum())",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-reward-without-the-kl-in-the-metric",
        "train_ppo.py",
        "(kl_reward_B + score_B).nansum()",
        "score_B.nansum()",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-entropy-is-a-log-prob",
        "train_ppo.py",
        "-old_BT.sum()",
        "old_BT.sum()",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-score-scale-forgotten-on-resume",
        "train_ppo.py",
        'sums = state["score_sums"]',
        'sums = state["score_sums"] if not run.resumed else (0, 0.0, 0.0)',
        "twins/test_ppo.py::test_it_agrees_after_a_resume[ppo]",
    ),
    mutation(
        "ppo-objective-over-unrewarded-too",
        "train_ppo.py",
        "meter.add(scored_B.sum(), **objective)",
        "meter.add(len(rollouts), **objective)",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[warmed up]",
    ),
    mutation(
        "ppo-score-scale-of-one-rank",
        "nanopost/advantages.py",
        "new = dist.all_sums(len(score_B), score_B.sum(), score_B.square().sum())",
        "new = len(score_B), float(score_B.sum()), float(score_B.square().sum())",
        "twins/test_ppo.py::test_it_agrees_after_a_resume_on_two_ranks[ppo]",
    ),
    mutation(
        "ppo-advantages-not-whitened",
        "train_ppo.py",
        "advantages.whiten(adv_BT, sampled_BT))",
        "adv_BT)",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-kl-of-the-old-log-probs-with-themselves",
        "train_ppo.py",
        'padded(examples, "ref_logp")',
        'padded(examples, "old_logp")',
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-value-head-not-zero",
        "nanopost/hf.py",
        "torch.nn.init.zeros_(model.value.weight)",
        "torch.nn.init.ones_(model.value.weight)",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[head]",
    ),
    mutation(
        "fork-adaptive-kl-upside-down",
        "forks/adaptive_kl.diff",
        "kl / target - 1",
        "target / max(kl, 1e-9) - 1",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[fork adaptive_kl]",
    ),
    mutation(
        "fork-adaptive-kl-during-the-warmup",
        "forks/adaptive_kl.diff",
        "if step > args.value_warmup:",
        "if step:",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[fork adaptive_kl]",
    ),
    mutation(
        "fork-ppo-kl-loss-sign",
        "forks/ppo_kl_loss.diff",
        "loss + args.beta *",
        "loss - args.beta *",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[fork ppo_kl_loss]",
    ),
    mutation(
        "fork-kl-stop-after-the-step",
        "forks/kl_stop.diff",
        "> args.kl_stop * targets",
        "> 2 * args.kl_stop * targets",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[fork kl_stop]",
    ),
    mutation(
        "fork-kl-stop-keeps-gradients",
        "forks/kl_stop.diff",
        "            optimizer.zero_grad(set_to_none=True)\n+            break",
        "            pass\n+            break",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[fork kl_stop]",
    ),
    mutation(
        "grpo-stale-engine-within-the-gap-on-resume",
        "train_grpo.py",
        'engine.sync_weights(dist.full_weights(model), state["step"])',
        'engine.version = state["step"]',
        "twins/test_grpo.py::test_it_agrees_after_a_resume_on_two_ranks[token-mask]",
    ),
    mutation(
        "ppo-policy-rate-for-the-value-model",
        "train_ppo.py",
        "optim.adamw(model, args.weight_decay, value=value_rate)",
        "optim.adamw(model, args.weight_decay)",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-exports-the-initial-value-model",
        "train_ppo.py",
        'dist.full_weights(model, "value.")',
        "hf.load_scalar_model(value_folder, new_head=True).state_dict().items()",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "ppo-minibatches-without-shuffling",
        "nanopost/packing.py",
        "order = np.random.default_rng((*seed, epoch)).permutation(prompts)",
        "order = np.arange(prompts)",
        "twins/test_ppo.py::test_the_twin_agrees_and_each_flag_matters[ppo]",
    ),
    mutation(
        "grpo-largest-gap-of-one-rank",
        "nanopost/rollout.py",
        "dist.all_max(max(largest))[0]",
        "max(largest)",
        "twins/test_grpo.py::test_it_agrees_after_a_resume_on_two_ranks[token-mask]",
    ),
    # ---- flags that say how, not what
    mutation(
        "keep-ignored",
        "train_grpo.py",
        "vars(args), show, args.keep)",
        "vars(args), show)",
        "test_loops.py::test_flags_that_say_how_reach_what_they_are_for[train_grpo.py]",
    ),
    mutation(
        "save-minutes-ignored",
        "train_ppo.py",
        "args.save_every, args.save_minutes):",
        "args.save_every, 0):",
        "test_loops.py::test_flags_that_say_how_reach_what_they_are_for[train_ppo.py]",
    ),
    mutation(
        "engine-tokens-ignored",
        "nanopost/cli.py",
        "args.engine_rows, args.engine_tokens, args.max",
        "args.engine_rows, 2**18, args.max",
        "test_loops.py::test_flags_that_say_how_reach_what_they_are_for[train_grpo.py]",
    ),
    mutation(
        "reward-timeout-ignored",
        "train_ppo.py",
        "args.tokens, args.reward_timeout",
        "args.tokens, 0.0",
        "test_loops.py::test_flags_that_say_how_reach_what_they_are_for[train_ppo.py]",
    ),
    mutation(
        "save-dtype-ignored",
        "train_dpo.py",
        "files, args.save_dtype)",
        "files)",
        "test_loops.py::test_flags_that_say_how_reach_what_they_are_for[train_dpo.py]",
    ),
    mutation(
        "dpo-nll-scaled-by-a-ranks-own-pairs",
        "train_dpo.py",
        "dist.all_sum(chosen_targets) / args.rows",
        "dist.all_sum(chosen_targets) / len(step_pairs)",
        "twins/test_dpo.py::test_it_agrees_after_a_resume_on_two_ranks[orpo]",
    ),
    mutation(
        "kto-evaluates-all-held-out-rows",
        "train_kto.py",
        "eval_rows[: args.eval_rows]",
        "eval_rows[:]",
        "twins/test_kto.py::test_the_twin_agrees_and_each_flag_matters",
    ),
    mutation(
        "a-warning-hides-another",
        "nanopost/tokenizer.py",
        'return "\\n".join(warnings)',
        "return warnings[-1] if warnings else ''",
        "test_tokenizer.py::test_another_template_and_links_to_elsewhere_are_both_said",
    ),
    # ---- the audit
    mutation(
        "audit-takes-nan-for-agreement",
        "nanopost/probe.py",
        "if not row[1] <= row[2]]",
        "if row[1] > row[2]]",
        "test_audit.py::test_log_probs_that_are_not_numbers_fail",
    ),
    mutation(
        "audit-forgets-the-tied-head",
        "nanopost/probe.py",
        "names = [*now, *([HEAD] if HEAD not in now else [])]",
        "names = [*now]",
        "test_audit.py::test_a_stale_tied_head_is_seen_by_its_print",
    ),
    mutation(
        "audit-takes-any-cut",
        "nanopost/probe.py",
        "np.log(np.minimum(1.0, top_p + np.exp(logp_T)))",
        "0.0 * logp_T",
        "test_audit.py::test_the_bounds_of_a_cut_hold_for_it_and_for_few_others",
    ),
    mutation(
        "audit-takes-scores-of-another-temperature",
        "nanopost/probe.py",
        "score([*longer.values()], TEMPERATURE)",
        "score([*longer.values()], 1.0)",
        "test_audit.py::test_a_faithful_answer_fails_in_nothing",
    ),
    mutation(
        "audit-compares-with-the-prints-of-the-same-sync",
        "nanopost/audit.py",
        "self.before, self.prints = self.prints or None, {}",
        "self.before, self.prints = None, {}",
        "test_audit.py::test_a_run_names_stale_weights_by_the_prints_of_the_sync_before",
    ),
    mutation(
        "audit-pads-no-vocabulary",
        "nanopost/probe.py",
        "(-len(tensor) % 64)",
        "0",
        "test_audit.py::test_digests_are_those_of_fused_and_padded_weights",
    ),
    mutation(
        "audit-leaves-the-model-edited",
        "nanopost/attribution.py",
        "own[name].copy_(tensor)\n                if HEAD",
        "pass\n                if HEAD",
        "test_audit.py::test_a_fault_is_found_by_scores_alone",
    ),
    mutation(
        "audit-at-every-sync",
        "nanopost/audit.py",
        "self.count % self.every == 0",
        "self.count >= 0",
        "test_audit.py::test_audits_come_every_so_many_syncs_from_the_first_on",
    ),
    mutation(
        "audit-names-one-of-several-alone",
        "nanopost/attribution.py",
        "of_several(cause) if len(members) > 1 else cause",
        "cause",
        "test_audit.py::test_causes_become_one_clause",
    ),
    # ---- faults of vLLM servers
    mutation(
        "vllm-ends-the-requests-of-other-calls",
        "nanopost/server.py",
        "if ended in (None, theirs)]",
        "]",
        "test_vllm_faults.py::test_a_refused_prompt_ends_no_sync_of_another_thread",
    ),
    mutation(
        "vllm-updates-sent-again",
        "nanopost/server.py",
        "kept = again and bool(self.idle)",
        "kept = bool(self.idle)",
        "test_vllm_faults.py::test_a_sync_that_fails_anywhere_leaves_a_server_out_until_a_whole_one"
        "[/update_weights-lose]",
    ),
    mutation(
        "vllm-old-weights-of-a-restarted-server",
        "nanopost/vllm.py",
        "elif version != self._name(self.version):",
        "elif False:",
        "test_vllm_faults.py::test_a_server_that_restarts_is_noticed_by_its_old_weights",
    ),
    mutation(
        "vllm-ctrl-c-waits-for-answers",
        "nanopost/vllm.py",
        "                server.hang_up(ended)\n            pool.shutdown",
        "                pass\n            pool.shutdown",
        "test_vllm_faults.py::test_ctrl_c_while_it_generates_ends_within_seconds[6.0]",
    ),
    mutation(
        "vllm-failed-update-not-abandoned",
        "nanopost/vllm.py",
        'server.post("/collective_rpc", {"method": "nanopost_abandon"})',
        "pass",
        "test_vllm_faults.py::test_an_update_that_fails_inside_the_server_leaves_nothing_in_the_next",
    ),
    mutation(
        "vllm-back-without-a-whole-sync",
        "nanopost/vllm.py",
        "self.lost = dict(dist.gather([*errors.items()]))",
        "self.lost = {}",
        "test_vllm_faults.py::test_a_sync_that_fails_anywhere_leaves_a_server_out_until_a_whole_one"
        "[/update_weights-500]",
    ),
    mutation(
        "vllm-two-runs-mix",
        "nanopost/vllm.py",
        "if version != self.marks[server.url]:",
        "if False:",
        "test_vllm_faults.py::test_weights_of_two_runs_do_not_mix",
    ),
    mutation(
        "vllm-only-server-given-up",
        "nanopost/vllm.py",
        "if not self.alive and iter(named_tensors) is not named_tensors:",
        "if False:",
        "test_vllm_faults.py::test_the_only_server_is_synced_once_more[/update_weights]",
    ),
    mutation(
        "vllm-another-model-served",
        "nanopost/vllm.py",
        "if None not in (ours, theirs) and ours != theirs:",
        "if False:",
        "test_vllm_faults.py::test_a_server_of_another_model_is_one_sentence",
    ),
    # ---- the plan
    mutation(
        "plan-shards-rounded-down",
        "nanopost/plan.py",
        "return -(-shape[0] // ranks) * math.prod(shape[1:])",
        "return shape[0] // ranks * math.prod(shape[1:])",
        "test_plan.py::test_shards_of_70b_are_those_of_fsdp2_to_the_byte",
    ),
    mutation(
        "plan-one-moment",
        "nanopost/plan.py",
        '"moments": 8 * mine.trained',
        '"moments": 4 * mine.trained',
        "test_plan.py::test_shards_of_70b_are_those_of_fsdp2_to_the_byte",
    ),
    mutation(
        "plan-without-qk-norms",
        "nanopost/plan.py",
        "attention + mlp + lora)",
        "attention + mlp + lora - qk_norms)",
        "test_plan.py::test_a_script_peaks_where_the_plan_says",
    ),
    mutation(
        "plan-no-values-in-the-cache",
        "nanopost/plan.py",
        "return 2 * c.layers * c.kv_heads",
        "return c.layers * c.kv_heads",
        "test_plan.py::test_a_script_peaks_where_the_plan_says",
    ),
    mutation(
        "plan-root-not-gathered",
        "nanopost/plan.py",
        "gathered_bytes(args, block), gathered_bytes(args, root)",
        "gathered_bytes(args, block), 0",
        "test_plan.py::test_a_rank_of_64_peaks_where_the_plan_says",
    ),
    mutation(
        "plan-two-passes",
        "nanopost/plan.py",
        "passes = 2 if args.lora else 3",
        "passes = 2",
        "test_plan.py::test_operations_are_those_that_torch_counts",
    ),
    mutation(
        "plan-weights-gathered-once",
        "nanopost/plan.py",
        "gathers = count * 2 * weights",
        "gathers = count * weights",
        "test_plan.py::test_bytes_that_ranks_exchange_are_those_of_fsdp2",
    ),
    mutation(
        "plan-fits-what-does-not",
        "nanopost/plan.py",
        "if peak(other) <= args.machine.memory and",
        "if peak(other) <= 2 * args.machine.memory and",
        "test_plan.py::test_what_makes_it_fit_fits_and_the_cheapest_comes_first",
    ),
]


def chosen(names):
    unknown = [name for name in names if not any(name in m.name for m in MUTATIONS)]
    if unknown:
        known = ", ".join(m.name for m in MUTATIONS)
        sys.exit(f"no mutation is named {', '.join(unknown)}; there are {known}.")
    named = [m for m in MUTATIONS if not names or any(name in m.name for name in names)]
    if "NANOPOST_VLLM_PYTHON" in os.environ:
        return named
    kept = [m for m in named if not any(test.startswith("test_vllm") for test in m.tests)]
    if len(kept) < len(named):
        print(f"left out, as NANOPOST_VLLM_PYTHON is not set: {len(named) - len(kept)} mutations")
    return kept


def mutated(m, tree):
    """The text of the mutation's file, before and after."""
    text = (tree / m.file).read_text()
    if text.count(m.old) != 1:
        sys.exit(f"{m.name}: {m.file} has {text.count(m.old)} times, not once: {m.old!r}")
    return text, text.replace(m.old, m.new)


def pytest(tree, tests, *flags):
    """-> (exit status, output).

    No bytecode is kept: a mutated file may have the size and second of the one before it.
    """
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
    mutations = chosen(names)
    survived = 0
    for m in MUTATIONS:
        mutated(m, ROOT)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "nanopost"
        unwanted = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, tree, ignore=unwanted)
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
            verdict = "red" if red else "SURVIVED"
            reason = failed[1] if failed else output[-300:]
            seconds = time.monotonic() - began
            row = f"{m.name:{width}}  {m.file:22}  {verdict}  {seconds:4.0f} s  {reason}"
            print(row[:240], flush=True)
    print(f"{len(mutations)} mutations, {survived} survived")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
