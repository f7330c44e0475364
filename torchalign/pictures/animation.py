"""Moving pictures: panels beside each other under a line of text, written as GIF (Pillow) or MP4 (ffmpeg)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torchalign._check import message
from torchalign.cube.files import atomic
from torchalign.pictures.columns import Array
from torchalign.pictures.style import INK, STATUS_COLOUR, STATUS_TEXT_COLOUR
from torchalign.types import Status

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".gif", ".mp4")
_GAP, _HEAD, _EDGE = 6, 26, 3  # pixels: between the panels, above them, and of a status' frame


def check_animation(path: Path) -> None:
    """A name that can be written here, before the work and not after it."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(message("path", f"a name ending in {' or '.join(SUFFIXES)}", path.name, "rename it"))
    if path.suffix.lower() == ".mp4":
        from matplotlib.animation import FFMpegWriter

        if not FFMpegWriter.isAvailable():
            cure = "install it (apt, brew or conda install ffmpeg), or write a .gif, which needs nothing"
            raise ImportError(message("path", "the program ffmpeg for an .mp4", "none on this machine", cure))


def compose(panels: Sequence[Array], size: tuple[int, int], label: str, code: int) -> Image.Image:
    """Two panels (h, w, 3) in 0 … 1, magnified to size (height, width), before and after, under their label."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = size
    picture = Image.new("RGB", (2 * width + _GAP, height + _HEAD), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    for number, (panel, name) in enumerate(zip(panels, ("before", "after"), strict=True)):
        left = number * (width + _GAP)
        image = Image.fromarray((panel * 255).round().astype(np.uint8))
        picture.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, _HEAD))
        draw.text((left + 4, 4), f"{name}  {label}" if number == 0 else name, fill=INK, font=font)
    if code != Status.OK:
        status = Status(code)
        left = width + _GAP
        words, colour = f"not moved: {status.name}", STATUS_TEXT_COLOUR[status]
        draw.text((left + width - 4, 4), words, fill=colour, font=font, anchor="ra")
        corner = (left + width - 1, _HEAD + height - 1)
        draw.rectangle((left, _HEAD, *corner), outline=STATUS_COLOUR[status], width=_EDGE)
    return picture


def write(pictures: list[Image.Image], path: Path, frames_per_second: float, loop: int) -> None:
    """By the suffix of ``path``; the file appears whole or not at all."""
    with atomic(path) as partial:
        if path.suffix.lower() == ".gif":
            _write_gif(pictures, partial, round(1000 / frames_per_second), loop)
        else:
            _write_mp4(pictures, partial, frames_per_second)


def _write_gif(pictures: list[Image.Image], path: Path, milliseconds: int, loop: int) -> None:
    from PIL import Image

    # one palette for all, so that colours do not flicker: from a montage of some of the frames
    chosen = pictures[:: max(1, len(pictures) // 8)]
    montage = Image.new("RGB", (chosen[0].width, chosen[0].height * len(chosen)))
    for number, picture in enumerate(chosen):
        montage.paste(picture, (0, number * picture.height))
    palette = montage.quantize(255, method=Image.Quantize.MEDIANCUT)
    colours = (palette.getpalette() or [])[: 3 * 255]
    palette.putpalette([*colours, *[255] * (3 * 256 - len(colours))])  # the last colour is white
    coded = []
    for picture in pictures:
        numbers = np.array(picture.quantize(palette=palette, dither=Image.Dither.NONE))
        numbers[(np.asarray(picture) == 255).all(-1)] = 255  # Pillow's nearest is a little off: grey paper
        image = Image.fromarray(numbers)
        image.putpalette(palette.getpalette() or [])
        coded.append(image)
    # the format counts repetitions after the first time through; without the field there are none
    repeat = {} if loop == 1 else {"loop": max(0, loop - 1)}
    with path.open("wb") as file:
        coded[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=coded[1:],
            duration=milliseconds,
            optimize=False,
            **repeat,
        )


def _write_mp4(pictures: list[Image.Image], path: Path, frames_per_second: float) -> None:
    from matplotlib.animation import FFMpegWriter
    from matplotlib.figure import Figure

    # H.264 stores colour at half the resolution: even sizes only
    height, width = (length + length % 2 for length in (pictures[0].height, pictures[0].width))
    dots = 100
    figure = Figure(figsize=(width / dots, height / dots), dpi=dots, facecolor="white")
    options = ["-pix_fmt", "yuv420p", "-crf", "18", "-movflags", "+faststart"]  # what browsers play
    writer = FFMpegWriter(fps=frames_per_second, codec="h264", extra_args=options)  # type: ignore[arg-type]
    with writer.saving(figure, str(path), dots):
        for picture in pictures:
            figure.images.clear()
            figure.figimage(np.asarray(picture), yo=height - picture.height, origin="upper")
            writer.grab_frame()
