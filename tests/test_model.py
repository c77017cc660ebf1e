"""02_model.py: sizes, the two architectural cures, equality with others' networks, and every file
that load_vae reads."""
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, dit, model, refused, small_vae
from reference import EVERY, FILE, K5, KL, MOVQ, diffusers_outputs, fill, flow_inputs, formula

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
def test_shapes_and_switches(padding, norm):
    """Each switch reaches every convolution with padding, every norm of the decoder."""
    vae = small_vae(padding=padding, decoder_norm=norm, attention_levels=(3,))
    x_hat, mu, logvar, z = vae(torch.zeros(2, 3, 40, 72))
    assert mu.shape == logvar.shape == z.shape == (2, 16, 5, 9) and x_hat.shape == (2, 3, 40, 72)
    convolutions = [m for m in vae.modules() if isinstance(m, torch.nn.Conv2d)]
    assert {m.padding_mode for m in convolutions if m.padding != (0, 0)} == {padding}
    count = sum(isinstance(m, model.SpatialNorm) for m in vae.modules())
    assert count == (24 if norm == "spatial" else 0)
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(torch.zeros(1, 3, 36, 32))


def test_spatial_norm_is_its_definition():
    """GroupNorm(x) * y(up(z)) + b(up(z)), with the convolutions at full resolution as the papers
    write it."""
    torch.manual_seed(0)
    a = model.Architecture(groups=8, latent_channels=4)
    norm = model.SpatialNorm(24, a).double()
    x = 3 + 2 * torch.randn(2, 24, 16, 24, dtype=torch.double)
    z = torch.randn(2, 4, 4, 6, dtype=torch.double)
    up = F.interpolate(z, size=x.shape[2:], mode="nearest")
    expected = F.group_norm(x, 8, eps=1e-6) * norm.conv_y(up) + norm.conv_b(up)
    torch.testing.assert_close(norm(x, z), expected, atol=1e-12, rtol=0)


def test_reflect_padding_cures_the_border_of_a_flat_picture():
    """There nothing but padding can tell the border from the interior."""
    for padding, same in (("reflect", True), ("zeros", False)):
        vae = small_vae(padding=padding)
        with torch.no_grad():
            z = vae.encode(torch.full((1, 3, 64, 64), 0.3)).mu
            x_hat = vae.decode(z)
        assert ((z - z[..., 4:5, 4:5]).abs().max() < 1e-4) == same
        assert ((x_hat - x_hat[..., 32:33, 32:33]).abs().max() < 1e-4) == same


@torch.no_grad()
def our_outputs():
    kl = fill(model.VAE(model.Architecture(**KL)))
    movq = fill(model.VAE(model.Architecture(**MOVQ)))
    k5 = fill(dit.DiT(dit.Network(**K5)))
    outputs = {"kl encoded": kl.encode(formula(1, 3, 32, 48)).mu,
               "kl decoded": kl.decode(formula(1, 16, 4, 6)),
               "movq decoded": movq.decode(formula(1, 4, 4, 6)), "velocity": k5(*flow_inputs())}
    return outputs, (kl.state_dict(), movq.state_dict(), dict(k5.named_parameters()))


def test_equals_others_networks():
    """Stored numbers of diffusers' networks for weights that are formulas: Flux's and SD 3's
    autoencoder, MoVQGAN's decoder with spatial norm, Kandinsky 5's transformer."""
    ours, _ = our_outputs()
    for name, numbers in json.loads(FILE.read_text()).items():
        expected = torch.tensor(numbers)
        assert expected.std() > 0.01
        error = (ours[name].flatten()[::EVERY] - expected).abs().max()
        assert error < 1e-5 * expected.abs().max().clamp(min=1), (name, error)


def test_equals_the_installed_networks():
    pytest.importorskip("diffusers")
    ours, weights = our_outputs()
    for name, theirs in diffusers_outputs(*weights).items():
        assert (ours[name] - theirs).abs().max() < 1e-5 * theirs.abs().max(), name


# ---------------- files

