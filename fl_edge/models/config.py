"""Settings of the models room."""

from __future__ import annotations

from dataclasses import dataclass

from fl_edge.config import setting

MODELS = ("digits", "alexnet", "vgg16", "cnn_h", "cnn_s")


@dataclass
class ModelConfig:
    """A small classifier and where it is cut."""

    name: str = setting(
        "digits", "digits (8x8), alexnet (CIFAR-10), vgg16 (144x144), cnn_h (HAR) or cnn_s (speech)", choices=MODELS
    )
    cut: int = setting(-1, "layers that make the bottom; -1: the model's own cut, that of MergeSFL's code", low=-1)
    dropout: float = setting(0.5, "of the two large models' tops", low=0.0, high=0.95)


@dataclass(unsafe_hash=True)
class LanguageModelConfig:
    """A transformer of Hugging Face, the base that adapters are trained on."""

    name: str = setting(
        "small-bert",
        "small-bert or small-llama (pretrained on local text at the first use, a minute or two), deep-llama or "
        "deep-qwen (half an hour), minilm (all-MiniLM-L6-v2 from its package), a folder of save_pretrained, or the "
        "name of a model on the hub",
    )
    pretrain_steps: int = setting(0, "steps that pretrain a small model; 0: its own number", low=0)
