"""YAML with one meaning: the scalars of YAML 1.2's core schema, one document, text keys, each key once.

Refused, with line and column: anchors, aliases, merge keys, tags, several documents, deep nesting, large
files and bytes that are not UTF-8. A key given twice is reported beside the tree, so that a caller can go on
to find the other mistakes.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NoReturn

import yaml

from potstill.errors import UserError
from potstill.io.safe_open import NO_PICKLE, pickle_in

MAX_BYTES = 2**20
MAX_DEPTH = 32

# YAML 1.2.2, section 10.3.2. YAML 1.1, which PyYAML reads, has 1e-4 as text, 010 as eight and `on` as true.
CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
ADVICE = {
    "\\t": "Indent with spaces.",
    "mapping values are not allowed": "Quote a text that holds a colon and a space.",
    "cannot start any token": "Quote the text.",
}
DECIMAL = re.compile(r"[-+]?[0-9]+")
OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


def decode(data: bytes, where: str) -> str:
    """The text of a file's bytes; a byte-order mark of UTF-8 is dropped."""
    if len(data) > MAX_BYTES:
        raise UserError(f"{where}: larger than {MAX_BYTES} bytes. A recipe is a short YAML file.")
    if kind := pickle_in(data, len(data)):
        raise UserError(f"{where}: not YAML but {kind}: {NO_PICKLE}. A recipe is a YAML file in UTF-8.")
    if b"\0" in data:
        raise UserError(
            f"{where}: a binary file (zero byte at {data.index(0)}). A recipe is a YAML file in UTF-8."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte 0x{data[error.start]:02x} at {error.start}). Save it as UTF-8."
        ) from error


def read(text: str, where: str) -> tuple[Any, list[str]]:
    """The text as dicts, lists and scalars; and a mistake for every key that is given twice."""
    loader = _Loader(text, where)
    try:
        if not loader.check_node():
            return None, []
        node = loader.get_node()
        assert node is not None
        if loader.check_node():
            event = loader.peek_event()  # type: ignore[no-untyped-call]
            _refuse(where, event.start_mark, "a second document starts. One file is one recipe.")
    except yaml.MarkedYAMLError as error:
        what = ", ".join(part for part in (error.context, error.problem) if part)
        hint = next((advice for sign, advice in ADVICE.items() if sign in what), "Correct the YAML there.")
        _refuse(where, error.problem_mark or error.context_mark, f"{what}. {hint}", error)
    except (ValueError, OverflowError) as error:  # PyYAML's own int() and chr() on escapes and directives
        _refuse(
            where, loader.get_mark(), "a character or number out of range. Correct the YAML there.", error
        )
    finally:
        loader.dispose()
    twice: list[str] = []
    return _build(node, (), where, twice), twice


def override(tree: dict[str, Any], text: str, short_forms: Collection[tuple[str, ...]] = ()) -> str:
    """Set a field of a tree from `a.b=value`; returns the dotted path of the outermost entry made or changed.

    A text that stands where `short_forms` says is widened to {name: text} when something is set inside it.
    """
    where = f"override {text:.200}"
    dotted, equals, written = text.partition("=")
    if not equals or not dotted or not dotted.isprintable():
        raise UserError(f"{where}: not of the form a.b=value. Write, say, train.steps=10.")
    value, twice = read(written, where)
    if twice:
        raise UserError(*twice)
    *parents, last = dotted.split(".")
    if len(parents) > MAX_DEPTH:
        raise UserError(f"{where}: nested deeper than {MAX_DEPTH} levels. A recipe needs four.")
    node: Any = tree
    made = ""
    for depth, step in enumerate(parents):
        if (
            tuple(parents[: depth + 1]) in short_forms
            and isinstance(node, dict)
            and isinstance(node.get(step), str)
        ):
            node[step] = {"name": node[step]}
        _require_entry(node, step, parents[:depth], where)
        if isinstance(node, list):
            node = node[int(step)]
            continue
        if node.get(step) is None:
            child = [*parents, last][depth + 1]
            if child.isdecimal():
                here = ".".join(parents[: depth + 1])
                raise UserError(f"{where}: {here} is not given and has no entry {child}. Set the whole list.")
            node[step] = {}
            made = made or ".".join(parents[: depth + 1])
        node = node[step]
    _require_entry(node, last, parents, where)
    node[int(last) if isinstance(node, list) else last] = value
    return made or dotted


