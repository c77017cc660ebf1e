"""01_data.py: unusual and broken pictures, reruns, the split, crops, scenes, the command line."""
import errno
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import data, refused, training
from pictures import encoded, picture, unusual
from scenes import read_scene


def settings(folder, **more):
    small = dict(images=str(folder / "in"), run=str(folder), min_side=48, resize=32, workers=0)
    return data.Settings(**(small | dict(val_share=0.3) | more))


def lists(folder):
    """{file: caption} of what is kept, {source: reason} of what is not, {file: path}."""
    kept, rejected, paths = {}, {}, {}
    for path in (folder / "data").glob("*/metadata.jsonl"):  # an imagefolder of Hugging Face
        for entry in map(json.loads, open(path, encoding="utf-8")):
            kept[entry["file_name"]] = entry["text"]
            paths[entry["file_name"]] = path.parent / entry["file_name"]
    for entry in map(json.loads, open(folder / "data" / "rejected.jsonl")):
        rejected[entry["source"].split("/in/")[1]] = entry["reason"]
    return kept, rejected, paths


def make(folder, files):
    for name, content in files.items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def stored_name(folder, name):
    return data.prepare(folder / "in" / name, settings(folder), 0)[1]["file_name"]


def test_pictures_come_out_right(tmp_path):
    good = unusual()
    deep = Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 257)
    bad = {"empty.jpg": b"", "text.png": b"no picture", "half.png": encoded(picture())[:200],
           "deep.png": encoded(deep), "float.tif": encoded(picture("F"), "TIFF"),
           "narrow.png": encoded(Image.new("RGB", (400, 20))), "low.png": encoded(picture())}
    make(tmp_path, {name: file for name, (file, _) in good.items()} | bad)
    make(tmp_path, {"low.json": b'{"AESTHETIC_SCORE": 4.5}', "UPPER.TXT": b"above",
                    "turned.txt": "\ufeffein\u2028Haus 🏠\n".encode(),
                    "cmyk.txt": "von Windows\r\n".encode("utf-16"),
                    "clear.json": b'{"caption": NaN}', "profile.json": b'{"caption": ["a", "b"]}',
                    "grey.json": b'{"caption": "from json", "aesthetic": null}'})
    data.main(settings(tmp_path))
    kept, rejected, paths = lists(tmp_path)
    assert len(kept) == len(good) and set(rejected) == set(bad)
    assert "8 bits" in rejected["deep.png"] and "8 bits" in rejected["float.tif"]
    assert "4.5" in rejected["low.png"] and "400x20" in rejected["narrow.png"]
    captions = {"turned.jpg": "ein\u2028Haus 🏠", "grey.jpg": "from json", "UPPER.JPEG": "above",
                "cmyk.tif": "von Windows"}
    for name, (_, shown) in good.items():
        assert kept[stored_name(tmp_path, name)] == captions.get(name, "")
        size = (32, 48) if name.startswith("turned") else (48, 32)
        expected = np.asarray(shown.resize(size, Image.BICUBIC)).astype(int)
        stored = np.asarray(Image.open(paths[stored_name(tmp_path, name)])).astype(int)
        assert stored.shape == expected.shape and np.abs(stored - expected).mean() < 3, name


def test_every_folder_once(tmp_path, capsys):
    """Behind links too, even in a circle; not what systems leave, nor what 01 has made."""
    png = encoded(picture())
    make(tmp_path, {name: png for name in (
        "a.png", "b/B.JFIF", ".Trash/c.png", "@eaDir/d.png", "__MACOSX/e.png", "._a.png")})
    make(tmp_path, {"../disk/f.png": png, "g.heic": b"", "a.txt": b""})
    (tmp_path / "in" / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "run").symlink_to(tmp_path)
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nowhere")
    data.main(settings(tmp_path))
    assert "{'.heic': 1, '.png': 1}" in capsys.readouterr().out
    found = data.find_pictures(tmp_path / "in", tmp_path / "data")
    names = [str(path.relative_to(tmp_path / "in")) for path in found]
    assert names == ["a.png", "b/B.JFIF", "link/f.png"] and len(lists(tmp_path)[0]) == 3


