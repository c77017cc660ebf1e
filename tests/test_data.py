"""01_data.py: unusual and broken pictures, reruns, the split, crops, scenes, the command line."""
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from conftest import data, training
from scenes import read_scene


def picture(mode="RGB", size=(96, 64)):
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([x, y, np.full_like(x, 90)], -1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(im, format="PNG", **options):
    file = io.BytesIO()
    im.save(file, format, **options)
    return file.getvalue()


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


def unusual():
    """{name: (file, its pixels as RGB)}"""
    ramp = picture()
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees when shown
    clear = picture("RGBA")
    clear.putalpha(0)
    # sRGB with red and green exchanged: what is red in the file shows as green
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"____").replace(b"gXYZ", b"rXYZ").replace(b"____", b"gXYZ")
    green = Image.merge("RGB", [ramp.split()[i] for i in (1, 0, 2)])
    return {
        "a/b/deep.png": (encoded(ramp), ramp),
        "turned.jpg": (encoded(ramp, "JPEG", quality=95, exif=turned), ramp.transpose(4)),
        "grey.jpg": (encoded(picture("L"), "JPEG", quality=95), picture("L").convert("RGB")),
        "cmyk.tif": (encoded(picture("CMYK"), "TIFF"), ramp),
        "palette.gif": (encoded(picture("P"), "GIF"), picture("P").convert("RGB")),
        "clear.png": (encoded(clear), Image.new("RGB", ramp.size, "white")),
        "profile.png": (encoded(ramp, icc_profile=swapped), green),
        "broken profile.png": (encoded(ramp, icc_profile=b"no profile"), ramp),
        "UPPER.JPEG": (encoded(ramp, "JPEG", quality=95), ramp),
    }


def test_pictures_come_out_right(tmp_path):
    good = unusual()
    deep = Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 257)
    bad = {"empty.jpg": b"", "text.png": b"no picture", "half.png": encoded(picture())[:200],
           "deep.png": encoded(deep), "float.tif": encoded(picture("F"), "TIFF"),
           "narrow.png": encoded(Image.new("RGB", (400, 20))), "low.png": encoded(picture())}
    make(tmp_path, {name: file for name, (file, _) in good.items()} | bad)
    make(tmp_path, {"low.json": b'{"AESTHETIC_SCORE": 4.5}', "readme.md": b"not a picture",
                    "turned.txt": "\ufeffein\u2028Haus 🏠\n".encode(),
                    "grey.json": b'{"caption": "from json", "aesthetic": null}'})
    data.main(settings(tmp_path))
    kept, rejected, paths = lists(tmp_path)
    assert len(kept) == len(good) and set(rejected) == set(bad)
    assert "8 bits" in rejected["deep.png"] and "8 bits" in rejected["float.tif"]
    assert "4.5" in rejected["low.png"] and "400x20" in rejected["narrow.png"]
    captions = {"turned.jpg": "ein\u2028Haus 🏠", "grey.jpg": "from json"}
    for name, (_, shown) in good.items():
        assert kept[stored_name(tmp_path, name)] == captions.get(name, "")
        size = (32, 48) if name == "turned.jpg" else (48, 32)
        expected = np.asarray(shown.resize(size, Image.BICUBIC)).astype(int)
        stored = np.asarray(Image.open(paths[stored_name(tmp_path, name)])).astype(int)
        assert stored.shape == expected.shape and np.abs(stored - expected).mean() < 3, name


def test_reruns_make_what_is_missing(tmp_path):
    """New, mended and lost pictures and new captions arrive, and nothing else is touched."""
    make(tmp_path, {f"{i}.png": encoded(picture()) for i in range(12)} | {"broken.png": b"x"})
    data.main(settings(tmp_path))
    _, rejected, paths = lists(tmp_path)
    assert len(paths) == 12 and set(rejected) == {"broken.png"}
    stamps = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    lost = stored_name(tmp_path, "3.png")
    paths[lost].unlink()
    make(tmp_path, {"broken.png": encoded(picture()), "new.png": encoded(picture()),
                    "5.txt": b"late"})
    data.main(settings(tmp_path))
    kept, rejected, again = lists(tmp_path)
    assert len(kept) == 14 and not rejected and kept[stored_name(tmp_path, "5.png")] == "late"
    assert {n for n in stamps if again[n].stat().st_mtime_ns != stamps[n]} == {lost}
    data.main(settings(tmp_path, resize=40))  # other settings make other files
    assert {min(Image.open(path).size) for path in lists(tmp_path)[2].values()} == {40}


def test_twelve_photographs_fill_both_splits(tmp_path):
    make(tmp_path, {f"DSC_{i}.jpg": encoded(picture(), "JPEG") for i in range(12)})
    data.main(settings(tmp_path, val_share=0.01))
    assert len(data.read_list(tmp_path, "val", 32)) == 3
    assert len(data.read_list(tmp_path, "train", 32)) == 9


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


def test_command_line(capsys):
    """Default < preset < flag; --help says of each flag what stands behind its field."""
    def parse(*words):
        return data.parse_cli(training.Settings, training.PRESETS, "doc", words)

    s = parse("--preset", "paper", "--lr", "3e-4", "--width-mult", "1", "2", "--compile")
    assert s.lr == 3e-4 and s.width_mult == (1, 2) and s.compile and s.run == "runs/paper"
    assert s.crop == 240 and parse().crop == 64 and parse().run == "runs/demo"
    for bad in (["--steps", "1e3"], ["--padding", "mirror"], ["--step", "1"], ["--help"]):
        with pytest.raises(SystemExit):
            parse(*bad)
    text = " ".join(capsys.readouterr().out.split())
    assert "Table 3; Sec. 5.2, grid: lower is the cure [0.01]" in text
