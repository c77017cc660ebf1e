"""02_model.py: sizes, shapes, the two architectural cures, equality with reference networks, and every file load_vae reads."""
import copy
import json
import re
import weakref

import pytest
import torch
from conftest import ROOT, refused

TINY = dict(width=8, width_mult=(1, 2, 2, 4), res_blocks=1, groups=4, latent_channels=16, attention_levels=(3,))
FLUX = dict(width_mult=(1, 2, 4, 4), attention_levels=(), padding="zeros", decoder_norm="group")
REFERENCE = ROOT / "tests" / "reference.json"


def tiny(model, **more):
    torch.manual_seed(0)
    return model.build(model.Architecture(**(TINY | more))).eval()


@pytest.mark.parametrize("changes, parameters, tensors", [
    ({}, 68_227_747, None),                                                                 # MoVQGAN-67M with 16 latent channels
    (FLUX, 83_819_683, 244),                                                                # Flux and SD 3
    (FLUX | dict(latent_channels=4, quant_conv=True), 83_653_863, 248),                      # LDM kl-f8, SD 1.x, SDXL
    (dict(latent_channels=4, quant_conv=True, double_z=False, codebook=16384), 67_832_495, 431),  # MoVQGAN-67M itself
])
def test_parameter_counts(model, changes, parameters, tensors):
    with torch.device("meta"):
        vae = model.build(model.Architecture(**changes))
    assert model.count(vae) == parameters
    assert tensors in (None, len(vae.state_dict()))


@pytest.mark.parametrize("padding", ["reflect", "zeros"])
@pytest.mark.parametrize("norm", ["spatial", "group"])
@pytest.mark.parametrize("size", [(32, 32), (40, 72), (64, 48)])
def test_shapes(model, padding, norm, size):
    vae = tiny(model, padding=padding, decoder_norm=norm)
    x = torch.rand(2, 3, *size) * 2 - 1
    posterior = vae.encode(x)
    assert posterior.mu.shape == posterior.logvar.shape == posterior.sample().shape == (2, 16, size[0] // 8, size[1] // 8)
    assert vae.decode(posterior.mu).shape == x.shape
    for module in vae.modules():                                        # the switch reaches every padded convolution
        if isinstance(module, torch.nn.Conv2d) and module.padding != (0, 0):
            assert module.padding_mode == padding
    assert sum(isinstance(m, model.SpatialNorm) for m in vae.encoder.modules()) == 0
    norms = [m for m in vae.decoder.modules() if isinstance(m, (model.SpatialNorm, model.GroupNorm))]
    assert all(isinstance(m, model.SpatialNorm if norm == "spatial" else model.GroupNorm) for m in norms) and len(norms) > 20


@pytest.mark.parametrize("shape", [(1, 3, 36, 32), (1, 3, 32, 33), (1, 1, 32, 32), (3, 32, 32), (1, 3, 24, 64), (1, 3, 0, 0)])
def test_other_sizes_are_a_clear_error(model, shape):
    with pytest.raises(ValueError, match="multiples of 8 from 32 up"):
        tiny(model).encode(torch.zeros(shape))


def test_posterior(model):
    mean, logvar = torch.full((1, 16, 4, 4), 2.0), torch.full((1, 16, 4, 4), 2 * torch.tensor(0.5).log())
    posterior = model.Posterior(mean, logvar)
    assert torch.allclose(posterior.sample(torch.ones_like(mean)), torch.tensor(2.5))
    assert model.Posterior(mean, torch.full_like(mean, 99.0)).logvar.max() == 20


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_norms_equal_their_definition(model, layout):
    """GroupNorm(x) * y(up(z)) + b(up(z)), with the convolutions at full resolution as the papers write it; values and
    gradients, of the plain form and of the fast one."""
    torch.manual_seed(0)
    architecture = model.Architecture(groups=8, latent_channels=4)
    x = (3 + 2 * torch.randn(2, 24, 16, 24, dtype=torch.double)).contiguous(memory_format=layout).requires_grad_()
    z = torch.randn(2, 4, 4, 6, dtype=torch.double, requires_grad=True)
    up = torch.nn.functional.interpolate(z, size=x.shape[-2:], mode="nearest")
    for norm in (model.SpatialNorm(24, architecture), model.GroupNorm(24, architecture)):
        norm = norm.double().to(memory_format=layout)
        affine = norm if isinstance(norm, model.GroupNorm) else norm.norm_layer
        for p in affine.parameters():
            torch.nn.init.normal_(p)
        naive = torch.nn.functional.group_norm(x, 8, affine.weight, affine.bias, 1e-6)
        naive = naive if norm is affine else naive * norm.conv_y(up) + norm.conv_b(up)
        assert torch.allclose(norm(x, z), naive, atol=1e-12)
        naive = torch.nn.functional.silu(naive)
        inputs = [x, *([] if norm is affine else [z]), *norm.parameters()]
        weight = torch.randn_like(naive)
        expected = torch.autograd.grad((naive * weight).sum(), inputs)
        for norm.fast in (False, True):
            assert torch.allclose(model.norm_swish(norm, x, z), naive, atol=1e-12)
            single = model.norm_swish(copy.deepcopy(norm).float(), x.float(), z.float())
            assert torch.allclose(single.double(), naive, atol=1e-5)
            gradients = torch.autograd.grad((model.norm_swish(norm, x, z) * weight).sum(), inputs)
            assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(gradients, expected))


