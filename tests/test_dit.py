"""07_train_dit.py: counts, masks, objective and sampler, text, latents, training."""
import types
from dataclasses import replace

import pytest
import torch
from conftest import (NETWORK, checkpoint, data, dit, dit_settings, losses, model, refused,
                      small_vae)
from reference import fill, formula

PROMPTS = ["a red star", "", "a small cyan circle on a dotted yellow background", "word " * 40]


def network(**more):
    """A small network with random weights everywhere, modulation too."""
    return fill(dit.DiT(dit.Network(**(NETWORK | dict(latent_channels=4) | more))))


@pytest.fixture
def run(new_run):
    run = new_run()
    small_vae(run / "vae.pt", latent_channels=4)
    return run


def settings(run, **more):
    return dit_settings(run, **(dict(latent_channels=4) | more))


# ---------------- the network

def test_the_papers_numbers():
    """Kandinsky 5 Lite's count (equality with its code: test_model.py), and Table 4."""
    with torch.device("meta"):
        net = dit.DiT(dit.Network())
    parts = (net.time, net.text, net.pooled, net.patches, net.refiner, net.blocks)
    assert [model.count(part) for part in parts] == [
        1_180_672, 6_427_904, 394_752, 116_480, 88_116_480, 1_909_391_360]
    assert model.count(net) == 2_007_580_992
    s = dit.Settings()
    assert (s.lr, s.beta1, s.beta2, s.eps, s.weight_decay) == (1e-4, 0.9, 0.95, 1e-8, 0.0)
    assert (s.clip_norm, s.warmup, s.size, s.batch, s.steps) == (1.0, 1000, 256, 1024, 130_000)


def test_padding_never_changes_a_result():
    """A batch of many prompts equals each alone, whatever stands in the padding."""
    net = network()
    x = formula(4, 4, 6, 8)
    t = torch.tensor([0.05, 0.4, 0.7, 1.0])
    tokens, mask, pooled = net.bytes(PROMPTS)
    assert mask.sum(1).tolist() == [4, 1, 10, 12] and tokens.shape == (4, 12, 32)
    together = net(x, t, tokens, mask, pooled)
    for i in range(4):
        alone = net(x[i:i + 1], t[i:i + 1], *net.bytes(PROMPTS[i:i + 1]))
        torch.testing.assert_close(alone, together[i:i + 1], atol=2e-5, rtol=1e-4)
    spoilt = torch.where(mask[..., None], tokens, 77.0)
    torch.testing.assert_close(net(x, t, spoilt, mask, pooled), together, atol=2e-5, rtol=1e-4)
    assert (net(x, t, *net.bytes(PROMPTS[::-1])) - together).abs().max() > 1e-2


# ---------------- objective and sampler

def test_flow():
    """x_t lies on the line, and a network that knows its velocity has no loss."""
    x = formula(3, 4, 6, 6)
    noise = x.flip(0)
    t = torch.tensor([0.0, 0.25, 1.0])

    def net(x_t, times, text):
        torch.testing.assert_close(x_t[1], 0.75 * x[1] + 0.25 * noise[1])
        assert torch.equal(x_t[0], x[0]) and torch.equal(x_t[2], noise[2])
        return noise - x if text else torch.zeros_like(x)

    assert dit.flow_loss(net, x, noise, t, (True,)) == 0
    expected = (noise - x).square().mean()
    torch.testing.assert_close(dit.flow_loss(net, x, noise, t, (False,)), expected)


@pytest.mark.parametrize("steps, shift, guidance", [(1, 1.0, 1.0), (7, 3.0, 5.0), (50, 0.5, 2.0)])
def test_sampler(steps, shift, guidance):
    """With one picture x0 in the world, and x0 + 0.1 with the prompt, Euler's steps end there;
    guidance w goes along v_empty + w (v_prompt - v_empty), so to x0 + 0.1 w; what is drawn are
    latents times deviation plus mean. The VAE here passes pictures of 12 px on."""
    x0 = 0.5 * formula(1, 3, 12, 12)
    times = []

    def net(x, t, prompt):
        times.append(t[0].item())
        return (x - x0 - (0.1 if prompt else 0)) / t[:, None, None, None]

    net.latent_mean = torch.full((3, 1, 1), 0.2)
    net.latent_std = torch.full((3, 1, 1), 0.5)
    vae = types.SimpleNamespace(encode=model.Posterior, decode=lambda z: z)
    s = settings("", size=12, sample_steps=steps, shift=shift, guidance=guidance,
                 latent_channels=3)
    pictures = dit.draw(net, vae, lambda prompts: (prompts[0] == "prompt",), ["prompt"], s)
    expected = losses.to_uint8(0.5 * (x0 + 0.1 * guidance) + 0.2)[0]
    assert (pictures[0].int() - expected.int()).abs().max() <= 1
    line = dit.shifted(torch.linspace(1, 0, steps + 1), shift)[:-1]
    torch.testing.assert_close(torch.tensor(times[::2]), line)


