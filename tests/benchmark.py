"""Speed and memory of our code beside its peers', in turn in one process. Run by hand, not by
pytest:

    pip install diffusers && python tests/benchmark.py
    python tests/benchmark.py --device cuda --only "04, a whole step"

Peers: diffusers' AutoencoderKL encoder with VQModel's spatial-norm decoder, its
Kandinsky5Transformer3DModel, and our own plain forms (02, set_fast). Each pair runs step by step
in turn; the ratio is the other's time over ours (above 1: ours is faster), median of the pairs,
with the quartiles. Peak memory is that of a process of its own. On a GPU each item is measured in
fp32, bf16 and bf16 compiled, both sides in the same; --bf16 and --compiled choose one. Of what is
compiled, ours are the plain forms, as 04 --compile takes them, unless a row says otherwise.

--only has items whose name has these words in it, or the one item of exactly this name; a name
that fits nothing prints all names. Prints tables, and after each row writes what there is so far
to benchmark.json, or where --out says.
"""
import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
losses = importlib.import_module("03_losses")
training = importlib.import_module("04_train_vae")
evaluation = importlib.import_module("06_eval")
dit = importlib.import_module("07_train_dit")

CUDA = dict(width=128, size=240, batch=16, repeats=20)
CPU = dict(width=32, size=240, batch=2, repeats=9)
CHANNELS_LAST = torch.channels_last
warnings.filterwarnings("ignore")


# ---------------------------------------------------------------- shared by all that is measured
# `a` are the command line's values; `run` is a run folder with prepared pictures. What makes a
# step is a function of (a, run); a step is a function of nothing that can be called again and
# again.

def on_cuda(a):
    return a.device.startswith("cuda")


def changed(a, **more):
    return argparse.Namespace(**(vars(a) | more))


def kind(a):
    return ("bf16" if a.bf16 else "fp32") + (", compiled" if a.compiled else "")


def set_backends(a):
    """As 04 sets them for --precision fp32 or bf16; rows and 04 itself may have changed them."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = a.bf16
    torch.set_float32_matmul_precision("high" if a.bf16 else "highest")
    torch.compiler.reset()                # a row's recompilations are not counted with others'


def autocast(a):
    return torch.autocast(torch.device(a.device).type, torch.bfloat16, enabled=a.bf16)


def compiled(a, call):
    return torch.compile(call) if a.compiled else call


def backward(a, call, parameters, *inputs):
    """A step: call(*inputs), then the gradients of inputs and parameters for a fixed gradient of
    the output, or of the first of several."""
    leaves = [*parameters, *inputs]
    gradients = []
    for v in inputs:
        v.requires_grad_()

    def step():
        with autocast(a):
            out = call(*inputs)
        if isinstance(out, tuple):
            out = out[0]
        if not gradients:
            gradients.append(torch.randn_like(out))
        out.backward(gradients[0])
        for v in leaves:
            v.grad = None

    return step


def latent(a):
    return torch.randn(a.batch, 16, a.size // 8, a.size // 8, device=a.device)


def full_map(a):
    """A map of the decoder's full resolution, in the precision that convolutions leave it in."""
    x = torch.randn(a.batch, a.width, a.size, a.size, device=a.device)
    if a.bf16:
        x = x.bfloat16()
    return x.contiguous(memory_format=CHANNELS_LAST)


def our_vae(a):
    return model.build(model.Architecture(width=a.width))


def our_encoder(a):
    return our_vae(a).encoder


def our_discriminator(a):
    return losses.Discriminator(64, 2)


def random_lpips():
    """LPIPS with a VGG16 of random weights: costs what the real one costs, needs no download."""
    import lpips
    return lpips.LPIPS(net="vgg", lpips=True, pretrained=False, pnet_rand=True, verbose=False)


def vgg():
    """03's Perceptual around it."""
    net = losses.Perceptual("untrained")
    net.lpips = random_lpips()
    return net.requires_grad_(False).eval()


# ---------------------------------------------------------------- decoders, norms, a block of 07

def decoder(norm, fast, a, run):
    """fast None: as 04 has it, which compiles the plain forms."""
    if fast is None:
        fast = not a.compiled
    net = model.build(model.Architecture(width=a.width, decoder_norm=norm)).decoder
    net = model.set_fast(net, fast).to(a.device, memory_format=CHANNELS_LAST)
    return backward(a, compiled(a, net), net.parameters(), latent(a), latent(a))


def norm_and_swish(norm, fast, a, run):
    """A norm and swish alone, forward and backward: NormSwish, or the plain modules."""
    net = norm(a.width, model.Architecture(width=a.width))
    net = net.to(a.device, memory_format=CHANNELS_LAST)
    net.fast = fast

    def call(x, z):
        return model.norm_swish(net, x, z)

    return backward(a, compiled(a, call), net.parameters(), full_map(a), latent(a))


