"""Files that may hold a secret, by their names; they never travel with a job.

A job's files lie on every node of a cluster and in Ray's store, readable by whoever can submit
jobs. Names decide, not contents: keys and tokens have no sign of their own. A file that is withheld
without need costs a message, one that travels costs a key, so in doubt a file is withheld; names
that tokenizers and models use are let through.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

_FOLDERS = frozenset(
    {".aws", ".azure", ".docker", ".gcloud", ".gnupg", ".kube", ".secrets", ".ssh", "gcloud"}
    | {"secrets"}
)
_PATTERNS = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".git-credentials", ".pypirc"),
    *(".npmrc", ".pgpass", ".my.cnf", ".boto", ".s3cfg", ".dockercfg", ".htpasswd", ".condarc"),
    *("pip.conf", "kubeconfig", "*.kubeconfig", "kubeconfig.*", "client_secret*.json"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx"),
    *("*.ppk", "*.jks", "*.keystore", "*.kdbx", "*.asc", "*.gpg", "service-account*.json"),
    *("service_account*.json", "*.token"),
)
# Made to be shared.
_HARMLESS = ("*.pub", ".env.example", ".env.sample", ".env.template", "*.example.env")
# The last word of a name without its ending: `hf_token`, `api-key.txt`, `credentials.json`.
_WORDS = frozenset(
    {"token", "secret", "secrets", "password", "passwords", "passwd", "apikey", "credential"}
    | {"credentials", "creds"}
)
_KEYS = frozenset({"api", "access", "account", "auth", "deploy", "private", "secret", "ssh"})
# `bos_token.txt` is a text's token, not a server's.
_OF_TEXT = frozenset({"bos", "cls", "eos", "mask", "pad", "per", "sep", "special", "unk"})
# Endings of files that hold a few values; `token.py` is a program.
_ENDINGS = frozenset(
    {"", ".cfg", ".conf", ".csv", ".ini", ".json", ".pickle", ".toml", ".txt", ".yaml", ".yml"}
)


def may_be_secret(path: str) -> bool:
    """Return whether a file may hold a secret.

    Args:
        path: Its path relative to the project, with slashes.
    """
    *folders, name = PurePosixPath(path.lower()).parts
    if _FOLDERS.intersection(folders):
        return True
    if any(fnmatchcase(name, pattern) for pattern in _HARMLESS):
        return False
    return any(fnmatchcase(name, pattern) for pattern in _PATTERNS) or _says_so(name)


def _says_so(name: str) -> bool:
    file = PurePosixPath(name.lstrip("."))
    words = [word for word in re.split(r"[\W_]+", file.stem) if word]
    if file.suffix not in _ENDINGS or not words:
        return False
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "key":
        return before in _KEYS
    return words[-1] in _WORDS and before not in _OF_TEXT
