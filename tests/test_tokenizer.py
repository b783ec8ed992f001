"""Ids against transformers, kinds of rows, and the files of a tokenizer."""

import codecs
import gzip
import json

import numpy as np
import pytest
from chats import (
    CHATML,
    CONVERSATIONS,
    HEADER_ALONE,
    NO_PROMPT,
    REAL,
    SPECIAL,
    TEMPLATES,
    TRIMS,
    answer,
    folder_of,
    make,
    raw_bytes,
    system,
    trained,
    user,
)
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, normalizers, processors

from nanopost import InputError, pairs, rows
from nanopost.tokenizer import (
    Pieces,
    Tokenizer,
    check_stage,
    fingerprint,
    tokenizer_files,
)
from runs import toy


# ---------------------------------------------------------------------------------------------- ids
@pytest.mark.parametrize(
    "name, vectors",
    [("qwen2.5", "qwen2"), ("qwen3", "qwen2"), ("gpt2", "gpt2"), ("llama3.1", "llama3")],
)
def test_ids_are_those_of_the_vectors(shared, real, name, vectors):
    folder = shared / "tokenizers/vectors"
    texts = (folder / f"{vectors}.inp").read_text(encoding="utf8").split("\n__ggml_vocab_test__\n")
    lines = (folder / f"{vectors}.out").read_text().split("\n")
    for text, ids in zip(texts, lines):
        assert real(name)[0].encode(text) == [int(i) for i in ids.split()], text
    assert len(texts) == 47


STRINGS = [
    "Hello, world",
    "  two  spaces ",
    "\n\n",
    "e\u0301 \u00e9 \u212b",
    "🤖 👩‍👩‍👧 字",
    "<|im_start|>x<|im_end|>\n<think>a</think>",
    "<|begin_of_text|>Hi<|eot_id|>",
    "<|endoftext|>",
    "<tool_response>1</tool_response>",
    "1234567 3.14 ''s",
    "\r\n\tif",
]


@pytest.mark.parametrize("name", REAL)
def test_ids_are_those_of_autotokenizer(shared, real, auto, name):
    tokenizer, theirs = real(name)[0], auto(name)
    vectors = (
        (shared / "tokenizers/vectors/qwen2.inp")
        .read_text(encoding="utf8")
        .split("\n__ggml_vocab_test__\n")
    )
    for text in STRINGS + vectors:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), text
        if not (theirs.bos_token and text.startswith(theirs.bos_token)):
            assert tokenizer.text_ids(text) == theirs(text)["input_ids"], text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        None if name == "gpt2" else theirs.pad_token_id,
    )
    assert tokenizer.vocab_size == len(theirs)


def test_tokens_that_only_tokenizer_config_has_are_added(real):
    tokenizer = real("qwen3")[0]
    assert tokenizer.encode("<tool_response></tool_response><think></think>") == [
        151665,
        151666,
        151667,
        151668,
    ]
    assert tokenizer.vocab_size == 151669


def added(content, **more):
    return {
        "content": content,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        **more,
    }


