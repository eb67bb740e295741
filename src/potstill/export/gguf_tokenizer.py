"""A tokenizer in the form of a GGUF file: tokens with their types, merges, a pre-tokenizer's name, end tokens.

llama.cpp selects the pre-tokenizer of a byte-level BPE by name and would silently use a wrong one. The name is
determined by behaviour: the tokenizer splits many texts, and the result is compared with that of each
pre-tokenizer listed here. One that splits like none of them is refused, and so is everything else that llama.cpp
would do differently. Pieces of SentencePiece have scores instead: see `gguf_sentencepiece`.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any, NoReturn

from gguf import GGUFWriter, TokenType
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from potstill.data.end_of_turn import ends_of
from potstill.errors import UserError
from potstill.export.gguf_sentencepiece import SentencePiece, space_in_front

PHI_3_PLAIN = {"<unk>", "<s>", "<|endoftext|>"}
"""The special tokens after which Phi-3's tokenizer keeps spaces; llama.cpp looks for these and for </s>."""
REFUSED = "It cannot be written as GGUF; the folder (--format hf) can."
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> PreTokenizer:
    bytes_ = ByteLevel(add_prefix_space=False, use_regex=False)
    return Sequence([Split(Regex(WORDS.format(digits)), "isolated"), bytes_])


_GPT2 = ByteLevel(add_prefix_space=False, use_regex=True)
PRE_TOKENIZERS: dict[str, tuple[PreTokenizer, bool]] = {
    "gpt-2": (_GPT2, False),
    "smollm": (Sequence([Digits(individual_digits=True), _GPT2]), False),
    "llama-bpe": (_split(r"\p{N}{1,3}"), True),
    "dbrx": (_split(r"\p{N}{1,3}"), False),
    "qwen2": (_split(r"\p{N}"), False),
}
"""llama.cpp's name -> how it splits, and whether a piece that is a token is taken whole, without merges."""

SNIPPETS = (
    "The quick brown fox doesn't jump; we'll see, they'VE said, it's 3.14159 or 1,234,567.",
    "def read(path: str) -> list[int]:\n    return [int(x) for x in open(path)]  # 100%\n",
    "\tif (a[i] != b[j++]) {\r\n\t\treturn 0xDEADBEEF & ~mask;\r\n\t}\r\n",
    "x =  12 +   345   \n\n\n   y= 6789012345",
    "Ελληνικά, кириллица, العربية, עברית, हिन्दी, ไทย, 日本語テキスト, 한국어, ქართული",
    "naïve café — “quoted” … ½ ² Ⅷ ٣٤٥ 一二三 ㊷",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 ✨🚀\U0001f9d1\u200d\U0001f4bb",
    "  leading, trailing  \u00a0\u2003\u3000 and\ttabs\t\t",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\dir\\file.txt $HOME",
    "<html><body class='x'>&amp;</body></html> {{template}} ```python\n```",
    "don't DON'T I'd I'D we're 'tis o'clock 'S'",
    "",
    " ",
    "\n",
)
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ    ",
    "0123456789 .,-",
    " \n\t\r\u00a0\u2028\u3000",
    "()[]{}<>=+-*/%&|^~!?.,;:'\"`@#$_\\",
    "éüßñçøåæœđłşžčğİıαβγδежзийאבגदकसあいうえお漢字火水木한국말",
    "😀😃🚀✨🔥🐍👍🏽❤️🇫🇷",
)


@dataclass(slots=True)
class TokenList:
    """The tokenizer section of a GGUF file. `ends` has EOS first, then the end of a turn."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    ends: list[int]
    bos: int | None
    pad: int | None
    unk: int | None
    adds_bos: bool
    adds_eos: bool
    template: str | list[dict[str, str]] | None
    remarks: list[str] = field(default_factory=list)
    scores: list[float] | None = None
    """Of SentencePiece's pieces, which llama.cpp has in place of merges."""
    space_in_front: bool = False
    is_phi_3: bool = False
    """Special tokens but PHI_3_PLAIN take the spaces behind with them."""

    def model_name(self, name: str) -> str:
        """llama.cpp knows Phi-3's rule about spaces by the model's name alone: one that has it or has it not."""
        plain = re.sub("phi-?3", "Phi 3", name, flags=re.IGNORECASE)
        return f"phi-3 {plain}" if self.is_phi_3 else plain

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2" if self.scores is None else "llama")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is None:
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
        writer.add_eos_token_id(self.ends[0])
        # Without one llama.cpp would use id 11.
        writer.add_bos_token_id(self.ends[0] if self.bos is None else self.bos)
        for add, number in zip(
            (writer.add_eot_token_id, writer.add_eom_token_id), self.ends[1:], strict=False
        ):
            add(number)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        if self.unk is not None:
            writer.add_unk_token_id(self.unk)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        writer.add_add_space_prefix(self.space_in_front)
        if self.template is not None:
            writer.add_chat_template(self.template)


