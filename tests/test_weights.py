"""Weights are taken whole or refused, whoever reads them; VAEs are applied as their configs say."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import timm
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from d_emo import DEMOPipeline
from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.io.classifier import open_classifier
from d_emo.io.snapshot import load_classifier, load_denoiser, save_classifier, save_denoiser
from d_emo.latents import LatentDataset, VAECodec, codec, encode, load_codec
from d_emo.models import Denoiser, create_model
from d_emo.models.convert import write_timm_folder
from d_emo.sampling import Sampler
from d_emo.tables import OBJECTIVES, load
from d_emo.training.denoiser import DenoiserTask
from d_emo.training.teacher import load_teacher
from d_emo.weights import RENAMED, STEM


def tiny_vae(levels: int = 2, **config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(4,) * levels, norm_num_groups=2, mid_block_add_attention=False, **config,
    ).eval()  # fmt: skip


def snapshot(folder: Path, denoiser: torch.nn.Module, codec: str, image_size: int = 64) -> Path:
    meta = {"step": 5, "weights": "ema", "codec": codec, "image_size": image_size, "class_names": list("0123456789")}
    schedule = load(OBJECTIVES["eps"].loss)(null_class=10).noise_schedule()
    save_denoiser(folder, denoiser, scheduler=schedule, meta=meta, settings=TrainSettings())
    return folder


def rewrite(file: Path, change) -> str:
    """Change the tensors of a file; returns the name of the first one."""
    tensors = load_file(file)
    first = sorted(tensors)[0]
    save_file(change(tensors, first), file)
    return first


DAMAGES = {
    "missing: {}": lambda tensors, first: {name: x for name, x in tensors.items() if name != first},
    "unexpected: odd.weight": lambda tensors, first: {**tensors, "odd.weight": torch.zeros(2)},
    "wrong shape: {} ": lambda tensors, first: {**tensors, first: torch.zeros(7, 5)},
    "begin with 'module.'": lambda tensors, first: {f"module.{name}": x for name, x in tensors.items()},
    "NaN or infinite values, in {}": lambda tensors, first: {**tensors, first: tensors[first] * float("nan")},
}


@pytest.fixture
def artefacts(tmp_path, tiny_denoiser):
    """One of each artefact: how it is opened, and the file with its weights."""
    vae, denoiser, classifier = tmp_path / "vae", tmp_path / "denoiser", tmp_path / "classifier"
    tiny_vae().save_pretrained(vae)
    snapshot(denoiser, tiny_denoiser, "d-emo-f8")
    model = create_model("emov2_1m", num_classes=3, depths=[1, 1, 1, 1])
    meta = {"step": 1, "weights": "ema", "image_size": 32, "class_names": ["a", "b", "c"]}
    save_classifier(classifier, model, meta=meta, settings=TrainSettings())
    write_timm_folder(model, tmp_path / "timm")
    DEMOPipeline.from_snapshot(denoiser).save_pretrained(tmp_path / "pipeline")
    weights = f"{STEM}.safetensors"
    return [
        (lambda: load_codec(str(vae)), vae / weights),
        (lambda: load_denoiser(denoiser), denoiser / "transformer" / weights),
        (lambda: Denoiser.from_pretrained(denoiser / "transformer"), denoiser / "transformer" / weights),
        (lambda: load_classifier(classifier), classifier / "model.safetensors"),
        (lambda: open_classifier(str(tmp_path / "timm")), tmp_path / "timm" / "model.safetensors"),
        (lambda: DEMOPipeline.from_pretrained(tmp_path / "pipeline"), tmp_path / "pipeline" / "vae" / weights),
        (lambda: DEMOPipeline.from_pretrained(tmp_path / "pipeline"), tmp_path / "pipeline" / "transformer" / weights),
    ]


def test_every_artefact_is_whole_or_refused_by_file_and_tensor(artefacts):
    for number, (open_it, file) in enumerate(artefacts):
        whole = file.read_bytes()
        for words, change in DAMAGES.items():
            ours = number in (0, 1, 3)  # others are read by timm and diffusers, and refused in their words or fewer
            if not ours and (words.startswith(("begin", "wrong")) or (number == 5 and words.startswith("NaN"))):
                continue
            first = rewrite(file, change)
            with pytest.raises(InputError) as refused:
                open_it()
            message = str(refused.value)
            assert str(file.parent) in message and "\n" not in message, (number, words)
            wanted = words.format(first) if number not in (2, 4, 6) or "NaN" in words else first
            assert (wanted if "odd" not in words else "odd.weight") in message, (number, words, message)
            file.write_bytes(whole)
        file.write_bytes(whole[:200])
        with pytest.raises((InputError, OSError)):
            open_it()
        file.write_bytes(whole)
        open_it()


@pytest.mark.parametrize("kind", ["variant", "shards", "shards of a variant"])
def test_variants_and_shards_are_read_and_a_variant_is_named(tmp_path, capfd, kind):
    vae, options = tiny_vae(), {"max_shard_size": "5KB"} if "shards" in kind else {}
    variant = {"variant": "fp16"} if "variant" in kind else {}
    vae.save_pretrained(tmp_path, **options, **variant)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if kind == "variant" else 4)
    opened = load_codec(str(tmp_path)).vae
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in opened.state_dict().items())
    assert ("weights as fp16 only; taking these" in capfd.readouterr().err) == bool(variant)
    if kind == "shards":
        lost = sorted(tmp_path.glob("*.safetensors"))[2]
        lost.unlink()
        with pytest.raises(InputError, match=f"{lost.name} is missing"):
            load_codec(str(tmp_path))


def test_what_is_no_vae_to_be_read_is_named(tmp_path):
    def refused(words):
        with pytest.raises(InputError, match=words):
            load_codec(str(tmp_path))

    AutoencoderTiny().save_pretrained(tmp_path)
    refused("holds AutoencoderTiny, not AutoencoderKL or")
    tiny_vae().save_pretrained(tmp_path)
    whole = tmp_path / f"{STEM}.safetensors"
    shutil.copy(whole, tmp_path / f"{STEM}.fp16.safetensors")
    load_codec(str(tmp_path))
    whole.rename(tmp_path / f"{STEM}.bf16.safetensors")
    refused("there is the variants bf16, fp16; keep one")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    refused(f"must hold {STEM}.safetensors, but there is none")
    (tmp_path / f"{STEM}.bin").write_bytes(b"x")
    refused(f"but there is {STEM}.bin")
    tiny_vae(in_channels=1, out_channels=1).save_pretrained(tmp_path)
    refused("takes images of 1 channels and gives 1")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "block_out_channels": "x"}))
    refused("config.json makes no AutoencoderKL")


def test_the_names_that_attention_had_in_old_vaes_are_read(tmp_path):
    """Those of stabilityai/sd-vae-ft-ema and -mse."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(tmp_path)
    names = {new: old for old, new in RENAMED.items()}
    rewrite(tmp_path / f"{STEM}.safetensors", lambda tensors, first: {
        re.sub("|".join(map(re.escape, names)), lambda match: names[match[0]], name): x for name, x in tensors.items()
    })  # fmt: skip
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in load_file(tmp_path / f"{STEM}.safetensors")
    opened = load_codec(str(tmp_path)).vae.state_dict()
    assert all(torch.equal(value, opened[name]) for name, value in vae.state_dict().items())


