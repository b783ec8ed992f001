"""NF4 against bitsandbytes, bit for bit; layers of it, their gradients, and folders of it."""

import json

import pytest
import torch
import torch.multiprocessing as mp
from inprocess import run_here
from safetensors.torch import load_file, save_file
from small import random_ids, small_model

from nanopost import InputError, dist, hf, lora, nf4, optim
from nanopost.batch import Example, batch_of
from nanopost.engine import Engine, Sampling
from nanopost.forward import batches, logprobs
from nanopost.save import save_adapter, save_model
from runs import toy

bitsandbytes = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
functional = bitsandbytes.functional
IDS = random_ids(40, 3)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


# --------------------------------------------------------------------------------------- the format
def matrices():
    """Of several scales, with empty rows and outliers, of one block and of many."""
    for seed, (rows, width) in enumerate([(1, 64), (64, 64), (97, 192), (300, 128), (512, 576)]):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, width, generator=draw) * [0.02, 1.0, 1e-4, 30.0, 0.05][seed]
        if seed == 2:
            x[:5] = 0
        if seed == 3:
            x *= torch.rand(rows, 1, generator=draw) ** 6
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield x.to(dtype)


def packed_of(theirs, state):
    nested = torch.cat([state.state2.absmax, state.offset[None]]).view(torch.int32)
    return nf4.Packed(theirs.flatten(), state.absmax, nested)


def nearest(x, codes):
    """bitsandbytes' own 8-bit numbers, by its kernel for any device, which finds the nearest."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    op = torch.ops.bitsandbytes.quantize_blockwise.default
    return op._op_dk(key, x, codes, nf4.NESTED_BLOCK)


def test_codes_are_those_of_bitsandbytes():
    assert torch.equal(nf4.codebook(), functional.get_4bit_type("nf4", "cpu"))
    assert torch.equal(nf4.dynamic_map(), functional.create_dynamic_map())


def test_a_matrix_has_the_bits_that_bitsandbytes_gives_it():
    off = count = 0
    for x in matrices():
        theirs, state = functional.quantize_4bit(x, compress_statistics=True, quant_type="nf4")
        packed = nf4.quantize(x)
        assert torch.equal(packed.codes, theirs.flatten())
        assert torch.equal(packed.nested, packed_of(theirs, state).nested)
        plain = functional.quantize_4bit(x, quant_type="nf4")[1].absmax - state.offset
        codes, _ = nearest(plain, functional.create_dynamic_map())
        assert torch.equal(packed.absmax, codes)
        # Its kernel for CPUs knows numbers to 1 / 65,536, and takes a neighbour now and then.
        largest = state.state2.absmax.clamp(min=1e-30).repeat_interleave(256)[: len(plain)]
        found, theirs = (
            nf4.dynamic_map()[packed.absmax.int()],
            nf4.dynamic_map()[state.absmax.int()],
        )
        further = (theirs - plain / largest).abs() - (found - plain / largest).abs()
        assert float(further.abs().max()) <= 4e-5 or not plain.any()
        off, count = off + int((packed.absmax != state.absmax).sum()), count + len(plain)
    assert 0 < off < 0.01 * count


def test_a_matrix_dequantises_to_the_bits_of_bitsandbytes():
    for x in matrices():
        theirs, state = functional.quantize_4bit(x, compress_statistics=True, quant_type="nf4")
        expected = functional.dequantize_4bit(theirs, state)
        found = nf4.dequantize(packed_of(theirs, state), x.shape[1], x.dtype)
        assert found.dtype == x.dtype and torch.equal(found, expected)
        error = (x - nf4.dequantize(nf4.quantize(x), x.shape[1], x.dtype)).abs()
        assert float(error.max()) <= 0.16 * float(x.abs().max())


# ------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_its_dequantised_weight_and_saves_it_packed(dtype):
    draw = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(128, 48)
    dense = base.weight.detach().bfloat16()
    layer = nf4.FrozenLinear(base)
    nf4.pack(layer, "a layer", torch.bfloat16)
    for part, tensor in zip(nf4.PARTS, nf4.quantize(dense)):
        setattr(layer, part, torch.nn.Parameter(tensor, requires_grad=False))
    layer.bias = torch.nn.Parameter(base.bias.detach().to(dtype))
    weight = nf4.dequantize(nf4.quantize(dense), 128, torch.bfloat16).to(dtype)
    x = torch.randn(30, 128, generator=draw).to(dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x)
    assert not any(t.numel() >= 48 * 128 for t in saved) and any(
        t.dtype == torch.uint8 for t in saved
    )
    d = torch.randn(30, 48, generator=draw).to(dtype)
    y.backward(d)
    found, x.grad = x.grad, None
    expected = torch.nn.functional.linear(x, weight, layer.bias)
    expected.backward(d)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, x.grad)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a small Llama in bf16, with biases."""
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True}
    model = small_model(4, **kind, **SIZES, num_hidden_layers=3)
    folder = tmp_path_factory.mktemp("base")
    save_model(folder, model.state_dict().items(), model.config, dtype=torch.bfloat16)
    return folder


