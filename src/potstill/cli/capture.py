"""The verbs for teacher targets on disk: `potstill capture` and `potstill store`."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from potstill.cli.overrides import add_overrides
from potstill.errors import UserError
from potstill.io.terminal import Display, aligned


def add_flags(capture: argparse.ArgumentParser, store: argparse.ArgumentParser) -> None:
    capture.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file; see its section `capture`")
    add_overrides(capture)
    capture.add_argument("--out", type=Path, metavar="FOLDER", help="default targets/NAME")
    capture.add_argument(
        "--part", metavar="I/N", help="capture the I-th of N parts, for several processes or machines"
    )
    store.add_argument("what", choices=("verify", "show", "merge", "push", "pull"))
    store.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="stores; for merge: the parts of one capture"
    )
    store.add_argument("--out", type=Path, metavar="FOLDER", help="for merge: the folder to make")
    store.add_argument("--repo", metavar="OWNER/NAME", help="for push and pull: the repository on the Hub")
    store.add_argument("--private", action="store_true", help="for push: create the repository as private")


def run_capture(options: argparse.Namespace, display: Display) -> int:
    from potstill.workflows.capture import capture

    out = options.out or Path("targets") / options.recipe.stem
    manifest = capture(options.recipe, options.overrides, out, options.part, display)
    if manifest is None:
        display.note(f"{out}: this part is complete, others are not yet")
        return 0
    _show(out, manifest, options.json, display)
    return 0


def run_store(options: argparse.Namespace, display: Display) -> int:
    """Exit code 2 if a store is damaged, or a merged one is incomplete."""
    action, folders = options.what, options.folders
    for flag, actions in (("out", {"merge"}), ("repo", {"push", "pull"})):
        is_given = getattr(options, flag) is not None
        if action in actions and not is_given:
            raise UserError(f"store {action}: --{flag} is missing. Give it.")
        if is_given and action not in actions:
            raise UserError(
                f"store {action}: --{flag} is only for {' and '.join(sorted(actions))}. Leave it out."
            )
    if action in ("push", "pull") and len(folders) > 1:
        raise UserError(f"store {action}: {len(folders)} folders given. Give one.")
    match action:
        case "merge":
            return _merge(folders, options, display)
        case "push":
            _push(folders[0], options, display)
            return 0
        case "pull":
            from potstill.publish.hub import fetch

            fetch(options.repo, folders[0])  # and verified below
    if action == "show":
        from potstill.store.reader import read_manifest

        for folder in folders:
            _show(folder, read_manifest(folder), options.json, display)
        return 0
    return _verify(folders, options, display)


def _merge(folders: list[Path], options: argparse.Namespace, display: Display) -> int:
    from potstill.store.reader import read_manifest
    from potstill.store.writer import merge

    if missing := merge(folders, options.out):
        display.note(f"{options.out}: {missing} shards are missing: merge the other parts, too")
        return 2
    _show(options.out, read_manifest(options.out), options.json, display)
    return 0


def _verify(folders: list[Path], options: argparse.Namespace, display: Display) -> int:
    from potstill.store.reader import verify

    flaws_by_folder = {str(folder): list(verify(folder)) for folder in folders}
    if options.json:
        display.result(json.dumps(flaws_by_folder, indent=2))
    else:
        for folder, flaws in flaws_by_folder.items():
            display.error(tuple(flaws))
            count = "1 flaw" if len(flaws) == 1 else f"{len(flaws)} flaws"
            display.result(f"{folder}: {count if flaws else 'sound, to the last byte'}")
    return 2 if any(flaws_by_folder.values()) else 0


def _push(folder: Path, options: argparse.Namespace, display: Display) -> None:
    """Upload the folder's files as they are, after verifying them."""
    from potstill.io.hashing import file_sha256
    from potstill.publish.hub import Item, upload
    from potstill.store.reader import verify

    if flaws := list(verify(folder)):
        raise UserError(*flaws)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    plan = [
        Item(str(file.relative_to(folder)), file, file.stat().st_size, file_sha256(file)) for file in files
    ]
    with tempfile.TemporaryDirectory() as scratch:
        commit = upload(options.repo, plan, private=options.private, folder=Path(scratch), note=display.note)
    result = {"repo": options.repo, "commit": commit, "files": len(plan)}
    display.result(json.dumps(result) if options.json else f"pushed: {options.repo}, commit {commit}")


def _show(folder: Path, manifest: dict[str, Any], as_json: bool, display: Display) -> None:
    shown = {name: value for name, value in manifest.items() if name not in ("files", "runs", "seal")}
    if as_json:
        display.result(json.dumps({"store": str(folder)} | shown, indent=2))
        return
    display.result(f"{folder}: {manifest['bytes_per_position']} bytes per position")
    for name, value in shown.items():
        if name not in ("bytes_per_position", "certificate", "tokenizer"):
            display.result(f"  {name}: {value if isinstance(value, str) else json.dumps(value)}")
    certificate = manifest["certificate"]
    for name, value in certificate.items():  # not in the table, whose columns would be as wide
        if isinstance(value, dict):
            display.result(f"  certificate.{name}: {json.dumps(value)}")
    rows = [[name, f"{value:.6g}"] for name, value in certificate.items() if not isinstance(value, dict)]
    display.result(aligned(["certificate", "value"], rows))
