#!/usr/bin/env bash
# PyAV writes a stream's colorspace and color_range into the file and does not convert the pixels to them.
#
# ffmpeg -colorspace bt709 -color_range pc converts RGB to BT.709 and full range, and says so in the file. The same two
# set on a stream's codec_context in PyAV only say so: the frames go to YUV by BT.601 and limited range as ever. What
# heeds the file's word (PyAV itself, OpenCV, ffmpeg, players) then shows other colours, and nobody warns. With the
# colour space alone greys are right, so that a test film of greys passes. The other half alone is wrong too:
# frame.reformat(dst_colorspace=...) converts, and the frame says so, but the encoder does not ask the frame, so the
# file says nothing and is read by BT.601. A film without either is right where it was made: within 2 levels.
#
# Seen with PyAV 18.1.0, OpenCV 5.0.0 (opencv-python-headless 5.0.0.93), ffmpeg 9.0.2 (imageio-ffmpeg 0.8.1), NumPy
# 2.4.6 on Python 3.11; largest error of eight plain colours in a lossless H.264 (qp 0), the same by the three readers:
#   nothing set 2   colorspace 40   color_range 20   both 53   by the ffmpeg command, any of these: 2
#   reformat alone: colorspace 23, color_range 10; reformat and codec_context: 2
# What helps: both reformat and codec_context, with the same values; or neither.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "av==18.1.0" "opencv-python-headless==5.0.0.93" "imageio-ffmpeg==0.8.1" "numpy==2.4.6"
cat > "$folder/try.py" <<'PY'
import subprocess
import sys

import av
import cv2
import imageio_ffmpeg
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

path, ffmpeg = f"{sys.argv[1]}/film.mp4", imageio_ffmpeg.get_ffmpeg_exe()
print("PyAV", av.__version__, "OpenCV", cv2.__version__, "ffmpeg", imageio_ffmpeg.get_ffmpeg_version(),
      "NumPy", np.__version__)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128], [255, 255, 255], [200, 120, 60],
                    [60, 160, 60], [0, 0, 0]], dtype=np.uint8)  # fmt: skip
FILM = np.repeat(COLOURS, 32, axis=0)[None].repeat(128, axis=0)  # (128, 256, 3)
SPACE, RANGE = int(Colorspace.ITU709), int(ColorRange.JPEG)
CASES = {  # what is set: for the codec context, for reformat, for ffmpeg
    "nothing": ({}, {}, []),
    "colorspace": ({"colorspace": SPACE}, {"dst_colorspace": SPACE}, ["-colorspace", "bt709"]),
    "color_range": ({"color_range": RANGE}, {"dst_color_range": RANGE}, ["-color_range", "pc"]),
    "both": ({"colorspace": SPACE, "color_range": RANGE}, {"dst_colorspace": SPACE, "dst_color_range": RANGE},
             ["-colorspace", "bt709", "-color_range", "pc"]),
}  # fmt: skip


def write(context, conversion):
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 256, 128, "yuv420p", {"qp": "0"}
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(FILM, format="rgb24")
            if conversion:
                frame = frame.reformat(format="yuv420p", **conversion)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_by_ffmpeg(options):
    source = ["-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "256x128", "-i", "-"]
    target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", *options, "-qp", "0", path]
    subprocess.run([ffmpeg, *source, *target], input=FILM.tobytes() * 3, check=True)


def error():
    """The largest error in the middle of a colour by the three readers, which agree to a level."""
    with av.open(path) as container:
        by_pyav = next(container.decode(video=0)).to_ndarray(format="rgb24")
    by_opencv = cv2.VideoCapture(path).read()[1][..., ::-1]
    command = [ffmpeg, "-v", "error", "-i", path, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    by_ffmpeg = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
    middles = [np.reshape(each, FILM.shape)[64, 16::32].astype(int) for each in (by_pyav, by_opencv, by_ffmpeg)]
    errors = [int(abs(each - COLOURS).max()) for each in middles]
    assert max(errors) - min(errors) <= 1, errors
    return errors[0]


for name, expected in (("nothing", [2, 2, 2, 2]), ("colorspace", [40, 23, 2, 2]), ("color_range", [20, 10, 2, 2]),
                       ("both", [53, None, 2, 2])):  # fmt: skip
    context, conversion, options = CASES[name]
    found = []
    for arguments in ((context, {}), ({}, conversion), (context, conversion)):
        write(*arguments)
        found.append(error())
    write_by_ffmpeg(options)
    found.append(error())
    print(f"{name}: codec_context {found[0]}, reformat {found[1]}, both of these {found[2]}, ffmpeg {found[3]}")
    assert all(right is None or abs(value - right) <= 1 for value, right in zip(found, expected, strict=True))
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
