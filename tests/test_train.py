"""04_train_vae.py: exact resume after kill -9, processes and accumulation, isolation of the two players, signals, bad numbers."""
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SERVER, beside, command, finished, killed, refused, started, torchrun

FLAGS = ["--width", "8", "--groups", "4", "--batch", "4", "--crop", "32", "--disc-width", "8", "--workers", "0", "--latent-pictures", "8",
         "--log-every", "1", "--val-every", "4", "--val-pictures", "4", "--save-every", "2", "--lr", "1e-3", "--optimizer", "adam", "--decay", "0"]


def settings(train, run, **more):
    base = dict(run=str(run), width=8, groups=4, batch=4, crop=32, disc_width=8, workers=0, latent_pictures=8, log_every=1, val_every=4,
                val_pictures=4, save_every=2, lr=1e-3, steps=4, optimizer="adam", decay=0.0)
    return train.Settings(**(train.PRESETS["demo"] | base | more))


def checkpoint(run):
    return torch.load(run / "vae.pt", weights_only=True)


def log(run):
    """What 04 logged, less the one field that is a time."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "pictures_per_second"} for row in rows if row["stage"] == "04_train_vae"]


def same(a, b, path=""):
    """Assert that two checkpoints are equal bit for bit, whatever is nested in them; run folders aside."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a.keys() - {"run", "path", "save_every"}:
            same(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}[{i}]")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, path


def close(a, b, tolerance):
    for part in ("model", "ema", "disc"):
        for name in a[part]:
            torch.testing.assert_close(a[part][name], b[part][name], atol=tolerance, rtol=0, msg=lambda m: f"{part}.{name}: {m}")


def follows(run, whole):
    """The logs agree: to rounding at the first step, and later as far as Adam lets rounding grow."""
    assert len(log(run)) == len(log(whole)) == 8
    for i, (a, b) in enumerate(zip(log(run), log(whole))):
        for k in a.keys() - {"stage"}:
            assert a[k] == pytest.approx(b[k], rel=1e-4 if i == 0 else 5e-2, abs=1e-5 if i == 0 else 2e-2), (i, k)


@pytest.fixture(scope="module", autouse=True)
def one_trunk(losses):
    """The untrained trunk is the same each time; making it takes a second, so the runs inside this process share one."""
    real, trunk = losses.Perceptual, losses.Perceptual("untrained")
    losses.Perceptual = lambda net: trunk
    yield
    losses.Perceptual = real


@pytest.fixture(scope="module")
def whole(train, prepared, tmp_path_factory):
    """An uninterrupted run of 8 steps."""
    run = tmp_path_factory.mktemp("whole")
    (run / "data").symlink_to(prepared / "data")
    train.main(settings(train, run, steps=8))
    return run


def test_checkpoint_and_log(train, model, data, whole):
    file = checkpoint(whole)
    assert file["stage"] == "04_train_vae" and file["step"] == 8 and file["settings"]["batch"] == 4
    assert file["parent"] == data.parent(whole / "data" / "train" / "index.json")
    assert file["latent_mean"].shape == file["latent_std"].shape == (16,) and (file["latent_std"] > 0).all()
    vae = model.load_vae(whole / "vae.pt")
    assert all(torch.equal(vae.state_dict()[k], v) for k, v in file["ema"].items())
    assert any(not torch.equal(file["model"][k], v) for k, v in file["ema"].items())
    rows = log(whole)
    assert [r["step"] for r in rows] == list(range(1, 9)) and [r["step"] for r in rows if "val_psnr" in r] == [4, 8]
    for r in rows:
        assert r["total"] == pytest.approx(sum(v for k, v in r.items() if k.startswith("weighted_")), rel=1e-4)
        assert r["weighted_perc"] == pytest.approx(0.1 * r["perc"]) and {"d_real", "d_fake", "disc", "grad_vae", "grad_disc"} <= r.keys()
    from PIL import Image
    assert Image.open(whole / "reconstructions.png").width > 400


