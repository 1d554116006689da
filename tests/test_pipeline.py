"""DEMOPipeline, and scripts/sample.py from end to end."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoModel,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

import d_emo
from d_emo import sampling
from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.io.snapshot import PIPELINE_CODE, SHIPPED_SNAPSHOT, pipeline_index, save_denoiser
from d_emo.latents import load_codec
from d_emo.models import create_model
from d_emo.tables import OBJECTIVES, load

NAMES = [*"012345678", "a nine"]


def snapshot(folder, denoiser, *, objective="eps", codec="d-emo-f8", **meta):
    meta = {"step": 5, "weights": "ema", "codec": codec, "image_size": 64, "class_names": NAMES, **meta}
    schedule = load(OBJECTIVES[objective].loss)(null_class=10).noise_schedule()
    save_denoiser(folder, denoiser, scheduler=schedule, meta=meta, settings=TrainSettings())
    return folder


@pytest.fixture
def pipe(tmp_path, tiny_denoiser):
    pipe = d_emo.DEMOPipeline.from_snapshot(snapshot(tmp_path / "snapshot", tiny_denoiser))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_pipeline_draws_what_the_sampler_draws(pipe, tiny_denoiser):
    for name in ("dpm++", "ddpm"):
        pipe.scheduler = sampling.make_scheduler(name, pipe.scheduler.config)
        drawn = pipe(["a nine", 3], 2.0, 4, seeded(5, 6), output_type="pt").images
        sampler = sampling.Sampler(
            tiny_denoiser, load_codec("d-emo-f8"), pipe.scheduler.config, scheduler=name, steps=4, guidance=2.0
        )
        expected = torch.cat(list(sampler.images([9, 3], [5, 6])))
        assert drawn.shape == (2, 3, 64, 64)
        torch.testing.assert_close(drawn * 255, expected.float(), rtol=0, atol=0.6)


def test_save_and_load_keep_pictures_and_names(pipe, tmp_path):
    before = pipe([3, 9], num_inference_steps=3, generator=seeded(0, 1), output_type="np").images
    pipe.save_pretrained(tmp_path / "saved")
    loaded = d_emo.DEMOPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.class_names == NAMES and loaded.get_label_ids("a nine") == [9] and loaded.get_label_ids([2]) == [2]
    after = loaded(["3", "a nine"], num_inference_steps=3, generator=seeded(0, 1), output_type="np").images
    assert np.array_equal(before, after) and before.shape == (2, 64, 64, 3) and before.std() > 0


@pytest.fixture
def folders(tmp_path, pipe):
    """A snapshot, one from before snapshots had a model_index.json, and a saved pipeline; of the same pictures."""
    shutil.copytree(tmp_path / "snapshot", tmp_path / "old")
    for name in ("model_index.json", "pipeline.py"):
        (tmp_path / "old" / name).unlink()
    pipe.save_pretrained(tmp_path / "saved")
    return {name: str(tmp_path / name) for name in ("snapshot", "old", "saved")}


def test_diffusers_opens_snapshots_and_pipelines(folders, pipe):
    own = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    doors = [(d_emo.DEMOPipeline, name, {}) for name in folders]
    doors += [(DiffusionPipeline, name, options) for name in ("snapshot", "saved") for options in ({}, own)]
    doors += [(DiffusionPipeline, "snapshot", {**own, "custom_pipeline": folders["snapshot"]})]
    drawn = {"class_labels": [3], "num_inference_steps": 2, "output_type": "latent"}
    expected = pipe(**drawn, generator=seeded(0)).images
    for kind, name, options in doors:
        opened = kind.from_pretrained(folders[name], **options)
        opened.set_progress_bar_config(disable=True)
        assert type(opened) is d_emo.DEMOPipeline and opened.class_names == NAMES
        assert type(opened.scheduler).__name__ == "DPMSolverMultistepScheduler" and opened.vae is not None
        assert torch.equal(opened(**drawn, generator=seeded(0)).images, expected), (kind, name, options)
    low = d_emo.DEMOPipeline.from_pretrained(folders["snapshot"], torch_dtype=torch.bfloat16, scheduler=pipe.scheduler)
    assert low.transformer.dtype == torch.bfloat16 and low.scheduler is pipe.scheduler


def test_a_run_folder_opens_its_newest_snapshot_and_the_shipped_one_says_what_is_in_it(folders, tmp_path):
    shutil.copytree(folders["old"], tmp_path / "run" / "snapshots" / "step-5")
    assert d_emo.DEMOPipeline.from_pretrained(tmp_path / "run").config.objective == "eps"
    index = json.loads((SHIPPED_SNAPSHOT / "model_index.json").read_text())
    assert {**index, "_diffusers_version": ""} == {**pipeline_index(SHIPPED_SNAPSHOT), "_diffusers_version": ""}
    assert (SHIPPED_SNAPSHOT / "pipeline.py").read_text() == PIPELINE_CODE


def test_diffusers_knows_the_denoiser(folders):
    for name in folders:
        for path, options in ((folders[name], {"subfolder": "transformer"}), (f"{folders[name]}/transformer", {})):
            assert type(AutoModel.from_pretrained(path, **options)) is d_emo.Denoiser
    with pytest.raises(AttributeError):
        diffusers.Denoisers  # noqa: B018


def test_several_pictures_of_each_label(pipe):
    both = {"num_inference_steps": 2, "output_type": "latent"}
    pairs = pipe(torch.tensor([3, 9]), generator=seeded(0, 1, 2, 3), num_images_per_prompt=2, **both).images
    assert torch.equal(pairs, pipe([3, 3, 9, 9], generator=seeded(0, 1, 2, 3), **both).images)


def test_a_scheduler_of_another_objective_is_refused(pipe):
    own, flow = pipe.scheduler.config, FlowMatchEulerDiscreteScheduler
    for scheduler in (flow(), flow.from_config(own), DPMSolverMultistepScheduler(prediction_type="flow_prediction")):
        pipe.scheduler = scheduler
        with pytest.raises(InputError, match="predict flow.*trained with eps and predicts epsilon; make one of ddpm"):
            pipe([1])
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(sampling.make_scheduler("ddpm", own).config)
    assert pipe([1], num_inference_steps=2, output_type="pt").images.shape == (1, 3, 64, 64)  # it misread the variance


def test_offloading_moves_the_parts_in_their_turn(pipe):
    """As far as a CPU shows: the hooks are on every part's call, and taken off after it."""
    expected = pipe([3], num_inference_steps=2, generator=seeded(0), output_type="np").images
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe._execution_device.type == "cpu" and len(pipe._all_hooks) == 2
    for _ in range(2):
        drawn = pipe([3], num_inference_steps=2, generator=seeded(0), output_type="np").images
        assert np.array_equal(drawn, expected)


