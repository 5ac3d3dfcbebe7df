"""Pickles a config as fairseq's trainer does: run once per release of OmegaConf, in an environment that has only it.

for v in 2.0.6 2.1.2 2.3.0; do (venv with omegaconf==$v) python tests/support/omegaconf/make.py; done

The classes stand for fairseq's of the same names (typed sections, a choice, a value that refers to another, lists,
maps and tuples of given types). Python 3.11, protocol 2, as `torch.save` has it.
"""

import pickle
import sys
import types
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple  # noqa: UP035 (fairseq's spelling, which is in the pickles)

import omegaconf
from omegaconf import II, MISSING, OmegaConf


class Mode(Enum):
    """fairseq's `ChoiceEnum` of extractor modes."""

    default = "default"
    layer_norm = "layer_norm"


@dataclass
class HubertConfig:
    """The part of fairseq's fields that the model has, of every kind of type."""

    _name: str = "hubert"
    label_rate: int = II("task.label_rate")
    extractor_mode: Mode = Mode.layer_norm
    encoder_layers: int = 2
    encoder_embed_dim: int = 32
    encoder_ffn_embed_dim: int = 64
    encoder_attention_heads: int = 2
    activation_fn: str = "gelu"
    dropout: float = 0.0
    layer_norm_first: bool = True
    conv_feature_layers: str = "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2"
    latent_temp: Tuple[float, float, float] = (2, 0.5, 0.999995)  # noqa: UP006
    conv_pos: int = 16
    conv_pos_groups: int = 4
    checkpoint: Optional[str] = None  # noqa: UP045
    required: str = MISSING


@dataclass
class TaskConfig:
    """fairseq's `HubertPretrainingConfig`."""

    _name: str = "hubert_pretraining"
    data: str = "/data"
    label_rate: int = 50
    labels: List[str] = field(default_factory=lambda: ["km"])  # noqa: UP006
    normalize: bool = True
    weights: Dict[str, float] = field(default_factory=lambda: {"km": 1.0})  # noqa: UP006


@dataclass
class FairseqConfig:
    """fairseq's config: sections of any type, and typed ones."""

    model: Any = None
    task: Any = None
    common: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    lr: Optional[List[float]] = None  # noqa: UP006, UP045
    sizes: Tuple[int, ...] = ()  # noqa: UP006


def main() -> None:
    """Writes the pickle beside this file."""
    for module, classes in {
        "fairseq.dataclass.constants": (Mode,),
        "fairseq.dataclass.configs": (FairseqConfig,),
        "fairseq.models.hubert.hubert": (HubertConfig,),
        "fairseq.tasks.hubert_pretraining": (TaskConfig,),
    }.items():
        for count in range(1, module.count(".") + 2):
            sys.modules.setdefault(package := ".".join(module.split(".")[:count]), types.ModuleType(package))
        for made in classes:
            made.__module__ = module
            setattr(sys.modules[module], made.__name__, made)
    config = OmegaConf.structured(FairseqConfig)
    config.model, config.task = HubertConfig(), TaskConfig()
    config.common = {"seed": 1, "big": 2**40, "path": None, "list": [1, [2.5, "x"], {"y": True}]}
    config.lr = [1.0, 0.5]
    path = Path(__file__).with_name(f"config-{omegaconf.__version__}.pickle")
    path.write_bytes(pickle.dumps(config, protocol=2))


if __name__ == "__main__":
    main()
