"""Transforms: against torchvision's own, sizes known beforehand, mistakes named."""

import numpy as np
import pytest
import torch
from PIL import Image

import engine.torchvision_ops  # noqa: F401  isort: skip
from torchvision.transforms import v2  # isort: skip

from engine.config.schema import Transforms
from engine.data.decode import decode
from engine.data.transforms import geometry, pipeline
from engine.data.transforms.geometry import pixels_of
from engine.errors import UserError
from engine.types import BadSample

KEY = "transforms.train_transforms"


@pytest.fixture
def image():
    coarse = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC)


def config(**sections):
    return Transforms.model_validate(sections)


def run(names, image, decoder="auto", seed=0, **sections):
    torch.manual_seed(seed)
    return pipeline.build(names, config(**sections), KEY, decoder)(image)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 30), (30, 40), (200, 10)])
def test_resize_equals_torchvisions_and_nearly_pillows(image, interpolation, size):
    section = {"size": size, "interpolation": interpolation}
    out = run(["resize"], image, resize=section)
    mode = v2.InterpolationMode(interpolation)
    tensor = v2.functional.pil_to_tensor(image)
    assert torch.equal(out, v2.functional.resize(tensor, list(size), mode, antialias=True))
    pillow = v2.functional.pil_to_tensor(v2.functional.resize(image, list(size), mode))
    assert (out.int() - pillow.int()).abs().max() <= 2
    assert torch.equal(run(["resize"], image, "pillow_exact", resize=section), pillow)


@pytest.mark.parametrize("shape", [(120, 90), (90, 120), (91, 133), (50, 50)])
def test_resize_by_the_shorter_side_as_torchvision(shape):
    image = Image.new("RGB", shape)
    out = geometry.Resize(config(resize={"size": 37}).resize)(image)
    expected = v2.functional.resize(v2.functional.pil_to_tensor(image), [37])
    assert out.shape == expected.shape


def test_resize_bicubic_differs_from_resize(image):
    sizes = {"resize": {"size": (40, 40)}}
    smooth = run(["resize"], image, **sizes)
    sharp = run(["resize_bicubic"], image, resize_bicubic={"size": (40, 40),
                "interpolation": "bicubic"})  # fmt: skip
    assert not torch.equal(smooth, sharp)


def test_valid_pipeline_equals_torchvisions(image):
    out = run(["resize", "center_crop"], image, resize={"size": 64}, center_crop={"size": 56})
    oracle = v2.Compose([v2.PILToTensor(), v2.Resize(64), v2.CenterCrop(56)])
    assert torch.equal(out, oracle(image))


def drawn_boxes(config_, height, width, number=3000):
    torch.manual_seed(0)
    crop = geometry.RandomResizeCrop(config_)
    ours = np.array([crop.draw(height, width) for _ in range(number)], float)
    oracle = v2.RandomResizedCrop(10, config_.scale, config_.ratio)
    empty = torch.empty(3, height, width)
    peers = [oracle.make_params([empty]) for _ in range(number)]
    return ours, np.array(
        [[p[k] for k in ("top", "left", "height", "width")] for p in peers], float
    )


@pytest.mark.parametrize("shape", [(100, 100), (90, 160), (300, 40)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.6, 0.9)])
def test_random_resize_crop_is_distributed_as_torchvisions(shape, scale):
    height, width = shape
    ours, peers = drawn_boxes(
        config(random_resize_crop={"scale": scale}).random_resize_crop, *shape
    )
    assert ours.min() >= 0
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width
    error = (ours.std(0) + peers.std(0)) / len(ours) ** 0.5 + 1e-9
    assert np.all(np.abs(ours.mean(0) - peers.mean(0)) < 4 * error + 0.5)  # theirs rounds down
    assert ours.std(0) == pytest.approx(peers.std(0), rel=0.1, abs=0.5)


@pytest.mark.parametrize("shape", [(2, 900), (900, 2), (1, 1)])
def test_an_image_too_oblong_for_the_ratio_gives_its_middle(shape):
    sections = config(random_resize_crop={"scale": (0.9, 1.0)}).random_resize_crop
    ours, peers = drawn_boxes(sections, *shape, number=20)
    assert np.array_equal(ours, peers)


def test_random_resize_crop_resizes_its_box_as_torchvision(image):
    section = {"size": (32, 40), "scale": (0.3, 0.9), "interpolation": "bicubic"}
    crop = geometry.RandomResizeCrop(config(random_resize_crop=section).random_resize_crop)
    for seed in range(5):
        torch.manual_seed(seed)
        box = crop.draw(image.height, image.width)
        torch.manual_seed(seed)
        tensor = v2.functional.pil_to_tensor(image)
        bicubic = v2.InterpolationMode.BICUBIC
        assert torch.equal(crop(image), v2.functional.resized_crop(tensor, *box, [32, 40], bicubic))


@pytest.mark.parametrize("shape", [(1, 1), (40, 30), (2048, 2000), (2500, 3000)])
def test_pillows_memory_holds_its_pixels(shape):
    image = Image.effect_noise(shape, 90).convert("RGB")
    memory = pixels_of(image)
    assert torch.equal(memory[:3], v2.functional.pil_to_tensor(image))
    crop = pixels_of(image.crop((0, 0, 1, 1)))  # outlives the image that it was taken from
    assert crop[:3, 0, 0].tolist() == list(image.getpixel((0, 0)))


def test_a_crop_of_a_tensor_equals_that_of_its_image(image):
    piece = geometry.RandomResizeCrop(config(random_resize_crop={"size": 24}).random_resize_crop)
    torch.manual_seed(1)
    from_image = piece(image)
    torch.manual_seed(1)
    assert torch.equal(from_image, piece(geometry.to_tensor(image)))


