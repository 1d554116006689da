"""Videos from files and lists: which frames, which way up, what is wrong with them; and moving digits."""

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from d_emo.data.moving import MOTIONS, SPEEDS, MovingDigits
from d_emo.data.sampler import EpochIndex
from d_emo.data.video_folder import MeasuredVideos, TrainingVideos
from d_emo.data.video_lists import VideoList, list_videos, split_videos
from d_emo.data.videos import ClipSampler, read_frames, upright
from d_emo.errors import InputError

av = pytest.importorskip("av")
HEADER = "label,youtube_id,time_start,time_end,split\n"


def write_video(path, *, count=12, size=(32, 48), times=None, rate=10, still=False):
    """A film of (height, width) whose frame i is grey of brightness 20 i, with a white square at the top left.

    A still one has the same frame again and again, brighter from left to right.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(count):
            pixels = np.full((*size, 3), 20 * number, dtype=np.uint8)
            pixels[:8, :8] = 255
            if still:
                pixels[:] = np.arange(0, 5 * size[1], 5)[:, None]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path, sampler, **options):
    """The brightness of a clip's frames in the units of `write_video`, and how many the file has."""
    frames, numbers, count = read_frames(path, lambda shown, end: sampler.times(shown, end, **options))
    return [[round(float(frames[number][20, 20, 0]) / 20) for number in clip] for clip in numbers.tolist()], count


@pytest.mark.parametrize("ending", ["mp4", "avi", "mkv"])
def test_uniform_clips_take_one_frame_of_each_part(tmp_path, ending):
    path = write_video(tmp_path / f"a.{ending}")
    assert read(path, ClipSampler(4)) == ([[1, 4, 7, 10]], 12)
    assert read(path, ClipSampler(3), clips=2)[0] == [[1, 5, 9], [3, 7, 11]]
    drawn = [read(path, ClipSampler(4), rng=np.random.default_rng(seed))[0][0] for seed in range(20)]
    assert {each[1] for each in drawn} == {3, 4, 5}


def test_dense_clips_are_an_interval_apart_and_hold_the_last_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert read(path, ClipSampler(4, "dense", 2))[0] == [[3, 5, 7, 9]]
    assert read(path, ClipSampler(4, "dense", 3), clips=2)[0] == [[1, 4, 7, 10], [2, 5, 8, 11]]
    assert [clip[0] for clip in read(path, ClipSampler(4, "dense", 3), clips=4)[0]] == [0, 1, 1, 2]
    assert read(path, ClipSampler(4, "dense", 5))[0] == [[0, 5, 10, 11]]


def test_frames_are_chosen_by_the_time_at_which_they_are_shown(tmp_path):
    path = write_video(tmp_path / "a.mkv", times=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 100])
    assert read(path, ClipSampler(4))[0] == [[10, 10, 10, 10]]  # which is there for nine of eleven seconds
    path = write_video(tmp_path / "b.mkv", times=[0, 1, 2, 3, 4, 10, 16, 22, 28, 34, 40, 46])
    assert read(path, ClipSampler(5))[0] == [[4, 5, 7, 9, 10]]


def test_frames_that_an_edit_list_hides_are_no_part_of_the_video(tmp_path):
    write_video(tmp_path / "whole.mp4")
    with av.open(str(tmp_path / "whole.mp4")) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):  # as they are; the clip begins at frame 5, the decoder at 0
            if packet.size:
                lead = round(0.5 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - lead, packet.dts - lead, stream
                target.mux(packet)
    assert read(tmp_path / "cut.mp4", ClipSampler(4)) == ([[5, 7, 9, 11]], 7)


MATRICES = {(1, 0, 0, 1): (0, 0), (0, 1, -1, 0): (0, -1), (-1, 0, 0, -1): (-1, -1), (0, -1, 1, 0): (-1, 0),
            (-1, 0, 0, 1): (0, -1), (1, 0, 0, -1): (-1, 0), (0, 1, 1, 0): (0, 0), (0, -1, -1, 0): (-1, -1)}


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_display_matrix_is_heeded(tmp_path, matrix):
    path = write_video(tmp_path / "a.mp4", count=2)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # of the track header's matrix, in its version 0
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    (frame,) = read_frames(path, lambda shown, end: shown[:1])[0].values()
    assert frame.shape == ((32, 48, 3) if matrix[0] else (48, 32, 3))
    corners = {(row, column): frame[row, column, 0] > 200 for row in (0, -1) for column in (0, -1)}
    assert [corner for corner, white in corners.items() if white] == [MATRICES[matrix]]


def test_a_matrix_of_another_angle_is_rounded_and_none_changes_nothing():
    pixels = np.arange(12).reshape(2, 2, 3)
    slanted = np.array([10, 60000, 0, -60000, 10, 0, 0, 0, 1])
    assert np.array_equal(upright(pixels, slanted), np.rot90(pixels, -1))
    assert upright(pixels, None) is pixels


def test_bad_videos_are_named_in_a_sentence(tmp_path):
    whole = write_video(tmp_path / "a.avi").read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, 2500, dtype=np.uint8).tobytes()
    start = whole.index(b"movi") + 20
    for name, content in {"text.mp4": b"no video", "empty.avi": b"", "noise.avi": whole[:start] + noise,
                          "head.avi": whole[: whole.index(b"movi")]}.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"cannot read the video .*/{name} \(.+\); repair or replace it"):
            read(tmp_path / name, ClipSampler(4))
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(InputError, match="there are no pictures in it"):
        read(tmp_path / "sound.mkv", ClipSampler(4))


