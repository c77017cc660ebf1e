"""07_train_dit.py: the reference network, masks, objective and sampler, cached latents, exact resume, the scene rule, every bad input."""
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, beside, finished, killed, refused, started, torchrun
from PIL import Image
from test_model import formula_picture, formula_weights
from test_train import same

REFERENCE = ROOT / "tests" / "reference_dit.json"
NETWORK = dict(width=48, ff_width=96, time_width=24, blocks=2, refiner_blocks=1, head_axes=(4, 10, 10), text_width=32, pooled_width=24,
               latent_channels=4, text_encoder="bytes", text_length=12)
TRAINING = dict(size=48, batch=8, lr=1e-3, warmup=2, ema_decay=0.9, precision="fp32", workers=0, log_every=1, val_every=4, save_every=2,
                val_prompts=4, sample_steps=2, guidance=2.0, shift=3.0, t_shift=1.0, clip_score="",
                optimizer="adamw", decay=0.0)
FLAGS = [part for k, v in (NETWORK | TRAINING).items() for part in ("--" + k.replace("_", "-"), *(map(str, v) if isinstance(v, tuple) else [str(v)]))]
PROMPTS = ["a red star", "", "a small cyan circle on a dotted yellow background", "word " * 40]


def settings(dit, run, **more):
    return dit.Settings(**(dit.PRESETS["demo"] | NETWORK | TRAINING | dict(run=str(run), steps=4) | more))


def network(dit, **more):
    """A small network with random weights everywhere, modulation too."""
    net = dit.build(dit.Network(**(NETWORK | more))).eval()
    net.load_state_dict(formula_weights(net.state_dict()))
    return net


def batch(dit, prompts, length=0):
    return dit.pad(dit.encode_bytes(dit.Network(**NETWORK), prompts), length)


def checkpoint(run):
    return torch.load(run / "dit.pt", weights_only=True)


def log(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "pictures_per_second"} for row in rows if row["stage"] == "07_train_dit"]


@pytest.fixture(scope="session")
def dit():
    return importlib.import_module("07_train_dit")


def small_vae(model, path, **more):
    """A finished VAE's checkpoint with random weights and latents of mean 0.5 and deviation 2."""
    torch.manual_seed(1)
    vae = model.build(model.Architecture(**(dict(width=8, res_blocks=1, groups=4, attention_levels=(), latent_channels=4) | more))).eval()
    k = vae.architecture.latent_channels
    importlib.import_module("01_data").save_checkpoint(path, stage="04_train_vae", architecture=vars(vae.architecture), ema=vae.state_dict(), latent_mean=torch.full((k,), 0.5), latent_std=torch.full((k,), 2.0))
    return vae


@pytest.fixture
def run(run, model):
    """A run folder with scenes and a VAE."""
    small_vae(model, run / "vae.pt")
    return run


@pytest.fixture(scope="module")
def whole(dit, model, prepared, tmp_path_factory):
    """An uninterrupted run of 8 steps."""
    run = tmp_path_factory.mktemp("whole")
    (run / "data").symlink_to(prepared / "data")
    small_vae(model, run / "vae.pt")
    dit.main(settings(dit, run, steps=8))
    return run


# ---------------------------------------------------------------- the network

def test_parameter_table_of_the_paper(dit):
    """Kandinsky 5 Lite's numbers, component by component, and where they stand in the paper."""
    s = dit.Settings()
    assert list(dit.table(s).values()) == [1_180_672, 6_427_904, 394_752, 116_480, 88_116_480, 1_909_391_360, 1_953_344, 2_007_580_992]
    assert (s.width, s.ff_width, s.time_width, s.blocks, s.patch, s.text_width, s.text_length, s.pooled_width, s.pooled_length) == (1792, 7168, 512, 32, 2, 3584, 256, 768, 77)
    assert (s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.clip_norm, s.warmup) == (1e-4, 0.9, 0.95, 1e-8, 0.0, 1.0, 1000)      # Table 4
    assert (s.size, s.batch, s.steps) == (256, 1024, 130_000) and s.text_encoder == "qwen-clip"                                   # Sec. 6.3


def to_diffusers(key):
    """One of our parameter names as diffusers' Kandinsky5Transformer3DModel has it."""
    for ours, theirs in (("time.0", "time_embeddings.in_layer"), ("time.2", "time_embeddings.out_layer"), ("text.0", "text_embeddings.in_layer"),
                         ("text.1", "text_embeddings.norm"), ("pooled.0", "pooled_text_embeddings.in_layer"), ("pooled.1", "pooled_text_embeddings.norm"),
                         ("patches", "visual_embeddings.in_layer"), ("refiner", "text_transformer_blocks"), ("blocks", "visual_transformer_blocks"),
                         ("out_modulation.1", "out_layer.modulation.out_layer"), ("out", "out_layer.out_layer")):
        if key.startswith(ours + "."):
            key = theirs + key[len(ours):]
            break
    key = re.sub(r"^(text|visual)(_transformer.*)\.modulation\.1\.", r"\1\2.\1_modulation.out_layer.", key)
    for ours, theirs in (("q", "to_query"), ("k", "to_key"), ("v", "to_value"), ("out", "out_layer"), ("q_norm", "query_norm"), ("k_norm", "key_norm")):
        key = key.replace(f"attention.{ours}.", f"attention.{theirs}.")
    return key.replace("feed_forward.0.", "feed_forward.in_layer.").replace("feed_forward.2.", "feed_forward.out_layer.")


REF = dict(text_encoder="qwen-clip", pooled_width=24, latent_channels=16, width=128, ff_width=256, time_width=64, head_axes=(16, 24, 24), text_width=48, refiner_blocks=2, blocks=3)


def reference_inputs():
    return formula_picture(2, 16, 8, 12), torch.tensor([0.3, 0.9]), formula_picture(2, 7, 48), formula_picture(2, 24)


