"""The arithmetic of a study's report: intervals, differences, what is said first."""

import math

import pandas as pd
import pytest
import torch
from tiny_study import ROOT, settings_of

from d_emo.config import StudySettings, TrainSettings, parse_settings
from d_emo.data import open_dataset, to_uint8
from d_emo.data.shapes import is_empty
from d_emo.files import write_json
from d_emo.lab.study.plan import plan_runs
from d_emo.lab.study.report import (
    course_table,
    findings,
    gap_table,
    held_out_file,
    introduction,
    main_table,
    write_report,
)
from d_emo.lab.study.results import (
    Estimate,
    at_time,
    difference,
    last_common_step,
    loss_over,
    minutes_by_step,
    paired,
)


def rows_of(**values):
    """Rows of runs by seed; a metric of a run is a list over seeds 0, 1, 2, ..."""
    return pd.DataFrame([
        {"run": run, "seed": seed, "step": 10, "parameters": 2e6, "macs": 3e6, "seconds_per_step": 0.5, "images": 40,
         "loss_over": "eps, uniform", **{key: those[seed] for key, those in each.items()}}
        for run, each in values.items() for seed in range(len(each["fid"]))
    ])  # fmt: skip


def with_row(rows, **changes):
    """The rows, and the first one again with changes."""
    return pd.concat([rows, pd.DataFrame([{**rows.iloc[0], **changes}])], ignore_index=True)


def gap_of(rows, name, other, value):
    return difference(paired(rows, name, other, 10), value)


def test_an_estimate_has_students_interval():
    estimate = Estimate.of([1.0, 2.0, 3.0])
    assert estimate.mean == 2 and estimate.half_width == pytest.approx(4.302653 / 3**0.5)
    assert estimate.show(1) == "2.0 ± 2.5" and not estimate.decided and Estimate.of([5, 5.1, 4.9]).decided
    assert Estimate.of([-5, -5.1, -4.9]).decided
    alone = Estimate.of([4.0])
    assert math.isnan(alone.half_width) and alone.show() == "4.00" and not alone.decided


def test_differences_pair_the_seeds_that_both_have():
    rows = rows_of(a={"fid": [1.0, 20.0, 7.0]}, b={"fid": [2.0, 22.0]})
    gap = gap_of(rows, "a", "b", "fid")
    assert (gap.mean, gap.count) == (-1.5, 2)
    assert not gap_of(rows, "a", "c", "fid").count and not gap_of(rows, "a", "b", "recall").count
    assert last_common_step(rows, ["a", "b"]) == 10 and last_common_step(rows, ["a", "c"]) is None
    rows = with_row(rows, step=20)
    assert last_common_step(rows, ["a"]) == 20 and last_common_step(rows, ["a", "b"]) == 10


def test_fid_at_equal_time_lies_on_the_line_between_measured_steps():
    rows = rows_of(a={"fid": [8.0]}, b={"fid": [9.0]})
    rows = with_row(rows, step=20, fid=4.0)
    a, b = (rows[rows.run == name] for name in "ab")
    assert minutes_by_step(a).to_dict() == {10: 10 * 0.5 / 60, 20: 20 * 0.5 / 60}
    assert at_time(a, 12.5 * 0.5 / 60) == [pytest.approx(7.0)]
    assert at_time(b, 10 * 0.5 / 60) == [9.0] and at_time(b, 1 * 0.5 / 60) == []


def test_findings_say_first_where_the_first_run_loses():
    rows = rows_of(
        us={"fid": [9.0, 9.1, 9.2], "class_accuracy": [50.0, 51.0, 52.0], "recall": [0.5, 0.6, 0.4]},
        them={"fid": [8.0, 8.0, 8.1], "class_accuracy": [40.0, 41.1, 42.0], "recall": [0.4, 0.6, 0.5]},
    )
    rows = with_row(rows, seed=3, fid=1000.0)  # a seed that the other does not have
    text = findings(rows, "Test", ["us", "them", "nobody"])
    assert text.count("\n") == 0 and "step 10, 3 seeds" in text
    loses, undecided = text.index("**us loses** in FID 9.10 against 8.03 (+1.07"), text.index("Not decided: recall")
    assert loses < undecided < text.index("It wins in class accuracy % 51.0 against 41.0 (+10.0")
    alone = findings(rows_of(a={"fid": [1.0]}, b={"fid": [2.0]}), "One seed", ["a", "b"])
    assert "nothing." in alone and "losses" not in alone


def test_losses_over_other_timesteps_are_not_compared():
    rows = rows_of(a={"fid": [1.0], "loss": [0.5]}, b={"fid": [2.0], "loss": [0.25]})
    assert gap_of(rows, "a", "b", "loss").mean == 0.25 and "loss 0.5" in findings(rows, "Same", ["a", "b"])
    rows.loc[1, "loss_over"] = "eps, logit-normal 0 1"
    text = findings(rows, "Other", ["a", "b"])
    assert not gap_of(rows, "a", "b", "loss").count and gap_of(rows, "a", "b", "fid").mean == -1
    assert "loss 0.5" not in text
    assert text.endswith("Their losses are over other timesteps or with other terms and are not compared.")


