"""Variance Expansion in the plane (its paper's Fig. 1, Appendix C), with 02's and 03's functions:

    python tests/toy.py runs/toy        # 90 seconds of one thread; writes runs/toy/toy.png

A tokenizer and a flow learn a tree of Gaussians, once with a weak KL and once with Variance
Expansion. Prints the posterior's variance beside the latents', the error of points that come back,
and how many decoded samples are rarer than 99% of the points.
"""
import importlib
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")
dit = importlib.import_module("07_train_dit")
# The appendix: 512 wide, 200,000 steps of 4,096. Its weights are lost: these are ours.
WIDTH, STEPS, BATCH, LR = 128, 1500, 512, 2e-3
WEIGHTS = {"kl": 1e-6, "ve": 3e-5}


def tree():
    """A branch is eight Gaussians in a row; it splits in two, six times. Mean 0, deviation 0.5."""
    rng = random.Random(0)
    means, spreads, weights = [], [], []
    branches = [(torch.zeros(2), math.pi / 2, 1.0, 1.0)]  # start, angle, length, weight
    for _ in range(7):
        split = []
        for start, angle, length, weight in branches:
            along = torch.tensor([math.cos(angle), math.sin(angle)])
            across = torch.stack([-along[1], along[0]])
            for i in range(8):
                means.append(start + along * length * (i + 0.5) / 8)
                spreads.append(torch.outer(along, along) * (length / 16) ** 2
                               + torch.outer(across, across) * (length / 60) ** 2)
                weights.append(weight)
            for side in (-1, 1):
                split.append((start + along * length, angle + side * rng.uniform(0.35, 0.65),
                              length * rng.uniform(0.6, 0.8), 0.5 * weight))
        branches = split
    means = torch.stack(means)  # (1016, 2)
    spreads = torch.stack(spreads)  # (1016, 2, 2)
    weights = torch.tensor(weights) / sum(weights)
    means = means - weights @ means
    variance = weights @ (means.square() + spreads.diagonal(dim1=1, dim2=2))
    scale = torch.diag(0.5 / variance.sqrt())
    parts = torch.distributions.MultivariateNormal(means @ scale, scale @ spreads @ scale)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights), parts)


def mlp(inputs, outputs):
    """Eight linear layers with ReLU between them."""
    layers = [nn.Linear(inputs, WIDTH), nn.ReLU()]
    for _ in range(6):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, outputs))


def fit(parameters, loss):
    """Minimize loss() with Adam, the rate falling to 0."""
    optimizer = torch.optim.Adam(parameters, lr=LR)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def tokenizer(regularizer, x):
    encoder = mlp(2, 4)
    decoder = mlp(2, 2)

    def loss():
        batch = x[torch.randint(len(x), (BATCH,))]
        q = model.Posterior(*encoder(batch).chunk(2, 1))
        z = q.sample()
        if regularizer == "ve":
            term = losses.variance_expansion(z, q.logvar)
        else:
            term = losses.kl_loss(q.mu, q.logvar)
        return losses.recon_loss(batch, decoder(z)) + WEIGHTS[regularizer] * term

    fit([*encoder.parameters(), *decoder.parameters()], loss)
    return encoder, decoder


def flow(z):
    """Fit a velocity to latents z (n, 2), as 07 does; returns samples (4096, 2)."""
    net = mlp(3, 2)

    def velocity(x_t, t):
        return net(torch.cat([x_t[:, :, 0, 0], t[:, None]], 1))[:, :, None, None]

    def loss():
        batch = z[torch.randint(len(z), (BATCH,))][:, :, None, None]
        return dit.flow_loss(velocity, batch, torch.randn_like(batch), torch.rand(BATCH), ())

    fit(net.parameters(), loss)
    sample = torch.randn(4096, 2, 1, 1)
    with torch.no_grad():
        for step in range(20):
            sample = sample - velocity(sample, torch.full((4096,), 1 - step / 20)) / 20
    return sample[:, :, 0, 0]


def density(points, side=256):
    """Where points (n, 2) lie, as a picture (3, side, side) of the square around them."""
    middle = points.median(0).values
    reach = 1.2 * (points - middle).abs().quantile(0.995).item()
    low, high = (middle - reach).tolist(), (middle + reach).tolist()
    count = torch.histogramdd(points, [side, side], range=[low[0], high[0], low[1], high[1]])[0]
    dark = (count / count.quantile(0.999).clamp(min=1)).clamp(max=1).sqrt()
    return (255 * (1 - dark.mT.flip(0))).byte().expand(3, -1, -1)


def main(run):
    torch.manual_seed(0)
    distribution = tree()
    x = distribution.sample((32_768,))
    rare = distribution.log_prob(x[:4096]).quantile(0.01)
    tiles = []
    for name in WEIGHTS:
        encoder, decoder = tokenizer(name, x)
        with torch.no_grad():
            q = model.Posterior(*encoder(x).chunk(2, 1))
            z = q.sample()
        sample = flow((z - z.mean(0)) / z.std(0)) * z.std(0) + z.mean(0)
        with torch.no_grad():
            made = decoder(sample)
            error = losses.recon_loss(x, decoder(z)).sqrt()
        lost = (distribution.log_prob(made) < rare).float().mean()
        print(f"{name}: posterior variance {q.logvar.exp().mean():.2g} of {z.var(0).mean():.2g}; "
              f"error {error:.3f}; {lost:.3f} of the samples are rarer than 99% of the points")
        tiles += [density(x), density(z), density(made)]
    data.save_sheet(Path(run, "toy.png"), tiles, 3, ["points", "latents", "samples, decoded"])


if __name__ == "__main__":
    main(sys.argv[1])