def probe_texts(count: int, special: list[str], seed: int = 0) -> list[str]:
    """Texts on which tokenizers differ: prose, code, whitespace, digits, scripts, emoji, special tokens.

    The first are whole snippets, the rest are random, and the same for the same three arguments.
    """
    draw = random.Random(seed)
    texts = [*SNIPPETS, *(f"one{token}two {token} {token}{token}\n" for token in special[:4])]
    while len(texts) < count:
        parts = []
        for _ in range(draw.randint(1, 6)):
            kind = draw.random()
            if kind < 0.25:
                snippet = draw.choice(SNIPPETS)
                start = draw.randint(0, len(snippet))
                parts.append(snippet[start : start + draw.randint(1, 24)])
            elif kind < 0.35 and special:
                parts.append(draw.choice(special))
            else:
                parts.append("".join(draw.choices(draw.choice(ALPHABETS), k=draw.randint(1, 12))))
        texts.append("".join(parts))
    return texts[:count]


def texts_for(tokenizer: Any, count: int) -> list[str]:
    """At most so many, with its special tokens. Spaces beyond ASCII are not put after a token that takes spaces
    with it: of these llama.cpp takes the others alone.
    """
    added = [token for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    strips = "|".join(re.escape(token.content) for token in added if token.rstrip)
    texts = probe_texts(count, [token.content for token in added])
    other = re.compile(rf"(?:{strips})[ \t-\r]*[^\S \t-\r]")
    return [text for text in texts if not (strips and other.search(text))]


def token_list(where: str, tokenizer: Any, size: int, configs: list[Any]) -> TokenList:
    """What the file needs of the tokenizer of `where`, with an embedding of `size` rows.

    Args:
        configs: the model's config and generation config, either of which may name end tokens.

    Raises:
        UserError: llama.cpp cannot do what it does, or not under a name that is listed here.
    """
    model, normalizer = _bpe(where, tokenizer), tokenizer.backend_tokenizer.normalizer
    pieces = bool(model.get("byte_fallback"))
    pre = "default" if pieces else name_pre_tokenizer(where, tokenizer)
    is_phi_3 = pieces and _follows_phi_3(tokenizer)
    tokens, types = _tokens(where, tokenizer, size, is_phi_3)
    ends = _ends(where, tokenizer, configs)
    remarks = []
    if normalizer and not pieces and any(normalizer.normalize_str(x) != x for x in ("e\u0301", "\u2126")):
        remarks.append("normalizer NFC: llama.cpp has none, so that text which is not NFC gives other tokens")
    if is_phi_3:
        remarks.append("spaces beyond ASCII after a special token: llama.cpp does not drop them")
    if len(ends) > 3:
        remarks.append(f"{len(ends)} ends, of which GGUF names three: {ends[3:]} are left out")
    adds_bos, adds_eos = _additions(where, tokenizer)
    template = tokenizer.chat_template
    scores, front = _scores(where, tokenizer, tokens, types, model["merges"]) if pieces else (None, False)
    return TokenList(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        ends=ends,
        bos=_first([tokenizer.bos_token_id, *(getattr(each, "bos_token_id", None) for each in configs)]),
        pad=tokenizer.pad_token_id,
        unk=tokenizer.unk_token_id,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        template=[{"name": name, "template": text} for name, text in template.items()]
        if isinstance(template, dict)
        else template,
        remarks=remarks,
        scores=scores,
        space_in_front=front,
        is_phi_3=is_phi_3,
    )


def _bpe(where: str, tokenizer: Any) -> dict[str, Any]:
    """The model of a fast tokenizer, as its file has it."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        _refuse(where, f"{type(tokenizer).__name__} is not a fast tokenizer")
    model: dict[str, Any] = json.loads(inner.to_str())["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        _refuse(where, f"a {model['type']} tokenizer, not a BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        _refuse(where, "its BPE marks the inside or the end of words, which llama.cpp does not")
    if not model["merges"]:
        _refuse(where, "its BPE has no merges")
    return model


def _follows_phi_3(tokenizer: Any) -> bool:
    """Whether spaces go with the special tokens that llama.cpp lets take them in a Phi-3."""
    added = tokenizer.added_tokens_decoder.values()
    is_there = tokenizer.get_vocab().keys() >= PHI_3_PLAIN | {"</s>"}
    return is_there and all(each.rstrip == (each.content not in PHI_3_PLAIN) for each in added)


def _tokens(where: str, tokenizer: Any, size: int, is_phi_3: bool) -> tuple[list[str], list[int]]:
    """Of each row of the embedding, the token and its type."""
    known = tokenizer.get_vocab()
    if len(known) and max(known.values()) >= size:
        _refuse(where, f"id {max(known.values())} is a token and the embedding has {size} rows")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
    for token, i in known.items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for i, entry in tokenizer.added_tokens_decoder.items():
        if entry.lstrip or (entry.rstrip and not is_phi_3) or entry.single_word:
            _refuse(where, f"the added token {entry.content!r:.60} takes spaces or whole words with it")
        tokens[i] = entry.content
        types[i] = int(TokenType.CONTROL if entry.special else TokenType.USER_DEFINED)
    return tokens, types


def _scores(
    where: str, tokenizer: Any, tokens: list[str], types: list[int], merges: list[list[str]]
) -> tuple[list[float], bool]:
    """Those of SentencePiece's pieces, and whether it puts a space in front; sets the types of bytes and UNK."""
    for i, token in enumerate(tokens):
        if types[i] == TokenType.NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = int(TokenType.BYTE)
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    strips = {i for i, entry in tokenizer.added_tokens_decoder.items() if entry.rstrip}
    known = SentencePiece(tokens, types, pairs, strips)
    try:
        return known.scores, space_in_front(known, tokenizer, texts_for(tokenizer, 400))
    except ValueError as error:
        _refuse(where, f"llama.cpp would split {error.args[0]!r:.60} otherwise, by the scores of its pieces")


def name_pre_tokenizer(where: str, tokenizer: Any) -> str:
    """llama.cpp's name of the pre-tokenizer that splits every probe text as this tokenizer does."""
    inner = tokenizer.backend_tokenizer
    whole_first = bool(json.loads(inner.to_str())["model"].get("ignore_merges"))
    texts = probe_texts(400, [])
    normal = [inner.normalizer.normalize_str(text) if inner.normalizer else text for text in texts]
    if any(
        now not in (text, unicodedata.normalize("NFC", text)) for now, text in zip(normal, texts, strict=True)
    ):
        _refuse(where, "its normalizer changes more than NFC does, which llama.cpp cannot")
    if inner.pre_tokenizer is None:
        _refuse(where, "it has no pre-tokenizer")
    pieces = [inner.pre_tokenizer.pre_tokenize_str(text) for text in texts]
    for name, (known, ignores_merges) in PRE_TOKENIZERS.items():
        if whole_first == ignores_merges and pieces == [known.pre_tokenize_str(text) for text in texts]:
            return name
    _refuse(
        where,
        f"its pre-tokenizer behaves like none of {', '.join(PRE_TOKENIZERS)}"
        f" (ignore_merges: {str(whole_first).lower()}), and llama.cpp would split text otherwise",
    )


def _ends(where: str, tokenizer: Any, configs: list[Any]) -> list[int]:
    """The tokenizer's EOS, the chat template's end of turn, then the other end tokens of the model's configs."""
    ends = ends_of(tokenizer)
    for config in configs:
        named = getattr(config, "eos_token_id", None)
        ends += named if isinstance(named, list) else [] if named is None else [named]
    if not ends:
        _refuse(where, "neither tokenizer nor config has an EOS")
    return list(dict.fromkeys(ends))


def _additions(where: str, tokenizer: Any) -> tuple[bool, bool]:
    """Whether it adds BOS in front and EOS behind."""
    plain, full = (tokenizer("a b", add_special_tokens=which)["input_ids"] for which in (False, True))
    for bos in ([], [tokenizer.bos_token_id]):
        for eos in ([], [tokenizer.eos_token_id]):
            if full == bos + plain + eos:
                return bool(bos), bool(eos)
    _refuse(where, f"it puts {full} for {plain}: more than BOS in front and EOS behind")


def _first(ids: list[int | None]) -> int | None:
    return next((i for i in ids if isinstance(i, int)), None)


def _refuse(where: str, what: str) -> NoReturn:
    raise UserError(f"{where}: tokenizer: {what}. {REFUSED}")
