"""``python -m engine.config`` prints the JSON schema of a run's YAML, for editors."""

import json
from typing import Any

from engine.config.schema import Config


def json_schema() -> dict[str, Any]:
    """The schema of a configuration file: the typed sections, ``base`` and the short forms."""
    schema = Config.model_json_schema()
    properties = schema["properties"]
    properties["base"] = {"type": "string", "description": "file to inherit from"}
    short = {"type": "integer", "exclusiveMinimum": 0}
    properties["epoch"] = {"anyOf": [short, properties["epoch"]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
