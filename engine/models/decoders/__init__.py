"""Decoders, a file each."""

from engine import registry


def encodes_prompt(name: str) -> bool:
    """Whether the decoder of that name takes prompt and answer as two texts, and not as one.

    Its module then says so: ``ENCODES_PROMPT = True``. Raises UserError for an unknown name.
    """
    module = registry.find("models/decoders", name, key="model.decoder.name")
    return getattr(module, "ENCODES_PROMPT", False)
