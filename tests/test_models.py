import re
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from d_emo.errors import InputError
from d_emo.lab.models_table import ABLATIONS, ablations_table, matches, models_table, published_figures
from d_emo.models import EMO, count_macs, count_parameters, create_model, list_models
from d_emo.models.contract import DenoiserFrame
from d_emo.models.registry import model_kind
from d_emo.tables import SYSTEMS, systems

ROOT = Path(__file__).parents[1]
PUBLISHED = published_figures()


@pytest.mark.parametrize("entry", PUBLISHED)
def test_counts_equal_the_published_ones(entry):
    figures, name = PUBLISHED[entry], entry.partition("@")[0]
    overrides = {"window_size": figures["window_size"]} if "window_size" in figures else {}
    with torch.device("meta"):
        model = create_model(name, **overrides)
    assert count_parameters(model) == figures["params"]
    macs = count_macs(model, figures.get("resolution"))
    assert macs == pytest.approx(figures["macs_m"] * 1e6, rel=0.005)
    assert model.training  # counting leaves the mode alone


def test_published_figures_are_the_papers():
    """The headline numbers once more, typed in from the papers, so that the data file cannot drift with the code."""
    headline = {
        "D-EMOv2-S-2": 24_596_000, "D-EMOv2-B-2": 96_082_976, "D-EMOv2-L-2": 334_831_648, "D-EMOv2-XL-2": 492_692_000,
        "DiT-S-2": 32_963_360, "DiT-XL-2": 675_129_632, "emov2_5m": 5_126_440, "emov1_5m": 5_108_848,
    }  # fmt: skip
    assert {name: PUBLISHED[name]["params"] for name in headline} == headline
    assert sum(name.partition("-")[0] not in SYSTEMS for name in PUBLISHED) == 32


def test_macs_do_not_depend_on_where_the_model_lives():
    with torch.device("meta"):
        ghost = create_model("emov2_1m")
    assert count_macs(create_model("emov2_1m"), 64) == count_macs(ghost, 64)
    tiny = {"depth": 1, "sample_size": 8, "num_classes": 2}
    with torch.device("meta"):
        ghost = create_model("D-EMOv2-Ti-2", **tiny)
    assert count_macs(create_model("D-EMOv2-Ti-2", **tiny)) == count_macs(ghost)


def test_every_registered_name_builds():
    names = list_models()
    assert len(names) == len(set(names)) == 3 * 20 + 12 + 11 + 4 + 5 + len(systems())
    for name in names[:92]:  # those of systems are counted above and in their own tests
        with torch.device("meta"):
            denoiser = model_kind(name) == "denoiser"
            flat = denoiser and not name.startswith("U-")
            model = create_model(name, **({"sample_size": 16, "depth": 1} if flat else {}))
        assert isinstance(model, DenoiserFrame if denoiser else nn.Module if "_tiny_" in name else EMO)
        assert count_parameters(model) > 0


def test_sit_is_the_network_of_dit():
    for name in list_models("SiT-*"):
        with torch.device("meta"):
            sit, dit = (create_model(family + name[3:], depth=1) for family in ("SiT", "DiT"))
        assert dict(sit.config) == dict(dit.config) and sit.config.out_channels == 8
    assert create_model("sit-s/2", depth=1, sample_size=4).config.hidden_size == 384


def test_list_models_filters():
    assert list_models("emov2_*") == ["emov2_1m", "emov2_2m", "emov2_5m", "emov2_20m", "emov2_50m"]
    assert list_models("D-EMOv2-S-*") == [f"D-EMOv2-S-{p}" for p in (1, 2, 4, 8)]
    assert list_models("dit-xl") == [f"DiT-XL-{p}" for p in (1, 2, 4, 8)]
    assert list_models("nothing") == []


