"""How other tools describe our models, or why they cannot.

Pure functions from a configuration to what timm, open_clip and transformers keep beside their weights. Nothing here
knows tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

import timm

from evaclip.config import AnyImageTower, ImageTowerConfig, LossConfig, ModelConfig, SigmoidConfig, TimmTowerConfig
from evaclip.config.tokenizer_file import TOKENIZER, TokenizerFile
from evaclip.data.tokenizer import Tokenizer, read_merges
from evaclip.errors import WeightsError
from evaclip.models.registry import ALIASES

_OF_TRAINING = {"token_drop", "drop_path", "mean", "std", "resize"}
"""Options of the image tower that do not change what it computes from normalised pixels."""
_VIT: Mapping[str, tuple[object, ...]] = {
    "mlp": ("gelu", "quick_gelu"),
    "norm": ("layer_norm",),
    "norm_eps": (1e-5,),
    "embed_norm": (True,),
    "qkv_bias": ("qkv",),
    "patch_bias": (False,),
    "head_bias": (False,),
    "sub_norm": (False,),
    "rope": (False,),
    "post_norm": (False,),
    "layer_scale": (None,),
}
"""What OpenAI's vision transformer has, in CLIP's and in other tools' code."""
_EVA: Mapping[str, tuple[object, ...]] = {
    "mlp": ("gelu", "swiglu"),
    "norm": ("layer_norm",),
    "norm_eps": (1e-6,),
    "embed_norm": (False,),
    "qkv_bias": ("qv", "none"),
    "patch_bias": (True,),
}
"""What EVA's towers have in timm."""


def is_vit(image: AnyImageTower) -> TypeGuard[ImageTowerConfig]:
    """Whether a tower is OpenAI's vision transformer, which most tools know."""
    return not _differences(image, _VIT)


def _differences(image: AnyImageTower, known: Mapping[str, tuple[object, ...]]) -> list[str]:
    """Options that a tool does not know, with what it does."""
    if isinstance(image, TimmTowerConfig):
        return [f"model.image is timm's {image.model}"]
    return [
        f"model.image.{key} is {getattr(image, key)}, not {' or '.join(map(str, values))}"
        for key, values in known.items()
        if getattr(image, key) not in values
    ]


def _refuse(tool: str, problems: list[str], instead: str) -> None:
    if problems:
        raise WeightsError(f"{tool} cannot express this model: {'; '.join(problems)}; export it with {instead}")


# ----------------------------------------------------------------------------------------------------------------- timm


