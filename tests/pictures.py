"""Pictures in the forms in which people have them, and with noise; how ill a picture is."""
import io

import numpy as np
import torch
from PIL import Image, ImageCms, PngImagePlugin
from torchvision.transforms.v2.functional import gaussian_blur


def picture(mode="RGB", size=(96, 64)):
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([x, y, np.full_like(x, 90)], -1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(im, format="PNG", **options):
    file = io.BytesIO()
    im.save(file, format, **options)
    return file.getvalue()


def unusual():
    """{name: (file, its pixels as RGB)}"""
    ramp = picture()
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees when shown
    # The same orientation, before a height that is a float.
    broken = (b"Exif\0\0MM\0*\0\0\0\x08\0\2" b"\1\x12\0\3\0\0\0\1\0\6\0\0"
              b"\1\1\0\x0b\0\0\0\1abcd" b"\0\0\0\0")
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2 ** 21, zip=True)
    clear = picture("RGBA")
    clear.putalpha(0)
    # sRGB with red and green exchanged: what is red in the file shows as green
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"____").replace(b"gXYZ", b"rXYZ").replace(b"____", b"gXYZ")
    green = Image.merge("RGB", [ramp.split()[i] for i in (1, 0, 2)])
    return {
        "a/b/deep.png": (encoded(ramp), ramp),
        "turned.jpg": (encoded(ramp, "JPEG", quality=95, exif=turned), ramp.transpose(4)),
        "turned, broken.jpg": (encoded(ramp, "JPEG", quality=95, exif=broken), ramp.transpose(4)),
        "broken.webp": (encoded(ramp, "WEBP", lossless=True, exif=b"garbage"), ramp),
        "much text.png": (encoded(ramp, pnginfo=text), ramp),
        "grey.jpg": (encoded(picture("L"), "JPEG", quality=95), picture("L").convert("RGB")),
        "cmyk.tif": (encoded(picture("CMYK"), "TIFF"), ramp),
        "palette.gif": (encoded(picture("P"), "GIF"), picture("P").convert("RGB")),
        "clear.png": (encoded(clear), Image.new("RGB", ramp.size, "white")),
        "profile.png": (encoded(ramp, icc_profile=swapped), green),
        "profile, key.png": (encoded(ramp, icc_profile=swapped, transparency=(1, 2, 3)), green),
        "broken profile.png": (encoded(ramp, icc_profile=b"no profile"), ramp),
        "UPPER.JPEG": (encoded(ramp, "JPEG", quality=95), ramp),
    }


def spoilt(pictures, smooth):
    """The pictures with white or smooth noise (of deviation 8 px), at 32, 22 and 16 dB."""
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    if smooth:
        noise = gaussian_blur(noise[:, :1], [49, 49], [8.0, 8.0]).expand_as(pictures)
    noise = noise / noise.std((1, 2, 3), keepdim=True)
    for psnr in (32, 22, 16):
        yield pictures + 2 * 10 ** (-psnr / 20) * noise


def unhealthy(artifact, reading):
    """How far 06's meter of an artifact is from ideal, in units of what we call healthy."""
    ideal, edge = {"color shift": (0, 4), "grid": (1, 1.1), "blur": (1, 0.9), "corner": (1, 2),
                   "droplet": (0, 8)}[artifact]
    return max((reading - ideal) / (edge - ideal), 0)
