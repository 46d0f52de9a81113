"""Options of a suite: many evaluation sets under one root, averages over them, and what was published for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from evaclip.config.base import FilePath, Name, Section, tagged
from evaclip.config.data import LinearProbeDataset, RetrievalDataset, ZeroShotDataset
from evaclip.metrics import EVAL_METRICS


class SuiteZeroShot(ZeroShotDataset):
    """A classification set of a suite."""

    metric: Literal["top1", "mean_per_class", "mean_top1_top5"] = "top1"
    """The set's value in averages: top1, the mean of the classes' own top1, or the mean of top1 and top5 (Kinetics)."""
    records: PositiveInt | None = None
    """Records that published values were measured on; a set of another size is marked."""


class SuiteLinearProbe(LinearProbeDataset):
    """A set of a suite that is classified by a probe."""

    metric: Literal["top1", "mean_per_class"] = "top1"
    """The set's value in averages: top1, or the mean of the classes' own top1."""
    records: PositiveInt | None = None
    """Records that published values were measured on; a set of another size is marked."""


class SuiteRetrieval(RetrievalDataset):
    """A retrieval set of a suite; its value in averages is the mean of its six recalls."""

    records: PositiveInt | None = None
    """Records that published values were measured on; a set of another size is marked."""


SuiteDataset = Annotated[
    SuiteZeroShot | SuiteLinearProbe | SuiteRetrieval, Field(discriminator="task"), tagged("task", "zero_shot")
]


class Average(Section):
    """The mean of some sets' values; it has a value only if every set has one."""

    of: tuple[Name, ...] = Field(min_length=1)
    """Names of the sets."""
    gap_from: Name | None = None
    """A set whose value minus the average is given as the gap (robustness: how much is lost away from ImageNet)."""


class Published(Section):
    """Values of one model from one source."""

    source: str
    """Where they were read."""
    values: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(min_length=1)
    """SET, SET.METRIC or AVERAGE -> percent; a set without a metric means its value in averages."""


class SuiteConfig(Section):
    """What ``evaclip evaluate --suite`` measures. Paths are relative to ``root``."""

    root: FilePath
    """Folder of the sets."""
    resizes: tuple[Literal["crop", "squash"], ...] = ()
    """How images become squares: each of these is measured and the best value counts; empty: as the model says.
    A set's own ``resize`` goes first."""
    datasets: dict[Name, SuiteDataset] = Field(min_length=1)
    """Name -> set. One whose path does not exist is listed as missing."""
    averages: dict[Name, Average] = Field(default={})
    """Name -> mean of some sets."""
    published: dict[str, tuple[Published, ...]] = Field(default={})
    """Name of a model -> values that its results are compared with."""

    @model_validator(mode="after")
    def _names_are_known(self) -> SuiteConfig:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if both := sorted(self.datasets.keys() & self.averages):
            yield f"averages.{both[0]} has the name of a set; rename one of them"
        for name, average in self.averages.items():
            if twice := sorted({member for member in average.of if average.of.count(member) > 1}):
                yield f"averages.{name} names the set {twice[0]} more than once; a mean counts each set once"
            for member in (*average.of, *([average.gap_from] if average.gap_from else [])):
                if member not in self.datasets:
                    yield f"averages.{name} names the set {member}, which is not in datasets; add it there"
        for model, rows in self.published.items():
            for key in (key for row in rows for key in row.values):
                name, _, metric = key.rpartition(".")
                known = name in self.datasets and metric in EVAL_METRICS[self.datasets[name].task]
                if key not in self.datasets and key not in self.averages and not known:
                    yield f"published.{model}: {key} is no set, average or SET.METRIC of this suite; correct its name"
