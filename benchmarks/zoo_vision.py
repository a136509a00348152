"""The zoo's models for images; ``scale`` multiplies widths and sides: 1 is for tests on the CPU, 4 for recordings on a card."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo_blocks import Block, Parts, Stack, conv_norm, images, labels

_CLASSIFY = {"loss_fn": F.cross_entropy}


def plain_conv(scale: int, checkpointed: bool = False) -> Parts:
    """A network of convolutions without norms or shortcuts, after VGG."""
    layers: list[nn.Module] = []
    inside = 3
    for outside in (8 * scale, 16 * scale, 32 * scale):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(outside, outside, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        inside = outside
    head = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * inside, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 10)]
    model = nn.Sequential(Stack(*layers, checkpointed=checkpointed), *head)
    return Parts(model=model, sample=(images(32 * scale), labels()), loss=dict(_CLASSIFY), batch_sizes=(7, 32, 96))


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.body = nn.Sequential(
            conv_norm(inside, width, 1, act=nn.ReLU(inplace=True)),
            conv_norm(width, width, 3, stride=stride, act=nn.ReLU(inplace=True)),
            conv_norm(width, outside, 1),
        )
        same = stride == 1 and inside == outside
        self.shortcut: nn.Module = nn.Identity() if same else conv_norm(inside, outside, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def resnet(scale: int, checkpointed: bool = False) -> Parts:
    """Residual bottlenecks with batch norm."""
    width = 8 * scale
    blocks: list[nn.Module] = []
    inside = width
    for stage in range(3):
        for index in range(max(1, scale // 2)):
            blocks.append(Bottleneck(inside, width << stage, 2 if stage and not index else 1))
            inside = 4 * (width << stage)
    stem = [conv_norm(3, width, 7, stride=2, act=nn.ReLU(inplace=True)), nn.MaxPool2d(3, 2, 1)]
    model = nn.Sequential(*stem, Stack(*blocks, checkpointed=checkpointed), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))
    return Parts(model=model, sample=(images(48 * scale), labels()), loss=dict(_CLASSIFY), batch_sizes=(7, 32, 96))


class Inverted(nn.Module):
    """A depthwise convolution between two pointwise ones, with squeeze and excitation, after MobileNet V3."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inside
        self.expand = conv_norm(inside, wide, 1, act=nn.Hardswish(inplace=True))
        self.depthwise = conv_norm(wide, wide, 5, stride=stride, groups=wide, act=nn.Hardswish(inplace=True))
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, wide // 4, 1), nn.ReLU(), nn.Conv2d(wide // 4, wide, 1), nn.Hardsigmoid()
        )
        self.project = conv_norm(wide, outside, 1)
        self.same = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.depthwise(self.expand(x))
        hidden = self.project(hidden * self.squeeze(hidden))
        return x + hidden if self.same else hidden


def mobile(scale: int, checkpointed: bool = False) -> Parts:
    """Inverted residuals with depthwise convolutions."""
    width = 4 * scale
    plan = [(width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]
    body = Stack(*(Inverted(*row) for row in plan), checkpointed=checkpointed)
    head = [conv_norm(4 * width, 16 * width, 1, act=nn.Hardswish()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16 * width, 10)]
    model = nn.Sequential(conv_norm(3, width, 3, stride=2, act=nn.Hardswish()), body, *head)
    return Parts(model=model, sample=(images(48 * scale), labels()), loss=dict(_CLASSIFY), batch_sizes=(7, 32, 96))


class DenseLayer(nn.Module):
    """Adds ``growth`` channels to what came before."""

    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, 4 * growth, 1, bias=False), conv_norm_first(4 * growth, growth)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def conv_norm_first(inside: int, outside: int) -> nn.Sequential:
    """Return batch norm, activation and a convolution of size 3."""
    return nn.Sequential(nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, outside, 3, padding=1, bias=False))


