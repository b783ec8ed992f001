"""Folders whose names are not the model's: decoders beside a vision tower, which is carried, and
experts that are tensors of their own. The oracle is transformers."""

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import random_ids
from test_hf import (
    DELTA,
    EXPERTS,
    SMALL,
    in_child,
    killed_saves,
    logits,
    refused,
    save,
    tensors,
)

from nanopost import InputError, dist, hf, lora, storage
from nanopost.config import Config
from nanopost.dist import World
from nanopost.engine import Engine, Sampling
from nanopost.model import CausalLM
from nanopost.names import Form
from nanopost.save import carried_hash, carried_tensors, save_adapter, save_model
from nanopost.storage import INDEX, SINGLE

IDS = random_ids(40, 0)
SMALL = SMALL | {"head_dim": 16, "pad_token_id": None}
TEXTS = {
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    "qwen3_5": DELTA,
    "qwen3_5_moe": DELTA | EXPERTS | {"shared_expert_intermediate_size": 24},
}
VISION = {
    "gemma3": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "qwen3_5": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    },
}
VISION["qwen3_5_moe"] = VISION["qwen3_5"]
KINDS = {"gemma3": "Gemma3", "qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
CARRIED = ("vision_tower", "multi_modal_projector", "visual", "mtp")


def their_config(kind, **more):
    transformers = pytest.importorskip("transformers")
    about = {"text_config": SMALL | TEXTS[kind], "vision_config": VISION[kind], **more}
    if kind == "gemma3":
        about["mm_tokens_per_image"] = 4
    return getattr(transformers, f"{KINDS[kind]}Config")(**about)


def theirs_of(kind, **more):
    """A random model of transformers with a vision tower."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = their_config(kind, **more)
    model = getattr(transformers, f"{KINDS[kind]}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.15))
    return model


def weights(folder):
    held = {}
    for path in sorted(folder.glob("*.safetensors")):
        held |= load_file(path)
    return held


def rewrite(folder, held):
    """Replace a folder's weights."""
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink(missing_ok=True)
    save_file(held, folder / SINGLE, metadata={"format": "pt"})


def is_carried(name):
    return not {*CARRIED}.isdisjoint(name.split(".")[:2])


def published(folder, kind, stacked=False, **more):
    """A folder as on the hub: what is carried is in bf16, heads for tokens ahead are among it.
    stacked: experts are in one tensor, which transformers reads and does not write."""
    theirs = theirs_of(kind, **more)
    theirs.save_pretrained(folder)
    held = weights(folder)
    if stacked:
        held = {name: x.clone() for name, x in theirs.state_dict().items()}
    if kind != "gemma3":
        held["mtp.fc.weight"] = torch.randn(64, 128)
    held = {n: x.bfloat16() if is_carried(n) else x for n, x in held.items()}
    rewrite(folder, held)
    return type(theirs).from_pretrained(folder, dtype=torch.float32).eval()


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def check_saved(theirs, before, folder, ids=IDS):
    """A folder holds what the one before did, and transformers reads the same model from it."""
    old, new = weights(before), weights(folder)
    assert old.keys() == new.keys()
    carried = [name for name in old if is_carried(name)]
    assert carried and all(same(old[name], new[name]) for name in carried)
    again, report = type(theirs).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    assert not any(report[kind] for kind in kinds)
    with torch.no_grad():
        assert torch.equal(logits(again, ids), logits(theirs, ids))


# ----------------------------------------------------------------------------------- there and back
@pytest.mark.parametrize(
    "kind, stacked", [*((kind, False) for kind in KINDS), ("qwen3_5_moe", True)]
)
def test_a_decoder_beside_a_vision_tower_is_read_and_saved_with_all_that_is_carried(
    tmp_path, kind, stacked
):
    theirs = published(tmp_path / "theirs", kind, stacked)
    assert stacked == any(".mlp.experts.down_proj" in name for name in weights(tmp_path / "theirs"))
    ours = hf.load_model(tmp_path / "theirs")
    assert (logits(ours, IDS) - logits(theirs, IDS)).abs().max() <= 1e-4
    save(tmp_path / "ours", ours, max_shard_bytes=50_000)
    assert (tmp_path / "ours" / INDEX).is_file()
    check_saved(theirs, tmp_path / "theirs", tmp_path / "ours")
    before = json.loads((tmp_path / "theirs/config.json").read_text())
    after = json.loads((tmp_path / "ours/config.json").read_text())
    dtypes = {"dtype": "float32", "torch_dtype": "float32"}
    assert after == before | dtypes | {"text_config": after["text_config"]}
    assert after["text_config"] == before["text_config"] | {"tie_word_embeddings": ours.config.tied}


NEWER = {  # of Gemma 3: as transformers names its modules, and some write them
    "language_model.model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "language_model.lm_head.": "lm_head.",
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("newer", [True, False])
def test_both_forms_of_gemma_3_keep_their_names(tmp_path, newer, tied):
    theirs = published(tmp_path / "theirs", "gemma3", tie_word_embeddings=tied)
    held = weights(tmp_path / "theirs")
    assert "language_model.model.norm.weight" in held
    assert ("language_model.lm_head.weight" in held) == (not tied)
    if newer:
        renamed = {}
        for name, x in held.items():
            (old,) = [prefix for prefix in NEWER if name.startswith(prefix)]
            renamed[NEWER[old] + name.removeprefix(old)] = x
        rewrite(tmp_path / "theirs", renamed)
    ours = hf.load_model(tmp_path / "theirs")
    assert ours.config.tied == tied
    assert (logits(ours, IDS) - logits(theirs, IDS)).abs().max() <= 1e-4
    save(tmp_path / "ours", ours)
    check_saved(theirs, tmp_path / "theirs", tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["tie_word_embeddings"] == config["text_config"]["tie_word_embeddings"] == tied


def test_a_text_model_under_the_prefix_of_the_whole_is_saved_under_its_own(tmp_path):
    """transformers writes this of the decoder of a whole Qwen3.5."""
    transformers = pytest.importorskip("transformers")
    published(tmp_path / "whole", "qwen3_5")
    text = transformers.Qwen3_5ForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    text.save_pretrained(tmp_path / "text")
    assert "model.language_model.norm.weight" in weights(tmp_path / "text")
    ours = hf.load_model(tmp_path / "text")
    assert (logits(ours, IDS) - logits(text.eval(), IDS)).abs().max() <= 1e-4
    save(tmp_path / "ours", ours)
    assert weights(tmp_path / "ours").keys() == tensors(ours).keys()
    again = type(text).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(logits(again, IDS), logits(text, IDS))


def test_a_new_model_is_saved_as_the_hub_has_it(tmp_path):
    for kind, name in (("gemma3", "language_model.model."), ("qwen3_5", "model.language_model.")):
        config = Config.of(json.loads(their_config(kind).to_json_string(use_diff=False)))
        model = CausalLM(config).init_weights(0)
        save(tmp_path / kind, model)
        assert all(stored.startswith((name, "lm_head.")) for stored in weights(tmp_path / kind))


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_a_reward_model_of_such_a_folder_is_one_of_text(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    published(tmp_path / "whole", kind)
    ours = hf.load_scalar_model(tmp_path / "whole", new_head=True, pad_id=0)
    files = {"processor_config.json": "{}", "tokenizer.json": "{}"}
    save(tmp_path / "ours", ours, files=files)
    assert not (tmp_path / "ours/processor_config.json").exists()
    assert weights(tmp_path / "ours").keys() == tensors(ours).keys()
    again, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(again).__name__ == ours.config.traits.scalar
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        score = again.eval()(torch.tensor([IDS])).logits[0, 0]
        cu = torch.tensor([0, len(IDS)], dtype=torch.int32)
        hidden = ours.model.packed(torch.tensor(IDS), torch.arange(len(IDS)), cu, len(IDS))
    torch.testing.assert_close(ours.score(hidden[-1])[0], score, rtol=0, atol=1e-4)


def test_of_a_folder_in_nf4_what_is_carried_is_saved_dequantised_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    kind = type(published(tmp_path / "base", "gemma3"))
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = kind.from_pretrained(tmp_path / "base", quantization_config=how, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "nf4")
    packed = [n for n, x in weights(tmp_path / "nf4").items() if x.dtype == torch.uint8]
    assert any(map(is_carried, packed)) and not all(map(is_carried, packed))
    save(tmp_path / "ours", hf.load_model(tmp_path / "nf4"))
    again, report = kind.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected, found = theirs.dequantize(torch.float32).state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text", [None, True, False])
@pytest.mark.parametrize("top", [None, True, False])
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_a_head_is_tied_where_transformers_ties_it(kind, top, text):
    """What text_config says does not count."""
    transformers = pytest.importorskip("transformers")
    hf_config = json.loads(their_config(kind).to_json_string(use_diff=False))
    for part, tied in ((hf_config, top), (hf_config["text_config"], text)):
        part.pop("tie_word_embeddings", None)
        if tied is not None:
            part["tie_word_embeddings"] = tied
    theirs = getattr(transformers, f"{KINDS[kind]}Config").from_dict(hf_config)
    with torch.device("meta"):
        model = getattr(transformers, f"{KINDS[kind]}ForConditionalGeneration")(theirs)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert Config.of(hf_config).tied == tied


# ------------------------------------------------------------------------------------------ experts
def their_experts():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **EXPERTS))


def test_experts_are_taken_apart_and_put_together_as_by_transformers(tmp_path):
    theirs = their_experts()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    held, stacked = weights(tmp_path), theirs.state_dict()
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in held
    form = Form.of(held, ["model."], Form())
    assert form == Form("model.", split=True)
    apart = dict(form.published(stacked.items()))
    assert apart.keys() == held.keys() and all(torch.equal(apart[n], held[n]) for n in held)
    source = storage.Source(tmp_path, Config.of(json.loads((tmp_path / "config.json").read_text())))
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{name}"
        whole = stacked[name]
        with storage.experts(source, form.matrices(name, 4), whole.shape) as stack:
            for experts in (slice(0, 4), slice(1, 3), slice(4, 4)):
                assert torch.equal(stack[experts, :, 5:], whole[experts, :, 5:])


# ----------------------------------------------------------------------------- mistakes and changes
def write_whole(folder):
    """A folder with a vision tower, of numbers that this code has made."""
    hf_config = {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": SMALL | DELTA,
        "vision_config": {"depth": 1},
    }
    save(folder, CausalLM(Config.of(hf_config)).init_weights(0))
    draw = torch.Generator().manual_seed(1)
    held = weights(folder)
    held["model.visual.patch_embed.weight"] = torch.randn(300, 100, generator=draw).bfloat16()
    held["mtp.norm.weight"] = torch.randn(9, generator=draw).double()
    rewrite(folder, held)


@pytest.fixture
def whole(tmp_path):
    write_whole(tmp_path / "whole")
    return tmp_path / "whole"


def test_decays_in_fp32_among_bf16_stay_so(whole):
    decay = "model.language_model.layers.0.linear_attn.A_log"
    held = {name: x if name == decay else x.bfloat16() for name, x in weights(whole).items()}
    rewrite(whole, held)
    for adapters in (False, True):  # beside adapters all else is held in bf16
        model = hf.load_model(whole, shard=beside_adapters if adapters else lambda model: model)
        out, named = whole.with_name(f"out{adapters}"), dist.full_weights(model)
        save_model(out, named, model.config, dtype=torch.bfloat16)
        saved = weights(out)
        assert held[decay].dtype == torch.float32
        assert held.keys() == saved.keys() and all(same(held[name], saved[name]) for name in held)


def beside_adapters(model):
    lora.apply(model, 2)
    lora.hold_in_stored_dtype(model)
    (kept,) = {p.dtype for n, p in model.named_parameters() if n.endswith("A_log")}
    assert kept == torch.float32
    return dist.shard(model, World(0, 1, torch.device("cpu"), torch.bfloat16))


def test_what_config_json_says_of_the_decoder_is_kept_up(whole):
    """Its dtype, also of a reward model, whose head replaces one that is not tied; and what it says
    of positions counts."""
    stored = json.loads((whole / "config.json").read_text())
    stored["text_config"] |= {"dtype": "float32", "max_position_embeddings": 50}
    stored["tie_word_embeddings"] = stored["text_config"]["tie_word_embeddings"] = False
    (whole / "config.json").write_text(json.dumps(stored))
    held = weights(whole)
    head = torch.ones_like(held["model.language_model.embed_tokens.weight"])
    rewrite(whole, held | {"lm_head.weight": head})
    model = hf.load_model(whole)
    save(whole.with_name("out"), model, dtype=torch.bfloat16)
    saved = json.loads((whole.with_name("out") / "config.json").read_text())
    assert saved["text_config"]["dtype"] == saved["dtype"] == "bfloat16"
    with pytest.raises(InputError, match="exceed the model's 50 positions"):
        Engine(model, []).generate([IDS], 1, Sampling(11))
    scalar = hf.load_scalar_model(whole, new_head=True, pad_id=0)
    assert scalar.config.hf["tie_word_embeddings"] is False
    assert scalar.config.hf["dtype"] == "float32" and "lm_head.weight" not in tensors(scalar)


def test_what_no_decoder_of_this_family_carries_is_unexpected(whole):
    held = weights(whole)
    rewrite(whole, held | {"model.audio.weight": torch.zeros(3)})
    refused(whole, "unexpected: model.audio.weight")
    rewrite(whole, held | {"vision_tower.weight": torch.zeros(3)})
    refused(whole, "unexpected: vision_tower.weight")
    held.pop("model.language_model.norm.weight")
    rewrite(whole, held)
    refused(whole, "missing: model.language_model.norm.weight")


def test_a_folder_that_has_changed_or_is_gone_is_never_saved_without_what_it_carried(whole):
    model, out = hf.load_model(whole), whole.with_name("out")
    before, held = carried_hash(model.config), weights(whole)
    save(out, model, carried=before)
    assert before and weights(out).keys() == held.keys()
    files = {path.name: path.read_bytes() for path in out.iterdir()}

    def is_refused(words):
        with pytest.raises(InputError, match=words):
            save(out, model, carried=before)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files

    rewrite(whole, held | {"mtp.norm.weight": held["mtp.norm.weight"] + 1})
    is_refused("have changed since the run began, and are saved with it: restore that folder")
    held.pop("mtp.norm.weight")
    rewrite(whole, held)
    is_refused(r"are no longer there \(mtp.norm.weight\): restore that folder, then --resume")
    shutil.rmtree(whole)
    is_refused(r"no longer there \(model.visual.patch_embed.weight, mtp")


def test_a_killed_save_has_all_that_is_carried_or_is_the_model_before(whole):
    old, new = hf.load_model(whole), hf.load_model(whole)
    new.model.norm.weight.data += 1
    held, states = weights(whole), []
    for folder in killed_saves(whole.parent, old, new, 150_000, 150_000, None, None):
        loaded = hf.load_model(folder)
        states.append(bool(torch.equal(loaded.model.norm.weight, new.model.norm.weight)))
        carried = dict(carried_tensors(loaded.config))
        assert all(same(carried[n], held[n]) for n in held if is_carried(n)) and len(carried) == 2
    assert states == sorted(states) and not states[0] and states[-1]


def test_a_disk_that_is_full_before_the_last_that_is_carried_leaves_the_old_model(whole):
    model, out = hf.load_model(whole), whole.with_name("out")
    save(out, model)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def save_without_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(InputError, match="disk is full; the model that was there is untouched"):
            save(out, model, max_shard_bytes=40_000)

    sizes = {name: x.nbytes for name, x in weights(whole).items()}
    assert [name for name in sizes if sizes[name] > 40_000] == ["model.visual.patch_embed.weight"]
    assert in_child(save_without_room) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# --------------------------------------------------------------------------------------- adapters
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_adapters_are_on_the_decoder_alone_and_peft_s(tmp_path, kind):
    peft = pytest.importorskip("peft")
    theirs = published(tmp_path / "base", kind)
    model = hf.load_model(tmp_path / "base", shard=lambda model: lora.apply(model, 3))
    draw = torch.Generator().manual_seed(6)
    for layer in lora.layers(model).values():
        layer.lora_B.data += 0.1 * torch.randn(layer.lora_B.shape, generator=draw)
    written = dist.full_weights(model).trained()
    save_adapter(tmp_path / "adapter", written, lora.peft_config(model))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert (logits(model, IDS) - logits(adapted, IDS)).abs().max() <= 1e-4
    with adapted.disable_adapter():
        assert (logits(model, IDS) - logits(adapted, IDS)).abs().max() > 0.1
    adapted.save_pretrained(tmp_path / "again")
    ours, again = (load_file(tmp_path / name / lora.WEIGHTS) for name in ("adapter", "again"))
    assert ours.keys() == again.keys() and all(torch.equal(ours[n], again[n]) for n in ours)
    merged = hf.load_model(tmp_path / "adapter")
    assert (logits(merged, IDS) - logits(model, IDS)).abs().max() <= 1e-4
    save_model(tmp_path / "merged", dist.full_weights(model), model.config)
    base, saved = weights(tmp_path / "base"), weights(tmp_path / "merged")
    assert base.keys() == saved.keys()
    assert all(same(base[name], saved[name]) for name in base if is_carried(name))
    save(tmp_path / "merged_too", merged)
    assert weights(tmp_path / "merged_too").keys() == saved.keys()