def write(tree: dict[str, Any]) -> str:
    """YAML that reads back as the same tree, by `read` and by a YAML 1.1 reader."""
    written: str = yaml.dump(
        tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )
    return written


def _require_entry(node: Any, step: str, path: list[str], where: str) -> None:
    here = ".".join(path)
    if isinstance(node, list):
        if not step.isdecimal() or len(step) > 9 or int(step) >= len(node):
            raise UserError(
                f"{where}: {here} is a list of {len(node)} and has no entry {step:.60}. Count from 0."
            )
    elif not isinstance(node, dict):
        raise UserError(f"{where}: {here} is {node!r:.60} and has no fields.")


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner, parser and composer; not its constructors, which give scalars their meaning of YAML
    1.1.
    """

    def __init__(self, text: str, where: str) -> None:
        self.where = where
        self.depth = 0
        try:
            super().__init__(text)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            character = f"U+{ord(text[error.position]):04X}"
            raise UserError(
                f"{where}: line {line}: character {character} may not stand in YAML. Remove it."
            ) from error

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            what = "anchors (&) and aliases (*) are not read. Quote a text that starts with one of them."
            _refuse(self.where, event.start_mark, what)
        if event.tag is not None:
            _refuse(
                self.where,
                event.start_mark,
                f"tags ({event.tag}) are not read. Quote a text that starts with !.",
            )
        if self.depth == MAX_DEPTH:
            _refuse(
                self.where, event.start_mark, f"nested deeper than {MAX_DEPTH} levels. A recipe needs four."
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _build(node: yaml.Node, path: tuple[str, ...], where: str, twice: list[str]) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, where)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, str(i)), where, twice) for i, item in enumerate(node.value)]
    built: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = _scalar(key_node, where) if isinstance(key_node, yaml.ScalarNode) else None
        line = key_node.start_mark.line + 1
        if key == "<<" and key_node.style is None:
            _refuse(where, key_node.start_mark, "merge keys (<<) are not read. Write the fields out.")
        if not isinstance(key, str):
            found = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or a mapping"
            _refuse(where, key_node.start_mark, f"the key is {found:.60}, not text. Keys are field names.")
        here = (*path, key)
        if key in built:
            lines_of_both = f"line {line}" if lines[key] == line else f"lines {lines[key]} and {line}"
            twice.append(f"{where}: {'.'.join(here)}: given twice, in {lines_of_both}. Keep one.")
            continue
        lines[key] = line
        built[key] = _build(value_node, here, where, twice)
    return built


def _scalar(node: yaml.ScalarNode, where: str) -> Any:
    text: str = node.value
    if any("\ud800" <= character <= "\udfff" for character in text):
        _refuse(
            where, node.start_mark, "half of a surrogate pair is no character. Write the character itself."
        )
    if node.style is not None:
        return text
    if text in CONSTANTS:
        return CONSTANTS[text]
    if DECIMAL.fullmatch(text):
        if len(text) > 100:
            _refuse(where, node.start_mark, f"a number of {len(text)} digits. No field holds more than 20.")
        return int(text)
    if OCTAL_OR_HEX.fullmatch(text):
        return int(text, 0)
    if FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _refuse(where: str, mark: Any, what: str, cause: Exception | None = None) -> NoReturn:
    raise UserError(f"{where}: line {mark.line + 1}, column {mark.column + 1}: {what}") from cause


class _Dumper(yaml.SafeDumper):
    """Quotes what a reader of either version would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Only in double quotes do line breaks such as U+0085 survive PyYAML's emitter.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(f"^(?:{FLOAT.pattern}|{OCTAL_OR_HEX.pattern})$"),
    list("-+.0123456789"),
)
_Dumper.add_representer(str, _Dumper.represent_str)