@pytest.mark.parametrize("norm", ["spatial", "group"])
@pytest.mark.parametrize("padding", ["reflect", "zeros"])
def test_fast_forms_equal_the_plain_ones(model, norm, padding):
    """The whole VAE, values and gradients; set_fast reaches every module that has a choice."""
    fast = tiny(model, decoder_norm=norm, padding=padding).double()
    plain = model.set_fast(copy.deepcopy(fast), False)
    assert all(m.fast for m in fast.modules() if hasattr(m, "fast")) and not any(m.fast for m in plain.modules() if hasattr(m, "fast"))
    x, noise = torch.rand(2, 3, 40, 48, dtype=torch.double) * 2 - 1, torch.randn(2, 16, 5, 6, dtype=torch.double)
    results = []
    for vae in (fast, plain):
        x_hat, mu, logvar = vae(x, noise)
        (x_hat.square().mean() + mu.square().mean()).backward()
        results.append([x_hat, mu, logvar, *(p.grad for p in vae.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 100
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*results))


def test_fast_norm_keeps_no_activation_after_backward(model):
    """With the output still held, backward has freed the input: the next forward pass does not share memory with the last."""
    x = torch.randn(1, 8, 8, 8, requires_grad=True)
    inner = x * 1.0
    seen = weakref.ref(inner)
    out = model.norm_swish(model.GroupNorm(8, model.Architecture(groups=4)), inner)
    del inner
    assert seen() is not None
    out.sum().backward()
    assert seen() is None and out.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0, 10, 100, 300, 1000, 3000])
def test_fast_norm_is_exact_far_from_zero(model, dtype, ratio):
    """Mean over deviation of up to 3000: errors of output and gradient stay within 3 times nn.GroupNorm's."""
    g = torch.Generator().manual_seed(0)
    x = (ratio + torch.randn(2, 32, 24, 24, dtype=torch.double, generator=g)).to(dtype)
    upstream = torch.randn(x.shape, dtype=torch.double, generator=g)
    norm = model.GroupNorm(32, model.Architecture(groups=8))
    plain = lambda v: torch.nn.functional.silu(torch.nn.functional.group_norm(v, 8, eps=1e-6))
    results = []
    for f, inputs in ((plain, x.double()), (plain, x), (lambda v: model.norm_swish(norm, v), x)):
        inputs = inputs.detach().requires_grad_()
        out = f(inputs)
        out.backward(upstream.to(out.dtype))
        results.append((out.double(), inputs.grad.double()))
    for exact, reference, ours in zip(*results):
        error = lambda v: ((v - exact).norm() / exact.norm()).item()
        assert error(ours) <= 3 * error(reference) + 1e-7


def test_average_warms_up(model):
    """By value: the average moves by 1 - min(decay, (1 + step) / (10 + step))."""
    for step, decay, kept in ((1, 0.9999, 2 / 11), (10, 0.9999, 11 / 20), (10, 0.3, 0.3), (10 ** 6, 0.9999, 0.9999)):
        average, weight = torch.zeros(2), torch.ones(2)
        model.update_average([average], [weight], step, decay)
        torch.testing.assert_close(average, torch.full((2,), 1 - kept))