def reference_output(weights, exact):
    """diffusers' velocity for one frame. It rounds queries and keys to bfloat16 when it rotates them, even in float32; `exact` takes that out."""
    import types

    import diffusers.models.transformers.transformer_kandinsky as kandinsky
    net = kandinsky.Kandinsky5Transformer3DModel(in_visual_dim=16, out_visual_dim=16, in_text_dim=48, in_text_dim2=24, time_dim=64, patch_size=(1, 2, 2), model_dim=128,
                                                 ff_dim=256, num_text_blocks=2, num_visual_blocks=3, axes_dims=(16, 24, 24)).eval()
    net.load_state_dict({to_diffusers(k): v for k, v in weights.items()})
    x, t, tokens, pooled = reference_inputs()
    full = types.ModuleType("torch")
    full.__dict__.update({k: getattr(torch, k) for k in dir(torch)} | {"bfloat16": torch.float32})
    kandinsky.torch = full if exact else torch
    try:
        with torch.no_grad():
            y = net(hidden_states=x.permute(0, 2, 3, 1)[:, None], encoder_hidden_states=tokens, timestep=1000 * t, pooled_projections=pooled,
                    visual_rope_pos=[torch.arange(1), torch.arange(4), torch.arange(6)], text_rope_pos=torch.arange(7)).sample
    finally:
        kandinsky.torch = torch
    return y[:, 0].permute(0, 3, 1, 2)


def our_output(dit):
    net, (x, t, tokens, pooled) = network(dit, **REF), reference_inputs()
    with torch.no_grad():
        return net, net(x, t, tokens, torch.ones(2, 7, dtype=torch.bool), pooled)


def test_equals_the_reference(dit):
    """reference_dit.json holds diffusers' output for formula weights; `python tests/test_dit.py` writes it anew."""
    expected = torch.tensor(json.loads(REFERENCE.read_text())["velocity"]).reshape(2, 16, 8, 12)
    assert expected.std() > 0.1
    torch.testing.assert_close(our_output(dit)[1], expected, atol=1e-5, rtol=1e-5)


def test_equals_the_installed_reference(dit):
    """The same with diffusers itself where it is installed; every key is accounted for by load_state_dict."""
    pytest.importorskip("diffusers")
    net, ours = our_output(dit)
    torch.testing.assert_close(ours, reference_output(net.state_dict(), exact=True), atol=1e-5, rtol=1e-5)
    assert (ours - reference_output(net.state_dict(), exact=False)).abs().max() < 2e-3 * ours.abs().max()


def test_begins_as_the_identity(dit):
    """Zero modulation: blocks pass their input on, and neither time nor text can be seen."""
    torch.manual_seed(0)
    net = dit.build(dit.Network(**NETWORK)).eval()
    x, t, text = torch.randn(2, 4, 6, 6), torch.tensor([0.1, 0.8]), batch(dit, PROMPTS[:2])
    a, b = net(x, t, *text), net(x, 1 - t, *batch(dit, PROMPTS[2:]))
    assert torch.equal(a, b) and a.std() > 0.1
    for block in [*net.refiner, *net.blocks]:
        y = torch.randn(2, 5, 48)
        turn = dit.turns((24,), torch.arange(5.0))
        assert torch.equal(block(y, torch.randn(2, 24), turn, None, y, None), y)


def test_padding_never_changes_a_result(dit):
    """A batch of many prompts equals each alone, whatever stands in the padding and however long it is; gradients too."""
    net, x, t = network(dit), formula_picture(4, 4, 6, 8), torch.tensor([0.05, 0.4, 0.7, 1.0])
    tokens, mask, pooled = batch(dit, PROMPTS)
    assert mask.sum(1).tolist() == [4, 1, 10, 12] and tokens.shape == (4, 12, 16)
    together = net(x, t, tokens, mask, pooled)
    for i in range(4):
        torch.testing.assert_close(net(x[i:i + 1], t[i:i + 1], *batch(dit, PROMPTS[i:i + 1])), together[i:i + 1], atol=2e-5, rtol=1e-4)
    spoilt = torch.where(mask[..., None], tokens, 77)
    longer = batch(dit, PROMPTS, 30)
    assert longer[0].shape == (4, 30, 16)
    gradients = []
    for t_, m in ((tokens, mask), (spoilt, mask), longer[:2]):
        net.zero_grad()
        y = net(x, t, t_, m, pooled)
        torch.testing.assert_close(y, together, atol=2e-5, rtol=1e-4)
        y.square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert (net(x, t, *batch(dit, PROMPTS[::-1])) - together).abs().max() > 1e-2       # and the prompt does matter


def test_positions(dit):
    """Without sines of rows and columns, equal patches get equal outputs wherever they lie: rotary positions are relative."""
    x, t, text = torch.ones(1, 4, 8, 8), torch.tensor([0.5]), batch(dit, ["a red star"])
    tiles = lambda y: y.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    y = tiles(network(dit)(x, t, *text))
    torch.testing.assert_close(y, y[:, :1].expand_as(y), atol=1e-5, rtol=1e-5)
    y = tiles(network(dit, absolute=True)(x, t, *text))
    assert (y - y[:, :1]).abs().amax((2, 3, 4))[0, 1:].min() > 1e-3


def test_linear_guess(dit):
    """The least-squares factor from x_t to the velocity of independent values of deviation 1; the network adds to it."""
    torch.manual_seed(0)
    x, noise = torch.randn(2, 1, 1, 1, 400_000)
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        x_t = (1 - t) * x + t * noise
        best = (x_t * (noise - x)).mean() / x_t.square().mean()
        factor = dit.linear_velocity(torch.ones(1, 1, 1, 1), torch.tensor([t])).item()
        assert factor == pytest.approx(best.item(), abs=0.01)
    x, t, text = formula_picture(2, 4, 6, 6), torch.tensor([0.2, 0.7]), batch(dit, PROMPTS[:2])
    guess = network(dit, linear_guess=True)(x, t, *text) - network(dit)(x, t, *text)
    torch.testing.assert_close(guess, dit.linear_velocity(x, t), atol=1e-5, rtol=1e-4)


