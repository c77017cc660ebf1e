"""01_data.py: every kind of picture, every kind of damage, resuming, the split, the crops, Sec. 5.1's comparison."""
import io
import importlib
import json
import os
import struct
import sys
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from conftest import refused

W, H = 96, 64      # of the pictures made here; stored with a shorter side of 32


def picture(mode="RGB", size=(W, H)):
    """A smooth ramp: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], -1).astype(np.uint8)).convert(mode)


def encoded(im, format, **options):
    f = io.BytesIO()
    im.save(f, format, **options)
    return f.getvalue()


def settings(data, run, images, **more):
    return data.Settings(**(dict(run=str(run), images=str(images), min_side=48, resize=32, val_share=0.3, workers=0) | more))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outcome(run):
    """{source: metadata line} of what was kept, {source: reason} of what was not."""
    kept = {r["source"]: r | {"path": run / "data" / s / r["file_name"]} for s in ("train", "val") for r in lines(run / "data" / s / "metadata.jsonl")}
    return kept, {r["source"]: r["reason"] for r in lines(run / "data" / "rejected.jsonl")}


def stored(record):
    return np.asarray(Image.open(record["path"])).astype(int)


def png_claiming(width, height):
    """A PNG whose header claims any size: a decompression bomb of 60 bytes."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_bad_and_unusual_input(data, tmp_path, capfd):
    """Over 40 kinds of file: what can be seen as RGB is kept with the right pixels, the rest is listed with a reason, nothing stops the run."""
    images, run = tmp_path / "in", tmp_path / "run"
    (images / "a" / "b").mkdir(parents=True)
    jpg, png = encoded(picture(), "JPEG", quality=95), encoded(picture(), "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6                                                   # to be turned by 90 degrees when shown
    half = picture("RGBA")
    half.putalpha(Image.new("L", half.size, 0))                        # fully transparent: white when shown
    deep = Image.fromarray((np.asarray(picture())[..., 0].astype(np.uint16) * 257))
    palette = picture("P")
    good = {
        "plain.jpg": jpg, "upper.JPEG": jpg, "plain.png": png, "a/b/deep in the tree.png": png, "jpeg named.png": jpg,
        "progressive.jpg": encoded(picture(), "JPEG", progressive=True, quality=95), "turned.jpg": encoded(picture(size=(H, W)), "JPEG", exif=exif),
        "grey.jpg": encoded(picture("L"), "JPEG"), "cmyk.jpg": encoded(picture("CMYK"), "JPEG", quality=95), "one bit.png": encoded(picture("1"), "PNG"),
        "palette.png": encoded(palette, "PNG"), "palette clear.png": encoded(palette, "PNG", transparency=palette.getpixel((0, 0))),
        "alpha.png": encoded(half, "PNG"), "grey alpha.png": encoded(picture("LA"), "PNG"), "sixteen.png": encoded(deep, "PNG"),
        "sixteen.tif": encoded(deep, "TIFF"), "float.tiff": encoded(picture("F"), "TIFF"), "pages.tiff": encoded(picture(), "TIFF", save_all=True, append_images=[picture("L")]),
        "cmyk.tif": encoded(picture("CMYK"), "TIFF"), "film.gif": encoded(picture("P"), "GIF", save_all=True, append_images=[picture("P")]), "plain.bmp": encoded(picture(), "BMP"),
        "plain.webp": encoded(picture(), "WEBP", lossless=True), "film.webp": encoded(picture(), "WEBP", lossless=True, save_all=True, append_images=[picture()]),
        "-dash; $(x) 'quote'.png": png, "ünïcödé 日本 🙂.png": png, "new\nline.png": png, "x" * 240 + ".png": png, ".hidden.png": png,
        "bad json.png": png, "list json.png": png, "half character.png": png, "low text.png": png, "nan score.png": png, "string score.png": png,
    }
    bad = {
        "empty.jpg": b"", "text.jpg": b"this is not a picture", "html.png": b"<html>404</html>", "half.jpg": jpg[:len(jpg) // 2], "half.png": png[:len(png) // 2],
        "flipped.png": png[:60] + bytes(b ^ 255 for b in png[60:90]) + png[90:], "half.webp": encoded(picture(), "WEBP")[:80], "half.gif": encoded(picture("P"), "GIF")[:700],
        "bomb.png": png_claiming(60_000, 60_000), "no pixels.png": png_claiming(80, 80), "tiny.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "narrow.png": encoded(Image.new("RGB", (400, 20)), "PNG"), "low score.png": png, "low upper score.png": png, "half.bmp": encoded(picture(), "BMP")[:500],
    }
    for name, blob in (good | bad).items():
        (images / name).write_bytes(blob)
    side = {"plain.txt": "\ufeffein rotes Haus 🏠\n".encode(), "bad json.json": b"{", "list json.json": b"[1]", "half character.json": b'{"caption": "sad \\ud83d face"}', "low text.txt": b"\xff\xfe broken utf8",
            "nan score.json": b'{"aesthetic": NaN, "caption": "from json"}', "string score.json": b'{"AESTHETIC_SCORE": "5.5"}',
            "low score.json": b'{"aesthetic": 4.5}', "low upper score.json": b'{"AESTHETIC_SCORE": 3}'}
    for name, blob in side.items():
        (images / name).write_bytes(blob)
    os.mkfifo(images / "pipe.jpg")
    (images / "gone.png").symlink_to(images / "nowhere")
    (images / "folder.png").mkdir()
    (images / "notes.md").write_text("not a picture")
    with open(os.fsencode(images) + b"/not \xff utf8.png", "wb") as f:
        f.write(png)
    assert len(good) + len(bad) + 4 >= 45

    there = data.main(settings(data, run, images))
    kept, rejected = outcome(run)
    assert there["train"] + there["val"] == len(kept) == len(good) + 1        # and the name that is not UTF-8
    assert set(good) <= set(kept)
    assert set(rejected) == set(bad) | {"pipe.jpg", "gone.png"}
    assert all(rejected.values()) and "60000x60000" in rejected["bomb.png"] and "4.5" in rejected["low score.png"]
    assert "Traceback" not in "".join(capfd.readouterr())

    expected = np.asarray(picture().resize((48, 32), Image.BICUBIC)).astype(int)
    for name in ("plain.jpg", "upper.JPEG", "plain.png", "jpeg named.png", "progressive.jpg", "cmyk.jpg", "cmyk.tif", "pages.tiff", "plain.bmp", "plain.webp", "film.webp"):
        assert np.abs(stored(kept[name]) - expected).max() <= 6, name
    assert stored(kept["turned.jpg"]).shape == (32, 48, 3) and kept["turned.jpg"]["original_width"] == H
    for name in ("palette.png", "film.gif"):
        assert np.abs(stored(kept[name]) - expected).mean() < 20, name
    grey = expected[..., 0]
    for name in ("sixteen.png", "sixteen.tif"):
        assert np.abs(stored(kept[name])[..., 1] - grey).max() <= 2, name
    assert stored(kept["alpha.png"]).min() == 255
    assert (stored(kept["grey.jpg"]).max(-1) - stored(kept["grey.jpg"]).min(-1)).max() == 0
    assert kept["plain.jpg"]["text"] == "ein rotes Haus 🏠" and kept["nan score.png"]["text"] == "from json"
    assert kept["string score.png"]["score"] == 5.5 and kept["nan score.png"]["score"] is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation(data, tmp_path, orientation, format):
    """The fast JPEG path and the Pillow path turn a picture alike, as Pillow's own exif_transpose does."""
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x0112] = orientation
    blob = encoded(picture(), format, exif=exif, **({"quality": 98, "subsampling": 0} if format == "JPEG" else {}))
    x, _ = data.to_rgb(lambda: blob, 48, 10 ** 8)
    reference = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(blob)))).astype(int)
    assert np.abs(x.permute(1, 2, 0).numpy() - reference).max() <= 3


