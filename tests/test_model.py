"""The decoder against transformers, on random weights large enough that attention looks at something."""
import pytest
import torch

from nanopost import InputError, hf
from nanopost.attention import Cache
from nanopost.data import Batch
from nanopost.model import CausalLM, Config, rope_frequencies

transformers = pytest.importorskip("transformers")

LENGTHS = [1, 120, 17, 2, 40, 40]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
CASES = {
    "llama2": ("Llama", {"num_key_value_heads": 8}),
    "llama2_tied_biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama3.2": ("Llama", {"rope_parameters": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True, "head_dim": 16,
                           "num_key_value_heads": 1}),
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn_mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16,
                                                  "truncate": False}}),
    "mistral": ("Mistral", {"sliding_window": 7, "num_key_value_heads": 1}),
    "mistral_v0.3": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2.5_yarn": ("Qwen2", {"rope_parameters": {**YARN, "rope_theta": 1e6}, "num_key_value_heads": 8}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_untied_biases": ("Qwen3", {"head_dim": 16, "num_key_value_heads": 1, "attention_bias": True}),
}


def make_oracle(case):
    """A transformers model whose norms, biases and projections are all random and matter."""
    family, given = CASES[case]
    config = getattr(transformers, family + "Config")(**{
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "eos_token_id": None,
        "bos_token_id": None, "pad_token_id": 0, **given})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
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


def batch_of(docs):
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
    together = model.logits(model.hidden(*packed(docs)))
    alone = torch.cat([model.logits(model.hidden(*packed([d]))) for d in docs])
    assert expected.std() > 1  # else agreement would mean little
    assert (together - expected).abs().max() <= 1e-4
    assert (alone - expected).abs().max() <= 1e-4


def new_cache(model, prompts, copies, capacity):
    c = model.config
    return Cache(c.layers, len(prompts) * copies, copies, c.kv_heads, capacity, c.head_dim, torch.float32, "cpu")


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cached_logits_equal_those_of_transformers_while_rows_leave(pair, case):
    oracle, model = pair(case)
    prompts, copies, steps = documents([3, 41, 1]), 2, 12
    further_BT = torch.randint(97, (len(prompts) * copies, steps), generator=torch.Generator().manual_seed(1))
    whole = [torch.cat([prompts[b // copies], further_BT[b]]) for b in range(len(further_BT))]
    expected = [logits_of(oracle, w) for w in whole]
    cache = new_cache(model, prompts, copies, 41 + steps)
    first = model.logits(model.prefill(*packed(prompts), cache))
    for p, prompt in enumerate(prompts):
        assert (first[p] - expected[p * copies][len(prompt) - 1]).abs().max() <= 1e-4
    row_A = torch.arange(len(whole))
    for t in range(steps):
        if t in (4, 8):  # first one row of each of two prompts leaves, then all but the two of the shortest prompt
            stay = torch.tensor([0, 2, 4, 5]) if t == 4 else torch.tensor([2, 3])
            cache.keep(stay)
            row_A = row_A[stay]
        got = model.logits(model.decode(further_BT[row_A, t], cache))
        for logits, b in zip(got, row_A.tolist()):
            assert (logits - expected[b][len(prompts[b // copies]) + t]).abs().max() <= 1e-4


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_greedy_generation_is_token_identical_over_64_tokens(pair, case):
    oracle, model = pair(case)
    prompts = documents([5, 23, 9], seed=2)
    expected = [oracle.generate(p[None], max_new_tokens=64, do_sample=False)[0, len(p):].tolist() for p in prompts]
    cache = new_cache(model, prompts, 1, 23 + 64)
    tokens = [model.logits(model.prefill(*packed(prompts), cache)).argmax(-1)]
    while len(tokens) < 64:
        tokens.append(model.logits(model.decode(tokens[-1], cache)).argmax(-1))
    assert torch.stack(tokens, 1).tolist() == expected
