"""Renderings against transformers, the sandbox, and what a template says about itself."""

import json
import signal
import time
from pathlib import Path

import pytest
from chats import CHATML, CONVERSATIONS, REAL, TOOLS, answer, call, folder_of, make, raw_bytes, user

from nanopost import InputError
from nanopost.template import Template
from nanopost.tokenizer import Tokenizer


def both_render(tokenizer, theirs, template, messages, **variables):
    """Our text and theirs; None where refused."""
    try:
        ours = tokenizer.template.render(messages, **variables)
    except InputError:
        ours = None
    try:
        return ours, theirs.apply_chat_template(
            messages, chat_template=template, tokenize=False, **variables
        )
    except Exception:  # a template may raise anything
        return ours, None


# Of TRL's package: what the hub's folders of these models hold.
FAMILIES = ("gemma3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8")


def test_every_template_renders_as_in_transformers(shared, real, auto, frozen_clock):
    accepted, theirs = 0, auto("tiny_llama3")
    contexts = {
        p.stem: json.loads(p.read_text())
        for p in (shared / "chat_templates/contexts").glob("*.json")
    }
    sources = [p.read_text() for p in (shared / "chat_templates").glob("*.jinja")]
    sources += [real(name)[0].template.source for name in REAL if name != "gpt2"]
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    sources += [(folder / f"{name}.jinja").read_text() for name in FAMILIES]
    for template in sources:
        tokenizer = Tokenizer(
            real("tiny_llama3")[0].raw, real("tiny_llama3")[0].template.named, template
        )
        cases = [
            ({"messages": c, "tools": tools, "add_generation_prompt": prompt})
            for c in CONVERSATIONS.values()
            for tools in (None, TOOLS)
            for prompt in (False, True)
        ]
        cases += [
            *contexts.values(),
            {
                "messages": CONVERSATIONS["multi"],
                "enable_thinking": False,
                "add_generation_prompt": True,
            },
        ]
        for case in cases:
            ours, expected = both_render(tokenizer, theirs, template, **case)
            assert ours == expected
            accepted += expected is not None
    assert len(sources) == 19 + len(FAMILIES) and accepted > 500


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': 2, 'a': 1} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 1,\n "b": 2\n}'),
        ("{{ [1, 'é'] | tojson(ensure_ascii=true, separators=(',', ':')) }}", '[1,"\\u00e9"]'),
        (
            "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}"
            "{% endfor %}",
            "Hi",
        ),
        ("{% set n = namespace(x=1, self=2) %}{% set n.x = n.x + 1 %}{{ n.x }}{{ n.self }}", "22"),
        ("{{ dict(a=1).a }}{{ strftime_now('%d %b %Y') }}", "126 Jul 2024"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "HiHello",
        ),
        (
            "{{ messages[0].nothing is defined }}{{ tools is none }}{{ documents is none }}"
            "{{ bos_token }}",
            "FalseTrueTrue<s>",
        ),
    ],
)
def test_templates_have_the_helpers_of_transformers(tmp_path, frozen_clock, template, expected):
    transformers = pytest.importorskip("transformers")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "chat_template": template,
    }
    folder = folder_of(tmp_path, raw_bytes(["<s>"]), config)
    messages = [{**user("Hi"), "nothing": None}, answer("Hello")]
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False
    )
    assert Tokenizer.load(folder).template.render(messages) == theirs == expected


def test_a_template_needs_no_tokenizer():
    template = Template(CHATML, {"eos_token": "</s>"}, ["<|im_start|>", "<|im_end|>"], ["</s>"])
    assert template.render([user("Hi")]) == "<|im_start|>user\nHi<|im_end|>\n"
    end, header = "<|im_end|>\n", "<|im_start|>assistant\n"
    assert template.trial == (end + header, end, end + header, end)
    assert template.turn_end == "<|im_end|>" and template.stops == {"</s>", "<|im_end|>"}
    assert template.unprompted == "" and template.warnings() == []
    assert (template.hash, template.marks_answers) == ("875f8ff53cc78b4b", False)
    assert Template(None, {}, []).hash is None and Template(None, {}, []).warnings() == []


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages.clear() }}",
        "{{ dict.update(messages[0], {'role': 'x'}) }}",
        "{% set n = namespace(_x=1) %}",
        "{{ range(10 ** 9) | list }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception.__globals__.os }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ '%s'.format_map }}{{ ('{0.__class__}').format(1) }}{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_is_untrusted(template):
    messages = [user("Hi")]
    with pytest.raises(InputError, match="the chat template"):
        make(template).template.render(messages)
    assert messages == [user("Hi")]


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxx{% endfor %}{% endfor %}",
        "{% set n = namespace(x='x') %}"
        "{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x=['x']) %}"
        "{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** 10 * ['x'] }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 2 ** 60000000 * 2 ** 60000000 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:9999999999d}'.format(1) }}",
        "{{ 'x'.ljust(10 ** 10) }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ 'x\ny' | indent(10 ** 10) }}",
        "{{ messages | tojson(indent=10 ** 10) }}",
        "{{ messages[0].content * 40000000 }}",
        "{{ (['b' * 700000] * 4096) | join | length }}",
        "{{ 'b'.join([['b' * 700000] * 200, 'b' * 70000000][1:]) }}",
        "{{ ('b' * 7000).join(['b'] * 10000) }}",
        "{{ ('\t' * 60).expandtabs(50000000) | length }}",
        "{{ ('a' * 4096).replace('', 'b' * 700000) | length }}",
        "{{ ('a' * 4096) | replace('a', 'b' * 700000) | length }}",
        "{{ ('{0:9999999}' * 300).format(1) | length }}",
    ],
)
def test_a_rendering_has_limits_of_time_and_size(monkeypatch, template):
    monkeypatch.setattr("nanopost.template.SECONDS", 0.4)
    before = signal.getsignal(signal.SIGVTALRM)
    began = time.thread_time()
    with pytest.raises(InputError, match="the chat template (takes|writes) more than"):
        make(template).template.render([user("Hi")])
    assert time.thread_time() - began < 4
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_an_endless_template_is_tried_once_and_named_with_its_row(monkeypatch):
    monkeypatch.setattr("nanopost.template.SECONDS", 0.4)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = make(f"{{% if messages | length > 2 %}}{endless}{{% endif %}}")
    with pytest.raises(InputError, match="^f:3: the chat template takes more than 0.4 seconds"):
        tokenizer.example({"messages": [user("a")] * 3, "__line__": "f:3"})


def test_sizes_that_templates_do_use_are_within_the_limits():
    ours = "{{ '-' * 40 }}{{ 'x' | center(9) }}{{ '%5d|%s' % (7, 2 ** 9) }}{{ '{:>4}'.format(3) }}"
    assert make(ours).template.render([]) == "-" * 40 + "    x        7|512   3"
    assert make("{{ 'a\nb' | indent(2) }}{{ '%03d' | format(7) }}").template.render([]) == (
        "a\n  b007"
    )


def test_a_template_that_takes_arguments_as_text_gets_them_as_text():
    """DeepSeek's puts them between strings."""
    ours = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments + ';' }}"
    ours += "{% endfor %}{% endfor %}"
    calling = {"role": "assistant", "tool_calls": [call("add", {"a": "é"}), call("add", {"b": 1})]}
    assert make(ours).template.render([user("x"), calling]) == '{"a": "é"};{"b": 1};'
