"""From raw text to the tokens and labels of a training step. Knows nothing of models, plans or ranks.

documents.py    text from files, folders, saved datasets and the hub, as one stream of documents
tokens.py       documents -> tokens, on several processes, in the order of the documents
rows.py         the dataset that bookcorpus.py packs these tokens into, opened, checked and read a row at a time
order.py        the order in which training takes the rows

bookcorpus.py uses the first two, train.py the last two; a dataset of rows on disk is all that passes between them.
"""
