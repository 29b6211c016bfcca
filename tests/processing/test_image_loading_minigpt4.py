import base64
import functools
import http.server
import io
import threading

import numpy as np
import PIL.Image
import pytest

from processing import load_rgb_image


RED, HALF_RED = (255, 0, 0), (255, 127, 127)


def saved(picture, tmp_path, name, **kwargs):
    path = tmp_path / name
    picture.save(path, **kwargs)
    return path


def colour_of(path):
    picture = load_rgb_image(str(path))
    assert picture.mode == "RGB"
    return picture.getpixel((0, 0))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", RED, RED),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 128), HALF_RED),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 128, (128, 128, 128)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),
    ],
)
def test_pictures_of_every_mode_come_out_right(tmp_path, mode, colour, expected):
    path = saved(PIL.Image.new(mode, (4, 4), colour), tmp_path, "picture.png")
    assert np.allclose(colour_of(path), expected, atol=1)


def test_a_palette_keeps_its_colours_and_its_transparent_entry_becomes_white(tmp_path):
    picture = PIL.Image.new("P", (4, 4), 0)
    picture.putpalette([*RED, 0, 0, 255])
    assert colour_of(saved(picture, tmp_path, "opaque.png")) == RED
    assert colour_of(saved(picture, tmp_path, "clear.png", transparency=0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_pictures_stand_on_white_too(mode):
    whole = PIL.Image.new(mode.upper(), (4, 4), 0).convert(mode)
    assert load_rgb_image(whole).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_becomes_rgb(tmp_path):
    path = saved(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path, "picture.jpg", quality=95)
    assert np.allclose(colour_of(path), RED, atol=6)


def test_floats_from_0_to_1_are_scaled(tmp_path):
    picture = PIL.Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32))
    assert colour_of(saved(picture, tmp_path, "picture.tiff")) == (128, 128, 128)


def test_the_exif_orientation_is_applied(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    path = saved(PIL.Image.new("RGB", (20, 10), RED), tmp_path, "picture.jpg", exif=exif)
    assert load_rgb_image(path).size == (10, 20)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 0, 255))]
    path = saved(frames[0], tmp_path, "picture.gif", save_all=True, append_images=frames[1:])
    assert colour_of(path) == RED


def test_base64_and_bytes_are_pictures_too(tmp_path):
    content = saved(PIL.Image.new("RGB", (4, 4), RED), tmp_path, "picture.png").read_bytes()
    text = base64.b64encode(content).decode()
    for source in (content, text, f"data:image/png;base64,{text}"):
        assert load_rgb_image(source).getpixel((0, 0)) == RED


def test_a_url_is_fetched(tmp_path):
    saved(PIL.Image.new("RGB", (4, 4), RED), tmp_path, "picture.png")
    (tmp_path / "page.html").write_text("<p>no picture")
    handler = functools.partial(_QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert load_rgb_image(f"{address}/picture.png").getpixel((0, 0)) == RED
        with pytest.raises(ValueError, match=r"missing\.png cannot be fetched: .*404"):
            load_rgb_image(f"{address}/missing.png")
        with pytest.raises(ValueError, match=r"page\.html cannot be read"):
            load_rgb_image(f"{address}/page.html")
        server.shutdown()
    with pytest.raises(ValueError, match="cannot be fetched"):
        load_rgb_image(f"{address}/picture.png")


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_what_cannot_be_read_is_named(tmp_path):
    picture = PIL.Image.new("RGB", (64, 64), RED)
    whole = saved(picture, tmp_path, "whole.jpg").read_bytes()
    (tmp_path / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("torn.jpg", "empty.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load_rgb_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"missing\.png is not there. Expected a file, a URL"):
        load_rgb_image("missing.png")
    with pytest.raises(ValueError, match="cannot be read"):
        load_rgb_image(tmp_path)


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10)
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (64, 64)).save(buffer, "png")
    with pytest.raises(ValueError, match="bomb"):
        load_rgb_image(buffer.getvalue())