@pytest.mark.parametrize(
    "config, files",
    [
        (
            {"eos_token": "<e>"},
            {},
        ),  # in the vocabulary, but not declared as a token that text may spell
        ({"eos_token": added("<e>") | {"__type": "AddedToken"}}, {}),
        (
            {"eos_token": "<f>"},
            {"special_tokens_map": {"eos_token": "<e>", "pad_token": added("<f>")}},
        ),
        (
            {
                "eos_token": "<e>",
                "added_tokens_decoder": {"0": added("<s>", rstrip=True, special=True)},
            },
            {"special_tokens_map": {"eos_token": "<f>"}},
        ),
        (
            {
                "eos_token": "<e>",
                "added_tokens_decoder": {"259": added("<new>", lstrip=True, special=False)},
            },
            {},
        ),
        (
            {
                "eos_token": "<e>",
                "added_tokens_decoder": {
                    str(259 + i): added(f"<{name}>", special=name in "wy")
                    for i, name in enumerate("vwxyz")
                },
            },
            {},
        ),
        ({"bos_token": "<s>", "eos_token": "<e>", "add_bos_token": False}, {}),
        ({"bos_token": "<s>", "eos_token": "<e>", "add_bos_token": True}, {}),
    ],
)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_special_tokens_of_every_file_are_those_of_autotokenizer(tmp_path, config, files, adds_bos):
    transformers = pytest.importorskip("transformers")
    raw = raw_bytes(["<s>"])
    vocab = {**{token: i for token, i in raw.get_vocab().items()}, "<e>": 257, "<f>": 258}
    raw.model = models.BPE(vocab, [])
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    folder = folder_of(
        tmp_path, raw, {"tokenizer_class": "PreTrainedTokenizerFast", **config}, **files
    )
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.template.named == theirs.special_tokens_map
    for text in ("a<e>b<f> <s>  c", "x <new> y"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.text_ids(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("name", [name for name in REAL if name != "gpt2"])
def test_a_rendering_is_encoded_as_in_transformers_with_one_bos_at_most(
    real, auto, frozen_clock, name
):
    tokenizer, theirs = real(name)[0], auto(name)
    for messages in (CONVERSATIONS["multi"], CONVERSATIONS["padded"], CONVERSATIONS["system"]):
        expected = theirs.apply_chat_template(messages, return_dict=False)
        assert tokenizer.example({"messages": messages}).ids.tolist() == expected
        prompt = theirs.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.prompt_ids(messages[:-1]) == prompt
        if name in ("tiny_llama3", "llama3.1"):
            assert expected.count(tokenizer.bos_id) == 1
            doubled = theirs(theirs.apply_chat_template(messages, tokenize=False))["input_ids"]
            assert doubled.count(tokenizer.bos_id) == 2


@pytest.mark.parametrize(
    "name, stops",
    [("qwen2.5", [151645]), ("llama3.1", [128009]), ("gpt2", [50256]), ("minimind", [2])],
)
def test_stop_ids(real, name, stops):
    assert real(name)[0].stop_ids == {*stops}


def test_stop_ids_are_those_of_every_source(tmp_path):
    folder = folder_of(
        tmp_path,
        raw_bytes(SPECIAL),
        {"eos_token": "</s>", "chat_template": CHATML},
        generation_config={"eos_token_id": [1, 15]},
    )
    assert Tokenizer.load(folder).stop_ids == {1, 15, SPECIAL.index("<|im_end|>")}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 16}')
    assert Tokenizer.load(folder).stop_ids == {1, 16, SPECIAL.index("<|im_end|>")}


# ------------------------------------------------------------------------------------ kinds of rows
def test_errors_of_templates_name_the_row_and_quote_the_template():
    tokenizer = make("{{ raise_exception('Only cats may speak') }}")
    with pytest.raises(InputError, match="^a.jsonl:7: .*Only cats may speak"):
        tokenizer.example({"messages": [user("Hi")], "__line__": "a.jsonl:7"})
    with pytest.raises(InputError, match="line 2"):
        make("x\n{% if %}").template.render([user("Hi")])


def test_train_on_chooses_turns():
    tokenizer = make(CHATML, SPECIAL, eos="<|im_end|>")
    messages = [user("a"), answer("1"), user("b"), answer("2"), answer("3")]
    ends = ["1<|im_end|>", "2<|im_end|>", "3<|im_end|>"]
    assert trained(tokenizer, messages) == ends
    assert trained(tokenizer, messages, "last") == ends[2:]
    assert trained(tokenizer, messages, "completion") == ends[1:]
    assert tokenizer.example({"messages": messages}, "all").mask.all()
    row = {"prompt": messages[:2] + messages[2:3], "completion": messages[3:]}
    for train_on, expected in (
        ("assistant", ends[1:]),
        ("completion", ends[1:]),
        ("last", ends[2:]),
    ):
        assert trained(tokenizer, row, train_on) == expected
    assert (
        tokenizer.example(row).ids.tolist()
        == tokenizer.example({"messages": messages}).ids.tolist()
    )
    assert trained(tokenizer, [user("a"), answer("1"), user("b")], "completion") == []


def test_text_is_trained_whole_with_one_bos_and_one_eos():
    tokenizer = make(None, SPECIAL, bos="<s>", eos="</s>", adds_bos=True)
    for text in ("ab", "<s>ab", "ab</s>", "<s>ab</s>"):
        example = tokenizer.example({"text": text})
        assert tokenizer.decode(example.ids) == "<s>ab</s>"
        assert example.mask.tolist() == [False, True, True, True]  # nobody predicts BOS
    assert tokenizer.example({"text": "ab"}, "all").mask.all()
    assert (
        tokenizer.decode(make(None, SPECIAL, bos="<s>", eos="</s>").example({"text": "ab"}).ids)
        == "ab</s>"
    )


@pytest.mark.parametrize("template", [None, CHATML])
def test_plain_completions_are_trained_with_eos_and_their_prompts_are_those_of_rollouts(template):
    tokenizer = make(
        template, SPECIAL, bos="<s>", eos="</s>", adds_bos=True, merges=[("a", "b"), ("Ġ", "b")]
    )
    for prompt, completion, ids in (
        ("xa", "bc", ["<s>", "x", "a", "b", "c", "</s>"]),  # "ab" would reach across
        ("xa", " bc", ["<s>", "x", "a", " b", "c", "</s>"]),
        ("x ", "bc", ["<s>", "x", " ", "b", "c", "</s>"]),
        ("", "ab", ["<s>", "ab", "</s>"]),
        ("<s>x", "ab</s>", ["<s>", "x", "ab", "</s>"]),
    ):
        example = tokenizer.example({"prompt": prompt, "completion": completion})
        assert [tokenizer.decode([i]) for i in example.ids] == ids
        given = (~example.mask).sum()
        assert (
            tokenizer.prompt_ids(prompt)
            == example.ids[~example.mask].tolist()
            == example.ids[:given].tolist()
        )


def test_a_completion_gets_no_space_from_sentencepiece():
    raw = Raw(
        models.BPE(
            {t: i for i, t in enumerate(["<unk>", "</s>", "▁", *"abcdx:"])}, [], unk_token="<unk>"
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(raw, {"eos_token": "</s>"}, None)
    example = tokenizer.example({"prompt": "x:", "completion": "ab"})
    assert [raw.id_to_token(i) for i in example.ids] == ["▁", "x", ":", "a", "b", "</s>"]


def test_a_base_model_names_the_flag_that_supplies_a_template():
    row = {"messages": [user("a"), answer("b")], "__line__": "f:1"}
    for use in (lambda t: t.example(row), lambda t: t.prompt_ids([user("a")])):
        with pytest.raises(InputError, match="--chat_template FILE"):
            use(make(None))


def test_prompts_are_what_examples_begin_with():
    unlike = {
        "long generation prompt",
        "header, no generation prompt",
        "prompt with other spaces",
        "no generation prompt",  # shows the system message with the last question only
    }
    for name in TEMPLATES.keys() - unlike:
        tokenizer = make(TEMPLATES[name][0], SPECIAL, bos="<s>", eos="</s>")
        messages = [system("s"), user("Hi"), answer("Hello"), user("?")]
        prompt = tokenizer.prompt_ids(messages)
        example = tokenizer.example({"prompt": messages, "completion": [answer("Bye")]})
        assert prompt == example.ids[: example.mask.argmax()].tolist(), name
        assert len(tokenizer.warnings()) == (name == "no end-of-turn token")


def test_a_template_without_a_generation_prompt_cannot_start_rollouts():
    tokenizer = make(HEADER_ALONE, SPECIAL, eos="<|im_end|>")
    with pytest.raises(InputError, match="no generation prompt.*<|im_start|>assistant"):
        tokenizer.prompt_ids([user("Hi")])
    # Nor do answers have a header here.
    make(NO_PROMPT, SPECIAL, "<s>", "</s>").prompt_ids([user("Hi")])


LINE = {"__line__": "f:3"}


def with_prompts(tokenizer, rows, max_prompt=None, max_new=4, tokens=200, positions=50, sides=1):
    (kept,), said = tokenizer.with_prompts((rows,), max_prompt, max_new, tokens, positions, sides)
    return kept, said


def prompt_row(text, **more):
    return {"prompt": [user(text)], "__line__": f"p.jsonl:{len(text)}", **more}


def test_prompts_are_tokenized_and_counted_and_get_the_same_columns():
    tokenizer = make(toy.TEMPLATE, SPECIAL, eos="<|end|>")
    kept, said = with_prompts(tokenizer, [prompt_row("1+1=?", answer="2"), prompt_row("2+2=?")])
    texts = [tokenizer.decode(row["prompt_ids"]) for row in kept]
    assert texts == ["<|user|>1+1=?<|assistant|>", "<|user|>2+2=?<|assistant|>"]
    assert [row["answer"] for row in kept] == ["2", None]
    assert said == "0 dropped by --max_prompt"
    kept, said = with_prompts(tokenizer, [prompt_row("x"), prompt_row("x" * 60)], max_prompt=20)
    assert len(kept) == 1 and said == "1 dropped by --max_prompt"
    _, said = with_prompts(tokenizer, [{"prompt": "1+1=?"}])
    assert "warning: 1 of 1 prompts are plain text, which gets no chat template" in said
    assert said.endswith("(row is the first): --to_messages makes them messages")
    _, said = with_prompts(make(None, SPECIAL), [{"prompt": "1+1=?"}])
    assert "warning" not in said


def test_prompts_of_several_lists_share_their_columns_and_each_must_keep_one():
    tokenizer = make(toy.TEMPLATE, SPECIAL, eos="<|end|>")
    limits = {"max_prompt": 20, "max_new": 4, "tokens": 200, "positions": 50}
    parts = [prompt_row("a", answer="2")], [prompt_row("b", level=3)]
    (train_rows, eval_rows), _ = tokenizer.with_prompts(parts, **limits)
    assert train_rows[0].keys() == eval_rows[0].keys() >= {"answer", "level", "prompt_ids"}
    assert tokenizer.with_prompts((parts[0], []), **limits)[0][1] == []
    with pytest.raises(InputError, match="none of 1 prompts is left .* 20 .*-out prompts: 2 and 1"):
        tokenizer.with_prompts((parts[0] * 2, [prompt_row("x" * 60)]), **limits)


@pytest.mark.parametrize(
    "name, limit, sides, said",
    [
        ("positions", 65, 1, "the 65 positions"),
        ("tokens", 65, 1, "--tokens 65: .*or raise --tokens"),
        ("tokens", 131, 2, "--tokens 131 / 2 .one side of a pair.: .*or raise --tokens"),
    ],
)
def test_a_prompt_without_room_for_its_completion_is_refused(name, limit, sides, said):
    tokenizer = make(toy.TEMPLATE, SPECIAL, eos="<|end|>")
    asked = [prompt_row("a"), prompt_row("abcd")]
    room = {"max_new": 60, "tokens": 1000, "positions": 1000, "sides": sides}
    said = f"^p.jsonl:4: a prompt of 6 tokens and 60 new ones exceed {said}"
    with pytest.raises(InputError, match=said):
        with_prompts(tokenizer, asked, **room | {name: limit})
    with_prompts(tokenizer, asked, **room | {name: limit + 1})


def test_tools_and_template_variables_of_a_row_reach_its_prompt():
    template = "{{ tools | length if tools else 0 }}{{ mood }}{{ messages[0].content }}"
    row = prompt_row("a", chat_template_kwargs={"mood": "!"})
    kept, _ = with_prompts(make(template), [{**row, "tools": [{"name": "f"}]}])
    assert make(template).decode(kept[0]["prompt_ids"]) == "1!a"


def test_a_pair_has_one_prompt_and_ends_with_the_end_of_the_turn():
    tokenizer = make(CHATML, SPECIAL, eos="<|im_end|>")
    row = {"prompt": [user("1+1=?")], "chosen": [answer("2")], "rejected": [answer("11")]}
    chosen, rejected = tokenizer.pair(row)
    header = "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"
    for example, text in ((chosen, "2<|im_end|>"), (rejected, "11<|im_end|>")):
        assert tokenizer.decode(example.ids) == header + text
        assert tokenizer.decode(example.ids[example.mask]) == text
    whole = {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
    for a, b in zip(tokenizer.pair(rows.pair(whole)), (chosen, rejected)):
        assert a.ids.tolist() == b.ids.tolist() and a.mask.tolist() == b.mask.tolist()
    for labelled, side in zip(rows.take_pairs_apart([row]), (chosen, rejected)):
        example = tokenizer.example(labelled, "completion").ended()
        assert example.ids.tolist() == side.ids.tolist()


def test_an_answer_that_merges_with_the_end_of_the_prompt_keeps_its_pair():
    tokenizer = make(CHATML, SPECIAL, eos="<|im_end|>", merges=[("Ċ", "Ċ")])
    row = {"prompt": [user("1+1=?")], "chosen": [answer("\n2")], "rejected": [answer("11")]}
    header = "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant"
    for chosen, rejected in (("\n\n2", "11"), ("11", "\n\n2"), ("\n\n2", "\n\n\n3")):
        row |= {"chosen": [answer(chosen)], "rejected": [answer(rejected)]}
        pair = tokenizer.pair(row)
        for example, text in zip(pair, (chosen, rejected)):
            assert tokenizer.decode(example.ids[~example.mask]) == header
            assert tokenizer.decode(example.ids[example.mask]) == f"\n{text}<|im_end|>"
        assert np.diff(pair[0].mask).sum() == np.diff(pair[1].mask).sum() == 1
    row |= {"chosen": [answer("2")], "rejected": [answer("11")]}
    assert tokenizer.decode(tokenizer.pair(row)[0].ids[-2:]) == "2<|im_end|>"


def test_implicit_pairs_that_cannot_be_used_are_counted_as_explicit_ones_are():
    tokenizer = make(CHATML, SPECIAL, eos="<|im_end|>")
    q, a, b = user("q"), answer("a"), answer("b")
    implicit = [
        {"chosen": [q, a], "rejected": [q, b]},
        {"chosen": [q, a], "rejected": [q, a]},
        {"chosen": [q, a], "rejected": [q, a, q, b]},
        {"chosen": [q, a], "rejected": [q]},
        {"chosen": [q, a, q], "rejected": [q, a, q, b]},
    ]
    explicit = [
        {"prompt": [q], "chosen": [a], "rejected": [b]},
        {"prompt": [q], "chosen": [a], "rejected": [a]},
        {"prompt": [q], "chosen": [a], "rejected": [a, q, b]},
        {"prompt": [q], "chosen": [a], "rejected": [q]},
        {"prompt": [q, a], "chosen": [q], "rejected": [q, b]},
    ]
    for given in (implicit, explicit):
        encoded = [tokenizer.pair(rows.pair(row)) for row in given]
        kept, counts = pairs.fit_to(encoded, 200, "truncate")
        assert len(kept) == 1
        assert {k: n for k, n in counts.items() if n} == {"alike": 1, "continued": 1, "emptied": 2}


def test_a_prompt_that_depends_on_the_answer_is_refused_by_its_row():
    template = CHATML.replace(
        "m.content", "(messages | last).content | length | string + m.content"
    )
    row = {"prompt": [user("1+1=?")], "chosen": [answer("2")], "rejected": [answer("eleven")]}
    with pytest.raises(
        InputError, match="^f:3: the prompts .* differ from token 6 .*'11[+]1=' and '61[+]1='"
    ):
        make(template, SPECIAL, eos="<|im_end|>").pair(row | LINE)


@pytest.mark.parametrize(
    "name, end", [("qwen2.5", "<|im_end|>"), ("qwen3", "<|im_end|>"), ("tiny_llama3", "<|eot_id|>")]
)
def test_real_rows_train_their_answers_and_nothing_else(shared, real, name, end):
    tokenizer = real(name)[0]
    with gzip.open(shared / "sft/messages.jsonl.gz", "rt", encoding="utf8") as file:
        rows = [json.loads(line) for line in file]
    rows = rows[::7] + rows[-100:]
    trim = str.strip if name == "tiny_llama3" else str
    for row in rows:
        answers = [trim(m["content"]) + end for m in row["messages"] if m["role"] == "assistant"]
        if name == "qwen3":
            answers[-1] = "<think>\n\n</think>\n\n" + answers[-1].lstrip("\n")
        example = tokenizer.example(row)
        cuts = np.flatnonzero(np.diff(example.mask)) + 1
        pieces = zip(np.split(example.ids, cuts), np.split(example.mask, cuts))
        parts = [tokenizer.decode(ids) for ids, mask in pieces if mask[0]]
        assert parts == answers
        assert example.ids.tolist().count(tokenizer.bos_id) == (name == "tiny_llama3")


# -------------------------------------------------------------------------------------------- files
def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder_of(tmp_path, raw_bytes(SPECIAL))
    (tmp_path / "config.json").write_text('{"vocab_size": 61}')
    with pytest.raises(InputError, match="last id is 272, for .* a vocab_size of 61"):
        Tokenizer.load(tmp_path)


def test_a_model_with_another_tokenizer_is_refused_by_its_flag(tmp_path):
    folder_of(tmp_path, raw_bytes(SPECIAL))
    Tokenizer.load(tmp_path).check_same(tmp_path, "--value_model ")
    with pytest.raises(InputError, match=f"^--value_model {tmp_path}: its tokenizer is not"):
        make(None, SPECIAL[:-1]).check_same(tmp_path, "--value_model ")


def same_ids(path, change):
    """Whether the tokenizer is taken for the same after a change of tokenizer.json."""
    raw = raw_bytes(SPECIAL, merges=[("a", "b"), ("ab", "c")])
    folder_of(path, raw)
    tokenizer = Tokenizer.load(path)
    content = json.loads((path / "tokenizer.json").read_text())
    change(content)
    (path / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.load(path).hash == tokenizer.hash


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["decoder"].update(add_prefix_space=True, trim_offsets=False),
        lambda t: t.update(decoder=None),
        lambda t: t["pre_tokenizer"].update(trim_offsets=False),
        lambda t: t.update(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [t["pre_tokenizer"]]}
        ),
        lambda t: t.update(normalizer={"type": "Sequence", "normalizers": []}),
        lambda t: t["model"].update(merges=["a b", "ab c"]),
        lambda t: t["model"].update(continuing_subword_prefix="", byte_fallback=False),
        lambda t: t["model"].update(vocab=dict(reversed(t["model"]["vocab"].items()))),
        lambda t: t["added_tokens"][3].update(special=False),
        lambda t: (
            t.update(truncation={"max_length": 9, "strategy": "LongestFirst", "stride": 0})
            or t["truncation"].update(direction="Right")
        ),
    ],
)
def test_what_decides_no_id_makes_no_other_tokenizer(tmp_path, change):
    assert same_ids(tmp_path, change)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
        lambda t: t["pre_tokenizer"].update(use_regex=False),
        lambda t: t.update(normalizer={"type": "NFC"}),
        lambda t: t["model"].update(merges=t["model"]["merges"][::-1]),
        lambda t: t["model"].update(ignore_merges=True),
        lambda t: t["added_tokens"][3].update(lstrip=True),
        lambda t: t["added_tokens"].pop(3),
    ],
)
def test_what_decides_ids_makes_another_tokenizer(tmp_path, change):
    assert not same_ids(tmp_path, change)