def peer_vae(a, norm):
    """diffusers' encoder and decoder of our shapes."""
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    widths = tuple(a.width * m for m in (1, 2, 2, 4))
    down = "DownEncoderBlock2D"
    up = "UpDecoderBlock2D"
    net = nn.Module()
    net.encoder = Encoder(in_channels=3, out_channels=16, layers_per_block=2,
                          block_out_channels=widths, double_z=True,
                          down_block_types=(down, down, down, "Attn" + down))
    net.decoder = Decoder(in_channels=16, out_channels=3, layers_per_block=2,
                          block_out_channels=widths, norm_type=norm,
                          up_block_types=("Attn" + up, up, up, up))
    return net.to(a.device)


def peer_decoder(norm, a, run):
    net = peer_vae(a, norm).decoder
    inputs = [latent(a), latent(a)] if norm == "spatial" else [latent(a)]
    return backward(a, compiled(a, net), net.parameters(), *inputs)


def block_inputs(a, n):
    """256 patches (256 px), the time, 256 text tokens."""
    x = torch.randn(a.batch, 256, n.width, device=a.device)
    c = torch.randn(a.batch, n.time_width, device=a.device)
    text = torch.randn(a.batch, 256, n.width, device=a.device)
    return x, c, text


def randomize(modulation):
    """Away from the zeros at which a block is the identity."""
    for p in modulation.parameters():
        nn.init.normal_(p, std=0.02)


def block(a, run):
    """One visual block of the paper's shape."""
    n = dit.Network()
    net = dit.Block(n, cross=True).to(a.device)
    randomize(net.modulation)
    place = torch.arange(256.0, device=a.device)
    turn = dit.turns(n.head_axes, 0 * place, place // 16, place % 16)
    forward = compiled(a, net)

    def call(x, c, text):
        return forward(x, c, turn, None, text, None)

    return backward(a, call, net.parameters(), *block_inputs(a, n))


def peer_block(a, run):
    from diffusers.models.transformers import transformer_kandinsky as kandinsky
    n = dit.Network()
    net = kandinsky.Kandinsky5TransformerDecoderBlock(n.width, n.time_width, n.ff_width,
                                                      sum(n.head_axes)).to(a.device)
    randomize(net.visual_modulation)
    rope = kandinsky.Kandinsky5RoPE3D(n.head_axes).to(a.device)
    places = [torch.arange(1), torch.arange(16), torch.arange(16)]
    rope = rope((a.batch, 1, 16, 16), places).flatten(1, 3).to(a.device)
    forward = compiled(a, net)

    def call(x, c, text):
        return forward(x, text, c, rope, None)

    return backward(a, call, net.parameters(), *block_inputs(a, n))


# ---------------------------------------------------------------- a whole step

def fresh(run):
    """A new run folder on the same pictures."""
    out = tempfile.mkdtemp(dir=run)
    Path(out, "data").symlink_to(Path(run, "data"))
    return out


def train_04(before_step, steps, a, run):
    """04 itself for some steps; before_step(vae) is called before each."""
    real = training.train_step
    perceptual = vgg()
    silent = io.StringIO()

    def train_step(parts, vae, *rest):
        before_step(vae)
        return real(parts, vae, *rest)

    def our_perceptual(net):
        return perceptual

    never = 10 ** 6
    s = training.Settings(run=fresh(run), crop=a.size, width=a.width, batch=a.batch, steps=steps,
                          device=a.device, workers=a.workers, compile=a.compiled,
                          precision="bf16" if a.bf16 else "fp32", latent_pictures=1,
                          val_pictures=1, log_every=never, val_every=never, save_every=never)
    numbers = (signal.SIGINT, signal.SIGTERM)       # which 04 begins to listen to
    handlers = [signal.getsignal(number) for number in numbers]
    bar = partial(training.tqdm, file=silent)
    with (mock.patch.object(training, "train_step", train_step),
          mock.patch.object(training, "tqdm", bar), mock.patch.object(data, "tqdm", bar),
          mock.patch.object(losses, "Perceptual", our_perceptual),
          contextlib.redirect_stdout(silent)):
        try:
            training.main(s)
        finally:
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)


def peer_step(a, run):
    """A whole step as one writes it first: the same losses and networks, diffusers' modules, the
    lpips package, an EMA loop, logged numbers."""
    from diffusers.training_utils import EMAModel
    vae = peer_vae(a, "spatial")
    disc = losses.Discriminator(64, 2).to(a.device)
    perceptual = random_lpips().requires_grad_(False).eval().to(a.device)
    adam = dict(lr=1e-4, betas=(0.5, 0.9))
    optimizer = torch.optim.Adam(vae.parameters(), **adam)
    disc_optimizer = torch.optim.Adam(disc.parameters(), **adam)
    ema = EMAModel(vae.parameters(), decay=0.9999)
    weights = losses.Losses()
    pictures = batches(a, run, a.batch, data.loader_workers(a, torch.device(a.device)))
    encoder = compiled(a, vae.encoder)
    decoder = compiled(a, vae.decoder)

    def step():
        x = losses.from_uint8(next(pictures).to(a.device))
        with autocast(a):
            mu, logvar = encoder(x).chunk(2, dim=1)
            q = model.Posterior(mu, logvar)
            z = q.sample()
            x_hat = decoder(z, z)
        x_hat = x_hat.float()
        recon = F.mse_loss(x_hat, x)
        perc = perceptual(x, x_hat).mean()
        kl = losses.kl_loss(q.mu.float(), q.logvar.float())
        adv = losses.adversarial_loss(disc(x_hat))
        optimizer.zero_grad()
        losses.total_loss(kl, recon, adv, perc, weights).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        disc_loss = losses.discriminator_loss(disc(x), disc(x_hat.detach()))
        disc_optimizer.zero_grad()
        disc_loss.backward()
        nn.utils.clip_grad_norm_(disc.parameters(), 1.0)
        disc_optimizer.step()
        ema.step(vae.parameters())
        return [v.item() for v in (recon, perc, kl, adv, disc_loss)]

    return step


