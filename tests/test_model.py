"""The decoder against transformers, on random weights so large that attention is not uniform."""

import copy
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from small import random_ids, small_config
from torch.utils._python_dispatch import TorchDispatchMode

import nanopost.model as model_module
from nanopost import InputError, hf
from nanopost.batch import Batch, Example, batch_of
from nanopost.config import Config
from nanopost.model import ActorCritic, CausalLM, ScalarModel
from nanopost.rope import read_ropes, rope_frequencies

transformers = pytest.importorskip("transformers")
ROPE_INIT_FUNCTIONS = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS

LENGTHS = [1, 120, 17, 2, 40, 40]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e5,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1e4,
}
DELTA = {
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
CASES = {
    "llama2": ("Llama", {"num_key_value_heads": 8}),
    "llama2_tied_biases": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama3.2": (
        "Llama",
        {
            "rope_parameters": {**LLAMA3, "factor": 32.0},
            "tie_word_embeddings": True,
            "head_dim": 16,
            "num_key_value_heads": 1,
        },
    ),
    "llama_linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn_mscale": (
        "Llama",
        {
            "head_dim": 32,
            "rope_parameters": {
                **YARN,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "beta_fast": 2,
                "truncate": False,
            },
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 7, "num_key_value_heads": 1}),
    "mistral_v0.3": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2.5_yarn": (
        "Qwen2",
        {
            "rope_parameters": {**YARN, "rope_theta": 1e6, "attention_factor": 1.3},
            "num_key_value_heads": 8,
        },
    ),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_untied_biases": (
        "Qwen3",
        {"head_dim": 16, "num_key_value_heads": 1, "attention_bias": True},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3_window": (
        "SmolLM3",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "no_rope_layer_interval": 2,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        },
    ),
    "gemma3_scaled_untied": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 9,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 40,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "qwen3.5": ("Qwen3_5Text", {"full_attention_interval": 2, **DELTA}),
    "qwen3.5_tied_biases": (
        "Qwen3_5Text",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "tie_word_embeddings": True,
            "attention_bias": True,
            "partial_rotary_factor": 1.0,
            **DELTA,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 2,
        },
    ),
}


def make_oracle(case):
    """A transformers model whose norms, biases and projections are all random and matter."""
    family, given = CASES[case]
    config = getattr(transformers, family + "Config")(
        **{
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "eos_token_id": None,
            "bos_token_id": None,
            "pad_token_id": None,
            **given,
        }
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.normal_(-2.0, 1.5)  # some heads forget within a token, some keep all
            elif p.ndim > 1:
                p.normal_(0, 0.3 if "embed" in name or "lm_head" in name else 0.15)
            else:
                p.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """case -> (transformers' model, ours loaded from what transformers wrote), made once."""
    made = {}

    def get(case):
        if case not in made:
            oracle, folder = make_oracle(case), tmp_path_factory.mktemp("model")
            oracle.save_pretrained(folder)
            made[case] = oracle, hf.load_model(folder)
        return made[case]

    return get


def documents(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (length,), generator=generator) for length in lengths]


def packed(docs):
    lengths = torch.tensor([len(d) for d in docs])
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    return torch.cat(docs), torch.cat([torch.arange(n) for n in lengths]), cu, int(lengths.max())


def batch_of_docs(docs):
    token_N, position_N, cu, longest = packed(docs)
    target_N = token_N.roll(-1)
    target_N[cu[1:].long() - 1] = -100
    return Batch(token_N, position_N, target_N, target_N >= 0, cu, longest, {})


@torch.no_grad()
def logits_of(oracle, doc):
    return oracle(doc[None]).logits[0]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_those_of_transformers_packed_and_alone(pair, case):
    oracle, model = pair(case)
    docs = documents()
    expected = torch.cat([logits_of(oracle, d) for d in docs])
    together = model.logits(model.model.packed(*packed(docs)))
    alone = torch.cat([model.logits(model.model.packed(*packed([d]))) for d in docs])
    assert expected.std() > 1  # else agreement would mean little
    assert (together - expected).abs().max() <= 1e-4
    assert (alone - expected).abs().max() <= 1e-4