def test_a_tokenizer_that_transformers_saves_again_is_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    folder = folder_of(tmp_path, raw_bytes(SPECIAL), config)
    tokenizer = Tokenizer.load(folder)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    tokenizer.check_same(tmp_path / "saved", "--reference_model ")
    # or this test shows nothing
    saved = tmp_path / "saved/tokenizer.json"
    assert saved.read_bytes() != (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["qwen2.5", "minimind", "tiny_llama3"])
def test_real_tokenizers_that_transformers_saves_again_are_the_same(real, auto, tmp_path, name):
    auto(name).save_pretrained(tmp_path)
    real(name)[0].check_same(tmp_path, "--reference_model ")


def test_what_ends_an_answer_here_ends_one_in_transformers_too(tmp_path):
    """A base model, whose folder knows only its EOS, with a template that ends turns otherwise."""
    transformers = pytest.importorskip("transformers")
    folder = folder_of(tmp_path, raw_bytes(SPECIAL), {"eos_token": "</s>"})
    (tmp_path / "chatml.jinja").write_text(CHATML)
    end, turn_end = SPECIAL.index("</s>"), SPECIAL.index("<|im_end|>")

    def generation(template):
        return tokenizer_files(folder, Tokenizer.load(folder, template))["generation_config.json"]

    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": end}))
    assert generation(None) is None
    for before, after in (
        ({}, {}),
        ({"eos_token_id": end, "top_k": 20}, {"top_k": 20}),
        ({"eos_token_id": [end, 9]}, {"eos_token_id": [end, 9, turn_end]}),
    ):
        if before:
            (tmp_path / "generation_config.json").write_text(json.dumps(before))
        written = json.loads(generation(tmp_path / "chatml.jinja"))
        assert written == {"eos_token_id": [end, turn_end], **after}
        assert (
            transformers.GenerationConfig.from_dict(written).eos_token_id == written["eos_token_id"]
        )
    (
        tmp_path / "generation_config.json"
    ).unlink()  # and a token that ends nothing in training does not get there
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [end, 7, 99999]}))
    assert json.loads(generation(tmp_path / "chatml.jinja")) == {"eos_token_id": [end, turn_end]}
    (tmp_path / "generation_config.json").write_text(
        known := json.dumps({"eos_token_id": [turn_end, end]})
    )
    assert generation(tmp_path / "chatml.jinja") == known.encode()


