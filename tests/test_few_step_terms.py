"""The terms beside the Frechet distance: what a classifier takes a drawing for, and the loss of flow on real images."""

from unittest import mock

import numpy as np
import pytest
import torch
from test_four_steps import judge_of, objective_of
from test_one_step import OLD, ONE_STEP, run
from test_resume import last_state, same

from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.frechet import FourStepObjective, Judge, OneStepObjective, OneStepSampleObjective, RunningMoments
from d_emo.io.snapshot import load_classifier
from d_emo.objective import FlowObjective
from d_emo.training.denoiser import DenoiserTask

BOTH = {"class_weight": 0.5, "flow_weight": 2.0}


def saying(x, timestep, class_labels):
    """A network that is a formula."""
    t, label = (each.double().view(-1, 1, 1, 1) for each in (timestep, class_labels))
    return mock.Mock(sample=(3 * x.double()).sin() + label / 5 + t / 1000)


def judging(head):
    """A judge whose features and logits are formulas of the latents."""
    weights = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    judge = judge_of(weights)
    judge.with_logits = lambda latents, labels: (judge(latents, labels), latents.flatten(1).double() @ head)
    return judge


@pytest.mark.parametrize(("kind", "steps"), [
    (OneStepObjective, 1), (OneStepSampleObjective, 1), (FourStepObjective, 4),
])
def test_the_terms_are_added_to_the_distance_by_their_weights(kind, steps):
    """In NumPy: cross-entropy of x_0 = x_t - t v of the drawn rows, |v - (noise - x)|^2 of the real ones."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    objective = objective_of(kind, judging(head), saying, learn_sigma=False, **BOTH)
    objective.kept["moments"] = objective.kept["moments"][:steps]
    count = 3 * (steps + 1)
    latents = torch.randn(count, 3, 2, 2, generator=generator)
    step, labels = objective.draw(generator, count, (3, 2, 2)), torch.arange(count) % 5
    levels = step.timesteps.view(3, steps + 1)
    assert torch.equal(levels[:, :steps], torch.tensor([[1000.0, 750, 500, 250][:steps]]).expand(3, -1))
    assert ((levels[:, steps] > 0) & (levels[:, steps] < 1000)).all() and levels[:, steps].unique().numel() == 3
    with mock.patch("torch.randn_like", lambda x: torch.full_like(x, 0.25)):
        losses = objective(saying, latents, labels, step)

    says_x0 = kind is OneStepSampleObjective
    said = lambda x, t, label: np.sin(3 * x) + label / 5 + t  # noqa: E731
    crosses, squares = [], []
    for row in range(count):
        label, noise = labels[row].item(), step.noise[row].double().numpy()
        if (place := row % (steps + 1)) == steps:
            real, t = latents[row].double().numpy(), step.timesteps[row].item() / 1000
            output = said(noisy := (1 - t) * real + t * noise, t, label)
            found, wanted = ((noisy - each) / max(t, 0.05) if says_x0 else each for each in (
                output, real if says_x0 else noise - real))
            squares.append((found - wanted) ** 2)
            continue
        x = noise
        for level in range(place + 1):
            t = 1 - level / steps
            clean = said(x, t, label) if says_x0 else x - t * said(x, t, label)
            following = 1 - (level + 1) / steps
            x = (1 - following) * clean + following * 0.25
        logits = clean.reshape(12) @ head.numpy()
        crosses.append(np.log(np.exp(logits - logits[label]).sum()))
    assert losses["cross_entropy"].item() == pytest.approx(np.mean(crosses), rel=1e-3)
    assert losses["mse"].item() == pytest.approx(np.mean(squares), rel=1e-3)
    total = losses["fd"] + 0.5 * losses["cross_entropy"] + 2 * losses["mse"]
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-4)


def test_real_images_leave_the_distance_as_it_is_and_their_loss_has_a_gradient(tiny_denoiser):
    seen = []

    def looks(latents, labels):
        seen.append(len(latents))
        return judge.joint(latents.flatten(1).double()[:, :3] * 0, labels)  # nothing of the drawings

    judge = judge_of(torch.zeros(256, 3, dtype=torch.float64))
    judge.forward = looks
    options = {"learn_sigma": tiny_denoiser.predicts_variance, "flow_weight": 1.0}
    objective = objective_of(OneStepObjective, judge, None, **options)
    objective.kept["moments"] = [RunningMoments(3, 0.5)]
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    step = objective.draw(torch.Generator().manual_seed(1), 6, (4, 8, 8))
    objective(tiny_denoiser, latents, torch.arange(6), step)["loss"].backward()
    assert seen == [3] and tiny_denoiser.final_layer.linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_real_latents_are_taken_where_their_loss_has_a_weight(weight):
    task = DenoiserTask(TrainSettings(**{**ONE_STEP, "flow_weight": weight}))
    task.objective = lambda model, latents, labels, step: latents
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    step = DenoiserTask.draw(mock.Mock(objective=FlowObjective(null_class=10), model=task.model), torch.Generator(), 4)
    wanted = task._latents(images, step) if weight else step.noise
    assert torch.equal(task.loss(task.model, [images, torch.arange(4)], step), wanted)


@pytest.mark.parametrize("stages", [True, False])
def test_the_classifiers_own_head_reads_the_view_that_the_features_are_of(stages):
    """Classes of the data are found by their names."""
    network = load_classifier(OLD / "classifier").model.eval()
    rows, images = [7, 0, 3], torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    judge = Judge(network, None, 32, stages=stages, noise=0.5, class_rows=rows)
    with torch.no_grad():
        judge.learn(judge.features(images), torch.arange(6) % 3)
        torch.manual_seed(3)
        joint, logits = judge.with_logits(images, torch.arange(6) % 3)
        torch.manual_seed(3)
        assert torch.equal(judge(images, torch.arange(6) % 3), joint)
        torch.manual_seed(3)
        t = 0.5 * torch.rand(6, 1, 1, 1)
        wanted = network((1 - t) * images + t * torch.randn(images.shape))[:, rows]
    torch.testing.assert_close(logits, wanted)


def test_a_run_with_both_resumes_exactly_and_its_card_says_so(tmp_path):
    sizes = {"batch_size": 20, "micro_batch_size": 20, "max_steps": 2, "state_every": 1}
    short = {**BOTH, "objective": "four-step", **sizes}
    _, snapshot = run(tmp_path / "whole", **short)
    run(tmp_path / "parts", **{**short, "max_steps": 1})
    run(tmp_path / "parts", **short)
    assert same(last_state(tmp_path / "parts", 2), last_state(tmp_path / "whole", 2))
    card = (snapshot / "README.md").read_text()
    assert "the cross-entropy of its head on drawings, weight 0.5, the loss of flow on real latents, weight 2" in card
    run(tmp_path / "without", **{**short, "flow_weight": 0.0})
    assert not same(last_state(tmp_path / "without", 2), last_state(tmp_path / "whole", 2))


@pytest.mark.parametrize(("changes", "words"), [
    ({**BOTH, "batch_size": 9}, "9 images have no equal shares for 1 step and .* `batch_size` that is a multiple of 2"),
    ({"objective": "flow", "class_weight": 1.0, "fd_features": None, "fd_images": None}, "`class_weight` 1.0 belongs"),
    ({"class_weight": 1.0, "dataset": "shapes", "num_images": 40},
     "`class_weight` 1 asks the classifier .* does not know 1,000 of 1,000, such as red circle on black"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        DenoiserTask(TrainSettings(**{**ONE_STEP, "micro_batch_size": None, **changes}))