def batches(a, run, count, workers):
    """01's crops, `count` at a time, without end."""
    crops = data.Crops(Path(run, "data", "train"), a.size, "benchmark", 0)
    numbers = (list(range(first, first + count)) for first in range(0, 10 ** 8, count))
    return iter(DataLoader(crops, batch_sampler=numbers, num_workers=workers))


def beside_peer(a, run):
    """Seconds of a step of 04 and of the peer's, in turn, without the first two, which are slow."""
    peer = peer_step(a, run)
    times = []
    began = []

    def before_step(vae):
        if began:
            ours = now(a) - began.pop()
            times.append((ours, seconds_of(peer, a)))
        began.append(now(a))

    train_04(before_step, a.repeats + 3, a, run)
    return times[2:]


def fast_beside_plain(a, run):
    """Seconds of steps of one run of 04, with the fast forms and with the plain ones in turn."""
    marks = []

    def before_step(vae):
        model.set_fast(vae, len(marks) % 2 == 0)
        marks.append(now(a))

    train_04(before_step, 2 * (a.repeats + 2) + 1, a, run)
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    return list(zip(seconds[0::2], seconds[1::2]))[2:]


def as_it_is(vae):
    """The forms that 04 chose."""


def make_fast(vae):
    model.set_fast(vae, True)


def make_plain(vae):
    model.set_fast(vae, False)


def step_flops(a):
    """Multiplications and additions of one step of 04, without the optimizers'."""
    s = losses.Losses()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        vae = our_vae(a)
        disc = losses.Discriminator(64, 2)
        perceptual = vgg().to("meta")
        x = torch.empty(a.batch, 3, a.size, a.size)
        x_hat, mu, logvar = vae(x, latent(changed(a, device="meta")))
        real = disc(x)
        fake = disc(x_hat)
        disc_loss = losses.discriminator_loss(real, fake)
        disc_loss.backward(inputs=list(disc.parameters()), retain_graph=True)
        total = losses.total_loss(losses.kl_loss(mu, logvar), losses.recon_loss(x, x_hat),
                                  losses.adversarial_loss(fake), perceptual(x, x_hat), s)
        total.backward(inputs=list(vae.parameters()))
    return counter.get_total_flops()


# ---------------------------------------------------------------- how it is measured

def now(a):
    if on_cuda(a):
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(f, a):
    began = now(a)
    f()
    return now(a) - began


def in_turn(make_ours, make_peer, a, run):
    """Pairs of seconds, after two steps of each that do not count."""
    ours = make_ours(a, run)
    peer = make_peer(a, run)
    for step in (ours, peer, ours, peer):
        step()
    return [(seconds_of(ours, a), seconds_of(peer, a)) for _ in range(a.repeats)]


def summary(times):
    ours, peer = zip(*times)
    ratios = sorted(p / o for o, p in times)
    last = len(ratios) - 1
    return dict(ours=statistics.median(ours), peer=statistics.median(peer),
                ratio=statistics.median(ratios), low=ratios[round(0.25 * last)],
                high=ratios[round(0.75 * last)], pairs=len(ratios))


def two_steps(make, a, run):
    step = make(a, run)
    step()
    step()


@dataclass(frozen=True)
class Item:
    """All three are functions of (a, run)."""
    times: Callable     # pairs of seconds
    ours: Callable      # does two steps, for the peak of memory
    peer: Callable


def pair(ours, peer):
    """An Item of two functions that make steps."""
    return Item(partial(in_turn, ours, peer), partial(two_steps, ours), partial(two_steps, peer))


