"""The flags of the scripts: bounds of their numbers, refusals, and --help with defaults."""

import argparse

from nanopost import InputError

LEAST = {
    "steps": 1,
    "rows": 1,
    "prompts": 1,
    "group": 1,
    "minibatches": 1,
    "max_new_tokens": 1,
    "tokens": 2,
    "max_length": 2,
    "max_prompt": 1,
    "engine_rows": 1,
    "follow_every": 1,
    "bins": 0,
    "seed": 0,
    "warmup": 0,
    "save_every": 0,
    "eval_every": 0,
    "holdout": 0,
    "resample": 0,
    "lr": 0,
    "weight_decay": 0,
    "grad_clip": 0,
    "clip_low": 0,
    "clip_high": 0,
    "epochs": 0,
    "beta": 0,
    "max_logp_gap": 0,
    "ppo_epochs": 1,
    "value_warmup": 0,
    "value_clip": 0,
    "value_coef": 0,
    "gamma": 0,
    "lam": 0,
    "kl_target": 0,
    "kl_stop": 0,
    "samples": 1,
    "limit": 1,
    "top_entropy": 0,
    "entropy_coef": 0,
    "delta": 1,
    "sapo_tau": 1e-3,
}


MOST = {"top_entropy": 1, "lam": 1}


def check_numbers(arguments: dict):
    """InputError for a flag whose number is too small or too large to mean anything."""
    for name, least in LEAST.items():
        given, most = arguments.get(name), MOST.get(name, float("inf"))
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if value is not None and not least <= value <= most:
                raise InputError(
                    f"--{name} {value}: give {least} or more{f', and at most {most}' * (name in MOST)}."
                )


def refuse(*cases: tuple[bool, str]):
    """InputError with the sentence of the first case that holds."""
    for wrong, sentence in cases:
        if wrong:
            raise InputError(sentence)


class Help(argparse.RawDescriptionHelpFormatter):
    """--help that says each flag's default, unless its text does already."""

    def add_argument(self, action):
        default, text = action.default, action.help or ""
        if (
            default not in (None, [], argparse.SUPPRESS)
            and default is not False
            and "default" not in text
        ):
            shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
            action.help = f"{text}{'; ' * bool(text)}default {shown}"
        super().add_argument(action)
