"""Parts of towers that do not learn, in one process; ``distributed/test_freezing`` has several and all engines."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_accumulation import batches
from tiny import SYNTHETIC, tiny_config

from evaclip.checkpoint import CheckpointReader, find_checkpoint
from evaclip.distributed import Ranks
from evaclip.engine.prepare import prepare
from evaclip.errors import WeightsError
from evaclip.freezing import freeze, frozen_pieces
from evaclip.models.clip import create_model
from evaclip.run import open_run
from evaclip.train import train

CPU = torch.device("cpu")


def weights(run):
    return CheckpointReader(find_checkpoint(run)).weights()


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A run whose weights the others start from."""
    folder = tmp_path_factory.mktemp("freezing") / "origin"
    train(tiny_config(folder, train__steps=2))
    return folder


def frozen(origin, image, text, **changes):
    return {"init__model": str(origin), "optim__image__freeze": image, "optim__text__freeze": text, **changes}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_below_what_learns_there_is_no_graph(checkpointing):
    config = tiny_config("unused", **frozen("unused", 1, "all", train__activation_checkpointing=checkpointing))
    clip = create_model(config.model)
    freeze(clip, config.optim)
    towers = prepare(clip, config.train, CPU)
    graph, saved = [], []
    for block in (*clip.image.blocks, *clip.text.blocks):
        block.register_forward_hook(
            lambda _, inputs, output: graph.append((inputs[0].requires_grad, output.requires_grad))
        )
    (batch,) = batches(1)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        text = towers.encode_text(batch.text)
        assert not saved
        image = towers.encode_image(batch.images)
    assert saved
    assert graph == [(False, False)] * 2 + [(False, False), (False, True)]
    assert (image.requires_grad, text.requires_grad) == (True, False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_keep_every_frozen_element_once_and_in_equal_shares(world_size):
    config = tiny_config("unused", **frozen("unused", "all", 1))
    clip = create_model(config.model)
    freeze(clip, config.optim)
    found, sizes = {}, []
    for rank in range(world_size):
        pieces = frozen_pieces(clip.named_parameters(), Ranks(rank, world_size))
        sizes.append(sum(len(piece.weight) for piece in pieces))
        for piece in pieces:
            found.setdefault(piece.name, []).append(piece)
    for name, parameter in clip.named_parameters():
        assert (name in found) == (not parameter.requires_grad)
        if name in found:
            assert torch.equal(torch.cat([piece.weight for piece in found[name]]), parameter.detach().view(-1))
            starts = [piece.start for piece in found[name]]
            assert starts == [sum(len(piece.weight) for piece in found[name][:n]) for n in range(len(starts))]
    assert max(sizes) - min(sizes) <= len(found)  # of each tensor one element at most


def test_shares_are_copies():
    config = tiny_config("unused", **frozen("unused", "all", 0))
    clip = create_model(config.model)
    freeze(clip, config.optim)
    pieces = {piece.name: piece for piece in frozen_pieces(clip.named_parameters(), Ranks())}
    before = clip.image.head.weight.detach().clone()
    clip.to(torch.bfloat16)
    assert torch.equal(pieces["image.head.weight"].weight, before.view(-1))


def test_frozen_weights_keep_32_bits_through_16_bit_training(tmp_path, origin):
    options = frozen(origin, "all", 1)
    train(tiny_config(tmp_path, **options, train__precision="bf16_weights"))
    start, saved = weights(origin), weights(tmp_path)
    config = tiny_config(tmp_path, **options, train__precision="bf16_weights", train__steps=5)
    run = open_run(config, Ranks())
    used = dict(run.engine.towers.clip.named_parameters())
    names = [name for name, parameter in used.items() if not parameter.requires_grad]
    assert {name for name in start if torch.equal(start[name], saved[name])} == set(names)
    assert all(torch.equal(used[name], start[name].bfloat16()) for name in names)
    run.writer.leave()
    train(tiny_config(tmp_path, **options, train__precision="fp32", train__steps=6))
    assert all(torch.equal(weights(tmp_path)[name], start[name]) for name in names)


def test_a_frozen_run_continues_bitwise(tmp_path, origin):
    options = frozen(origin, 1, "all", train__micro_batch=8, optim__name="lamb")
    for name in ("straight", "broken"):
        train(tiny_config(tmp_path / name, **options))
    shutil.rmtree(tmp_path / "broken/checkpoints/step_00000004")
    train(tiny_config(tmp_path / "broken", **options))
    straight, broken = weights(tmp_path / "straight"), weights(tmp_path / "broken")
    assert all(torch.equal(straight[name], broken[name]) for name in straight)


def test_the_log_says_what_is_frozen_of_each_tower(tmp_path, origin):
    train(tiny_config(tmp_path, **frozen(origin, "all", 1, loss__learn_logit_scale=False), train__steps=1))
    log = (tmp_path / "log.txt").read_text().splitlines()
    told = [line.partition("optimizer:")[2].split() for line in log if " frozen " in line]
    shapes = CheckpointReader(find_checkpoint(tmp_path)).state.shapes
    image = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith("image."))
    assert told[0] == ["image", "frozen", "42", "tensors", f"{image:,d}", "parameters"]
    assert [line[:3] for line in told[1:]] == [["text", "frozen", "14"], ["logit_scale", "frozen", "1"]]


def test_weights_that_no_checkpoint_holds_are_not_frozen_at_random(tmp_path, origin):
    without = {n: v for n, v in weights(origin).items() if n.startswith("image.") and ".head." not in n}
    save_file(without, tmp_path / "tower.safetensors")
    options = {"init__image": str(tmp_path / "tower.safetensors"), "train__steps": 1}
    expected = r"does not hold image\.head\.weight and 1 more, which optim\.image\.freeze would keep at random"
    with pytest.raises(WeightsError, match=expected):
        train(tiny_config(tmp_path / "all", SYNTHETIC, **options, optim__image__freeze="all"))
    train(tiny_config(tmp_path / "blocks", SYNTHETIC, **options, optim__image__freeze=2))
