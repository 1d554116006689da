"""What a study's plots and grids of samples show, read from the figures themselves."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from d_emo.lab.loss_curves import Curve
from d_emo.lab.study import measuring, plots
from d_emo.lab.study.plots import band, draw_curves, draw_gaps
from d_emo.lab.study.results import Estimate
from d_emo.sampling import draw_grid
from d_emo.sampling.grids import two_lines

matplotlib_figure = pytest.importorskip("matplotlib.figure")
OVER = {"a": "eps, uniform", "b": "eps, uniform", "c": "flow, logit-normal 0 1"}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], matplotlib_figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib_figure.Figure, "savefig",
        lambda figure, *args, **options: saved.append(figure) or save(figure, *args, **options),
    )  # fmt: skip
    return saved


def study_of(steps, seeds=(0, 1, 2)):
    """Rows and losses of the runs of `OVER`."""
    rows = [
        {"run": run, "seed": seed, "step": step, "images": 4 * step, "macs": 3e6, "seconds_per_step": 0.5,
         "loss_over": over, "fid": 100 / step + seed + 10 * number}
        for number, (run, over) in enumerate(OVER.items()) for seed in seeds for step in steps
    ]  # fmt: skip
    losses = [{"run": run, "seed": seed, "step": step, "loss": 1 - 0.045 * step + seed / 50}
              for run in OVER for seed in seeds for step in range(1, 21)]  # fmt: skip
    return pd.DataFrame(rows), pd.DataFrame(losses)


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))]


def lines(panel):
    return {line.get_label() for line in panel.lines}


def test_fid_and_losses_are_drawn_against_steps_compute_and_time_and_losses_beside_comparable_ones_only(
    tmp_path, figures
):
    published = {"DiT-S-2": Curve(np.array([1, 20]), np.array([1.0, 0.2]))}
    rows, losses = study_of([10, 20])
    draw_curves(tmp_path / "c.png", rows, losses, list(OVER), published)
    panels = figures[0].axes
    titles = [part.get_suptitle() for part in figures[0].subfigs]
    assert titles == ["", "training loss of the eps objective, uniform timesteps",
                      "training loss of the flow objective, logit-normal timesteps (mean 0, standard deviation 1)"]
    assert len(panels) == 9 and all(lines(panel) == {"a", "b", "c"} for panel in panels[:3])
    assert lines(panels[3]) == {"a", "b", "DiT-S-2, published"} and all(lines(panel) == {"c"} for panel in panels[6:])
    assert [panels[number].get_xlabel() for number in (2, 8)] == ["minutes of training\n(steps × a step's time)"] * 2
    ends = [panel.lines[0].get_xdata()[-1] for panel in panels[3:6]]
    assert ends == [panel.lines[0].get_xdata()[-1] for panel in panels[:3]]  # both of run a, step 20
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["a", "b", "c", "DiT-S-2, published"]
    assert "lines: means over the seeds; bands: 95 % confidence intervals of the mean" in texts(figures[0])

    rows.loc[rows.run == "b", "images"] *= 2
    draw_curves(tmp_path / "c.png", rows, losses, list(OVER), {})
    assert [panel.get_xlabel() for panel in figures[1].axes[:2]] == ["optimizer steps", "images seen"]


def test_the_losses_of_many_runs_get_a_panel_each_with_the_first_run_in_grey(tmp_path, figures, monkeypatch):
    monkeypatch.setattr(plots, "LEGIBLE", 2)
    rows, losses = study_of([20])
    draw_curves(tmp_path / "c.png", rows.assign(loss_over="eps, uniform"), losses, list(OVER), {})
    dots, *panels = figures[0].axes
    assert [panel.get_title() for panel in panels if panel.get_visible()] == ["b", "c"]
    assert [lines(panel) for panel in panels[:2]] == [{"a", "b"}, {"a", "c"}]
    assert panels[0].lines[0].get_color() == "0.6" and not figures[0].legends
    assert figures[0].subfigs[1].get_suptitle() == "training loss of the eps objective, uniform timesteps; grey: a"


@pytest.mark.parametrize("legible", [6, 1])
def test_losses_below_zero_stand_on_a_plain_axis_with_their_bands(tmp_path, figures, monkeypatch, legible):
    """Those of aligned runs, which have a cosine in them."""
    monkeypatch.setattr("d_emo.lab.study.plots.LEGIBLE", legible)
    rows, losses = study_of([20])
    draw_curves(tmp_path / "c.png", rows, losses.assign(loss=losses.loss - losses.loss.mean()), list(OVER), {})
    part = figures[0].subfigs[1].axes[0]
    assert part.get_yscale() == "linear"
    draw_curves(tmp_path / "c.png", rows, losses, list(OVER), {})
    assert figures[1].subfigs[1].axes[0].get_yscale() == "log"
    panel = matplotlib_figure.Figure().subplots()
    band(panel, pd.DataFrame([[-9.0, -10.0, -11.0]] * 2), color="C0")
    heights = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() < -11 and heights.min() + heights.max() == pytest.approx(-20)


def test_runs_measured_at_one_step_get_a_line_each_with_their_seeds_and_mean(tmp_path, figures):
    draw_curves(tmp_path / "c.png", *study_of([20]), ["a", "c", "b", "never measured"], {})
    dots, *losses = figures[0].axes
    assert len(losses) == 2 * 3 and [label.get_text() for label in dots.get_yticklabels()] == ["a", "c", "b"]
    assert dots.yaxis_inverted() and dots.get_xscale() == "log"  # from 5 to 27
    marks = [line.get_xydata().tolist() for line in dots.lines]
    assert marks[2:4] == [[[25, 1], [26, 1], [27, 1]], [[26, 1]]]  # of c
    assert [x for x, _ in marks[-1]] == [6, 6], "the first run's mean, from top to bottom"
    assert dots.get_xlabel().startswith("FID at step 20 (log axis); dots: seeds, bars: their means")


def test_bands_are_students_intervals_and_stay_positive():
    panel = matplotlib_figure.Figure().subplots()
    values = pd.DataFrame([[9.0, 10.0, 11.0], [0.1, 1.0, 7.0]], index=[1, 2])
    band(panel, values, color="C0")
    heights = panel.collections[0].get_paths()[0].vertices[:, 1]
    half = Estimate.of(values.loc[1]).half_width
    assert {round(10 - half, 6), round(10 + half, 6)} <= {round(float(y), 6) for y in heights}
    assert heights.min() == pytest.approx(0.2 * 2.7)
    band(panel, values[[0, 1]], color="C1")
    assert len(panel.lines) == 2 and len(panel.collections) == 1, "no band from two seeds"


@pytest.mark.parametrize(("seeds", "words"), [
    ([0], "one seed: no intervals"), ([0, 1], "lines: means over the seeds"),
    ([0, 1, 2], "lines: means over the seeds; bands: 95 % confidence intervals of the mean"),
])  # fmt: skip
def test_the_plot_of_train_mode_says_what_its_bands_are(tmp_path, figures, seeds, words):
    gaps = [{"run": run, "seed": seed, "timestep": t, "train": 2.0 + seed, "eval": 2.0}
            for run in ("a", "b") for seed in seeds for t in (50, 950)]  # fmt: skip
    draw_gaps(tmp_path / "g.png", pd.DataFrame(gaps))
    assert figures[0].get_supxlabel() == words
    ours, theirs, _ = figures[0].axes[0].lines
    assert ours.get_linestyle() != theirs.get_linestyle(), "one may lie on the other"


def test_a_mixed_study_says_which_runs_have_bands(tmp_path, figures):
    rows, losses = study_of([10, 20])
    rows = rows[(rows.run != "b") | (rows.seed < 2)]
    draw_curves(tmp_path / "c.png", rows, losses, ["a", "b"], {})
    assert figures[0].get_supxlabel().endswith("of the mean, for runs of 3 seeds or more")


def test_a_grid_grows_by_the_names_of_its_columns_and_is_else_the_same():
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    plain = np.array(draw_grid(images, ["a", "b"], 2, scale=1))
    assert plain.shape == (2 * (64 + 22) + 4, 2 * (64 + 4) + 4, 3)
    for names, lines in ((["cat", "dog"], 1), (["cat", "orange circle on black"], 2)):
        named = np.array(draw_grid(images, ["a", "b"], 2, scale=1, names=names))
        assert np.array_equal(named[lines * 22 :], plain)
        header = named[: lines * 22].min(axis=(0, 2)) < 128  # dark columns of pixels
        assert header[4:68].any() and header[72:136].any() and not header[68:72].any()


def test_a_name_breaks_where_its_lines_are_most_alike():
    def fits(text):
        return len(text) <= 16

    assert two_lines("orange circle on black", fits) == "orange circle\non black"
    assert two_lines("red ring on sky", fits) == "red ring on sky"
    assert two_lines("incomprehensibilities", fits) == "incomprehensibi…"


def test_a_studys_samples_are_large_and_stand_under_the_names_of_their_classes(tmp_path, monkeypatch):
    asked = []
    names = [f"class {number}" for number in range(19)]
    monkeypatch.setattr(measuring, "load_denoiser", lambda path: SimpleNamespace(class_names=names))
    monkeypatch.setattr(measuring, "draw_grid", lambda *args, **said: asked.append(said) or draw_grid(*args, **said))
    drawn = torch.zeros(10, 3, 64, 64, dtype=torch.uint8)
    runs = [SimpleNamespace(name=name, seed=0, folder=tmp_path, norm_buffers="trained") for name in "ab"]
    rows = pd.DataFrame([{"run": run.name, "seed": 0, "step": 4} for run in runs])
    meter = SimpleNamespace(draw=lambda *args: iter([drawn]))
    assert measuring.draw_samples(tmp_path / "s.png", runs, rows, lambda: meter)
    assert asked[0]["names"] == names[::2] and asked[0]["scale"] == 2
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.width == 10 * (128 + 4) + 4
        bar = 18 * 22 // 14
        assert picture.height == bar + 2 * (128 + bar) + 4