def test_resize_is_antialiased_bicubic(data):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 90, 120), dtype=np.uint8))
    ours = data.resize_shorter(x, 30)
    pillow = np.asarray(Image.fromarray(x.permute(1, 2, 0).numpy()).resize((40, 30), Image.BICUBIC))
    assert ours.shape == (3, 30, 40)
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - pillow).max() <= 1


@pytest.mark.parametrize("interpolation", ["bicubic", "nearest"])
def test_stored_pictures_are_lossless(data, tmp_path, interpolation):
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "in" / "n.png")
    record = data.prepare("n.png", {"picture": (tmp_path / "in" / "n.png").read_bytes}, settings(data, tmp_path, tmp_path, interpolation=interpolation))
    x, original = data.read_picture(tmp_path / "data" / record["split"], record["file_name"]), torch.from_numpy(noise).permute(2, 0, 1)
    assert torch.equal(x, data.resize_shorter(original, 32) if interpolation == "bicubic" else original[:, ::2, ::2])


def test_resume_does_only_what_is_missing(data, tmp_path):
    images, run = tmp_path / "in", tmp_path / "run"
    images.mkdir()
    for i in range(12):
        (images / f"{i}.png").write_bytes(encoded(picture(), "PNG"))
    (images / "broken.png").write_bytes(b"x")
    data.main(settings(data, run, images))
    before, rejected = outcome(run)
    stamps = {k: r["path"].stat().st_mtime_ns for k, r in before.items()}
    # A crash cut the last line off; that picture alone is made again. New pictures join; no old one changes its split.
    cut = run / "data" / "train" / "metadata.jsonl"
    lost = lines(cut)[-1]["source"]
    os.truncate(cut, cut.stat().st_size - 9)
    (cut.parent / ".half.webp.123.tmp").write_bytes(b"left by a killed process")
    for i in range(12, 20):
        (images / f"{i}.png").write_bytes(encoded(picture(), "PNG"))
    data.main(settings(data, run, images))
    after, again = outcome(run)
    assert again == rejected and len(after) == 20
    assert all(after[k]["file_name"] == r["file_name"] and after[k]["path"] == r["path"] for k, r in before.items())
    assert {k for k, r in before.items() if after[k]["path"].stat().st_mtime_ns != stamps[k]} == {lost}
    assert not list(run.rglob("*.tmp"))


