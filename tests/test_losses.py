"""03_losses.py: hand values, gradients that go where they should and nowhere else, LPIPS's traps, the five artifacts."""
import math

import pytest
import torch
from conftest import command, refused


@pytest.fixture(scope="module")
def perceptual(losses):
    return losses.Perceptual("untrained")


def networks(model, losses):
    torch.manual_seed(0)
    vae = model.build(model.Architecture(width=8, width_mult=(1, 2, 2, 4), res_blocks=1, groups=4, attention_levels=()))
    return vae, losses.Discriminator(8, 2)


def test_kl(losses):
    """Eq. 3 by hand and against torch.distributions; mean over elements."""
    zero = torch.zeros(2, 16, 4, 4)
    assert losses.kl_loss(zero, zero) == 0
    assert losses.kl_loss(zero + 2, zero).item() == pytest.approx(2.0)                       # mean^2 / 2
    assert losses.kl_loss(zero, zero + math.log(4)).item() == pytest.approx(0.5 * (4 - 1 - math.log(4)))
    mean, logvar = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    reference = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)).mean()
    assert losses.kl_loss(mean, logvar).item() == pytest.approx(reference.item(), rel=1e-5)


def test_variance_expansion(losses):
    """Eq. 9 to 11 by hand; no overflow where z is enormous or the posterior has collapsed."""
    mu, logvar, noise = torch.full((2, 4, 1, 1), 3.0), torch.full((2, 4, 1, 1), math.log(0.25)), torch.full((2, 4, 1, 1), -1.0)
    by_hand = 1 / (0.25 + 1e-6) + 1e-5 * math.exp(2.5 - 1)                                   # z = 3 - 0.5
    assert losses.variance_expansion(mu, logvar, noise).item() == pytest.approx(by_hand, rel=1e-6)
    wild = losses.variance_expansion(mu * 1e4, logvar - 30, noise)
    assert wild.isfinite() and wild.item() > 1e5
    # Eq. 14: against a reconstruction of T sigma^2 the two forces are equal at sigma = (lambda / T)^(1/4).
    lam, slope, zero = 0.1, 28.0, torch.zeros(1, 1, 1, 1)
    for sigma, sign in (((lam / slope) ** 0.25, 0), (0.2, -1), (0.3, 1)):
        logvar = (zero + 2 * math.log(sigma)).requires_grad_()
        loss = slope * logvar.exp().mean() + lam * losses.variance_expansion(zero, logvar, zero)
        loss.backward()
        force = logvar.grad.item() / (slope * sigma ** 2)
        assert force == pytest.approx(0, abs=1e-4) if sign == 0 else force * sign > 0.3


def test_free_bits(losses):
    """max(nats, KL) for each channel: one below is counted as the threshold and has no gradient."""
    mu = torch.zeros(2, 2, 4, 4)
    mu[:, 1] = 2.0                                                                           # 2 nats per value
    mu[:, 0] = 0.2                                                                           # 0.02
    mu.requires_grad_()
    loss = losses.free_bits(mu, torch.zeros(2, 2, 4, 4), 0.5)
    assert loss.item() == pytest.approx((0.5 + 2.0) / 2)
    loss.backward()
    assert not mu.grad[:, 0].any() and torch.allclose(mu.grad[:, 1], torch.tensor(2.0 / 64))
    known = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    assert losses.free_bits(*known, 0.0).item() == pytest.approx(losses.kl_loss(*known).item(), rel=1e-6)


def test_toy(losses, tmp_path, capsys):
    """The tree has mean 0 and deviation 0.5 along each axis, and the density its samples have; in a few steps
    Variance Expansion's latents are noisier than weak KL's, and the picture is there."""
    tree = losses.tree()
    torch.manual_seed(0)
    x = tree.sample((20_000,))
    assert tree.mixture_distribution.probs.shape == (8 * 127,)
    assert x.mean(0).abs().max() < 0.02 and (x.std(0) - 0.5).abs().max() < 0.02
    # The share of samples in a disc is the density's integral over it.
    side = torch.linspace(-0.3, 0.3, 121)
    grid = torch.cartesian_prod(side, side)
    inside = grid.norm(dim=1) < 0.3
    integral = tree.log_prob(grid[inside]).exp().sum() * (0.6 / 120) ** 2
    assert integral.item() == pytest.approx((x.norm(dim=1) < 0.3).float().mean().item(), abs=0.015)
    s = losses.Settings(run=str(tmp_path), toy=True, toy_width=32, toy_batch=256, toy_steps=150, toy_lr=3e-3)
    rows = losses.main(s)
    assert list(rows) == ["kl", "ve"] and (tmp_path / "toy.png").is_file()
    noisy = {name: row["posterior_variance"] / row["variance"] for name, row in rows.items()}
    assert noisy["ve"] > 3 * noisy["kl"], noisy
    assert all(row["error"] < 0.4 for row in rows.values()) and "kl: posterior variance" in capsys.readouterr().out