def dense(scale: int, checkpointed: bool = False) -> Parts:
    """Every layer sees all before it, after DenseNet."""
    growth = 4 * scale
    layers: list[nn.Module] = [conv_norm(3, 2 * growth, 3, stride=2, act=nn.ReLU())]
    inside = 2 * growth
    for _stage in range(2):
        count = 2 * max(1, scale // 2)
        layers += [DenseLayer(inside + index * growth, growth) for index in range(count)]
        inside += count * growth
        layers += [nn.Conv2d(inside, inside // 2, 1, bias=False), nn.AvgPool2d(2)]
        inside //= 2
    model = nn.Sequential(
        Stack(*layers, checkpointed=checkpointed), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10)
    )
    return Parts(model=model, sample=(images(32 * scale), labels()), loss=dict(_CLASSIFY), batch_sizes=(7, 32, 96))


class VisionTransformer(nn.Module):
    """Patches of 8 by 8 pixels, a class token, blocks, one linear layer."""

    def __init__(self, side: int, width: int, depth: int, checkpointed: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 1 + (side // 8) ** 2, width) * 0.02)
        self.blocks = Stack(*(Block(width, 3, dropout=0.1) for _ in range(depth)), checkpointed=checkpointed)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def vit(scale: int, checkpointed: bool = False) -> Parts:
    """A vision transformer."""
    model = VisionTransformer(32 * scale, 48 * scale, 2 * scale, checkpointed)
    return Parts(model=model, sample=(images(32 * scale), labels()), loss=dict(_CLASSIFY), batch_sizes=(7, 24, 64))


def _twice(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(conv_norm(inside, outside, act=nn.ReLU(inplace=True)), conv_norm(outside, outside, act=nn.ReLU(inplace=True)))


class UNet(nn.Module):
    """Three levels down and up again, each joined with its counterpart."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(_twice(inside, outside) for inside, outside in zip([3, *widths], widths, strict=False))
        self.bottom = _twice(4 * width, 8 * width)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * outside, outside, 2, 2) for outside in widths[::-1])
        self.join = nn.ModuleList(_twice(2 * outside, outside) for outside in widths[::-1])
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level in self.down:
            x = level(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([kept.pop(), up(x)], 1))
        logits: Tensor = self.head(x)
        return logits


def unet(scale: int) -> Parts:
    """Segmentation into 5 classes, a loss for every pixel."""
    side = 32 * scale
    model = UNet(8 * scale)
    return Parts(model=model, sample=(images(side), torch.randint(5, (2, side, side))), loss=dict(_CLASSIFY), batch_sizes=(3, 12, 40))


def autoencoder(scale: int) -> Parts:
    """Strided convolutions down to a code and transposed ones back to the image."""
    width = 8 * scale
    down = [nn.Conv2d(3, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU()]
    code = [nn.Conv2d(2 * width, width, 1), nn.GroupNorm(4, width), nn.SiLU()]
    up = [nn.ConvTranspose2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.1), nn.ConvTranspose2d(2 * width, 3, 4, 2, 1), nn.Sigmoid()]
    pictures = torch.rand(2, 3, 32 * scale, 32 * scale)
    model = nn.Sequential(*down, *code, *up)
    return Parts(model=model, sample=(pictures, pictures.clone()), loss={"loss_fn": F.mse_loss}, batch_sizes=(15, 64, 200))


class MixerBlock(nn.Module):
    """A perceptron over the places and one over the channels of ``(rows, places, width)``."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.places = nn.Sequential(nn.Linear(places, 2 * places), nn.GELU(), nn.Linear(2 * places, places))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(self.norm(x).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = x + self.channels(self.other_norm(x))
        return mixed


class Mixer(nn.Module):
    """Patches, mixer blocks, the mean over places, one linear layer."""

    def __init__(self, side: int, width: int, depth: int, checkpointed: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.blocks = Stack(*(MixerBlock((side // 8) ** 2, width) for _ in range(depth)), checkpointed=checkpointed)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        return logits


def mixer(scale: int, checkpointed: bool = False) -> Parts:
    """An MLP-mixer."""
    model = Mixer(32 * scale, 48 * scale, 2 * scale, checkpointed)
    return Parts(model=model, sample=(images(32 * scale), labels()), loss=dict(_CLASSIFY), batch_sizes=(7, 32, 96))


class Detector(nn.Module):
    """A pyramid of three levels; on each, classes and boxes for 3 anchors a place, joined over the levels."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.stem = conv_norm(3, width, 3, stride=2, act=nn.ReLU())
        self.levels = nn.ModuleList(conv_norm(width, width, 3, stride=2, act=nn.ReLU()) for _ in range(3))
        self.side = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))
        self.labels = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3 * classes, 3, padding=1))
        self.boxes = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3 * 4, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, maps = self.stem(x), []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        merged = self.side[2](maps[2])
        pyramid = [merged]
        for index in (1, 0):
            merged = self.side[index](maps[index]) + F.interpolate(merged, scale_factor=2.0, mode="nearest")
            pyramid.append(merged)
        found = [self.labels(part).permute(0, 2, 3, 1).reshape(len(x), -1, self.classes) for part in pyramid]
        placed = [self.boxes(part).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for part in pyramid]
        return torch.cat(found, 1), torch.cat(placed, 1)


def detection_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the focal loss of the classes plus the smooth L1 loss of the boxes where there is an object."""
    pictures, wanted, boxes = batch
    logits, placed = model(pictures)
    target = F.one_hot(wanted, logits.shape[-1]).to(logits.dtype)
    plain = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = (1 - torch.exp(-plain)) ** 2 * plain
    distance = F.smooth_l1_loss(placed, boxes, reduction="none").sum(-1) * (wanted > 0)
    return focal.mean() + distance.mean()


def detection(scale: int) -> Parts:
    """A one-stage detector with outputs at several scales."""
    side = 32 * scale
    anchors = 3 * sum((side // step) ** 2 for step in (4, 8, 16))
    sample = images(side), torch.randint(8, (2, anchors)), torch.rand(2, anchors, 4)
    return Parts(model=Detector(16 * scale, 8), sample=sample, loss={"step": detection_loss}, batch_sizes=(31, 128, 400))