def test_reflect_pad_equals_pytorchs(model):
    for sides in ((1, 1, 1, 1), (0, 1, 0, 1)):
        x = torch.randn(2, 3, 5, 7, dtype=torch.double, requires_grad=True)
        ours, theirs = model.ReflectPad.apply(x, sides), torch.nn.functional.pad(x, sides, mode="reflect")
        weight = torch.randn_like(theirs)
        assert torch.equal(ours, theirs)
        assert torch.equal(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs)))


def test_reflect_padding_cures_the_border_of_a_flat_picture(model):
    """Sec. 5.2: on a flat picture nothing but padding can tell the border from the interior; with reflect nothing does."""
    x = torch.full((1, 3, 64, 64), 0.3)
    for padding, same in (("reflect", True), ("zeros", False)):
        vae = tiny(model, padding=padding)
        with torch.no_grad():
            z = vae.encode(x).mu
            x_hat = vae.decode(z)
        assert ((z - z[..., 4:5, 4:5]).abs().max() < 1e-4) == same
        assert ((x_hat - x_hat[..., 32:33, 32:33]).abs().max() < 1e-4) == same


def test_receptive_field_is_what_gradients_reach(model):
    vae = tiny(model, padding="zeros", attention_levels=())
    model.set_fast(vae, False)
    for module in vae.encoder.modules():                                # without norms and attention only convolutions mix positions
        if isinstance(module, (model.GroupNorm, model.AttnBlock)):
            module.forward = lambda x, z=None: x
    x = torch.randn(1, 3, 320, 320, requires_grad=True)
    vae.encoder(x)[0, :, 20, 20].sum().backward()
    rows = x.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == model.receptive_field(vae.encoder)


# ---------------------------------------------------------------- references

def formula_weights(state):
    """The same weights anywhere, without a random generator: sines scaled by fan-in."""
    out = {}
    for i, key in enumerate(sorted(state)):
        w = state[key]
        values = torch.sin(torch.arange(w.numel(), dtype=torch.float64) * 0.7 + i).reshape(w.shape)
        out[key] = (1 + 0.1 * values if w.ndim == 1 and key.endswith("weight") else values * (2 / w[0].numel()) ** 0.5 if w.ndim > 1 else 0.1 * values).float()
    return out


def formula_picture(*shape):
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(n * 0.37 + (n / 64).floor()).reshape(shape).float()