def peak(a, name, side):
    """GiB at the peak of two steps in a process of its own, weights and optimizer states too,
    above what it had after imports; None where it failed or nobody counts."""
    if on_cuda(a):
        torch.cuda.empty_cache()                    # both share the GPU
    line = [sys.executable, __file__, "--child", name, side, "--device", a.device]
    for flag in ("width", "size", "batch", "workers"):
        line += [f"--{flag}", str(getattr(a, flag))]
    for flag in ("bf16", "compiled"):
        line += [f"--{flag}"] * getattr(a, flag)
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        print(f"memory of {name}, {side}: {done.stderr}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def child(a, run):
    """What the process of its own prints."""
    name, side = a.child
    device = data.pick_device(a.device)
    set_backends(a)                                 # after it: picking forbids TF32
    work = partial(two_steps, whole_vae)
    if name in ITEMS:
        work = getattr(ITEMS[name], side)
    evaluation.reset_peak(device)
    before = evaluation.peak_gib(device)
    work(a, run)
    after = evaluation.peak_gib(device)
    print(json.dumps(None if after is None else after - before))


ITEMS = {
    "decoder: spatial norm (ours) beside GroupNorm (ours)": pair(
        partial(decoder, "spatial", None), partial(decoder, "group", None)),
    "decoder: spatial norm, ours beside diffusers'": pair(
        partial(decoder, "spatial", None), partial(peer_decoder, "spatial")),
    "decoder: GroupNorm, ours beside diffusers'": pair(
        partial(decoder, "group", None), partial(peer_decoder, "group")),
    "decoder: fast beside plain": pair(
        partial(decoder, "spatial", True), partial(decoder, "spatial", False)),
    "norm with swish: NormSwish beside F.silu(GroupNorm)": pair(
        partial(norm_and_swish, model.GroupNorm, True),
        partial(norm_and_swish, model.GroupNorm, False)),
    "norm with swish: NormSwish beside F.silu(SpatialNorm)": pair(
        partial(norm_and_swish, model.SpatialNorm, True),
        partial(norm_and_swish, model.SpatialNorm, False)),
    "04, a whole step": Item(
        beside_peer, partial(train_04, as_it_is, 2), partial(two_steps, peer_step)),
    "04, a whole step: fast beside plain": Item(
        fast_beside_plain, partial(train_04, make_fast, 2), partial(train_04, make_plain, 2)),
    "07, a block of the paper's shape": pair(block, peer_block),
}


# ---------------------------------------------------------------- tried: networks
# What stands in the scripts, beside what does not.

class Flat(nn.Module):
    """The decoder with its latent made from a picture, so that it is called like the others."""
    def __init__(self, a):
        super().__init__()
        self.net = our_vae(a).decoder

    def forward(self, x):
        z = F.avg_pool2d(x, 8).repeat(1, 6, 1, 1)[:, :16]
        return self.net(z, z)


class Distance(nn.Module):
    """LPIPS between x and x plus noise, as a function of x."""
    def __init__(self, a):
        super().__init__()
        self.net = vgg()

    def forward(self, x):
        return self.net(x.detach(), x + 0.1 * torch.randn_like(x))


def layout(make, form, under_autocast, a, run):
    """A step of a network on pictures, its weights and the pictures in a memory format."""
    net = make(a).to(a.device, memory_format=form)
    x = torch.rand(a.batch, 3, a.size, a.size, device=a.device) * 2 - 1
    a = changed(a, bf16=a.bf16 and under_autocast)
    return backward(a, net, net.parameters(), x.contiguous(memory_format=form))


def layouts(make, under_autocast):
    return (partial(layout, make, CHANNELS_LAST, under_autocast),
            partial(layout, make, torch.contiguous_format, under_autocast))


def compiled_vae(fast, a, run):
    def make(a):
        return torch.compile(model.set_fast(our_vae(a), fast))

    return layout(make, CHANNELS_LAST, True, a, run)


def cudnn_benchmark(on, a, run):
    step = layout(our_vae, CHANNELS_LAST, True, a, run)

    def set_and_step():
        torch.backends.cudnn.benchmark = on
        step()

    return set_and_step


class UnitDistance(torch.autograd.Function):
    """LPIPS's distance of features f, of unit length, and g, (b, c, h, w), with its gradient in g
    written out: one map of their size is kept where autograd keeps five."""
    @staticmethod
    def forward(ctx, f, g, w):
        n = g[:, 0].numel()
        s = (g.square().sum(1, keepdim=True) + 1e-10).rsqrt()
        e = torch.addcmul(f, g, s, value=-1)
        u = e * w[:, None, None]
        distance = torch.dot(e.movedim(1, -1).flatten(), u.movedim(1, -1).flatten()) / n
        along = torch.mul(u, g, out=e).sum(1, keepdim=True)
        u = u.mul_(s).addcmul_(g, along * s ** 3, value=-1)
        ctx.save_for_backward(u.mul_(-2 / n))
        return distance

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient * ctx.saved_tensors[0], None


class WrittenOut(Distance):
    def forward(self, x):
        with torch.no_grad():
            targets = self.net.features(x)
        lpips = self.net.lpips
        found = lpips.net(lpips.scaling_layer(x + 0.1 * torch.randn_like(x)))
        total = 0.0
        for f, g, linear in zip(targets, found, lpips.lins):
            total = total + UnitDistance.apply(f, g, linear.model[-1].weight.flatten())
        return total


def distance(written_out, a, run):
    """LPIPS as it is or written out; both equal in value and gradient."""
    nets = (Distance(a), WrittenOut(a))
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.rand(1, 3, 64, 64).requires_grad_()
    results = []
    for net in nets:
        torch.manual_seed(0)
        value = net(x)
        results.append((value, *torch.autograd.grad(value, x)))
    for one, other in zip(*results):
        assert (one - other).abs().max() < 1e-4 * one.abs().max()

    def make(a):
        return nets[written_out]

    return layout(make, CHANNELS_LAST, False, a, run)


# ---------------------------------------------------------------- tried: operations

def operation(f, a, run):
    """f of a full-size map of the decoder, without gradients."""
    return partial(f, full_map(a))


def upsampling(transposed, a, run):
    """Nearest neighbor and a convolution, as one transposed convolution with a 4 x 4 kernel: 4/9
    of the multiplications, equal up to rounding."""
    c = 2 * a.width
    net = model.Upsample(c, model.Architecture()).to(a.device, memory_format=CHANNELS_LAST)
    x = torch.randn(a.batch, c, a.size // 2, a.size // 2, device=a.device)
    x = x.contiguous(memory_format=CHANNELS_LAST)
    box = torch.ones(1, 1, 2, 2, device=a.device)

    def call(x):
        kernel = net.conv.weight.flip(2, 3).transpose(0, 1).reshape(-1, 1, 3, 3)
        kernel = F.conv_transpose2d(kernel, box).reshape(c, c, 4, 4)
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.conv_transpose2d(x, kernel, net.conv.bias, stride=2, padding=3)

    assert (call(x) - net(x)).abs().max() < 1e-2
    return backward(a, call if transposed else net, net.parameters(), x)


def pool_blocks(x):
    return model.block_sum(x, x[:, :, ::8, ::8])


def sum_blocks(x):
    return x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).sum((3, 5))


GROUPS = model.Architecture.groups


def squared_deviations(x):
    """A group's variance, (b, c, 1, 1), as 02's NormSwish computes it: mean of (x - m)^2."""
    exact = torch.promote_types(x.dtype, torch.float32)
    m = model.group_mean(x.mean((2, 3), dtype=exact), GROUPS)
    square = F.mse_loss(x.to(exact), m.expand_as(x), reduction="none")
    return model.group_mean(square.mean((2, 3)), GROUPS)


def var_mean(x):
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (GROUPS, -1))
    variance, _ = torch.var_mean(groups, (2, 3, 4), correction=0)
    return variance.repeat_interleave(groups.shape[2], 1)[..., None, None]