def test_reruns_make_what_is_missing(tmp_path, capsys):
    """New, mended and lost pictures and new captions arrive, and nothing else is touched."""
    make(tmp_path, {f"{i}.png": encoded(picture()) for i in range(12)} | {"broken.png": b"x"})
    data.main(settings(tmp_path))
    _, rejected, paths = lists(tmp_path)
    assert len(paths) == 12 and set(rejected) == {"broken.png"}
    stamps = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    lost = [stored_name(tmp_path, name) for name in ("3.png", "4.png")]
    paths[lost[0]].unlink()
    paths[lost[1]].write_bytes(b"")
    sentence = refused(lambda: [data.read_list(tmp_path, split, 32) for split in ("train", "val")],
                       capsys)
    assert any(name in sentence for name in lost) and "run 01_data.py again" in sentence
    make(tmp_path, {"broken.png": encoded(picture()), "new.png": encoded(picture()),
                    "5.txt": b"late"})
    data.main(settings(tmp_path))
    kept, rejected, again = lists(tmp_path)
    assert len(kept) == 14 and not rejected and kept[stored_name(tmp_path, "5.png")] == "late"
    assert {n for n in stamps if again[n].stat().st_mtime_ns != stamps[n]} == set(lost)
    assert min(path.stat().st_size for path in again.values()) > 0
    data.main(settings(tmp_path, resize=40))  # other settings make other files
    assert {min(Image.open(path).size) for path in lists(tmp_path)[2].values()} == {40}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_goes_away_rejects_nothing(workers, tmp_path, capfd, monkeypatch):
    make(tmp_path, {f"{i}.png": encoded(picture()) for i in range(8)})
    data.main(settings(tmp_path))
    before = lists(tmp_path)
    make(tmp_path, {"new.png": encoded(picture())})

    def stale(path, formats):
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(Image, "open", stale)
    monkeypatch.setattr(data, "parse_cli", lambda *words: settings(tmp_path, workers=workers))
    assert "Stale file handle" in refused(lambda: data.start(data.main, 0, 0, 0), capfd)
    assert lists(tmp_path) == before


def test_few_pictures_fill_both_splits(tmp_path, capsys):
    """Even if all have one name; one process at a time; nothing far too narrow is enlarged."""
    make(tmp_path, {f"{i}/image.jpg": encoded(picture(), "JPEG") for i in range(12)})
    with data.alone(tmp_path / "data" / "rejected.jsonl"):
        assert "another process" in refused(lambda: data.main(settings(tmp_path)), capsys)
    data.main(settings(tmp_path, val_share=0.01))
    assert len(data.read_list(tmp_path, "val", 32)) == 3
    assert len(data.read_list(tmp_path, "train", 32)) == 9
    make(tmp_path, {"narrow.png": encoded(Image.new("RGB", (90_000, 1)))})
    assert "90000x1" in data.read_square(tmp_path / "in" / "narrow.png", 512)


def test_crops_follow_from_stage_seed_and_number(prepared):
    first = torch.stack([data.Crops(prepared, 32, "04", 0)[n] for n in range(40)])
    again = data.Crops(prepared, 32, "04", 0)
    loader = torch.utils.data.DataLoader(again, 20, sampler=range(40), num_workers=2)
    assert torch.equal(torch.cat(list(loader)), first) and first.shape == (40, 3, 32, 32)
    for other in (data.Crops(prepared, 32, "04", 1), data.Crops(prepared, 32, "05", 0)):
        assert any(not torch.equal(other[n], first[n]) for n in range(40))
    pictures = torch.stack([data.pil_to_tensor(Image.open(p["file"])) for p in
                            data.read_list(prepared, "train", 32)])
    windows = pictures.unfold(2, 32, 1).unfold(3, 32, 1)[:, 0]
    for crop in first[:10, 0]:  # a window of some picture or its mirror image
        assert any((windows == view).all(-1).all(-1).any() for view in (crop, crop.flip(-1)))


def test_scenes_show_their_captions():
    """A rule reads them off the pixels; the held-out pairs are in val, all, and nowhere else."""
    right = torch.zeros(4)
    for i in range(40):
        for split in ("train", "val"):
            words = data.scene_caption(0, i, split).split()
            assert ((words[1], words[2]) in data.HELD_OUT) == (split == "val")
            im = data.draw_scene(0, i, split, 180)
            x = data.center_crop(data.resize_shorter(im, 96), 96)
            told = words[1], words[2], words[5], words[6]
            right += torch.tensor([a == b for a, b in zip(read_scene(x), told)])
    assert (right / 80).min() >= 0.98, right / 80
    assert len({data.scene_caption(0, i, "val") for i in range(2000)}) == 4 * 4 * 5


def test_command_line(capsys, monkeypatch):
    """Default < preset < flag; --help says of each flag what stands behind its field."""
    def parse(*words):
        return data.parse_cli(training.Settings, training.PRESETS, "doc", words)

    s = parse("--preset", "paper", "--lr", "3e-4", "--width-mult", "1", "2", "--compile")
    assert s.lr == 3e-4 and s.width_mult == (1, 2) and s.compile and s.run == "runs/paper"
    assert s.crop == 240 and parse().crop == 64 and parse().run == "runs/demo"
    for bad in ("--steps 1e3", "--padding mirror", "--step 1", "--steps -1", "--batch 0",
                "--lr nan", "--lr -1", "--width-mult 1 0", "--help"):
        with pytest.raises(SystemExit):
            parse(*bad.split())
    text = " ".join(capsys.readouterr().out.split())
    assert "Table 3; Sec. 5.2, grid: lower is the cure [0.01]" in text

    def too_large(s):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sys, "argv", ["04_train_vae.py"])
    command = (too_large, training.Settings, training.PRESETS, "")
    assert "--accumulate" in refused(lambda: data.start(*command), capsys)
