"""Which files of a folder are read as text, and why the others are not.

The splits of a folder are what the library `datasets` makes of its files' names and of its README's YAML, so that a
dataset's folder, as a download of the hub leaves it, means here what it means there.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fsspec.utils import glob_translate

from longctx.data.formats import format_of, no_text
from longctx.errors import ConfigNameError, DocumentsError, SplitError, one_line

if TYPE_CHECKING:
    from datasets.utils.metadata import MetadataConfigs

ABOUT = re.compile(r"(readme|licen[cs]e)([._-].*)?|(copying|notice)(\..*)?", re.IGNORECASE)  # texts about the data
# Facts about the data: of the library `datasets` (its data_files.py leaves them out too), and bookcorpus.py's.
FACTS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "corpus.json")
TRAIN, ALL = "train", "all"  # the names that `datasets` has for a dataset's training split, and for all splits together


@dataclass(frozen=True)
class Choice:
    """Names in a folder, with slashes: of the files to read, in sorted order, and of what is left out, by reason."""

    read: list[str]
    left_out: dict[str, list[str]]


def choose_files(folder: Path, split: str | None, config_name: str | None) -> Choice:
    """The files of `folder` that hold the text of a split.

    Args:
        split: "train" if None; "all" are all files, whatever their split.
        config_name: one of the configurations in the README's YAML; the default one if None.

    Raises:
        DocumentsError: no file can be read.
        SplitError: there is no such split.
        ConfigNameError: there is no such configuration, or there are several and none is named.
    """
    left_out = defaultdict(list)
    readable = []
    for name, reason in sorted(walk(folder), key=lambda found: PurePosixPath(found[0]).parts):
        reason = reason or why_not_text(folder, name)
        (left_out[reason] if reason else readable).append(name)
    if not readable:
        raise no_text()
    read, seen = [], set()
    for name, reason in why_not_of_split(folder, readable, split, config_name).items():
        if reason is None and (real := os.path.realpath(folder / name)) in seen:
            reason = "read already under another name"  # text that is read twice is trained on twice
        elif reason is None:
            seen.add(real)
        (left_out[reason] if reason else read).append(name)
    return Choice(read, dict(left_out))


def why_not_of_split(
    folder: Path, names: list[str], split: str | None, config_name: str | None
) -> dict[str, str | None]:
    """For each of the files `names` the reason why it is not of the split that is asked for; None if it is.

    Raises:
        SplitError, ConfigNameError: as choose_files does.
    """
    configs = read_configs(folder)
    if split == ALL and not configs:
        return dict.fromkeys(names)
    splits = split_files(names, choose_config(configs, config_name))
    if split != ALL and (split or TRAIN) not in splits:
        raise SplitError(f"it has no split named {split or TRAIN}, only {', '.join(splits) or 'files of none'}")
    reasons: dict[str, str | None] = dict.fromkeys(names, "of no split")
    for other, found in splits.items():
        reasons |= dict.fromkeys(found, None if split == ALL else f"of the split {other}")
    return reasons if split == ALL else reasons | dict.fromkeys(splits[split or TRAIN])


def walk(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Each file below `folder`, links followed, and None, or each file or folder that is left out, and the reason.

    A folder that several names lead to is found under the first: a link may lead to a folder above it.
    """
    seen = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, onerror=raise_error, followlinks=True):
        followed = []
        for name in sorted(folders):
            path = Path(place, name)
            if name.startswith((".", "__")):  # such as .git, __pycache__ and __MACOSX, as `datasets` does
                yield path.relative_to(folder).as_posix(), "hidden"
            elif (real := os.path.realpath(path)) in seen:
                yield path.relative_to(folder).as_posix(), "read already under another name"
            else:
                followed.append(name)
                seen.add(real)
        folders[:] = followed
        for name in files:
            yield Path(place, name).relative_to(folder).as_posix(), "hidden" if name.startswith(".") else None


def raise_error(error: OSError) -> None:
    raise error


def why_not_text(folder: Path, name: str) -> str | None:
    """The reason why a file is none that documents are read from; None if it is one."""
    path = folder / name
    kind = format_of(name)
    if kind is None:
        return "of a format that is not read"
    if path.name in FACTS or (kind[0] in (".txt", ".md") and ABOUT.fullmatch(path.name)):
        return "about the data"
    # A link that leads nowhere is text that is missing, which is said once the file is read.
    return "no regular file" if path.exists() and not path.is_file() else None


# --- splits, as the library `datasets` has them ----------------------------------------------------------------------


def read_configs(folder: Path) -> "MetadataConfigs":
    """The configurations in the YAML that a dataset's README.md begins with; none if it has none.

    Raises:
        DocumentsError: they are not as `datasets` reads them.
    """
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    readme = folder / "README.md"
    if not readme.is_file():
        return MetadataConfigs()
    try:
        card: Any = DatasetCard.load(readme)
        return MetadataConfigs.from_dataset_card_data(card.data)
    except Exception as error:  # of the YAML, or of what it holds: each has its own
        raise DocumentsError(f"README.md: its YAML can't be read: {one_line(error)}") from error


def choose_config(configs: "MetadataConfigs", name: str | None) -> dict:
    """A configuration's parameters, of which data_files and data_dir matter; none where there are no configurations.

    Raises:
        ConfigNameError: there is no such configuration, or there are several and none is named.
    """
    try:
        name = name or configs.get_default_config_name()
    except ValueError as error:
        raise ConfigNameError(f"README.md: {one_line(error)}") from error
    if name is None and configs:
        raise ConfigNameError(f"it has several configurations: {', '.join(configs)}")
    if name is not None and name not in configs:
        raise ConfigNameError(f"it has no configuration {name}, only {', '.join(configs) or 'files'}")
    return configs[name] if name else {}


def split_files(names: list[str], config: dict) -> dict[str, list[str]]:
    """The files of each split: by the patterns of a configuration, else by the names of files and folders.

    Raises:
        DocumentsError: `datasets` doesn't take the patterns.
    """
    from datasets.data_files import _get_data_files_patterns, sanitize_patterns

    base = os.path.normpath(config.get("data_dir") or ".")
    inside = {name if base == "." else os.path.relpath(name, base): name for name in names}
    inside = {short: name for short, name in inside.items() if not short.startswith("../")}
    try:
        patterns = config.get("data_files")
        patterns = sanitize_patterns(patterns) if patterns else _get_data_files_patterns(lambda p: matching(inside, p))
        splits = {
            split: [inside[short] for short in {short: None for p in patterns_ for short in matching(inside, p)}]
            for split, patterns_ in patterns.items()
        }
    except (ValueError, FileNotFoundError) as error:
        raise DocumentsError(f"its files can't be told by split: {one_line(error)}") from error
    return {str(split): found for split, found in splits.items() if found}


def matching(names: dict[str, str] | list[str], pattern: str) -> list[str]:
    """The names that a pattern of `datasets` matches: `*` stands for anything but a slash, `**` for slashes too."""
    expression = re.compile(glob_translate(os.path.normpath(pattern)))
    return [name for name in names if expression.match(name)]
