"""One training step on a GPU launches work and waits for none of it."""

import pytest
import torch
from tiny import tiny_config

from evaclip.accumulation import forward_backward
from evaclip.anomalies import Anomalies
from evaclip.data.batch import Batch, PackedText
from evaclip.distributed import Ranks
from evaclip.engine import create_engine
from evaclip.loss import ContrastiveLoss
from evaclip.models.clip import create_model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optim", ["lamb", "adamw"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_step_waits_for_nothing(tmp_path, optim, pieces):
    ranks = Ranks(device=torch.device("cuda"))
    config = tiny_config(tmp_path, optim__name=optim, optim__clip_norm=1.0, train__precision="bf16")
    loss = ContrastiveLoss(config.loss, ranks.device)
    engine = create_engine(config, create_model(config.model, device=ranks.device), loss, ranks)
    anomalies = Anomalies(engine.towers.clip, engine.optimizer)
    captions = [[49406, *range(n + 1), 49407] for n in range(8)]
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    batches = [Batch(images, PackedText.pack(captions), torch.arange(8)).to(ranks.device)] * pieces
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first ones compile and allocate
        try:
            output = forward_backward(engine, loss, batches, ranks)
            engine.step(1.0, output.loss)
            anomalies.step(step, batches, output)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(engine.optimizer.updates) == 4
