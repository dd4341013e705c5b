"""Error feedback: nothing is lost for good, only late."""

import pytest
import torch

from autoflip import MaskSet, codec


def updates(rounds):
    g = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        yield {
            "w": torch.randn(40, 50, generator=g) * 1e-2,
            "b": torch.randn(50, generator=g),
            "n": torch.tensor(3),
        }


MASKS = MaskSet({"w": torch.rand(40, 50, generator=torch.Generator().manual_seed(1)) < 0.3})


@pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("top", [1.0, 0.1])
@pytest.mark.parametrize("masks", [None, MASKS], ids=["explicit", "masked"])
def test_what_was_sent_and_what_is_left_add_up(values, top, masks):
    feedback, sent, all_of_it = codec.Feedback(), None, None
    for delta in updates(20):
        got = codec.decode(feedback.encode(delta, masks=masks, values=values, top=top), masks=masks)
        delta["w"] = delta["w"] * masks["w"] if masks else delta["w"]
        sent = {n: t + sent[n] if sent else t.clone() for n, t in got.items()}
        all_of_it = {n: t + all_of_it[n] if all_of_it else t for n, t in delta.items()}
    for name in ("w", "b"):
        # twenty float32 sums of numbers below 20
        torch.testing.assert_close(sent[name] + feedback.residual[name], all_of_it[name], rtol=0, atol=1e-5)
    assert "n" not in feedback.residual
    assert got["n"] == 3
    if masks:
        assert not feedback.residual["w"][~masks["w"]].any()
    if top == 1:  # half a step of the largest block, never more
        step = {"bf16": 2**-8, "int8": 1 / 127, "int4": 1 / 7}[values]
        assert float(feedback.residual["w"].abs().max()) <= 0.51 * step * 0.06
    else:
        assert int((got["w"] != 0).sum()) <= round(top * (masks.kept if masks else 2000))


def test_feedback_beats_rounding_alone_over_rounds():
    """Int4 of an entry that is always small beside its block: to the nearest it would never arrive."""
    delta = {"w": torch.full((1, 256), 1e-3)}
    delta["w"][0, 0] = 1.0
    feedback, total, plain = codec.Feedback(), torch.zeros(1, 256), torch.zeros(1, 256)
    for _ in range(200):
        total += codec.decode(feedback.encode(delta))["w"]
        plain += codec.decode(codec.encode(delta, values="int4", rounding="nearest"))["w"]
    assert not plain[0, 1:].any()
    assert float((total[0, 1:] - 0.2).abs().max()) <= 0.5 / 7 + 1e-5  # what has not arrived is below half a step


@pytest.mark.parametrize("served", ["auto", "reference"])
def test_nearest_is_nearest(served, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", served)
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    for values, tol in (("int8", 0.5 / 127), ("int4", 0.5 / 7)):
        got = codec.decode(codec.encode({"x": x}, values=values, rounding="nearest"))["x"]
        assert float((got - x).abs().max()) <= tol * float(x.abs().max()) * (1 + 1e-6)
    got = codec.decode(codec.encode({"x": x}, values="bf16", rounding="nearest"))["x"]
    assert torch.equal(got, x.to(torch.bfloat16).float())  # no ties in this data
    blobs = {codec.encode({"x": x}, values="int8", rounding="nearest", seed=s) for s in (1, 2)}
    assert len(blobs) == 1  # no key has a part in it


def test_errors_leave_the_residual_alone():
    feedback = codec.Feedback()
    delta = next(updates(1))
    feedback.encode(delta)
    before = {n: t.clone() for n, t in feedback.residual.items()}
    for wrong, message in [
        ({"values": "int3"}, "wanted one of fp32"),
        ({"top": 0.0}, "wanted a share above 0"),
        ({"rounding": "stochastic"}, "leave it out"),
    ]:
        with pytest.raises(ValueError, match=message):
            feedback.encode(delta, **wrong)
    with pytest.raises(ValueError, match="start a new Feedback"):
        feedback.encode({"w": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="NaN or infinite"):
        feedback.encode(delta | {"w": delta["w"] / 0})
    assert all(torch.equal(feedback.residual[n], t) for n, t in before.items())
    again = codec.Feedback(feedback.residual)
    assert again.encode(delta) == feedback.encode(delta)


def test_what_is_left_over_waits_for_an_update_that_has_its_name():
    feedback = codec.Feedback()
    a, b = {"a": torch.tensor([[0.4, 1.0]])}, {"b": torch.tensor([[0.3, 1.0]])}
    feedback.encode(a | b)
    left = feedback.residual["a"].clone()
    assert left.any()
    feedback.encode(b)
    assert torch.equal(feedback.residual["a"], left)
    again = codec.Feedback({"a": left})
    assert feedback.encode(a) == again.encode(a)
    assert set(feedback.residual) == {"a", "b"}


def test_of_equal_magnitudes_the_first_travel():
    delta = {"u": torch.ones(4, 5), "b": torch.ones(3), "v": -torch.ones(2, 10)}
    delta["v"][1, 3] = -2.0
    got = codec.decode(codec.Feedback().encode(delta, values="fp32", top=0.2))
    assert got["u"].flatten().nonzero().flatten().tolist() == list(range(7))
    assert got["v"].nonzero().tolist() == [[1, 3]]
    assert got["b"].all()
    delta["v"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="'v' has 1 entries of 20 that are NaN"):
        codec.Feedback().encode(delta, values="fp32", top=0.2)
