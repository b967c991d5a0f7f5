"""The schema of KubeRay's custom resources, made from a release's own definition.

    git show v1.7.0:ray-operator/config/crd/bases/ray.io_rayjobs.yaml > rayjobs.yaml
    python -m tests.support.kuberay_schema rayjobs.yaml > kuberay-1.7.0.schema.json

The definition (https://github.com/ray-project/kuberay, Apache-2.0) says with every field what it
means; here only what a validator needs is kept, what occurs several times stands once, and fields
that the definition does not know are faults: Kubernetes would drop them without a word.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

_SCHEMA_KEYS = ("type", "enum", "required", "pattern", "minimum", "maximum", "minLength",
                "maxLength", "minItems", "maxItems", "format", "nullable")  # fmt: skip
_SHARED_BYTES = 300


def schema_of(definition: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of version v1 of a custom resource's definition."""
    versions = {version["name"]: version for version in definition["spec"]["versions"]}
    root = strict(versions["v1"]["schema"]["openAPIV3Schema"])
    counts = Counter(json.dumps(node, sort_keys=True) for node in inner(root))
    texts = [text for text, n in counts.items() if n > 1 and len(text) > _SHARED_BYTES]
    names = {text: f"shared-{at}" for at, text in enumerate(sorted(texts, key=len))}
    shared = {name: referring(json.loads(text), names, root=True) for text, name in names.items()}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**head, **referring(root, names), "$defs": shared}


def strict(node: dict[str, Any]) -> dict[str, Any]:
    """Return a node of the definition with what a validator needs, unknown fields refused."""
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    schema = {key: node[key] for key in _SCHEMA_KEYS if key in node}
    if "properties" in node:
        schema["properties"] = {key: strict(item) for key, item in node["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    if isinstance(node.get("additionalProperties"), dict):
        schema["additionalProperties"] = strict(node["additionalProperties"])
    if "items" in node:
        schema["items"] = strict(node["items"])
    return schema


def inner(node: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all schemas below a schema."""
    below = list(node.get("properties", {}).values())
    below += [node[key] for key in ("items", "additionalProperties")
              if isinstance(node.get(key), dict)]  # fmt: skip
    return below + [deeper for item in below for deeper in inner(item)]


def referring(node: dict[str, Any], names: dict[str, str], *, root: bool = False) -> dict[str, Any]:
    """Return a schema in which what is shared is named, not written out."""
    name = names.get(json.dumps(node, sort_keys=True))
    if name is not None and not root:
        return {"$ref": f"#/$defs/{name}"}
    schema = dict(node)
    if "properties" in node:
        schema["properties"] = {k: referring(v, names) for k, v in node["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            schema[key] = referring(node[key], names)
    return schema


if __name__ == "__main__":
    print(json.dumps(schema_of(yaml.safe_load(Path(sys.argv[1]).read_text())), indent=1))
