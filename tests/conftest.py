"""Shared by all tests: the scripts as modules, a prepared data folder, and a runner for command lines. CPU, offline, tiny."""
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"                       # transformers, where it is installed, would ask the network several times
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data():
    return importlib.import_module("01_data")


@pytest.fixture(scope="session")
def model():
    return importlib.import_module("02_model")


@pytest.fixture(scope="session")
def losses():
    return importlib.import_module("03_losses")


@pytest.fixture(scope="session")
def train():
    return importlib.import_module("04_train_vae")


@pytest.fixture(scope="session")
def prepared(data, tmp_path_factory):
    """A run folder with 24 scenes of shorter side 48 in data/."""
    run = tmp_path_factory.mktemp("prepared")
    data.main(data.Settings(run=str(run), count=24, resize=48, val_share=0.3, workers=0))
    return run


@pytest.fixture
def run(prepared, tmp_path):
    """A fresh run folder that shares the prepared pictures."""
    (tmp_path / "data").symlink_to(prepared / "data")
    return tmp_path


def command(*args, check=None, env=None, timeout=120):
    """Run a script as a user would; returns the finished process, and fails unless its exit code is `check`."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}))
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


# Forked from a process that has PyTorch imported already: each start would take seconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torchvision.transforms.v2.functional", "lpips"])


def started(line, printed):
    """A script in a process of its own, in a session of its own, as `python *line` would run it.
    What it prints goes into the file `printed`."""
    process = SERVER.Process(target=run_script, args=(list(map(str, line)), str(printed)))
    process.start()
    return process


def run_script(line, printed):
    os.setsid()
    os.chdir(ROOT)
    with open(printed, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.argv = line
    code = 0
    try:
        runpy.run_path(line[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    # Raised anew: the first one's traceback would keep the loader, and its workers, alive.
    raise SystemExit(code)


def finished(process, printed, code=0):
    """Wait for its end; it must exit with `code`. Returns what it printed."""
    process.join(120)
    text = Path(printed).read_text()
    assert process.exitcode == code, text[-3000:]
    return text


def killed(line, run, counts):
    """Run a command line again and again, and kill -9 it when RUN/log.jsonl has so many lines; the
    last time it may end."""
    log = Path(run, "log.jsonl")
    printed = Path(run, "printed.txt")
    for count in counts:
        process = started(line, printed)
        while process.is_alive() and (not log.exists() or len(log.read_text().splitlines()) < count):
            time.sleep(0.002)
        process.kill()
        process.join()
    finished(started(line, printed), printed)


def refused(call, capsys):
    """The one sentence with which `call` stops; it must exit with 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if "/s]" not in line]       # less progress bars
    return lines[-1]