def test_latent_statistics(train, model, data, whole):
    """Mean and deviation of z itself: drawing from the posteriors many times gives the same."""
    vae, s = model.load_vae(whole / "vae.pt"), settings(train, whole)
    crops = data.Crops(whole / "data" / "train", 32, "04_train_vae", 0)
    x = torch.stack([crops[i] for i in range(8)]).float() / 127.5 - 1
    torch.manual_seed(0)
    with torch.no_grad():
        q = vae.encode(x)
        z = torch.stack([q.sample() for _ in range(4000)]).movedim(2, 0).flatten(1)
    torch.testing.assert_close(z.mean(1), vae.latent_mean, atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(1), vae.latent_std, atol=0.02, rtol=0)


def killed_twice(run):
    killed(["04_train_vae.py", "--run", str(run), *FLAGS, "--steps", "8", "--workers", "2"], run, (1, 5))


@beside(killed_twice)
def test_resume_after_kill_is_exact(outcome, whole):
    """kill -9, the first time before there is a checkpoint; the same command goes on; weights, EMA, discriminator, optimizers and log equal the whole run's, bit for bit."""
    run, _ = outcome
    same(checkpoint(run), checkpoint(whole) | {"settings": checkpoint(whole)["settings"] | {"workers": 2}})
    assert log(run) == log(whole)


@pytest.mark.parametrize("flags", [dict(regularizer="ve"), dict(kl_warmup=6, free_bits=0.3)])
def test_neighbors_resume_exactly(flags, train, run, tmp_path_factory):
    """Variance Expansion, KL warm-up and free bits, killed -9: bit for bit the run that was not;
    the log has each term times its weight at that step."""
    alone = tmp_path_factory.mktemp("alone")
    (alone / "data").symlink_to((run / "data").resolve())
    train.main(settings(train, alone, steps=8, **flags))
    line = [part for k, v in flags.items() for part in ("--" + k.replace("_", "-"), str(v))]
    killed(["04_train_vae.py", "--run", str(run), *FLAGS, *line, "--steps", "8"], run, (3,))
    same(checkpoint(run), checkpoint(alone))
    assert log(run) == log(alone)
    for entry in log(run):
        weight = 0.1 / 12 if "regularizer" in flags else 1e-4 * min(1, entry["step"] / 6)
        assert entry["weighted_kl"] == pytest.approx(weight * entry["kl"])
        parts = sum(entry[f"weighted_{name}"] for name in ("kl", "recon", "adv", "perc"))
        assert entry["total"] == pytest.approx(parts, rel=1e-5)


def test_longer_run_goes_on(train, run, whole):
    """--steps may grow: 4 and then 8 steps are 8 steps."""
    train.main(settings(train, run))
    train.main(settings(train, run, steps=8))
    a, b = checkpoint(run), checkpoint(whole)
    for part in ("model", "ema", "disc", "optimizer", "disc_optimizer", "latent_mean", "latent_std"):
        same(a[part], b[part], part)


def interrupted(run):
    line = ["04_train_vae.py", "--run", run, *FLAGS, "--steps", "8", "--save-every", "100",
            "--workers", "2"]
    printed = run / "printed.txt"
    process = started(line, printed)
    log = run / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 2:      # by then both loader processes have delivered
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    text = finished(process, printed, 128 + signal.SIGINT)
    step = checkpoint(run)["step"]
    finished(started(line, printed), printed)
    return text, step


@beside(interrupted)
def test_signals_save(outcome, whole):
    """Ctrl-C to the whole process group, as a terminal sends it (SIGTERM: test_dit.py): saved, one
    sentence, and it goes on exactly."""
    run, (text, step) = outcome
    assert "Traceback" not in text and "the same command goes on" in text, text
    assert 0 < step < 8
    expected = checkpoint(whole)
    same(checkpoint(run), expected | {"settings": expected["settings"] | {"workers": 2}})


