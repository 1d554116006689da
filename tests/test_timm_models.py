"""timm's own classifiers in the training room, for comparisons and as judges of another family."""

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from d_emo.config import ClassifierSettings
from d_emo.errors import InputError
from d_emo.evaluation.features import create_extractor
from d_emo.io.classifier import open_classifier
from d_emo.models import create_model
from d_emo.models.layers import synchronise_batch_norms
from d_emo.models.registry import model_kind
from d_emo.training import fit
from d_emo.training.classifier import ClassifierTask
from d_emo.training.finetuning import head_of, train_only


def test_a_name_of_timm_becomes_its_network():
    torch.manual_seed(0)
    ours = create_model("timm:resnet10t", num_classes=3, img_size=32).eval()
    torch.manual_seed(0)
    theirs = timm.create_model("resnet10t", num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))
    assert ours.config == {"name": "timm:resnet10t", "num_classes": 3, "img_size": 32}
    vit = create_model("timm:vit_tiny_patch16_224", num_classes=3, img_size=32, depth=1)
    assert vit.pos_embed.shape[1] == 2 * 2 + 1 and len(vit.blocks) == 1
    assert model_kind("timm:resnet10t") == "classifier"


@pytest.mark.parametrize("name, overrides, sentence", [
    ("timm:resnet10", {}, "Unknown model 'timm:resnet10'; did you mean timm:resnet10t or "),
    ("timm:resnet18.a1_in1k", {}, "Unknown model 'timm:resnet18.a1_in1k'; did you mean timm:resnet18"),
    ("timm:resnet10t", {"pretrained": True}, "timm:resnet10t begins with random weights; leave pretrained out"),
    ("timm:qqqq", {}, "Unknown model 'timm:qqqq'; timm.list_models"),
    ("timm:resnet10t", {"widths": 3}, "timm:resnet10t cannot be built with .*widths"),
    ("timm:vit_tiny_patch16_224", {"embed_dim": 32}, "timm:vit_tiny_patch16_224 cannot be built with"),
])  # fmt: skip
def test_what_timm_cannot_build_is_a_sentence(name, overrides, sentence):
    with pytest.raises(InputError, match=sentence):
        create_model(name, **overrides)


def test_synchronised_batch_norms_keep_their_activations():
    """timm has norms that end with an activation; what other classes do beside norming, nobody can know."""
    torch.manual_seed(0)
    model = create_model("timm:mobilenetv3_small_050", num_classes=3).train()
    assert any(type(module) is BatchNormAct2d for module in model.modules())
    images, before = torch.randn(2, 3, 32, 32), copy.deepcopy(model)
    synchronise_batch_norms(model)
    assert not any(type(module) in (nn.BatchNorm2d, BatchNormAct2d) for module in model.modules())
    assert torch.equal(model(images), before(images))
    for (name, value), (same, expected) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert name == same and torch.equal(value, expected)

    class Other(nn.BatchNorm2d):
        pass

    with pytest.raises(InputError, match=r"classes BatchNorm1d, .*, BatchNormAct2d, and 0\.1 is of class Other;"):
        synchronise_batch_norms(nn.Sequential(nn.Sequential(nn.ReLU(), Other(4))))


def test_it_is_trained_measured_with_and_fine_tuned(tmp_path):
    tiny = {
        "model": "timm:resnet10t", "dataset": "digits", "image_size": 32, "batch_size": 4, "max_steps": 2,
        "warmup_steps": 1, "validate_images": 4, "tracker": "none",
    }  # fmt: skip
    settings = ClassifierSettings(**tiny, output_dir=str(tmp_path / "first"))
    first = fit(ClassifierTask(settings), settings.resolve())
    opened = open_classifier(str(first))
    extractor = create_extractor(f"emov2:{first}")
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    logits = extractor.logits(extractor(images))
    torch.testing.assert_close(logits, opened.model(images / 127.5 - 1), atol=1e-4, rtol=1e-4)
    task = ClassifierTask(ClassifierSettings(
        **tiny, init_from=str(first), output_dir=str(tmp_path / "second"), train="head"
    ))  # fmt: skip
    assert all(torch.equal(value, opened.model.state_dict()[name]) for name, value in task.model.state_dict().items())
    assert {name for name, each in task.model.named_parameters() if each.requires_grad} == {"fc.weight", "fc.bias"}


def test_heads_of_two_layers_and_networks_without_linear_layers():
    distilled = create_model("timm:deit_tiny_distilled_patch16_224", num_classes=3, img_size=32, depth=1)
    assert head_of(distilled) == ["head.", "head_dist."]
    assert train_only(distilled, "head", head=head_of(distilled)).startswith("`train` head: 1,158 trainable")
    plain = create_model("timm:resnet10t", num_classes=3)
    with pytest.raises(InputError, match="no linear layers to adapt"):
        train_only(plain, "lora:4", head=head_of(plain))
