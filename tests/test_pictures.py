"""Any picture is opened as people see it, or named: never another error, never another picture."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from bridgeblip import InputError
from bridgeblip.data.pictures import as_seen, open_picture

EXAMPLES = int(os.environ.get("BRIDGEBLIP_EXAMPLES", "100"))


def photo(seed=0, size=(90, 60)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def stored(picture, form, **how) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **how)
    return file.getvalue()


def reopened(tmp_path, content: bytes) -> np.ndarray:
    path = tmp_path / "picture"
    path.write_bytes(content)
    return np.asarray(open_picture(path))


def exif(orientation, odd=b"") -> bytes:
    """An EXIF block with an orientation and, perhaps, one more entry of twelve bytes."""
    entries = [struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0), *([odd] if odd else [])]
    table = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"Exif\0\0II*\0\x08\0\0\0" + table + struct.pack("<II", 0, 0)


ODD_TAGS = {
    "a resolution of 0/0": struct.pack("<HHII", 0x011A, 5, 1, 38),
    "a count as a float": struct.pack("<HHIf", 0x0115, 11, 1, 3.0),
    "an unknown type": struct.pack("<HHII", 0x011B, 99, 1, 3),
    "an offset beyond the end": struct.pack("<HHII", 0x010F, 2, 99, 2**31),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, orientation, form):
    content = stored(photo(), form, exif=exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(reopened(tmp_path, content), np.asarray(expected))
    again = as_seen(open_picture(tmp_path / "picture"))  # a second time turns nothing
    assert np.array_equal(np.asarray(again), np.asarray(expected))


@pytest.mark.parametrize("odd", ODD_TAGS.values(), ids=ODD_TAGS)
def test_an_odd_tag_keeps_no_photo_from_being_turned(tmp_path, odd):
    plain = reopened(tmp_path, stored(photo(), "JPEG", exif=exif(6)))
    assert plain.shape == (90, 60, 3)
    assert np.array_equal(reopened(tmp_path, stored(photo(), "JPEG", exif=exif(6, odd))), plain)


def test_much_text_or_a_large_profile_is_no_fault(tmp_path):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    content, large = stored(photo(), "PNG"), zlib.compress(bytes(3 * 2**20))
    for extra in (chunk(b"zTXt", b"x\0\0" + large), chunk(b"iCCP", b"x\0\0" + large)):
        seen = reopened(tmp_path, content[:33] + extra + content[33:])
        assert np.array_equal(seen, np.asarray(photo()))


@pytest.mark.parametrize("junk", [b"\n", b"\xef\xbb\xbf", b"1f40\r\n"])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_few_bytes_before_the_picture_are_passed_over(tmp_path, junk, form):
    content = stored(photo(), form)
    assert np.array_equal(reopened(tmp_path, junk + content), reopened(tmp_path, content))


def test_a_jpeg_without_its_last_bytes_is_seen_and_one_without_lines_is_named(tmp_path):
    content = stored(photo(size=(320, 240)), "JPEG")
    whole = reopened(tmp_path, content)
    for lost in (1, 2, 15, 60):
        seen = reopened(tmp_path, content[:-lost])
        assert np.array_equal(seen[:-24], whole[:-24]), lost
    for cut in (content[: len(content) * 9 // 10], stored(photo(), "JPEG", progressive=True)[:-15]):
        with pytest.raises(InputError, match="truncated"):
            reopened(tmp_path, cut)


def test_floating_point_from_0_to_1_is_scaled(tmp_path):
    grey = photo().convert("L")
    bright = reopened(tmp_path, stored(Image.fromarray(np.float32(grey) / 255), "TIFF"))
    assert np.array_equal(bright, np.asarray(grey.convert("RGB")))


@pytest.mark.parametrize("content, said", [
    (b"", "it is empty"),
    (b"hello", "no whole picture, it begins with b'hello'"),
    (b"\0\0\0\x18ftypheic" + bytes(40), "a HEIC photo"),
    (b"\0\0\0\x20ftypisom" + bytes(40), "a video"),
    (b"<?xml version='1.0'?>\n<svg/>", "a drawing, SVG"),
    (b"\n<!DOCTYPE html>", "a web page"),
    (b"%PDF-1.7", "a PDF"),
    (b"version https://git-lfs.github.com/spec/v1", "a pointer to the file"),
    (b'{"error": "not found"}', "JSON"),
    (None, "there is no such file"),
])  # fmt: skip
def test_what_is_no_picture_is_named(tmp_path, content, said):
    path = tmp_path / "x.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        InputError, match=rf"x\.jpg can't be read \(.*{said}.*\): give a whole JPEG"
    ):
        open_picture(path)


def test_faults_are_one_line_with_their_cause(tmp_path):
    for content in (b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + bytes(40)):
        with pytest.raises(InputError, match="picture can't be read") as caught:
            reopened(tmp_path, content)
        assert "\n" not in str(caught.value) and caught.value.__cause__
    with pytest.raises(InputError, match="nowhere"):
        open_picture(tmp_path / "nowhere")
    with pytest.raises(InputError):
        open_picture(tmp_path)


FORMS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "SGI", "JPEG2000"]
FORMS += ["AVIF"] * features.check("avif")
MODES = ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16", "F"]


@st.composite
def files(draw) -> tuple[bytes, bytes]:
    """The content of a picture's file as Pillow writes it, and as it is after an accident."""
    picture = photo(draw(st.integers(0, 3)), draw(st.sampled_from([(40, 30), (1, 1), (64, 9)])))
    form, mode = draw(st.sampled_from(FORMS)), draw(st.sampled_from(MODES))
    how = {}
    if draw(st.booleans()):
        odd = draw(st.sampled_from([b"", *ODD_TAGS.values()]))
        how["exif"] = exif(draw(st.integers(0, 9)), odd)
    if draw(st.booleans()) and form == "JPEG":
        how["progressive"] = True
    try:
        content = stored(picture.convert(mode), form, **how)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        content = stored(picture, "PNG")  # not every form holds every mode
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[at:]
        elif kind == "remove":
            del changed[at : at + draw(st.integers(1, 20))]
        else:
            changed[at:at] = draw(st.binary(max_size=8))
    return content, bytes(changed)


@pytest.mark.filterwarnings("ignore")
def test_any_picture_is_opened_or_named(tmp_path):
    path = tmp_path / "picture"

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
    @given(files())
    def check(contents):
        path.write_bytes(contents[0])
        assert open_picture(path).mode == "RGB"
        path.write_bytes(contents[1])
        try:
            seen = open_picture(path)
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert seen.mode == "RGB" and min(seen.size) > 0

    check()
