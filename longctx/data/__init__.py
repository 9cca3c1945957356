"""From raw text to the tokens and labels of a training step. Knows nothing of models, plans or ranks.

corpus.py       where a corpus is, a file, a folder, a saved dataset or one of the hub, as one stream of documents
folders.py      which files of a folder are read, and why the others are not
formats.py      the documents of one file of text, JSON or Parquet
documents.py    what a document is: whole, in pieces, or the reason why it can't be read
groups.py       texts of one group, such as a code repository, joined into a document
chats.py        a list of messages, written by the chat template, and rows in which each conversation is whole
tokens.py       documents -> tokens, on several processes, in the order of the documents
rows.py         the dataset that bookcorpus.py packs these tokens into, opened, checked and read a row at a time
packing.py      where the documents of a row begin
order.py        the order in which training takes the rows

bookcorpus.py uses the first seven, train.py the last three; a dataset of rows on disk is all that passes between them.
"""
