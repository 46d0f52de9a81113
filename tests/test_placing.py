"""Weights are brought to a device, and so are the tables that are computed."""

import torch

from evaclip.config import ModelConfig
from evaclip.engine.placing import place
from evaclip.models.clip import CLIP, create_model
from evaclip.models.initial import draw

CONFIG = ModelConfig.model_validate({"name": "tiny-EVA02", "image": {"drop_path": 0.1}})


def on_meta():
    with torch.device("meta"):
        return CLIP(CONFIG)


def test_a_placed_model_is_the_one_that_is_made_at_once():
    clip, names = on_meta(), []

    def fill(name, parameter):
        names.append(name)
        draw(parameter, name, CONFIG, seed=3)

    place(clip, fill, torch.device("cpu"), torch.float32)
    expected = create_model(CONFIG, seed=3)
    assert sorted(names) == sorted(name for name, _ in expected.named_parameters())
    assert all(torch.equal(value, clip.get_parameter(name)) for name, value in expected.named_parameters())
    images = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    assert torch.equal(clip.image(images, torch.arange(2)), expected.image(images, torch.arange(2)))


def test_tables_follow_the_weights_to_their_device():
    clip = on_meta()
    assert {table.device.type for table in clip.buffers()} == {"cpu"}
    place(clip, lambda *_: None, torch.device("meta"), torch.bfloat16)
    tables = dict(clip.named_buffers())
    assert tables.keys() == {"image.pixels.value", "image.rope.value", "image.drop_path.value"}
    assert {table.device.type for table in tables.values()} == {"meta"}
    assert torch.bfloat16 not in {table.dtype for table in tables.values()}
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.bfloat16}