def test_files_beside_a_checkpoint_load_in_transformers_with_the_template_in_force(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, out = tmp_path / "a", tmp_path / "b"
    folder.mkdir(), out.mkdir()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "chat_template": CHATML,
    }
    folder_of(folder, raw_bytes(SPECIAL), config, generation_config={"eos_token_id": 1})
    (tmp_path / "other.jinja").write_text(TRIMS)
    tokenizer = Tokenizer.load(folder, tmp_path / "other.jinja")
    for name, content in tokenizer_files(folder, tokenizer).items():
        if content is not None:
            (out / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert {p.name for p in out.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "nanopost.json",
    }
    again, theirs = Tokenizer.load(out), transformers.AutoTokenizer.from_pretrained(out)
    assert again.template.source == theirs.chat_template == TRIMS
    assert (
        fingerprint(again)
        == fingerprint(tokenizer)
        == json.loads((out / "nanopost.json").read_text())
    )
    assert check_stage(out, again) == "" == check_stage(folder, tokenizer)
    (tmp_path / "other.jinja").write_text(CHATML)
    assert "another template than" in check_stage(
        out, Tokenizer.load(out, tmp_path / "other.jinja")
    )
    folder_of(out, raw_bytes([*SPECIAL, "<new>"]), {"eos_token": "</s>"})
    assert "another tokenizer than" in check_stage(out, Tokenizer.load(out))


def test_templates_come_from_every_place(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = folder_of(tmp_path, raw_bytes(SPECIAL), {"chat_template": named})
    assert Tokenizer.load(folder).template.render([user("a")]) == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(folder).template.render([user("a")]) == "J"
    (tmp_path / "f.jinja").write_text("F")
    assert Tokenizer.load(folder, str(tmp_path / "f.jinja")).template.render([user("a")]) == "F"


def test_a_small_gemma_need_not_have_the_token_for_an_image(tmp_path):
    """Its tokenizer is that of the large ones, and its embedding is a row short."""
    raw = raw_bytes(SPECIAL)
    size = raw.get_vocab_size()
    raw.add_special_tokens(["<image_soft_token>"])
    folder_of(tmp_path, raw)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.raw.token_to_id("<image_soft_token>") == size
    for row in [{"text": "a<image_soft_token>"}, {"messages": [user("<image_soft_token>b")]}]:
        with pytest.raises(InputError, match="'<image_soft_token>', for which this model"):
            tokenizer.example(row, "all")
    for has_row in ({"vocab_size": size + 1}, {}):  # {}: nobody knows
        (tmp_path / "config.json").write_text(json.dumps(has_row))
        assert Tokenizer.load(tmp_path).encode("<image_soft_token>") == [size]
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
    with pytest.raises(InputError, match=f"last id is {size - 1}.*vocab_size of {size - 1}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizers .* cannot read it"),
        (lambda d: (d / "tokenizer_config.json").write_text("{"), "not valid JSON"),
        (
            lambda d: (d / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}'),
            "names '<nowhere>' as eos_token",
        ),
        (
            lambda d: (d / "tokenizer_config.json").write_text(
                '{"added_tokens_decoder": {"9000": {"content": "<new>", "special": true}}}'
            ),
            "'<new>' has the id 9000 in tokenizer_config.json",
        ),
    ],
)
def test_a_folder_that_does_not_do_is_refused_by_name(tmp_path, spoil, said):
    spoil(folder_of(tmp_path, raw_bytes(SPECIAL)))
    with pytest.raises(InputError, match=said) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_or_template_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="hf download Qwen/Qwen2.5-0.5B"):
        Tokenizer.load("Qwen/Qwen2.5-0.5B")
    with pytest.raises(InputError, match="--chat_template nowhere.jinja"):
        Tokenizer.load(folder_of(tmp_path, raw_bytes(SPECIAL)), "nowhere.jinja")