def mean_of_squares(x):
    """E[x^2] - m^2, which cancels where the mean is large."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    m = model.group_mean(x.mean((2, 3)), GROUPS)
    return model.group_mean(x.square().mean((2, 3)), GROUPS) - m.square()


def variance(f, a, run):
    x = full_map(a)
    assert torch.allclose(f(x), squared_deviations(x), atol=1e-3)
    return partial(f, x)


def pad_by_op(x):
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


def pad_by_slices(x):
    x = torch.cat([x[:, :, 1:2], x, x[:, :, -2:-1]], 2)
    return torch.cat([x[..., 1:2], x, x[..., -2:-1]], 3)


def pad_by_index(x):
    x = x.permute(0, 2, 3, 1)                       # channels last in name too: so they stay
    x = x.index_select(1, reflected(x.shape[1], x.device))
    x = x.index_select(2, reflected(x.shape[2], x.device))
    return x.permute(0, 3, 1, 2)


@lru_cache
def reflected(n, device):
    """1, 0, 1, ..., n - 1, n - 2."""
    return torch.tensor([1, *range(n), n - 2], device=device)


def padding(pad, convolve, a, run):
    """Reflect padding of a map in channels_last, alone or with the convolution behind it: that
    pays for a layout that padding has changed."""
    x = full_map(a)
    assert torch.equal(pad(x), pad_by_op(x))
    if not convolve:
        return backward(a, pad, [], x)
    net = nn.Conv2d(a.width, a.width, 3).to(a.device, memory_format=CHANNELS_LAST)

    def call(x):
        return net(pad(x))

    return backward(a, call, net.parameters(), x)


def padded_layouts(a):
    """{way to pad: layout of what it makes of a map in channels_last}."""
    rows = {}
    for name, pad in (("op", pad_by_op), ("slices", pad_by_slices), ("index", pad_by_index)):
        last = pad(full_map(a)).is_contiguous(memory_format=CHANNELS_LAST)
        rows[name] = "channels_last" if last else "NCHW"
    return rows


def trunk_in_bf16(a, run):
    """The gradient of LPIPS (real weights) with its trunk in bf16: its cosine with that in
    float32, for pictures a little blurred, with little noise, with much."""
    net = losses.Perceptual("vgg").to(a.device)
    x = losses.from_uint8(data.val_crops(run, a.size, a.batch).to(a.device))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(a.device)
    cosines = []
    for y in (losses.blur(x, 0.25), x + 0.02 * noise, x + 0.2 * noise):
        gradients = []
        for bf16 in (False, True):
            y = y.detach().requires_grad_()
            with autocast(changed(a, bf16=bf16)):
                net(x, y).backward()
            gradients.append(y.grad.flatten())
        cosines.append(F.cosine_similarity(*gradients, dim=0).item())
    return cosines


# ---------------------------------------------------------------- tried: the table

TRIED = {   # name: (what is taken, the other), both functions that make a step
    "encoder: channels_last, plain layout": layouts(our_encoder, True),
    "decoder: channels_last, plain layout": layouts(Flat, True),
    "LPIPS (VGG): channels_last, plain layout": layouts(Distance, False),
    "discriminator: channels_last, plain layout": layouts(our_discriminator, False),
    "VAE: as it is, torch.compile": (
        partial(layout, our_vae, CHANNELS_LAST, True), partial(compiled_vae, False)),
    "VAE with --compile: from plain forms, from fast forms": (
        partial(compiled_vae, False), partial(compiled_vae, True)),
    "VAE: cudnn.benchmark on, off": (
        partial(cudnn_benchmark, True), partial(cudnn_benchmark, False)),
    "LPIPS (VGG): distance by autograd, written out": (
        partial(distance, False), partial(distance, True)),
    "up-sampling: interpolation and convolution, one transposed convolution": (
        partial(upsampling, False), partial(upsampling, True)),
    "reflect padding: the op, slices": (
        partial(padding, pad_by_op, False), partial(padding, pad_by_slices, False)),
    "reflect padding: the op, an index": (
        partial(padding, pad_by_op, False), partial(padding, pad_by_index, False)),
    "reflect padding and convolution: the op, slices": (
        partial(padding, pad_by_op, True), partial(padding, pad_by_slices, True)),
    "reflect padding and convolution: the op, an index": (
        partial(padding, pad_by_op, True), partial(padding, pad_by_index, True)),
    "sum over 8 x 8 blocks: pooling, sum": (
        partial(operation, pool_blocks), partial(operation, sum_blocks)),
    "a group's variance: mean of (x - m)^2, torch.var_mean": (
        partial(variance, squared_deviations), partial(variance, var_mean)),
    "a group's variance: mean of (x - m)^2, E[x^2] - m^2": (
        partial(variance, squared_deviations), partial(variance, mean_of_squares)),
}
NEEDS_CUDA = {"VAE: cudnn.benchmark on, off"}
LAYOUTS = "reflect padding: layouts"
BF16_TRUNK = "LPIPS gradient, bf16 trunk"


def try_all(a, run, names, keep):
    """The rows of TRIED among `names`, and two lines below them."""
    print(f"\n{where(a)}\n| tried: taken, other | taken, ms | other, ms "
          "| other / taken (quartiles) |\n|---|---|---|---|")
    for name in [name for name in TRIED if name in names]:
        if name in NEEDS_CUDA and not on_cuda(a):
            keep(f"{name}, {kind(a)}", "needs cuda")
            print(f"| {name} | needs cuda | | |")
            continue
        set_backends(a)
        try:
            row = summary(in_turn(*TRIED[name], a, run))
        except torch.OutOfMemoryError:
            print(f"| {name} | out of memory | | |", flush=True)
            continue
        keep(f"{name}, {kind(a)}", row)
        print(f"| {name} | {1e3 * row['ours']:.1f} | {1e3 * row['peer']:.1f} | {ratio(row)} |",
              flush=True)
    set_backends(a)
    if LAYOUTS in names:
        row = padded_layouts(a)
        keep(f"{LAYOUTS}, {kind(a)}", row)
        print("reflect padding of a map in channels_last gives: "
              + ", ".join(f"{way} {form}" for way, form in row.items()))
    if BF16_TRUNK in names and not a.bf16:
        try:
            cosines = trunk_in_bf16(a, run)
        except SystemExit:                          # 03 has said which file LPIPS needs
            return
        keep(BF16_TRUNK, cosines)
        print("LPIPS with its trunk in bf16: cosine of its gradient with float32's, for a slight "
              "blur, little noise, much noise: " + ", ".join(f"{c:.2f}" for c in cosines))


# ---------------------------------------------------------------- how cost grows

def whole_vae(a, run):
    """Forward and backward of the VAE alone."""
    net = our_vae(a).to(a.device, memory_format=CHANNELS_LAST)
    x = torch.rand(a.batch, 3, a.size, a.size, device=a.device)
    return backward(a, net, net.parameters(), x, latent(a))


def attention_share(a):
    """Attention's share of the forward pass: of its time, and of the multiplications at the
    paper's width."""
    spent = []

    def timed(forward, x, z=None):
        out = []
        spent.append(seconds_of(lambda: out.append(forward(x, z)), a))
        return out[0]

    net = our_vae(a).to(a.device, memory_format=CHANNELS_LAST)
    for module in net.modules():
        if isinstance(module, model.AttnBlock):
            module.forward = partial(timed, module.forward)
    x = torch.rand(a.batch, 3, a.size, a.size, device=a.device)
    with torch.no_grad():
        total = seconds_of(lambda: net(x), a)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        paper = model.build(model.Architecture())
        paper(torch.empty(1, 3, a.size, a.size))
    attention = 0
    counts = counter.get_flop_counts()
    for name, module in paper.named_modules():
        if isinstance(module, model.AttnBlock):
            attention += sum(counts[f"VAE.{name}"].values())
    return sum(spent) / total, attention / counter.get_total_flops()


