"""The same networks in PyTorch, with weights of their own: what is computed costs the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def small_cnn() -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for features in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(before, features, 3, padding=1), nn.ReLU()]
            before = features
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1, and a shortcut."""

    def __init__(self, before: int, features: int, stride: int) -> None:
        super().__init__()
        after = 4 * features
        self.main = nn.Sequential(
            *_normalized(before, features, 1, 1),
            nn.ReLU(),
            *_normalized(features, features, 3, stride),
            nn.ReLU(),
            *_normalized(features, after, 1, 1),
        )
        is_new = stride > 1 or before != after
        self.shortcut = nn.Sequential(*(_normalized(before, after, 1, stride) if is_new else []))

    def forward(self, x: Any) -> Any:
        return nn.functional.relu(self.main(x) + self.shortcut(x))


def _normalized(before: int, after: int, size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(before, after, size, stride, size // 2, bias=False)
    return convolution, nn.BatchNorm2d(after)


def resnet50() -> nn.Module:
    blocks = []
    before = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for i in range(depth):
            blocks.append(Bottleneck(before, 64 * 2**stage, 2 if stage and not i else 1))
            before = 256 * 2**stage
    stem = (*_normalized(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))
    return nn.Sequential(*stem, *blocks, *head)


def perceptron() -> nn.Module:
    hidden = (nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(64, 2))


class SmallViT(nn.Module):
    """Four blocks of attention over 64 patches of 32 x 32 x 3."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 96, 4, 4)
        self.places = nn.Parameter(torch.zeros(1, 64, 96))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(96, 4, 192, 0.0, batch_first=True, norm_first=True)
                for _ in range(4)
            )
        )
        self.head = nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 10))

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.blocks(x).mean(1))


TORCH_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cnn": small_cnn,
    "resnet": resnet50,
    "mlp": perceptron,
    "vit": SmallViT,
}
