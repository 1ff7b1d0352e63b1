"""Measure, train and verify the emotional profile of language models. Public names load on first use."""

from importlib import import_module
from importlib.metadata import version

__version__ = version("calibrate")
_HOMES = {
    "EmotionVectors": "vectors",
    "load_vectors": "vectors",
    "load": "models",
    "Checkpoint": "models",
    "load_concepts": "concepts",
    "CalibratedDPOConfig": "training.configs",
    "CalibratedDPOTrainer": "training.trainers",
    "ReadingMonitor": "training.monitor",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'calibrate' has no attribute {name!r}")
    return getattr(import_module(f"calibrate.{_HOMES[name]}"), name)