def growth(a, run):
    """Seconds and GiB of the VAE's forward and backward against size, width and batch, one at a
    time."""
    print(f"\n{where(a)}\n| picture, px | width | batch | s | s a megapixel | GiB "
          "| attention, share of forward's time | of its FLOPs at width 128 |\n"
          "|---|---|---|---|---|---|---|---|")
    base = dict(size=min(256, a.largest), width=a.width, batch=1)
    changes = [dict(size=n) for n in (128, 256, 512, 1024) if n <= a.largest]
    changes += [dict(width=a.width * 2), dict(batch=2), dict(batch=4)]
    rows = []
    for change in changes:
        b = changed(a, **(base | change))
        step = whole_vae(b, run)
        repeats = 5
        if b.size < 1024:
            step()
        else:
            repeats = 1     # a minute a step on a CPU, where a first one is not much slower
        seconds = statistics.median(seconds_of(step, b) for _ in range(repeats))
        by_time, by_flops = attention_share(b)
        row = dict(size=b.size, width=b.width, batch=b.batch, seconds=seconds,
                   gib=peak(b, "vae", "ours"), attention=(by_time, by_flops))
        rows.append(row)
        megapixels = b.batch * b.size ** 2 / 1e6
        print(f"| {b.size} | {b.width} | {b.batch} | {seconds:.2f} | {seconds / megapixels:.1f} "
              f"| {gib(row['gib'])} | {by_time:.2f} | {by_flops:.2f} |", flush=True)
    return rows


