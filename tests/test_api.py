import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_model
from torchvision.transforms import v2

import evaclip
from evaclip.api import Clip
from evaclip.config import ModelConfig
from evaclip.data.batch import PackedText
from evaclip.data.tokenizer import Tokenizer
from evaclip.errors import CheckpointError, ConfigError

TOWER = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 64}
MODEL = {
    "embed_dim": 16,
    "image": {**TOWER, "image_size": 16, "patch_size": 8, "rope": True},
    "text": {**TOWER, "context_length": 12},
}


@pytest.fixture(scope="module")
def clip():
    return evaclip.create_model(ModelConfig.model_validate(MODEL), seed=5)


@pytest.fixture
def picture():
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (21, 30, 3), np.uint8))


def save(folder, clip, weights=None):
    """A checkpoint of a clip, or of other weights."""
    if weights is None:
        weights = dict(clip.model.named_parameters()) | {"logit_scale": torch.tensor([3.0])}
    return save_model(folder, MODEL, weights)


def test_a_model_is_loaded_from_its_run_and_from_its_checkpoint(tmp_path, clip, picture):
    path = save(tmp_path, clip)
    images, tokens = clip.preprocess(picture)[None], clip.tokenize(["a digit", "a ship at sea"])
    for loaded in (evaclip.load(tmp_path), evaclip.load(str(path))):
        assert loaded.config == clip.config
        assert loaded.logit_scale == pytest.approx(np.exp(3.0))
        assert not loaded.model.training
        assert torch.equal(loaded.encode_image(images), clip.encode_image(images))
        assert torch.equal(loaded.encode_text(tokens), clip.encode_text(tokens))


@pytest.mark.parametrize("change", ["absent", "other shape", "unknown"])
def test_weights_of_another_model_are_refused(tmp_path, clip, change):
    weights = dict(clip.model.named_parameters()) | {"logit_scale": torch.tensor([3.0])}
    name = "image.class_token"
    if change == "absent":
        del weights[name]
        message = rf"is of another model; use a new run_dir\n  {name}: absent in the checkpoint, \[32\] in the model"
    elif change == "other shape":
        weights[name] = torch.zeros(31)
        message = rf"{name}: \[31\] in the checkpoint, \[32\] in the model"
    else:
        weights["image.mask_token"] = torch.zeros(2)
        message = r"image\.mask_token: \[2\] in the checkpoint, absent in the model"
    save(tmp_path, clip, weights)
    with pytest.raises(CheckpointError, match=message):
        evaclip.load(tmp_path)


def test_a_path_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="give a run directory or"):
        evaclip.load(tmp_path)


def test_random_weights_are_a_function_of_the_seed(clip, picture):
    images = clip.preprocess(picture)[None]
    same, other = (evaclip.create_model(clip.config, seed=seed) for seed in (5, 6))
    assert torch.equal(same.encode_image(images), clip.encode_image(images))
    assert not torch.equal(other.encode_image(images), clip.encode_image(images))
    assert clip.logit_scale == pytest.approx(1 / 0.07)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"^no model is named 'EVA03'; there are .*EVA02-CLIP-B-16"):
        evaclip.create_model("EVA03")


def test_preprocess_is_torchvisions_evaluation_transform(clip, picture):
    tower = clip.config.image
    transform = v2.Compose(
        [
            v2.Resize(16, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(16),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(tower.mean, tower.std),
        ]
    )
    # fp32 rounding of a division and a subtraction
    torch.testing.assert_close(clip.preprocess(picture), transform(picture), rtol=0, atol=1e-6)
    assert clip.preprocess(picture.convert("P")).shape == (3, 16, 16)


def test_uint8_pixels_give_the_features_of_preprocessed_ones(clip, picture):
    square = picture.resize((16, 16))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
    features = clip.encode_image(clip.preprocess(square)[None], normalize=True)
    torch.testing.assert_close(clip.encode_image(pixels, normalize=True), features, rtol=0, atol=1e-5)


def test_features_have_length_one_if_asked(clip, picture):
    tokens = clip.tokenize(["one", "two words"])
    for encode, given in ((clip.encode_image, clip.preprocess(picture)[None]), (clip.encode_text, tokens)):
        plain, unit = encode(given), encode(given, normalize=True)
        assert unit.dtype == torch.float32
        torch.testing.assert_close(unit, plain / plain.norm(dim=1, keepdim=True))
        assert unit.requires_grad


def test_texts_are_tokenized_as_in_training_and_keep_their_order(clip):
    texts = ["a long caption that is cut at the end of the context", "short", "two words"]
    packed = clip.tokenize(texts)
    expected = PackedText.pack(Tokenizer(12)(texts))
    assert torch.equal(packed.ids, expected.ids)
    features = clip.encode_text(packed)
    for text, feature in zip(texts, features, strict=True):
        # batches of other sizes round differently
        torch.testing.assert_close(clip.encode_text(clip.tokenize(text))[0], feature, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 3, 16, 24), (2, 1, 16, 16)])
def test_images_of_another_shape_are_refused_with_the_way_out(clip, shape):
    with pytest.raises(ValueError, match=r"have shape \[.*\], not \[batch, 3, 16, 16\]; .*torch\.stack"):
        clip.encode_image(torch.zeros(shape))


def test_integers_that_are_no_pixels_are_refused(clip):
    with pytest.raises(ValueError, match=r"torch\.int64"):
        clip.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.int64))


@pytest.mark.parametrize("given", ["a text", ["a text"], torch.zeros(1, 77, dtype=torch.int64)])
def test_what_was_not_tokenized_here_is_refused(clip, given):
    with pytest.raises(TypeError, match=r"takes what clip\.tokenize\(texts\) returns, not (str|list|Tensor)"):
        clip.encode_text(given)


def test_a_path_is_no_image(clip):
    with pytest.raises(TypeError, match=r"takes a Pillow image, not str; open it with PIL\.Image\.open"):
        clip.preprocess("picture.jpg")


def test_the_package_hands_out_the_api():
    assert isinstance(evaclip.create_model(ModelConfig.model_validate(MODEL)), Clip)
    with pytest.raises(AttributeError, match="no attribute 'train_clip'"):
        _ = evaclip.train_clip
