"""03_losses.py: values by hand, gradients that are finite, LPIPS, the neighbors, the artifacts."""
import math
import warnings

import lpips
import pytest
import torch
from conftest import Perceptual, losses, refused, training


def test_kl():
    """Eq. 3 by hand and against torch.distributions; a mean over elements."""
    zero = torch.zeros(2, 16, 4, 4)
    assert losses.kl_loss(zero, zero) == 0
    assert losses.kl_loss(zero + 2, zero).item() == pytest.approx(2.0)  # mu^2 / 2
    mu, logvar = torch.randn(2, 2, 16, 4, 4)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    reference = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    assert losses.kl_loss(mu, logvar).item() == pytest.approx(reference.mean().item(), rel=1e-5)


def test_recon_and_psnr():
    x = torch.zeros(2, 3, 8, 8)
    assert losses.recon_loss(x, x + 0.5).item() == pytest.approx(0.25)
    y = losses.from_uint8(torch.tensor([10, 20])[:, None, None, None].expand(2, 3, 8, 8))
    by_hand = [20 * math.log10(255 / 10), 20 * math.log10(255 / 20)]
    assert losses.psnr(x - 1, y).tolist() == pytest.approx(by_hand, abs=1e-4)
    assert losses.psnr(y + 9, y + 99).tolist() == [100, 100]  # clamped, the same 8 bits


def test_adversarial_pair():
    """Both forms by hand; and why hinge: where the discriminator is sure, "log" has no gradient."""
    sure = torch.tensor([-8.0], requires_grad=True)
    for kind, slope in (("hinge", -1.0), ("log", -1 / (1 + math.exp(8)))):
        gradient, = torch.autograd.grad(losses.adversarial_loss(sure, kind), sure)
        assert gradient.item() == pytest.approx(slope, rel=1e-4)
    fake = torch.tensor([2.0, -1.0])
    printed = sum(math.log(1 - 1 / (1 + math.exp(-v))) for v in (2, -1)) / 2  # Eq. 5
    assert losses.adversarial_loss(fake, "log").item() == pytest.approx(printed, rel=1e-5)
    assert losses.adversarial_loss(fake).item() == pytest.approx(-0.5)
    real = torch.tensor([0.5, 3.0])
    fake = torch.tensor([-0.5, -4.0])
    assert losses.discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.25))
    logistic = [math.log(1 + math.exp(v)) for v in (-0.5, -3.0, -0.5, -4.0)]
    judged = losses.discriminator_loss(real, fake, "log").item()
    assert judged == pytest.approx(sum(logistic) / 4, rel=1e-5)


def test_discriminator():
    """The known PatchGAN; each picture is judged on its own."""
    net = losses.Discriminator()
    assert net(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 62, 62)
    assert sum(p.numel() for p in net.parameters()) == 663_361
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]), atol=1e-5, rtol=1e-5)


def test_total_is_the_weighted_sum():
    s = training.Settings()  # Table 3
    total = losses.total_loss(2.0, 3.0, 5.0, 7.0, s.lambda_kl, s)
    assert total == pytest.approx(2e-4 + 3.0 + 0.05 + 0.7, rel=1e-9)


def test_lpips_equals_the_package():
    """Features, linear layers and sums as in lpips.LPIPS; the trunk is random, the linear layers
    are the package's own. Dropout stays off."""
    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore"):
        package = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    ours = Perceptual("untrained")
    plain = Perceptual("untrained")
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters()))
    x, y = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    assert plain(x, y).item() == pytest.approx(plain.lpips(x, y).mean().item(), rel=1e-5)
    ours.lpips = package
    ours.trained = True
    assert ours(x, y).item() == pytest.approx(package(x, y).mean().item(), rel=1e-5)
    assert ours(x, x) == 0


def test_perceptual_gradient_is_finite_at_zero_features():
    """Where the package's is NaN; the values agree."""
    perceptual = Perceptual("untrained")
    perceptual.lpips.scaling_layer = torch.nn.Identity()
    perceptual.lpips.net = torch.nn.Unflatten(0, (1, 1))  # one layer: the input itself
    f = torch.randn(1, 8, 4, 4)
    f[..., 0, 0] = 0
    for function, finite in ((perceptual.features, True), (lpips.normalize_tensor, False)):
        leaf = f.clone().requires_grad_()
        unit = function(leaf)[0]
        unit.square().sum().backward()
        assert leaf.grad.isfinite().all() == finite
        torch.testing.assert_close(unit.flatten(), lpips.normalize_tensor(f).flatten())


def test_missing_weights_are_one_sentence(monkeypatch, tmp_path, capsys):
    """Where to put the file, and the flag that does without; never another network in its place."""
    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(lpips.pretrained_networks.tv, "vgg16", offline)
    sentence = refused(lambda: losses.Perceptual("vgg"), capsys)
    assert "vgg16-397923af.pth" in sentence and str(tmp_path) in sentence
    assert "--perceptual-net" in sentence


def test_variance_expansion():
    """Eq. 9 to 11 by hand; no overflow where z is enormous or the posterior has collapsed."""
    z = torch.full((2, 4, 1, 1), 2.5)
    logvar = torch.full_like(z, math.log(0.25))
    by_hand = 1 / (0.25 + 1e-6) + 1e-5 * math.exp(2.5 - 1)
    assert losses.variance_expansion(z, logvar).item() == pytest.approx(by_hand, rel=1e-6)
    wild = losses.variance_expansion(1e4 * z, logvar - 30)
    assert wild.isfinite() and wild > 1e5


def test_free_bits():
    """max(nats, KL) for each channel: one below is counted as the threshold, without gradient."""
    mu = torch.zeros(2, 2, 4, 4)
    mu[:, 0] = 0.2  # 0.02 nats per value
    mu[:, 1] = 2.0  # 2 nats
    mu.requires_grad_()
    loss = losses.free_bits(mu, torch.zeros(2, 2, 4, 4), 0.5)
    assert loss.item() == pytest.approx((0.5 + 2.0) / 2)
    loss.backward()
    assert not mu.grad[:, 0].any() and torch.allclose(mu.grad[:, 1], torch.tensor(2.0 / 64))


def test_which_regularizer_and_its_weight():
    mu, logvar, z = torch.randn(3, 2, 4, 2, 2)

    def chosen(step=1, **more):
        return losses.regularizer(mu, logvar, z, step, training.Settings(**more))

    assert chosen() == (losses.kl_loss(mu, logvar), 1e-4)
    assert chosen(free_bits=0.7)[0] == losses.free_bits(mu, logvar, 0.7)
    assert [chosen(step, kl_warmup=4)[1] for step in (1, 4, 9)] == [0.25e-4, 1e-4, 1e-4]
    ve, weight = chosen(regularizer="ve", kl_warmup=4)
    assert ve == losses.variance_expansion(z, logvar) and weight == pytest.approx(0.1 / 12)


def test_script(prepared, capsys):
    losses.main(losses.Settings(run=str(prepared), crop=48, perceptual_net="untrained",
                                device="cpu"))
    rows = capsys.readouterr().out.splitlines()
    l2 = [float(row.split()[-3]) for row in rows[2:]]
    assert len(l2) == 15 and all(a < b < c for a, b, c in zip(l2[::3], l2[1::3], l2[2::3]))
    assert (prepared / "artifacts.png").is_file()