def test_an_error_in_a_template_names_the_template_and_no_row(tmp_path):
    toy.write_model(tmp_path / "toy")
    (tmp_path / "mine.jinja").write_text("{{ broken }")
    with pytest.raises(InputError, match=r"mine.jinja: the chat template is not valid Jinja"):
        Tokenizer.load(tmp_path / "toy", tmp_path / "mine.jinja")


def test_reasoning_that_the_template_ignores_is_a_doubt():
    thoughtful = CHATML.replace("m.content", "m.get('reasoning_content', '') + m.content")
    assert thoughtful != CHATML
    answers = [{**answer("a"), "reasoning_content": "since"}, answer("b")]
    data = [{"messages": [user("q"), a]} for a in answers] + [{"prompt": "p"}]
    ignoring, showing = (
        make(template, SPECIAL, eos="<|im_end|>") for template in (CHATML, thoughtful)
    )
    said = "the chat template ignores reasoning_content, which 1 of 3 rows have: write it into"
    assert said in ignoring.doubts(data) and "plain text" in ignoring.doubts(data)
    assert "ignores" not in showing.doubts(data)
    assert ignoring.doubts(data[1:2]) == ""


def test_another_template_and_links_to_elsewhere_are_both_said(tmp_path):
    toy.write_model(tmp_path / "toy")
    tokenizer = Tokenizer.load(tmp_path / "toy")
    trained = {"template_hash": "other", "tokenizer_hash": tokenizer.hash}
    (tmp_path / "toy/nanopost.json").write_text(json.dumps(trained))
    (tmp_path / "elsewhere.json").write_text("{}")
    (tmp_path / "toy/added_tokens.json").symlink_to(tmp_path / "elsewhere.json")
    said = check_stage(tmp_path / "toy", tokenizer)
    assert "trained with another template than" in said and "added_tokens.json: links to" in said