def test_a_run_folder_among_the_pictures(data, tmp_path):
    """What a run wrote is not read again as its input; another script may be pointed at it."""
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(), "PNG"))
    first = data.main(settings(data, tmp_path / "run", tmp_path))
    (tmp_path / "run" / "eval.png").write_bytes(encoded(picture(), "PNG"))              # a sheet of a later stage
    assert data.main(settings(data, tmp_path / "run", tmp_path)) == first and sum(first.values()) == 8
    assert len(data.find_units(str(tmp_path / "run" / "data" / "train"))) == first["train"]


def test_a_full_disk_rejects_no_picture(data, tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data, "write_aside", full)
    with pytest.raises(OSError, match="No space"):
        data.prepare("a.png", {"picture": lambda: encoded(picture(), "PNG")}, settings(data, tmp_path, tmp_path))


def test_split_depends_on_the_name_alone(data, tmp_path):
    blob = encoded(picture(), "PNG")
    split = lambda name, share: data.prepare(name, {"picture": lambda: blob}, settings(data, tmp_path, tmp_path, val_share=share))["split"]
    names = [f"{i}.png" for i in range(60)]
    chosen = [split(n, 0.3) for n in names]
    assert chosen == [split(f"elsewhere/{n}", 0.3) for n in names]
    assert 8 <= chosen.count("val") <= 28
    assert all(split(n, 0.6) == "val" for n, s in zip(names, chosen) if s == "val")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_tar_shards(data, tmp_path, workers):
    """img2dataset's shards: each picture once whatever the number of workers, captions and scores beside it, a cut-off shard is listed."""
    images, run = tmp_path / "in", tmp_path / "run"
    images.mkdir()
    def add(tar, name, blob):
        info = tarfile.TarInfo(name)
        info.size = len(blob)
        tar.addfile(info, io.BytesIO(blob))
    for shard in range(2):
        with tarfile.open(images / f"0000{shard}.tar", "w") as tar:
            for i in range(5):
                key = f"{shard:05d}{i:04d}"
                add(tar, f"{key}.jpg", encoded(picture(), "JPEG"))
                add(tar, f"{key}.txt", f"caption {key}".encode())
                add(tar, f"{key}.json", json.dumps({"caption": "unused", "AESTHETIC_SCORE": 4 + i / 4}).encode())
    (images / "loose.png").write_bytes(encoded(picture(), "PNG"))
    (images / "loose too.png").write_bytes(encoded(picture(), "PNG"))
    whole = (images / "00001.tar").read_bytes()
    (images / "00002.tar").write_bytes(whole[:len(whole) // 2 - 100])
    (images / "00003.tar").write_bytes(b"no tar")
    (images / "00000.parquet").write_bytes(b"img2dataset leaves these beside its shards")
    data.main(settings(data, run, images, workers=workers, val_share=0.5))
    kept, rejected = outcome(run)
    for shard in "01":
        for i in range(5):
            name = f"0000{shard}.tar/0000{shard}000{i}.jpg"
            assert (name in kept) == (i > 2) and (name in rejected) == (i <= 2), name       # 4.0, 4.25 and 4.5 are not above 4.5
    assert kept["00000.tar/000000003.jpg"]["text"] == "caption 000000003" and kept["00000.tar/000000003.jpg"]["score"] == 4.75
    assert "ReadError" in rejected["00003.tar"] and rejected["00002.tar"]


def test_metadata_is_an_imagefolder(prepared):
    """Hugging Face's convention: metadata.jsonl in the split's folder, file_name relative to it, any other keys are columns."""
    for split in ("train", "val"):
        folder = prepared / "data" / split
        rows = lines(folder / "metadata.jsonl")
        assert rows and {str(p.relative_to(folder)) for p in folder.rglob("*.webp")} == {r["file_name"] for r in rows}
        assert all(set(r) == {"file_name", "text", "score", "source", "original_width", "original_height"} for r in rows)


def test_crops_are_a_function_of_seed_and_position(data, prepared):
    folder = prepared / "data" / "train"
    crops = data.Crops(folder, 32, "04", 0)
    first = [crops[n] for n in range(40)]
    assert all(c.shape == (3, 32, 32) and c.dtype == torch.uint8 for c in first)
    assert all(torch.equal(a, b) for a, b in zip(first, (data.Crops(folder, 32, "04", 0)[n] for n in range(40))))
    for other in (data.Crops(folder, 32, "04", 1), data.Crops(folder, 32, "05", 0)):      # another seed, another stage
        assert not all(torch.equal(a, b) for a, b in zip(first, (other[n] for n in range(40))))
    loader = torch.utils.data.DataLoader(crops, batch_sampler=[list(range(20)), list(range(20, 40))], num_workers=2)
    assert torch.equal(torch.cat(list(loader)), torch.stack(first))
    # Every crop is a window of some picture, and some are flipped.
    whole = [data.read_picture(folder, n) for n in data.picture_names(folder, 32)]
    windows = lambda x: x.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    inside = lambda c: any((windows(x) == c).flatten(1).all(1).any() for x in whole)
    plain, flipped = [inside(c) for c in first[:10]], [inside(c.flip(-1)) for c in first[:10]]
    assert all(a or b for a, b in zip(plain, flipped)) and any(plain) and any(flipped)


def test_scenes(data):
    """A scene is its seed's alone; what the caption says is in the picture."""
    for index in range(6):
        caption, draw = data.scene(3, index)
        im = draw()
        assert im.size == (1280, 720) and data.scene(3, index)[1]().tobytes() == im.tobytes()
        words = caption.split()
        assert words[0] == "a" and words[1] in data.COLORS and words[2] in data.SHAPES and words[5] in data.PATTERNS and words[6] in data.COLORS
        pixels = np.asarray(im).reshape(-1, 3).astype(float)
        names = sorted(data.COLORS)
        unit = lambda v: v / (np.linalg.norm(v, axis=-1, keepdims=True) + 1e-9)
        nearest = (unit(pixels) @ unit(np.array([data.COLORS[n] for n in names], float)).T).argmax(1)
        share = {n: (nearest == i).mean() for i, n in enumerate(names)}
        ordered = sorted(share, key=share.get, reverse=True)
        assert ordered[0] == words[6] and ordered[1] == words[1], (caption, share)


def test_read_shape_bears_a_wobbly_outline(data):
    """As a young transformer (07) draws them: a wave along the edge, and a circle with bumps that repeat three, four or five times."""
    y, x = np.mgrid[:96, :96]
    for shape in data.SHAPES:
        for turn in (-0.2, 0.1):
            im = Image.new("1", (96, 96))
            ImageDraw.Draw(im).polygon(data.corners(shape, 44, 50, 25, turn), fill=1)
            mask = np.asarray(im)
            assert data.read_shape(torch.from_numpy(mask.copy())) == shape
            wavy = mask[(y + 2 * np.sin(x / 4)).round().astype(int).clip(0, 95), (x + 2 * np.cos(y / 3)).round().astype(int).clip(0, 95)]
            assert data.read_shape(torch.from_numpy(wavy)) == shape
    radius, angle = np.hypot(x - 48, y - 48), np.arctan2(y - 48, x - 48)
    for folds in (3, 4, 5):
        assert data.read_shape(torch.from_numpy(radius < 25 * (1 + 0.08 * np.sin(folds * angle)))) == "circle"
    assert data.read_shape(torch.zeros(96, 96, dtype=torch.bool)) == "circle"


def test_resizing_shows_aliasing(data, tmp_path):
    """Sec. 5.1 on scenes: a direct crop has less detail than resize then crop, and nearest makes up
    frequencies that bicubic does not."""
    result = importlib.import_module("resizing").main(data.Settings(run=str(tmp_path), count=8))
    direct, nearest, bicubic = result.values()
    assert direct[1] < 0.9 and bicubic[1] == 1 and nearest[1] > 1.2
    assert nearest[2] > 3 * bicubic[2]
    assert Image.open(tmp_path / "resizing.png").width > 700


def test_sentences(data, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert "no such folder" in refused(lambda: data.main(settings(data, tmp_path / "r", tmp_path / "missing")), capsys)
    assert "no pictures" in refused(lambda: data.main(settings(data, tmp_path / "r", tmp_path / "none")), capsys)
    assert "--resize" in refused(lambda: data.main(settings(data, tmp_path / "r", tmp_path, resize=64)), capsys)
    (tmp_path / "none" / "x.png").write_bytes(b"x")
    assert "data/train is empty" in refused(lambda: data.main(settings(data, tmp_path / "r", tmp_path / "none")), capsys)
    assert "--resize 32, now it is 40" in refused(lambda: data.main(settings(data, tmp_path / "r", tmp_path / "none", resize=40)), capsys)
    kept = tmp_path / "r" / "data" / "settings.json"
    kept.write_text(json.dumps({k: v for k, v in json.loads(kept.read_text()).items() if k != "interpolation"}))       # of a version that had no such flag
    assert "--interpolation unknown" in refused(lambda: data.main(settings(data, tmp_path / "r", tmp_path / "none")), capsys)
    assert "run 01_data.py first" in refused(lambda: data.picture_names(tmp_path / "nothing", 32), capsys)


def test_which_score_counts(data):
    """The first aesthetic name that holds a number; a bare "score" may be a similarity and is none."""
    describe = lambda **meta: data.describe({".json": lambda: json.dumps(meta).encode()})[1]
    assert describe(aesthetic=6, score=0.31) == describe(score=0.31, AESTHETIC=6) == 6
    assert describe(aesthetic=6, aesthetic_score=5) == describe(aesthetic_score=5, aesthetic=6) == 5
    assert describe(aesthetic_score="none", aesthetics=4) == 4 and describe(score=9) is None and describe(similarity=0.3) is None


def display_p3():
    """An ICC profile of Display P3's primaries (D50) and gamma 2.2, byte by byte."""
    fixed = lambda v: struct.pack(">i", round(v * 65536))
    xyz = lambda *v: b"XYZ \0\0\0\0" + b"".join(map(fixed, v))
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    text = b"text\0\0\0\0test\0\0\0\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", 3) + b"P3\0" + bytes(80)
    tags = {b"rXYZ": xyz(0.5151, 0.2412, -0.0011), b"gXYZ": xyz(0.2920, 0.6922, 0.0419), b"bXYZ": xyz(0.1571, 0.0666, 0.7841),
            b"wtpt": xyz(0.9642, 1.0, 0.8249), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"cprt": text, b"desc": description}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, blob in tags.items():
        blob += bytes(-len(blob) % 4)
        table += name + struct.pack(">II", start + len(body), len(blob))
        body += blob
    size = start + len(body)
    header = struct.pack(">I", size) + bytes(4) + bytes([2, 0x10, 0, 0]) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK"])
def test_profiles_become_srgb(data, mode):
    """A color of Display P3 comes out as sRGB has it, by the two spaces' matrices; transparency stays; a wrong profile changes nothing."""
    color = (150, 200, 90)
    im = Image.new("RGB", (64, 64), color).convert(mode)
    blob = encoded(im, "PNG" if mode != "CMYK" else "TIFF", icc_profile=display_p3())
    x, _ = data.to_rgb(lambda: blob, 1, 10 ** 6)
    if mode in ("L", "CMYK"):                                                # an RGB profile does not fit: as without it
        plain, _ = data.to_rgb(lambda: encoded(im, "PNG" if mode == "L" else "TIFF"), 1, 10 ** 6)
        assert torch.equal(x, plain)
        return
    linear = (np.array(im.convert("RGB"))[0, 0] / 255) ** 2.2
    p3_to_srgb = np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])
    v = (p3_to_srgb @ linear).clip(0, 1)
    expected = 255 * np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)
    assert np.abs(x[:, 0, 0].numpy() - expected).max() < 3 and np.abs(np.array(im.convert("RGB"))[0, 0] - expected).max() > 15
    broken, _ = data.to_rgb(lambda: encoded(im, "PNG", icc_profile=b"no profile"), 1, 10 ** 6)
    assert torch.equal(broken[:, 0, 0], torch.tensor(np.array(im.convert("RGB"))[0, 0]))


