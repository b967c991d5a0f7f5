"""What travels with a job: the files git would keep, the sources a recipe names, nothing more."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raymix.cli.main import app
from raymix.errors import ClusterError, RecipeError
from raymix.jobs import Submission, prepare_submission
from raymix.jobs.files import find_project, list_files
from raymix.jobs.package import MAX_ARCHIVE_BYTES, pack
from raymix.jobs.server import JobServer, checked_address
from tests.support.recipes import DOCUMENT


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def document(**changes: Any) -> dict[str, Any]:
    domains = [{"name": "books", "train": "data/*.txt"}, {"name": "web", "train": "s3://b/*.txt"}]
    fields = {
        **DOCUMENT,
        "corpus": {"path": "/shared/corpus", "domains": domains},
        "mixer": {"kind": "uniform"},
        "model": {"config": {"hidden_size": 64}},
        "run": {"dir": "/shared/runs/{name}"},
    }
    for path, value in changes.items():
        node: Any = fields
        *parents, last = path.split("__")
        for key in parents:
            node[key] = dict(node[key])
            node = node[key]
        node[last] = value
    return fields


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write(
        tmp_path / "project",
        {
            "pyproject.toml": "",
            ".gitignore": "/runs/\n*.secret\nhidden/\n",
            "recipes/my.yaml": yaml.safe_dump(document()),
            "recipes/data/a.txt": "some text",
            "recipes/data/key.secret": "hunter2",
            "hidden/b.txt": "more text",
            "runs/old/metrics.jsonl": "{}",
            "code.py": "",
            ".git/config": "[core]",
        },
    )
    monkeypatch.chdir(root)
    return root


def submit(root: Path, recipe: dict[str, Any] | None = None, **more: Any) -> Submission:
    path = root / "recipes" / "my.yaml"
    if recipe is not None:
        path.write_text(yaml.safe_dump(recipe))
    return prepare_submission(more.pop("command", "train"), str(path), **more)


def refused(root: Path, recipe: dict[str, Any] | None = None, **more: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        submit(root, recipe, **more)
    return str(caught.value)


def test_the_project_travels_without_what_is_ignored(project: Path) -> None:
    listing = submit(project).listing
    assert listing.root == project.resolve()
    assert listing.files == (
        ".gitignore",
        "code.py",
        "pyproject.toml",
        "recipes/data/a.txt",
        "recipes/my.yaml",
    )


def test_the_command_runs_the_shipped_recipe_in_the_storage(project: Path) -> None:
    line = submit(project, arguments=["train.steps=5", "--if-exists", "new"], storage="/nfs/a b")
    assert line.entrypoint == (
        "project=\"$PWD\"; mkdir -p '/nfs/a b' && cd '/nfs/a b' && exec python -m raymix train "
        '"$project"/recipes/my.yaml train.steps=5 --if-exists new cluster.address=auto'
    )
    assert shlex.split(line.entrypoint)


@pytest.mark.parametrize("value", ["a;rm -rf x", "$(touch x)", "`touch x`", "a'b", 'a"b'])
def test_no_word_of_a_command_is_run_by_the_shell(project: Path, value: str) -> None:
    line = submit(project, arguments=["--note", value]).entrypoint
    shown = line.replace("exec python -m raymix", "printf '%s\\n'")
    done = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True)
    assert value in done.stdout.splitlines()
    assert not (project / "x").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "corpora/my"}, "corpus.path = 'corpora/my': relative"),
        ({"domains": [{"name": "a", "train": "nowhere/*.txt"}]}, "no file matches"),
        ({"domains": [{"name": "a", "train": "../hidden/b.txt"}]}, "hidden/b.txt does not travel"),
        ({"domains": [{"name": "a", "train": "../../x.txt"}]}, "outside of the project"),
        ({"domains": [{"name": "a", "train": "out/*.txt"}]}, "link leads outwards"),
        ({"domains": [{"name": "a", "train": "data/*"}]}, "key.secret does not travel"),
        ({"tokenizer": {"path": "nowhere.json"}}, "corpus.tokenizer.path"),
    ],
)
def test_sources_must_travel(project: Path, change: dict[str, Any], says: str) -> None:
    write(project.parent, {"x.txt": "outside", "far/c.txt": "outside too"})
    (project / "recipes" / "out").symlink_to(project.parent / "far")
    assert says in refused(project, document(corpus={**document()["corpus"], **change}))


def test_every_fault_is_told_at_once(project: Path) -> None:
    both = document(corpus__path="corpora/my", run__dir="runs/{name}")
    message = refused(project, both)
    assert "corpus.path" in message
    assert "run.dir" in message
    assert "--storage" in message
    assert submit(project, both, storage="/shared").storage == "/shared"
    assert submit(project, both, command="plan").entrypoint


def test_relative_results_go_below_a_url(project: Path) -> None:
    both = document(corpus__path="corpora/my", run__dir="runs/{name}")
    line = submit(project, both, storage="s3://bucket/team").entrypoint
    assert "corpus.path=s3://bucket/team/corpora/my " in line
    assert "'run.dir=s3://bucket/team/runs/{name}' " in line
    assert "cd " not in line
    mine = document(corpus__path="/data/my", run__dir="gs://mine/{name}")
    assert (
        "s3://" not in submit(project, mine, storage="s3://bucket").entrypoint.split("my.yaml")[1]
    )


def test_a_shipped_model_is_read_from_the_project(project: Path) -> None:
    write(project, {"models/tiny/config.json": "{}"})
    recipe = document(model={"kind": "pretrained", "path": "../models/tiny"})
    assert 'model.path="$project"/models/tiny' in submit(project, recipe).entrypoint
    # What is not here may be the result of another job; a name of the Hub is none.
    there = document(model={"kind": "pretrained", "path": "../big/old/model"})
    assert (
        "model.path=/shared/big/old/model" in submit(project, there, storage="/shared").entrypoint
    )
    named = document(model={"kind": "pretrained", "path": "Qwen/Qwen3-0.6B"})
    assert "model.path" not in submit(project, named, storage="/shared").entrypoint


def test_paths_typed_at_submission_are_those_of_the_project(project: Path) -> None:
    write(project, {"more/b c.txt": "text", "tok/tokenizer.json": "{}"})
    words = ["corpus.domains.0.train=[more/*.txt, s3://b/x]", "corpus.tokenizer=./tok", "seed=1"]
    line = submit(project, arguments=[*words, "corpus.path=c"], storage="/shared").entrypoint
    shown = line.replace("exec python -m raymix", "printf '%s\\n'").replace("cd /shared", "true")
    done = subprocess.run(
        ["sh", "-c", shown.replace("mkdir -p /shared", "true")],
        capture_output=True,
        text=True,
        check=True,
    )
    typed = done.stdout.splitlines()
    here = project.resolve()
    assert f'corpus.domains.0.train=["{here}/more/*.txt", "s3://b/x"]' in typed
    assert f"corpus.tokenizer={here}/tok" in typed
    assert "seed=1" in typed
    assert typed[-2:] == ["corpus.path=/shared/c", "cluster.address=auto"]
    sources = ["corpus.domains.0.train=hidden/b.txt"]
    assert "does not travel" in refused(project, arguments=sources, storage="/shared")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"command": "trian"}, "Did you mean 'train'?"),
        ({"command": "merge"}, "Allowed: validate, plan"),
        ({"storage": "relative"}, "neither an absolute path nor a URL"),
        ({"storage": "s3://bucket", "command": "tune"}, "writes to a directory, not to a URL"),
        ({"project": "/"}, "everything in it"),
        ({"project": "recipes/nowhere"}, "not a directory"),
        ({"project": "hidden"}, "outside of the project"),
        ({"arguments": ["train.stesp=5"]}, "train.steps"),
    ],
)
def test_what_cannot_work_is_refused(project: Path, more: dict[str, Any], says: str) -> None:
    assert says in refused(project, **more)


def test_links_stay_inside(project: Path) -> None:
    write(project.parent, {"private.txt": "hunter2"})
    (project / "out.txt").symlink_to(project.parent / "private.txt")
    (project / "in.txt").symlink_to("code.py")
    (project / "loop").symlink_to(project)
    (project / "gone").symlink_to("nothing")
    os.mkfifo(project / "pipe")
    listing = list_files(project)
    assert listing.left_out == ("gone", "loop", "out.txt", "pipe")
    assert "in.txt" in listing.files


SECRET = (
    *(".env", ".env.production", "prod.env", ".aws/credentials", ".aws/config", ".ssh/id_rsa"),
    *(".ssh/known_hosts", ".netrc", "secrets/hf_token", "secrets/any.bin", "deep/SECRETS/x.txt"),
    *("hf_token", "conf/HF_TOKEN.txt", ".token", "token", "token.json", "auth-token.yaml"),
    *("server.pem", "tls.key", "id_ed25519", "id_rsa.bak", ".git-credentials", ".pypirc"),
    *("kubeconfig", "dev.kubeconfig", ".kube/config", "credentials.json", "aws_credentials.csv"),
    *("service-account-prod.json", "client_secret_1.json", "wandb_api_key.txt", "key.p12"),
    *(".docker/config.json", ".config/gcloud/legacy.json", "passwords.txt", "db-password.ini"),
)
HARMLESS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer/tokenizer.model", "tokens.bin", "data/tokens.json", "token.py", "secrets.py"),
    *("count_token.py", "bos_token.txt", "tokens_per_s.csv", "token_files.md", "keys.json"),
    *(".env.example", "id_rsa.pub", "environment.yaml", "env.yaml", "secretary.txt", "key.txt"),
    *("monkey.txt", "books/token-of-love/page.txt", "special_token.json", "secret_garden.txt"),
)


def test_secrets_never_travel_and_tokenizers_do(tmp_path: Path) -> None:
    root = write(tmp_path / "project", dict.fromkeys((*SECRET, *HARMLESS), "x"))
    # A link with a harmless name to one that is none.
    (root / "settings.txt").symlink_to(root / ".env")
    listing = list_files(root)
    assert listing.secrets == tuple(sorted((*SECRET, "settings.txt")))
    assert listing.files == tuple(sorted(HARMLESS))
    pack(listing, tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert sorted(archive.namelist()) == sorted(HARMLESS)


def test_a_dry_run_lists_what_travels_and_why_the_rest_does_not(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, {".env": "KEY=1", "hf_token": "hf_x"})
    with pytest.raises(SystemExit) as end:
        app(["submit", "train", "recipes/my.yaml", "--dry-run"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "travels   recipes/my.yaml  (" in said
    assert "stays     .env  (may hold a secret)" in said
    assert "stays     hidden/  (ignored)" in said
    assert "stay here: 2 files of 0.0 kB that may hold secrets: .env, hf_token\n" in said
    assert said.endswith("nothing was sent\n")


def test_a_source_that_may_be_a_secret_says_so(project: Path) -> None:
    write(project, {"recipes/secrets/books.txt": "text"})
    sources = document(corpus__domains=[{"name": "books", "train": "secrets/*.txt"}])
    said = refused(project, sources)
    assert "secrets/books.txt does not travel: by its name it may hold a secret. Take" in said


def test_a_part_of_a_repository_obeys_the_whole(tmp_path: Path) -> None:
    files = {
        ".git/HEAD": "",
        ".gitignore": "*.log\n/part/secret\n",
        "part/.gitignore": "!keep.log\n",
        "part/a.log": "",
        "part/keep.log": "",
        "part/secret/b": "",
        "part/c": "",
    }
    root = write(tmp_path, files)
    assert list_files(root / "part").files == (".gitignore", "c", "keep.log")
    assert find_project(root / "part") == root.resolve()


def test_equal_projects_give_equal_archives(project: Path, tmp_path: Path) -> None:
    (project / "code.py").chmod(0o755)
    sizes = [pack(list_files(project), tmp_path / "1.zip")]
    os.utime(project / "recipes" / "my.yaml", (1, 1))
    sizes.append(pack(list_files(project), tmp_path / "2.zip"))
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert sizes[0] == sizes[1] == (tmp_path / "1.zip").stat().st_size
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.read("recipes/data/a.txt") == b"some text"
        assert archive.getinfo("code.py").external_attr >> 16 & 0o777 == 0o755


def test_data_is_no_project(project: Path, tmp_path: Path) -> None:
    with (project / "big.bin").open("wb") as file:
        file.truncate(MAX_ARCHIVE_BYTES + 1)
    with pytest.raises(RecipeError, match=r"the largest are big\.bin \(256 MB\)"):
        pack(list_files(project), tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


NAMES = st.sampled_from(["a", "b", "a.log", "b.log", "runs", "c d", "é", "#x", "!y"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
PATTERNS = st.one_of(
    PATHS,
    st.tuples(
        st.sampled_from(["", "!", "/", "!/", "**/", "\\", "!**/"]),
        PATHS | st.sampled_from(["*", "*.log", "a*", "?", "[ab]", "[!a]", "**", "r*s", "a/**"]),
        st.sampled_from(["", "/", "/*", "/**", " ", "\\ "]),
    ).map("".join),
    st.sampled_from(["", "# note", "*", "!*/", "/"]),
)


@settings(max_examples=60)
@given(
    paths=st.sets(PATHS, min_size=1, max_size=8),
    patterns=st.dictionaries(
        st.sampled_from(["", "a/", "b/", "runs/a/"]), st.lists(PATTERNS, max_size=4), max_size=3
    ),
)
def test_ignored_is_what_git_ignores(
    tmp_path_factory: pytest.TempPathFactory, paths: set[str], patterns: dict[str, list[str]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for path in sorted(paths):
        if not any(other.startswith(f"{path}/") for other in paths):
            write(root, {path: ""})
    for base, lines in patterns.items():
        if not base or (root / base).is_dir():
            write(root, {f"{base}.gitignore": "\n".join(lines) + "\n"})
    git = ["git", f"--git-dir={EMPTY}", f"--work-tree={root}", "-c", "core.excludesFile="]
    command = [*git, "ls-files", "-z", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=root)
    expected = sorted(done.stdout.decode().split("\0")[:-1])
    assert list(list_files(root).files) == expected, patterns


@pytest.fixture(scope="module", autouse=True)
def empty_repository(tmp_path_factory: pytest.TempPathFactory) -> None:
    global EMPTY
    EMPTY = tmp_path_factory.mktemp("empty") / "git"
    subprocess.run(["git", "init", "--quiet", "--bare", str(EMPTY)], check=True)


EMPTY = Path()


@pytest.mark.parametrize(
    ("address", "means"),
    [
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("http://localhost:9/ ", "http://localhost:9"),
        ("127.9.9.9", "http://127.9.9.9:8265"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("https://ray.example", "https://ray.example:443"),
        ("https://ray.example/a/", "https://ray.example:443/a"),
    ],
)
def test_addresses_a_token_may_go_to(
    address: str, means: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert checked_address(address.strip()) == means


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://10.0.0.1:8265", "in the clear"),
        ("head:8265", "in the clear"),
        ("http://127.0.0.1.example:8265", "in the clear"),
        ("http://localhost.example", "in the clear"),
        ("http://me:hunter2@127.0.0.1:8265", "no place for a password"),
        ("ray://127.0.0.1:10001", "no job server's"),
        ("http://127.0.0.1:notaport", "no job server's"),
        ("http://127.0.0.1:8265?x=1", "no job server's"),
        ("http://", "no job server's"),
        ("", "no job server's"),
    ],
)
def test_addresses_it_may_not(address: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterError, match=says) as caught:
        checked_address(address)
    assert "hunter2" not in str(caught.value)


def test_without_a_token_or_where_told_plain_http_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert checked_address("head:1", token_in_clear=True) == "http://head:1"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert checked_address("head:1") == "http://head:1"


class DashboardAnswers(BaseHTTPRequestHandler):
    """What Ray's client asks a dashboard before it lists the jobs, and an empty list."""

    def do_GET(self) -> None:
        version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}
        body = json.dumps([] if self.path.startswith("/api/jobs") else version).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_no_proxy_stands_before_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    with HTTPServer(("127.0.0.1", 0), DashboardAnswers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        jobs = JobServer(f"http://127.0.0.1:{server.server_port}")
        assert jobs.jobs() == []
        server.shutdown()
    assert (os.environ["no_proxy"], os.environ.get("NO_PROXY")) == ("example.org", None)


def test_a_proxy_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    # A name of this machine that is no loopback address, so that the connection is tried at all.
    with HTTPServer(("", 0), DashboardAnswers) as server:
        address = f"http://{socket.gethostname()}:{server.server_port}"
        with pytest.raises(ClusterError, match=r"went through the proxy of http_proxy; NO_PROXY="):
            JobServer(address)


def test_auto_is_no_address_of_a_job_server() -> None:
    with pytest.raises(ClusterError, match=r"one of `ray\.init`"):
        checked_address("auto")