def test_which_latent_loss(losses):
    mu, logvar, noise = torch.randn(3, 2, 4, 2, 2)
    chosen = lambda **more: losses.latent_loss(mu, logvar, noise, losses.Losses(**more))
    assert chosen() == losses.kl_loss(mu, logvar)
    assert chosen(free_bits=0.7) == losses.free_bits(mu, logvar, 0.7)
    assert chosen(regularizer="ve") == losses.variance_expansion(mu, logvar, noise)
    weight = lambda step, **more: losses.latent_weight(losses.Losses(**more), step)
    assert weight(1) == weight(10 ** 6) == 1e-4
    assert [weight(step, kl_warmup=4) for step in (1, 2, 4, 9)] == [0.25e-4, 0.5e-4, 1e-4, 1e-4]
    assert weight(1, regularizer="ve", kl_warmup=4) == pytest.approx(0.1 * (16 / 64) / 3)   # 0.1 J / N


def test_recon_and_psnr(losses):
    x = torch.zeros(2, 3, 8, 8)
    assert losses.recon_loss(x, x + 0.5).item() == pytest.approx(0.25)
    y = torch.stack([torch.full((3, 8, 8), 10.0), torch.full((3, 8, 8), 20.0)]) / 127.5 - 1
    psnr = losses.psnr(torch.full((2, 3, 8, 8), -1.0), y)
    assert psnr.tolist() == pytest.approx([20 * math.log10(255 / 10), 20 * math.log10(255 / 20)], abs=1e-4)
    assert losses.psnr(y, y + 1e-4).tolist() == [math.inf, math.inf]                         # the same 8 bits
    assert losses.psnr(y + 9, y + 99).tolist() == [math.inf, math.inf]                       # clamped


def test_adversarial_pair(losses):
    logits = torch.tensor([[2.0, -1.0]])
    assert losses.adversarial_loss(logits).item() == pytest.approx(-0.5)
    sigmoid = lambda v: 1 / (1 + math.exp(-v))
    printed = (math.log(1 - sigmoid(2.0)) + math.log(1 - sigmoid(-1.0))) / 2                 # Eq. 5 as printed
    assert losses.adversarial_loss(logits, "log").item() == pytest.approx(printed, rel=1e-5)
    real, fake = torch.tensor([0.5, 3.0]), torch.tensor([-0.5, -4.0])
    assert losses.discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.25))
    logistic = lambda values: sum(math.log(1 + math.exp(v)) for v in values) / 2
    assert losses.discriminator_loss(real, fake, "log").item() == pytest.approx(0.5 * (logistic([-0.5, -3.0]) + logistic([-0.5, -4.0])), rel=1e-5)
    # Why hinge is the default: where the discriminator is sure, the printed form's gradient has vanished.
    for kind, expected in (("hinge", -1.0), ("log", -sigmoid(-8.0))):
        sure = torch.tensor([-8.0], requires_grad=True)
        losses.adversarial_loss(sure, kind).backward()
        assert sure.grad.item() == pytest.approx(expected, rel=1e-4)


def test_discriminator(losses):
    """The known PatchGAN sizes; and each picture is judged on its own, whatever else is in the batch."""
    base = losses.Discriminator(64, 2)
    assert base(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 62, 62)
    assert sum(p.numel() for p in base.parameters()) == 663_361                              # as with BatchNorm: two values a channel
    assert sum(p.numel() for p in losses.Discriminator(64, 3).parameters()) == 2_765_633
    x = torch.randn(4, 3, 32, 32)
    small = losses.Discriminator(8, 2)
    torch.testing.assert_close(small(x)[1:2], small(x[1:2]), atol=1e-6, rtol=1e-5)
    reach = torch.zeros(1, 3, 96, 96, requires_grad=True)
    for module in base.modules():
        if isinstance(module, torch.nn.GroupNorm):                                           # it looks at the whole picture
            module.forward = lambda t: t
    base(reach)[0, 0, 12, 12].backward()
    rows = reach.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 34


def test_total_is_the_weighted_sum(losses):
    s = losses.Losses()
    assert (s.lambda_kl, s.lambda_recon, s.lambda_adv, s.lambda_perc) == (1e-4, 1.0, 0.01, 0.1)   # Table 3
    assert losses.total_loss(2.0, 3.0, 5.0, 7.0, s) == pytest.approx(2e-4 + 3.0 + 0.05 + 0.7, rel=1e-9)


