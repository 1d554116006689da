import pytest
import torch
from torch import nn

from d_emo.ema import EMA


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def test_ema_equals_its_closed_form_for_parameters_and_float_buffers():
    model = small()
    ema = EMA(model, decay=0.9)
    history = [{k: v.clone() for k, v in model.state_dict().items()}]
    for _ in range(7):
        model(torch.randn(16, 3).double())  # moves the running statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model)
        history.append({k: v.clone() for k, v in model.state_dict().items()})
    averaged = ema.model.state_dict()
    for name in ("0.weight", "1.bias", "1.running_mean", "1.running_var"):
        closed = 0.9**7 * history[0][name] + sum(0.1 * 0.9 ** (7 - k) * history[k][name] for k in range(1, 8))
        torch.testing.assert_close(averaged[name], closed, rtol=1e-12, atol=1e-12)
    assert averaged["1.num_batches_tracked"].item() == 7
    assert not torch.allclose(averaged["1.running_mean"], torch.zeros(4).double())


def test_warm_up_lets_the_average_follow_at_first():
    model = small()
    ema = EMA(model, decay=0.9999, warmup=True)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    start = ema.model[0].weight.clone()
    ema.update(model)
    torch.testing.assert_close(ema.model[0].weight, 0.1 * start + 0.9)


def test_average_is_in_eval_mode_and_needs_the_same_tensors():
    ema = EMA(small())
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
    with pytest.raises(ValueError, match="extra"):
        wider = small()
        wider.register_buffer("extra", torch.zeros(1))
        ema.update(wider)


def test_state_round_trip_keeps_the_step():
    model, ema = small(), EMA(small(), warmup=True)
    ema.update(model)
    other = EMA(small(), warmup=True)
    other.load_state_dict(ema.state_dict())
    assert other.step == 1
    torch.testing.assert_close(other.model.state_dict(), ema.model.state_dict())


@pytest.mark.parametrize(("decay", "warmup", "steps"), [
    (0.9999, False, 60), (0.9, False, 60), (0.9999, True, 9), (0.15, True, 3),
])  # fmt: skip
def test_the_share_of_the_start_is_what_the_average_kept_of_it(decay, warmup, steps):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    ema = EMA(model, decay, warmup=warmup)
    nn.init.zeros_(model.weight)
    for _ in range(steps):
        ema.update(model)
    assert ema.start_share == pytest.approx(ema.model.weight.item(), rel=1e-9)
    advice = ema.advice()
    assert (advice is not None) == (ema.start_share > 0.05) == (decay == 0.9999 and not warmup)
    if steps == 60 and advice:
        assert "to 99.4 % those before training" in advice and "`ema_warmup`, or `ema_decay` 0.8333" in advice
        assert EMA(model, 1 - 10 / steps).decay ** steps < 1e-4, "what it says would have helped"
