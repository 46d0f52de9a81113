"""Where the parameters of a tower lie in other people's checkpoints: a table per layout, read in both directions.

Layouts: ``eva`` (EVA's own code: MIM and EVA-CLIP checkpoints), ``timm`` (also the image tower of open_clip's EVA
models), ``openai`` (OpenAI's CLIP, open_clip's own towers, and the text tower of EVA-CLIP), ``hf`` (transformers'
``CLIPModel``) and ``ours``. Nothing here opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

Layout = Literal["eva", "timm", "openai", "hf", "ours"]
TowerName = Literal["image", "text"]


class Rule(NamedTuple):
    """Parameters of a tower, and the tensors of a checkpoint that hold the same numbers."""

    ours: tuple[str, ...]
    """Joined along the first dimension, they equal ..."""
    theirs: tuple[tuple[str, ...], ...]
    """... these, joined too: the first alternative that is there, and the first of all when writing. Empty: unknown.

    EVA-02's towers, whose queries, keys and values lie apart, have that alternative first."""
    transposed: bool = False
    """Theirs is the transpose of ours."""
    added: int = 0
    """Leading dimensions of size 1 that theirs has and ours has not."""
    patch: bool = False
    """Theirs is a convolution [width, 3, side, side], ours a matrix [width, 3 side side]."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        """A tensor of theirs as ours is shaped; what is shaped otherwise than expected stays as it is."""
        if self.patch and tensor.ndim == 4:
            return tensor.flatten(1)
        if self.transposed and tensor.ndim == 2:
            return tensor.T
        leading = tensor.shape[: self.added]
        return tensor.reshape(tensor.shape[self.added :]) if self.added and set(leading) == {1} else tensor

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """The reverse of ``to_ours``."""
        if self.patch:
            side = round((tensor.shape[1] / 3) ** 0.5)
            return tensor.unflatten(1, (3, side, side))
        if self.transposed:
            return tensor.T.contiguous()
        return tensor[(None,) * self.added]


class _Table(NamedTuple):
    """A layout of one tower. Names without weight or bias stand for both; ``|`` separates alternatives, ``+`` joins."""

    outer: Mapping[str, str]
    prefix: str
    """Of a block; # is its number."""
    block: Mapping[str, str]
    transposed: tuple[str, ...] = ()
    """Ours that are transposed there."""
    added: Mapping[str, int] = {}
    """Ours -> dimensions of size 1 that are added there."""


_THREE = "{0}q_proj.{1} + {0}k_proj.{1} + {0}v_proj.{1}"
_EVA = _Table(
    outer={
        "patch_embed": "patch_embed.proj",
        "class_token": "cls_token",
        "position_embedding": "pos_embed",
        "norm": "norm",
        "head": "head",
    },
    prefix="blocks.#.",
    block={
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.qkv.weight": "attn.qkv.weight | " + _THREE.format("attn.", "weight"),
        "attn.qkv.q_bias": "attn.q_bias",
        "attn.qkv.v_bias": "attn.v_bias",
        "attn.norm": "attn.inner_attn_ln",
        "attn.proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "mlp.w12": "mlp.w1 + mlp.w2 | mlp.w12",
        "mlp.norm": "mlp.ffn_ln",
        "mlp.w3": "mlp.w3",
        "scale1": "gamma_1",
        "scale2": "gamma_2",
    },
    added={"class_token": 2, "position_embedding": 1},
)
_TIMM = _EVA._replace(
    outer={**_EVA.outer, "embed_norm": "norm_pre", "norm": "norm | fc_norm"},
    block={
        **_EVA.block,
        "attn.qkv.q_bias": "attn.q_bias | attn.q_proj.bias",
        "attn.qkv.v_bias": "attn.v_bias | attn.v_proj.bias",
        "attn.qkv.q_bias + attn.qkv.k_bias + attn.qkv.v_bias": "attn.qkv.bias",
        "attn.norm": "attn.norm",
        "mlp.w12": "mlp.fc1_g + mlp.fc1_x | mlp.fc1",
        "mlp.norm": "mlp.norm",
        "mlp.w3": "mlp.fc2",
    },
)
_OPENAI_BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.qkv.q_bias + attn.qkv.k_bias + attn.qkv.v_bias": "attn.in_proj_bias",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_HF_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv.weight": _THREE.format("self_attn.", "weight"),
    "attn.qkv.bias": _THREE.format("self_attn.", "bias"),
    "attn.qkv.q_bias": "self_attn.q_proj.bias",
    "attn.qkv.k_bias": "self_attn.k_proj.bias",
    "attn.qkv.v_bias": "self_attn.v_proj.bias",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_OPENAI_IMAGE = _Table(
    outer={
        "patch_embed": "conv1",
        "class_token": "class_embedding",
        "position_embedding": "positional_embedding",
        "embed_norm": "ln_pre",
        "norm": "ln_post",
        "head.weight": "proj",
    },
    prefix="transformer.resblocks.#.",
    block=_OPENAI_BLOCK,
    transposed=("head.weight",),
)
_HF_IMAGE = _Table(
    outer={
        "patch_embed": "vision_model.embeddings.patch_embedding",
        "class_token": "vision_model.embeddings.class_embedding",
        "position_embedding": "vision_model.embeddings.position_embedding.weight",
        "embed_norm": "vision_model.pre_layrnorm",
        "norm": "vision_model.post_layernorm",
        "head.weight": "visual_projection.weight",
    },
    prefix="vision_model.encoder.layers.#.",
    block=_HF_BLOCK,
)
_OPENAI_TEXT = _Table(
    outer={
        "token_embedding": "token_embedding",
        "position_embedding": "positional_embedding",
        "norm": "ln_final",
        "projection": "text_projection",
    },
    prefix="transformer.resblocks.#.",
    block=_OPENAI_BLOCK,
)
_HF_TEXT = _Table(
    outer={
        "token_embedding": "text_model.embeddings.token_embedding",
        "position_embedding": "text_model.embeddings.position_embedding.weight",
        "norm": "text_model.final_layer_norm",
        "projection": "text_projection.weight",
    },
    prefix="text_model.encoder.layers.#.",
    block=_HF_BLOCK,
    transposed=("projection",),
)
_TABLES: dict[tuple[TowerName, Layout], _Table] = {
    ("image", "eva"): _EVA,
    ("image", "timm"): _TIMM,
    ("image", "openai"): _OPENAI_IMAGE,
    ("image", "hf"): _HF_IMAGE,
    ("text", "openai"): _OPENAI_TEXT,
    ("text", "hf"): _HF_TEXT,
}


