"""What `pip install d-emo` gives: declared dependencies, the command, the data, in a folder without a checkout."""

import ast
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "pytorch_grad_cam": "grad-cam",
                 "torch_fidelity": "torch-fidelity", "skimage": "scikit-image"}  # fmt: skip
BROUGHT_ALONG = {"triton": "torch"}


def declared():
    """Names of distributions in pyproject.toml, those of extras too."""
    text = (ROOT / "pyproject.toml").read_text()
    text = text[text.index("dependencies = [") : text.index("[tool.")]
    return {name.lower().replace("_", "-") for name in re.findall(r'"([A-Za-z][\w.-]*)(?:\[\w+\])?[><=]', text)}


def test_everything_that_is_imported_is_declared():
    imported = set()
    for file in (ROOT / "d_emo").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "d_emo"}
    wanted = {BROUGHT_ALONG.get(name, DISTRIBUTIONS.get(name, name)).replace("_", "-") for name in imported}
    assert wanted <= declared()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs a command in an empty folder, with the wheel's content on the path and no checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = folder / "source"  # setuptools builds beside the sources
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, str(source)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    packages = next((folder / "venv").glob("lib/python*/site-packages"))
    subprocess.run([*pip, "--python", folder / "venv" / "bin" / "python", "install", "--no-deps", "--no-index",
                    *folder.glob("*.whl")], check=True)  # fmt: skip
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "empty").mkdir()

    def run(*words):
        environment = {"PATH": f"{folder / 'venv' / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=folder / "empty", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_the_installed_command_works_without_a_checkout(installed):
    where = installed("python", "-c", "import d_emo; print(d_emo.__file__)")
    assert "venv" in where, "not the checkout that is being tested"
    sources = "from d_emo.kernels import native; print(*sorted(file.name for file in native.SOURCES.iterdir()))"
    assert installed("python", "-c", sources).split() == ["attention.c", "local.c", "vectors.h"]
    assert "sample" in installed("d-emo", "--help")
    assert "--reference" in installed("python", "-m", "d_emo", "fid", "--help")
    assert "picture" in installed("d-emo", "sample", "--class", "207", "--num-images", "1", "--steps", "2")
    tiny = {"model": "D-EMOv2-Ti-2", "model_options": {"depth": 1, "hidden_size": 48, "num_heads": 3},
            "dataset": "digits", "image_size": 8, "vae": "pixels", "batch_size": 4, "max_steps": 2}  # fmt: skip
    flags = [word for key, value in tiny.items()
             for word in (f"--{key.replace('_', '-')}", yaml.safe_dump(value, default_flow_style=True).split("\n")[0])]
    assert "snapshot" in installed("d-emo", "train", "--output-dir", "run", *flags)
    launch = ["python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    assert "snapshot" in installed(*launch, "-m", "d_emo", "train", "--output-dir", "other", *flags)
