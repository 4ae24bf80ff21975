"""Models and their parts. Importing any of them first makes timm and transformers importable."""

import engine.torchvision_ops  # noqa: F401  both import torchvision
