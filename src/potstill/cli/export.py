"""The verbs that take a student out of its run: `potstill export` and `potstill publish`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from potstill.cli.overrides import add_overrides
from potstill.errors import UserError
from potstill.io.terminal import Display, aligned


def add_export_flags(export: argparse.ArgumentParser) -> None:
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("--format", choices=("hf", "gguf"), help="write only this format; default both")
    export.add_argument(
        "--quantize",
        metavar="TYPE,…",
        help="GGUF types, one file each: f32,f16,bf16,q8_0,q4_0,q4_k,q6_k; default f16",
    )
    export.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the folder's weights; default auto: that of the files that the student started from",
    )
    export.add_argument("--out", type=Path, metavar="FOLDER", help="default RUN/exports")


def add_publish_flags(pub: argparse.ArgumentParser) -> None:
    pub.add_argument("run", type=Path, metavar="RUN")
    add_overrides(pub, "set a field of the section publish", "publish.b=value")
    pub.add_argument("--repo", required=True, metavar="OWNER/NAME")
    pub.add_argument("--dry-run", action="store_true", help="write the card and the plan, upload nothing")
    pub.add_argument("--private", action="store_true", help="create the repository as private")
    pub.add_argument(
        "--allow-regression", action="store_true", help="publish even a student worse than the untouched one"
    )


def export(options: argparse.Namespace, display: Display) -> int:
    """Exit code 2 if a round trip failed. The file is kept, and its record says what is wrong."""
    if options.format == "hf" and options.quantize is not None:
        raise UserError(
            "--quantize: has no effect with --format hf, which writes no GGUF file. Leave one out."
        )
    if options.format == "gguf" and options.dtype is not None:
        raise UserError(
            "--dtype: has no effect with --format gguf, whose types --quantize names. Leave one out."
        )
    from potstill.export.export import export_run, verdict

    quantize = [word.strip() for word in (options.quantize or "f16").split(",")]
    formats = [*(["hf"] if options.format != "gguf" else []), *(quantize if options.format != "hf" else [])]
    dtype = options.dtype or "auto"
    exported = export_run(options.run, options.out, formats, dtype=dtype, note=display.note)
    if options.json:
        display.result(json.dumps(exported.records, indent=2))
    else:
        rows = [
            [record["file"], *(path["status"] for path in record["three_path"].values())]
            for record in exported.records
        ]
        display.result(aligned(["file", *exported.records[0]["three_path"]], rows))
    failed = [record for record in exported.records if verdict(record) == "failed"]
    for record in failed:
        for name, path in record["three_path"].items():
            if path["status"] == "failed":
                display.error((f"{record['file']}: {name}: {path['why']}",))
    return 2 if failed else 0


def publish(options: argparse.Namespace, display: Display) -> None:
    from potstill.publish import publish as publishing

    commit, arguments = None, (options.run, options.repo, options.overrides, options.allow_regression)
    if options.dry_run:
        prepared = publishing.prepare(*arguments)
    else:
        prepared, commit = publishing.publish(*arguments, private=options.private, note=display.note)
    if options.json:
        display.result(json.dumps(prepared.as_dict() | {"commit": commit}, indent=2))
        return
    rows = [[item.path, f"{item.bytes:,}", item.sha256] for item in prepared.plan]
    display.result(aligned(["file", "bytes", "sha256"], rows))
    display.result(f"published: {prepared.repo}, commit {commit}" if commit else f"card: {prepared.card}")