def test_class_names_that_are_not_of_the_classes_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "id2label": {"0": "a", "2": "b"}}))
    with pytest.raises(InputError, match="id2label must name the classes 0 to 9"):
        d_emo.DEMOPipeline.from_pretrained(tmp_path)


def test_pixel_and_flow_pipelines_round_trip(tmp_path):
    model = create_model("SiT-S-2", depth=1, hidden_size=48, sample_size=8, in_channels=3, num_classes=1).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, 0, 0.1)
    folder = snapshot(tmp_path / "a", model, objective="flow", codec="pixels", class_names=["all"], label_dropout=0.0)
    pipe = d_emo.DEMOPipeline.from_snapshot(folder, scheduler="heun")
    pipe.save_pretrained(tmp_path / "b")
    loaded = d_emo.DEMOPipeline.from_pretrained(tmp_path / "b")
    assert loaded.vae is None and type(loaded.scheduler).__name__ == "FlowMatchHeunDiscreteScheduler"
    calls = []
    loaded.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    first, second = (each(num_inference_steps=3, generator=seeded(4)).images[0] for each in (pipe, loaded))
    assert first.size == (8, 8) and first.tobytes() == second.tobytes()
    assert calls == [1] * 5, "one class, so no guidance; Heun looks twice in every step but the last"


