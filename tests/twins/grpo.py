"""The slow twin of train_grpo.py and of its forks."""

import math
from argparse import Namespace

import numpy as np
import torch

from twins import common, rollouts
from twins.rollouts import GAP, Means, is_due, positions, spread, std

SCRIPT = "train_grpo.py"
PLACE = "--model {place}/model --data {place}/prompts.jsonl --eval_data {place}/prompts_held_out.jsonl"
LETTERS = "--reward {place}/reward.py:letters"
TWO = f"{LETTERS} {{place}}/reward.py:scaled --reward_weights 0.7 -0.45"
SMALL = f"{PLACE} --steps 3 --prompts 4 --group 3 --minibatches 2 --max_new_tokens 6 --warmup 2"
MOVING = "--lr 4e-3 --weight_decay 0.2 --grad_clip 0.6 --temperature 0.8 --seed 5"
FORK = f"{SMALL} {MOVING} {TWO}"
RUNS = {
    "grpo": f"{SMALL} {MOVING} {TWO} --eval_every 2 --stop e 7 --tokens 70 --checkpointing"
    " --kernels torch --engine_rows 7 --clip 0.02 0.05 --beta 0.3 --agg sequence"
    " --old_logp trainer",
    "resampled": f"{SMALL} {MOVING} --prompts 6 --minibatches 3 --resample 2 --adv batch"
    " --agg constant --clip 0.01 0.03 --reward {place}/rewards.py:rarely --kl k2 --beta 0.1",
    "dr_grpo, other rows": "--model {place}/model --data {place}/questions.jsonl --holdout 3"
    " --rename question=prompt weight=factor --max_prompt 60 --chat_template {place}/chat.jinja"
    " --reward {place}/rewards.py:letters {place}/rewards.py:factors {place}/reward.py:letters"
    f" --reward {{place}}/rewards.py:letters {{place}}/rewards.py:factors {{place}}/rewards.py:letters"
    f" --steps 3 --prompts 4 --group 2 --minibatches 1 --max_new_tokens 5 {MOVING} --adv mean",
}