def to_compvis(key, levels=4):
    """A diffusers name as CompVis writes it; diffusers counts up blocks in the order they run, CompVis by resolution."""
    for theirs, ours in (("resnets", "block"), ("attentions", "attn")):
        key = re.sub(rf"down_blocks\.(\d+)\.{theirs}\.", rf"down.\1.{ours}.", key)
        key = re.sub(rf"up_blocks\.(\d+)\.{theirs}\.", lambda m: f"up.{levels - 1 - int(m[1])}.{ours}.", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", key)
    key = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", key).replace("mid_block.attentions.0.", "mid.attn_1.")
    for theirs, ours in (("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), ("group_norm.", "norm."), ("spatial_norm.", "norm."),
                         ("to_q.", "q."), ("to_k.", "k."), ("to_v.", "v."), ("to_out.0.", "proj_out.")):
        key = key.replace(theirs, ours)
    return key


SMALL = dict(width=32, width_mult=(1, 1, 2, 2), res_blocks=1, padding="zeros")      # 32 groups: diffusers fixes them in its spatial norms
OURS = {"kl": SMALL | dict(latent_channels=16, attention_levels=(), decoder_norm="group"),
        "vq": SMALL | dict(latent_channels=4, quant_conv=True, double_z=False, codebook=16)}


def reference_networks():
    """diffusers' AutoencoderKL, and its VQModel with norm_type="spatial"."""
    import diffusers
    common = dict(in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 32, 64, 64))
    down, up = "DownEncoderBlock2D", "UpDecoderBlock2D"
    kl = diffusers.AutoencoderKL(down_block_types=(down,) * 4, up_block_types=(up,) * 4, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **common)
    vq = diffusers.VQModel(down_block_types=(down,) * 3 + ("Attn" + down,), up_block_types=("Attn" + up,) + (up,) * 3,
                           latent_channels=4, vq_embed_dim=4, num_vq_embeddings=16, norm_type="spatial", **common)
    return {"kl": kl.eval(), "vq": vq.eval()}


def outputs(kind, encode, decode):
    """What a network makes of the formula picture and the formula latent."""
    with torch.no_grad():
        return {"encoded": encode(formula_picture(1, 3, 32, 48)), "decoded": decode(formula_picture(1, OURS[kind]["latent_channels"], 4, 6))}


def formula_network(model, kind):
    vae = model.build(model.Architecture(**OURS[kind])).eval()
    vae.load_state_dict(formula_weights(vae.state_dict()))
    return vae


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_equals_the_reference(model, kind):
    """reference.json holds what diffusers' networks gave for formula weights; `python tests/test_model.py` writes it anew."""
    vae = formula_network(model, kind)
    ours = outputs(kind, (lambda x: vae.encode(x).mu) if kind == "kl" else (lambda x: vae.quant_conv(vae.encoder(x))), vae.decode)
    for name, numbers in json.loads(REFERENCE.read_text())[kind].items():
        expected = torch.tensor(numbers).reshape(ours[name].shape)
        assert expected.std() > 0.01
        # Of values up to 12; the reference's own float32 output lies 3e-5 from its float64 one, as far as ours lies from it.
        assert (ours[name] - expected).abs().max() < 1e-5 * expected.abs().max()


# ---------------------------------------------------------------- files

def test_own_checkpoint(model, data, tmp_path):
    vae, average = tiny(model), tiny(model)
    with torch.no_grad():
        for p in average.parameters():
            p += 0.1
    a = {f: list(v) if isinstance(v, tuple) else v for f, v in vars(vae.architecture).items()}
    data.save_checkpoint(tmp_path / "vae.pt", stage="04_train_vae", architecture=a, model=vae.state_dict(), ema=average.state_dict(),
                          latent_mean=torch.zeros(16), latent_std=torch.ones(16))
    loaded = model.load_vae(tmp_path / "vae.pt", "cpu")
    assert not loaded.training and loaded.architecture == vae.architecture and torch.equal(loaded.latent_std, torch.ones(16))
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), average.parameters()))
    assert list(tmp_path.iterdir()) == [tmp_path / "vae.pt"]


def peer_file(model, kind):
    """(architecture, file contents) as each project lays its files out. The weights are random, not trained."""
    ldm = TINY | FLUX | dict(latent_channels=4, quant_conv=True)
    movq = TINY | dict(latent_channels=4, quant_conv=True, double_z=False, padding="zeros")
    a = {"flux": TINY | FLUX, "sd3": TINY | FLUX, "kl-f8": ldm, "sd1": ldm, "sdxl": ldm, "movqgan": movq | dict(codebook=16), "kandinsky3": movq}[kind]
    a |= dict(groups=32, width=32)                                     # published files all have 32 groups
    state = tiny(model, **a).state_dict()
    extra = torch.zeros(3)
    file = {
        "flux": lambda: state,
        "sd3": lambda: {f"first_stage_model.{k}": w for k, w in state.items()} | {"model.diffusion_model.joint_blocks.0.x": extra},
        "kl-f8": lambda: {"state_dict": state | {"loss.logvar": extra, "loss.discriminator.main.0.weight": extra, "model_ema.decay": extra}, "epoch": 3},
        "sd1": lambda: {"state_dict": {f"first_stage_model.{k}": w.half() for k, w in state.items()} | {"cond_stage_model.x": extra}},
        "sdxl": lambda: {f"first_stage_model.{k}": w for k, w in state.items()} | {"conditioner.embedders.0.x": extra},
        "movqgan": lambda: state | {"ema_encoder.conv_inweight": extra, "loss.perceptual_loss.lin0": extra},
        "kandinsky3": lambda: {re.sub(r"^(encoder\..*norm\w*)\.", r"\1.norm_layer.", k): w for k, w in state.items()},
    }[kind]()
    return state, file


@pytest.mark.parametrize("kind, scale, shift", [("flux", 0.3611, 0.1159), ("sd3", 1.5305, 0.0609), ("kl-f8", None, None), ("sd1", 0.18215, 0.0),
                                                ("sdxl", 0.13025, 0.0), ("movqgan", None, None), ("kandinsky3", None, None)])
