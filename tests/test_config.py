import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import SYNTHETIC, merged, tiny_tree

from evaclip import config_file
from evaclip.config import AdamWConfig, LambConfig, RunConfig, TimmTowerConfig
from evaclip.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]
MINIMAL = {"run_dir": "r", "data": {"sources": {"s": SYNTHETIC}}, "train": {"steps": 10, "global_batch": 8}}


@pytest.fixture
def load(tmp_path):
    """Write a tree as YAML, with changes, and load it with overrides."""

    def write_and_load(*overrides, text=None, **changes):
        path = tmp_path / "config.yaml"
        path.write_text(text if text is not None else yaml.safe_dump(merged(tiny_tree("r", SYNTHETIC), **changes)))
        return config_file.load(path, overrides)

    return write_and_load


def test_omitted_keys_take_documented_defaults():
    config = config_file.validate(MINIMAL, "test")
    assert isinstance(config.optim, LambConfig)
    assert (config.engine.name, config.train.precision, config.data.workers) == ("torch", "bf16", 4)


def test_every_option_has_a_documentation():
    assert [option.path for option in config_file.options() if not option.doc] == []


def test_help_names_every_key_that_a_resolved_configuration_has():
    known = {option.path for option in config_file.options()}
    for path in config_file.flatten(config_file.validate(MINIMAL, "test")):
        generic = path.replace("sources.s.", "sources.NAME.")
        if path == "eval.datasets":  # empty here; a section with names of its own
            continue
        assert any(generic == name or generic.startswith(f"{name}.") for name in known), path


def test_configuration_survives_its_own_dump():
    config = config_file.validate(tiny_tree("r", {"shards": ["a.tar", "b.tar"], "captions": {"json.c": 1.0}}), "test")
    assert config_file.validate(yaml.safe_load(config_file.dump(config)), "again") == config


def test_all_problems_are_reported_at_once_with_path_value_and_suggestion(load):
    with pytest.raises(ConfigError) as caught:
        load(
            "train.precision=bf17",
            train__global_bach=3,
            model__image__depth=-1,
            model__imge={},
            data__sources__tiny__num_records=0,
            optim__lr="fast",
        )
    lines = str(caught.value).splitlines()
    assert "6 problems" in lines[0]
    text = "\n".join(lines[1:])
    assert "model.image.depth: Input should be greater than 0 (got -1)" in text
    assert "model.imge: unknown key; did you mean model.image?" in text
    assert "train.global_bach: unknown key; did you mean train.global_batch?" in text
    assert "data.sources.tiny.num_records: Input should be greater than 0 (got 0)" in text
    assert "train.precision: Input should be 'bf16', 'bf16_weights', 'fp16' or 'fp32' (got 'bf17')" in text
    assert "optim.lr: Input should be a valid number" in text


def test_repeated_keys_are_an_error(load):
    with pytest.raises(ConfigError, match=r"line 3: repeated key steps"):
        load(text="run_dir: r\ntrain:\n  steps: 1\n  steps: 2\n")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1E5", 1e5), ("2.5e+2", 250.0), (".5", 0.5), ("-3e2", -300.0)]
)
def test_numbers_in_scientific_notation_are_numbers(text, value):
    assert config_file.parse_yaml(text) == value


@pytest.mark.parametrize("word", ["off", "on", "yes", "no"])
def test_words_that_yaml_takes_for_booleans_stay_words(word):
    assert config_file.parse_yaml(word) == word


def test_overrides_are_applied_in_order_and_parsed_as_yaml(load):
    config = load("train.steps=20", "train.steps=30", "optim.betas=[0.5, 0.6]", "log.wandb.mode=off")
    assert config.train.steps == 30
    assert config.optim.betas == (0.5, 0.6)
    assert config.log.wandb.mode == "off"


def test_a_profile_behind_the_last_step_is_refused(load):
    with pytest.raises(ConfigError, match=r"profile\.start_step 5 lies behind train\.steps 4"):
        load("profile.start_step=5")
    assert load("profile.start_step=4").profile.num_steps == 3


@pytest.mark.parametrize("item", ["train.steps", "=3"])
def test_malformed_overrides_are_refused(load, item):
    with pytest.raises(ConfigError, match=r"is not of the form section\.key=value"):
        load(item)


def test_override_into_a_value_is_refused(load):
    with pytest.raises(ConfigError, match="run_dir is not a section in the file"):
        load("run_dir.x=1")


def test_kind_of_a_section_can_be_overridden(load):
    assert isinstance(load("optim.name=adamw").optim, AdamWConfig)
    assert load("engine.name=deepspeed", "engine.zero_stage=2").engine.zero_stage == 2