@pytest.mark.parametrize(("changes", "said"), [
    ({}, "flow, uniform"),
    ({"timestep_sampling": "logit-normal", "time_shift": 2}, "flow, logit-normal 0 1, shift 2"),
    ({"contrastive": 0.05}, "flow, uniform, contrastive 0.05"),
    ({"align": "vae"}, "flow, uniform, aligned with vae (0.5)"),
    ({"align": "sra", "align_weight": 0.2}, "flow, uniform, aligned with sra (0.2)"),
])
def test_losses_with_other_terms_are_over_something_else(changes, said):
    settings = TrainSettings(model="D-EMOv2-Ti-1", dataset="digits", objective="flow", **changes)
    assert loss_over(settings.resolve()) == said


def test_tables_show_means_with_intervals_and_the_distance_from_the_first_run():
    rows = rows_of(a={"fid": [1.0, 2.0, 3.0]}, b={"fid": [3.0, 4.0, 5.0]})
    table = main_table(rows, ["a", "b", "missing"])
    assert table.startswith("Step 10.") and "missing" not in table
    assert "| a | 3 | 2.00M | 3.0M | 500 | 2.00 ± 2.48 | - |" in table
    assert "| b | 3 | 2.00M | 3.0M | 500 | 4.00 ± 2.48 | +2.00 ± 0.00 |" in table
    course = course_table(with_row(rows, step=20, fid=0.5), ["a", "b"])
    assert course.splitlines()[0] == "| FID at step | 10 | 20 | after 0.083 minutes |"
    assert course.splitlines()[2:] == ["| a | 2.00 ± 2.48 | 0.50 | 1.00 |", "| b | 4.00 ± 2.48 | - | 4.00 ± 2.48 |"]
    gaps = [{"run": "a", "seed": s, "timestep": t, "train": 1.0 + s, "eval": 2.0} for s in (0, 1) for t in (50, 150)]
    assert "| a | 0.750 | 0.750 |" in gap_table(pd.DataFrame(gaps))


def test_runs_with_steps_of_their_own_are_compared_at_the_end_of_each(tmp_path):
    rows = rows_of(a={"fid": [1.0, 2.0, 3.0]}, b={"fid": [3.0, 4.0, 5.0]})
    rows.loc[rows.run == "b", ["step", "seconds_per_step"]] = [20, 0.25]
    table = main_table(rows, ["a", "b"])
    assert table.startswith("The last step of each.\n\n| run | steps | minutes | seeds |")
    assert "| b | 20 | 0.1 | 3 | 2.00M | 3.0M | 250 | 4.00 ± 2.48 | +2.00 ± 0.00 |" in table
    assert findings(rows, "Here", ["b", "a"]).startswith(
        "- Here, b against a, at the end of each, 3 seeds. **b loses** in FID 4.00 against 2.00 (+2.00 ± 0.00)."
    )
    report = write_report(tmp_path, title="T", introduction=[], tables={"Here": ["a", "b"]}, rows=rows,
                          losses=pd.DataFrame(), gaps=pd.DataFrame(), plots={}).read_text()  # fmt: skip
    assert "| b | 20 |" in report and "after" not in report


def test_a_ground_without_a_shape_is_empty():
    shapes = open_dataset(dataset="shapes", data_dir=None, split="test", image_size=64, num_images=1000)
    real = to_uint8(torch.stack([shapes[index][0] for index in range(0, 1000, 7)]))
    noise = torch.randint(-15, 16, (5, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    grounds = (torch.tensor([20, 90, 200, 128, 235]).view(-1, 1, 1, 1) + noise).to(torch.uint8)
    grounds[0, :, :4, :5] = 255  # 20 of 4,096 pixels are a speck; one more is something
    assert not is_empty(real).any() and is_empty(grounds).all()
    grounds[0, :, 5, 0] = 255
    assert not is_empty(grounds)[0]


@pytest.mark.parametrize("name", ["shapes64", "digits64"])
def test_a_report_that_was_made_before_comes_out_the_same_from_its_tables(tmp_path, name):
    folder = ROOT / "sample_outputs" / "study" / name
    configs = [part for each in dict.fromkeys(("shapes64", name))
               for part in ("--config", str(ROOT / "configs" / "study" / f"{each}.yaml"))]  # fmt: skip
    settings = parse_settings(StudySettings, "", configs)
    rows, losses = (pd.read_csv(folder / f"{table}.csv") for table in ("results", "losses"))
    made = write_report(
        tmp_path, title=settings.title, introduction=[], tables=settings.tables, losses=losses,
        rows=rows.rename(columns={"recognised": "class_accuracy"}), gaps=pd.DataFrame(), plots={},
    ).read_text()  # fmt: skip
    assert (tmp_path / "losses.csv").read_bytes() == (folder / "losses.csv").read_bytes()
    before = (folder / "report.md").read_text().replace("class %", "class accuracy %")
    said, made_again = (
        [line for line in text.splitlines() if line.startswith(("|", "#", "Step ", "- "))] for text in (before, made)
    )
    assert said == made_again



def test_held_out_images_measured_by_an_older_version_are_told_under_the_present_names(tmp_path):
    settings = settings_of(tmp_path)
    runs = plan_runs(settings)
    write_json(held_out_file(settings, runs), {"images": 20, "fid": 0.46, "recognised": 99.96, "precision": 0.9301})
    _, measured = introduction(settings, runs, rows_of(**{"D-EMO": {"fid": [1.0]}}), "1 CPU thread", "`judge.yaml`")
    assert measured.endswith("20 real held-out images measure: FID 0.46, class accuracy % 100.0, precision 0.930.")
