"""For whoever has a GPU: does it agree with a CPU, how fast is it, what becomes of photographs?

    python tests/gpu.py runs/gpu ~/Pictures/many ~/Pictures/unseen

PARTS, with the seconds each may take, leave lines in RUN/gpu.txt. The same command goes on where
it stopped. LPIPS needs VGG16. Without a GPU it only tries whether all of it runs."""
import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.resolve()
sys.path.insert(0, str(ROOT))
data, training, finetuning, dit = [importlib.import_module(name) for name in (
    "01_data", "04_train_vae", "05_finetune_decoder", "07_train_dit")]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PRESET = "small" if GPU else "demo"
PARTS = {"scenes": 60, "vae 64 bf16 eager": 60, "vae 64 bf16 compiled": 150,
         "vae 128 bf16 eager": 60, "vae 128 bf16 compiled": 150, "dit eager": 60,
         "dit compiled": 100, "photographs": 420, "block eager": 60, "block compiled": 60,
         "agree 04": 90, "agree 05": 90, "agree 07": 90, "vae 64 tf32 eager": 60,
         "vae 64 tf32 compiled": 150, "vae 128 tf32 eager": 60, "vae 128 tf32 compiled": 150,
         "loader 0": 60, "loader 8": 60, "loader 16": 60}
FLOP = {"vae 64": 608.4e9, "vae 128": 1978.1e9, "dit": 78.8e9}  # per picture, FlopCounterMode's


def stage(script, preset, run, **more):
    for path in [*run.glob("*.pt"), *run.glob("*.jsonl")]:
        path.unlink()
    if script is not training:
        stage(training, "demo", run, steps=2, device="cpu")  # 05 and 07 want a VAE
    s = script.Settings(**(script.PRESETS[preset] | dict(run=str(run), device=DEVICE) | more))
    script.main(s)
    return s


def speed(script, run, flop=0.0, **more):
    """Medians of the later half of 40 steps; the host's time ends when all is asked for."""
    asked, done = [], []
    update_ema = training.update_ema
    def note(*args):
        update_ema(*args)
        asked.append(time.perf_counter())
        torch.zeros(1, device=DEVICE).item()  # waits for all before
        done.append(time.perf_counter())
    training.update_ema = note
    s = stage(script, PRESET, run, steps=40 if GPU else 4, **more)
    half = len(done) // 2
    seconds = statistics.median(b - a for a, b in zip(done[half:], done[half + 1:]))
    host = statistics.median(b - a for a, b in zip(done[half:], asked[half + 1:]))
    memory = torch.cuda.max_memory_allocated() / 2 ** 30
    return dict(pictures_per_s=s.batch / seconds, ms=1000 * seconds, host_ms=1000 * host,
                gib=memory, tflops=1e-12 * flop * s.batch / seconds)


def agree(script, run):
    """The same 20 steps on a CPU, a GPU and compiled, with noise that the CPU draws."""
    torch.randn_like = lambda x: torch.randn(x.shape).to(x.device)
    rows = []
    for device, compiled in (("cpu", False), (DEVICE, False), (DEVICE, True)):
        stage(script, "demo", run, device=device, compile=compiled, precision="fp32", log_every=1,
              steps=20 if GPU else 2)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        rows.append([line["loss" if script is dit else "recon"] for line in lines
                     if line["stage"] == lines[-1]["stage"]])
    cpu, gpu, both = torch.tensor(rows)
    return dict(gpu=(gpu / cpu - 1).abs().tolist(), compiled=(both / gpu - 1).abs().tolist())


def work(part, run, photos, unseen):
    kind, *words = part.split()
    compiled = words[-1:] == ["compiled"]
    if kind == "scenes":
        data.main(data.Settings(run=str(run), count=96))
        return {"gpu": torch.cuda.get_device_name() if GPU else "none", "torch": torch.__version__}
    if kind == "photographs":
        run = run / "photographs"
        few = f"--muon-lr 5e-3 --lr-decay 1 --lr 5e-4 --steps {2500 if GPU else 2}".split()
        for script, *flags in (["01_data.py", "--images", photos], ["04_train_vae.py", *few],
                               ["06_eval.py", "--images", unseen, "--size", "256"],
                               ["06_eval.py", "--images", unseen, "--size", "480"]):
            flags += ["--preset", PRESET, "--run", run]
            subprocess.run([sys.executable, ROOT / script, *flags], check=True)
        return json.loads((run / "eval.json").read_text())
    if kind == "agree":
        return agree({"04": training, "05": finetuning, "07": dit}[words[0]], run)
    if kind == "loader":  # a network that waits for it
        return speed(training, run, width=32, workers=int(words[0]), compile=False)
    if kind == "vae":
        return speed(training, run, FLOP[f"vae {words[0]}"], width=int(words[0]), muon_lr=5e-3,
                     precision=words[1], compile=compiled)
    if kind == "block":  # two of the paper's size
        return speed(dit, run, compile=compiled, width=1792, ff_width=7168, time_width=512,
                     blocks=2, batch=64, rope_axes=(16, 24, 24))
    return speed(dit, run, FLOP["dit"], compile=compiled)


def main(run, photos, unseen, *part):
    out = Path(run, "gpu.txt")
    if part:
        line = {"part": part[0]} | work(part[0], Path(run), photos, unseen)
        with open(out, "a") as f:
            print(json.dumps(line), file=f)
        return
    for part, seconds in PARTS.items():
        if not out.exists() or f'"part": "{part}"' not in out.read_text():
            print(f"{part}: at most {seconds} s", flush=True)
            me = ["timeout", str(seconds), sys.executable, __file__, run, photos, unseen, part]
            subprocess.run(me, stdout=subprocess.DEVNULL)
    print(out.read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