def in_4_bits(folder, rank=3, targets=None, world=None, noise=0.1, **options):
    """A folder's model in NF4 with adapters, their B away from 0."""

    def shard(model):
        lora.quantize(lora.apply(model, rank, targets=targets, **options))
        if world is None:
            return model
        if world.dtype != torch.float32:
            lora.hold_in_stored_dtype(model)
        return dist.shard(model, world)

    model = hf.load_model(folder, shard=shard)
    draw = torch.Generator().manual_seed(6)
    for layer in lora.layers(model).values():
        b = 1 - 2 * torch.rand(layer.out_features, layer.rank, generator=draw)
        hf._copy(layer.lora_B.data, noise * b)
    return model


def example(ids=IDS):
    ids = torch.tensor(ids).numpy()
    return Example(ids, ids >= 0)


def logits(model):
    batch = batch_of([example()])
    stream = batch.token_N, batch.position_N, batch.cu_seqlens, batch.max_seqlen
    return model.logits(model.model.packed(*stream))


def write_adapter(model, folder):
    save_adapter(folder, dist.full_weights(model).trained(), lora.peft_config(model))
    return folder


def bitsandbytes_model(folder):
    """A folder's model as transformers and bitsandbytes quantise it, from fp32: of a matrix from
    bf16, bitsandbytes' layers round what they dequantise to bf16 in the backward pass alone."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def quantised(base, tmp_path_factory):
    """The base as transformers and bitsandbytes quantise and save it."""
    model = bitsandbytes_model(base)
    folder = tmp_path_factory.mktemp("quantised")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_a_model_is_the_one_that_peft_makes_of_bitsandbytes_base(quantised, tmp_path, targets):
    folder, _ = quantised
    model = in_4_bits(folder, targets=targets, alpha=6.0)
    adapter = write_adapter(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(theirs, adapter, is_trainable=True)
    theirs.train()  # bitsandbytes evaluates in bf16 on some CPUs
    expected = theirs(torch.tensor([IDS]))
    torch.testing.assert_close(logits(model), expected.logits[0], rtol=1e-3, atol=1e-3)
    labels = torch.tensor([IDS])
    theirs(labels, labels=labels).loss.backward()
    (-model(batch_of([example()]))[0].sum() / (len(IDS) - 1)).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        if p.grad is not None:
            gradient = gradients.pop(lora.peft_name(name).replace(".weight", ".default.weight"))
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-3)
    assert not gradients


def test_a_checkpoint_of_bitsandbytes_keeps_its_bits_or_reads_as_dequantised(base, quantised):
    folder, theirs = quantised
    model, dense = in_4_bits(folder, noise=0.0), hf.load_model(folder)
    assert not dense.config.hf.get("quantization_config")
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    own = in_4_bits(base, noise=0.0)
    for name, layer in model.named_modules():
        if not nf4.is_packed(layer):
            continue
        assert torch.equal(layer.weight, stored[f"{name}.weight"].flatten())
        assert torch.equal(layer.weight_absmax, stored[f"{name}.weight.absmax"])
        assert torch.equal(layer.weight, own.get_submodule(name).weight)
        expected = bitsandbytes.functional.dequantize_4bit(
            theirs.get_submodule(name).weight, theirs.get_submodule(name).weight.quant_state
        )
        assert torch.equal(dense.get_submodule(name).weight, expected.float())
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    whole = dict(dist.full_weights(model))
    assert whole.keys() == dict(dense.named_parameters()).keys()
    for name, p in dense.named_parameters():
        assert torch.equal(whole[name].float(), p)


def test_layers_without_adapters_are_packed_too(base):
    model = in_4_bits(base, targets=["q_proj"])
    linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 3 * 7 and all(map(nf4.is_packed, linear))
    assert sum(isinstance(layer, lora.LoRALinear) for layer in linear) == 3
    bits = 8 * sum(getattr(m, part).nbytes for m in linear for part in nf4.PARTS)
    assert bits / sum(m.in_features * m.out_features for m in linear) < 4.2


def test_linear_attention_is_packed_where_bitsandbytes_packs_it(tmp_path):
    """Its projections, as narrow as some are; not its convolution, decays and norm."""
    model = small_model(4, model_type="qwen3_5_text", **SIZES, linear_value_head_dim=16)
    save_model(tmp_path / "dense", model.state_dict().items(), model.config)
    theirs = bitsandbytes_model(tmp_path / "dense")
    theirs.save_pretrained(tmp_path / "packed")
    ours = in_4_bits(tmp_path / "packed", noise=0.0)
    packed = {name for name, m in ours.named_modules() if nf4.is_packed(m)}
    kind = bitsandbytes.nn.Linear4bit
    assert packed == {name for name, m in theirs.named_modules() if isinstance(m, kind)}
    theirs.train()  # bitsandbytes evaluates in bf16 on some CPUs
    expected = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(ours), expected, rtol=1e-3, atol=1e-3)


def test_other_quantisations_are_refused(quantised, tmp_path):
    folder, _ = quantised
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    config["quantization_config"]["bnb_4bit_use_double_quant"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match="are quantised .bitsandbytes., and not by bitsandbytes to"
    ):
        hf.load_model(tmp_path)
    config["quantization_config"]["bnb_4bit_use_double_quant"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights["model.layers.1.mlp.up_proj.weight.quant_map"][3] += 0.01
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight is quantised in another way"):
        hf.load_model(tmp_path)


def test_a_width_of_no_whole_blocks_is_refused(tmp_path):
    model = small_model()
    save_model(tmp_path, model.state_dict().items(), model.config)
    with pytest.raises(InputError, match="q_proj is 32 wide, which is no multiple of 64: train"):
        in_4_bits(tmp_path)


def test_engines_sample_from_packed_weights_or_from_merged_ones(base, alone):
    model = in_4_bits(base)
    shared, apart = Engine(model, [], shared=True), Engine(hf.load_model(base), [])
    for engine in (shared, apart):
        engine.sync_weights(dist.full_weights(model), 1)
        ((rollout,),) = engine.generate([IDS[:5]], 1, Sampling(12), [3])
        (logp_T,) = logprobs(model, [rollout.example()], 64, 1.0, "cpu")
        torch.testing.assert_close(
            torch.tensor(rollout.logp), torch.tensor(logp_T[5:]), rtol=0, atol=1e-3
        )


# -------------------------------------------------------------------------------------------- ranks
def _rank(rank, size, folder, base, kind):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / f'{size}-{kind}'}", rank=rank, world_size=size
    )
    torch.set_num_threads(1)
    dtype = getattr(torch, kind)
    world = dist.World(rank, size, torch.device("cpu"), dtype)
    model = in_4_bits(base, world=world, noise=0.05)
    optimizer = optim.adamw(model, 0.1)
    optim.set_learning_rate(optimizer, 1e-3)
    losses = []
    for step in range(2):
        lengths = (3, 40, 7, 25, 11)
        examples = [example(random_ids(n, 10 * step + n)) for n in lengths]
        loss = 0.0
        for batch in batches(model, examples[rank::size], 40, "cpu"):
            logp_N, _ = model(batch)
            (-logp_N.sum() / 81).backward()
            loss -= float(logp_N.detach().sum())
        losses.append(dist.all_sum(loss))
        optimizer.step()
        optimizer.zero_grad()
    weights = dict(dist.full_weights(model))
    packed = {
        n: p.full_tensor() if size > 1 else p
        for n, p in model.named_parameters()
        if (p.dtype in (torch.uint8, torch.int32))
    }
    if rank == 0:
        torch.save((losses, weights, packed), folder / f"{size}-{kind}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind, loss, weight", [("float32", 1e-3, 1e-5), ("bfloat16", 3, 3e-3)])
def test_ranks_hold_shards_of_the_packed_weights_and_change_nothing(
    base, tmp_path, kind, loss, weight
):
    found = {}
    for size in (1, 2, 4):
        arguments = (size, tmp_path, base, kind)
        mp.start_processes(_rank, arguments, nprocs=size, start_method="fork")
        found[size] = torch.load(tmp_path / f"{size}-{kind}.pt")
    for size in (2, 4):
        for one, many in zip(found[1][0], found[size][0]):
            assert many == pytest.approx(one, abs=loss)
        for name, w in found[1][1].items():
            torch.testing.assert_close(found[size][1][name], w, rtol=0, atol=weight)
        assert found[1][2] and found[size][2].keys() == found[1][2].keys()
        for name, p in found[1][2].items():
            assert torch.equal(found[size][2][name], p), name


# ------------------------------------------------------------------------------------------ scripts
@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_a_script_trains_in_4_bits_and_writes_the_merged_model(tmp_path, capsys, script):
    toy.write_model(tmp_path / "toy")
    rows = [{"prompt": [{"role": "user", "content": f"{a}+1=?"}]} for a in range(12)]
    if script == "sft":
        rows = [{"messages": r["prompt"] + [{"role": "assistant", "content": "7"}]} for r in rows]
    toy.write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "reward.py").write_text(
        "def letters(completions, **columns):\n"
        "    return [sum(map(ord, c[-1]['content'])) % 5 for c in completions]\n"
    )
    more = ["--rows", 6]
    if script == "grpo":
        more = ["--prompts", 4, "--group", 2, "--max_new_tokens", 6, "--beta", 0.1]
        more += ["--reward", f"{tmp_path / 'reward.py'}:letters"]
    flags = ["--model", tmp_path / "toy", "--data", tmp_path / "rows.jsonl", "--steps", 3]
    flags += ["--holdout", 2, "--lr", 1e-2, "--warmup", 0, "--lora", 4, "--quantize", "nf4"]
    out = tmp_path / "out"
    run_here(f"train_{script}.py", *flags, *more, "--out", out)
    assert "of which the blocks' matrices in NF4" in capsys.readouterr().out
    base = dict(dist.full_weights(in_4_bits(tmp_path / "toy", noise=0.0)))
    weights = load_file(out / "model.safetensors")
    adapter = lora.read(out / "adapter")
    for name, x in base.items():
        if name in adapter.factors:
            a, b, scale = adapter.factors[name]
            x = x + scale * (b @ a)
        torch.testing.assert_close(weights[name], x.float(), rtol=0, atol=1e-6)


def test_an_adapter_trains_on_in_4_bits(tmp_path, capsys):
    """Merged into its base, which is then packed."""
    toy.write_model(tmp_path / "toy")
    rows = [{"text": "1+2=3"}, {"text": "4+4=8"}, {"text": "a b c"}]
    toy.write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--data", tmp_path / "rows.jsonl", "--steps", 2, "--rows", 2, "--holdout", 1]
    flags += ["--lr", 1e-2, "--warmup", 0, "--lora", 4]
    run_here("train_sft.py", *flags, "--model", tmp_path / "toy", "--out", tmp_path / "dense")
    adapter = tmp_path / "dense" / "adapter"
    more = ["--quantize", "nf4", "--out", tmp_path / "packed"]
    run_here("train_sft.py", *flags, "--model", adapter, *more)
    one, other = (
        dict(dist.full_weights(in_4_bits(folder, noise=0.0)))
        for folder in (adapter, tmp_path / "dense")  # that adapter, merged
    )
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    # An adapter of a base in NF4 belongs to that, which the run says.
    capsys.readouterr()
    more = ["--quantize", "nf4", "--out", tmp_path / "again"]
    run_here("train_sft.py", *flags, "--model", tmp_path / "toy", *more)
    assert "toy in NF4 (for peft: load_in_4bit" in capsys.readouterr().out
    # Read as a model, it is the policy that was trained.
    read = hf.load_model(tmp_path / "again" / "adapter").state_dict()
    for name, x in hf.load_model(tmp_path / "again").state_dict().items():
        torch.testing.assert_close(read[name], x, rtol=0, atol=1e-6)
    # Not into the base of the adapter that it reads.
    more = ["--out", tmp_path / "toy", "--overwrite"]
    with pytest.raises(InputError, match="this run reads .*toy, which would be overwritten"):
        run_here("train_sft.py", *flags, "--model", adapter, *more)
    assert (tmp_path / "toy" / "config.json").exists()


def test_of_an_adapters_base_in_4_bits_only_linear_layers_are_rounded(tmp_path):
    """Not routers and experts: the policy that was trained had them as they are."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    made = small_model(4, model_type="qwen3_moe", **sizes)
    save_model(base, made.state_dict().items(), made.config)
    model = in_4_bits(base)
    files = {lora.ABOUT: json.dumps({"base_nf4": True})}
    trained = dist.full_weights(model).trained()
    save_adapter(adapter, trained, lora.peft_config(model), files)
    read = hf.load_model(adapter).state_dict()
    for name, x in dist.full_weights(model):
        torch.testing.assert_close(read[name], x, rtol=0, atol=1e-6)
    assert sum(name.endswith("mlp.gate.weight") for name in read) == 2