def test_contradicting_flags(train, run, capsys):
    train.main(settings(train, run, steps=2))
    for name, value in (("width", 16), ("lr", 2e-3), ("padding", "zeros"), ("seed", 1), ("lambda_adv", 0.1), ("batch", 8)):
        assert f"--{name.replace('_', '-')} " in refused(lambda: train.main(settings(train, run, **{name: value})), capsys)
    assert "beyond --steps" in refused(lambda: train.main(settings(train, run, steps=1)), capsys)
    before = (run / "vae.pt").read_bytes()
    train.main(settings(train, run, steps=2))
    assert "finished" in capsys.readouterr().out and (run / "vae.pt").read_bytes() == before


def test_changed_pictures(train, data, tmp_path, capsys):
    data.main(data.Settings(run=str(tmp_path), count=8, resize=32, val_share=0.3, workers=0))
    train.main(settings(train, tmp_path, steps=2))
    data.main(data.Settings(run=str(tmp_path), count=12, resize=32, val_share=0.3, workers=0))
    assert "has changed" in refused(lambda: train.main(settings(train, tmp_path, steps=4)), capsys)


def test_non_finite_stops_and_keeps_the_last_good_checkpoint(train, losses, run, capsys, monkeypatch):
    train.main(settings(train, run, steps=4))
    good = (run / "vae.pt").read_bytes()
    monkeypatch.setattr(losses, "recon_loss", lambda x, x_hat: (x - x_hat).square().mean() * float("inf"))
    sentence = refused(lambda: train.main(settings(train, run, steps=8, log_every=100)), capsys)
    assert "not finite" in sentence and "step 6" in sentence and "recon" in sentence
    assert (run / "vae.pt").read_bytes() == good


def test_accumulation_is_the_whole_batch(train, run, whole):
    train.main(settings(train, run, steps=8, accumulate=4))
    close(checkpoint(run), checkpoint(whole), 2e-3)          # 8 steps of Adam at 1e-3: 2e-3 is a quarter of what a weight can move
    follows(run, whole)


def test_goes_on_in_other_parts(train, run, whole):
    """Fewer GPUs, so more parts: the same batches, other rounding."""
    train.main(settings(train, run, steps=4))
    train.main(settings(train, run, steps=8, accumulate=2))
    close(checkpoint(run), checkpoint(whole), 2e-3)
    follows(run, whole)


def test_precision_of_convolutions(train, data):
    """TF32 only where a training asks for it; PyTorch would take it for convolutions by itself."""
    for precision in ("bf16", "tf32", "fp32"):
        data.start(train.Settings(precision=precision, device="cpu"))
        assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")
    torch.backends.cudnn.allow_tf32 = True
    data.pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32


def test_muon_resumes_exactly(train, run, monkeypatch):
    """Stopped between two checkpoints, with a rate that falls: bit for bit the run that was not."""
    muon = settings(train, run, optimizer="muon", decay=0.5, steps=6, save_every=2)
    train.main(muon)
    whole = checkpoint(run)
    (run / "vae.pt").unlink()
    real = train.train_step
    steps = iter(range(5))

    def interrupted(*inputs):
        if next(steps) == 4:
            raise KeyboardInterrupt
        return real(*inputs)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(muon)
    assert checkpoint(run)["step"] == 4
    monkeypatch.setattr(train, "train_step", real)
    train.main(muon)
    same(checkpoint(run), whole)
    assert whole["muon_optimizer"]["param_groups"][0]["lr"] == pytest.approx(5e-3 / 3)
    # Muon has the matrices, Adam the rest, and the whole of the discriminator.
    matrices = [w for w in whole["model"].values() if w.ndim > 1]
    assert len(whole["muon_optimizer"]["state"]) == len(matrices)
    assert len(whole["optimizer"]["state"]) == len(whole["model"]) - len(matrices)
    assert len(whole["disc_optimizer"]["state"]) == len(whole["disc"])


def test_muon_accumulates(train, run):
    """Four parts of a picture each are a batch of four."""
    muon = dict(optimizer="muon", steps=3, save_every=3)
    train.main(settings(train, run, **muon))
    whole = checkpoint(run)
    (run / "vae.pt").unlink()
    train.main(settings(train, run, accumulate=4, **muon))
    close(checkpoint(run), whole, 2e-3)


