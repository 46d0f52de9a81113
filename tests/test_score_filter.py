"""The CLIP-score filter, end to end: features of noisy pairs become a list of keys, and training takes only those."""

from pathlib import Path

import pages
from tiny import COLOURS, colour_records, tiny_config

from evaclip.data.shards import write_shards
from evaclip.history import load_history
from evaclip.train import train

RECORDS = 80
WRONG = {f"{number:06d}" for number in range(3, RECORDS, 5)}
"""Keys of the pairs whose caption names another colour."""


def noisy_records():
    names = list(COLOURS)
    for number, (key, members) in enumerate(colour_records(RECORDS)):
        said = names[(number + (key in WRONG)) % len(names)]
        yield key, {**members, "txt": f"a {said} square".encode()}


def test_a_trained_model_finds_the_wrong_captions_and_training_goes_on_without_them(tmp_path: Path) -> None:
    write_shards(tmp_path / "clean", colour_records(64), 32)
    write_shards(tmp_path / "noisy", noisy_records(), 40)
    options = {"train__steps": 80, "train__global_batch": 32, "optim__lr": 3e-3, "checkpoint__every_steps": 80}
    train(tiny_config(tmp_path / "first", {"shards": f"{tmp_path}/clean/{{00000..00001}}.tar"}, **options))

    shards, keys = f"{tmp_path}/noisy/{{00000..00001}}.tar", tmp_path / "keys.txt"
    share = 1 - len(WRONG) / RECORDS
    pages.furnish(tmp_path)
    pages.run(f"evaclip embed first '{shards}' features", tmp_path)
    pages.run(f"python tools/select_keys.py features --top-fraction {share} --output keys.txt", tmp_path)
    assert set(keys.read_text().split()) == {key for key, _ in colour_records(RECORDS)} - WRONG

    train(tiny_config(tmp_path / "second", {"shards": shards, "filter": {"keys": str(keys)}}, train__steps=4))
    last = load_history(tmp_path / "second/metrics.jsonl")[-1]
    assert last["data/delivered/tiny"] == 64  # 4 steps of 16: exactly one pass over the right pairs
    assert last["data/filtered/tiny"] == len(WRONG)