# ---------------------------------------------------------------- the loader, several processes

def loader(a, run):
    """Pictures a second that 01's Crops give, by number of workers: what a step may use up before
    it waits."""
    rows = {}
    for workers in [n for n in (0, 1, 2, 4, 8) if n <= os.cpu_count()]:
        items = batches(a, run, 16, workers)
        next(items)
        began = time.perf_counter()
        for _ in range(12):
            next(items)
        rows[workers] = 16 * 12 / (time.perf_counter() - began)
        del items
    print(f"\nloader, {a.size} px crops of 480 px pictures, pictures a second by workers: "
          + ", ".join(f"{workers}: {rate:.0f}" for workers, rate in rows.items()))
    return rows


def start_04(a, run, count, batch):
    """04 under torchrun with `count` processes of a thread each; its run folder and process."""
    out = fresh(run)
    steps = 2 * (a.repeats + 6)                     # of which the second half counts
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(count), "--", "04_train_vae.py", "--run", out,
            "--width", str(a.width), "--crop", str(a.size), "--batch", str(batch),
            "--steps", str(steps), "--log-every", str(steps // 2), "--val-every", str(2 * steps),
            "--val-pictures", "1", "--latent-pictures", "1", "--workers", "0",
            "--perceptual-net", "untrained", "--device", a.device]
    process = subprocess.Popen(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out, process


def rate(started):
    """Pictures a second of some runs together, once they have ended."""
    total = 0.0
    for out, process in started:
        if process.wait():
            sys.exit("04_train_vae.py failed under torchrun")
        total += list(data.read_jsonl(Path(out, "log.jsonl")))[-1]["pictures_per_second"]
    return total


def processes(a, run):
    """04 under torchrun with 1, 2, ... processes of one thread each (CPU) or one GPU each, the
    same pictures for each process; beside it as many runs that share nothing but the machine: what
    they lose it is that limits, the rest is communication."""
    most = torch.cuda.device_count() if on_cuda(a) else os.cpu_count()
    print("\n| processes | together, pictures a second | of as many times one | apart "
          "| of as many times one |\n|---|---|---|---|---|")
    rows = {}
    for n in [n for n in (1, 2, 4, 8) if n <= most]:
        together = rate([start_04(a, run, n, a.batch * n)])
        rows[n] = dict(together=together)
        line = f"| {n} | {together:.2f} | {together / n / rows[1]['together']:.2f} |"
        if on_cuda(a):
            line += " | |"
        else:
            apart = rate([start_04(a, run, 1, a.batch) for _ in range(n)])
            rows[n]["apart"] = apart
            line += f" {apart:.2f} | {apart / n / rows[1]['apart']:.2f} |"
        print(line, flush=True)
    return rows


# ---------------------------------------------------------------- what 07 makes of the device

# TFLOP/s in bf16 without sparsity, from the makers' data sheets.
PEAK = {"H200": 989, "H100": 989, "A100": 312, "4090": 165}


def utilization(a, run):
    """What 07's loss and its gradients make of the device: the paper's 2 B network on a GPU,
    small's on a CPU, 256 px, full prompts."""
    n = dit.Network()
    if not on_cuda(a):
        n = dit.Network(width=512, ff_width=2048, time_width=256, blocks=12)
    with torch.device(a.device):
        net = dit.build(n)
        x = torch.randn(a.batch, 16, 32, 32)
        noise = torch.randn(a.batch, 16, 32, 32)
        t = torch.rand(a.batch)
        tokens = torch.randn(a.batch, n.text_length, n.text_width)
        mask = torch.ones(a.batch, n.text_length, dtype=torch.bool)
        pooled = torch.randn(a.batch, n.pooled_width)

    def step(forward):
        with autocast(a):
            loss = dit.flow_loss(forward, x, noise, t, tokens, mask, pooled).mean()
        loss.backward()
        net.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step(net)
    step = partial(step, compiled(a, net))
    step()
    seconds = statistics.median(seconds_of(step, a) for _ in range(a.repeats))
    tflops = counter.get_total_flops() / seconds / 1e12
    row = dict(seconds=seconds, tflops=tflops, share=None)
    line = (f"\n07, {model.count(net):,} parameters, batch {a.batch}, {kind(a)}: {seconds:.3f} s, "
            f"{tflops:.2f} TFLOP/s")
    if on_cuda(a) and a.bf16:
        for name, top in PEAK.items():
            if name in torch.cuda.get_device_name():
                row["share"] = tflops / top
                line += f", {row['share']:.0%} of {top}"
    print(line, flush=True)
    return row


# ---------------------------------------------------------------- the tables

def device_name(a):
    if on_cuda(a):
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def where(a):
    return (f"{device_name(a)}, PyTorch {torch.__version__}, {kind(a)}; width {a.width}, "
            f"{a.size} px, batch {a.batch}")


def ratio(row):
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}, {row['pairs']} pairs)"


