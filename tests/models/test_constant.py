from __future__ import annotations

import torch

from evaclip.models.constant import Constant

SOURCE = torch.tensor([1 / 3, 1e-8, 70_000.0])


def test_value_survives_casts_and_empty_allocation() -> None:
    constant = Constant(SOURCE)
    for move in (constant.bfloat16, constant.half, lambda: constant.to_empty(device="cpu"), constant.float):
        move()
        assert torch.equal(constant.value, SOURCE)
        assert constant.value.dtype == torch.float32


def test_value_is_right_after_a_detour_over_the_meta_device() -> None:
    constant = Constant(SOURCE).to("meta")
    assert constant.value.is_meta
    assert torch.equal(constant.to_empty(device="cpu").value, SOURCE)


def test_value_is_not_stored() -> None:
    assert not Constant(SOURCE).state_dict()


def test_writing_to_the_value_does_not_reach_the_source() -> None:
    constant = Constant(SOURCE.clone())
    constant.value.zero_()
    assert torch.equal(constant.to("cpu").value, SOURCE)