def test_of_a_repository_only_the_vae_is_fetched(tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    repository = ["config.json", f"{STEM}.safetensors", "unet/config.json", f"unet/{STEM}.safetensors",
                  "vae/config.json", f"vae/{STEM}.safetensors.index.fp16.json", f"vae/{STEM}.bin",
                  "sdxl_vae.safetensors"]  # fmt: skip
    asked = []

    def fetch(name, allow_patterns, local_files_only):
        assert not local_files_only
        asked.append((name, list(filter_repo_objects(repository, allow_patterns=allow_patterns))))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda api, name, timeout: name)
    tiny_vae().save_pretrained(tmp_path / "vae")
    codec = load_codec("nobody/pipeline")
    assert codec.name == "nobody/pipeline" and asked == [("nobody/pipeline", [
        "config.json", f"{STEM}.safetensors", "vae/config.json", f"vae/{STEM}.safetensors.index.fp16.json"
    ])]  # fmt: skip


@pytest.mark.parametrize("silent", [False, True])
def test_a_hub_that_cannot_be_reached_is_asked_once_and_quietly(tmp_path, monkeypatch, capfd, caplog, silent):
    """Over a port that refuses, and one that takes the question and never answers."""
    monkeypatch.setattr(codec, "HUB_SECONDS", 2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if silent:
            port.listen()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port.getsockname()[1]}")
        with pytest.raises(InputError, match="could not be fetched.*`vae` FOLDER; or use `vae` d-emo-f8 or `vae` pixe"):
            load_codec("nobody/pipeline")
        if silent:
            port.accept()[0].close()
            port.settimeout(0.1)
            with pytest.raises(TimeoutError):
                port.accept()
    assert capfd.readouterr() == ("", "") and not caplog.records