def timm_config(image: AnyImageTower, embed_dim: int) -> dict[str, Any]:
    """``config.json`` of an image tower for ``timm.create_model("local-dir:...", pretrained=True)``.

    Raises:
        WeightsError: timm has no such tower.
    """
    colours = {"mean": list(image.mean), "std": list(image.std)}
    pretrained = {
        "input_size": [3, image.image_size, image.image_size],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": {"crop": "center", "squash": "squash"}[image.resize],
        **colours,
    }
    if isinstance(image, TimmTowerConfig):
        problem = f"model.image.projection {image.projection} lies behind its model"
        _refuse("timm", [problem] if image.projection in ("linear", "mlp") else [], "--format open_clip or safetensors")
        classes = embed_dim if image.projection == "head" else 0
        known = timm.get_pretrained_cfg(image.model)
        named = {key: getattr(known, key, None) for key in ("classifier", "first_conv")}
        arguments: dict[str, Any] = {"global_pool": image.pool} if image.pool else {}
        arguments |= {"img_size": image.image_size} if _fixed_size(image) else {}
        config: dict[str, Any] = {"architecture": image.model.partition(".")[0], "num_classes": classes}
        return {
            **config,
            "model_args": arguments,
            "pretrained_cfg": {**pretrained, **named, "num_classes": classes},
        }
    return {
        "architecture": "vit_base_patch16_clip_224" if is_vit(image) else "eva02_base_patch16_clip_224",
        "num_classes": embed_dim,
        "num_features": image.width,
        "model_args": _timm_arguments(image),
        "pretrained_cfg": {
            **pretrained,
            "fixed_input_size": True,
            "num_classes": embed_dim,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _timm_arguments(image: ImageTowerConfig) -> dict[str, Any]:
    """What of timm's CLIP towers is to be otherwise."""
    vit = is_vit(image)
    problems = [] if vit else _differences(image, _EVA)
    if image.post_norm and image.layer_scale is not None:
        problems.append("model.image.post_norm and model.image.layer_scale are both set, of which it has one")
    _refuse("timm", problems, "--format safetensors, or eva")
    arguments: dict[str, Any] = {
        "img_size": image.image_size,
        "patch_size": image.patch_size,
        "embed_dim": image.width,
        "depth": image.depth,
        "num_heads": image.heads,
        "mlp_ratio": _ratio(image.mlp_width, image.width),
    }
    if vit:
        return {**arguments, "act_layer": image.mlp}
    return {
        **arguments,
        "swiglu_mlp": image.mlp == "swiglu",
        "scale_mlp": image.sub_norm,
        "scale_attn_inner": image.sub_norm,
        "qkv_fused": not image.sub_norm,
        "qkv_bias": image.qkv_bias == "qv",
        "use_rot_pos_emb": image.rope,
        "ref_feat_shape": [16, 16] if image.rope else None,
        "use_post_norm": image.post_norm,
        "init_values": image.layer_scale,
    }


def _fixed_size(image: TimmTowerConfig) -> int | None:
    """For how many pixels timm builds a backbone that is built for one size."""
    known = timm.get_pretrained_cfg(image.model)
    return known.input_size[-1] if known is not None and known.fixed_input_size else None


def _ratio(hidden: int, width: int) -> float:
    """A factor from which tools, which round down, get this hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _timm_name(image: ImageTowerConfig) -> str | None:
    """The name of timm's EVA tower that computes the same."""
    for alias in ALIASES:
        known = ModelConfig(name=alias).image
        if "patch" in alias and not is_vit(known) and _shape(known) == _shape(image):
            return alias
    return None


def _shape(image: AnyImageTower) -> dict[str, Any]:
    return image.model_dump(exclude=_OF_TRAINING)


# ------------------------------------------------------------------------------------------------------------ open_clip


def open_clip_config(
    model: ModelConfig, loss: LossConfig, timm_pool: str | None = None, file: TokenizerFile | None = None
) -> dict[str, Any]:
    """``open_clip_config.json`` for ``open_clip.create_model_and_transforms("local-dir:...")``.

    Args:
        model: Both towers.
        loss: Decides whether there is a bias beside the temperature.
        timm_pool: How a backbone of timm pools, which open_clip wants to know.
        file: The tokenizer's, where it is not CLIP's.

    Raises:
        WeightsError: open_clip has no such model: EVA towers only by timm's names, others only as OpenAI's; or it would
            not find the end token.
    """
    image, text = model.image, model.text
    vision = _open_clip_vision(model, timm_pool)
    config: dict[str, Any] = {
        "embed_dim": model.embed_dim,
        "quick_gelu": text.mlp == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.depth,
            "mlp_ratio": _ratio(text.mlp_width, text.width),
        },
    }
    if file:
        _refuse("open_clip", _hidden_end(file), "--format safetensors")
        words = {"hf_tokenizer_name": TOKENIZER, "pool_type": "eos", "eos_id": file.after[-1].id}
        config["text_cfg"] |= words  # of a local folder it takes any name for the folder itself
    if "timm_model_name" in vision:
        config["custom_text"] = True
    if isinstance(loss, SigmoidConfig):
        config["init_logit_bias"] = loss.logit_bias
    resize = {"crop": "shortest", "squash": "squash"}[image.resize]
    colours = {"mean": list(image.mean), "std": list(image.std)}
    return {"model_cfg": config, "preprocess_cfg": {**colours, "interpolation": "bicubic", "resize_mode": resize}}


def _open_clip_vision(model: ModelConfig, timm_pool: str | None) -> dict[str, Any]:
    image, text = model.image, model.text
    size: dict[str, Any] = {"image_size": image.image_size}
    by_name = {**size, "timm_model_pretrained": False}
    if isinstance(image, TimmTowerConfig):
        problem = f"it does not know how timm's {image.model} pools; set model.image.pool in a new run"
        _refuse("open_clip", [] if timm_pool else [problem], "--format timm")
        fixed = _fixed_size(image)
        problem = f"it builds timm's {image.model} for {fixed} pixels, not {image.image_size}"
        _refuse("open_clip", [problem] if fixed not in (None, image.image_size) else [], "--format timm or safetensors")
        projection = None if image.projection == "head" else image.projection
        return {**by_name, "timm_model_name": image.model, "timm_pool": timm_pool, "timm_proj": projection}
    if name := _timm_name(image):
        return {**by_name, "timm_model_name": name, "timm_pool": "token", "timm_proj": None}
    if not is_vit(image):
        named = ", ".join(alias for alias in ALIASES if alias.startswith("eva") and "patch" in alias)
        problem = f"it builds EVA towers by timm's names ({named}), and none has the shape of this one"
        _refuse("open_clip", [problem], "--format timm, or safetensors")
    problem = f"its towers have one activation, not {image.mlp} and {text.mlp}"
    _refuse("open_clip", [problem] if image.mlp != text.mlp else [], "--format hf")
    return {
        **size,
        "patch_size": image.patch_size,
        "width": image.width,
        "layers": image.depth,
        "head_width": image.width // image.heads,
        "mlp_ratio": _ratio(image.mlp_width, image.width),
    }


# --------------------------------------------------------------------------------------------------------- transformers


def transformers_configs(
    model: ModelConfig, loss: LossConfig, file: TokenizerFile | None = None
) -> dict[str, dict[str, Any]]:
    """``config.json`` of a ``CLIPModel`` and ``preprocessor_config.json`` of its processor.

    Args:
        model: Both towers.
        loss: Decides whether there is a bias beside the temperature.
        file: The tokenizer's, where it is not CLIP's.

    Raises:
        WeightsError: ``CLIPModel`` is OpenAI's CLIP alone; EVA towers and the sigmoid loss's bias it has not; or it
            would not find the end token.
    """
    image, text = model.image, model.text
    problems = _differences(image, _VIT)
    if isinstance(loss, SigmoidConfig):
        problems.append("loss.name is sigmoid, whose logit_bias it has not")
    if problems or not is_vit(image):
        _refuse("transformers' CLIPModel", problems, "--format open_clip, timm or safetensors")
        raise AssertionError
    if file:
        old = ["the end token's id is 2, for which it looks for the largest id instead"] if _end_id(file) == 2 else []
        _refuse("transformers' CLIPModel", [*_hidden_end(file), *old], "--format open_clip or safetensors")
        start, end = (file.before or file.after)[0].id, _end_id(file)
    else:
        tokenizer = Tokenizer(text.context_length)
        start, end = tokenizer.start, tokenizer.end

    def tower(config: Any) -> dict[str, Any]:
        return {
            "hidden_size": config.width,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "hidden_act": config.mlp,
            "layer_norm_eps": 1e-5,
            "projection_dim": model.embed_dim,
        }

    ends = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    words = {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length, **ends}
    pixels = {"image_size": image.image_size, "patch_size": image.patch_size}
    square = {"height": image.image_size, "width": image.image_size}
    crop = image.resize == "crop"
    return {
        "config.json": {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": model.embed_dim,
            "text_config": {"model_type": "clip_text_model", **tower(text), **words},
            "vision_config": {"model_type": "clip_vision_model", **tower(image), **pixels},
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "CLIPProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": image.image_size} if crop else square,
            "resample": 3,
            "do_center_crop": crop,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(image.mean),
            "image_std": list(image.std),
        },
    }