def gib(value):
    return "-" if value is None else f"{value:.2f}"


def measure_items(a, run, names, keep):
    """The rows of ITEMS among `names`."""
    print(f"\n{where(a)}\n| item | ours, ms | peer, ms | peer / ours, median (quartiles) "
          "| GiB: ours | peer |\n|---|---|---|---|---|---|")
    for name in [name for name in ITEMS if name in names]:
        set_backends(a)
        try:
            row = summary(ITEMS[name].times(a, run))
        except torch.OutOfMemoryError:
            print(f"| {name} | out of memory | | | | |", flush=True)
            continue
        for side in ("ours", "peer"):
            row[f"memory_{side}"] = peak(a, name, side)
        line = (f"| {name} | {1e3 * row['ours']:.1f} | {1e3 * row['peer']:.1f} | {ratio(row)} "
                f"| {gib(row['memory_ours'])} | {gib(row['memory_peer'])} |")
        if name == "04, a whole step":
            row["flops"] = step_flops(a)
            line += (f"\n(a step of ours: {row['flops'] / 1e9:.0f} GFLOP, "
                     f"{row['flops'] / row['ours'] / 1e9:.0f} a second)")
        keep(f"{name}, {kind(a)}", row)
        print(line, flush=True)


ALONE = {"growth": growth, "loader": loader, "processes": processes}
# The heading is what --only looks at too: "tried" has all of TRIED.
NAMES = {name: name for name in (*ITEMS, "utilization")}
NAMES |= {name: f"tried: {name}" for name in (*TRIED, LAYOUTS, BF16_TRUNK)}
NAMES |= {name: name for name in ALONE}


def choose(only):
    """Names of what --only asks for."""
    if only in NAMES:
        return {only}
    return {name for name, words in NAMES.items() if only in words}


def kinds(a):
    """The command line's values for each precision that is measured."""
    chosen = [(a.bf16, a.compiled)]
    if on_cuda(a) and not (a.bf16 or a.compiled):
        chosen = [(False, False), (True, False), (True, True)]
    return [changed(a, bf16=bf16, compiled=compiled) for bf16, compiled in chosen]


def measure(a, run, names):
    settings = {key: value for key, value in vars(a).items() if key != "child"}
    report = dict(device=device_name(a), torch=torch.__version__, settings=settings, rows={})

    def keep(name, row):
        report["rows"][name] = row
        data.write_text(Path(a.out), json.dumps(report, indent=1))

    for b in kinds(a):
        if names & ITEMS.keys():
            measure_items(b, run, names, keep)
        if "utilization" in names:
            set_backends(b)
            keep(f"utilization, {kind(b)}", utilization(b, run))
    # Of what was tried only rows that say so are compiled.
    uncompiled = {b.bf16: changed(b, compiled=False) for b in kinds(a)}
    for b in uncompiled.values():
        if names & {*TRIED, LAYOUTS, BF16_TRUNK}:
            try_all(b, run, names, keep)
    last = changed(kinds(a)[-1], compiled=False)
    for name in [name for name in ALONE if name in names]:
        set_backends(last)
        keep(name, ALONE[name](last, run))


def prepare(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        data.main(data.Settings(run=folder, count=8, val_share=0.5, workers=0))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="items whose name has this in it")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--workers", type=int, default=-1, help="of the loaders of a whole step")
    parser.add_argument("--largest", type=int, default=1024, help="picture of growth, px")
    parser.add_argument("--out", default="benchmark.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    for name in CPU:
        parser.add_argument(f"--{name}", type=int, help=f"[{CPU[name]}; {CUDA[name]} on a GPU]")
    a = parser.parse_args()
    for name, value in (CUDA if on_cuda(a) else CPU).items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    names = choose(a.only)
    if not names:
        parser.error(f"--only {a.only}: no such item; there are\n  " + "\n  ".join(NAMES.values()))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as run:
        prepare(run)
        if a.child:
            child(a, run)
        else:
            measure(a, run, names)


if __name__ == "__main__":
    main()