def prefilled(model, prompts, copies, capacity):
    """-> (logits of each prompt's next token, a cache of so many rows of each)."""
    lengths = [len(prompt) for prompt in prompts for _ in range(copies)]
    cache = model.cache(len(lengths), capacity)
    cache.length_B.copy_(torch.tensor(lengths))
    cache.longest = max(lengths)
    token_N, position_N, cu, longest = packed(prompts)
    prompt_B = torch.arange(len(prompts)).repeat_interleave(copies)
    row_B = torch.arange(len(lengths))
    write = partial(cache.write_prompts, row_A=row_B, prompt_A=prompt_B)
    return model.logits(model.prefill(token_N, position_N, cu, longest, write)), cache


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cached_logits_equal_those_of_transformers_while_rows_leave(pair, case):
    oracle, model = pair(case)
    prompts, copies, steps = documents([3, 41, 1]), 2, 12
    further_BT = torch.randint(
        97, (len(prompts) * copies, steps), generator=torch.Generator().manual_seed(1)
    )
    whole = [torch.cat([prompts[b // copies], further_BT[b]]) for b in range(len(further_BT))]
    expected = [logits_of(oracle, w) for w in whole]
    first, cache = prefilled(model, prompts, copies, 41 + steps)
    for p, prompt in enumerate(prompts):
        assert (first[p] - expected[p * copies][len(prompt) - 1]).abs().max() <= 1e-4
    row_A = torch.arange(len(whole))
    for t in range(steps):
        if t in (4, 8):
            # First one row each of two prompts leaves, then all but the two of another prompt.
            stay = torch.tensor([0, 2, 4, 5]) if t == 4 else torch.tensor([2, 3])
            cache.keep(stay)
            cache.longest = int(cache.length_B.max())
            row_A = row_A[stay]
        cache.longest += 1
        got = model.logits(model.decode(further_BT[row_A, t], cache))
        for logits, b in zip(got, row_A.tolist()):
            assert (logits - expected[b][len(prompts[b // copies]) + t]).abs().max() <= 1e-4


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_greedy_generation_is_token_identical_over_64_tokens(pair, case):
    oracle, model = pair(case)
    prompts = documents([5, 23], seed=2)
    expected = [
        oracle.generate(p[None], max_new_tokens=64, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]
    first, cache = prefilled(model, prompts, 1, 23 + 64)
    tokens = [first.argmax(-1)]
    while len(tokens) < 64:
        cache.longest += 1
        tokens.append(model.logits(model.decode(tokens[-1], cache)).argmax(-1))
    assert torch.stack(tokens, 1).tolist() == expected


def test_the_scaled_frequencies_are_used_beyond_the_original_context():
    for name in ("llama3.1", "llama_yarn", "qwen2.5_yarn"):
        assert (
            CASES[name][1]["rope_parameters"]["original_max_position_embeddings"] < max(LENGTHS) / 3
        )


@pytest.mark.parametrize("case", ["llama3.1", "llama_yarn", "llama_linear", "qwen2_window"])
def test_a_config_in_the_manner_of_transformers_4_is_read_alike(pair, case):
    hf_dict = dict(pair(case)[1].config.hf)
    rope = dict(hf_dict.pop("rope_parameters"))
    hf_dict.pop("layer_types", None)
    old = {**hf_dict, "rope_theta": rope.pop("rope_theta"), "rope_scaling": None}
    if case != "qwen2_window":
        old["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    new, old = pair(case)[1].config, Config.of(old)
    for field in ("blocks", "head_dim", "kv_heads", "tied", "norm_eps", "qkv_bias"):
        assert getattr(old, field) == getattr(new, field)
    for key, value in new.ropes["full_attention"].items():
        assert old.ropes["full_attention"][key] == value


def tiny(case="qwen3", **given):
    """Our model of the oracle's config with changes, and with its weights."""
    oracle = make_oracle(case)
    model = CausalLM(Config.of({**oracle.config.to_dict(), **given}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(oracle.get_parameter(name))
    return model


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            "GPT2LMHeadModel.*LlamaForCausalLM",
        ),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "2 labels"),
        ({"architectures": None, "model_type": "mixtral"}, "mixtral"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*llama3"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each kind of layer"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "needs low_freq_factor, high_freq_factor",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "gemma2", "architectures": None}, "gemma2"),
        (
            {
                "model_type": "gemma3_text",
                "architectures": None,
                "final_logit_softcapping": 30.0,
            },
            "final_logit_softcapping 30",
        ),
        (
            {
                "model_type": "gemma3_text",
                "architectures": None,
                "use_bidirectional_attention": True,
            },
            "use_bidirectional_attention",
        ),
        ({"model_type": "gemma3", "architectures": None}, "has no text_config"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor of 0.5"),
        ({"layer_types": ["chunked_attention"] * 2}, "'chunked_attention'"),
        ({"layer_types": ["linear_attention"] * 2}, "'linear_attention'"),
        ({"layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        (
            {"model_type": "smollm3", "architectures": None, "no_rope_layers": [1]},
            "no_rope_layers has 1 entries for 2 layers",
        ),
        (
            {"model_type": "qwen3_5_text", "architectures": None, "linear_num_value_heads": 24},
            "24 value heads for 16 key heads",
        ),
        (
            {"model_type": "qwen3_5_text", "architectures": None, "attn_output_gate": False},
            "attn_output_gate",
        ),
        (
            {
                "model_type": "gemma3_text",
                "architectures": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            },
            "full_attention and sliding_attention",
        ),
        ({"text_config": {}}, "has a text_config"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised .awq."),
        ({"hidden_size": None}, "hidden_size missing"),
    ],
)
def test_what_is_not_computed_is_refused_in_one_sentence(change, words):
    known = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    assert Config.of({**known, "text_config": None}).kv_heads == 4
    with pytest.raises(InputError, match=f"^here: .*{words}.*[.]$"):
        Config.of({**known, **change}, "here")


def test_missing_keys_mean_what_they_mean_in_transformers():
    bare = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Qwen3_5Text", "Qwen3Moe"):
        theirs = getattr(transformers, family + "Config")(**bare)
        ours = Config.of({"model_type": theirs.model_type, **bare})
        windows = [block.window for block in ours.blocks]
        assert windows == [getattr(theirs, "sliding_window", None)] * 2
        assert ours.ropes["full_attention"]["rope_theta"] == theirs.rope_parameters["rope_theta"]
        assert (ours.norm_eps, ours.head_dim, ours.tied) == (
            theirs.rms_norm_eps,
            getattr(theirs, "head_dim", 16),
            theirs.tie_word_embeddings,
        )


def test_a_published_gemma_that_leaves_out_the_defaults_is_read_as_in_transformers():
    """The text_config of gemma-3-4b-it on the hub, in the manner of transformers 4."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "dtype": "bfloat16",
    }
    ours = Config.of(published)
    theirs = transformers.Gemma3Config.from_dict(copy.deepcopy(published)).text_config
    assert (ours.heads, ours.kv_heads, ours.head_dim) == (8, 4, 256)
    assert ours.vocab_size == theirs.vocab_size and ours.tied == theirs.tie_word_embeddings
    assert ours.max_positions == theirs.max_position_embeddings
    assert [block.kind for block in ours.blocks] == theirs.layer_types
    windows = {
        kind: {b.window for b in ours.blocks if b.kind == kind} for kind in theirs.layer_types
    }
    assert windows == {"sliding_attention": {1024}, "full_attention": {None}}
    for kind, rope in theirs.rope_parameters.items():
        for key, value in rope.items():
            assert ours.ropes[kind][key] == value


@pytest.mark.parametrize("case", ["gemma3", "qwen3.5"])
@torch.no_grad()
def test_in_bf16_what_is_rounded_is_what_transformers_rounds(case):
    """The scaled embedding and the norms to the bit; the decays of linear attention not at all."""
    oracle, model = make_oracle(case).bfloat16(), tiny(case).bfloat16()
    inputs, ids = [], documents([9])[0]
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model.model.packed(*packed([ids]))
    hook.remove()
    assert torch.equal(inputs[0], oracle.model.embed_tokens(ids))
    block, theirs = model.model.layers[0], oracle.model.layers[0]
    assert torch.equal(block.input_layernorm(inputs[0]), theirs.input_layernorm(inputs[0]))
    if case == "gemma3":
        return
    found = []
    x_ND = torch.randn(70, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def recur(qkv, decay, *given):
        found.append(decay)
        return x_ND.new_zeros(70, 4, 12)

    block.linear_attn(x_ND, recur)
    layer = theirs.linear_attn
    step = torch.nn.functional.softplus(layer.in_proj_a(x_ND).double() + layer.dt_bias)
    exact = -layer.A_log.double().exp() * step
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=0)
    assert model.cache(2, 8).held[0][1].dtype == torch.float32  # a state adds up many small parts
    out, z = (torch.randn(9, 4, 12).bfloat16() for _ in range(2))
    gap = block.linear_attn.norm(out, z).float() - layer.norm(out, z).float()
    assert gap.abs().max() <= 2**-7 * layer.norm(out, z).abs().max()


def test_init_weights_depends_on_the_seed_alone_and_has_the_configs_spread():
    with torch.device("meta"):
        model = CausalLM(tiny("qwen3_untied_biases", initializer_range=0.07).config)
    fill = [
        dict(model.to_empty(device="cpu").init_weights(seed).named_parameters()) for seed in (1,)
    ][0]
    fill = {n: p.clone() for n, p in fill.items()}
    again = dict(model.init_weights(1).named_parameters())
    assert all(torch.equal(fill[n], again[n]) for n in fill)
    other = dict(model.init_weights(2).named_parameters())
    for name, p in fill.items():
        if p.ndim == 2:
            assert not torch.equal(p, other[name])
            assert abs(p.std() - 0.07) < 0.01 and abs(p.mean()) < 0.01
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all()


def loss_and_gradients(model, docs):
    model.zero_grad()
    logp_N, entropy_N = model(batch_of_docs(docs))
    loss = -logp_N.sum() - 0.1 * entropy_N.sum()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_close(a, b, tolerance):
    """Losses and gradients, relative to the size of each gradient's largest entry."""
    assert abs(a[0] - b[0]) <= tolerance * abs(b[0])
    for name in b[1]:
        assert (a[1][name] - b[1][name]).abs().max() <= tolerance * b[1][name].abs().max(), name


@pytest.mark.parametrize(
    "case",
    [
        "llama3.1",
        "mistral",
        "qwen2_window",
        "qwen3",
        "llama2_tied_biases",
        "smollm3",
        "gemma3",
        "qwen3.5",
    ],
)
def test_packed_equals_alone_in_loss_and_gradient(case):
    model, docs = tiny(case), documents()
    parts = [loss_and_gradients(model, [d]) for d in docs]
    alone = sum(p[0] for p in parts), {n: sum(p[1][n] for p in parts) for n in parts[0][1]}
    assert_close(loss_and_gradients(model, docs), alone, 1e-5)


@pytest.mark.parametrize(
    "case",
    [
        "mistral",
        "qwen2",
        "qwen3_untied_biases",
        "smollm3_window",
        "gemma3_scaled_untied",
        "qwen3.5",
        "qwen3.5_tied_biases",
    ],
)
def test_gradients_equal_those_of_transformers(case):
    oracle, model, docs = make_oracle(case), tiny(case), documents()
    loss = sum(
        torch.nn.functional.cross_entropy(oracle(d[None]).logits[0, :-1], d[1:], reduction="sum")
        for d in docs
        if len(d) > 1
    )
    loss.backward()
    ours = -model(batch_of_docs(docs))[0].sum()
    ours.backward()
    theirs = {n: oracle.get_parameter(n).grad for n, _ in model.named_parameters()}
    assert_close(
        (ours.detach(), {n: p.grad for n, p in model.named_parameters()}),
        (loss.detach(), theirs),
        1e-4,
    )


@pytest.mark.parametrize("how", ["selective", "full"])
def test_activation_checkpointing_gives_the_same_gradients(how):
    model, docs = tiny("qwen2_window"), documents()
    plain = loss_and_gradients(model, docs)
    model.model.checkpointing = how
    assert_close(loss_and_gradients(model, docs), plain, 1e-6)


def test_selective_checkpointing_computes_no_product_again():
    """The forward's products of matrices are run once, with full checkpointing twice."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.count += operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return operator(*args, **(kwargs or {}))

    counts = {}
    for how in ("none", "selective", "full"):
        model, docs = tiny("qwen2_window"), documents()
        model.model.checkpointing = how
        with Products() as products:
            loss_and_gradients(model, docs)
        counts[how] = products.count
    assert counts["none"] == counts["selective"]
    # A block's last product is its output, which the next one has kept.
    assert counts["full"] == counts["none"] + 6 * len(model.model.layers)


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler"
)
def test_compiled_blocks_give_the_same_loss_and_gradients():
    model, docs = tiny("qwen3"), documents([9, 4, 9])
    compiled = copy.deepcopy(model)
    for block in compiled.model.layers:
        block.compile()
    assert_close(loss_and_gradients(compiled, docs), loss_and_gradients(model, docs), 1e-5)


def test_all_blocks_share_the_compiled_code():
    """One layer's code must serve all: after eight variants torch silently stops compiling."""
    torch._dynamo.reset()
    model = CausalLM(
        Config.of({**tiny("qwen3").config.hf, "num_hidden_layers": 10, "layer_types": None})
    ).init_weights(0)
    compiled = copy.deepcopy(model)
    for block in compiled.model.layers:
        block.compile(backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):
        for lengths in ([9, 4], [8, 2, 7], [20, 1]):
            docs = documents(lengths)
            assert_close(loss_and_gradients(compiled, docs), loss_and_gradients(model, docs), 1e-6)


def test_no_loss_goes_through_the_product_without_a_derivative(monkeypatch):
    """torch.mm(out_dtype=...), which matmul_fp32 uses on CUDA in bf16, has none: train_rm.py and
    train_ppo.py would fail in their first backward pass."""
    product = model_module.matmul_fp32

    def refuse(a, b):
        assert not torch.is_grad_enabled(), "matmul_fp32 where a gradient is wanted"
        return product(a, b)

    monkeypatch.setattr(model_module, "matmul_fp32", refuse)
    config = small_config()
    batch = batch_of([Example(random_ids(9, 0), np.arange(9) > 3)])
    for model in (ScalarModel(config), ActorCritic(config, None), ActorCritic(config, config)):
        out = model(batch)
        (out if isinstance(model, ScalarModel) else sum(out)).sum().backward()
        head = (
            model.score
            if isinstance(model, ScalarModel)
            else getattr(model.value, "score", model.value)
        )
        assert head.weight.grad.abs().sum() > 0


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 32768}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "rope",
    [
        {**YARN, "factor": 4.0},
        {**YARN, "factor": 4.0, "truncate": False},
        {**YARN, "factor": 3.0, "beta_fast": 20.0, "beta_slow": 2.0},
        {**YARN, "factor": 4.0, "attention_factor": 1.3},
        {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
        {**YARN, "factor": 40.0, "mscale": 1.0},
        LLAMA_3_1,
        {**LLAMA_3_1, "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    ],
    ids=lambda rope: "-".join(f"{key}={value}" for key, value in rope.items())[:60],
)
def test_frequencies_of_a_real_width_are_those_of_transformers(rope):
    """Each constant, each bound and each rounding changes some of these."""
    ours = {"hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": 131072}
    config = transformers.Qwen2Config(**ours, rope_parameters=rope)
    initialize = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    expected, magnitude = initialize(config, "cpu")
    found, factor = rope_frequencies(
        read_ropes({**ours, "rope_parameters": rope}, "")["full_attention"], 128
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(magnitude, rel=1e-9)