def test_checkpointing_changes_nothing(dit):
    net, x, t, text = network(dit), formula_picture(2, 4, 6, 6), torch.tensor([0.2, 0.7]), batch(dit, PROMPTS[:2])
    gradients = []
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(x, t, *text).square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_bf16_keeps_its_islands(dit):
    net, x, t, text = network(dit), formula_picture(2, 4, 6, 6), torch.tensor([0.2, 0.7]), batch(dit, PROMPTS[:2])
    seen = {}
    for name in ("time.2", "blocks.0.modulation.1", "blocks.0.self_attention.q_norm", "blocks.0.self_attention.q", "blocks.1", "out"):
        net.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.dtype}))
    with torch.no_grad():
        y = net(x, t, *text)
        with torch.autocast("cpu", torch.bfloat16):
            z = net(x, t, *text)
    assert seen.pop("blocks.0.self_attention.q") == torch.bfloat16 and set(seen.values()) == {torch.float32}
    assert 0 < (y - z).abs().max() < 0.05 * y.abs().max()


# ---------------------------------------------------------------- objective and sampler

def test_flow(dit):
    """x_t lies on the line from picture to noise, the target is its velocity: a network that knows both has no loss."""
    x, noise, t = formula_picture(3, 4, 6, 6), formula_picture(3, 4, 6, 6).flip(0), torch.tensor([0.0, 0.25, 1.0])
    def net(x_t, s, *text):
        torch.testing.assert_close(x_t[1], 0.75 * x[1] + 0.25 * noise[1])
        assert torch.equal(x_t[0], x[0]) and torch.equal(x_t[2], noise[2]) and torch.equal(s, t)
        return noise - x
    assert torch.equal(dit.flow_loss(net, x, noise, t, None, None, None), torch.zeros(3))
    zero = dit.flow_loss(lambda x_t, *a: torch.zeros_like(x_t), x, noise, t, None, None, None)
    torch.testing.assert_close(zero, (noise - x).square().mean((1, 2, 3)))


def test_shifted(dit):
    times = [1, 0.964, 0.923, 0.875, 0.818, 0.75, 0.667, 0.562, 0.429, 0.25, 0]                 # Kandinsky 5, s = 3, 10 steps
    torch.testing.assert_close(dit.shifted(torch.linspace(1, 0, 11), 3.0), torch.tensor(times), atol=6e-4, rtol=0)


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (7, 3.0), (50, 0.5)])
def test_sampler_finds_the_picture(dit, steps, shift):
    """With one picture in the world the velocity is (x - x0) / t, and Euler's straight steps end on it exactly."""
    x0 = formula_picture(2, 4, 6, 6)
    net = lambda x, t, *text: (x - x0) / t[:, None, None, None]
    torch.testing.assert_close(dit.sample(net, torch.randn(2, 4, 6, 6), (), (), steps, 1.0, shift), x0, atol=1e-5, rtol=1e-5)


def test_guidance(dit):
    """1.0 is the prompt alone, and asks for nothing else; w moves along v_empty + w (v_prompt - v_empty)."""
    x, asked = torch.zeros(1, 4, 2, 2), []
    def net(x, t, text):
        asked.append(text)
        return torch.full_like(x, {"prompt": 3.0, "empty": 1.0}[text])
    assert (dit.sample(net, x, ("prompt",), ("empty",), 4, 1.0, 1.0) == -3).all() and set(asked) == {"prompt"}
    assert torch.allclose(dit.sample(net, x, ("prompt",), ("empty",), 4, 5.0, 1.0), torch.tensor(-11.0)) and set(asked) == {"prompt", "empty"}
    real, text, empty = network(dit), batch(dit, ["a red star"]), batch(dit, [""])
    noise = formula_picture(1, 4, 6, 6)
    alone = dit.sample(real, noise, text, text, 3, 5.0, 3.0)                        # the prompt against itself is no guidance
    torch.testing.assert_close(dit.sample(real, noise, text, empty, 3, 1.0, 3.0), alone, atol=1e-5, rtol=1e-5)
    assert (dit.sample(real, noise, text, empty, 3, 5.0, 3.0) - alone).abs().max() > 1e-3


# ---------------------------------------------------------------- text

def test_bytes(dit):
    encode = lambda prompts: dit.encode_bytes(dit.Network(**NETWORK), prompts)
    lengths = lambda *prompts: [len(tokens) for tokens, _ in encode(prompts)]
    assert lengths("", "a red star", "x" * 10_000, "word " * 2000, "🦊🦊", "שלום, עולם", "\ud800") == [1, 4, 2, 12, 3, 4, 2]
    (tokens, _), = encode(["ab é"])
    assert tokens.dtype == torch.int16 and tokens[0].tolist() == [98, 99] + [0] * 14 and tokens[1, :3].tolist() == [0xC3 + 1, 0xA9 + 1, 0]
    net = network(dit)
    words, mask, _ = batch(dit, ["red der"])
    embedded, pooled = net.bytes(words, mask)
    table = net.bytes.table.weight
    torch.testing.assert_close(embedded[0, 0], table[ord("r") + 1] + table[256 + ord("e") + 1] + table[512 + ord("d") + 1])
    assert not torch.allclose(embedded[0, 0], embedded[0, 1]) and torch.allclose(pooled[0], embedded[0].mean(0))      # the order of bytes matters