def test_environment_expands_in_paths_and_missing_names_are_errors(load, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOT_THERE", raising=False)
    assert load("run_dir=${SCRATCH}/run").run_dir == "/scratch/me/run"
    with pytest.raises(ConfigError, match=r"run_dir: environment variable NOT_THERE is not set"):
        load("run_dir=${NOT_THERE}/run")


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("${NOT_THERE}/0.tar", "environment variable NOT_THERE is not set"),
        ("s3://bucket/${MY_API_KEY}/0.tar", "MY_API_KEY sounds like a secret, and would be written into config.yaml"),
        ("https://me:word@host/0.tar", "a name or password in a URL would be written into config.yaml"),
        ("ftp://host/0.tar", "only paths and http, https, s3, gs URLs are read"),
        ("/data/*.tar", "wildcards are not expanded"),
        (5, "should be a valid tuple"),
    ],
)
def test_a_wrong_pattern_of_shards_is_one_problem(load, monkeypatch, shards, message):
    monkeypatch.delenv("NOT_THERE", raising=False)
    with pytest.raises(ConfigError, match=r"one problem\n  data\.sources\.\w+\.shards") as refused:
        load(data__sources={"tiny": {"shards": shards}})
    assert message in str(refused.value)


@pytest.mark.parametrize("shards", ["pipe:cat x.tar", "file:///x.tar", "github://x/x.tar"])
def test_pipes_and_unknown_urls_are_refused(load, shards):
    with pytest.raises(ConfigError, match="only paths and http, https, s3, gs URLs are read"):
        load(data__sources__tiny={"shards": shards})


def test_named_models_give_defaults_that_other_keys_override():
    model = {"name": "EVA02-B-16", "image": {"depth": 3}, "embed_dim": 7}
    config = config_file.validate({**MINIMAL, "model": model}, "test").model
    assert (config.name, config.embed_dim, config.image.depth, config.image.mlp_width) == (
        "EVA02-CLIP-B-16",
        7,
        3,
        2048,
    )


def test_an_image_tower_without_a_kind_is_one_of_eva(load):
    config = load(model__image={"depth": 3})  # as configurations were written before there were other kinds
    assert (config.model.image.kind, config.model.image.depth) == ("eva", 3)
    assert config == load(model__image={"depth": 3, "kind": "eva"})


def test_a_tower_of_timm_is_given_by_name(load):
    config = load(model__image={"kind": "timm", "model": "vit_tiny_patch16_224"})
    assert config.model.image == TimmTowerConfig(kind="timm", model="vit_tiny_patch16_224")
    assert config_file.validate(yaml.safe_load(config_file.dump(config)), "again") == config
    with pytest.raises(ConfigError, match=r"model\.image\.model: Field required\n  model\.image\.depth: unknown key"):
        load(model__image={"kind": "timm", "depth": 3})


def test_a_named_model_keeps_its_own_image_tower(load):
    with pytest.raises(ConfigError, match="EVA02-CLIP-B-16 has an image tower of its own"):
        load(model={"name": "EVA02-B-16", "image": {"kind": "timm", "model": "vit_tiny_patch16_224"}})


