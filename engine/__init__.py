"""A contrastive-plus-generative vision-language pretraining engine."""

__version__ = "0.1.0"
