"""Every file in configs/ loads, fits every model it is meant for, and trains a step; accelerate reads its own."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d_emo.config import (
    ClassifierSettings,
    DetectorSettings,
    DistillSettings,
    TrainSettings,
    VAESettings,
    parse_settings,
)
from d_emo.ema import EMA
from d_emo.io.snapshot import load_denoiser
from d_emo.io.training_state import load_state
from d_emo.models import create_model, list_models
from d_emo.models.registry import model_kind
from d_emo.objective import FlowObjective
from d_emo.tables import AUTOENCODERS, CODECS, denoisers
from d_emo.training import fit
from d_emo.training.alignment import LatentTarget
from d_emo.training.denoiser import DenoiserTask

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = {
    str(file.relative_to(CONFIGS).with_suffix("")): yaml.safe_load(file.read_text())
    for file in sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("classifier/*.yaml")])
}
DENOISER_RUNS = [name for name, values in RUNS.items() if values["model"] in denoisers()]
LAUNCHERS = sorted(file.stem for file in (CONFIGS / "accelerate").glob("*.yaml"))


def load(name, *arguments):
    kinds = {"classifier": ClassifierSettings, "denoiser": TrainSettings, "detector": DetectorSettings}
    model = RUNS[name]["model"]
    kind = VAESettings if model in AUTOENCODERS else kinds[model_kind(model)]
    return parse_settings(kind, "", ["--config", str(CONFIGS / f"{name}.yaml"), *arguments])


def build(settings, **options):
    """The model of some settings, of one block where it is a denoiser's, without weights."""
    own = settings.model_options or {}
    if isinstance(settings, TrainSettings):
        options = {"sample_size": settings.image_size // 8, "num_classes": 1000, **own}
        options |= {} if settings.model.startswith("U-") else {"depth": 1}
    elif isinstance(settings, DetectorSettings):
        options = {"num_classes": 10, "image_size": settings.image_size, **own}
    else:
        options = {"num_classes": 1000, "img_size": settings.image_size, **own}
    with torch.device("meta"):
        return create_model(settings.model, **options)


def test_the_configs_that_the_readme_names_are_there():
    named = {"imagenet256", "imagenet256-modern", "imagenet512", "folder", "demo", "demo_classifier", "shapes64_ti"}
    assert named <= RUNS.keys()
    assert LAUNCHERS == ["ddp", "fsdp", "multi_node"]


@pytest.mark.parametrize(("name", "start", "classifier"), [
    ("mnist32", "mnist32_pixels", "mnist32_classifier"), ("shapes128", "shapes128_ti_2", "shapes128_latent_classifier"),
    ("shapes128_64", "shapes128_ti_3", "shapes128_latent_judge"),
])  # fmt: skip
def test_the_configs_of_few_steps_go_on_from_the_runs_of_their_neighbours(name, start, classifier):
    settings = DistillSettings(**yaml.safe_load((CONFIGS / "distill" / f"{name}.yaml").read_text()))
    assert settings.init_from == RUNS[start]["output_dir"]
    assert settings.fd_features == f"emov2:{RUNS[classifier]['output_dir']}"
    assert settings.latents == RUNS[classifier].get("latents")


def test_that_for_a_folder_needs_no_network():
    assert RUNS["folder"]["vae"] in CODECS


@pytest.mark.parametrize("name", RUNS)
def test_every_config_loads_and_says_what_it_changes(name):
    settings = load(name)
    assert {key: getattr(settings, key) for key in RUNS[name]} == RUNS[name]
    if not isinstance(settings, VAESettings):  # tests/test_vae_training.py builds it
        build(settings)


@pytest.mark.parametrize("name", ["imagenet256", "imagenet256-modern", "imagenet512"])
@pytest.mark.parametrize("model", denoisers())
def test_the_imagenet_configs_serve_every_denoiser(name, model):
    settings = load(name, "--model", model, "--data-dir", "train")
    denoiser = build(settings)
    side = settings.image_size // 8
    assert denoiser.sample_size == (side, side) and denoiser.config.num_classes == 1000
    assert settings.batch_size % 64 == 0, "shared out over up to 64 GPUs"
    assert model in settings.output_dir, "models must not share a run folder"


def test_all_families_are_in_that_matrix():
    assert {name.split("-")[0] for name in denoisers()} >= {"D", "DiT"} and set(denoisers()) < set(list_models())


@pytest.fixture
def pictures(tmp_path):
    for label, colour in enumerate(("red", "green", "blue")):
        (tmp_path / "pictures" / colour).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8 + number, 9 - 2 * number), (80 * label, 80 * number, 90)).save(
                tmp_path / "pictures" / colour / f"{number}.png"
            )
    return tmp_path / "pictures"


