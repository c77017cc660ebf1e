"""07_train_dit.py: counts, masks, objective and sampler, text, latents, training."""
import types
from dataclasses import replace

import pytest
import torch
from conftest import (NETWORK, checkpoint, data, dit, dit_settings, losses, model, refused,
                      small_vae, tiny_models)
from reference import fill, formula


def network():
    """A small network with random weights everywhere, modulation too."""
    return fill(dit.DiT(dit.Network(**NETWORK, latent_channels=4)))


@pytest.fixture
def run(new_run):
    run = new_run()
    small_vae(run / "vae.pt", latent_channels=4)
    return run


def settings(run, **more):
    return dit_settings(run, **(dict(latent_channels=4) | more))


def test_the_papers_numbers():
    """Kandinsky 5 Lite's counts."""
    with torch.device("meta"):
        net = dit.DiT(dit.Network())
    parts = [model.count(part) for part in (net.text, net.refiner, net.blocks, net)]
    assert parts == [6_427_904, 88_116_480, 1_909_391_360, 2_007_580_992]


def test_padding_never_changes_a_result():
    """A batch equals each prompt alone, whatever stands in the padding."""
    net = network()
    x = formula(4, 4, 6, 8)
    t = torch.tensor([0.05, 0.4, 0.7, 1.0])
    prompts = ["a red star", "", "a small cyan circle on a dotted yellow background", "word " * 40]
    tokens, mask, pooled = net.bytes(prompts)
    assert mask.sum(1).tolist() == [4, 1, 10, 12] and tokens.shape == (4, 12, 32)
    together = net(x, t, tokens, mask, pooled)
    for i in range(4):
        alone = net(x[i:i + 1], t[i:i + 1], *net.bytes(prompts[i:i + 1]))
        torch.testing.assert_close(alone, together[i:i + 1], atol=2e-5, rtol=1e-4)
    spoilt = torch.where(mask[..., None], tokens, 77.0)
    torch.testing.assert_close(net(x, t, spoilt, mask, pooled), together, atol=2e-5, rtol=1e-4)


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
    assert dit.flow_loss(net, x, noise, t, (False,)) == (noise - x).square().mean()


@pytest.mark.parametrize("steps, shift, guidance", [(1, 1.0, 1.0), (7, 3.0, 5.0), (50, 0.5, 2.0)])
def test_sampler(steps, shift, guidance):
    """Where all pictures are x0, and x0 + 0.1 with the prompt, Euler's steps end at x0 + 0.1 w with
    guidance w; what is drawn are latents times deviation plus mean. The VAE does nothing here."""
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


def test_bytes():
    """Each byte has a table of its place in the word; long words go on in the next piece."""
    encode = network().bytes
    lengths = encode(["", "a red star", "x" * 40, "word " * 99, "🦊🦊"])[1].sum(1)
    assert lengths.tolist() == [1, 4, 4, 12, 3]
    tokens = encode(["red der"])[0]
    place = [1 + 256 * i + ord(letter) for i, letter in enumerate("red")]
    torch.testing.assert_close(tokens[0, 1], encode.table.weight[place].sum(0))