@pytest.mark.parametrize("term", ["kl", "recon", "adv", "perc", "disc"])
def test_gradient_reach(model, losses, train, perceptual, term):
    """Each term of 04's step alone reaches every weight it should, and no other: the KL all of the encoder and none of the
    decoder, the others all of both, the discriminator's loss all of the discriminator and nothing else."""
    vae, disc = networks(model, losses)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    weights = {f"lambda_{name}": float(name == term) for name in ("kl", "recon", "adv", "perc")}
    s = train.Settings(**weights)
    noise = torch.randn(2, 16, 8, 8)
    terms = train.add_gradients(x, noise, vae, disc, perceptual, list(vae.parameters()), list(disc.parameters()), s)
    reached = {name for name, p in vae.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    encoder = {name for name, _ in vae.named_parameters() if name.startswith("encoder")}
    # A key's bias shifts all scores of a query alike, and softmax does not see it.
    blind = {name for name, _ in vae.named_parameters() if name.endswith("attn_1.k.bias")}
    expected = encoder if term == "kl" else {name for name, _ in vae.named_parameters()}
    if term == "disc":
        expected, blind = set(), set()
    assert reached | blind >= expected and reached <= expected
    assert set(terms) == {"total", "kl", "recon", "adv", "perc", "disc", "d_real", "d_fake"}
    if term != "disc":
        assert terms["total"].item() == pytest.approx(terms[term].item(), rel=1e-6)
    # The discriminator's gradient is that of its own loss alone, whatever the VAE's loss is.
    gradients = [p.grad.clone() for p in disc.parameters()]
    disc.zero_grad()
    losses.discriminator_loss(disc(x), disc(vae(x, noise)[0].detach())).backward()
    assert all(torch.allclose(g, p.grad, atol=1e-7) for g, p in zip(gradients, disc.parameters())) and any(g.abs().max() > 0 for g in gradients)
    assert all(p.grad is None for p in perceptual.parameters())


def test_lpips_equals_the_package(losses):
    """Features, calibrated linear layers and sums as in lpips.LPIPS.forward; the trunk is random, the linear layers are the package's own."""
    import lpips
    torch.manual_seed(1)
    package = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    ours = losses.Perceptual("untrained")
    ours.lpips = package
    x, y = torch.rand(3, 3, 64, 64) * 2 - 1, torch.rand(3, 3, 64, 64) * 2 - 1
    assert ours(x, y).item() == pytest.approx(package(x, y).mean().item(), rel=1e-5) and ours(x, x) == 0
    plain = losses.Perceptual("untrained")
    assert plain(x, y).item() == pytest.approx(plain.lpips(x, y).mean().item(), rel=1e-5)


def test_untrained_trunk_is_always_the_same(losses):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    a = losses.Perceptual("untrained")
    assert torch.equal(state, torch.random.get_rng_state())                                  # and leaves the global generator alone
    torch.manual_seed(6)
    b = losses.Perceptual("untrained")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_lpips_dropout_stays_off(losses, monkeypatch):
    import lpips
    module = losses.Perceptual("untrained")
    module.lpips = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    parent = torch.nn.ModuleList([module])
    x, y = torch.rand(1, 3, 64, 64) * 2 - 1, torch.rand(1, 3, 64, 64) * 2 - 1
    before = module(x, y)
    parent.train()
    def never(self, x):
        raise AssertionError("dropout ran")
    monkeypatch.setattr(torch.nn.Dropout, "forward", never)
    assert all(torch.equal(module(x, y), before) for _ in range(5))


def test_lpips_gradient_is_finite_at_zero_features(losses):
    """Where a feature is zero in all channels, the package's normalisation has a NaN gradient, ours is finite, and the values agree."""
    import lpips
    for normalise, finite in ((losses.Perceptual.unit_length, True), (lpips.normalize_tensor, False)):
        f = torch.randn(1, 8, 4, 4)
        f[..., 0, 0] = 0
        f.requires_grad_()
        normalise(f).square().sum().backward()
        assert torch.isfinite(f.grad).all() == finite
    torch.testing.assert_close(losses.Perceptual.unit_length(f), lpips.normalize_tensor(f))


def test_missing_weights_are_one_sentence(losses, monkeypatch, tmp_path, capsys):
    """Offline: where to put the file, and the flag that does without. Never another network in its place."""
    import lpips
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(lpips.pretrained_networks.tv, "vgg16", offline)
    sentence = refused(lambda: losses.Perceptual("vgg"), capsys)
    assert "vgg16-397923af.pth" in sentence and str(tmp_path) in sentence and "--perceptual-net" in sentence


def test_artifacts_grow_with_strength(losses):
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(2, 3, 16, 16) * 1.6 - 0.8, size=64, mode="bilinear")
    for name, artifact in losses.ARTIFACTS.items():
        assert torch.allclose(artifact(x, 0.0), x, atol=1e-6), name
        errors = [losses.recon_loss(x, artifact(x, s)).item() for s in losses.STRENGTHS]
        assert 1e-5 < errors[0] < errors[1] < errors[2], name
    inner = slice(20, 44)
    assert torch.equal(losses.border(x, 1.0)[..., inner, inner], x[..., inner, inner])
    assert torch.equal(losses.grid(x, 1.0)[..., 1:8, 1:8], x[..., 1:8, 1:8])


def test_script(prepared):
    """The table has a line for each artifact and strength; each weighted term grows where it must."""
    done = command("03_losses.py", "--run", prepared, "--crop", "48", "--steps", "5", check=0)
    rows = [line.split() for line in done.stdout.splitlines() if " 0." in line or " 1.00 " in line]
    rows = [r for r in rows if r[0] in ("color", "grid", "blur", "corner", "droplet")]
    assert len(rows) == 15
    l2 = [float(r[-4]) for r in rows]
    assert all(a < b < c for a, b, c in zip(l2[0::3], l2[1::3], l2[2::3]))
    assert "untrained" in done.stdout and (prepared / "artifacts.png").stat().st_size > 10_000