def peer_files():
    """{name: (weights under our names, what a project's file holds)}, random."""
    norm32 = dict(SMALL, width=32, groups=32, padding="zeros", decoder_norm="group")
    flux = small_vae(**norm32).state_dict()
    spatial = small_vae(**norm32 | dict(decoder_norm="spatial", attention_levels=(2, 3)))
    ldm = small_vae(**norm32, latent_channels=4, quant_conv=True).state_dict()
    extra = {"model_ema.decay": torch.zeros(3), "loss.logvar": torch.zeros(3)}
    whole = {f"first_stage_model.{k}": w for k, w in ldm.items()}
    newer = {k: w[..., 0, 0] if w.shape[2:] == (1, 1) and "attn" in k else w
             for k, w in flux.items()}
    return {"flux": (flux, flux), "matrices": (flux, newer),
            "sd3": (flux, {f"first_stage_model.{k}": w for k, w in flux.items()}
                    | {"model.diffusion_model.x": torch.zeros(3)}),
            "kl-f8": (ldm, {"state_dict": ldm | extra, "epoch": 3}),
            "sd1": (ldm, {"state_dict": {k: w.half() for k, w in whole.items()}
                          | {"cond_stage_model.x": torch.zeros(3)}}),
            "sdxl": (ldm, {k: w.bfloat16() for k, w in whole.items()}),
            "spatial": (spatial.state_dict(), spatial.state_dict())}


def test_files_of_others(tmp_path):
    """As published, whole models too, in half precision too; also with a class of Lightning's
    pickled beside the weights, which is not run."""
    for name, (weights, contents) in peer_files().items():
        torch.save(contents, tmp_path / "ae.ckpt")
        vae = model.load_vae(tmp_path / "ae.ckpt")
        loaded = vae.state_dict()
        assert loaded.keys() == weights.keys() and vae.architecture.padding == "zeros"
        tolerance = {"sd1": 1e-3, "sdxl": 8e-3}.get(name, 0)
        for key, w in weights.items():
            torch.testing.assert_close(loaded[key], w, atol=tolerance, rtol=tolerance)
        x = torch.rand(1, 3, 32, 40) * 2 - 1
        z = vae.encode(x).sample()
        assert z.shape[2:] == (4, 5) and vae.decode(z).shape == x.shape


def test_lightning_checkpoint(tmp_path, monkeypatch):
    """Classes and instances pickled beside the weights are stubs here, and are not run."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    weights, contents = peer_files()["kl-f8"]
    with monkeypatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patch.setitem(sys.modules, part, module)
        beside = {module.ModelCheckpoint: {"score": torch.ones(())}, "x": module.ModelCheckpoint()}
        torch.save(contents | {"callbacks": beside}, tmp_path / "model.ckpt")
    loaded = model.load_vae(tmp_path / "model.ckpt").state_dict()
    assert all(torch.equal(loaded[k], w) for k, w in weights.items())


def test_safetensors_whatever_its_name(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    weights, contents = peer_files()["flux"]
    save_file(contents, tmp_path / "ae.ckpt")
    loaded = model.load_vae(tmp_path / "ae.ckpt").state_dict()
    assert all(torch.equal(loaded[key], w) for key, w in weights.items())


def test_what_does_not_fit_is_named(tmp_path, capsys):
    _, contents = peer_files()["flux"]
    path = tmp_path / "x.pt"
    name = "decoder.mid.block_1.conv1.bias"
    for changes, words in (({name: None}, f'Missing key(s) in state_dict: "{name}"'),
                           ({"encoder.surprise": torch.zeros(1)}, '"encoder.surprise"'),
                           (dict.fromkeys(contents), "diffusers:FOLDER")):
        torch.save({k: w for k, w in (contents | changes).items() if w is not None}, path)
        assert words in refused(lambda: model.load_vae(path), capsys)
    path.write_bytes(b"not a checkpoint")
    assert "cannot be read" in refused(lambda: model.load_vae(path), capsys)
    path.unlink()
    assert "run 04_train_vae.py first" in refused(lambda: model.load_vae(path), capsys)
    for bad in (dict(attention_levels=(4,)), dict(attention_levels=(-1,)), dict(width=33)):
        assert "--" in refused(lambda: model.architecture(model.Settings(**bad)), capsys)


