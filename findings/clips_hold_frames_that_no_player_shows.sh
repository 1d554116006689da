#!/usr/bin/env bash
# A clip cut out of an MP4 by ffmpeg -c copy says that it has more frames than can be read; imageio makes the rest up.
#
# Without encoding anew a clip must begin at a key frame. An edit list hides what lies between that and the clip's own
# beginning. Players, ffmpeg, PyAV and OpenCV heed it when they decode. But PyAV's stream.frames and OpenCV's
# CAP_PROP_FRAME_COUNT count the hidden frames too: a third of the count in a clip of a second, as data sets have them.
# So of eight frames spread evenly over that count, the last three cannot be read. imageio's imread, by its pyav plugin,
# makes an array of that length by numpy.empty and fills in what is decoded: the last third is whatever the memory held,
# without a word. Its imiter and its FFMPEG plugin give the frames that are there. PyAV's packets, which one reads for
# the times of frames without decoding, include the hidden ones, at times below 0; is_discard tells them.
#
# Seen with PyAV 18.1.0, OpenCV 5.0.0 (opencv-python-headless 5.0.0.93), imageio 2.38.1, ffmpeg 9.0.2 (imageio-ffmpeg
# 0.8.1), NumPy 2.4.6 on Python 3.11; 1 s at 25 frames/s from 1.5 s on, a key frame each second:
#   said: PyAV 38, OpenCV 38, imageio's improps 38; decoded by each: 25, the first of them frame 38 of the video
#   np.linspace(0, 37, 8) by OpenCV: 5 frames of 8
#   imageio.v3.imread(plugin="pyav"): 38 frames, 13 of them never written
# What helps: choose frames by their times, of packets that are not is_discard; imiter instead of imread.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "av==18.1.0" "opencv-python-headless==5.0.0.93" \
    "imageio==2.38.1" "imageio-ffmpeg==0.8.1" "numpy==2.4.6"
cat > "$folder/try.py" <<'PY'
import subprocess
import sys
from unittest.mock import patch

import av
import cv2
import imageio
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np

whole, clip = f"{sys.argv[1]}/whole.mp4", f"{sys.argv[1]}/clip.mp4"
print("PyAV", av.__version__, "OpenCV", cv2.__version__, "imageio", imageio.__version__, "NumPy", np.__version__,
      "ffmpeg", imageio_ffmpeg.get_ffmpeg_version())

with av.open(whole, "w") as container:  # frame i is grey of brightness 2 i
    stream = container.add_stream("libx264", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    stream.options = {"qp": "0", "g": "25"}
    for number in range(100):
        grey = np.full((64, 64, 3), 2 * number, dtype=np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
    container.mux(stream.encode())
cut = ["-v", "error", "-ss", "1.5", "-t", "1", "-i", whole, "-c", "copy", clip]
subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *cut], check=True)


def number_of(pixels):
    return round(float(np.mean(pixels)) / 2)


with av.open(clip) as container:
    said = container.streams.video[0].frames
    packets = [packet for packet in container.demux(video=0) if packet.size]
with av.open(clip) as container:
    shown = [number_of(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
hidden = [packet.pts < 0 for packet in packets]
print(f"PyAV: says {said}, {len(packets)} packets, {sum(hidden)} of them before time 0; decodes {len(shown)}, "
      f"from {shown[0]} on")
assert said == len(packets) == 38 and len(shown) == 25 and sum(hidden) == 13
assert abs(shown[0] - 38) <= 1 and hidden == [packet.is_discard for packet in packets]

capture = cv2.VideoCapture(clip)
said, decoded = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0
while capture.read()[0]:
    decoded += 1
found = []
for place in np.linspace(0, said - 1, 8).astype(int).tolist():
    capture = cv2.VideoCapture(clip)
    capture.set(cv2.CAP_PROP_POS_FRAMES, place)
    found.append(capture.read()[0])
print(f"OpenCV: says {said}, decodes {decoded}; of 8 frames spread over {said} reads {sum(found)}")
assert said == 38 and decoded == 25 and found == [True] * 5 + [False] * 3

said, one_by_one = iio.improps(clip, plugin="pyav").shape[0], len(list(iio.imiter(clip, plugin="pyav")))
full = np.full
with patch("numpy.empty", lambda shape, dtype=float: full(shape, 255, dtype=dtype)):  # so that it can be seen
    frames = iio.imread(clip, plugin="pyav")
unwritten = int((frames == 255).all(axis=(1, 2, 3)).sum())
other = len(iio.imread(clip, plugin="FFMPEG"))
print(f"imageio: says {said}, imiter {one_by_one}, imread {len(frames)}, of which never written {unwritten}; "
      f"plugin FFMPEG {other}")
assert said == len(frames) == 38 and one_by_one == other == 25 and unwritten == 13
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
