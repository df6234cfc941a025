"""GPT-2's tokenizer, in which the published lengths of BABILong are counted."""

import json
import os

from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lm2_jax.data.tokenizers import JsonTokenizer, TokenizerConfig
from lm2_jax.errors import UserError

FILES = ("vocab.json", "merges.txt")  # as published with the model


def find_gpt2(folder: str | None) -> JsonTokenizer | None:
    """Loads GPT-2's tokenizer from its vocab.json and merges.txt.

    Args:
      folder: where the files are; None: `tokenizers/gpt2` in the data folder ($LM2_JAX_DATA, or ../shared/data), if it
        is there.
    Returns:
      The tokenizer; None where `folder` is None and the data folder has none.
    Raises:
      UserError: `folder` has no such files, or they are damaged.
    """
    place = epath.Path(folder or f"{os.environ.get('LM2_JAX_DATA', '../shared/data')}/tokenizers/gpt2")
    if not all((place / name).is_file() for name in FILES):
        if folder is None:
            return None
        raise UserError(f"gpt2_dir={folder!r}: expected GPT-2's {' and '.join(FILES)} there")
    vocabulary, merges = (str(place / name) for name in FILES)
    try:
        inner = Tokenizer(models.BPE.from_file(vocabulary, merges))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{place}: damaged {' or '.join(FILES)}: {error}", status=1) from error
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return JsonTokenizer(json.loads(inner.to_str()), TokenizerConfig(kind="json", path=vocabulary))