# ---------------- text

def test_bytes():
    """Each byte has a table of its place in the word; long words go on in the next piece."""
    encode = network().bytes
    table = encode.table.weight
    lengths = [len(own) for own in
               (encode([p])[1][0] for p in ("", "a red star", "x" * 40, "word " * 99, "🦊🦊"))]
    assert lengths == [1, 4, 4, 12, 3]
    tokens, mask, pooled = encode(["red der"])
    place = [1 + 256 * i + ord(letter) for i, letter in enumerate("red")]
    torch.testing.assert_close(tokens[0, 1], table[place].sum(0))
    assert not torch.allclose(tokens[0, 1], tokens[0, 2])  # the order of bytes matters
    torch.testing.assert_close(pooled[0], tokens[0].mean(0))
    chinese = encode(["一只红色的狐狸坐在雪地里看着月亮", "一只红色的狐狸坐在雪地里看着太阳"])
    assert (chinese[0][0] - chinese[0][1]).abs().max() > 0.01


def tiny_models(folder):
    """Qwen2.5-VL and CLIP of width 32 and 24 with byte tokenizers, saved as transformers does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor,
                              PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLModel)
    torch.manual_seed(0)

    def tokenizer(special):
        letters = enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
        t = Tokenizer(models.BPE({letter: i for i, letter in letters}, []))
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.add_special_tokens(special)
        return t

    qwen = tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    n = qwen.get_vocab_size()
    PreTrainedTokenizerFast(tokenizer_object=qwen, pad_token="<|endoftext|>").save_pretrained(
        folder / "qwen")
    text = dict(vocab_size=n, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, pad_token_id=n - 3,
                rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32,
                  fullatt_block_indexes=[0])
    Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).save_pretrained(
        folder / "qwen")
    words = tokenizer(["<|startoftext|>", "<|endoftext|>"])
    n = words.get_vocab_size()
    words.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", n - 2), ("<|endoftext|>", n - 1)])
    words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|endoftext|>")
    small = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    clip = CLIPModel(CLIPConfig(
        projection_dim=16, vision_config=small | dict(image_size=32, patch_size=8),
        text_config=small | dict(vocab_size=n, bos_token_id=n - 2, eos_token_id=n - 1,
                                 pad_token_id=n - 1))).eval()
    size = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (clip, CLIPProcessor(CLIPImageProcessor(**size), words)):
        part.save_pretrained(folder / "clip")
    return dict(text_encoder="qwen-clip", qwen=str(folder / "qwen"), clip=str(folder / "clip"),
                text_length=40, text_width=32, pooled_width=24)


def test_qwen_clip(run, tmp_path, capsys):
    """The paper's encoders end to end, with tiny models of the same classes, and in FP32 too."""
    transformers = pytest.importorskip("transformers")
    more = tiny_models(tmp_path)
    s = settings(run, steps=2, **more)
    prompts = ["a red star", "", "x" * 10_000, "🦊"]
    tokens, mask, pooled = dit.QwenClip(s, "cpu")(prompts)
    # A prompt's bytes and <|im_end|>, which a prompt that is cut loses
    assert mask.sum(1).tolist() == [11, 1, 40, 5] and pooled.shape == (4, 24)
    words = transformers.AutoTokenizer.from_pretrained(more["qwen"])
    qwen = transformers.AutoModel.from_pretrained(more["qwen"], dtype=torch.bfloat16)
    ids = words(dit.TEMPLATE + "a red star<|im_end|>", return_tensors="pt").input_ids
    with torch.no_grad():
        states = qwen(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -11:]
    torch.testing.assert_close(states.float(), tokens[0, :11], atol=0.03, rtol=0.02)
    dit.main(s)
    dit.main(dit_settings(run, sample=tuple(prompts[:3])))  # with the encoders of dit.pt
    assert (run / "sample.png").is_file()
    gone = replace(s, clip=str(tmp_path / "none"))
    assert "bytes needs nothing" in refused(lambda: dit.main(gone), capsys)