ALL = [
    "color_jitter",
    "random_resize_crop",
    "autoaug",
    "random_flip",
    "random_erasing",
    "normalize",
]


@pytest.mark.parametrize("names", [ALL, ALL[::-1], ["resize", "random_crop"], ["center_crop"]])
def test_output_is_contiguous_uint8_of_the_size_foretold(image, names):
    sections = {
        "random_crop": {"size": 150, "padding": 3},  # larger than the image
        "center_crop": {"size": (130, 20)},
        "random_resize_crop": {"size": (33, 47)},
        "color_jitter": {"hue": 0.1, "p": 0.5},
    }
    for seed in range(4):
        out = run(names, image, seed=seed, **sections)
        assert out.dtype == torch.uint8
        assert out.is_contiguous()
        assert tuple(out.shape) == (3, *pipeline.output_size(names, config(**sections)))


@pytest.mark.parametrize("name", ["random_flip", "autoaug", "color_jitter", "random_erasing"])
def test_random_pieces_change_the_image_and_repeat_by_seed(image, name):
    names, sections = ["resize", name], {"resize": {"size": (64, 64)}, "random_flip": {"p": 1.0},
                                         "random_erasing": {"p": 1.0}}  # fmt: skip
    plain = run(["resize"], image, **sections)
    outs = [run(names, image, seed=seed, **sections) for seed in range(6)]
    assert any(not torch.equal(out, plain) for out in outs)
    assert all(
        torch.equal(out, run(names, image, seed=seed, **sections)) for seed, out in enumerate(outs)
    )


def test_flip_mirrors(image):
    flipped = run(["resize", "random_flip"], image, resize={"size": (90, 120)},
                  random_flip={"p": 1.0})  # fmt: skip
    assert torch.equal(flipped.flip(-1), geometry.to_tensor(image))


def test_erasing_writes_the_mean_colour():
    black = Image.new("RGB", (32, 32))
    sections = {"resize": {"size": (32, 32)}, "random_erasing": {"p": 1.0},
                "normalize": {"mean": (0.5, 0.25, 1.0), "std": (1, 1, 1)}}  # fmt: skip
    out = run(["resize", "random_erasing"], black, **sections)
    erased = out[:, out.sum(0) > 0]
    assert erased.shape[1] > 0
    assert erased.unique(dim=1).flatten().tolist() == [128, 64, 255]


def test_normalize_leaves_pixels_to_the_model(image):
    sections = {"resize": {"size": (16, 16)}}
    assert torch.equal(run(["resize", "normalize"], image, **sections),
                       run(["resize"], image, **sections))  # fmt: skip


@pytest.mark.parametrize(
    ("names", "size"),
    [
        (["random_resize_crop", "random_flip"], (224, 224)),
        (["resize", "center_crop", "autoaug"], (224, 224)),
        (["center_crop", "resize"], None),
        (["random_flip"], None),
        ([], None),
        (["resize"], None),
    ],
)
def test_output_size(names, size):
    if size:
        assert pipeline.output_size(names, config(), KEY) == size
        return
    with pytest.raises(UserError, match=r"center_crop") as error:
        pipeline.output_size(names, config(), KEY)
    assert error.value.key == KEY


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match="did you mean 'random_resize_crop'") as error:
        pipeline.build(["random_resized_crop"], config(), KEY)
    assert error.value.key == KEY


def test_values_that_torchvision_refuses_are_the_users_mistake():
    with pytest.raises(UserError, match=r"transforms\.random_erasing") as error:
        pipeline.build(["resize", "random_erasing"],
                       config(resize={"size": (8, 8)}, random_erasing={"scale": (0.5, 2.0)}),
                       KEY)  # fmt: skip
    assert error.value.key == "transforms.random_erasing"


def test_a_transform_from_outside(monkeypatch, tmp_path, image):
    (tmp_path / "my_invert.py").write_text(
        "from engine.data.transforms.pipeline import on_tensor\n"
        "def build(config):\n    return on_tensor(lambda image_CHW: 255 - image_CHW)\n"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "my_invert.py").rename(tmp_path / "mine" / "invert.py")
    monkeypatch.syspath_prepend(tmp_path)
    sections = {"resize": {"size": (16, 16)}}
    inverted = run(["resize", "mine.invert"], image, **sections)
    assert torch.equal(inverted, 255 - run(["resize"], image, **sections))


def test_a_strip_is_refused_before_it_fills_memory():
    strip = Image.new("RGB", (100_000, 1))
    with pytest.raises(BadSample) as error:
        run(["resize", "center_crop"], strip)
    assert error.value.cause == "too large"
    assert run(["random_resize_crop"], strip).shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("names", "size"),
    [
        (["resize", "center_crop"], (64, 64)),
        (["autoaug", "resize"], (64, 64)),
        (["center_crop"], None),
        (["random_crop", "resize"], None),
        (["random_flip"], None),
    ],
)
def test_decode_size(names, size):
    sections = config(resize={"size": 64})
    assert pipeline._decode_size(names, sections) == size


def test_a_random_crop_of_a_shrunk_jpeg_still_covers_the_output():
    section = {"size": 48, "scale": (0.25, 1.0)}
    built = pipeline.build(["random_resize_crop"], config(random_resize_crop=section), KEY)
    height, width = built.decode_size
    assert 2 * 48 <= height == width < 2.5 * 48
    import io

    out = io.BytesIO()
    Image.new("RGB", (2 * width, 2 * height)).save(out, "JPEG")
    shrunk = decode(out.getvalue(), max_pixels=10**8, target=built.decode_size)
    assert shrunk.size == (width, height)
    for seed in range(50):
        torch.manual_seed(seed)
        _, _, *sides = built.pieces[0].draw(shrunk.height, shrunk.width)
        assert min(sides) >= 47
