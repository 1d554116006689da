import json
import time

import pytest
import torch

from d_emo.cli import run_verb
from d_emo.config import BENCHMARKS, ClassifierBenchmarkSettings, DenoiserBenchmarkSettings, parse_settings
from d_emo.errors import InputError
from d_emo.lab.benchmark import kernels, run_benchmark, transcribe, write_report
from d_emo.lab.benchmark.profile import operator_times, profile_table
from d_emo.lab.benchmark.report import Result, plot
from d_emo.lab.benchmark.timing import Case, measure, saved_bytes
from d_emo.models import create_model


def open_gates(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "final_layer" in name or "layer_scale" in name:
                parameter.normal_(0, 0.3)
    return model


def tiny_networks():
    demo = create_model("D-EMOv2-Ti-2", depth=2, hidden_size=24, num_heads=2, sample_size=8, window_size=2)
    emo = create_model(
        "emov2_1m", depths=(1, 1, 2, 2), dims=(8, 8, 16, 16), head_dims=(8, 8, 8, 8), num_classes=5, drop_path_rate=0.0
    )
    latents = torch.randn(2, 4, 8, 8).double()
    yield demo, {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 7])}, latents
    yield emo, {}, torch.randn(2, 3, 100, 72).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_the_plain_transcription_is_the_same_function_with_the_same_gradients(which, training):
    torch.manual_seed(0)
    model, options, x = list(tiny_networks())[which]
    model = open_gates(model.double()).train(training)
    plain = transcribe(model).train(training)
    ours = model(x, **options)
    ours = ours if isinstance(ours, torch.Tensor) else ours.sample
    theirs = plain(x, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for output in (ours, theirs):
        output.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), plain.network.parameters(), strict=True):
        assert p.grad.abs().max() > 0 or name == "y_embedder.embedding_table.weight"
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-9, msg=name)
    for (name, p), q in zip(model.named_buffers(), plain.network.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_cases_run_in_turns_after_a_round_to_warm_up():
    order = []
    cases = [Case("g", name, lambda name=name: order.append(name)) for name in "ab"]
    measure(cases, rounds=2, device=torch.device("cpu"))
    assert order == list("ababab") and [len(case.seconds) for case in cases] == [2, 2]
    cases[0].seconds = [3.0, 1.0, 2.0]
    assert cases[0].median == 2.0 and cases[0].spread == (1.5, 2.5)


def test_saved_memory_counts_each_tensor_once_and_no_parameters():
    weight = torch.randn(3, 3, requires_grad=True)
    x = torch.randn(100, 3, requires_grad=True)
    y = []
    assert saved_bytes(lambda: y.append((x @ weight).sum()), [weight]) == 100 * 3 * 4
    assert saved_bytes(lambda: y.append((x @ weight).sum() + (x @ weight).sum())) == 100 * 3 * 4 + 9 * 4


def test_denoisers_are_measured_and_reported(tmp_path):
    settings = DenoiserBenchmarkSettings(depth=1, rounds=1, batch_size=1, pixels=[64], device="cpu", profile=True)
    report = run_benchmark(settings)
    results = report.results
    names = ["D-EMO", "plain transcription", "our DiT", "diffusers DiT"]
    assert [(r.group, r.name) for r in results] == [
        (f"S-2, 64 px, {work}", name) for work in ("training", "inference") for name in names
    ]
    assert all(r.milliseconds > 0 and r.ratio > 0 and r.gmacs_per_second > 0 for r in results)
    assert [r.ratio for r in results if r.name == report.baseline] == [1, 1]
    assert all((r.saved_megabytes is None) == ("inference" in r.group) for r in results)
    write_report(tmp_path / "new", report, {"rounds": 1, "output": str(tmp_path / "new")})
    written, lines = (tmp_path / "new/table.md").read_text(), 2 + len(results) + 2
    profiles = [line for line in written.splitlines()[lines:] if line.startswith("| `")]
    assert len(profiles) == 2 * 12 and any("linear" in line or "mm`" in line for line in profiles)
    record = json.loads((tmp_path / "new/results.json").read_text())
    assert record["results"][0]["name"] == "D-EMO" and record["settings"] == {"rounds": 1}  # no place of this machine
    assert (tmp_path / "new/plot.png").stat().st_size > 1000


def test_groups_are_drawn_two_side_by_side_with_the_names_on_the_left():
    rows = [Result(group, name, 1.0, (), speed, 1.0, 1.0, None, None, None)
            for group in ("training", "inference", "more")
            for name, speed in (("D-EMO", 0.254), ("DiT", 63.0))]  # fmt: skip
    panels = plot(rows).axes
    assert [panel.get_title(loc="left") for panel in panels] == ["training", "inference", "more", ""]
    assert [[text.get_text() for text in panel.texts] for panel in panels] == [[" 0.254", " 63.0"]] * 3 + [[]]
    named = [panel.yaxis.get_tick_params()["labelleft"] for panel in panels[:3]]
    assert named == [True, False, True] and panels[0].get_xlabel() == "images per second"


def test_a_profile_has_the_operators_of_a_step_in_milliseconds(monkeypatch):
    x, ran, device = torch.randn(1000, 1000), [], torch.device("cpu")
    cases = [Case("g", name, lambda name=name: ran.append((name, torch.erf(x)))) for name in ("few", "many")]
    operator_times(cases[0], 1, device)  # the profiler's own start
    ran.clear()
    start = time.perf_counter()
    times = operator_times(cases[0], 50, device)
    passed = time.perf_counter() - start
    assert len(ran) == 50 and 0 < times["aten::erf"] <= sum(times.values()) <= 1e3 * passed / 50  # of one step
    monkeypatch.setattr("d_emo.lab.benchmark.profile.operator_times", lambda case, *_: {case.name: 1.5, "both": 2})
    monkeypatch.setattr("d_emo.lab.benchmark.profile.SHOWN", 2)
    assert profile_table(cases, rounds=1, device=device).splitlines() == [
        "| g, ms | few | many |",
        "|---|---:|---:|",
        "| `both` | 2.0 | 2.0 |",
        "| `few` | 1.5 | 0.0 |",
        "| all others | 0.0 | 1.5 |",
        "| all | 3.5 | 3.5 |",
    ]


def test_classifiers_are_measured_beside_a_fused_peer():
    settings = ClassifierBenchmarkSettings(
        models=["emov2_1m"], peers=["repvit_m0_9"], rounds=1, batch_size=1, image_size=64, device="cpu"
    )
    report = run_benchmark(settings)
    assert [r.name for r in report.results] == ["emov2_1m, plain transcription", "emov2_1m", "repvit_m0_9"]
    assert report.baseline == "repvit_m0_9" and not report.profiles


@pytest.mark.parametrize(
    "kind, flags, words",
    [
        ("denoisers", ["--sizes", "M"], "--sizes 'M'"),
        ("denoisers", ["--pixels", "100"], "--pixels 100"),
        ("denoisers", ["--batch-size", "0"], "--batch-size"),
        ("denoisers", ["--depth", "0"], "--depth"),
        ("denoisers", ["--dtype", "int8"], "--dtype"),
        ("denoisers", ["--rounds", "0"], "--rounds"),
        ("classifiers", ["--models", "emov1_1m"], "`models` 'emov1_1m'"),
        ("classifiers", ["--peers", "resnet1"], "`peers` 'resnet1'"),
        ("classifiers", ["--image-size", "16"], "--image-size"),
    ],
)
def test_bad_input_is_one_sentence(kind, flags, words):
    with pytest.raises(InputError, match=words):
        run_benchmark(parse_settings(BENCHMARKS[kind], "", flags))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(InputError, match="`device` cuda"):
        run_benchmark(DenoiserBenchmarkSettings(device="cuda"))


def test_a_runs_step_is_measured_beside_the_bare_one(capsys):
    run_verb("benchmark", ["step", "--model", "D-EMOv2-Ti-4", "--depth", "1", "--image-size", "64", "--batch-size", "2",
                           "--steps", "2", "--rounds", "1"])  # fmt: skip
    head, _, bare, run = capsys.readouterr().out.splitlines()[-4:]
    assert head.startswith("| D-EMOv2-Ti-4, 64 px, batch 2, float32 | ms |")
    assert bare.startswith("| bare | ") and bare.endswith(" | 1.000 |") and run.startswith("| as a run makes it | ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_want_a_gpu():
    with pytest.raises(InputError, match="PyTorch finds no NVIDIA GPU here"):
        run_verb("benchmark", ["kernels"])


def test_every_kernel_of_the_gpu_has_its_row(monkeypatch, triton_interpreter):
    for name, tiny in {"SIDE": 4, "WINDOW": 2, "NARROW": 4, "WIDE": 8, "HEADS": 2, "KERNEL": 3}.items():
        monkeypatch.setattr(kernels, name, tiny)
    monkeypatch.setattr(kernels, "milliseconds", lambda run: (run(), 1.0)[1])
    monkeypatch.setattr("d_emo.kernels.gpu.spanning.attend", lambda *args: 1 / 0)
    lines = kernels.measured(1, torch.device("cpu")).splitlines()
    assert lines[2] == "| copy of a wide map | 1000 | 1000 | 139 measured |"
    assert lines[3].startswith("| attention, one pass | division by zero |")
    assert lines[6] == "| its gradients | 1000 | 2000 | 969 measured |"
    assert len(lines) == 14 and sum("| 1000 |" in line for line in lines) == 11


def test_the_verb_wants_to_know_what_to_measure():
    with pytest.raises(InputError, match="benchmark denoisers or benchmark classifiers"):
        run_verb("benchmark", ["samplers"])