def test_a_small_folder_gets_validation_pictures(data, tmp_path):
    """Of 28 pictures 1% is none: five are taken, by name alone, fixed at the first run; growing changes no split."""
    images = tmp_path / "in"
    images.mkdir()
    for i in range(28):
        (images / f"photo {i}.png").write_bytes(encoded(picture(), "PNG"))
    s = settings(data, tmp_path / "run", images, val_share=0.01)
    assert data.main(s) == {"train": 23, "val": 5}
    first = {r["source"] for r in lines(tmp_path / "run" / "data" / "val" / "metadata.jsonl")}
    assert first == set(sorted((p.name for p in images.iterdir()), key=data.name_number)[:5])
    for i in range(28, 60):
        (images / f"photo {i}.png").write_bytes(encoded(picture(), "PNG"))
    data.main(s)
    kept, _ = outcome(tmp_path / "run")
    now = {r["source"] for r in lines(tmp_path / "run" / "data" / "val" / "metadata.jsonl")}
    assert len(kept) == 60 and first <= now and {n for n in now if int(n.split()[1][:-4]) < 28} == first
    assert data.main(settings(data, tmp_path / "other", images, val_share=0.5))["val"] > 15     # what gives enough is taken as it is


def test_index(data, tmp_path):
    """Sorted names, whatever the workers' order; one hash for one set of pictures, another for another; a stale one is made again."""
    seen = []
    for workers, count in ((0, 8), (3, 8), (0, 9)):
        run = tmp_path / f"{workers} {count}"
        data.main(data.Settings(run=str(run), count=count, resize=32, val_share=0.3, workers=workers))
        folder = run / "data" / "train"
        names = [line["file_name"] for line in lines(folder / "metadata.jsonl")]
        assert names == sorted(names) == [n.decode() for n in data.picture_names(folder, 32)]
        index = json.loads((folder / "index.json").read_text())
        assert index["pictures"] == len(names)
        seen.append(data.parent(folder / "index.json")["sha256"])
    assert seen[0] == seen[1] != seen[2]
    # A run killed after a picture and before the index: the next one finds nothing to do, and makes the index.
    before = (folder / "index.json").read_text()
    (folder / "index.json").write_text('{"pictures": 1, "sha256": "of an earlier run"}')
    data.main(data.Settings(run=str(run), count=9, resize=32, val_share=0.3, workers=0))
    assert (folder / "index.json").read_text() == before


