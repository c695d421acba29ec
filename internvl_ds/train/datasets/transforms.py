"""Image transforms for training and evaluation, chosen by DATA.TRANSFORM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms
from yacs.config import CfgNode

from internvl_ds.config.choices import require_one_of
from internvl_ds.errors import ConfigError
from internvl_ds.files.reading import Unreadable

Transform = Callable[[Any], torch.Tensor]

# Up to this size images are taken to be that small already: a crop of a part would lose too much.
_SMALL_IMAGE = 32  # pixels


class _ShortSide(transforms.Resize):
    """Resizes the short side, unless the whole would have more pixels than Pillow opens.

    20,000 x 1 pixels took a minute and 5 GB to become 224 high, for a crop of 224 x 224.
    """

    def forward(self, img: Any) -> Any:
        short, long = sorted(img.size)
        pixels = long / short * self.size**2
        if Image.MAX_IMAGE_PIXELS and pixels > 2 * Image.MAX_IMAGE_PIXELS:
            raise Unreadable(
                f'it has {img.width} x {img.height} pixels, and {pixels / 1e6:.0f} million when '
                f'its short side is resized to {self.size}'
            )
        return super().forward(img)


class _ToNormalized:
    """What ToTensor and Normalize make of an RGB image, to the bit, in half their time.

    They copy the float32 image twice more; here each step is done in place.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean = torch.tensor(tuple(mean)).view(-1, 1, 1)
        self._std = torch.tensor(tuple(std)).view(-1, 1, 1)
        if not self._std.all():
            raise ConfigError(f'AUG.STD {list(std)} has a zero: nothing can be divided by it')

    def __call__(self, image: Image.Image) -> torch.Tensor:
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        tensor = levels.to(torch.float32, memory_format=torch.contiguous_format)
        return tensor.div_(255).sub_(self._mean).div_(self._std)


def build_transform(config: CfgNode, training: bool) -> Transform:
    """Builds the transform from a PIL image to a float32 tensor (3, IMG_SIZE, IMG_SIZE).

    Raises:
        ConfigError: for an unknown DATA.TRANSFORM, and for evaluation on random crops.
    """
    name = config.DATA.TRANSFORM
    require_one_of('DATA.TRANSFORM', name, ('build_transform', 'build_transform_for_linear_probe'))
    if not training:
        return _eval_transform(config)
    if name == 'build_transform':
        return _augmenting_transform(config)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(config.DATA.IMG_SIZE, interpolation=_bicubic()),
            transforms.RandomHorizontalFlip(config.AUG.HFLIP),
            _ToNormalized(config.AUG.MEAN, config.AUG.STD),
        ]
    )


def _augmenting_transform(config: CfgNode) -> Transform:
    size, aug = config.DATA.IMG_SIZE, config.AUG
    try:
        transform = create_transform(
            input_size=size,
            is_training=True,
            color_jitter=aug.COLOR_JITTER if aug.COLOR_JITTER > 0 else None,
            auto_augment=None if aug.AUTO_AUGMENT in (None, '', 'none') else aug.AUTO_AUGMENT,
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
            hflip=aug.HFLIP,
            scale=tuple(aug.SCALE),
            interpolation=config.DATA.INTERPOLATION,
            mean=tuple(aug.MEAN),
            std=tuple(aug.STD),
        )
    except (AssertionError, LookupError, TypeError, ValueError) as error:  # timm's, of a policy
        raise ConfigError(
            f'AUG.AUTO_AUGMENT {aug.AUTO_AUGMENT!r} (or another key of AUG) is none that timm '
            f'takes: {type(error).__name__}: {error}'
        ) from error
    steps = transform.transforms
    steps[:] = [step for step in steps if not isinstance(step, transforms.ToTensor)]
    for number, step in enumerate(steps):
        if isinstance(step, transforms.Normalize):
            steps[number] = _ToNormalized(aug.MEAN, aug.STD)
    if size <= _SMALL_IMAGE:
        # Takes the place of the random resized crop; the resize leaves a fitting image as it is.
        resize = _ShortSide(size, interpolation=_interpolation(config))
        crop = transforms.RandomCrop(size, padding=4)
        steps[0] = transforms.Compose([resize, crop])
    return transform


def _eval_transform(config: CfgNode) -> Transform:
    size, probe = config.DATA.IMG_SIZE, config.DATA.TRANSFORM == 'build_transform_for_linear_probe'
    mode = _bicubic() if probe else _interpolation(config)
    if probe or config.TEST.CROP:
        crop = [_ShortSide(size, interpolation=mode), transforms.CenterCrop(size)]
    elif config.AUG.RANDOM_RESIZED_CROP:
        raise ConfigError(
            'AUG.RANDOM_RESIZED_CROP True with TEST.CROP False evaluates on random crops, whose '
            'accuracy cannot be reproduced: it is not supported; set one of the two otherwise'
        )
    else:
        crop = [transforms.Resize((size, size), interpolation=mode)]
    return transforms.Compose([*crop, _ToNormalized(config.AUG.MEAN, config.AUG.STD)])


def _interpolation(config: CfgNode) -> transforms.InterpolationMode:
    # 'random' is a training mode of timm's, and means either; evaluation takes the milder one.
    name = config.DATA.INTERPOLATION
    return str_to_interp_mode('bilinear' if name == 'random' else name)


def _bicubic() -> transforms.InterpolationMode:
    return transforms.InterpolationMode.BICUBIC