def tiny_encoders(folder):
    """Qwen2.5-VL and CLIP of width 32 and 24 with byte tokenizers, built from configs and saved as transformers saves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLModel
    torch.manual_seed(0)
    def tokenizer(path, special, **more):
        t = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        t.add_special_tokens(special)
        if "bos_token" in more:
            t.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A {special[1]}", special_tokens=[(s, t.token_to_id(s)) for s in special])
        PreTrainedTokenizerFast(tokenizer_object=t, **more).save_pretrained(path)
        return t.get_vocab_size()
    size = tokenizer(folder / "qwen", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pad_token="<|endoftext|>")
    text = dict(vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}, pad_token_id=size - 3)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[0])
    Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).save_pretrained(folder / "qwen")
    size = tokenizer(folder / "clip", ["<|startoftext|>", "<|endoftext|>"], bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    CLIPTextModel(CLIPTextConfig(vocab_size=size, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77,
                                 bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1)).save_pretrained(folder / "clip")
    return dict(text_encoder="qwen-clip", qwen=str(folder / "qwen"), clip=str(folder / "clip"), text_length=40)


def test_qwen_clip(dit, run, tmp_path, capsys):
    """The paper's encoders end to end, with tiny models of the same classes: encoding, caching, training, sampling."""
    transformers = pytest.importorskip("transformers")
    n = tiny_encoders(tmp_path)
    encode = dit.QwenClip(dit.Network(**(NETWORK | n)), "cpu")
    prompts = ["a red star", "", "x" * 10_000, "🦊", "שלום עולם"]
    pairs = encode(prompts)
    assert [len(tokens) for tokens, _ in pairs] == [11, 1, 40, 5, 18]                  # bytes and <|im_end|>, which a prompt that is cut loses
    for prompt, (tokens, pooled) in zip(prompts, pairs):                              # alone or in a batch, and as transformers gives it itself
        (alone, alone_pooled), = encode([prompt])
        torch.testing.assert_close(alone.view(torch.bfloat16), tokens.view(torch.bfloat16), atol=0.03, rtol=0.02)
        torch.testing.assert_close(alone_pooled, pooled, atol=1e-5, rtol=1e-5)
    words, qwen = transformers.AutoTokenizer.from_pretrained(n["qwen"]), transformers.AutoModel.from_pretrained(n["qwen"], dtype=torch.bfloat16)
    ids = words(dit.TEMPLATE + "a red star<|im_end|>", return_tensors="pt").input_ids
    with torch.no_grad():
        states = qwen(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -11:]
    torch.testing.assert_close(states, pairs[0][0].view(torch.bfloat16), atol=0.03, rtol=0.02)

    dit.main(settings(dit, run, **n))
    assert len(dit.main(settings(dit, run, sample=tuple(prompts[:3])))) == 3 and "cut to 40 tokens: xxx" in capsys.readouterr().out
    (run / "dit.pt").unlink()
    shutil.rmtree(run / "latents")
    assert "--text-width 32" in refused(lambda: dit.main(settings(dit, run, **(n | dict(text_width=64)))), capsys)
    assert "cannot be loaded" in refused(lambda: dit.main(settings(dit, run, **(n | dict(clip=str(tmp_path / "none"))))), capsys)


# ---------------------------------------------------------------- cached latents

