"""02_model.py: sizes, the two architectural cures, equality with others' networks, and every file
that load_vae reads."""
import json
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
    x = torch.rand(2, 3, 40, 72) * 2 - 1
    x_hat, mu, logvar, z = vae(x)
    assert mu.shape == logvar.shape == z.shape == (2, 16, 5, 9) and x_hat.shape == x.shape
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d) and module.padding != (0, 0):
            assert module.padding_mode == padding
    spatial = [isinstance(m, model.SpatialNorm) for m in vae.decoder.modules()]
    assert sum(spatial) == (24 if norm == "spatial" else 0)
    assert not any(isinstance(m, model.SpatialNorm) for m in vae.encoder.modules())
    for shape in ((1, 3, 36, 32), (1, 3, 0, 0)):
        with pytest.raises(ValueError, match="multiples of 8"):
            vae.encode(torch.zeros(shape))


def test_posterior():
    torch.manual_seed(0)
    mu = torch.full((1, 16, 64, 64), 2.0)
    z = model.Posterior(mu, torch.full_like(mu, 2 * torch.tensor(0.5).log().item())).sample()
    assert z.mean().item() == pytest.approx(2, abs=0.01)
    assert z.std().item() == pytest.approx(0.5, abs=0.01)
    assert model.Posterior(mu, mu + 97).logvar.max() == 20
    assert torch.equal(model.Posterior(mu).sample(), mu)


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
    """On a flat picture nothing but padding can tell the border from the interior."""
    x = torch.full((1, 3, 64, 64), 0.3)
    for padding, same in (("reflect", True), ("zeros", False)):
        with torch.no_grad():
            z = small_vae(padding=padding).encode(x).mu
            x_hat = small_vae(padding=padding).decode(z)
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
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)

    class ModelCheckpoint:
        def __reduce__(self):
            return print, ("this must not run",)

    ModelCheckpoint.__module__ = name
    ModelCheckpoint.__qualname__ = "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(__import__("sys").modules, part, module)
    weights, contents = peer_files()["kl-f8"]
    contents = contents | {"callbacks": {ModelCheckpoint: {"best_model_score": torch.ones(())}}}
    torch.save(contents, tmp_path / "model.ckpt")
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.delitem(__import__("sys").modules, part)
    loaded = model.load_vae(tmp_path / "model.ckpt").state_dict()
    assert all(torch.equal(loaded[k], w) for k, w in weights.items())


def test_safetensors_whatever_its_name(tmp_path, capsys):
    """With the package, and a sentence without it."""
    weights, contents = peer_files()["flux"]
    path = tmp_path / "ae.ckpt"
    try:
        from safetensors.torch import save_file
    except ImportError:
        path.write_bytes(bytes(8) + b"{}")
        assert "pip install safetensors" in refused(lambda: model.load_vae(path), capsys)
        return
    save_file(contents, path)
    loaded = model.load_vae(path).state_dict()
    assert all(torch.equal(loaded[key], w) for key, w in weights.items())


def test_what_does_not_fit_is_named(tmp_path, capsys):
    weights, contents = peer_files()["flux"]

    def sentence(**changes):
        torch.save({k: w for k, w in (contents | changes).items() if w is not None}, path)
        return refused(lambda: model.load_vae(path), capsys)

    path = tmp_path / "x.pt"
    name = "decoder.mid.block_1.conv1.bias"
    assert f'Missing key(s) in state_dict: "{name}"' in sentence(**{name: None})
    assert '"encoder.surprise"' in sentence(**{"encoder.surprise": torch.zeros(1)})
    assert "size mismatch for decoder.conv_out.bias" in sentence(
        **{"decoder.conv_out.bias": torch.zeros(4)})
    assert "diffusers:FOLDER" in sentence(**dict.fromkeys(contents))
    path.write_bytes(b"not a checkpoint")
    assert "cannot be read" in refused(lambda: model.load_vae(path), capsys)
    path.unlink()
    assert "run 04_train_vae.py first" in refused(lambda: model.load_vae(path), capsys)


def test_settings_that_fit_no_network(capsys):
    for bad in (dict(attention_levels=(4,)), dict(attention_levels=(-1,)), dict(width=33)):
        assert "--" in refused(lambda: model.architecture(model.Settings(**bad)), capsys)


def test_table(capsys):
    model.main(model.Settings(**model.PRESETS["demo"], size=64))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["encoder.down.0.block.0", "16", "x", "64", "x", "64", "4,704"]
    assert lines[-1].split() == ["decoder", "3", "x", "64", "x", "64", "509,155"]
