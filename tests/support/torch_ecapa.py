"""A small ECAPA-TDNN in torch, written from FACTS D4 for comparison only, and its weights in our tree."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn


class Unit(nn.Module):
    def __init__(self, inputs, outputs, taps=1, dilation=1):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, taps, padding=dilation * (taps - 1) // 2, dilation=dilation)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x):
        return self.bn(torch.relu(self.conv(x)))


class Block(nn.Module):
    def __init__(self, width, dilation):
        super().__init__()
        self.unit1, self.unit2 = Unit(width, width), Unit(width, width)
        self.res2 = nn.ModuleList([Unit(width // 8, width // 8, 3, dilation) for _ in range(7)])
        self.down, self.up = nn.Linear(width, 128), nn.Linear(128, width)

    def forward(self, x):
        parts = self.unit1(x).chunk(8, dim=1)
        heard = []
        for number, unit in enumerate(self.res2):
            heard.append(unit(parts[number] if number == 0 else parts[number] + heard[-1]))
        y = self.unit2(torch.cat([*heard, parts[7]], dim=1))
        gates = torch.sigmoid(self.up(torch.relu(self.down(y.mean(dim=2)))))
        return x + y * gates[:, :, None]


class Pooling(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attend1 = nn.Conv1d(width, 128, 1)
        self.attend2 = nn.Conv1d(128, width, 1)

    def forward(self, x):
        weights = torch.softmax(self.attend2(torch.tanh(self.attend1(x))), dim=2)
        mean = (weights * x).sum(dim=2)
        spread = (weights * x**2).sum(dim=2) - mean**2
        return torch.cat([mean, spread.clamp(min=1e-9).sqrt()], dim=1)


class TorchECAPA(nn.Module):
    def __init__(self, features, width, embedding):
        super().__init__()
        self.norm = nn.InstanceNorm1d(features)
        self.layer1 = Unit(features, width, 5)
        self.layer2, self.layer3, self.layer4 = (Block(width, dilation) for dilation in (2, 3, 4))
        self.conv = nn.Conv1d(3 * width, 3 * width, 1)
        self.pooling = Pooling(3 * width)
        self.bn = nn.BatchNorm1d(6 * width)
        self.linear = nn.Linear(6 * width, embedding)

    def forward(self, frames):
        """(rows, frames, features) -> (rows, embedding); the authors' 1e-6 included."""
        x = self.layer1(self.norm(frames.transpose(1, 2) + 1e-6))
        second = self.layer2(x)
        third = self.layer3(second)
        fourth = self.layer4(third)
        x = torch.relu(self.conv(torch.cat([second, third, fourth], dim=1)))
        return self.linear(self.bn(self.pooling(x)))


def torch_ecapa(features, width, embedding, seed=0):
    """The module with every weight and statistic random."""
    torch.manual_seed(seed)
    module = TorchECAPA(features, width, embedding)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def our_tree(named) -> dict:
    """Tensors by torch's names as our tree: kernels turned round, batch norms under our names."""
    ours = {"weight": "kernel", "running_mean": "mean", "running_var": "variance"}
    tree: dict = {}
    for name, tensor in named:
        *path, last = name.replace("res2.", "res2_").split(".")
        if last == "num_batches_tracked":
            continue
        array = tensor.detach().numpy()
        if last == "weight":
            array = np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place["scale" if last == "weight" and array.ndim == 1 else ours.get(last, last)] = array
    return jax.tree.map(jnp.asarray, tree)
