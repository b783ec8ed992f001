"""The report before training: what it counts, what it warns of and what it refuses."""

import pytest
from chats import (
    CHATML,
    HEADER_ALONE,
    LONG_PROMPT,
    NO_END,
    NO_PROMPT,
    OTHER_SPACES,
    SPECIAL,
    TRIMS,
    answer,
    make,
    user,
)

from nanopost import InputError
from nanopost.batch import Example
from nanopost.report import report


def test_report_says_what_there_is_and_marks_what_is_trained():
    tokenizer = make(TRIMS, SPECIAL, bos="<s>", eos="<|eot|>", adds_bos=True)
    rows = [
        {"messages": [user("Hi"), answer("Hello")], "__line__": "f:1"},
        {"messages": [user("a" * 50), answer("b")]},
    ]
    text = report([tokenizer.example(row) for row in rows], tokenizer, rows)
    for said in ("2 rows", "1 to 1 BOS per row", "100.0% of rows train a stop token"):
        assert said in text
    assert "warning" not in text
    assert f"longest row: {len(tokenizer.example(rows[1]))} tokens (row 1)" in text
    assert text.endswith("<s><|h|>user<|/h|>\n\nHi<|eot|><|h|>assistant<|/h|>\n\n»Hello<|eot|>«")


def test_report_stops_at_what_is_surely_wrong():
    tokenizer = make(TRIMS, SPECIAL, bos="<s>", eos="<|eot|>")
    with pytest.raises(InputError, match=r"1 of 2 rows \(row 1\) begin with BOS twice"):
        report([Example([0, 5], [0, 1]), Example([0, 0, 5], [0, 0, 1])], tokenizer)
    with pytest.raises(InputError, match="none of 2 rows has a token to train"):
        report([Example([0, 5], [1, 0])] * 2, tokenizer)


def test_report_warns_of_what_is_doubtful():
    tokenizer = make(OTHER_SPACES, SPECIAL, bos="<s>", eos="</s>", adds_bos=True)
    rows = [
        {"messages": m, "__line__": f"f:{i}"}
        for i, m in enumerate([[user("a"), answer("b")], [user("a")]])
    ]
    examples = [tokenizer.example(row) for row in rows]
    examples.append(Example([*examples[0].ids[:-2], 0], [*examples[0].mask[:-2], 0]))
    text = report(examples, tokenizer, [*rows, {"__line__": "f:9"}])
    for said in (
        "1 of 3 rows (f:1) train nothing",
        "2 of 3 rows (f:1, f:9) train no stop token",
        "3 of 3 rows (f:0, f:1, f:9) begin without",
        "1 of 3 rows (f:9) have a BOS after their first token",
        "a rollout starts from a prompt that ends in",
    ):
        assert said in text
    for template, said in (
        (HEADER_ALONE, "no generation prompt"),
        (NO_END, "no end-of-turn token"),
        (CHATML + "{{ strftime_now('%d') }}", "date"),
        (LONG_PROMPT, "a rollout starts from a prompt that ends in"),
        (NO_PROMPT, "drops the system message"),
    ):
        assert said in "".join(make(template, SPECIAL, "<s>", "</s>").warnings())
    assert "no end-of-sequence token" in make(None, []).warnings()[0]
    assert "no BOS declared" in report(
        [make(CHATML, SPECIAL).example(rows[0])], make(CHATML, SPECIAL)
    )


def test_tokens_spelled_out_in_a_message_are_seen_in_the_report():
    tokenizer = make("{{ bos_token + messages[0].content }}", SPECIAL, bos="<s>", eos="</s>")
    with pytest.raises(InputError, match="BOS twice"):
        report([tokenizer.example({"messages": [user("<s>a")]}, "all")], tokenizer)