def make_videos(root, counts=(12, 12, 12)):
    files = [write_video(root / f"{number}.avi", count=count) for number, count in enumerate(counts)]
    return VideoList(files, [0, 1, 0][: len(files)], ["a", "b"])


def test_short_and_corrupt_videos_are_told_of(tmp_path, capfd):
    videos = make_videos(tmp_path, (3, 12, 12))
    videos.files[2].write_text("no video")
    dataset = MeasuredVideos(videos, 32, sampler=ClipSampler(8), skip_corrupt=True)
    clip = dataset[0][0][0]  # (3, 8, 32, 32)
    assert [round((value.item() + 1) * 127.5 / 20) for value in clip[0, :, 20, 20]] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert dataset[2][1] == 0 and "cannot read the video" in capfd.readouterr().err
    assert dataset.remarks() == [
        "skipped   1 video that cannot be read", "repeated  frames of 1 video with fewer than 8"
    ]
    with pytest.raises(InputError, match="`skip_corrupt` passes over such videos"):
        MeasuredVideos(videos, 32, sampler=ClipSampler(8))[2]


def test_views_are_the_middle_or_three_along_the_longer_side(tmp_path):
    videos = make_videos(tmp_path, (12,))
    one = MeasuredVideos(videos, 32, sampler=ClipSampler(4), crop_share=1.0)[0][0]
    assert one.shape == (1, 3, 4, 32, 32) and one[0, :, 0, 2, 2].max() < 0
    many = MeasuredVideos(videos, 32, sampler=ClipSampler(4), clips=2, crops=3)[0][0]
    assert many.shape == (6, 3, 4, 32, 32) and torch.equal(many[2], one[0]) is False
    assert [bool(view[0, 0, 2, 2] > 0.8) for view in many] == [True, True, False, False, False, False]


def test_training_clips_depend_on_seed_epoch_and_video_alone_and_treat_all_frames_alike(tmp_path):
    write_video(tmp_path / "0.avi", count=12)
    videos = VideoList([tmp_path / "0.avi"], [0], ["a"])
    options = {"sampler": ClipSampler(4), "crop_scale": [0.2, 0.5], "rand_augment": "rand-m7-n4", "seed": 1}
    dataset = TrainingVideos(videos, 32, mirror=True, **options)
    first, again, later = (dataset[EpochIndex(0, epoch)][0] for epoch in (0, 0, 1))
    assert first.shape == (3, 4, 32, 32) and torch.equal(first, again) and not torch.equal(first, later)
    plain = {**options, "rand_augment": None}
    still = VideoList([write_video(tmp_path / "1.avi", still=True)], [0], ["a"])
    clip = TrainingVideos(still, 32, mirror=True, **plain)[0][0]
    assert torch.allclose(clip, clip[:, :1].expand_as(clip), rtol=0, atol=0.05)
    mirrored = [TrainingVideos(videos, 32, mirror=True, **plain)[EpochIndex(0, epoch)][0] for epoch in range(8)]
    as_is = [TrainingVideos(videos, 32, mirror=False, **plain)[EpochIndex(0, epoch)][0] for epoch in range(8)]
    same = [torch.equal(one, other) for one, other in zip(mirrored, as_is, strict=True)]
    assert any(same) and all(
        equal or torch.equal(one, other.flip(-1)) for equal, one, other in zip(same, mirrored, as_is, strict=True)
    )