# ---- VAEs ------------------------------------------------------------------------------------------------------------

VAES = {
    "shift": (2, {"scaling_factor": 0.36, "shift_factor": 0.12}, 0.36, 0.12),
    "mean and deviation": (2, {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0],
                               "latents_std": [1.0, 2.0, 4.0, 0.5]}, [0.5, 0.25, 0.125, 1.0], [1.0, 2.0, 3.0, 4.0]),
    "16 channels": (3, {"latent_channels": 16, "scaling_factor": 1.5, "shift_factor": 0.06, "use_quant_conv": False,
                        "use_post_quant_conv": False}, 1.5, 0.06),
    "a sixteenth": (5, {"latent_channels": 8}, 0.18215, 0.0),
    "a thirty-second": (6, {"latent_channels": 32}, 0.18215, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", VAES)
def test_a_vae_is_applied_alike_in_latents_training_sampling_and_pipeline(tmp_path, name):
    levels, config, scaling, shift = VAES[name]
    vae, folder, side = tiny_vae(levels, **config), str(tmp_path / "vae"), 2 ** (levels - 1)
    size = max(8, 2 * side)
    vae.save_pretrained(folder)
    codec, channels = load_codec(folder), config.get("latent_channels", 4)
    assert (codec.downsample, codec.channels, codec.scaling, codec.shift) == (side, channels, scaling, shift)
    images = torch.rand(2, 3, size, size) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        by_channel = [torch.tensor(each).reshape(-1, 1, 1) for each in (scaling, shift)]
        mean, std = codec.moments(images).chunk(2, dim=1)
        torch.testing.assert_close(mean, (posterior.mean - by_channel[1]) * by_channel[0])
        torch.testing.assert_close(std, posterior.std * by_channel[0])
        decoded = vae.decode(posterior.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(mean), decoded, rtol=1e-4, atol=1e-5)

    settings = {"model": "D-EMOv2-Ti-1", "model_options": {"depth": 1, "hidden_size": 16, "num_heads": 1},
                "dataset": "digits", "image_size": size, "output_dir": str(tmp_path / "run")}  # fmt: skip
    task = DenoiserTask(TrainSettings(**settings, vae=folder))
    assert task.model.latent_shape == (channels, size // side, size // side)
    encode(task.images, codec, tmp_path / "latents", device=torch.device("cpu"), dtype="float32", batch_size=500)
    stored = LatentDataset(tmp_path / "latents")
    assert (stored.index["scaling"], stored.index["shift"]) == (scaling, shift)
    torch.testing.assert_close(stored[0][0], codec.moments(task.images[0][0][None])[0], rtol=1e-4, atol=1e-5)
    DenoiserTask(TrainSettings(**{**settings, "latents": str(tmp_path / "latents")}))
    other = VAECodec(tiny_vae(levels, **{**config, "scaling_factor": 0.9}), folder)
    with pytest.raises(InputError, match="were made with scaling"):
        stored.check(other, size)

    opened = load_denoiser(snapshot(tmp_path / "snapshot", task.model.eval(), folder, size))
    pipe = DEMOPipeline.from_snapshot(opened)
    pipe.save_pretrained(tmp_path / "pipe", variant="fp16")
    pipe = DEMOPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe([3], 1.0, 2, torch.Generator().manual_seed(5), output_type="pt").images
    sampled = torch.cat(list(Sampler.open(opened, steps=2, guidance=1.0).images([3], [5])))
    torch.testing.assert_close(drawn * 255, sampled.float(), rtol=0, atol=0.6)
    assert sampled.shape == (1, 3, size, size)


def test_a_codec_of_other_latents_is_refused_before_anything_is_drawn(tmp_path, tiny_denoiser):
    tiny_vae(4, latent_channels=16).save_pretrained(tmp_path / "vae")
    opened = load_denoiser(snapshot(tmp_path / "snapshot", tiny_denoiser, str(tmp_path / "vae")))
    for open_it in (Sampler.open, DEMOPipeline.from_snapshot):
        with pytest.raises(InputError, match="latents of 16 channels, the denoiser takes 4"):
            open_it(opened)
    with pytest.raises(InputError, match="takes images of 1 channels"):
        DEMOPipeline(opened.model, None, tiny_vae(4, in_channels=1, out_channels=1))
    (tmp_path / "vae.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is a file; .*from_single_file"):
        load_codec(str(tmp_path / "vae.safetensors"))


@pytest.mark.parametrize("config", [
    {"latents_mean": [0.0] * 4}, {"latents_std": [1.0] * 4}, {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3},
    {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, {"scaling_factor": 0.0},
    {"scaling_factor": None}, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1},
    {"shift_factor": float("nan")},
])  # fmt: skip
def test_factors_that_mean_nothing_are_refused(config):
    with pytest.raises(InputError, match=r"the VAE v has .*(config\.json must|numbers are needed)"):
        VAECodec(tiny_vae(**config), "v")


def test_sizes_that_the_steps_of_a_vae_do_not_divide_are_refused_before_encoding(tmp_path):
    from d_emo.data import Digits

    with pytest.raises(InputError, match="`image_size` 24 is not a multiple of 16, which the codec v needs"):
        encode(Digits(24), VAECodec(tiny_vae(5), "v"), tmp_path / "latents", device=torch.device("cpu"))
    assert not (tmp_path / "latents").exists()


# ---- classifiers of timm, teachers -----------------------------------------------------------------------------------


def test_another_number_of_classes_is_had_as_diffusers_users_ask_for_it(tmp_path, tiny_denoiser):
    tiny_denoiser.save_pretrained(tmp_path)
    options = {"num_classes": 2, "ignore_mismatched_sizes": True}
    model = type(tiny_denoiser).from_pretrained(tmp_path, **options)
    saved, table = tiny_denoiser.state_dict(), "y_embedder.embedding_table.weight"
    assert 0.005 < model.state_dict()[table].std() < 0.05  # N(0, 0.02), not what the memory held
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items() if name != table)
    with pytest.raises(ValueError, match=table):
        type(tiny_denoiser).from_pretrained(tmp_path, **{**options, "ignore_mismatched_sizes": False})


def test_a_head_of_random_weights_is_refused(tmp_path):
    write_timm_folder(create_model("emov2_1m", num_classes=3, depths=[1, 1, 1, 1]), tmp_path / "timm")
    file = tmp_path / "timm" / "config.json"
    config = json.loads(file.read_text())
    for changed in ({"model_args": {**config["model_args"], "num_classes": 4}},
                    {"pretrained_cfg": {**config["pretrained_cfg"], "label_names": ["a"]}}):  # fmt: skip
        file.write_text(json.dumps({**config, **changed}))
        with pytest.raises(InputError, match="gives several numbers of classes"):
            open_classifier(str(tmp_path / "timm"))


def test_a_teacher_of_nan_or_with_too_few_tensors_is_refused(tmp_path):
    network = timm.create_model("resnet18", num_classes=2)
    weights = network.state_dict()
    first = "conv1.weight"
    for words, change in (
        (f"teacher.pth holds NaN or infinite values, in model.{first}", {**weights, first: weights[first] * torch.nan}),
        ("teacher.pth .*Missing key", {name: value for name, value in weights.items() if name != first}),
    ):
        torch.save(change, tmp_path / "teacher.pth")
        with pytest.raises(InputError, match=words):
            load_teacher("resnet18", str(tmp_path / "teacher.pth"), ["ant", "bee"])