# ----------------------------------------------------------------------------------------------------------- tokenizers


def _end_id(file: TokenizerFile) -> int:
    return file.after[-1].id


def _hidden_end(file: TokenizerFile) -> list[str]:
    """Why tools that read the feature at the first end token would not find it."""
    end = file.after[-1]
    early = end in (*file.before, *file.after[:-1])
    return [f"it reads the feature at the first {end.name}, which does not only end this tokenizer's texts"] * early


def tokenizer_files(context_length: int, file: TokenizerFile | None = None) -> dict[str, str]:
    """The tokenizer as transformers reads it, CLIP's or the one of a file: name of a file -> its text."""
    if file:
        end = file.after[-1].name
        names = {"eos_token": end, "pad_token": end} | ({"bos_token": file.before[0].name} if file.before else {})
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, **names}
        return {TOKENIZER: _completed(file), "tokenizer_config.json": json.dumps(settings, indent=2)}
    tokenizer = Tokenizer(context_length)
    start, end = "<|startoftext|>", "<|endoftext|>"
    names = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    ids = {symbol: number for number, symbol in enumerate([*tokenizer.symbols, start, end])}
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in read_merges()), ""])
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **names}
    return {
        "vocab.json": json.dumps(ids, ensure_ascii=False),
        "merges.txt": merges,
        "special_tokens_map.json": json.dumps(names, indent=2),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }


def _completed(file: TokenizerFile) -> str:
    """A ``tokenizer.json`` that puts by itself around a text what is put there in training."""
    text = file.content.decode()
    if file.ends_texts:
        return text
    marks = {mark.name: {"id": mark.name, "ids": [mark.id], "tokens": [mark.name]} for mark in file.before + file.after}
    before, after = (
        [{"SpecialToken": {"id": mark.name, "type_id": 0}} for mark in side] for side in (file.before, file.after)
    )
    single, second = [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after], {"Sequence": {"id": "B", "type_id": 1}}
    template = {"type": "TemplateProcessing", "single": single, "pair": [*single, second], "special_tokens": marks}
    return json.dumps({**json.loads(text), "post_processor": template}, ensure_ascii=False)  # others move offsets only
