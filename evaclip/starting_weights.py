"""The weights that a run starts or goes on with: of its checkpoint, of other people's files, or drawn.

They are set one parameter at a time, because under ZeRO-3 no rank ever holds all of them (``engine.placing``).
"""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evaclip.data.order import hash64, name_hash
from evaclip.distributed import Ranks, agreed
from evaclip.errors import EvaclipError, WeightsError
from evaclip.freezing import FrozenPiece, frozen_pieces, require_filled
from evaclip.heartbeat import beat
from evaclip.models.initial import draw
from evaclip.models.vision import ImageTower
from evaclip.weights.files import is_of_timm, require_timm_name
from evaclip.weights.load import Values, find_initial

if TYPE_CHECKING:
    from evaclip.checkpoint import CheckpointReader
    from evaclip.config import InitConfig, RunConfig
    from evaclip.loss import ContrastiveLoss
    from evaclip.models.clip import CLIP

log = logging.getLogger(__name__)


def require_files(init: InitConfig, ranks: Ranks) -> None:
    """Refuse a wrong path before shards are indexed for hours."""
    with agreed(ranks):
        for path in (init.image, init.text, init.model):
            if path and is_of_timm(path):
                require_timm_name(path)
            elif path and not Path(path).exists():
                raise WeightsError(f"init: {path} does not exist")


class StartingWeights:
    """Sets the parameters of a run's towers; the loss's scalars are set at once.

    Args:
        config: Seed, model, and ``init``, which a run that is continued does not look at.
        clip: On the meta device: only names and shapes matter. A tower of timm gets its memory and weights at once.
        loss: Its scalars.
        reader: The checkpoint to go on from.
        ranks: All of them read the same.

    Attributes:
        frozen: This rank's share of the weights that do not learn, once they have been set.

    Raises:
        CheckpointError: The checkpoint is of another model.
        WeightsError: A file cannot be read, does not hold what the model needs, or leaves frozen weights random.
    """

    def __init__(
        self, config: RunConfig, clip: CLIP, loss: ContrastiveLoss, reader: CheckpointReader | None, ranks: Ranks
    ) -> None:
        self._config, self._reader, self._ranks = config, reader, ranks
        self._found: Values = {}
        self._foreign = not isinstance(clip.image, ImageTower)
        if not isinstance(clip.image, ImageTower):  # whose tables come with its weights
            clip.image.to_empty(device=ranks.device).initialise(hash64(config.seed, name_hash("image")))
        self._sums: list[Tensor] = []
        self._failed: EvaclipError | OSError | None = None
        with agreed(ranks):
            if reader:
                named = chain(clip.named_parameters(), loss.named_parameters())
                reader.require_shapes({name: list(parameter.shape) for name, parameter in named})
                for name, parameter in loss.named_parameters():
                    reader.load(name, parameter)
            else:
                self._found = self._find(clip, loss)
        self.frozen: list[FrozenPiece] = frozen_pieces(loss.named_parameters(), ranks)

    def _find(self, clip: CLIP, loss: ContrastiveLoss) -> Values:
        """Look for a new run's weights in what ``init`` names, and tell the log about every key."""
        reports, found = find_initial(self._config.init, clip, loss, self._config.loss.max_logit_scale)
        for line in chain.from_iterable(report.lines() for report in reports) if self._ranks.is_main else ():
            log.info("initial weights: %s", line)
        require_filled(clip, reports)
        statistics = [n for n, _ in clip.named_parameters() if n.endswith(".running_var") and n not in found]
        if statistics and self._ranks.is_main:
            log.warning(
                "batch norms use fixed statistics, and init has none for %s and %d more: they start as mean 0 and "
                "variance 1, which normalises nothing; give init.image weights of this backbone",
                statistics[0],
                len(statistics) - 1,
            )
        return found

    def fill(self, name: str, parameter: nn.Parameter) -> None:
        """Set a parameter of ``CLIP`` that is allocated in fp32; what fails is told by ``require_set``.

        Under ZeRO-3 other ranks wait for this parameter, so a rank that cannot read it goes on with zeros till then.
        """
        beat()  # together they may take an hour
        try:
            self._fill(name, parameter)
        except (EvaclipError, OSError) as error:
            self._failed = self._failed or error
            parameter.data.zero_()
        self.frozen += frozen_pieces([(name, parameter)], self._ranks)

    def _fill(self, name: str, parameter: nn.Parameter) -> None:
        if self._reader:
            self._reader.load(name, parameter)
        elif name in self._found:
            parameter.copy_(self._found[name]())
            self._sums.append(parameter.detach().view(torch.int32).sum(dtype=torch.int64))
        elif not (self._foreign and name.startswith("image.")):
            draw(parameter, name, self._config.model, self._config.seed)

    def require_set(self) -> None:
        """Refuse to start where a rank could not read its weights, or ranks have read different bits; a gather of each.

        Raises:
            WeightsError: They have, or a file holds infinities or NaN.
            CheckpointError: The checkpoint is incomplete.
        """
        with agreed(self._ranks):
            if self._failed:
                raise self._failed
        own = hash(tuple(torch.stack(self._sums).tolist())) if self._sums else 0
        with agreed(self._ranks):
            if len(set(self._ranks.gather_objects(own))) > 1:
                raise WeightsError("the ranks read different initial weights; give a path that all nodes see, at rest")
