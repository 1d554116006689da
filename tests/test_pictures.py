"""What is asked for by class, and the pictures that come of it: names, captions, files, previews."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_sampling import CONFIG

from d_emo import sampling
from d_emo.errors import InputError
from d_emo.files import free_path
from d_emo.latents import PixelCodec


def test_classes_are_found_by_id_and_by_name():
    names = ["cat", "dog", "horse"]
    assert sampling.find_classes(["1", "horse", "cat"], names) == [1, 2, 0]
    assert sampling.find_classes([torch.tensor([1])[0], np.int64(2), 0], names) == [1, 2, 0]
    assert sampling.find_classes([], ["all"]) == [0]
    with pytest.raises(InputError, match="at least one class.*3 classes"):
        sampling.find_classes([], names)
    assert sampling.find_classes(["CAT", "Dog", "dog"], [*names, "Dog"]) == [0, 3, 1]
    assert sampling.find_classes(["dOG", "4"], ["x", "dOG ", "dOg", "y", "z"]) == [2, 4]
    with pytest.raises(InputError, match="2 classes are called 'DOG', 1, 3; write id:1 or id:3"):
        sampling.find_classes(["DOG"], [*names, "Dog"])
    wrongs = {"3": "out of range.*3 classes", "-1": "out of range", "hors": "did you mean horse", "²": "called '²'",
              "--1": "called '--1'", "1" * 5000: "no class is called '1111"}
    for wrong, words in wrongs.items():
        with pytest.raises(InputError, match=words):
            sampling.find_classes([wrong], names)


def test_of_few_classes_all_are_named():
    for count, named in ((3, r"3 classes, 0 \(a0\), 1 \(a1\), 2 \(a2\)$"), (6, r"6 classes, 0 \(a0\) to 5 \(a5\)$")):
        with pytest.raises(InputError, match=f"no class is called 'cow': this snapshot knows {named}"):
            sampling.find_classes(["cow"], [f"a{label}" for label in range(count)])


def test_a_class_that_can_be_meant_twice_is_asked_about():
    numbers = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...: text, as 0.1.0 had them
    with pytest.raises(InputError, match="called '8', or the one of this name, whose id is 2; write id:10 or name:10"):
        sampling.find_classes(["10"], numbers)
    assert sampling.find_classes(["id:10", "name:10", 10, "1"], numbers) == [10, 2, 10, 1]
    assert [sampling.spell_class(label, numbers) for label in (1, 10)] == ["1", "id:10"]
    assert sampling.find_classes(["30"], ["10", "20", "30"]) == [2]  # no id
    birds = ["crane", "heron", "crane"]
    with pytest.raises(InputError, match="2 classes are called 'crane', 0, 2; write id:0 or id:2"):
        sampling.find_classes(["crane"], birds)
    with pytest.raises(InputError, match="2 classes are called 'crane'"):
        sampling.find_classes(["name:crane"], birds)
    assert sampling.find_classes(["id:2", "name:heron"], birds) == [2, 1]
    wrongs = {"id:3": "class 3 is out of range", "name:1": "no class is called '1'", "id:x": "called 'x'"}
    for wrong, words in wrongs.items():
        with pytest.raises(InputError, match=words):
            sampling.find_classes([wrong], birds)


def test_png_carries_its_settings_and_is_never_overwritten(tmp_path):
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    grid = sampling.draw_grid(images, ["cat", "dog"], 2, scale=2)
    path = free_path(tmp_path / "sub" / "grid.png")
    sampling.save_png(grid, path, {"seed": 3})
    with Image.open(path) as picture:
        assert json.loads(picture.text["d-emo"]) == {"seed": 3}
        pixels = np.array(picture)
    assert np.array_equal(pixels[22:38:2, 4:20:2], images[0].permute(1, 2, 0).numpy())
    assert free_path(path).name == "grid-2.png"
    with pytest.raises(InputError, match="cannot write"):
        sampling.save_png(grid, path / "x.png", {})


def test_captions_fit_above_a_single_picture():
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    short, long = (np.array(sampling.draw_grid(image, [text], 1)) for text in ("a", "207: red triangle on sky"))
    assert short.shape == (22 + 128 + 4, 136, 3) and long.shape == (44 + 128 + 4, 136, 3)  # enlarged; a line, or two
    assert (long[:44, -4:] == 255).all() and (long[22:44] < 255).any()


def test_preview_grid_is_written(tmp_path, tiny_denoiser):
    tiny_denoiser.register_to_config(in_channels=4)

    class Codec(PixelCodec):
        def decode(self, latents):
            return latents[:, :3].clamp(-1, 1)

    sampling.preview_grid(
        tmp_path / "p.png", tiny_denoiser, scheduler_config=CONFIG, codec=Codec(), class_names=list("0123456789"),
        guidance_scale=2.0,
    )
    assert Image.open(tmp_path / "p.png").size[0] == 2 * (128 + 4) + 4


def test_a_preview_without_finite_values_stops_nothing(tmp_path, tiny_denoiser, capsys):
    torch.nn.init.constant_(tiny_denoiser.final_layer.linear.weight, float("nan"))
    sampling.preview_grid(
        tmp_path / "p.png", tiny_denoiser, scheduler_config=CONFIG, codec=PixelCodec(), class_names=list("0123456789"),
        guidance_scale=2.0,
    )
    assert "no sample grid" in capsys.readouterr().err and not (tmp_path / "p.png").exists()


def test_the_shipped_snapshot_draws_the_ground_it_is_asked_for():
    from d_emo.data import GROUNDS
    from d_emo.io.snapshot import SHIPPED_SNAPSHOT

    assert sum(file.stat().st_size for file in SHIPPED_SNAPSHOT.glob("**/*")) < 32e6
    sampler = sampling.Sampler.open(SHIPPED_SNAPSHOT, steps=15, guidance=2.0, device="cpu")
    assert sampler.class_names[207] == "red triangle on sky"
    images = torch.cat(list(sampler.images([200 + ground for ground in range(10)], range(10)))).double()
    borders = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=2)
    palette = torch.tensor(list(GROUNDS.values())).double()
    nearest = torch.cdist(borders.median(dim=2).values, palette).argmin(dim=1)
    assert (nearest == torch.arange(10)).sum() >= 8, nearest