# ------------------------------------------------------------------------------------------ pieces
def pieces_of(decode, ids):
    pieces = Pieces(decode)
    return [*map(pieces.push, ids), pieces.rest()]


def test_pieces_are_those_of_an_incremental_decoder():
    """One token a byte: a character comes with its last one."""
    text = "a é 字 🤖👩‍👩‍👧\n\x00 e\u0301 <|end|>!"
    tokenizer = make()
    decoder = codecs.getincrementaldecoder("utf-8")()
    *pieces, rest = pieces_of(tokenizer.decode, tokenizer.encode(text.replace("<|end|>", "")))
    assert pieces == [decoder.decode(bytes([b])) for b in text.replace("<|end|>", "").encode()]
    assert rest == ""
    pieces = pieces_of(tokenizer.decode, tokenizer.encode(text))
    assert "<|end|>" in pieces and "".join(pieces) == text


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_bytes_are_the_text_of_all(seed):
    tokenizer = make()
    ids = np.random.default_rng(seed).integers(0, tokenizer.vocab_size, 60).tolist()
    assert "".join(pieces_of(tokenizer.decode, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["\ufffd", "a\ufffd", "\ufffdé字🤖"])
def test_pieces_come_on_where_characters_are_broken(text):
    """Each piece within a character's worth of tokens, for a cost that does not grow."""
    tokenizer, lengths = make(), []

    def decode(ids):
        lengths.append(len(ids))
        return tokenizer.decode(ids)

    ids = tokenizer.encode(text * 100)
    given, pieces = 0, Pieces(decode)
    for i, token_id in enumerate(ids, 1):
        given += len(pieces.push(token_id))
        assert given >= len(tokenizer.decode(ids[:i])) - 2
    assert given + len(pieces.rest()) == len(text * 100)
    assert max(lengths) <= 8 and len(lengths) <= 8 * len(ids)
    for broken in (b"\xff", b"\xe5\xad", b"\xf0\x9f", b"\xe5\xad\x97\xe5"):
        bytes_of = broken * 50 + "字".encode() + broken * 50
        found = pieces_of(lambda ids: bytes(ids).decode(errors="replace"), bytes_of)
        assert "".join(found) == bytes_of.decode(errors="replace")
        assert sum(map(bool, found)) >= len(bytes_of) / 4 - 4


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_tokens_across_characters_are_the_text_of_all(seed):
    """Tokens of one to five bytes, cut anywhere, of text that is broken here and there."""
    draw = np.random.default_rng(seed)
    # The words after the text's end are empty, as unknown ids are.
    letters = [c.encode() for c in "aé字🤖\ufffd"] + [b"\xff", b"\xe5", b"\xad", b"\xf0\x9f"]
    text = b"".join(letters[i] for i in draw.integers(0, 5 if seed % 2 else 9, 300))
    cuts = np.cumsum(draw.integers(1, 6 if seed % 4 < 2 else 3, 300))
    words = [part.tobytes() for part in np.split(np.frombuffer(text, np.uint8), cuts)]
    sizes = []

    def decode(ids):
        sizes.append(len(ids))
        return b"".join(words[i] for i in ids).decode(errors="replace")

    assert "".join(pieces_of(decode, range(len(words)))) == text.decode(errors="replace")
    assert max(sizes) <= 8


def test_pieces_keep_the_spaces_that_sentencepiece_writes():
    """Its decoder trims the first space of what it is given, and joins bytes that have no token."""
    words = ["▁", "▁a", "b", "▁b", "<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    raw = Raw(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = Tokenizer(raw, {}, None)
    ids = [1, 3, 2, 0, 0, *(5 + b for b in "é字".encode()), 1, 5 + ord("\n"), 3]
    assert pieces_of(tokenizer.decode, ids) == [
        *("a", " b", "b", " ", " ", "", "é", "", "", "字", " a", "\n", " b", "")
    ]
    assert "".join(pieces_of(tokenizer.decode, ids)) == tokenizer.decode(ids)
