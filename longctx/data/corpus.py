"""Where a corpus is, a file, a folder, a saved dataset or one of the hub, and its documents as one stream."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from longctx.data.documents import Columns, ReadDocuments
from longctx.data.folders import ALL, TRAIN, choose_files
from longctx.data.formats import ROWS_READ, arrow_documents, check_columns, format_of, no_text, read_documents
from longctx.errors import BadDocument, ColumnError, ConfigNameError, DocumentsError, SplitError, one_line

if TYPE_CHECKING:  # not everywhere installed: bookcorpus.py says so, once it knows that it is asked for rows
    import datasets


@dataclass(frozen=True)
class Corpus:
    """Text to make rows of.

    `documents` reads columns of it, from its start each time it is called. `size` is about the sum of the documents'
    shares. `read` and `left_out` are names of files, the latter by reason; a saved dataset or one of the hub has none.
    """

    documents: Callable[[Columns], ReadDocuments]
    size: int
    read: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)


def open_corpus(name: str, split: str | None = None, config_name: str | None = None) -> Corpus:
    """The corpus that `name` leads to, of which no document has been read yet.

    Args:
        split, config_name: which part of a dataset; "train" and the default configuration if None.

    Raises:
        DocumentsError: there is no such corpus, or no text in it.
        SplitError, ConfigNameError: it has no such part.
    """
    path = Path(name)
    if not path.exists():
        return dataset_corpus(load_hub_dataset(name, split, config_name))
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        if config_name:
            raise ConfigNameError("a saved dataset has no configurations")
        return dataset_corpus(load_saved_dataset(name, split))
    if path.is_dir():
        choice = choose_files(path, split, config_name)
        return files_corpus(path, choice.read, choice.left_out)
    if split or config_name:
        raise (SplitError if split else ConfigNameError)("a file by itself has no splits and no configurations")
    if format_of(path.name) is None:
        raise no_text()
    return Corpus(partial(read_documents, path), path.stat().st_size, [path.name])


def files_corpus(folder: Path, names: list[str], left_out: dict[str, list[str]]) -> Corpus:
    """The documents of the files `names`, whose errors say in which file they are."""

    def documents(columns: Columns) -> ReadDocuments:
        for name in names:
            for document, share in read_documents(folder / name, columns):
                if isinstance(document, DocumentsError):
                    document = type(document)(f"{name}: {document}")
                yield document, share

    size = sum((folder / name).stat().st_size for name in names if (folder / name).exists())
    return Corpus(documents, size, names, left_out)


def load_hub_dataset(name: str, split: str | None, config_name: str | None) -> "datasets.Dataset":
    import datasets

    load = partial(datasets.load_dataset, name, config_name, split=split or TRAIN)
    try:
        try:
            return load()
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # Of every dataset that is a script, the hub keeps a conversion to Parquet.
            return load(revision="refs/convert/parquet")
    except Exception as error:  # of the network, the hub or the dataset: each has its own
        raise DocumentsError(f"no such file or folder, and no dataset of the hub: {one_line(error)}") from error


def load_saved_dataset(name: str, split: str | None) -> "datasets.Dataset":
    """A dataset that `save_to_disk` wrote, or one split of several."""
    import datasets

    try:
        saved = datasets.load_from_disk(name)
    except Exception as error:  # of a file that is missing or damaged: each has its own
        raise DocumentsError(f"the dataset that was saved there can't be read: {one_line(error)}") from error
    if isinstance(saved, datasets.Dataset) and split is None:
        return saved
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or TRAIN): saved}
    if split == ALL:
        return datasets.concatenate_datasets(list(splits.values()))
    if (split or TRAIN) not in splits:
        raise SplitError(f"it has no split named {split or TRAIN}, only {', '.join(map(str, splits))}")
    return splits[split or TRAIN]


def dataset_corpus(dataset: "datasets.Dataset") -> Corpus:
    def documents(columns: Columns) -> ReadDocuments:
        check_columns(dataset.features.arrow_schema, columns)
        row = 0
        try:
            for table in dataset.select_columns(columns.names).with_format("arrow").iter(ROWS_READ):
                yield from arrow_documents(table, columns, row, 1)  # type: ignore[arg-type]
                row += len(table)
        except (pa.ArrowException, OSError) as error:
            yield BadDocument(f"rows {row} to {len(dataset) - 1} can't be read: {one_line(error)}"), len(dataset) - row

    return Corpus(documents, len(dataset))


def choose_columns(corpus: Corpus, choices: list[Columns]) -> Columns:
    """The first of `choices` by which the first document of a corpus that is not damaged can be read; else the first of
    all, whose error is then the one to tell."""
    for columns in choices:
        with suppress(ColumnError):  # which a saved dataset raises
            found = (document for document, _ in corpus.documents(columns) if not isinstance(document, BadDocument))
            if not isinstance(next(found, None), ColumnError):
                return columns
    return choices[0]
