"""SemAIM: autoregressive self-supervised pretraining of plain vision transformers, and downstream tasks."""

__version__ = "0.1.0"