def test_cache(dit, model, losses, data, run, monkeypatch):
    """Normalized samples of the posterior, mirrored ones too, and the prompts, of all that is not held out."""
    monkeypatch.setattr(dit, "PER_FILE", 6)
    vae, s = model.load_vae(run / "vae.pt"), settings(dit, run)
    folder = dit.cache(s, vae, data.parent(run / "vae.pt"), torch.device("cpu"))
    found = list(dit.captions(s, "train"))
    everything = [line["text"] for line in data.read_jsonl(run / "data" / "train" / "metadata.jsonl")]
    held = [text for text in everything if text.startswith(("a red circle", "a yellow square", "a green triangle", "a cyan star"))]
    assert held and sorted(text for _, text in found) == sorted(set(everything) - set(held))
    items = dit.Examples(folder, s)
    assert items.pictures == len(found) and len(items.files) == -(-len(found) // 6) > 1
    for i in (0, 7, len(found) - 1):
        file = dit.read_latents(folder / f"{i // 6:05d}.pt")
        assert file["latents"].shape[1:] == (2, 4, 6, 6) and file["latents"].dtype == torch.float16
        x = losses.from_uint8(data.center_crop(data.read_picture(run / "data" / "train", found[i][0]), 48)[None])
        for flipped in (0, 1):
            with torch.no_grad():
                q = vae.encode(x.flip(-1) if flipped else x)
            noise = torch.randn(1, 4, 6, 6, generator=data.generator(0, "latent", i, flipped))
            torch.testing.assert_close(file["latents"][i % 6, flipped:flipped + 1].float(), (q.sample(noise) - 0.5) / 2, atol=2e-3, rtol=2e-3)
        (expected, _), = dit.encode_bytes(s, [found[i][1]])
        start, end = file["bounds"][i % 6 + 1:i % 6 + 3]                                # the empty prompt stands first
        assert torch.equal(file["tokens"][start:end], expected)
    x, noise, t, (words, pooled) = items[5]
    assert all(torch.equal(a, b) for a, b in zip((x, noise, t), items[5][:3])) and not torch.equal(noise, items[6][1])
    drawn = [items[n] for n in range(2000)]
    times = torch.stack([item[2] for item in drawn])
    assert abs(sum(len(item[3][0]) == 1 for item in drawn) / 2000 - 0.1) < 0.03
    assert abs(times.logit().mean()) < 0.1 and abs(times.logit().std() - 1) < 0.06      # logit-normal
    # Every picture in both views is drawn, and never with another picture's prompt.
    texts = {tuple(v.flatten().tolist() for v in dit.encode_bytes(s, [text])[0][:1])[0].__repr__(): i for i, (_, text) in enumerate(found)}
    places = {}
    for i in range(len(found)):
        for flipped in (0, 1):
            places[dit.read_latents(folder / f"{i // 6:05d}.pt")["latents"][i % 6, flipped].float().sum().item()] = (i, flipped)
    seen = set()
    for x, _, _, (tokens, _) in drawn:
        i, flipped = places[x.sum().item()]
        seen.add((i, flipped))
        assert len(tokens) == 1 or found[texts[tokens.flatten().tolist().__repr__()]][1] == found[i][1]
    assert len(seen) == 2 * len(found)
    other_seed = dit.Examples(folder, settings(dit, run, seed=1))
    assert not torch.equal(noise, other_seed[5][1])


def test_cache_goes_on_where_it_stopped(dit, model, data, run, monkeypatch):
    """Files are complete or absent: only the one that was cut off is made again."""
    vae, s, parent = model.load_vae(run / "vae.pt"), settings(dit, run), data.parent(run / "vae.pt")
    monkeypatch.setattr(dit, "PER_FILE", 4)
    read = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()}
    whole = read(dit.cache(s, vae, parent, torch.device("cpu")))
    assert len(whole) > 3 and all(name.endswith((".pt", "made_from.json")) for name in whole)
    shutil.rmtree(run / "latents")
    calls, encode = [], model.VAE.encode
    def interrupted(self, x):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, x)
    monkeypatch.setattr(model.VAE, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dit.cache(s, vae, parent, torch.device("cpu"))
    assert set(read(run / "latents")) == {"00000.pt", "made_from.json"}
    (run / "latents" / ".00001.pt.tmp").write_bytes(b"left by a killed process")
    folder = dit.cache(s, vae, parent, torch.device("cpu"))
    assert {k: v for k, v in read(folder).items() if k != "made_from.json"} == {k: v for k, v in whole.items() if k != "made_from.json"}
    assert sum(calls) - calls[3] == 2 * len(list(dit.captions(s, "train"))) + calls[2]        # only the part that was cut off was made again


def test_cache_of_another_vae_is_refused(dit, model, run, capsys):
    dit.main(settings(dit, run, steps=1))
    small_vae(model, run / "vae_finetuned.pt", width=16)
    assert "was made from another VAE" in refused(lambda: dit.main(settings(dit, _moved(run), steps=2)), capsys)
    assert "has changed" in refused(lambda: dit.main(settings(dit, _moved(run), steps=2)), capsys)
    (run / "vae_finetuned.pt").unlink()
    assert "--size" in refused(lambda: dit.main(settings(dit, _moved(run), size=32)), capsys)
    _moved(run)
    made_from = run / "latents" / "made_from.json"
    made_from.write_text(made_from.read_text().replace('"data": "', '"data": "0'))
    assert "other data" in refused(lambda: dit.main(settings(dit, run, steps=2)), capsys)


def test_cache_of_another_peer_is_refused(dit, model, run, capsys):
    """Flux's and SD 3's files have the same shapes: whose latents these are is what they were normalized with."""
    torch.manual_seed(0)
    peer = model.build(model.Architecture(width=32, width_mult=(1, 1, 1, 1), res_blocks=1, attention_levels=(), padding="zeros", decoder_norm="group"))
    torch.save(peer.state_dict(), run / "ae.pt")
    flux = settings(dit, run, vae=str(run / "ae.pt"), peer="flux", latent_channels=16, steps=1)
    dit.main(flux)
    (run / "dit.pt").unlink()
    assert "by --peer" in refused(lambda: dit.main(settings(dit, run, vae=str(run / "ae.pt"), peer="sd3", latent_channels=16, steps=1)), capsys)
    deviation = torch.cat([dit.read_latents(p)["latents"].float() for p in (run / "latents").glob("*.pt")]).std().item()
    shutil.rmtree(run / "latents")
    dit.read_latents.cache_clear()
    dit.main(settings(dit, run, vae=str(run / "ae.pt"), peer="sd3", latent_channels=16, steps=1))
    other = torch.cat([dit.read_latents(p)["latents"].float() for p in (run / "latents").glob("*.pt")]).std().item()
    assert other / deviation == pytest.approx(1.5305 / 0.3611, rel=0.02)
    (run / "dit.pt").unlink()
    shutil.rmtree(run / "latents")
    assert "--peer" in refused(lambda: dit.main(settings(dit, run, vae=str(run / "ae.pt"), latent_channels=16)), capsys)


def _moved(run):
    """The same run folder without its dit.pt."""
    (run / "dit.pt").rename(run / "aside.pt") if (run / "dit.pt").exists() else (run / "aside.pt").rename(run / "dit.pt")
    return run


# ---------------------------------------------------------------- does it follow the prompt?

def test_rule_reads_real_scenes(dit, data):
    """At least 98% of scenes as 01 draws them, each of the four and all together, at the demo's size and others; and it can say no."""
    from torchvision.transforms.v2.functional import pil_to_tensor
    right, total, shuffled = torch.zeros(4), 0, 0
    for i in range(50):
        caption, draw = data.scene(5, i)
        x = pil_to_tensor(draw())
        words = caption.split()
        for size in (96, 256) if i % 10 == 0 else (96,):
            seen = data.read_scene(data.center_crop(data.resize_shorter(x, size), size))
            right += torch.tensor([a == b for a, b in zip(seen, (words[1], words[2], words[5], words[6]))])
            total += 1
            shuffled += dit.follow([data.center_crop(data.resize_shorter(x, size), size)], [data.scene(5, i + 1)[0]])["all four"]
    assert (right / total).min() >= 0.98 and shuffled / total < 0.1
    for x in (torch.zeros(3, 96, 96), torch.full((3, 96, 96), 128), torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))):
        assert len(data.read_scene(x.byte())) == 4                                       # a failed picture is read as something, not an error