def rules(tower: TowerName, layout: Layout, names: Iterable[str]) -> list[Rule]:
    """How each parameter of a tower is called in a layout.

    Args:
        tower: Which of the two.
        layout: One that knows such towers.
        names: The tower's parameters, without the tower's own name.

    Returns:
        Rules that cover every name once.
    """
    names = list(names)
    if layout == "ours":
        return [Rule((name,), ((name,),)) for name in names]
    if tower == "image" and layout in ("openai", "hf") and "embed_norm.weight" not in names:
        return [Rule((name,), ()) for name in names]  # theirs always have that norm
    if any(name.startswith("trunk.") for name in names):  # a tower of timm, which has timm's names and no others
        known = layout == "timm"
        return [Rule((n,), ((n.removeprefix("trunk."),),) if known and n.startswith("trunk.") else ()) for n in names]
    table, found = _TABLES[tower, layout], []
    left = dict.fromkeys(names)
    for name in list(left):
        if name in left:
            rule = _rule(table, name, left)
            found.append(rule)
            for own in rule.ours:
                del left[own]
    return found


def _rule(table: _Table, name: str, names: Mapping[str, None]) -> Rule:
    match = re.match(r"blocks\.(\d+)\.", name)
    own_prefix = match[0] if match else ""
    prefix = table.prefix.replace("#", match[1]) if match else ""
    inner, entries = name[len(own_prefix) :], table.block if match else table.outer
    for key, value in entries.items():
        ours = tuple(own_prefix + part for part in key.split(" + "))
        if len(ours) > 1 and name in ours and all(own in names for own in ours):
            return Rule(ours, _alternatives(value, prefix, ""))
    module, _, leaf = inner.rpartition(".")
    if inner in entries:
        theirs = _alternatives(entries[inner], prefix, "")
    elif module in entries:
        theirs = _alternatives(entries[module], prefix, f".{leaf}")
    else:
        theirs = ()
    if inner.startswith("mlp.w12.") and table is _TIMM and f"{own_prefix}mlp.norm.weight" not in names:
        theirs = tuple(sorted(theirs, key=len))  # timm packs both into one where no norm follows
    if f"{own_prefix}attn.norm.weight" in names:
        theirs = tuple(sorted(theirs, key=lambda keys: not re.search("[qv]_proj", keys[0])))
    return Rule(
        (name,), theirs, inner in table.transposed, table.added.get(inner, 0), patch=name == "patch_embed.weight"
    )


def _alternatives(value: str, prefix: str, suffix: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(prefix + key + suffix for key in part.split(" + ")) for part in value.split(" | "))
