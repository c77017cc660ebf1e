"""02_model.py: sizes, the two architectural cures, equality with others' networks, and files."""
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import model, peer_files, refused, same, small_vae
from reference import EVERY, FILE, diffusers_outputs, flow_inputs, formula, networks

FLUX = dict(width_mult=(1, 2, 4, 4), attention_levels=(), padding="zeros", decoder_norm="group")


@pytest.mark.parametrize("changes, parameters", [
    ({}, 68_227_747),  # MoVQGAN-67M with 16 latent channels
    (FLUX, 83_819_683),  # Flux and SD 3
    (FLUX | dict(latent_channels=4, quant_conv=True), 83_653_863)])  # kl-f8, SD 1.x, SDXL
def test_parameter_counts(changes, parameters):
    with torch.device("meta"):
        assert model.count(model.VAE(model.Architecture(**changes))) == parameters


@pytest.mark.parametrize("padding", ["reflect", "zeros"])
@pytest.mark.parametrize("norm", ["spatial", "group"])
def test_switches(padding, norm):
    """Each reaches every convolution, every norm of the decoder. In a flat picture nothing but
    padding can tell the border from the interior, and reflect cures that."""
    vae = small_vae(padding=padding, decoder_norm=norm, attention_levels=(3,))
    convolutions = [m for m in vae.modules() if isinstance(m, torch.nn.Conv2d)]
    assert {m.padding_mode for m in convolutions if m.padding != (0, 0)} == {padding}
    count = sum(isinstance(m, model.SpatialNorm) for m in vae.modules())
    assert count == (24 if norm == "spatial" else 0)
    z = vae.encode(torch.full((1, 3, 64, 96), 0.3)).mu
    x_hat = vae.decode(z)
    assert z.shape == (1, 16, 8, 12) and x_hat.shape == (1, 3, 64, 96)
    for y in (z, x_hat):
        flat = (y - y.mean((2, 3), keepdim=True)).abs().max() < 1e-4
        assert flat == (padding == "reflect")


def test_broadcasting_is_interpolation():
    """GroupNorm(x) * y(up(z)) + b(up(z)), and up-sampling: values and gradients."""
    a = model.Architecture(groups=8, latent_channels=4)
    norm = model.SpatialNorm(24, a).double()
    upsample = model.Upsample(24, a).double()
    x = (3 + 2 * torch.randn(2, 24, 16, 24, dtype=torch.double)).requires_grad_()
    z = torch.randn(2, 4, 4, 6, dtype=torch.double, requires_grad=True)
    up = F.interpolate(z, size=x.shape[2:], mode="nearest")
    pairs = ((norm(x, z), F.group_norm(x, 8, eps=1e-6) * norm.conv_y(up) + norm.conv_b(up)),
             (upsample(x), upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))))
    for pair in pairs:
        torch.testing.assert_close(*pair, atol=1e-12, rtol=0)
        gradients = [torch.autograd.grad(y.sin().sum(), (x, z, norm.conv_y.weight),
                                         allow_unused=True, materialize_grads=True) for y in pair]
        torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("theirs", ["stored", "installed"])
def test_equals_others_networks(theirs):
    """With weights that are formulas, diffusers' AutoencoderKL (Flux, SD 3), MoVQGAN's decoder with
    spatial norm, and Kandinsky 5's transformer."""
    if theirs == "stored":
        expected = {k: torch.tensor(v) for k, v in json.loads(FILE.read_text()).items()}
    else:
        pytest.importorskip("diffusers")
        expected = {k: v.flatten()[::EVERY] for k, v in diffusers_outputs().items()}
    kl, movq, k5 = networks()
    ours = {"kl encoded": kl.encode(formula(1, 3, 32, 48)).mu,
            "kl decoded": kl.decode(formula(1, 16, 4, 6)),
            "movq decoded": movq.decode(formula(1, 4, 4, 6)), "velocity": k5(*flow_inputs())}
    assert ours.keys() == expected.keys()
    for name, numbers in expected.items():
        error = (ours[name].flatten()[::EVERY] - numbers).abs().max()
        assert numbers.std() > 0.01 and error < 1e-5 * numbers.abs().max().clamp(min=1), name


def test_files_of_others(tmp_path):
    """As published, whole models in half precision too, and safetensors whatever their name."""
    files = peer_files()
    for name, (weights, contents) in files.items():
        torch.save(contents, tmp_path / name)
    safetensors = pytest.importorskip("safetensors.torch")
    files["safe"] = files["flux"]
    safetensors.save_file(files["flux"][1], tmp_path / "safe")
    for name, (weights, _) in files.items():
        vae = model.load_vae(tmp_path / name)
        assert vae.architecture.padding == "zeros"
        for key, w in vae.state_dict().items():
            tolerance = 1e-3 if name == "sd1" else 0
            torch.testing.assert_close(w, weights[key], atol=tolerance, rtol=tolerance)
        x = torch.rand(1, 3, 32, 40) * 2 - 1
        assert vae.decode(vae.encode(x).sample()).shape == x.shape


def test_lightning_checkpoint(tmp_path, monkeypatch):
    """Classes and instances pickled beside the weights are not run."""
    module = types.ModuleType("pytorch_lightning")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning"})
    weights, contents = peer_files()["kl-f8"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", module)
        beside = {module.ModelCheckpoint: {"score": torch.ones(())}, "x": module.ModelCheckpoint()}
        torch.save(contents | {"callbacks": beside}, tmp_path / "model.ckpt")
    same(dict(model.load_vae(tmp_path / "model.ckpt").state_dict()), dict(weights))


def test_what_does_not_fit_is_named(tmp_path, capsys):
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    (tmp_path / "text").write_text("no weights")
    for name, words in (("", "diffusers:"), ("pointer", "git lfs"), ("x.pt", "x.pt is missing"),
                        ("text", "read as weights"), ("vae.pt", "run 04_train_vae.py first")):
        assert words in refused(lambda: model.load_vae(tmp_path / name), capsys)
    contents = peer_files()["flux"][1]
    path = tmp_path / "x.pt"
    name = "decoder.mid.block_1.conv1.bias"
    for changes, words in (({name: None}, f'Missing key(s) in state_dict: "{name}"'),
                           ({"encoder.surprise": torch.zeros(1)}, '"encoder.surprise"'),
                           (dict.fromkeys(contents), "diffusers:FOLDER")):
        torch.save({k: w for k, w in (contents | changes).items() if w is not None}, path)
        assert words in refused(lambda: model.load_vae(path), capsys)
    for bad in (dict(attention_levels=(4,)), dict(width=33)):
        assert "--" in refused(lambda: model.architecture(model.Settings(**bad)), capsys)
