"""Speed and memory of our code beside its peers', alternating in one process. Run by hand, not by pytest:

    pip install diffusers && python tests/benchmark.py            # CPU; --device cuda on a GPU; --only WORDS for some of it

Peers: diffusers' AutoencoderKL encoder with VQModel's spatial-norm decoder, and its Kandinsky5Transformer3DModel. Each pair runs step by step in turn;
the ratio is the peer's time over ours (above 1: ours is faster), median of the pairs, with the quartiles. Peak memory is that of a process of its own.
On a GPU each item is measured in fp32, bf16 and bf16 compiled, the peer always in the same; --bf16 and --compiled choose one.
Prints tables and writes benchmark.json, where --out says.
"""
import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
data, model, losses, training, dit = (importlib.import_module(n) for n in ("01_data", "02_model", "03_losses", "04_train_vae", "07_train_dit"))
CUDA = dict(width=128, size=240, batch=16, repeats=20)
CPU = dict(width=32, size=240, batch=2, repeats=9)
warnings.filterwarnings("ignore")


# ---------------------------------------------------------------- what is compared: each function makes a step that can be called again and again

def backward(net, *inputs, autocast=False):
    inputs = [v.requires_grad_() if v.is_floating_point() else v for v in inputs]
    def step():
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=autocast):
            out = net(*inputs)
        (out[0] if isinstance(out, tuple) else out).float().square().mean().backward()
        if hasattr(net, "zero_grad"):
            net.zero_grad(set_to_none=True)
    return step


