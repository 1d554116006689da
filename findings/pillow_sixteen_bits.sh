#!/usr/bin/env bash
# The same picture as a PNG of 16 bits: in colour Pillow scales it to 8 bits, in grey its convert("RGB") cuts it off.
#
# A colour PNG of 16 bits opens in mode RGB, already scaled: 0 to 65535 become 0 to 255. A grey one opens as I;16 with
# its numbers, and convert("RGB") or convert("L"), which every training script calls, makes white of all above 255: a
# medical scan or a depth map trains as a white square, without a warning. A TIFF of 16 bits is the same. Floating-point
# pixels from 0 to 1 (mode F) are truncated to 0 and 1: black. A TIFF in which 0 is white (photometric 0, as scanners
# write it) is inverted by Pillow at 8 bits and not at 16.
#
# Seen with Pillow 12.3.0, NumPy 2.4.6 on Python 3.11:
#   RGB   16 bits -> [0, 85, 170, 255]    I;16 -> [0, 255, 255, 255]    F -> [0, 0, 0, 1]
#   0 is white:  L -> [255, 170, 85, 0]   I;16 -> [0, 21845, 43690, 65535]
# What helps: divide I;16 by 257 (or the range that the file says), refuse F outside of 0 to 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "pillow==12.3.0" "numpy==2.4.6"
cat > "$folder/try.py" <<'PY'
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

folder = Path(sys.argv[1])
print("Pillow", PIL.__version__, "NumPy", np.__version__)
ramp = np.array([[0, 21845, 43690, 65535]], np.uint16)  # 0, 1/3, 2/3, 1


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, pixels, colour):
    """16 bits a sample; colour is 0 for grey and 2 for red, green, blue."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


def seen(path):
    with Image.open(path) as image:
        return image.mode, np.asarray(image.convert("RGB"))[0, :, 0].tolist()


write_png(folder / "colour.png", np.stack([ramp] * 3, axis=-1), 2)
write_png(folder / "grey.png", ramp, 0)
Image.fromarray(ramp).save(folder / "grey.tif")
Image.fromarray((ramp / 65535).astype(np.float32)).save(folder / "float.tif")
found = {name: seen(folder / name) for name in ("colour.png", "grey.png", "grey.tif", "float.tif")}
for name, (mode, values) in found.items():
    print(f"{name:12} mode {mode:5} as RGB {values}")
assert found["colour.png"] == ("RGB", [0, 85, 170, 255])
assert found["grey.png"] == ("I;16", [0, 255, 255, 255])
assert found["grey.tif"] == ("I;16", [0, 255, 255, 255])
assert found["float.tif"] == ("F", [0, 0, 0, 1])

def write_tiff(path, samples, bits):
    """One row of grey samples, uncompressed, in which 0 is white."""
    data = samples.astype(f"<u{bits // 8}").tobytes()
    tags = [(256, samples.size), (257, 1), (258, bits), (259, 1), (262, 0), (273, 8), (277, 1), (278, 1), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)


for bits in (8, 16):
    stored = np.array([0, 1, 2, 3]) * ((2**bits - 1) // 3)
    write_tiff(folder / "inverse.tif", stored, bits)
    with Image.open(folder / "inverse.tif") as image:
        found[bits] = image.mode, np.asarray(image)[0].tolist()
    print(f"0 is white, {bits} bits: stored {stored.tolist()}, Pillow gives {found[bits]}")
assert found[8] == ("L", [255, 170, 85, 0])
assert found[16] == ("I;16", [0, 21845, 43690, 65535])
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
