"""A folder's tokenizer.json, tokenizer_config.json and chat template, as transformers reads them.

Ids equal those of its AutoTokenizer: the post-processor of tokenizer.json alone decides whether BOS
is added (add_bos_token is ignored), and added_tokens_decoder adds tokens and overrides how they are
matched.
"""

import json
from itertools import groupby
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from nanopost import InputError
from nanopost.hf import check_is_model, read_config

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
IMAGE = "<image_soft_token>"


def read_tokenizer(folder: Path) -> tuple[tokenizers.Tokenizer, dict, int | None]:
    """The tokenizer, with every token that its folder declares; tokenizer_config.json; and the id
    of the token for an image, if the model has no embedding for it."""
    raw = _read_raw(folder)
    config = read_optional_json(folder / "tokenizer_config.json")
    if config.get("added_tokens_decoder"):
        _add_declared_tokens(raw, config, folder)
    else:
        config |= read_optional_json(folder / "special_tokens_map.json")
    _add_named_tokens(raw, config, folder)
    model = read_optional_json(folder / "config.json")
    vocab_size = (model.get("text_config") or model).get("vocab_size")
    # The small Gemma 3 have the tokenizer of the large ones, whose token for an image they lack.
    image_id = raw.token_to_id(IMAGE)
    last = max(i for i in raw.get_vocab().values() if i != image_id)
    if vocab_size and last >= vocab_size:
        raise InputError(
            f"{folder}: the tokenizer's last id is {last}, for {raw.id_to_token(last)!r}, but "
            f"config.json has a vocab_size of {vocab_size}: they do not belong together."
        )
    lacks_image = image_id is not None and vocab_size and image_id >= vocab_size
    return raw, config, image_id if lacks_image else None


def read_template(folder: Path, config: dict, chat_template=None) -> str | None:
    """The template in use: the file given, or else chat_template.jinja or tokenizer_config.json."""
    if chat_template is not None and not Path(chat_template).is_file():
        raise InputError(f"--chat_template {chat_template}: no such file.")
    path = Path(chat_template or folder / "chat_template.jinja")
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t["name"]: t["template"] for t in template}
        return named.get("default", next(iter(named.values()), None))
    return template


def named_tokens(config: dict) -> dict[str, str]:
    """Special tokens by the role that templates know them by: {"eos_token": "</s>", ...}."""
    named = {}
    for name in NAMED_TOKENS:
        if token := config.get(name):
            named[name] = token["content"] if isinstance(token, dict) else token
    return named


def read_optional_json(path: Path) -> dict:
    """The content of a file, or {} if there is none."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}).") from error


def listed(ids: int | list[int] | None) -> list[int]:
    """eos_token_id may be one id or several."""
    if ids is None:
        return []
    if isinstance(ids, list):
        return ids
    return [ids]


def _read_raw(folder):
    path = folder / "tokenizer.json"
    if not folder.is_dir():
        read_config(folder)  # its error says what the folder could be
    if not path.is_file():
        check_is_model(folder)
        raise InputError(
            f"{folder} has no tokenizer.json: load the tokenizer in transformers and save it there "
            "with save_pretrained."
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"{path}: tokenizers {tokenizers.__version__} cannot read it ({error})."
        ) from error


def _add_declared_tokens(raw, config, folder):
    """Add the tokens of added_tokens_decoder, which must get the ids that it gives them."""
    declared = {int(i): AddedToken(**token) for i, token in config["added_tokens_decoder"].items()}
    # By runs: Gemma 3 declares 6,415 of them, and each call costs milliseconds.
    for special, run in groupby(sorted(declared), lambda i: declared[i].special):
        add = raw.add_special_tokens if special else raw.add_tokens
        add([declared[i] for i in run])
    for i, token in sorted(declared.items()):
        if raw.token_to_id(token.content) != i:
            raise InputError(
                f"{folder}: {token.content!r} has the id {i} in tokenizer_config.json and "
                f"{raw.token_to_id(token.content)} in tokenizer.json: they do not belong together."
            )


def _add_named_tokens(raw, config, folder):
    """Mark the tokens with a role as special, so that they are recognised in text."""
    known = {token.content for token in raw.get_added_tokens_decoder().values()}
    for name, token in named_tokens(config).items():
        if token in known:
            continue
        if raw.token_to_id(token) is not None:
            raw.add_special_tokens([AddedToken(token, normalized=False)])
        elif name in ("bos_token", "eos_token"):
            raise InputError(
                f"{folder}: tokenizer_config.json names {token!r} as {name}, but tokenizer.json "
                "has no such token: correct one of them."
            )