def on_two_processes(run):
    torchrun("04_train_vae.py", "--run", run, *FLAGS, "--steps", "8")


@beside(on_two_processes)
def test_two_processes_are_one(outcome, whole):
    """torchrun with two processes (gloo), half of the batch each."""
    run, _ = outcome
    close(checkpoint(run), checkpoint(whole), 2e-3)
    follows(run, whole)


def one_of_three(rank, port, run, other):
    """One process of three: 8 steps in `run`, 5 and then 3 in `other`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    data = importlib.import_module("01_data")
    train = importlib.import_module("04_train_vae")
    data.finish = data.dist.barrier           # one group for all; the first process writes
    for folder, steps in ((run, 8), (other, 5), (other, 8)):
        train.main(settings(train, folder, steps=steps, optimizer="muon", batch=6, save_every=5,
                            val_every=1))     # or the last of the five would look, and no other


def on_three_processes(run):
    other = run / "in two parts"
    other.mkdir()
    (other / "data").symlink_to(run / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [SERVER.Process(target=one_of_three, args=(rank, port, run, other))
             for rank in range(3)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    return [process.exitcode for process in group]


@beside(on_three_processes)
def test_three_processes_resume_exactly(outcome):
    """8 steps against 5 and 3, with three processes and Muon: equal bit for bit
    (DistributedDataParallel was not)."""
    run, codes = outcome
    other = run / "in two parts"
    assert codes == [0, 0, 0]
    same(checkpoint(run), checkpoint(other))
    assert log(run) == log(other) and len(log(run)) == 8


def by_other_start_methods(folder):
    code = """
import importlib, multiprocessing, sys
multiprocessing.set_start_method(sys.argv[1])
multiprocessing.set_forkserver_preload(["torch", "torchvision"])
data = importlib.import_module("01_data")
common = dict(run=sys.argv[2], workers=2, steps=1)
small = dict(crop=32, disc_width=8, latent_pictures=4, val_pictures=4, batch=4)
width = dict(width=48, ff_width=48, head_axes=(4, 10, 10), blocks=1)
stages = {"04_train_vae": small | dict(width=8, groups=4), "05_finetune_decoder": small,
          "07_train_dit": width | dict(size=48, batch=4, val_prompts=2, sample_steps=1)}
for name, more in stages.items():
    stage = importlib.import_module(name)
    stage.main(stage.Settings(**(stage.PRESETS["demo"] | common | more)))
