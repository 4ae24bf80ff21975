"""What the byte-level tokenizers share: their special tokens, and how a text becomes bytes."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from engine.data.text.tokenizer import TextTokenizer

TOKENS = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character for each byte


def untrained(*, split_words: bool) -> Tokenizer:
    """A BPE without merges: ids 0 to 3 are special, each other id is a byte."""
    vocabulary = {piece: i for i, piece in enumerate([*TOKENS.values(), *ALPHABET])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in TOKENS.values()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=split_words, use_regex=split_words
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def finish(tokenizer: Tokenizer) -> TextTokenizer:
    """The tokenizer with its start and end tokens put around each text."""
    start, end = TOKENS["cls"], TOKENS["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)],
    )
    return TextTokenizer(tokenizer, TOKENS)