def test_held_out_prompts(dit, data):
    prompts = dit.scene_prompts()
    assert len(prompts) == len(set(prompts)) == 80 and all(p.split()[1] != p.split()[6] for p in prompts)
    pairs = {tuple(p.split()[1:3]) for p in prompts}
    assert pairs == set(dit.HELD_OUT) and len({c for c, _ in pairs}) == len({s for _, s in pairs}) == 4
    scenes = [data.scene(0, i)[0].split() for i in range(4000)]
    chances = [sum(w[k] == "x" or w[k] == o[k] for w, o in zip(scenes, scenes[1:])) / len(scenes) for k in (1, 2, 5, 6)]
    for measured, name in zip(chances, ("color", "shape", "pattern", "ground")):
        assert measured == pytest.approx(dit.CHANCE[name], abs=0.03)
    assert len({tuple(w[i] for i in (1, 2, 5, 6)) for w in scenes}) == pytest.approx(1 / dit.CHANCE["all four"], abs=3)


def test_clip_score(dit, tmp_path):
    """A tiny CLIP gives 100 max(cos, 0), of a prompt that is too long too, in batches as alone."""
    transformers = pytest.importorskip("transformers")
    tiny_encoders(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "clip")
    torch.manual_seed(0)
    n, small = len(tokenizer), dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    clip = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=16, vision_config=small | dict(image_size=32, patch_size=8),
                                  text_config=small | dict(vocab_size=n, bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=n - 1))).eval()
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer)
    for part in (clip, processor):
        part.save_pretrained(tmp_path / "scorer")
    pictures, prompts, expected = torch.randint(0, 256, (3, 3, 48, 48)).byte(), ["a red star", "a cat", "x" * 100], []
    for picture, prompt in zip(pictures, prompts):
        with torch.no_grad():
            out = clip(**processor(text=[prompt], images=[picture], return_tensors="pt", truncation=True, max_length=77))
        expected.append(100 * (out.image_embeds * out.text_embeds).sum().clamp(min=0).item())
    scorer = dit.clip_scorer(str(tmp_path / "scorer"), torch.device("cpu"))
    assert [scorer([p], [t]) for p, t in zip(pictures, prompts)] == pytest.approx(expected, rel=1e-4) and max(expected) > 0
    assert scorer(list(pictures), prompts) == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert scorer(list(pictures) * 30, prompts * 30) == pytest.approx(sum(expected) / 3, rel=1e-4)


# ---------------------------------------------------------------- training

def test_checkpoint_log_and_pictures(dit, data, whole):
    file = checkpoint(whole)
    assert file["step"] == 8 and file["parent"] == data.parent(whole / "vae.pt") and file["architecture"]["head_axes"] == (4, 10, 10)
    assert any(not torch.equal(file["model"][k], v) for k, v in file["ema"].items())
    rows = log(whole)
    assert [r["step"] for r in rows] == list(range(1, 9)) and [r["step"] for r in rows if "all four" in r] == [4, 8]
    folder, s = whole / "latents", settings(dit, whole)
    items = dit.Examples(folder, s)
    for r in rows:                                                                      # each line: the mean of what is known of each quarter of t
        quarters = [int(4 * items[n][2]) for n in range(8 * (r["step"] - 1), 8 * r["step"])]
        parts = [(quarters.count(q), r[f"loss_t{q}"]) for q in range(4)]
        assert all((v is None) == (n == 0) for n, v in parts)
        assert r["loss"] == pytest.approx(sum(n * v for n, v in parts if n) / 8, rel=1e-5)
    torch.manual_seed(0)
    net = dit.build(s)
    x, noise, t, text = zip(*(items[n] for n in range(8)))
    first = dit.flow_loss(net, torch.stack(x), torch.stack(noise), torch.stack(t), *dit.pad(text)).mean()
    assert rows[0]["loss"] == pytest.approx(first.item(), rel=1e-5)
    assert Image.open(whole / "dit.png").width > 600 and Image.open(whole / "curve.png").width == 1500


def test_average_by_value(dit, run):
    """After the first step the average has moved by 1 - 2 / 11 from the start, whatever ema_decay is."""
    dit.main(settings(dit, run, steps=1))
    torch.manual_seed(0)
    start, file = dit.build(settings(dit, run)).state_dict(), checkpoint(run)
    for name, w in file["model"].items():
        torch.testing.assert_close(file["ema"][name], torch.lerp(start[name], w, 9 / 11), atol=1e-7, rtol=1e-5)


def test_warmup_and_clipping(dit, run, whole):
    """The first step moves a weight by lr / warmup at most (Adam's first step is the sign of the gradient)."""
    dit.main(settings(dit, run, steps=1, warmup=10))
    torch.manual_seed(0)
    start = dit.build(settings(dit, run)).state_dict()
    moved = max((v - start[k]).abs().max().item() for k, v in checkpoint(run)["model"].items())
    assert 0.9e-4 < moved < 1.01e-4


def killed_once(run):
    small_vae(importlib.import_module("02_model"), run / "vae.pt")
    killed(["07_train_dit.py", "--run", str(run), *FLAGS, "--steps", "8", "--workers", "2"], run, (5,))


@beside(killed_once)
def test_resume_after_kill_is_exact(outcome, whole):
    """kill -9 (before the first checkpoint: test_train.py); the same command goes on; everything equals the whole run's, bit for bit."""
    run, _ = outcome
    file = checkpoint(whole)
    same(checkpoint(run), file | {"settings": file["settings"] | {"workers": 2}, "parent": checkpoint(run)["parent"]})
    assert log(run) == log(whole)