def tiny(name, pictures, tmp_path, *arguments):
    """The settings of a config, with a network and data for a test."""
    return load(
        name, "--data-dir", str(pictures), "--output-dir", str(tmp_path / "run"), "--image-size", "8",
        "--vae", "pixels", "--model-options", "{depth: 1, hidden_size: 48, num_heads: 3}", "--batch-size", "4",
        "--micro-batch-size", "2", "--num-workers", "0", *arguments,
    )


@pytest.mark.parametrize("name", DENOISER_RUNS)
def test_every_denoiser_config_trains_a_step_on_a_folder(name, pictures, tmp_path):
    settings = tiny(name, pictures, tmp_path, "--max-steps", "1", "--compile", "false")
    snapshot = load_denoiser(fit(DenoiserTask(settings), settings))
    assert snapshot.class_names == ["blue", "green", "red"] and snapshot.meta["step"] == 1


def test_every_switch_of_the_modern_recipe_is_on_in_what_runs(pictures, tmp_path, monkeypatch):
    """Not in its settings: in the objective, the losses, the optimizer, the average and the network that trains."""
    real = load("imagenet256-modern", "--latents", str(tmp_path))
    assert real.max_steps * real.batch_size / 1_281_167 == pytest.approx(80, abs=0.1)
    assert all(real.batch_size / gpus % real.micro_batch_size == 0 for gpus in (1, 2, 4, 8))
    settings = tiny("imagenet256-modern", pictures, tmp_path, "--max-steps", "2", "--log-every", "1")
    compiled, precisions = [], set()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    task = DenoiserTask(settings)
    assert type(task.objective) is FlowObjective and task.objective.contrastive == 0.05
    assert task.objective.logit_normal == (0.0, 1.0)
    assert task.objective.time_shift == task.scheduler.config.shift == (3 * 8 * 8 / 4096) ** 0.5
    assert type(task.alignment.target) is LatentTarget and task.alignment.weight == 0.5
    task.model.blocks[0].operator.proj.register_forward_hook(lambda layer, x, output: precisions.add(output.dtype))
    fit(task, settings)
    assert compiled == [task.model] and precisions == {torch.bfloat16}
    state = load_state(tmp_path / "run" / "states" / "step-2")
    assert state["ema"]["step"] == 2 and EMA(task.model, settings.ema_decay, warmup=settings.ema_warmup).decay == 0.9999
    of_muon = [each for each in state["optimizer"]["state"].values() if "momentum" in each]
    assert len(of_muon) == len(task.model.block_matrices()) == 3
    events = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
    logged = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    assert logged["ema_decay"] == pytest.approx(3 / 12) and logged["learning_rate"] == pytest.approx(2e-4 * 2 / 1250)
    terms = logged["mse"] - 0.05 * logged["contrast"] + 0.5 * logged["align"]
    assert logged["contrast"] > 0 > logged["align"] and logged["loss"] == pytest.approx(terms, rel=1e-4)


# ---- accelerate's own files ------------------------------------------------------------------------------------------


def launch(name, *flags):
    """The arguments that ``accelerate launch --config_file`` ends up with."""
    parser = launch_command_parser()
    arguments = parser.parse_args(
        ["--config_file", str(CONFIGS / "accelerate" / f"{name}.yaml"), *flags, "scripts/train_dit.py"]
    )
    return _validate_launch_command(arguments)[0]


@pytest.fixture
def environment(monkeypatch):
    """What the launcher would give its processes, put into effect."""

    def enter(variables):
        for key, value in variables.items():
            if key.startswith(("FSDP_", "ACCELERATE_")) and os.environ.get(key) != value:
                monkeypatch.setenv(key, value)

    return enter


@pytest.mark.parametrize("name", LAUNCHERS)
def test_accelerate_reads_every_launcher_file(name):
    config = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    kinds = {"fsdp": DistributedType.FSDP}
    assert config.distributed_type == kinds.get(name, DistributedType.MULTI_GPU)
    arguments = launch(name, "--num_processes", "4")
    assert arguments.num_processes == 4 and arguments.mixed_precision == "bf16"


def test_two_machines_share_the_processes():
    arguments = launch("multi_node", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")


@pytest.mark.parametrize(("model", "block"), [("D-EMOv2-S-2", "AdaLNMobileBlock"), ("DiT-S-2", "DiTBlock")])
def test_fsdp_makes_every_block_a_unit(environment, model, block):
    variables = prepare_multi_gpu_env(launch("fsdp"))
    assert variables["ACCELERATE_USE_FSDP"] == "true"
    environment(variables)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and not plugin.cpu_ram_efficient_loading
    with torch.device("meta"):
        plugin.set_auto_wrap_policy(create_model(model, depth=2))
    assert {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]} == {block}