def test_a_base_that_is_not_finite_is_refused_in_4_bits_too(tmp_path):
    model = small_model(**SIZES)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    save_model(tmp_path, model.state_dict().items(), model.config)
    with pytest.raises(InputError, match="not all weights are finite .*layers.1.mlp.up_proj"):
        in_4_bits(tmp_path)


def test_adapters_go_on_beside_the_base_and_at_the_scale_that_they_began_with(tmp_path):
    toy.write_model(tmp_path / "toy")
    toy.write_rows(tmp_path / "rows.jsonl", [{"text": "1+2=3"}, {"text": "4+4=8"}])
    flags = ["--model", tmp_path / "toy", "--data", tmp_path / "rows.jsonl", "--rows", 1]
    flags += ["--holdout", 1, "--lora", 4, "--out", tmp_path / "out", "--save_every", 1]
    run_here("train_sft.py", *flags, "--steps", 2)
    for more, said in (
        (["--quantize", "nf4"], "quantize: none -> nf4"),
        (["--lora_alpha", 8], "lora_alpha: 32.0 -> 8.0"),
        (["--rslora"], "rslora: False -> True"),
        (["--lora", 2], "lora: 4 -> 2"),
        (["--lora_targets", "q_proj"], "lora_targets: .*'v_proj'. -> .'q_proj'."),
    ):
        with pytest.raises(InputError, match=f"adapters go on as they began, but {said}: give"):
            run_here("train_sft.py", *flags, "--steps", 3, *more, "--resume")
    run_here("train_sft.py", *flags, "--steps", 3, "--resume")


def test_weights_in_4_bits_need_adapters(tmp_path):
    toy.write_model(tmp_path / "toy")
    toy.write_rows(tmp_path / "rows.jsonl", [{"text": "a b c"}] * 4)
    flags = ["--model", tmp_path / "toy", "--data", tmp_path / "rows.jsonl", "--quantize", "nf4"]
    with pytest.raises(InputError, match="--quantize is about adapters: give their rank too"):
        run_here("train_sft.py", *flags, "--holdout", 1, "--out", tmp_path / "out")