def test_unknown_model_names_are_refused_with_the_list():
    with pytest.raises(ConfigError, match=r"no model is named 'ViT-X'; there are EVA01-CLIP-B-16"):
        config_file.validate({**MINIMAL, "model": {"name": "ViT-X"}}, "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__slots": 5}, r"data\.slots 5 does not divide train\.global_batch 16"),
        ({"schedule__warmup_steps": 4}, r"warmup_steps 4 leaves nothing of train\.steps 4"),
        (
            {"schedule__shape": "constant", "schedule__warmup_samples": 17, "schedule__cooldown_steps": 2},
            r"warmup_steps 2 and cooldown_steps 2 leave nothing of train\.steps 4",
        ),
        ({"schedule__warmup_steps": 1, "schedule__warmup_samples": 16}, "say the same; give one of them"),
        ({"schedule__cooldown_steps": 1}, "a cosine falls to final_fraction by itself"),
        ({"schedule__shape": "constant", "schedule__final_fraction": 0.1}, "never reached by shape constant"),
        ({"schedule__shape": "inverse_sqrt"}, "falls from the end of its warm-up on; give warmup_steps"),
        ({"train__samples": 1000}, r"train\.samples 1000 are 63 steps, but train\.steps is 4; set it to null"),
        (
            {"engine__name": "deepspeed", "engine__zero_stage": 3, "train__compile": True},
            "compile breaks ZeRO-3's fetching",
        ),
        ({"eval__every_steps": 5}, r"eval\.every_steps is set, but eval\.datasets is empty"),
        ({"checkpoint__keep_best": "eval/digits/top1"}, "is no metric of eval.datasets; there are none"),
        (
            {"optim__ema_decay": 0.9, "eval__datasets": {name: {"path": "x"} for name in ("a", "a.ema")}},
            "eval.datasets has a.ema, the name of a under optim.ema_decay; rename it",
        ),
        (
            {"checkpoint__keep_best": "eval/d/top", "eval__datasets": {"d": {"path": "p"}}},
            "eval/d/top is no metric of eval.datasets; there are eval/d/top1, eval/d/top5, eval/d/mean_per_class",
        ),
        (
            {
                "checkpoint__keep_best": "eval/d/top1",
                "checkpoint__every_steps": 3,
                "eval__datasets": {"d": {"path": "p"}},
                "eval__every_steps": 2,
            },
            r"one of checkpoint\.every_steps 3 and eval\.every_steps 2 must be a multiple of the other",
        ),
        ({"optim__name": "lamb", "optim__weight_decay": 0.0}, "would be plain Adam"),
        (
            {"optim__image__freeze": 3, "init__image": "w"},
            r"optim\.image\.freeze 3 is more than the 2 blocks of the image tower; give at most 2, or all",
        ),
        (
            {"optim__text__freeze": 1, "init__image": "w"},
            r"optim\.text\.freeze 1 would freeze weights drawn at random; give init\.text or init\.model",
        ),
        (
            {"optim__image__freeze": "all", "optim__text__freeze": "all", "init__model": "w"},
            r"optim\.image\.freeze all and optim\.text\.freeze all leave nothing to learn; lower one of them",
        ),
        ({"model__image__patch_size": 5}, "image_size 16 is not a multiple of patch_size 5"),
        ({"model__image__heads": 5}, "width 32 is not a multiple of heads 5"),
        ({"model__image__heads": 16}, "rope needs a head width divisible by 4, not 2"),
        ({"loss__logit_scale": 200.0}, r"logit_scale 200\.0 is above max_logit_scale 100\.0"),
        ({"data__augment__crop_scale": [1.0, 0.5]}, r"crop_scale \[1\.0, 0\.5\] must ascend"),
        ({"eval__datasets": {"../x": {"path": "p"}}}, "String should match pattern"),
    ],
)
def test_rules_between_keys_explain_themselves(changes, message):
    tree = merged(tiny_tree("r", SYNTHETIC), **changes)
    if changes.get("optim__name") == "lamb":
        tree["optim"] = {"name": "lamb"} | ({"weight_decay": 0.0} if "optim__weight_decay" in changes else {})
    with pytest.raises(ConfigError, match=message):
        config_file.validate(tree, "test")


def test_weight_decay_of_a_frozen_tower_is_none():
    optim = {"name": "lamb", "weight_decay": 0.0, "image": {"weight_decay": 0.1, "freeze": "all"}}
    with pytest.raises(ConfigError, match="would be plain Adam"):
        config_file.validate({**MINIMAL, "init": {"image": "w"}, "optim": optim}, "test")


@pytest.mark.parametrize("freeze", ["none", -1, 1.5])
def test_freezing_is_all_or_a_number_of_blocks(load, freeze):
    with pytest.raises(ConfigError, match=r"optim\.image\.freeze"):
        load(optim__image__freeze=freeze, init__image="w")


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n- 2\n", "holds no sections"), ("a: [1\n", "is not valid YAML"), ("", "holds no sections")],
)
def test_files_that_are_no_configuration_are_refused(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text=text)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; give the path of a YAML configuration"):
        config_file.load(tmp_path / "none.yaml")


def test_configuration_is_immutable():
    config = RunConfig.model_validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "evaclip", *arguments], capture_output=True, text=True, check=False)


def test_config_command_prints_the_resolved_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    done = run("config", str(path), "optim.lr=3e-4")
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["optim"]["lr"] == 3e-4


def test_train_help_lists_options_with_type_and_default():
    text = run("train", "--help").stdout
    assert "train.global_batch  <int>  default required" in text
    assert "optim.lr  <float>  default 0.0005" in text
    assert "engine.zero_stage  <1|2|3>  default 1" in text


def test_errors_are_one_message_without_a_stack_trace(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "sed": 1}))
    done = run("train", str(path))
    assert done.returncode == os.EX_CONFIG
    assert done.stderr.startswith("error: ")
    assert "sed: unknown key; did you mean seed?" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in run("train", str(path), "--debug").stderr