def test_small_custom_models():
    model = create_model("D-EMOv2-Ti/2", depth=1, sample_size=8, num_classes=10)
    assert (model.config.hidden_size, model.config.depth, model.null_class) == (192, 1, 10)
    assert model.config.window_size == 8 and model.config.kernel_size == 5 and model.config.expand_ratio == 4
    assert model.config.attention_mode == "spanning" and model.config.local_norm == "batch"
    assert model(torch.zeros(1, 4, 8, 8), torch.tensor(1), torch.tensor([10])).sample.shape == (1, 8, 8, 8)


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        ("D-EMOv2-M-2", {}, "'D-EMOv2-M-2'; did you mean .*D-EMOv2-"),
        ("emov2_5", {}, "did you mean .*emov2_5m"),
        ("qqq", {}, "'qqq'.*list_models"),
        ("D-EMOv2-S-2", {"windowsize": 4}, "'windowsize'.*'window_size'"),
        ("emov2_1m", {"sample_size": 4}, "emov2_1m has no setting 'sample_size'"),
        ("D-EMOv2-S-2", {"zzz": 4}, "no setting 'zzz'; it has sample_size"),
    ],
)
def test_unknown_names_are_answered_with_known_ones(name, overrides, words):
    with pytest.raises(InputError, match=words):
        create_model(name, **overrides)


def test_table_shows_ours_beside_the_published():
    lines = models_table("emov1_*").splitlines()
    assert "| emov1_5m | 5,108,848 | 5.1M | 903M | 903M |" in lines
    assert re.match(r"\| emov1_20m \| 20,540,128 \| 20.5M \| 3,594M \| 3808M \[1\] \|", lines[7])
    assert lines[-1].startswith("[1] Never released")


PRINTED = {  # typed in from the paper once more
    "attention none": "4.3M 802M", "attention near": "5.1M 967M", "attention far": "5.1M 967M",
    "attention in stage 4": "4.7M 832M", "attention in stages 2-4": "5.1M 1096M",
    "attention in stages 1-4": "5.2M 1213M", "kernel 1": "4.8M 969M", "kernel 3": "4.9M 991M",
    "kernel 7": "5.3M 1102M", "kernel 9, 7 in stage 4": "5.5M 1184M", "attention spanning (EMOv2)": "5.1M 1035M",
}  # fmt: skip


@pytest.mark.parametrize("row", ABLATIONS, ids=lambda row: row.name)
def test_ablations_cost_what_the_paper_prints(row):
    assert f"{row.params} {row.macs}" == PRINTED.get(row.name, "- -")
    with torch.device("meta"):
        model = create_model("emov2_5m", **row.options)
    for count, printed in ((count_parameters(model), row.params), (count_macs(model), row.macs)):
        assert printed == "-" or matches(count, printed)


def test_figures_match_when_rounded_or_cut_off():
    assert matches(5.157e6, "5.2M") and matches(5.199e6, "5.1M") and matches(1184.4e6, "1184M")
    assert not matches(5.2e6, "5.1M") and not matches(5.14e6, "5.2M") and not matches(1190e6, "1184M")


def test_ablations_table_explains_what_differs():
    table = ablations_table()
    assert "| attention in stage 4 | `{attention_stages: [4]}` | 4,714,280 | 4.7M | 832M | 832M |" in table
    assert "reason is not known" not in table and "[1] The paper cuts" in table


@pytest.mark.parametrize("pattern, code", [("D-EMOv2-S-2", 0), ("nothing", 2)])
def test_table_script(pattern, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["models_table.py", "--match", pattern])
    with pytest.raises(SystemExit) if code else nullcontext() as stop:
        runpy.run_path(str(ROOT / "scripts" / "models_table.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert (stop.value.code if code else 0) == code
    assert ("| D-EMOv2-S-2 | 24,596,000 | 24.6M | 5,429M | 5.4G |" in printed.out) == (code == 0)
    assert printed.err.splitlines() == [] or printed.err.startswith("error: No model matches 'nothing'")
    assert len(printed.err.splitlines()) == (code == 2)
