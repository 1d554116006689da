"""Pushing a snapshot: checked before the run, done after it, and never at the cost of its result. No network."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from d_emo.cli import main
from d_emo.config import TrainSettings, parse_settings, run_cli
from d_emo.errors import InputError, RunError
from d_emo.io import hub

SCRIPTS = Path(__file__).parents[1] / "scripts"


class FakeApi:
    """Stands in for the hub's client and remembers what it was asked."""

    calls: list = []
    failure: dict = {}

    def create_repo(self, repo_id, **options):
        return self._answer("create_repo", repo_id, options) or f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options):
        return self._answer("upload_folder", options.pop("repo_id"), options)

    def _answer(self, name, repo_id, options):
        self.calls.append((name, repo_id, options))
        if name in self.failure:
            raise self.failure[name]


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(FakeApi, "failure", {})
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_token")
    monkeypatch.delenv("RANK", raising=False)
    return FakeApi


def refusal(status, words):
    """The error of the hub's client, made without a network."""
    error = hub.HfHubHTTPError.__new__(hub.HfHubHTTPError)
    Exception.__init__(error, f"{status} Client Error: {words}\n\nmore lines")
    return error


def test_the_repository_is_made_before_the_run(api):
    hub.prepare_push("someone/my-model")
    assert api.calls == [("create_repo", "someone/my-model", {"private": True, "exist_ok": True})]


def test_only_the_main_process_asks(api, monkeypatch):
    hub.prepare_push(None)
    monkeypatch.setenv("RANK", "1")
    hub.prepare_push("someone/my-model")
    assert api.calls == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("my-model", "OWNER/NAME"), ("a/b/c", "no name of a repository"), ("someone/my model", "no name of a repository")],
)
def test_malformed_names_are_refused_at_once(api, name, words):
    with pytest.raises(InputError, match=words):
        hub.prepare_push(name)
    assert api.calls == []


def test_without_a_token_it_says_how_to_log_in(api, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="hf auth login"):
        hub.prepare_push("someone/my-model")
    assert api.calls == []


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (refusal(403, "Forbidden"), r"does not let you write to someone/my-model \(403 Client Error: Forbidden\)"),
        (OSError("Name or service not known"), "cannot be reached .* hf upload someone/my-model"),
    ],
)
def test_a_hub_that_refuses_or_is_away_is_told_before_the_run(api, failure, words):
    api.failure["create_repo"] = failure
    with pytest.raises(InputError, match=words) as caught:
        hub.prepare_push("someone/my-model")
    assert "\n" not in str(caught.value)


def test_a_snapshot_is_uploaded_whole(api, tmp_path):
    assert hub.push_snapshot(tmp_path / "step-9", "someone/my-model") == "https://huggingface.co/someone/my-model"
    name, repo_id, options = api.calls[-1]
    assert (name, repo_id, options["folder_path"]) == ("upload_folder", "someone/my-model", tmp_path / "step-9")
    assert "step-9" in options["commit_message"]


@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
def test_a_failed_push_leaves_the_snapshot_and_says_how_to_push_later(api, tmp_path, call, capsys):
    (tmp_path / "snapshot.json").write_text("{}")
    api.failure[call] = refusal(500, "Server Error")
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: hub.push_snapshot(tmp_path, "someone/my-model"))
    assert caught.value.code == 1
    printed = capsys.readouterr().err
    assert f"Push it later: hf upload someone/my-model {tmp_path}" in printed and printed.count("\n") == 1
    assert (tmp_path / "snapshot.json").read_text() == "{}"


def test_a_push_failure_is_no_input_error(api, tmp_path):
    api.failure["upload_folder"] = OSError("disk or network")
    with pytest.raises(RunError):
        hub.push_snapshot(tmp_path, "someone/my-model")


@pytest.mark.parametrize("failure", [{}, {"upload_folder": OSError("gone")}])
def test_a_training_run_asks_first_and_pushes_last(api, tmp_path, monkeypatch, capsys, failure):
    arguments = (
        f"--output-dir {tmp_path} --model D-EMOv2-Ti-2 --dataset digits --image-size 8 --vae pixels --batch-size 2 "
        "--max-steps 1 --push-to-hub someone/my-model"
    )
    options = ["--model-options", "{depth: 1, hidden_size: 48}"]
    api.failure.update(failure)
    with pytest.raises(SystemExit) if failure else nullcontext():
        main("train", [*arguments.split(), *options])
    snapshot = tmp_path / "snapshots" / "step-1"
    assert [name for name, *_ in api.calls] == ["create_repo", "create_repo", "upload_folder"]
    assert api.calls[-1][2]["folder_path"] == snapshot and (snapshot / "README.md").exists()
    printed = capsys.readouterr()
    said = f"hf upload someone/my-model {snapshot}" in printed.err, "pushed    https://" in printed.out
    assert said == ((True, False) if failure else (False, True))


def test_a_run_may_be_asked_to_push_when_it_goes_on():
    settings = parse_settings(TrainSettings, "", ["--push-to-hub", "someone/my-model"])
    assert settings.push_to_hub == "someone/my-model" and TrainSettings().push_to_hub is None
    assert "push_to_hub" in TrainSettings.marked("resumable")