def test_peers(model, tmp_path, kind, scale, shift):
    state, file = peer_file(model, kind)
    path = tmp_path / "ae.pt"
    torch.save(file, path)
    vae = model.load_vae(path, peer="flux" if kind == "flux" else None)
    loaded = vae.state_dict()
    tolerance = 1e-3 if kind == "sd1" else 0
    assert loaded.keys() == state.keys() and all(torch.allclose(loaded[k], state[k], atol=tolerance, rtol=0) for k in state)
    assert vae.architecture.padding == "zeros"
    if scale:
        assert torch.allclose(vae.latent_std, torch.tensor(1 / scale)) and torch.allclose(vae.latent_mean, torch.tensor(shift))
    else:
        assert vae.latent_mean is None
    x = torch.rand(1, 3, 32, 40) * 2 - 1
    z = vae.encode(x).sample()
    assert z.shape == (1, vae.architecture.latent_channels, 4, 5) and vae.decode(z).shape == x.shape
    if kind == "movqgan":                                              # what is decoded are codebook vectors
        assert torch.cdist(z.movedim(1, -1).reshape(-1, 4), state["quantize.embedding.weight"]).min(1).values.max() < 1e-3


def test_peer_may_be_named(model, tmp_path, capsys):
    _, file = peer_file(model, "flux")
    torch.save(file, tmp_path / "unknown.pt")
    torch.save(file, tmp_path / "flux_sd3.pt")
    assert model.load_vae(tmp_path / "unknown.pt").latent_mean is None
    assert model.load_vae(tmp_path / "flux_sd3.pt").latent_mean is None          # a name is no evidence
    assert torch.allclose(model.load_vae(tmp_path / "unknown.pt", peer="sd3").latent_std, torch.tensor(1 / 1.5305))
    assert "sdxl" in refused(lambda: model.load_vae(tmp_path / "unknown.pt", peer="sdxl"), capsys)


