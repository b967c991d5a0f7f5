"""What README and documentation tell a user to type is typed, page by page, line after line.

The recipes are tiny and stay on this machine. Lines that need a cluster, a run in work, or train
dozens of models through Ray, are parsed by `tests/unit/repository/test_docs.py` and
`test_readme.py`; what they do is tested elsewhere.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.support import buckets
from tests.support.commands import raymix_lines
from tests.support.merging import write_family
from tests.support.paths import ROOT
from tests.support.shell import DOMAINS, QUICKSTART, Shell, typed, write_recipe

PAGES = {
    "README.md": [],
    "docs/quickstart.md": [],
    # Runs that Slurm's script and the one for a single node make.
    "docs/clusters.md": ["train my.yaml", "train my.yaml name=other"],
    "docs/systems/laws.md": [],
    "docs/systems/merge.md": [],
    "docs/systems/mixers.md": [],
    "docs/systems/mixing.md": [],
    "docs/systems/schedule.md": ["prepare my.yaml"],
    "docs/systems/token_files.md": [],
}
"""Pages, and what has been typed before."""
ELSEWHERE = ("weights", "submit", "status", "logs", "stop", "compare", "tune", "specialists")
LITTLE = {
    "seed": 1,
    "data": {"sequence_length": 32, "rows_per_step": 2},
    "train": {"steps": 3},
    "eval": {"rows_per_domain": 2},
    "cluster": {"workers": 0},
}
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def shell_blocks(page: Path) -> str:
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return "\n".join(blocks)


def table(path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    names = ("books", "code", "web")
    lines = [
        "run,step," + ",".join(f"{kind}.{name}" for kind in ("share", "loss") for name in names)
    ]
    for run in range(24):
        share = random.dirichlet(np.ones(3))
        for step in (1000, 2000, 4000):
            loss = 2 + 3 * step**-0.2 * np.exp(-0.4 * share)
            cells = ",".join(f"{value:.8f}" for value in (*share, *loss))
            lines.append(f"r{seed}-{run},{step},{cells}")
    path.write_text("\n".join(lines) + "\n")


def little(work: Path, page: Path) -> None:
    """Write the page's recipe, made little, or one like it, and the data that it names."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    mine = [yaml.safe_load(block) for block in blocks if re.search(r"^name: my$", block, re.M)]
    if not mine or "train" not in mine[0]["corpus"]["tokenizer"]:
        write_recipe(work / "my.yaml", name="my", **{f"{k}": v for k, v in LITTLE.items()})
        return
    recipe: dict[str, Any] = {**mine[0], **LITTLE}
    recipe["corpus"]["tokenizer"]["vocab_size"] = 300
    recipe["model"] = {**recipe["model"], "config": SHAPE}
    for name, source, ending in (("books", "books", "parquet"), ("code", "python", "jsonl")):
        (work / "data" / name).mkdir(parents=True)
        text = pq.read_table(QUICKSTART / "train" / f"{source}.parquet")["text"][:40]
        column = pa.table({"content" if ending == "jsonl" else "text": text})
        if ending == "parquet":
            pq.write_table(column, work / "data" / name / "a.parquet")
        else:
            column.to_pandas().to_json(
                work / "data" / name / "a.jsonl", orient="records", lines=True
            )
            recipe["corpus"]["domains"][1]["train"] = "data/code/*.jsonl"
    (work / "my.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def lines_of(page: Path) -> list[str]:
    """Return the lines that are run: as they are typed, less what makes them long."""
    lines = []
    for line in raymix_lines(shell_blocks(page)):
        line = re.sub(r"\s+#.*", "", line).removeprefix("raymix ")
        if line.split()[0] in ELSEWHERE or "--on ray" in line:
            continue
        if line.startswith("init "):
            line = "init fresh.yaml"
        # The last word counts.
        line = line.replace("s3://bucket/", f"s3://{buckets.BUCKET}/")
        lines.append(re.sub(r"train\.tokens=\S+ cluster\.workers=\d+", "train.lr=0.001", line))
    return lines


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_tells_to_type_works(name: str, tmp_path: Path) -> None:
    page = ROOT / name
    little(tmp_path, page)
    (tmp_path / "pipelines").mkdir()
    domains = [{"name": one, "train": str(QUICKSTART / "valid" / f"{one}.parquet")}
               for one in DOMAINS[:2]]  # fmt: skip
    for pipeline, mixer in (("quickstart", "uniform"), ("pike", "pike"), ("longctx", "uniform")):
        write_recipe(
            tmp_path / "pipelines" / f"{pipeline}.yaml",
            name=pipeline,
            corpus__path=str(tmp_path / "corpora" / "quickstart"),
            corpus__tokenizer={"kind": "byte"},
            corpus__domains=domains,
            run__dir=str(tmp_path / "runs" / "{name}"),
            mixer={"kind": mixer},
            **LITTLE,
        )
    for at, file in enumerate(("mixtures.csv", "others.csv")):
        table(tmp_path / file, at)
    family = write_family(tmp_path, tasks=2)
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({"merge_method": "drm", **family}))
    lines = lines_of(page)
    assert lines
    with contextlib.ExitStack() as stack:
        stored = any("s3://" in line for line in lines)
        shell = Shell(tmp_path, env=stack.enter_context(buckets.bucket()) if stored else {})
        outputs = list(typed(shell, [(line, 0) for line in (*PAGES[name], *lines)]))
    for line, code, text in outputs:
        assert f"exit {code}" in text, f"{name}: raymix {line}: {text}"
