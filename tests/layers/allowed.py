"""What looks unused to vulture and is used: by its name, with the reason."""

_REGISTRY = "a constant of a part, which engine/registry.py reads from the source"
_VALIDATION = "pydantic calls it or reads it when a section is made"
_YAML = "PyYAML calls it or reads it"
_RUN = "a method of a library's class, which the library calls"
_OF_OTHERS = "an attribute of a library's object, which the library reads"
_DDP = "an option that is passed to DDP with all others"
_READER = "part of the interface for users, as documented in README.md"

ALLOWED = {
    "NAMES": _REGISTRY,
    "model_config": _VALIDATION,
    "_no_truth_as_number": _VALIDATION,
    "_short_forms": _VALIDATION,
    "stable_random": "a key of older configurations; randomness is always replayed",
    "ignore_aliases": _YAML,
    "indentless": _YAML,
    "yaml_implicit_resolvers": _YAML,
    "on_broken_pipe": _RUN,
    "_hp_optimizer_states_linked": _OF_OTHERS,
    "_iterator": _OF_OTHERS,
    "encode_special_tokens": _OF_OTHERS,
    "eos_token_id": _OF_OTHERS,
    "intra_op_num_threads": _OF_OTHERS,
    "is_updated": _OF_OTHERS,
    "log_severity_level": _OF_OTHERS,
    "max_position_embeddings": _OF_OTHERS,
    "meteor_p": _OF_OTHERS,
    "normalizer": _OF_OTHERS,
    "post_processor": _OF_OTHERS,
    "pre_tokenizer": _OF_OTHERS,
    "quiet": _OF_OTHERS,
    "require_forward_param_sync": _OF_OTHERS,
    "bucket_cap_mb": _DDP,
    "gradient_as_bucket_view": _DDP,
    "embed_images": _READER,
}  # fmt: skip
