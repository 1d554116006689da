"""Several processes and accumulation only divide the global batch: the result is that of one process."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from test_resume import TINY, last_state, logged, same, train
from timm.layers import BatchNormAct2d
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from d_emo.cli import run_verb
from d_emo.config import TrainSettings, run_cli
from d_emo.ema import EMA
from d_emo.io.training_state import gather_training, restore_training
from d_emo.models import create_model
from d_emo.models.layers import SYNCED, synchronise_batch_norms
from d_emo.training.optimizer import make_optimizer
from d_emo.training.parallel import Updates, open_accelerator

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
LAYER_NORM = {**TINY["model_options"], "local_norm": "layer"}


def in_processes(count, work):
    """Run ``work(rank)`` in forked processes that accelerate and torch.distributed take for one CPU job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=port, ACCELERATE_USE_CPU="true", LOCAL_WORLD_SIZE=str(count))
            torch.set_num_threads(1)
            AcceleratorState._reset_state(True)
            PartialState._reset_state()
            code = 1
            try:
                work(rank)
                code = 0
            except BaseException as error:
                print(f"rank {rank}: {error!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def close(one, other):
    torch.testing.assert_close(one["ema"]["model"], other["ema"]["model"], rtol=1e-3, atol=2e-5)


def test_two_processes_and_accumulation_give_the_losses_of_one_process(tmp_path):
    options = {"model_options": LAYER_NORM, "max_steps": 6}
    train(tmp_path / "one", **options)
    assert in_processes(2, lambda rank: train(tmp_path / "two", **options)) == [0, 0]
    train(tmp_path / "parts", **options, micro_batch_size=1)
    one, two, parts = (logged(tmp_path / name) for name in ("one", "two", "parts"))
    assert len(one) == 6 and len(set(one.values())) == 6
    assert two == pytest.approx(one, rel=1e-4) and parts == pytest.approx(one, rel=1e-4)
    norms = [logged(tmp_path / name, "gradient_norm") for name in ("one", "two", "parts")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and norms[2] == pytest.approx(norms[0], rel=1e-3)
    close(last_state(tmp_path / "two", 6), last_state(tmp_path / "one", 6))


def test_two_processes_measure_the_averages_that_are_saved(tmp_path):
    options = {"learning_rate": 1e-2, "validate_every": 1, "validate_images": 8}
    assert in_processes(2, lambda rank: train(tmp_path / "whole", max_steps=8, **options)) == [0, 0]
    assert in_processes(2, lambda rank: train(tmp_path / "parts", max_steps=5, **options)) == [0, 0]
    assert in_processes(2, lambda rank: train(tmp_path / "parts", max_steps=8, **options)) == [0, 0]
    whole, parts = (logged(tmp_path / name, "validation_loss") for name in ("whole", "parts"))
    assert len(whole) == 8 and parts == whole


def test_synchronised_batch_norm_makes_two_processes_agree_with_one(tmp_path):
    options = {"learning_rate": 1e-2}  # the gates start at zero: it takes some steps until BatchNorm matters
    train(tmp_path / "one", **options)
    assert in_processes(2, lambda rank: train(tmp_path / "two", sync_batchnorm=True, **options)) == [0, 0]
    assert in_processes(2, lambda rank: train(tmp_path / "apart", **options)) == [0, 0]
    one, two, apart = (logged(tmp_path / name)[12] for name in ("one", "two", "apart"))
    assert abs(two - one) < 1e-4 * one < 1e-3 * one < abs(apart - one)
    norms = [name for name in last_state(tmp_path / "one")["model"] if "running" in name]
    one, two = ({name: last_state(tmp_path / run)["model"][name] for name in norms} for run in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-3)


def test_two_processes_resume_bitwise(tmp_path):
    options = {"max_steps": 8, "state_every": 3}
    assert in_processes(2, lambda rank: train(tmp_path / "whole", **options)) == [0, 0]

    def killed(rank):
        from d_emo.training import loop

        done = loop.Progress.step_done

        def die(self, step, figures):
            done(self, step, figures)
            if step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        loop.Progress.step_done = die
        train(tmp_path / "parts", **options)

    assert in_processes(2, killed) == [-signal.SIGKILL] * 2
    assert in_processes(2, lambda rank: train(tmp_path / "parts", **options)) == [0, 0]
    assert same(last_state(tmp_path / "parts", 8), last_state(tmp_path / "whole", 8))


def test_one_process_that_wants_to_stop_breaks_the_step_off_in_both(tmp_path):
    options = {"max_steps": 3, "state_every": 100, "micro_batch_size": 1}
    assert in_processes(2, lambda rank: train(tmp_path / "whole", **options)) == [0, 0]

    def stopped(rank):
        from d_emo.training.denoiser import DenoiserTask

        seen, plain = [], DenoiserTask.loss

        def loss(self, *args):
            seen.append(len(seen))
            if len(seen) == 3 and rank == 1:  # of two micro-batches a step
                signal.raise_signal(signal.SIGINT)
            return plain(self, *args)

        DenoiserTask.loss = loss
        with suppress(SystemExit):
            train(tmp_path / "parts", **options)
        assert len(seen) == 3

    assert in_processes(2, stopped) == [0, 0]
    assert [state.name for state in (tmp_path / "parts" / "states").iterdir()] == ["step-1"]
    assert in_processes(2, lambda rank: train(tmp_path / "parts", **options)) == [0, 0]
    assert same(last_state(tmp_path / "parts", 3), last_state(tmp_path / "whole", 3))


def test_validation_is_the_same_for_any_number_of_processes(tmp_path):
    options = {"max_steps": 2, "validate_every": 2, "validate_images": 11, "model_options": LAYER_NORM}
    train(tmp_path / "one", **options)
    assert in_processes(2, lambda rank: train(tmp_path / "two", **options)) == [0, 0]
    one, two = (logged(tmp_path / name, "validation_loss") for name in ("one", "two"))
    assert list(one) == [2] and two == pytest.approx(one, rel=1e-4)


def norm_and_activation(dim):
    return BatchNormAct2d(dim, act_layer=nn.SiLU)


@pytest.mark.parametrize("norm", [
    nn.BatchNorm2d, norm_and_activation, nn.BatchNorm1d, partial(nn.BatchNorm2d, affine=False, momentum=None),
    partial(nn.BatchNorm2d, track_running_stats=False),
])  # fmt: skip
def test_synchronised_batch_norm_equals_the_plain_one_on_the_whole_batch(tmp_path, norm):
    """Outputs, gradients and running statistics; the loss of a process is the mean over its share."""
    torch.manual_seed(0)
    shape = (6, 5, 3, 4) if norm is not nn.BatchNorm1d else (6, 5, 12)
    images, weights = torch.randn(shape) * 3 + 1, torch.randn(shape)
    plain = nn.Sequential(norm(5))
    for name, value in plain.state_dict().items():
        nn.init.normal_(value) if name.endswith("weight") else value.add_(3)  # as if it had seen batches
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    inputs = images.clone().requires_grad_()
    output = plain(inputs)
    (output * weights).mean().backward()

    def work(rank):
        distributed.init_process_group("gloo")
        synced = nn.Sequential(norm(5))
        synced.load_state_dict(start)
        synchronise_batch_norms(synced)
        assert isinstance(synced[0], tuple(SYNCED.values()))
        share = images[3 * rank : 3 * rank + 3].clone().requires_grad_()
        mine = synced(share)
        (mine * weights[3 * rank : 3 * rank + 3]).mean().backward()
        found = {"output": mine.detach(), "grad": share.grad / 2, "state": synced.state_dict()}
        found["weights"] = {name: value.grad / 2 for name, value in synced.named_parameters()}
        torch.save(found, tmp_path / str(rank))

    assert in_processes(2, work) == [0, 0]
    shares = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    torch.testing.assert_close(torch.cat([share["output"] for share in shares]), output.detach())
    torch.testing.assert_close(torch.cat([share["grad"] for share in shares]), inputs.grad)
    for name, value in plain.named_parameters():
        torch.testing.assert_close(sum(share["weights"][name] for share in shares), value.grad)
    for share in shares:
        torch.testing.assert_close(share["state"], plain.state_dict())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sharded_models_have_whole_states_and_averages(tmp_path, name):
    """FSDP2 on two CPU processes: what a state holds, what it restores, and the average, all equal one process's."""
    settings = TrainSettings(optimizer=name, learning_rate=1e-3, weight_decay=0.01)

    def build():
        torch.manual_seed(0)
        model = create_model("D-EMOv2-Ti-2", depth=2, hidden_size=48, sample_size=4, num_classes=3, local_norm="layer")
        nn.init.normal_(model.final_layer.linear.weight)
        return model

    def step(model, optimizer, ema, seed):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(4, 4, 4, 4, generator=generator), torch.tensor([0, 1, 2, 3])
        model(x, torch.tensor([1, 10, 100, 999]), y).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)

    def run(model, steps, state=None, average=None):
        ema = EMA(build(), 0.9)
        optimizer = make_optimizer(model, settings, {}, torch.device("cpu"))
        if state is not None:
            restore_training(model, optimizer, state)
            ema.load_state_dict(average)
        for seed in steps:
            step(model, optimizer, ema, seed)
        return gather_training(model, optimizer), ema.state_dict()

    def work(rank):
        distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        results = []
        for start in (None, results):
            model = build()
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            results.append(run(model, (0, 1) if start is None else (2, 3), *(results[0] if start else ())))
        if rank == 0:
            torch.save(results[1], tmp_path / "sharded")

    assert in_processes(2, work) == [0, 0]
    whole = run(build(), range(4))
    sharded = torch.load(tmp_path / "sharded")
    precisions = [[group.pop("precision", None) for group in each[0]["optimizer"]["param_groups"]]
                  for each in (whole, sharded)]  # fmt: skip
    assert precisions[0] == precisions[1] and any(precisions[0]) == (name == "muon")
    for one, other in zip(whole, sharded, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=2e-5)


def test_bf16_in_a_sharded_model_is_autocast_over_float32(tmp_path, monkeypatch):
    """Output and gradients of FSDP2 on two CPU processes equal those of one, to the bit, and timesteps stay exact."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    settings = TrainSettings(tracker="none", output_dir=str(tmp_path))
    accelerator = open_accelerator(settings, accumulation=1, precision="bf16")
    assert accelerator.mixed_precision == "no"  # and without a GPU accelerate shards nothing, so the test does
    images, weights = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    timesteps, labels, seen = torch.tensor([1.3, 100.7, 555.5, 999.1]), torch.tensor([0, 1, 2, 3]), []

    def build():
        torch.manual_seed(0)
        model = create_model("D-EMOv2-Ti-2", depth=2, hidden_size=48, sample_size=4, num_classes=3)
        nn.init.normal_(model.final_layer.linear.weight)
        return model

    def run(model):
        model.t_embedder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        output = model(images, timesteps, labels).sample
        (output.float()[:, :4] * weights).mean().backward()
        return output, {name: parameter.grad for name, parameter in model.named_parameters()}

    model, plain = build(), build()
    Updates(accelerator, model, torch.optim.AdamW(model.parameters()), settings, "bf16")

    def work(rank):
        distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        output, gradients = run(model)
        plain.forward = torch.autocast("cpu", torch.bfloat16)(plain.forward)
        expected, wholes = run(plain)
        assert output.dtype == torch.bfloat16 and torch.equal(output, expected) and torch.equal(seen[0], timesteps)
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32 and torch.equal(gradient.full_tensor(), wholes[name]), name

    assert in_processes(2, work) == [0, 0]


def test_a_process_whose_fellow_is_killed_ends_with_one_sentence(tmp_path):
    def killed(rank):
        from d_emo.training import loop

        done = loop.Progress.step_done

        def die(self, step, figures):
            done(self, step, figures)
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        loop.Progress.step_done = die
        with (tmp_path / f"{rank}.txt").open("w") as file, redirect_stderr(file):
            try:
                run_cli(lambda: train(tmp_path / "run", max_steps=8, tracker="none"))
            except SystemExit as error:
                file.flush()
                os._exit(error.code)

    assert in_processes(2, killed) == [1, -signal.SIGKILL]
    said = (tmp_path / "0.txt").read_text()
    assert "error: another process of this run ended" in said.splitlines()[-1] and "Traceback" not in said


def test_two_processes_share_an_encoding_and_a_measurement_on_cpus(tmp_path, fuzz_world):
    data = ["--dataset", "digits", "--image-size", "8", "--vae", "pixels", "--shard-size", "600"]
    drawn = ["--checkpoint", f"{fuzz_world}/denoiser", "--scheduler", "dpm++", "--steps", "1", "--num-images", "300"]
    compared = ["--reference", f"{fuzz_world}/reference", "--features", f"emov2:{fuzz_world}/classifier"]

    def work(rank, verb, output):
        words = {"encode": [*data, "--output", f"{output}/latents"],
                 "fid": [*drawn, *compared, "--work-dir", f"{output}/work", "--output", f"{output}/fid.json"]}
        with (tmp_path / f"{verb}-{rank}.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            run_verb(verb, words[verb])

    for verb, results in (("encode", ["latents/index.json", "latents/shard-00001.safetensors"]), ("fid", ["fid.json"])):
        for folder in (tmp_path / "one", tmp_path / "two"):
            folder.mkdir(exist_ok=True)
        work(0, verb, tmp_path / "one")
        assert in_processes(2, lambda rank, verb=verb: work(rank, verb, tmp_path / "two")) == [0, 0]
        assert "2 processes shared the work" in (tmp_path / f"{verb}-0.txt").read_text()
        for name in results:
            one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
            assert one == two if verb == "encode" else json.loads(one)["fid"] == json.loads(two)["fid"]


def test_torchrun_starts_two_processes_that_share_the_work(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({**TINY, "max_steps": 4, "model_options": LAYER_NORM,
                                      "output_dir": str(tmp_path / "two")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "scripts" / "train_dit.py"), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained parameters") == 1  # one process speaks
    assert "2 processes share the work" in done.stdout
    train(tmp_path / "one", model_options=LAYER_NORM, max_steps=4)
    close(last_state(tmp_path / "two", 4), last_state(tmp_path / "one", 4))