def test_clip_score(tmp_path):
    """A tiny CLIP gives 100 max(cos, 0), of a prompt that is too long too, in batches as alone."""
    transformers = pytest.importorskip("transformers")
    folder = tiny_models(tmp_path)["clip"]
    clip = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    pictures = list(torch.randint(0, 256, (3, 3, 48, 48)).byte())
    prompts = ["a red star", "a cat", "x" * 100]
    expected = []
    for picture, prompt in zip(pictures, prompts):
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt", truncation=True,
                           max_length=77)
        with torch.no_grad():
            out = clip(**inputs)
        cosine = (out.image_embeds * out.text_embeds).sum()
        expected.append(100 * cosine.clamp(min=0).item())
    score = dit.clip_scorer(folder, torch.device("cpu"))
    assert score(pictures * 30, prompts * 30) == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert max(expected) > 0


# ---------------- latents

def test_latents(run):
    """Samples of the posterior of each picture and its mirror image, whose mean and deviation 07
    measures; a file that was cut off goes on to the same bits; another size has another file."""
    dit.main(settings(run, steps=1))
    vae = dit.finetuning.load_vae(run / "vae.pt")
    files = [picture["file"] for picture in data.read_list(run, "train", 48)]

    def encode(**more):
        s = settings(run, **more)
        key = dit.latents_key(s, str(run / "vae.pt"), files)
        return dit.encode_all(s, vae, key, files, "cpu")

    z = encode().float()
    x = losses.from_uint8(data.read_square(files[3], 48)[None])
    for view, seen in enumerate((x, x.flip(-1))):
        with torch.no_grad():
            q = vae.encode(seen)
        error = (z[3, view] - q.mu) / (0.5 * q.logvar).exp()  # standard normal
        assert error.abs().max() < 5 and 0.7 < error.std() < 1.3
    kept = checkpoint(run / "dit.pt")["ema"]
    torch.testing.assert_close(kept["latent_mean"].flatten(), z.mean((0, 1, 3, 4)))
    torch.testing.assert_close(kept["latent_std"].flatten(), z.std((0, 1, 3, 4)))
    path, = run.glob("latents-*.bin")
    whole = path.read_bytes()
    with open(path, "r+b") as f:  # from the middle of picture 7 on nothing is there yet
        f.seek(15 * 4 * 36 * 2)
        f.write(bytes(len(whole) - f.tell()))
    encode()
    assert path.read_bytes() == whole and len(list(run.glob("latents-*"))) == 1
    encode(size=32)
    assert len(list(run.glob("latents-*.bin"))) == 2


def test_batch(run, monkeypatch):
    """Every picture in both views is drawn, with its own prompt or, in a tenth, none; times are
    logit-normal."""
    latents = torch.arange(20.0).view(10, 2, 1, 1, 1).expand(10, 2, 4, 2, 2)
    pictures = [{"text": str(i)} for i in range(10)]
    monkeypatch.setattr(dit, "flow_loss", lambda net, x, noise, t, text: (x, t, text[0]))
    x, t, prompts = dit.batch_loss(network(), lambda prompts: (prompts,), latents, pictures,
                                   settings(run, batch=4000))
    number = x[:, 0, 0, 0].long().tolist()
    assert set(number) == set(range(20))
    assert all(prompt in ("", str(i // 2)) for prompt, i in zip(prompts, number))
    assert prompts.count("") / 4000 == pytest.approx(0.1, abs=0.02)
    assert abs(t.logit().mean()) < 0.05 and abs(t.logit().std() - 1) < 0.05


def test_sample(run):
    """A picture depends on its prompt and the seed alone; anything one can type is drawn."""
    dit.main(settings(run, steps=1, lr=0.1, warmup=0))
    sheets = []
    for more in ({}, {}, dict(seed=1), dict(sample=("x " * 5000, "🦊", ""))):
        dit.main(settings(run, **(dict(sample=("a red star",)) | more)))
        sheets.append((run / "sample.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]
    assert data.Image.open(run / "sample.png").size == (3 * 196, 250)


def test_sentences(run, tmp_path, capsys):
    for words, more in (("run 07_train_dit.py", dict(sample=("x",))),
                        ("--batch 9", dict(batch=9, accumulate=2)), ("not 64", dict(size=64)),
                        ("--latent-channels 4", dict(latent_channels=16)),
                        ("'' goes without", dict(clip_score=str(tmp_path))),
                        ("run 04_train_vae.py first", dict(vae=str(run / "none.pt")))):
        assert words in refused(lambda: dit.main(settings(run, **more)), capsys)
    dit.main(settings(run, steps=1))
    small_vae(run / "vae.pt", latent_channels=4, width=16)
    assert "has changed" in refused(lambda: dit.main(settings(run, steps=2)), capsys)


