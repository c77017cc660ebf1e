"""03_losses.py: values by hand, gradients that are finite, LPIPS, the neighbors."""
import math
import warnings

import lpips
import pytest
import torch
from conftest import Perceptual, losses, training


def test_kl_recon_and_psnr():
    """Eq. 3, torch.distributions' as a mean over elements, and L2 by hand."""
    mu, logvar = torch.randn(2, 2, 16, 4, 4)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    reference = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    assert losses.kl_loss(mu, logvar).item() == pytest.approx(reference.mean().item(), rel=1e-5)
    x = torch.zeros(2, 3, 8, 8)
    assert losses.recon_loss(x, x + 0.5).item() == pytest.approx(0.25)
    y = losses.from_uint8(torch.tensor([10, 20])[:, None, None, None].expand(2, 3, 8, 8))
    by_hand = [20 * math.log10(255 / 10), 20 * math.log10(255 / 20)]
    assert losses.psnr(x - 1, y).tolist() == pytest.approx(by_hand, abs=1e-4)


def test_adversarial_pair():
    """Both forms by hand, and their slopes where the discriminator is sure."""
    d = 1 / (1 + math.exp(8))  # the sigmoid of -8
    for kind, value, slope in (("hinge", 8.0, -1.0), ("log", math.log(1 - d), -d)):
        sure = torch.tensor([-8.0], requires_grad=True)
        loss = losses.adversarial_loss(sure, kind)
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=1e-3)
        assert sure.grad.item() == pytest.approx(slope, rel=1e-4)
    real, fake = torch.tensor([[0.5, 3.0], [-0.5, -4.0]])
    assert losses.discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.25))
    logistic = [math.log(1 + math.exp(v)) for v in (-0.5, -3.0, -0.5, -4.0)]
    judged = losses.discriminator_loss(real, fake, "log").item()
    assert judged == pytest.approx(sum(logistic) / 4, rel=1e-5)


def test_discriminator_and_total():
    """The known PatchGAN; the weighted sum of Table 3."""
    net = losses.Discriminator()
    assert net(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 62, 62)
    assert sum(p.numel() for p in net.parameters()) == 663_361
    s = training.Settings()
    total = losses.total_loss(2.0, 3.0, 5.0, 7.0, s)
    assert total == pytest.approx(2e-4 + 3.0 + 0.05 + 0.7, rel=1e-9)


def test_lpips_equals_the_package():
    """A random trunk below the package's own linear layers."""
    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore"):
        package = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    ours = Perceptual("untrained")
    x, y = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    assert ours(x, y).item() == pytest.approx(ours.lpips(x, y).mean().item(), rel=1e-5)
    ours.lpips = package
    ours.trained = True
    assert ours(x, y).item() == pytest.approx(package(x, y).mean().item(), rel=1e-5)


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


def test_variance_expansion():
    """Eq. 9 to 11 by hand; no overflow where z is enormous or the posterior has collapsed."""
    z = torch.full((2, 4, 1, 1), 2.5)
    logvar = torch.full_like(z, math.log(0.25))
    by_hand = 1 / (0.25 + 1e-6) + 1e-5 * math.exp(2.5 - 1)
    assert losses.variance_expansion(z, logvar).item() == pytest.approx(by_hand, rel=1e-6)
    wild = losses.variance_expansion(1e4 * z, logvar - 30)
    assert wild.isfinite() and wild > 1e5