def test_folders_of_classes_and_their_splits(tmp_path):
    for part, label in (("train", "run"), ("train", "jump"), ("val", "jump")):
        write_video(tmp_path / part / label / "0.avi", count=1)
    (tmp_path / "train/run/notes.md").write_text("")
    train, held_out = split_videos(str(tmp_path))
    videos = list_videos(train)
    assert (videos.class_names, videos.labels) == (["jump", "run"], [0, 1])
    assert videos.left_out == "1 file of other kinds left out: .md 1"
    assert list_videos(held_out, ["run", "jump"]).labels == [1]
    with pytest.raises(InputError, match="the class jump of .*/val is not one that is trained on"):
        list_videos(held_out, ["run", "walk"])
    (tmp_path / "val/jump/0.avi").rename(tmp_path / "val/jump/0.txt")
    with pytest.raises(InputError, match=r"val/jump holds no videos \(.3gp, .avi, .*; 1 file of other kinds"):
        list_videos(held_out)
    assert split_videos(str(tmp_path / "train")) == (str(tmp_path / "train"), None)


def test_lists_of_paths_and_labels(tmp_path, capsys):
    (tmp_path / "train.csv").write_text("a b/x.mp4 1\nc.mp4 0\n\n/d.mp4 2\n")
    (tmp_path / "val.csv").write_text("c.mp4,0\n")
    train, held_out = split_videos(str(tmp_path))
    videos = list_videos(train)
    assert videos.files == [tmp_path / "a b/x.mp4", tmp_path / "c.mp4", tmp_path.__class__("/d.mp4")]
    assert (videos.labels, videos.class_names) == ([1, 0, 2], ["0", "1", "2"])
    assert list_videos(held_out, videos.class_names).labels == [0]
    (tmp_path / "classes.txt").write_text("run\njump\nride a bike\n")
    assert list_videos(train).class_names == ["run", "jump", "ride a bike"]
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "named.csv").write_text("path,label\na.mp4,ride a bike\n\"b.mp4\",run\n")
    assert list_videos(str(tmp_path / "named.csv"))[1:3] == ([0, 1], ["ride a bike", "run"])
    for text, message in {"": "is empty", "a.mp4\n": "line 1 of .* is 'a.mp4'; it should be a video's path and its",
                          "path,label\n": "has only its first line"}.items():  # fmt: skip
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            list_videos(str(tmp_path / "bad.csv"))


def test_published_lists_find_the_videos_that_are_there(tmp_path):
    for name in ("val/run/-abc_def_x_000010_000020.mp4", "bcdefghijkl.webm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "val.csv").write_text(
        HEADER + "ride a bike,-abc_def_x,10,20,val\nrun,bcdefghijkl,3.0,13.0,val\nrun,gone_______,1,11,val\n"
    )
    videos = list_videos(str(tmp_path / "val.csv"))
    assert [file.name for file in videos.files] == ["-abc_def_x_000010_000020.mp4", "bcdefghijkl.webm"]
    assert (videos.labels, videos.class_names) == ([0, 1], ["ride a bike", "run"])
    assert videos.left_out.startswith("1 of the 3 videos of")
    for text, message in {"run,gone_______,1,11,val\n": "none of the 1 videos .* such as gone________000001_000011.mp4",
                          "run,x,one,2,val\n": "line 2 of .* lacks a label, an id or a time",
                          ",bcdefghijkl,1,2,test\n": "has videos without a label"}.items():  # fmt: skip
        (tmp_path / "val.csv").write_text(HEADER + text)
        with pytest.raises(InputError, match=message):
            list_videos(str(tmp_path / "val.csv"))


def test_single_frames_of_moving_digits_say_nothing_of_their_motion():
    data = MovingDigits(32, num_videos=24)
    assert len(data.class_names) == 12 and data[13][1] == 1 and data[0][0].shape == (3, 8, 32, 32)
    assert torch.equal(data[5][0], data[5][0]) and not torch.equal(data[5][0], MovingDigits(32, split="test")[5][0])
    for axis in (("right", "left"), ("down", "up"), ("clockwise", "counterclockwise")):
        films = [data.draw(3, np.array(MOTIONS[motion]) * SPEEDS[speed]) for motion in axis for speed in SPEEDS]
        assert all(torch.equal(film[:, 0], films[0][:, 0]) for film in films)
        unordered = [sorted(tuple(frame.flatten().tolist()) for frame in film.unbind(1)) for film in films]
        assert np.allclose(unordered[1:], unordered[:1] * 3, atol=1e-5)  # the same frames in another order
        assert not any(torch.equal(film, films[0]) for film in films[1:])
    right = data.draw(3, np.array([1, 0, 0]))
    assert torch.equal(right[:, 1], right[:, 0].roll(4, dims=-1))
    turned = data.draw(3, np.array([0, 0, 2]))[0].numpy()  # by a right angle
    distances = [
        min(np.abs(np.roll(np.rot90(turned[0], quarter), (i, j), (0, 1)) - turned[1]).max()
            for i in range(32) for j in range(32))
        for quarter in (-1, 1)
    ]  # fmt: skip
    assert distances[0] < 0.05 < 0.5 < distances[1]