def test_qwen_clip(run, tmp_path, capsys):
    """Qwen's states, CLIP's, its score, 100 max(cos, 0), and a run; prompts of any length."""
    transformers = pytest.importorskip("transformers")
    s = settings(run, steps=1, **tiny_models(tmp_path))
    prompts = ["a red star", "", "x" * 10_000, "🦊"]
    tokens, mask, pooled = dit.QwenClip(s, "cpu")(prompts)
    assert mask.sum(1).tolist() == [11, 1, 40, 5]  # bytes and <|im_end|>, or as many as fit
    words = transformers.AutoTokenizer.from_pretrained(s.qwen)
    qwen = transformers.AutoModel.from_pretrained(s.qwen, dtype=torch.bfloat16)
    ids = words(dit.TEMPLATE + "a red star<|im_end|>", return_tensors="pt").input_ids
    states = qwen(input_ids=ids).last_hidden_state[0, -11:].float()
    torch.testing.assert_close(states, tokens[0, :11], atol=0.03, rtol=0.02)
    clip = transformers.CLIPModel.from_pretrained(s.clip).eval()
    pictures = list(torch.randint(0, 256, (4, 3, 48, 48)).byte())
    process = transformers.CLIPProcessor.from_pretrained(s.clip)
    out = clip(**process(text=prompts, images=pictures, return_tensors="pt", padding=True,
                         truncation=True, max_length=77))
    projected = torch.nn.functional.normalize(clip.text_projection(pooled))
    torch.testing.assert_close(projected, out.text_embeds)
    expected = 100 * (out.image_embeds * out.text_embeds).sum(1).clamp(min=0).mean()
    score = dit.clip_scorer(s.clip, torch.device("cpu"))(pictures * 30, prompts * 30)
    assert score == pytest.approx(expected.item(), rel=1e-4) and score > 0
    dit.main(s)
    dit.main(dit_settings(run, sample=("a red star",)))  # with the encoders of dit.pt
    moved = str((tmp_path / "qwen").rename(tmp_path / "elsewhere"))
    dit.main(dit_settings(run, sample=("a red star",), qwen=moved))
    dit.main(replace(s, steps=2, qwen=moved))
    weights = {k: w for k, w in qwen.state_dict().items() if "language_model.norm" not in k}
    qwen.save_pretrained(moved, state_dict=weights)
    sentence = refused(lambda: dit.QwenClip(replace(s, qwen=moved), "cpu"), capsys)
    assert "lacks 1 weights: language_model.norm" in sentence


def test_latents(run):
    """Samples of the posterior of each picture and its mirror image, whose mean and deviation 07
    measures; a file that was cut off goes on to the same bits."""
    dit.main(settings(run, steps=1))
    vae = dit.finetuning.load_vae(run / "vae.pt")
    files = [picture["file"] for picture in data.read_list(run, "train", 48)]

    s = settings(run)
    key = dit.latents_key(s, str(run / "vae.pt"), files)
    z = dit.encode_all(s, vae, key, files, "cpu").float()
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
    cut = 15 * 4 * 36 * 2  # from the middle of picture 7 on nothing is there yet
    path.write_bytes(whole[:cut] + bytes(len(whole) - cut))
    dit.encode_all(s, vae, key, files, "cpu")
    assert path.read_bytes() == whole


def test_batch(run, monkeypatch):
    """Every picture in both views, with its own prompt or, in a tenth, none; logit-normal times."""
    latents = torch.arange(20.0).view(10, 2, 1, 1, 1).expand(10, 2, 4, 2, 2)
    pictures = [{"text": str(i)} for i in range(10)]
    monkeypatch.setattr(dit, "flow_loss", lambda net, x, noise, t, text: (x, t, text[0]))
    x, t, prompts = dit.batch_loss(network(), lambda prompts: (prompts,), latents, pictures,
                                   settings(run, batch=4000))
    numbers = x[:, 0, 0, 0].long().tolist()
    assert set(numbers) == set(range(20))
    assert all(prompt in ("", str(i // 2)) for prompt, i in zip(prompts, numbers))
    assert prompts.count("") / 4000 == pytest.approx(0.1, abs=0.02)
    assert abs(t.logit().mean()) < 0.05 and abs(t.logit().std() - 1) < 0.05


def test_sample(run):
    """A picture depends on its prompt and what is asked for; anything one can type is drawn."""
    dit.main(settings(run, steps=1, lr=0.1, warmup=0, guidance=4.0))
    sheets = []
    for more in ({}, {}, dict(guidance=4.0), dict(sample=("x " * 5000, "🦊", ""))):
        dit.main(settings(run, **(dict(sample=("a red star",)) | more)))
        sheets.append((run / "sample.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]
    assert data.Image.open(run / "sample.png").size == (3 * 196, 250)


def test_sentences(run, tmp_path, capsys):
    none = str(tmp_path)
    broken = checkpoint(run / "vae.pt")
    broken["ema"]["encoder.conv_out.bias"] += 1e6
    torch.save(broken, run / "broken.pt")
    for words, more in (("run 07_train_dit.py", dict(sample=("x",))), ("not 128", dict(size=128)),
                        ("--latent-channels 4", dict(latent_channels=16)),
                        ("or bytes", dict(text_encoder="qwen-clip", qwen=none)),
                        ("and that model", dict(clip_score=none)),
                        ("not finite", dict(vae=str(run / "broken.pt")))):
        assert words in refused(lambda: dit.main(settings(run, **more)), capsys)