def test_leftovers_of_a_killed_save(data, tmp_path):
    """resume removes what a killed save of its own stage left, and nothing else."""
    for name in (".vae.pt.tmp", ".dit.pt.tmp"):
        (tmp_path / name).write_bytes(b"half of it")
    s = data.TrainingRun(run=str(tmp_path))
    assert data.resume(s, "04_train_vae", tmp_path / "vae.pt", {}) is None
    assert [p.name for p in tmp_path.iterdir()] == [".dit.pt.tmp"]


def test_two_pictures_of_one_stem_in_a_shard(data, tmp_path):
    """Both have the caption and the score of the files beside them."""
    import io
    import tarfile
    images = tmp_path / "images"
    images.mkdir()
    with tarfile.open(images / "0.tar", "w") as tar:
        for name, content in (("a.json", b'{"aesthetic": 3}'), ("a.jpg", b"x"), ("a.png", b"x"),
                              ("a.txt", b"told")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    names = []
    for name, parts in data.pictures([str(images / "0.tar")], images):
        names.append(name)
        assert data.describe(parts) == ("told", 3.0)
    assert names == ["0.tar/a.jpg", "0.tar/a.png"]


def test_an_interrupted_addition_is_not_finished(data, tmp_path, monkeypatch):
    """Pictures are added to a finished folder and the run is cut off: later stages refuse it until 01 has ended again."""
    images, run = tmp_path / "in", tmp_path / "run"
    images.mkdir()
    for i in range(8):
        picture().save(images / f"{i}.png")
    data.main(settings(data, run, images))
    picture().save(images / "8.png")
    def cut_off(folder):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "write_index", cut_off)
    with pytest.raises(KeyboardInterrupt):
        data.main(settings(data, run, images))
    with pytest.raises(SystemExit):
        data.picture_names(run / "data" / "train", 16)
    monkeypatch.undo()
    data.main(settings(data, run, images))
    assert len(data.picture_names(run / "data" / "train", 16)) + len(data.picture_names(run / "data" / "val", 16)) == 9


def test_an_error_after_a_signal_is_shown(data, monkeypatch):
    """Ctrl-C was heard, and then the first process itself fails: that is no quiet end."""
    def fails(settings):
        raise RuntimeError("out of memory")
    monkeypatch.setattr(data, "SIGNALS", [2])
    monkeypatch.setattr(sys, "argv", ["01_data.py"])
    with pytest.raises(RuntimeError, match="out of memory"):
        data.command_line(fails, data.Settings, data.PRESETS, "")