def test_muon_resumes_exactly(dit, run, monkeypatch):
    """Stopped between two checkpoints, with a rate that falls: bit for bit the run that was not.
    Muon has the matrices of the blocks, AdamW everything else."""
    muon = settings(dit, run, optimizer="muon", decay=0.5, steps=6)
    dit.main(muon)
    whole = checkpoint(run)
    (run / "dit.pt").unlink()
    real = dit.train_step
    steps = iter(range(5))

    def interrupted(*inputs):
        if next(steps) == 4:
            raise KeyboardInterrupt
        return real(*inputs)

    monkeypatch.setattr(dit, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dit.main(muon)
    assert checkpoint(run)["step"] == 4
    monkeypatch.setattr(dit, "train_step", real)
    dit.main(muon)
    same(checkpoint(run), whole)
    assert whole["muon_optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.02 / 3)
    matrices = [name for name, w in whole["model"].items()
                if w.ndim > 1 and name.startswith(("refiner.", "blocks."))]
    assert len(whole["muon_optimizer"]["state"]) == len(matrices)
    assert len(whole["optimizer"]["state"]) == len(whole["model"]) - len(matrices)


def test_signal_saves(run, whole):
    """SIGTERM between two lines of the log: saved, and the losses since that line are not lost."""
    line = ["07_train_dit.py", "--run", run, *FLAGS, "--save-every", "100", "--log-every", "4",
            "--steps", "2000", "--val-every", "4000"]
    printed = run / "printed.txt"
    process = started(line, printed)
    while not (run / "log.jsonl").exists():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    text = finished(process, printed, 128 + signal.SIGTERM)
    assert "the same command goes on" in text and "Traceback" not in text, text
    file = checkpoint(run)
    assert 4 <= file["step"] < 2000 and file["window"][1].sum() == 8 * (file["step"] % 4)


def on_two_processes(run):
    small_vae(importlib.import_module("02_model"), run / "vae.pt")
    torchrun("07_train_dit.py", "--run", run, *FLAGS, "--steps", "8", "--optimizer", "muon")


@beside(on_two_processes)
def test_accumulation_and_processes(dit, run, outcome, tmp_path_factory):
    """With Muon for the blocks' matrices and AdamW for the rest, four parts, or two processes (gloo) with half of the batch each, follow the whole batch:
    losses to rounding at first, then as far as the optimizers let rounding grow."""
    whole = tmp_path_factory.mktemp("whole")
    two, _ = outcome
    for name in ("data", "vae.pt"):
        (whole / name).symlink_to((run / name).resolve())
    dit.main(settings(dit, whole, steps=8, optimizer="muon"))
    dit.main(settings(dit, run, steps=8, accumulate=4, optimizer="muon"))
    for other in (run, two):
        for i, (a, b) in enumerate(zip(log(other), log(whole), strict=True)):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5 if i == 0 else 5e-3), i
    # Each of the two drew half of the prompts, and every picture stands where it belongs.
    sheets = [torch.from_numpy(np.array(Image.open(folder / "dit.png"))).float() for folder in (two, whole)]
    assert (sheets[0] - sheets[1]).abs().mean() < 0.5
    latents = [dit.read_latents(folder / "latents" / "00000.pt") for folder in (two, whole)]
    assert all(torch.equal(latents[0][k], latents[1][k]) for k in ("tokens", "bounds")) and (latents[0]["latents"] - latents[1]["latents"]).abs().max() < 0.01


def test_rate_is_of_training_alone(dit, run, monkeypatch):
    """Pictures a second leave out the time in which validation pictures are drawn."""
    real = dit.draw
    monkeypatch.setattr(dit, "draw", lambda *a: (time.sleep(3), real(*a))[1])
    s = settings(dit, run, steps=2, log_every=2, val_every=2)
    dit.main(s)
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["pictures_per_second"] > 2 * s.batch / 3


def test_it_learns(dit, run):
    """Sixty steps: well below the first ones, as a whole and where there is much noise."""
    dit.main(settings(dit, run, steps=60, val_every=100, save_every=100, batch=16, lr=3e-3))
    mean = lambda rows, key: (lambda known: sum(known) / len(known))([r[key] for r in rows if r[key] is not None])
    for key in ("loss", "loss_t2", "loss_t3"):
        assert mean(log(run)[-15:], key) < 0.8 * mean(log(run)[:5], key), key


def test_non_finite_stops_and_keeps_the_last_good_checkpoint(dit, run, capsys, monkeypatch):
    dit.main(settings(dit, run))
    good = (run / "dit.pt").read_bytes()
    real = dit.flow_loss
    monkeypatch.setattr(dit, "flow_loss", lambda *a: real(*a) * float("inf"))
    sentence = refused(lambda: dit.main(settings(dit, run, steps=8, log_every=100)), capsys)
    assert "step 6: loss, gradient not finite" in sentence
    assert (run / "dit.pt").read_bytes() == good


def test_contradicting_flags(dit, run, capsys):
    dit.main(settings(dit, run, steps=2))
    for name, value in (("lr", 2e-3), ("blocks", 3), ("batch", 16), ("drop", 0.5), ("t_shift", 3.0), ("absolute", False)):
        assert f"--{name.replace('_', '-')} " in refused(lambda: dit.main(settings(dit, run, **{name: value})), capsys)
    assert "beyond --steps" in refused(lambda: dit.main(settings(dit, run, steps=1)), capsys)
    dit.main(settings(dit, run, steps=2, guidance=7.0, sample_steps=3))
    assert "finished" in capsys.readouterr().out


def test_sentences(dit, model, run, tmp_path_factory, capsys, data):
    stops = lambda **more: refused(lambda: dit.main(settings(dit, run, **more)), capsys)
    assert "--head-axes" in stops(head_axes=(6, 6, 6)) and "--head-axes" in stops(width=50)
    assert "--latent-channels 4" in stops(latent_channels=16)
    assert "--size 40" in stops(size=40) and "a side of 64" in stops(size=64)
    assert "--batch 9" in stops(batch=9, accumulate=2)
    assert "transformers" in stops(text_encoder="qwen-clip") if not _has("transformers") else True
    assert "--clip-score" in stops(clip_score="no/such")
    assert "run 04_train_vae.py first" in stops(vae=str(run / "none.pt"))
    vae = torch.load(run / "vae.pt", weights_only=True)
    torch.save(vae | {"latent_mean": None, "latent_std": None}, run / "unfinished.pt")
    assert "to its end" in stops(vae=str(run / "unfinished.pt"))
    bare = tmp_path_factory.mktemp("bare")
    pictures = bare / "pictures"
    pictures.mkdir()
    for i in range(4):
        data.TF.to_pil_image(torch.full((3, 60, 80), 40 * i, dtype=torch.uint8)).save(pictures / f"{i}.png")
    data.main(data.Settings(run=str(bare), images=str(pictures), min_side=48, resize=48, val_share=0.5, workers=0))
    small_vae(model, bare / "vae.pt")
    assert "has a caption" in refused(lambda: dit.main(settings(dit, bare)), capsys)
    assert "run 01_data.py first" in refused(lambda: dit.main(settings(dit, bare / "empty", vae=str(bare / "vae.pt"))), capsys)


def _has(package):
    import importlib.util
    return importlib.util.find_spec(package) is not None


def test_pictures_with_captions_of_their_own(dit, model, data, tmp_path):
    """Any folder with captions trains; without scenes there is no rule, so no curve, and validation prompts are the validation captions."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        data.TF.to_pil_image(torch.full((3, 60, 80), 20 * i, dtype=torch.uint8)).save(pictures / f"{i}.png")
        if i % 3:
            (pictures / f"{i}.txt").write_text(f"grey level {20 * i}")
    data.main(data.Settings(run=str(tmp_path), images=str(pictures), min_side=48, resize=48, val_share=0.4, workers=0))
    small_vae(model, tmp_path / "vae.pt")
    s = settings(dit, tmp_path, steps=1)
    dit.main(s)
    assert (tmp_path / "dit.png").exists() and not (tmp_path / "curve.png").exists()
    assert dit.Examples(tmp_path / "latents", s).pictures == len(list(dit.captions(s, "train")))
    assert all(text.startswith("grey level") for split in ("train", "val") for _, text in dit.captions(s, split))


# ---------------------------------------------------------------- --sample

def test_sample(dit, whole, capsys):
    """A labelled sheet of anything one can type; a picture depends on its prompt, place and seed, not on its neighbours."""
    draw = lambda *prompts, **more: dit.main(settings(dit, whole, sample=prompts, **more))
    many = draw("a red star", "", "x " * 5000, "🦊 🦊", "שלום עולם")
    assert len(many) == 5 and all(p.shape == (3, 48, 48) and p.dtype == torch.uint8 for p in many)
    out = capsys.readouterr().out
    assert "cut to 12 tokens: x x" in out and "wrote" in out and Image.open(whole / "sample.png").size == (4 * 196, 2 * 250)  # each pixel four wide
    alone, = draw("a red star")
    assert (alone.int() - many[0].int()).abs().max() <= 1 and torch.equal(alone, draw("a red star")[0])
    assert not torch.equal(alone, draw("a red star", seed=1)[0]) and not torch.equal(alone, draw("a blue circle")[0])


def test_sample_command_line(whole, tmp_path):
    """As it stands in the README, from another folder."""
    done = subprocess.run([sys.executable, ROOT / "07_train_dit.py", "--run", whole, "--sample", "a red star", "--sample-steps", "2", "--guidance", "5", "--shift", "2", "--seed", "3"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "1 pictures of" in done.stdout, done.stderr


def test_sample_sentences(dit, model, run, capsys):
    stops = lambda **more: refused(lambda: dit.main(settings(dit, run, **(dict(sample=("a star",), sample_steps=1) | more))), capsys)
    assert "without --sample" in stops()
    dit.main(settings(dit, run, steps=1))
    capsys.readouterr()
    assert "--sample-steps (0)" in stops(sample_steps=0) and "--shift" in stops(shift=0.0)
    (run / "vae.pt").rename(run / "moved.pt")
    assert "is gone: give --vae" in stops()
    dit.main(settings(dit, run, sample=("a star",), sample_steps=1, vae=str(run / "moved.pt")))
    small_vae(model, run / "vae.pt", width=16)
    assert "another hash" in stops()
    (run / "dit.pt").write_bytes(b"half a file")
    assert "cannot be read" in stops()


def test_seeds_differ(data):
    """Also in bits that PyTorch's CPU generator does not look at."""
    draw = lambda *key: torch.randn(4, generator=data.generator(*key))
    assert torch.equal(draw(0, 5), draw(0, 5)) and not torch.equal(draw(0, 5), draw(1, 5)) and not torch.equal(draw(1, 5), draw(1 + 2 ** 32, 5))


if __name__ == "__main__":
    net, ours = our_output(importlib.import_module("07_train_dit"))
    theirs = reference_output(net.state_dict(), exact=True)
    REFERENCE.write_text(json.dumps({"velocity": [float(f"{v:.8g}") for v in theirs.flatten().tolist()]}))
    rounded = reference_output(net.state_dict(), exact=False)
    print(f"wrote {REFERENCE}; ours differs by {(ours - theirs).abs().max():.2g}, by {(ours - rounded).abs().max():.2g} with diffusers' rounding of queries and keys to bfloat16")


def test_curve_of_a_run_that_dropped_its_clip_score(dit, tmp_path):
    """--clip-score '' on resuming a run on scenes: the curve has what every line has."""
    shares = dict.fromkeys(dit.CHANCE, 0.5)
    lines = [dict(step=1, clip_score=30.0, **shares), dict(step=2, **shares)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dit.draw_curve(tmp_path)
    assert Image.open(tmp_path / "curve.png").width == 300 * len(shares)
