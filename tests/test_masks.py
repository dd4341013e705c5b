"""A MaskSet never changes: neither through what went in nor through what comes out."""

import pytest
import torch

from autoflip import MaskSet, codec


def mask(*bits):
    return torch.tensor(bits, dtype=torch.bool)


def test_written_masks_change_nothing():
    given = mask(1, 1, 0)
    masks = MaskSet({"w": given})
    twin, print_ = MaskSet({"w": given}), masks.fingerprint()
    given[0] = False
    masks["w"][0] = False
    masks.get("w")[0] = False
    next(iter(masks.values()))[0] = False
    dict(masks)["w"][0] = False
    assert masks["w"].tolist() == [True, True, False]
    assert masks == twin
    assert MaskSet(masks).fingerprint() == print_
    blob = codec.encode({"w": torch.ones(3)}, masks=masks, values="fp32")
    assert codec.decode(blob, masks=twin)["w"].tolist() == [1, 1, 0]


def test_and_keeps_what_both_keep():
    both = MaskSet({"a": mask(1, 1, 0), "b": mask(1)}) & MaskSet({"a": mask(0, 1, 1), "c": mask(0)})
    assert {n: m.tolist() for n, m in both.items()} == {"a": [False, True, False], "b": [True], "c": [False]}
    with pytest.raises(ValueError, match=r"shape \(3,\) on the left and \(1,\) on the right"):
        MaskSet({"a": mask(1, 1, 0)}) & MaskSet({"a": mask(1)})


def test_masks_from_inference_mode_train():
    with torch.inference_mode():
        masks = MaskSet({"w": mask(1, 0)})
    assert not masks["w"].is_inference()
    with torch.inference_mode():
        assert not masks["w"].is_inference()


@pytest.mark.parametrize("wrong", [None, [mask(1)], mask(1), 3], ids=["None", "list", "tensor", "int"])
def test_what_is_no_mapping_is_refused(wrong):
    with pytest.raises(ValueError, match=f"masks is a {type(wrong).__name__}, wanted a mapping from tensor name"):
        MaskSet(wrong)
    with pytest.raises(ValueError, match=f"the right of & is a {type(wrong).__name__}, wanted a MaskSet"):
        MaskSet({}) & wrong


def test_entries_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match=r"'w' is torch.float32, wanted a torch.bool tensor"):
        MaskSet({"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"0 is no name"):
        MaskSet({0: mask(1)})
    with pytest.raises(ValueError, match=r"there is no tensor 'w' in this model; it has v"):
        MaskSet({"w": mask(1)}).check({"v": torch.ones(1)})
