"""Loss curves: what is read, smoothed, published and drawn."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from d_emo.config import PlotSettings, parse_settings
from d_emo.errors import InputError
from d_emo.lab.loss_curves import Curve, choose_published, plot_losses, published_curves, read_run

SCRIPT = Path(__file__).parents[1] / "scripts" / "plot_loss.py"


def write_run(folder, *parts, model="D-EMOv2-S/2", objective="eps"):
    """A run folder whose log comes in parts, as after resumes: dictionaries of tag -> {step: value}."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(f"model: {model}\nobjective: {objective}\n")
    for number, part in enumerate(parts):
        with SummaryWriter(folder / "logs", filename_suffix=str(number)) as writer:
            for tag, points in part.items():
                for step, value in points.items():
                    writer.add_scalar(tag, value, step, walltime=1000 * number + step)
    return folder


def test_a_run_is_read_and_a_repeated_step_counts_once_with_its_later_value(tmp_path):
    first, second = {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6}, {3: 0.5, 5: 0.25}
    run = read_run(write_run(tmp_path / "run", {"loss": first, "vb": {1: 0.01}}, {"loss": second}))
    assert run.model == "D-EMOv2-S-2"
    assert run.curves["loss"].steps.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(run.curves["loss"].values, [0.9, 0.8, 0.5, 0.6, 0.25], rtol=1e-6)
    assert run.curves["vb"].steps.tolist() == [1]


@pytest.mark.parametrize(
    ("parts", "words"), [((), "no TensorBoard logs"), (({"accuracy": {1: 0.5}},), "no loss is logged")]
)
def test_a_run_without_a_loss_is_refused(tmp_path, parts, words):
    with pytest.raises(InputError, match=words):
        read_run(write_run(tmp_path / "run", *parts))


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        read_run(tmp_path)


def test_smoothing_is_the_mean_over_the_last_steps():
    curve = Curve(np.array([10, 20, 30, 50]), np.array([1.0, 2.0, 6.0, 4.0]))
    assert curve.smoothed(20).values.tolist() == [1.0, 1.5, 4.0, 4.0]
    assert curve.smoothed(40).values.tolist() == [1.0, 1.5, 3.0, 4.0]
    assert curve.smoothed(0).values.tolist() == curve.values.tolist()


def test_published_curves_are_the_four_of_the_paper():
    published = published_curves()
    assert list(published) == ["D-EMOv2-S-2", "D-EMOv2-B-2", "D-EMOv2-L-2", "D-EMOv2-XL-2"]
    for curve in published.values():
        assert (curve.steps[0], curve.steps[-1], len(curve.steps)) == (100, 400_000, 204)
        assert (np.diff(curve.steps) > 0).all()
    last = [curve.values[-1] for curve in published.values()]
    assert last == [0.1545, 0.152, 0.1492, 0.1486]


def test_the_published_curve_follows_the_model(tmp_path):
    small = read_run(write_run(tmp_path / "s", {"loss": {1: 1.0}}))
    flow = read_run(write_run(tmp_path / "f", {"loss": {1: 1.0}}, objective="flow"))
    other = read_run(write_run(tmp_path / "d", {"loss": {1: 1.0}}, model="DiT-S-2"))
    assert list(choose_published([small, flow, other])) == ["D-EMOv2-S-2"]
    assert choose_published([flow, other]) == {} and choose_published([small], "none") == {}
    assert list(choose_published([other], "d-emov2-b/2")) == ["D-EMOv2-B-2"]
    with pytest.raises(InputError, match="DiT-S-2 is published; there are D-EMOv2-S-2"):
        choose_published([small], "DiT-S-2")


@pytest.fixture
def drawn(monkeypatch):
    """Labels of the lines that were drawn, and the scales of the y axes, by panel."""
    from matplotlib.figure import Figure

    seen = SimpleNamespace(lines={}, scales={})
    save = Figure.savefig

    def remember(figure, *args, **kwargs):
        for ax in figure.axes:
            seen.lines[ax.get_ylabel()] = [line.get_label() for line in ax.lines]
            seen.scales[ax.get_ylabel()] = ax.get_yscale()
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return seen


def test_curves_are_free_of_torch():
    code = "import sys, d_emo.lab.loss_curves as c; c.published_curves(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_plot_has_a_panel_per_part_and_the_published_curve(tmp_path, drawn):
    values = {step: 1 / step for step in range(1, 9)}
    eps = read_run(write_run(tmp_path / "a", {"loss": values, "mse": values, "vb": values}))
    flow = read_run(write_run(tmp_path / "b", {"loss": values}, objective="flow"))
    plot_losses([eps, flow], choose_published([eps, flow]), tmp_path / "new" / "loss.png")
    names = [f"{tmp_path / 'a'} (D-EMOv2-S-2)", f"{tmp_path / 'b'} (D-EMOv2-S-2)"]
    assert drawn.lines == {
        "loss": [*names, "D-EMOv2-S-2, published, ImageNet 256"], "mse": names[:1], "vb": names[:1],
    }
    assert set(drawn.scales.values()) == {"log"}
    assert Image.open(tmp_path / "new" / "loss.png").width > 800


def test_values_that_are_not_positive_can_be_drawn(tmp_path, drawn):
    run = read_run(write_run(tmp_path / "a", {"loss": {1: 0.5, 2: -0.1, 3: 0.2}}))
    plot_losses([run], {}, tmp_path / "loss.png", smooth=2)
    assert drawn.scales == {"loss": "linear"} and len(drawn.lines["loss"]) == 2


def test_without_matplotlib_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = read_run(write_run(tmp_path / "a", {"loss": {1: 0.5}}))
    with pytest.raises(InputError, match=r"pip install 'd-emo\[plot\]'"):
        plot_losses([run], {}, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_the_command(tmp_path):
    run = write_run(tmp_path / "run", {"loss": {1: 1.0, 100: 0.5}})
    command = [sys.executable, SCRIPT, run, "--output", tmp_path / "o.png", "--smooth", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "D-EMOv2-S-2, loss 0.7500 at step 100" in done.stdout
    assert "published  D-EMOv2-S-2: loss 0.1545 at step 400,000" in done.stdout
    assert Image.open(tmp_path / "o.png").format == "PNG"


@pytest.mark.parametrize(("argv", "words"), [([], "RUNS"), (["a", "--smooth", "-1"], "--smooth")])
def test_wrong_arguments_are_one_sentence(argv, words):
    with pytest.raises(InputError, match=words):
        parse_settings(PlotSettings, "", argv)


def test_several_runs_are_several_arguments():
    assert parse_settings(PlotSettings, "", ["a", "b", "--published", "none"]).runs == ["a", "b"]