"""
    started = {}
    for method in ("spawn", "forkserver"):
        run = folder / method
        run.mkdir()
        (run / "data").symlink_to((folder / "data").resolve())
        started[run] = subprocess.Popen([sys.executable, "-c", code, method, str(run)], cwd=ROOT,
                                        env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    ends = {}
    for run, process in started.items():
        _, err = process.communicate(timeout=150)
        ends[run] = process.returncode, err[-3000:]
    return ends


@beside(by_other_start_methods)
def test_loader_workers_by_other_start_methods(outcome):
    """04, 05 and 07 with two workers each: all that a worker needs can be pickled. (Linux's default
    is forkserver from Python 3.14 on.) Both methods beside each other."""
    _, ends = outcome
    assert len(ends) == 2
    for run, (code, err) in ends.items():
        assert code == 0, err
        assert all((run / name).is_file() for name in ("vae.pt", "vae_finetuned.pt", "dit.pt"))


def test_average_by_value(train, model, run):
    """After the first step the average has moved by 1 - 2 / 11 from the start, whatever ema_decay is."""
    train.main(settings(train, run, steps=1))
    torch.manual_seed(0)
    start, file = model.build(settings(train, run)).state_dict(), checkpoint(run)
    for name, w in file["model"].items():
        torch.testing.assert_close(file["ema"][name], torch.lerp(start[name], w, 9 / 11), atol=1e-7, rtol=1e-5)


def test_isolation(train, model, losses, run):
    """With lr 0 for one player the other still moves; and a player's gradient does not depend on the other's loss."""
    torch.manual_seed(0)
    start = {k: v.clone() for k, v in model.build(settings(train, run)).state_dict().items()}
    train.main(settings(train, run, steps=2, lambda_recon=0.0, lambda_perc=0.0, lambda_adv=0.0, lambda_kl=0.0))
    file = checkpoint(run)
    assert all(torch.equal(file["model"][k], v) for k, v in start.items())            # no loss of its own: the discriminator's did not reach the VAE
    torch.manual_seed(0)
    model.build(settings(train, run))            # as the script does: the VAE first, then the discriminator
    fresh = losses.Discriminator(8, 2).state_dict()
    assert all(not torch.equal(file["disc"][k], v) for k, v in fresh.items() if k.endswith("weight"))
    # The discriminator's first gradient is the same whatever weight its verdict has in the VAE's loss.
    norms = {row["grad_disc"] for row in log(run) if row["step"] == 1}
    (run / "vae.pt").unlink()
    (run / "log.jsonl").unlink()
    train.main(settings(train, run, steps=1, lambda_adv=10.0))
    assert norms == {row["grad_disc"] for row in log(run)}


def test_seed_reaches_the_noise(train, model, prepared, tmp_path, monkeypatch):
    """Posterior samples are a function of seed and step; the same step of two seeds shares nothing."""
    seen, forward = [], model.VAE.forward
    monkeypatch.setattr(model.VAE, "forward", lambda self, x, noise: (seen.append(noise), forward(self, x, noise))[1])
    for seed in (0, 1, 0):
        run = tmp_path / str(len(seen))
        run.mkdir()
        (run / "data").symlink_to(prepared / "data")
        train.main(settings(train, run, steps=2, seed=seed))
    assert len(seen) == 6 and all(torch.equal(seen[i], seen[4 + i]) for i in (0, 1))
    assert not any(torch.equal(a, b) for i, a in enumerate(seen[:4]) for b in seen[:i])


def test_bf16(train, run, whole):
    """Autocast on the CPU: weights stay FP32, losses are near the FP32 run's."""
    train.main(settings(train, run, steps=2, precision="bf16"))
    assert all(v.dtype == torch.float32 for v in checkpoint(run)["model"].values())
    a, b = log(run)[0], log(whole)[0]
    assert a["total"] == pytest.approx(b["total"], rel=0.03) and a["total"] != b["total"]


def test_it_learns(train, run):
    """Sixty steps halve the reconstruction loss."""
    train.main(settings(train, run, steps=60, save_every=60, val_every=60, lr=2e-3))
    rows = log(run)
    assert sum(r["recon"] for r in rows[-5:]) < 0.5 * sum(r["recon"] for r in rows[:5])


def test_sentences(train, run, tmp_path_factory, capsys):
    empty = tmp_path_factory.mktemp("empty")
    assert "run 01_data.py first" in refused(lambda: train.main(settings(train, empty)), capsys)
    assert "--batch 5" in refused(lambda: train.main(settings(train, run, batch=5, accumulate=2)), capsys)
    assert "--crop 36" in refused(lambda: train.main(settings(train, run, crop=36)), capsys)
    assert "a side of 64 is larger" in refused(lambda: train.main(settings(train, run, crop=64)), capsys)
    assert "--device cuda" in refused(lambda: train.main(settings(train, run, device="cuda")), capsys) if not torch.cuda.is_available() else True
    (run / "vae.pt").write_bytes(b"half a file")
    assert "cannot be read" in refused(lambda: train.main(settings(train, run)), capsys)
    assert (run / "vae.pt").read_bytes() == b"half a file"


def test_command_line_ends_with_a_sentence(tmp_path):
    done = command("04_train_vae.py", "--run", tmp_path, check=2)
    assert done.stderr.count("\n") == 1 and "01_data.py" in done.stderr