def test_every_step_uses_the_generator_and_the_first_sees_unit_noise(pipe):
    inputs = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for scheduler in (
        sampling.make_scheduler("ddpm", pipe.scheduler.config),
        EulerAncestralDiscreteScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    ):
        pipe.scheduler = scheduler
        inputs.clear()
        torch.manual_seed(1)
        first = pipe(3, num_inference_steps=4, generator=torch.Generator().manual_seed(7), output_type="latent").images
        torch.manual_seed(2)
        again = pipe(3, num_inference_steps=4, generator=torch.Generator().manual_seed(7), output_type="latent").images
        other = pipe(3, num_inference_steps=4, generator=torch.Generator().manual_seed(8), output_type="latent").images
        assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-2)
        assert inputs[0].std().item() == pytest.approx(1, abs=0.1), "also where a scheduler scales its noise"


def test_the_callback_sees_and_changes_the_latents(pipe):
    seen = []

    def callback(pipeline, index, timestep, tensors):
        seen.append((pipeline is pipe, index, int(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 3 else {}

    out = pipe([1, 2], num_inference_steps=4, output_type="latent", callback_on_step_end=callback).images
    assert [(ok, index, shape) for ok, index, _, shape in seen] == [(True, i, (2, 4, 8, 8)) for i in range(4)]
    assert [t for *_, t, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert not out.any()


def test_labels_and_seeds_may_be_numbers_tensors_or_arrays(pipe, tiny_denoiser):
    same = [3, "3", [3], (3,), torch.tensor(3), torch.tensor([3]), np.int64(3), np.array([3]), [np.int32(3)],
            [torch.tensor(3)], np.array(["3"])]  # fmt: skip
    assert all(pipe.get_label_ids(labels) == [3] for labels in same)
    assert pipe.get_label_ids(torch.tensor([3, 9])) == pipe.get_label_ids([3, "a nine"]) == [3, 9]
    drawn = pipe(torch.tensor([3]), num_inference_steps=1, output_type="latent", generator=seeded(1)).images
    assert torch.equal(drawn, pipe(3, num_inference_steps=1, output_type="latent", generator=seeded(1)).images)
    sampler = sampling.Sampler(tiny_denoiser, load_codec("d-emo-f8"), pipe.scheduler.config, steps=1)
    one = torch.cat(list(sampler.images([3, 9], [0, 1])))
    for labels, seeds in ((torch.tensor([3, 9]), np.arange(2)), (np.array([3, 9]), torch.arange(2)),
                          ([np.int64(3), np.uint8(9)], range(2))):  # fmt: skip
        assert torch.equal(torch.cat(list(sampler.images(labels, seeds))), one)
    for labels, seeds, words in (([12], [0], "class label 12 is out of range; the denoiser has 0 to 9"),
                                 (torch.tensor([1.5]), [0], "class label 1.5 is out of range"),
                                 ([1], [0.5], "a seed must be a whole number of 64 bits, not 0.5")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            list(sampler.images(labels, seeds))


def test_wrong_calls_are_one_sentence(pipe):
    for arguments, words in (
        ({"class_labels": "nine"}, "no class is called 'nine'.*a nine"),
        ({"class_labels": [10]}, "class 10 is out of range"),
        ({"class_labels": torch.tensor([10])}, "class 10 is out of range"),
        ({"class_labels": np.array([1.5])}, "no class is called '1.5'"),
        ({"class_labels": 1.5}, "no class is called '1.5'"),
        ({"class_labels": None}, "no class is called 'None'"),
        ({"class_labels": []}, "name at least one class"),
        ({"class_labels": [1], "num_inference_steps": 0}, "positive integer"),
        ({"class_labels": [1], "num_images_per_prompt": 0}, "`num_images_per_prompt` must be a positive integer"),
        ({"class_labels": [1], "output_type": "jpg"}, "`output_type` must be pil, np, pt or latent, not 'jpg'"),
        ({"class_labels": [1], "guidance_scale": -1.0}, "`guidance_scale` must be finite and not negative"),
        ({"class_labels": [1, 2], "generator": seeded(1)}, "1 generators were given for 2 pictures"),
        ({"class_labels": [1], "latents": torch.zeros(2, 4, 8, 8)}, "must have the shape .1, 4, 8, 8"),
    ):
        with pytest.raises(InputError, match=words):
            pipe(**arguments)


def test_no_guidance_without_a_null_class_and_no_picture_of_nan(pipe):
    pipe.register_to_config(label_dropout=0.0)
    assert pipe([1], num_inference_steps=1, output_type="latent").images.isfinite().all()
    with pytest.raises(InputError, match="needs a null class"):
        pipe([1], guidance_scale=2.0)
    torch.nn.init.constant_(pipe.transformer.final_layer.linear.weight, float("nan"))
    with pytest.raises(InputError, match="NaN or infinite values"):
        pipe([1], num_inference_steps=1)


def test_the_stock_pipeline_still_runs(pipe):
    stock = DiTPipeline(pipe.transformer, pipe.vae, pipe.scheduler)
    stock.set_progress_bar_config(disable=True)
    ours = pipe([3], 1.0, 3, torch.Generator().manual_seed(0), output_type="np").images
    theirs = stock([3], 1.0, torch.Generator().manual_seed(0), 3, output_type="np").images
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


# ---- scripts/sample.py -----------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, tiny_denoiser, monkeypatch, capsys):
    folder = snapshot(tmp_path / "snapshot", tiny_denoiser)
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", str(folder), "--steps", "3", *argv])
        code = 0
        try:
            runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "sample.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr()

    return run


def test_single_pngs_carry_what_makes_them_again(script, tmp_path):
    code, printed = script("--class", "a nine", "1", "--num-images", "2", "--seed", "5", "--format", "png")
    assert code == 0 and "images/s" in printed.out
    folder = tmp_path / "samples" / "class-9-1-seed5"
    assert sorted(file.name for file in folder.iterdir()) == [
        "class-1_seed-7.png", "class-1_seed-8.png", "class-9_seed-5.png", "class-9_seed-6.png"
    ]
    with Image.open(folder / "class-1_seed-8.png") as picture:
        made_by, pixels = json.loads(picture.text["d-emo"]), np.array(picture)
    assert (made_by["classes"], made_by["seed"], made_by["scheduler"], made_by["steps"]) == ([1], 8, "dpm++", 3)
    assert made_by["guidance_scale"] == 4 and made_by["weights"] == "ema" and pixels.shape == (64, 64, 3)
    assert script("--class", "1", "--num-images", "1", "--seed", "8", "--format", "png", "--output", "again")[0] == 0
    with Image.open(tmp_path / "again" / "class-1_seed-8.png") as picture:
        assert np.array_equal(np.array(picture), pixels)


def test_trajectories_and_interpolations_are_drawn(script, tmp_path):
    assert script("--class", "1", "2", "--num-images", "1", "--trajectory", "strip")[0] == 0
    with Image.open(tmp_path / "samples" / "trajectory-1-2-seed0.png") as strip:
        assert strip.size == (3 * 132 + 4, 2 * 150 + 4)
    assert script("--class", "1", "--num-images", "2", "--trajectory", "gif")[0] == 0
    with Image.open(tmp_path / "samples" / "trajectory-1-seed0.gif") as gif:
        assert gif.n_frames == 3 and json.loads(gif.info["comment"])["classes"] == [1]
    assert script("--interpolate", "1", "a nine", "--num-images", "3")[0] == 0
    with Image.open(tmp_path / "samples" / "interpolate-1-9-seed0.png") as row:
        assert row.size == (3 * 132 + 4, 22 + 150 + 4)  # the fractions of the second class stand on top
        assert json.loads(row.text["d-emo"])["interpolate"] == ["1", "a nine"]


def test_who_names_no_class_sees_some_and_how_to_choose(script, tmp_path):
    code, printed = script("--num-images", "1")
    lines = printed.out.splitlines()
    assert code == 0 and (tmp_path / "samples" / "class-1-3-6-8-seed0.png").exists()
    assert lines[2:4] == ["classes   1, 3, 6, 8", "          some of 10; choose by --class 1"]
    assert script("--class", "A Nine", "--num-images", "1")[1].out.splitlines()[2] == "classes   9: a nine"


def test_one_class_is_not_spoken_of(script, tmp_path, tiny_denoiser):
    denoiser = type(tiny_denoiser).from_config({**tiny_denoiser.config, "num_classes": 1})
    alone = snapshot(tmp_path / "alone", denoiser, class_names=["pets"])
    code, printed = script("--checkpoint", str(alone), "--num-images", "1", "--guidance-scale", "1")
    assert code == 0 and "classes" not in printed.out and (tmp_path / "samples" / "image-seed0.png").exists()


def test_a_sweep_of_guidance_keeps_the_noise_of_its_columns(script, tmp_path):
    same = ("--class", "1", "a nine", "--num-images", "2")
    code, printed = script(*same, "--guidance-scale", "1", "3")
    assert code == 0 and "guidance 1, 3" in printed.out
    assert script(*same, "--guidance-scale", "3", "--output", "three.png")[0] == 0
    rows = []
    for path in ("samples/guidance-1-9-seed0.png", "three.png"):
        with Image.open(tmp_path / path) as picture:
            scales, pixels = json.loads(picture.text["d-emo"])["guidance_scale"], np.array(picture)
        rows.append((scales, pixels[:-4].reshape(-1, 150, pixels.shape[1], 3)[:, 22:]))
    (scales, sweep), (scale, one) = rows
    assert scales == [1, 3] and scale == 3 and len(sweep) == 4
    assert np.array_equal(sweep[[1, 3]], one) and not np.array_equal(sweep[0], sweep[1])


def test_a_snapshot_of_nan_is_one_sentence(script, tmp_path, tiny_denoiser):
    torch.nn.init.constant_(tiny_denoiser.final_layer.linear.weight, float("nan"))
    broken = snapshot(tmp_path / "broken", tiny_denoiser)
    code, printed = script("--class", "1", "--checkpoint", str(broken))
    assert code == 2 and "NaN or infinite values" in printed.err and "Traceback" not in printed.err
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--class", "1", "--seed", "-1"), "--seed must be at least 0"),
        (("--class", "1", "--guidance-scale", "1", "-2"), "--guidance-scale must be at least 0, not -2"),
        (("--class", "1", "--guidance-scale", "1", "2", "--format", "png"), "several --guidance-scale make a grid"),
        (("--class", "10"), "class 10 is out of range"),
        (("--class", "1", "--scheduler", "euler"), "euler serves the flow objective"),
        (("--class", "1", "--guidance-interval", "0.5", "0.2"), "--guidance-interval"),
        (("--interpolate", "1"), "interpolate"),
        (("--interpolate", "1", "2", "--class", "3"), "no --class"),
        (("--class", "1", "--format", "png", "--trajectory", "gif"), "--format png"),
        (("--class", "1", "--guidance-channels", "4"), "guidance-channels"),
    ],
)
def test_wrong_flags_are_one_sentence(script, tmp_path, argv, words):
    code, printed = script(*argv)
    assert code == 2 and words in printed.err and "Traceback" not in printed.err
    assert not (tmp_path / "samples").exists()