def test_safetensors(model, tmp_path, capsys):
    """Written here by hand, byte by byte: the package is optional. Without it there is one sentence, with it the weights."""
    state, file = peer_file(model, "flux")
    header, blobs, at = {}, [], 0
    for key, w in file.items():
        blob = w.contiguous().numpy().tobytes()
        header[key] = {"dtype": "F32", "shape": list(w.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    head = json.dumps(header).encode()
    (tmp_path / "ae.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"".join(blobs))
    try:
        import safetensors  # noqa: F401
    except ImportError:
        assert "pip install safetensors" in refused(lambda: model.load_vae(tmp_path / "ae.safetensors"), capsys)
        return
    loaded = model.load_vae(tmp_path / "ae.safetensors", peer="flux")
    assert all(torch.equal(w, state[k]) for k, w in loaded.state_dict().items())
    assert torch.allclose(loaded.latent_mean, torch.tensor(0.1159))


def test_every_key_is_accounted_for(model, tmp_path, capsys):
    state, file = peer_file(model, "flux")
    def message(change):
        contents = dict(file)
        change(contents)
        torch.save(contents, tmp_path / "x.pt")
        return refused(lambda: model.load_vae(tmp_path / "x.pt"), capsys)
    assert "Missing key(s) in state_dict: \"decoder.mid.block_1.conv1.bias\"" in message(lambda f: f.pop("decoder.mid.block_1.conv1.bias"))
    assert "Unexpected key(s) in state_dict: \"encoder.surprise\"" in message(lambda f: f.update({"encoder.surprise": torch.zeros(1)}))
    assert "size mismatch for decoder.conv_out.bias" in message(lambda f: f.update({"decoder.conv_out.bias": torch.zeros(4)}))
    assert "conv_in" in message(lambda f: f.clear())
    assert "diffusers" in message(lambda f: f.update({"encoder.down_blocks.0.resnets.0.norm1.weight": torch.zeros(1)}))


def test_bad_files(model, data, tmp_path, capsys):
    assert "run 04_train_vae.py first" in refused(lambda: model.load_vae(tmp_path / "vae.pt"), capsys)
    (tmp_path / "vae.pt").write_bytes(b"not a checkpoint")
    assert "cannot be read" in refused(lambda: model.load_vae(tmp_path / "vae.pt"), capsys)
    torch.save([1, 2], tmp_path / "vae.pt")
    assert "not a checkpoint" in refused(lambda: model.load_vae(tmp_path / "vae.pt"), capsys)
    whole = {"stage": "07_train_dit"}
    torch.save(whole, tmp_path / "vae.pt")
    assert "run 04_train_vae.py first" in refused(lambda: data.read_checkpoint(tmp_path / "vae.pt", ("04_train_vae",)), capsys)


def test_table(model, capsys):
    """`python 02_model.py` counts what is there: rows add up to the network."""
    model.main(model.Settings(**model.PRESETS["demo"], size=64))
    printed = capsys.readouterr().out
    total = next(line for line in printed.splitlines() if line.startswith("total"))
    with torch.device("meta"):
        vae = model.build(model.Settings(**model.PRESETS["demo"]))
    rows = model.describe(vae, 64)
    assert sum(r[2] for r in rows) == model.count(vae) and f"{model.count(vae):,}" in total
    conv_in = rows[0]
    assert conv_in[0] == "encoder.conv_in" and conv_in[3] == 64 * 64 * 3 * 9 * model.PRESETS["demo"]["width"]
    assert "receptive field" in printed


def test_muon_is_torchs_on_matrices(model):
    """Four steps on tall, wide and square matrices beside torch.optim.Muon, which multiplies in
    bfloat16: equal to its rounding. A convolution moves as the matrix (c_out, the rest)."""
    torch.manual_seed(0)
    for shape in ((64, 32), (32, 64), (48, 48)):
        ours = torch.nn.Parameter(torch.randn(shape))
        theirs = torch.nn.Parameter(ours.detach().clone())
        conv = torch.nn.Parameter(ours.detach().clone().unflatten(1, (-1, 4, 4)))
        start = ours.detach().clone()
        optimizers = (model.Muon([ours], 0.02), model.Muon([conv], 0.02),
                      torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0))
        for _ in range(4):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            conv.grad = ours.grad.clone().view(conv.shape)
            for optimizer in optimizers:
                optimizer.step()
        moved = (theirs - start).norm()
        assert moved > 0.1 and (ours - theirs).norm() < 0.03 * moved
        torch.testing.assert_close(conv.flatten(1), ours)


def test_orthogonal(model):
    """Singular values, from 0.05 of the largest up, come close to 1; the singular vectors stay."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(24, 16), full_matrices=False)
    made = model.orthogonal(u * torch.linspace(1, 0.05, 16) @ v)
    s = torch.diagonal(u.mT @ made @ v.mT)
    assert 0.6 < s.min() and s.max() < 1.25
    torch.testing.assert_close(u * s @ v, made, atol=1e-4, rtol=0)


def test_rates(model):
    assert [model.rate_factor(step, 8, 0.5) for step in (1, 4, 5, 6, 7, 8)] == [1, 1, 1, 0.75, 0.5, 0.25]
    assert model.rate_factor(1, 4, 1.0) == 1 and model.rate_factor(4, 4, 1.0) == 0.25
    assert [model.rate_factor(step, 8, 0.0, warmup=4) for step in (1, 2, 4, 8)] == [0.25, 0.5, 1, 1]
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    model.set_rates([optimizer], 0.5)
    model.set_rates([optimizer], 0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("impossible", [dict(groups=0), dict(width_mult=(1, 0, 2)), dict(width_mult=(1, -1)), dict(groups=3), dict(width_mult=())])
def test_networks_that_cannot_be_are_refused_in_a_sentence(model, capsys, impossible):
    with pytest.raises(SystemExit):
        model.build(model.Architecture(**TINY | impossible))
    assert "must be multiples of --groups" in capsys.readouterr().err


if __name__ == "__main__":
    import importlib
    ours, numbers = importlib.import_module("02_model"), {}
    for kind, net in reference_networks().items():
        weights, theirs = formula_network(ours, kind).state_dict(), net.state_dict()
        assert {to_compvis(k) for k in theirs} == set(weights)
        net.load_state_dict({k: weights[to_compvis(k)].reshape(w.shape) for k, w in theirs.items()})
        encode = (lambda x: net.encode(x).latent_dist.mean) if kind == "kl" else (lambda x: net.encode(x).latents)
        decode = (lambda z: net.decode(z).sample) if kind == "kl" else (lambda z: net.decoder(net.post_quant_conv(z), z))
        numbers[kind] = {k: [float(f"{v:.8g}") for v in t.flatten().tolist()] for k, t in outputs(kind, encode, decode).items()}
    REFERENCE.write_text(json.dumps(numbers))
    print(f"wrote {REFERENCE}")