def decoder(norm, a):
    net = model.build(model.Architecture(width=a.width, decoder_norm=norm)).decoder.to(a.device, memory_format=torch.channels_last)
    z = torch.randn(a.batch, 16, a.size // 8, a.size // 8, device=a.device)
    return backward(torch.compile(net) if a.compiled else net, z, z.clone(), autocast=a.bf16)


def peer_vae(a, norm):
    """diffusers' encoder and decoder of our shapes."""
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    widths, c = tuple(a.width * m for m in (1, 2, 2, 4)), dict(in_channels=3, out_channels=16, layers_per_block=2)
    down, up = "DownEncoderBlock2D", "UpDecoderBlock2D"
    net = nn.Module()
    net.encoder = Encoder(**c, block_out_channels=widths, down_block_types=(down,) * 3 + ("Attn" + down,), double_z=True)
    net.decoder = Decoder(in_channels=16, out_channels=3, layers_per_block=2, block_out_channels=widths, up_block_types=("Attn" + up,) + (up,) * 3, norm_type=norm)
    return net.to(a.device)


def peer_decoder(norm, a):
    z, net = torch.randn(a.batch, 16, a.size // 8, a.size // 8, device=a.device), peer_vae(a, norm).decoder
    return backward(torch.compile(net) if a.compiled else net, *([z, z.clone()] if norm == "spatial" else [z]), autocast=a.bf16)


def block(a):
    """One visual block of the paper's shape at 256 px: 256 patches, 256 text tokens."""
    n = dit.Network()
    net = dit.Block(n, cross=True).to(a.device)
    turn = dit.turns(n.head_axes, *(torch.arange(256.0, device=a.device) // d % m for d, m in ((256, 1), (16, 16), (1, 16))))
    x, c, text = (torch.randn(a.batch, *s, device=a.device) for s in ((256, n.width), (n.time_width,), (256, n.width)))
    for p in net.modulation.parameters():
        nn.init.normal_(p, std=0.02)
    f = torch.compile(net) if a.compiled else net
    net_forward = lambda x, c, text: f(x, c, turn, None, text, None)
    net_forward.zero_grad = net.zero_grad
    return backward(net_forward, x, c, text, autocast=a.bf16)


def peer_block(a):
    from diffusers.models.transformers.transformer_kandinsky import Kandinsky5RoPE3D, Kandinsky5TransformerDecoderBlock
    n = dit.Network()
    net = Kandinsky5TransformerDecoderBlock(n.width, n.time_width, n.ff_width, sum(n.head_axes)).to(a.device)
    rope = Kandinsky5RoPE3D(n.head_axes).to(a.device)((a.batch, 1, 16, 16), [torch.arange(1), torch.arange(16), torch.arange(16)]).flatten(1, 3).to(a.device)
    x, c, text = (torch.randn(a.batch, *s, device=a.device) for s in ((256, n.width), (n.time_width,), (256, n.width)))
    for p in net.visual_modulation.parameters():
        nn.init.normal_(p, std=0.02)
    f = torch.compile(net) if a.compiled else net
    net_forward = lambda x, c, text: f(x, text, c, rope, None)
    net_forward.zero_grad = net.zero_grad
    return backward(net_forward, x, c, text, autocast=a.bf16)


def vgg():
    """LPIPS with a VGG16 of random weights: costs what the real one costs, and needs no download."""
    import lpips
    net = losses.Perceptual("untrained")
    net.lpips = lpips.LPIPS(net="vgg", lpips=True, pretrained=False, pnet_rand=True, verbose=False)
    return net.requires_grad_(False).eval()


def peer_step(a, run):
    """A whole training step as one writes it first: the same losses and networks, diffusers' modules, the lpips package, an EMA loop, logged numbers."""
    import lpips
    from diffusers.training_utils import EMAModel
    vae, disc, perceptual = peer_vae(a, "spatial"), losses.Discriminator(64, 2).to(a.device), lpips.LPIPS(net="vgg", lpips=True, pretrained=False, pnet_rand=True, verbose=False).to(a.device)
    perceptual.requires_grad_(False).eval()
    optimizer, disc_optimizer = (torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.5, 0.9)) for net in (vae, disc))
    ema, crops, s, seen = EMAModel(vae.parameters(), decay=0.9999), data.Crops(Path(run, "data", "train"), a.size, 0), losses.Losses(), iter(range(10 ** 9))
    encoder, decoder = (torch.compile(net) if a.compiled else net for net in (vae.encoder, vae.decoder))
    autocast = lambda: torch.autocast(torch.device(a.device).type, torch.bfloat16, enabled=a.bf16)
    def step():
        x = losses.from_uint8(torch.stack([crops[next(seen)] for _ in range(a.batch)]).to(a.device))
        with autocast():
            q = model.Posterior(*encoder(x).chunk(2, dim=1))
            z = q.sample()
            x_hat = decoder(z, z)
        x_hat, mean, logvar = x_hat.float(), q.mean.float(), q.logvar.float()
        terms = [s.lambda_recon * F.mse_loss(x_hat, x), s.lambda_perc * perceptual(x, x_hat).mean(), s.lambda_kl * losses.kl_loss(mean, logvar),
                 s.lambda_adv * losses.adversarial_loss(disc(x_hat))]
        optimizer.zero_grad()
        sum(terms).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        disc_loss = losses.discriminator_loss(disc(x), disc(x_hat.detach()))
        disc_optimizer.zero_grad()
        disc_loss.backward()
        nn.utils.clip_grad_norm_(disc.parameters(), 1.0)
        disc_optimizer.step()
        ema.step(vae.parameters())
        return [v.item() for v in (*terms, disc_loss)]
    return step


def fresh(run):
    """A new run folder on the same pictures."""
    out = tempfile.mkdtemp(dir=run)
    Path(out, "data").symlink_to(Path(run, "data"))
    return out


def our_training(a, run, steps, between):
    """04 itself for some steps, with `between` called after each."""
    class Bar:
        def __init__(self, *args, **more): self.items = args[0] if args else ()
        def __iter__(self): return iter(self.items)
        def update(self): between()
        def write(self, line): pass
        def close(self): pass
    perceptual = vgg()
    real, training.tqdm, losses.Perceptual = training.tqdm, Bar, lambda net: perceptual
    settings = training.Settings(run=fresh(run), crop=a.size, width=a.width, batch=a.batch, steps=steps, device=a.device, workers=a.workers, latent_pictures=1, val_pictures=1,
                                 log_every=10 ** 6, val_every=10 ** 6, save_every=10 ** 6, compile=a.compiled, precision="bf16" if a.bf16 else "fp32")
    with contextlib.redirect_stdout(io.StringIO()):
        training.main(settings)
    training.tqdm = real


# ---------------------------------------------------------------- how it is measured

def clock(f, device):
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - began


def summary(ours, peer):
    ratios = sorted(p / o for o, p in zip(ours, peer))
    quarter = lambda q: ratios[round(q * (len(ratios) - 1))]
    return dict(ours=statistics.median(ours), peer=statistics.median(peer), ratio=statistics.median(ratios), low=quarter(0.25), high=quarter(0.75), pairs=len(ratios))


def pair(ours, peer, a):
    for f in (ours, peer, ours, peer):
        f()
    times = [(clock(ours, a.device), clock(peer, a.device)) for _ in range(a.repeats)]
    return summary(*zip(*times))


def whole_step(a, run):
    peer, times, mark = peer_step(a, run), [], [None]
    def between():
        wait = torch.cuda.synchronize if torch.device(a.device).type == "cuda" else lambda: None
        wait()
        now = time.perf_counter()
        times.append((now - mark[0] if mark[0] else None, clock(peer, a.device)))
        mark[0] = time.perf_counter()
    our_training(a, run, a.repeats + 3, between)
    return summary(*zip(*times[2:-1]))                      # without the first two, and the last, which saves


def step_flops(a):
    """Multiplications and additions of one step of 04, without the optimizers'."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        vae, disc, s = model.build(model.Architecture(width=a.width)), losses.Discriminator(64, 2), losses.Losses()
        x = torch.empty(a.batch, 3, a.size, a.size)
        x_hat, mean, logvar = vae(x, torch.empty(a.batch, 16, a.size // 8, a.size // 8))
        fake, real = disc(x_hat), disc(x)
        losses.discriminator_loss(real, fake).backward(inputs=list(disc.parameters()), retain_graph=True)
        losses.total_loss(x, x_hat, mean, logvar, fake, vgg().to("meta"), s)[0].backward(inputs=list(vae.parameters()))
    return counter.get_total_flops()


def peak(a, name, side):
    """GiB at the peak of two steps in a process of its own, weights and optimizer states too, above what it had after imports."""
    line = [sys.executable, __file__, "--device", a.device, "--child", name, side] + ["--bf16"] * a.bf16 + ["--compiled"] * a.compiled + ["--width", str(a.width), "--size", str(a.size), "--batch", str(a.batch)]
    done = subprocess.run(line, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1]) if done.returncode == 0 else sys.exit(done.stderr)


def memory(what):
    """Bytes of this process, VmRSS (now) or VmHWM (at the peak since it was last cleared); Linux."""
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(what)))


ITEMS = {   # name: (ours, peer), both functions of the arguments and a prepared run folder
    "decoder: spatial norm (ours) beside GroupNorm (ours)": (lambda a, run: decoder("spatial", a), lambda a, run: decoder("group", a)),
    "decoder: spatial norm, ours beside diffusers'": (lambda a, run: decoder("spatial", a), lambda a, run: peer_decoder("spatial", a)),
    "decoder: GroupNorm, ours beside diffusers'": (lambda a, run: decoder("group", a), lambda a, run: peer_decoder("group", a)),
    "04, a whole step": (None, peer_step),
    "07, a block of the paper's shape": (lambda a, run: block(a), lambda a, run: peer_block(a)),
}


# ---------------------------------------------------------------- what was tried: what stands in the scripts, beside what does not

def layout(make, last):
    """A step of a network on a picture, its weights and the picture in channels_last or not."""
    def build(a):
        net, form = make(a).to(a.device), torch.channels_last if last else torch.contiguous_format
        x = (torch.rand(a.batch, 3, a.size, a.size, device=a.device) * 2 - 1).contiguous(memory_format=form)
        return backward(net.to(memory_format=form), x)
    return build


class Distance(nn.Module):
    """LPIPS between x and x plus noise, as a function of x."""
    def __init__(self, a):
        super().__init__()
        self.net = vgg()

    def forward(self, x):
        return self.net(x.detach(), x + 0.1 * torch.randn_like(x))


class UnitDistance(torch.autograd.Function):
    """LPIPS's distance of features f, of unit length, and g, (b, c, h, w), with its gradient in g written out: one map of their size is kept where autograd keeps five."""
    @staticmethod
    def forward(ctx, f, g, w):
        n, s = g[:, 0].numel(), (g.square().sum(1, keepdim=True) + 1e-10).rsqrt()
        e = torch.addcmul(f, g, s, value=-1)
        u = e * w[:, None, None]
        distance = torch.dot(*(v.movedim(1, -1).flatten() for v in (e, u))) / n
        along = torch.mul(u, g, out=e).sum(1, keepdim=True)
        ctx.save_for_backward(u.mul_(s).addcmul_(g, along * s ** 3, value=-1).mul_(-2 / n))
        return distance

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient * ctx.saved_tensors[0], None


class WrittenOut(Distance):
    def forward(self, x):
        with torch.no_grad():
            target = self.net.features(x)
        lpips = self.net.lpips
        features = lpips.net(lpips.scaling_layer(x + 0.1 * torch.randn_like(x)))
        return sum(UnitDistance.apply(f, g, lin.model[-1].weight.flatten()) for f, g, lin in zip(target, features, lpips.lins))


def distance(written_out):
    """LPIPS as it is or written out; both equal in value and gradient."""
    def build(a):
        nets, results = (Distance(a), WrittenOut(a)), []
        nets[1].load_state_dict(nets[0].state_dict())
        x = torch.rand(1, 3, 64, 64).requires_grad_()
        for net in nets:
            torch.manual_seed(0)
            value = net(x)
            results.append((value, *torch.autograd.grad(value, x)))
        for one, other in zip(*results):
            assert (one - other).abs().max() < 1e-5 * one.abs().max()
        return layout(lambda a: nets[written_out], True)(a)
    return build


class Flat(nn.Module):
    """The decoder with its latent made from a picture, so that it can be called like the others."""
    def __init__(self, a):
        super().__init__()
        self.net = our_vae(a).decoder

    def forward(self, x):
        z = F.avg_pool2d(x, 8).repeat(1, 6, 1, 1)[:, :16]
        return self.net(z, z)


def upsampling(transposed):
    """Nearest neighbour and a convolution, as one transposed convolution with a 4 x 4 kernel: 4/9 of the multiplications, equal up to rounding."""
    def build(a):
        c = 2 * a.width
        conv, x = model.Upsample(c, model.Architecture()).to(a.device, memory_format=torch.channels_last), torch.randn(a.batch, c, a.size // 2, a.size // 2, device=a.device)
        x, w, box = x.contiguous(memory_format=torch.channels_last), conv.conv.weight, torch.ones(1, 1, 2, 2, device=a.device)
        class Transposed(nn.Module):
            def forward(self, x):
                kernel = F.conv_transpose2d(w.flip(2, 3).transpose(0, 1).reshape(-1, 1, 3, 3), box).reshape(c, c, 4, 4)
                return F.conv_transpose2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, conv.conv.bias, stride=2, padding=3)
        assert (Transposed()(x) - conv(x)).abs().max() < 1e-3
        return backward(Transposed() if transposed else conv, x)
    return build


def operation(f):
    """f of a full-size map of the decoder, without gradients."""
    def build(a):
        x = torch.randn(a.batch, a.width, a.size, a.size, device=a.device).contiguous(memory_format=torch.channels_last)
        return lambda: f(x)
    return build


def trunk_in_bf16(a, run):
    """The gradient of LPIPS (real weights) with its trunk in bf16: its cosine with that in float32, for pictures a little blurred, with little noise, with much."""
    net, cosines = losses.Perceptual("vgg").to(a.device), []
    x = losses.from_uint8(data.val_crops(run, a.size, a.batch).to(a.device))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(a.device)
    for y in (losses.blur(x, 0.25), x + 0.02 * noise, x + 0.2 * noise):
        gradients = []
        for enabled in (False, True):
            y = y.detach().requires_grad_()
            with torch.autocast(torch.device(a.device).type, torch.bfloat16, enabled=enabled):
                net(x, y).backward()
            gradients.append(y.grad.flatten())
        cosines.append(F.cosine_similarity(*gradients, dim=0).item())
    return cosines


our_vae = lambda a: model.build(model.Architecture(width=a.width))
networks = {"encoder": lambda a: our_vae(a).encoder, "decoder": Flat,
            "LPIPS (VGG)": Distance, "discriminator": lambda a: losses.Discriminator(64, 2)}
TRIED = {f"{name}: channels_last, plain layout": (layout(make, True), layout(make, False)) for name, make in networks.items()} | {
    "VAE: as it is, torch.compile": (layout(our_vae, True), layout(lambda a: torch.compile(our_vae(a)), True)),
    "LPIPS (VGG): distance by autograd, written out": (distance(False), distance(True)),
    "up-sampling: interpolation and convolution, one transposed convolution": (upsampling(False), upsampling(True)),
    "sum over 8 x 8 blocks: pooling, sum": (operation(lambda x: F.avg_pool2d(x, 8) * 64), operation(lambda x: x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).sum((3, 5)))),
    "a group's variance: means of x and its square, torch.var_mean": (operation(lambda x: (x.mean((2, 3)), x.square().mean((2, 3)))), operation(lambda x: torch.var_mean(x, (2, 3)))),
}


def tried(a, run):
    print("\n| tried: taken, other | taken, ms | other, ms | other / taken (quartiles) |\n|---|---|---|---|")
    rows = {}
    for name, (ours, other) in TRIED.items():
        rows[name] = row = pair(ours(a), other(a), a)
        print(f"| {name} | {1e3 * row['ours']:.1f} | {1e3 * row['peer']:.1f} | {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) |", flush=True)
    rows["LPIPS gradient, bf16 trunk"] = cosines = trunk_in_bf16(a, run)
    print("LPIPS with its trunk in bf16: cosine of its gradient with float32's, for a slight blur, little noise, much noise: " + ", ".join(f"{c:.2f}" for c in cosines))
    return rows


# ---------------------------------------------------------------- how cost grows, the loader, several processes

def whole_vae(a, run):
    """Forward and backward of the VAE alone, and the share of its time that attention takes in the forward pass."""
    net = our_vae(a).to(a.device, memory_format=torch.channels_last)
    return backward(net, torch.rand(a.batch, 3, a.size, a.size, device=a.device), torch.randn(a.batch, 16, a.size // 8, a.size // 8, device=a.device), autocast=a.bf16)


def attention_share(a):
    """Attention's share of the forward pass: of its time, and of the multiplications of the paper's width."""
    spent = []
    def timed(f, x, z=None):
        out = []
        spent.append(clock(lambda: out.append(f(x, z)), a.device))
        return out[0]
    net = our_vae(a).to(a.device, memory_format=torch.channels_last)
    for m in net.modules():
        if isinstance(m, model.AttnBlock):
            m.forward = functools.partial(timed, m.forward)
    x = torch.rand(a.batch, 3, a.size, a.size, device=a.device)
    with torch.no_grad():
        total = clock(lambda: net(x), a.device)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.build(model.Architecture())(torch.empty(1, 3, a.size, a.size))
    flops = counter.get_flop_counts()
    attention = sum(v for name, per in flops.items() if name.split(".")[-1].isdigit() and ".attn." in f".{name}." or name.endswith("attn_1") for v in per.values())
    return sum(spent) / total, attention / counter.get_total_flops()


def growth(a):
    """Seconds and GiB of the VAE's forward and backward against size, width and batch, one at a time."""
    print("\n| picture, px | width | batch | s | s a megapixel | GiB | attention, share of forward's time | of its FLOPs at width 128 |\n|---|---|---|---|---|---|---|---|")
    rows, base = [], dict(size=256, width=a.width, batch=1)
    for change in [dict(size=n) for n in (128, 256, 512, 1024)] + [dict(width=a.width * 2)] + [dict(batch=n) for n in (2, 4)]:
        b = argparse.Namespace(**(vars(a) | base | change))
        step = whole_vae(b, None)
        if b.size < 1024:                                   # a minute a step on a CPU, where a first one is not much slower than others
            step()
        seconds = statistics.median(clock(step, a.device) for _ in range(5 if b.size < 1024 else 1))
        row = dict(size=b.size, width=b.width, batch=b.batch, seconds=seconds, gib=peak(b, "vae", "ours"), attention=attention_share(b))
        rows.append(row)
        print(f"| {b.size} | {b.width} | {b.batch} | {seconds:.2f} | {seconds / (b.batch * b.size ** 2 / 1e6):.1f} | {row['gib']:.2f} | {row['attention'][0]:.2f} | {row['attention'][1]:.2f} |", flush=True)
    return rows


def loader(a, run):
    """Pictures a second that 01's Crops give, by number of workers: what a step may use up before it waits."""
    crops, rows = data.Crops(Path(run, "data", "train"), a.size, 0), {}
    for workers in (0, 1, 2, 4, 8):
        if workers <= os.cpu_count():
            items = iter(torch.utils.data.DataLoader(crops, batch_sampler=([16 * i + j for j in range(16)] for i in range(10 ** 6)), num_workers=workers))
            next(items)
            rows[workers] = 16 * 12 / clock(lambda: [next(items) for _ in range(12)], "cpu")
            del items
    print(f"\nloader, {a.size} px crops of 480 px pictures, pictures a second by workers: " + ", ".join(f"{k}: {v:.0f}" for k, v in rows.items()))
    return rows


def processes(a, run):
    """04 under torchrun with 1, 2, ... processes of one thread each (CPU) or one GPU each, the same pictures for each process;
    beside it as many runs that share nothing but the machine: what they lose it is that limits, the rest is communication."""
    def start(n, batch):
        out = fresh(run)
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "--", "04_train_vae.py", "--run", out, "--width", str(a.width), "--crop", "240", "--batch", str(batch),
                "--steps", "30", "--log-every", "15", "--val-every", "100", "--val-pictures", "1", "--latent-pictures", "1", "--workers", "0", "--perceptual-net", "untrained", "--device", a.device]
        return out, subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    def rate(runs):
        if any(process.wait() for _, process in runs):
            sys.exit("04_train_vae.py failed under torchrun")
        return sum(list(data.read_jsonl(Path(out, "log.jsonl")))[-1]["pictures_per_second"] for out, _ in runs)
    most, rows = torch.cuda.device_count() if a.device.startswith("cuda") else os.cpu_count(), {}
    print("\n| processes | together, pictures a second | of as many times one | apart | of as many times one |\n|---|---|---|---|---|")
    for n in [n for n in (1, 2, 4, 8) if n <= most]:
        together, apart = rate([start(n, a.batch * n)]), None if a.device.startswith("cuda") else rate([start(1, a.batch) for _ in range(n)])
        rows[n] = dict(together=together, apart=apart)
        print(f"| {n} | {together:.2f} | {together / n / rows[1]['together']:.2f} |" + (f" {apart:.2f} | {apart / n / rows[1]['apart']:.2f} |" if apart else " | |"), flush=True)
    return rows


PEAK = {"H200": 989, "H100": 989, "A100": 312, "4090": 165}          # TFLOP/s in bf16 without sparsity, of the makers' data sheets


def utilisation(a):
    """What 07's loss and its gradients make of the device: the paper's 2 B network on a GPU, small's on a CPU, 256 px, full prompts."""
    on_gpu = a.device.startswith("cuda")
    n = dit.Network() if on_gpu else dit.Network(width=512, ff_width=2048, time_width=256, blocks=12)
    with torch.device(a.device):
        net, b = dit.build(n), a.batch
        x, noise, t, tokens, pooled = torch.randn(b, 16, 32, 32), torch.randn(b, 16, 32, 32), torch.rand(b), torch.randn(b, n.text_length, n.text_width), torch.randn(b, n.pooled_width)
        mask = torch.ones(b, n.text_length, dtype=torch.bool)
    def step(f=net):
        with torch.autocast(torch.device(a.device).type, torch.bfloat16, enabled=a.bf16):
            loss = dit.flow_loss(f, x, noise, t, tokens, mask, pooled).mean()
        loss.backward()
        net.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as counter:
        step()
    f = torch.compile(net) if a.compiled else net
    step(f)
    seconds = statistics.median(clock(lambda: step(f), a.device) for _ in range(a.repeats))
    rate = counter.get_total_flops() / seconds / 1e12
    peak = next((v for k, v in PEAK.items() if on_gpu and k in torch.cuda.get_device_name()), None)
    print(f"\n07, {model.count(net):,} parameters, batch {b}: {seconds:.3f} s, {rate:.2f} TFLOP/s" + (f", {rate / peak:.0%} of {peak}" if peak and a.bf16 else ""))
    return dict(seconds=seconds, tflops=rate, share=rate / peak if peak and a.bf16 else None)


def prepare(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        data.main(data.Settings(run=folder, count=8, val_share=0.5, workers=0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="items whose name has this in it")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--out", default="benchmark.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    for name, value in CPU.items():
        parser.add_argument(f"--{name}", type=int)
    a = parser.parse_args()
    for name, value in (CUDA if a.device.startswith("cuda") else CPU).items():
        setattr(a, name, getattr(a, name) or value)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as run:
        if a.child:
            name, side = a.child
            prepare(run)
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")          # the peak begins anew here
            if name.startswith("04") and side == "ours":
                our_training(a, run, 2, lambda: None)
            else:
                step = (whole_vae if name == "vae" else ITEMS[name][side == "peer"])(a, run)
                step(), step()
            print(torch.cuda.max_memory_allocated() / 2 ** 30 if a.device.startswith("cuda") else (memory("VmHWM") - before) / 2 ** 30)
            return
        prepare(run)
        device, rows = torch.cuda.get_device_name() if a.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads", {}
        every = [(False, False), (True, False), (True, True)] if a.device.startswith("cuda") and not (a.bf16 or a.compiled) else [(a.bf16, a.compiled)]
        for a.bf16, a.compiled in every:
            kind = ("bf16" if a.bf16 else "fp32") + ", compiled" * a.compiled
            print(f"\n{device}, PyTorch {torch.__version__}, {kind}; width {a.width}, {a.size} px, batch {a.batch}\n"
                  f"| item | ours, ms | peer, ms | peer / ours, median (quartiles) | GiB: ours | peer |\n|---|---|---|---|---|---|")
            for name, (ours, peer) in ITEMS.items():
                if a.only not in name:
                    continue
                row = whole_step(a, run) if name.startswith("04") else pair(ours(a, run), peer(a, run), a)
                row |= {f"memory_{side}": peak(a, name, side) for side in ("ours", "peer")}
                row |= dict(flops=step_flops(a)) if name.startswith("04") else {}
                rows[f"{name}, {kind}"] = row
                print(f"| {name} | {1e3 * row['ours']:.0f} | {1e3 * row['peer']:.0f} | {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}, {row['pairs']} pairs) "
                      f"| {row['memory_ours']:.2f} | {row['memory_peer']:.2f} |", flush=True)
                if "flops" in row:
                    print(f"(a step of ours: {row['flops'] / 1e9:.0f} GFLOP, {row['flops'] / row['ours'] / 1e9:.0f} a second)")
            if a.only in "utilisation":
                rows[f"utilisation, {kind}"] = utilisation(a)
        for name, measure in (("tried", lambda: tried(a, run)), ("growth", lambda: growth(a)), ("loader", lambda: loader(a, run)), ("processes", lambda: processes(a, run))):
            if a.only in name:
                rows[name] = measure()
    Path(a.out).write_text(json.dumps(dict(device=device, torch=torch.__version__, settings={k: v for k, v in vars(a).items() if k not in ("child", "bf16", "compiled")}, rows=rows), indent=1))


if __name__ == "__main__":
    main()
