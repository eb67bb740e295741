"""The verbs of teacher targets on disk: `potstill capture` and `potstill store`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from potstill.display import Display, aligned
from potstill.errors import UserError


def add_flags(capture: argparse.ArgumentParser, store: argparse.ArgumentParser) -> None:
    capture.add_argument("recipe", type=Path, metavar="RECIPE", help="its section `capture` says how")
    capture.add_argument("overrides", nargs="*", metavar="a.b=value", help="set a field of the recipe")
    capture.add_argument("--out", type=Path, metavar="FOLDER", help="default targets/NAME")
    capture.add_argument(
        "--part", metavar="I/N", help="the I-th of N parts, for several processes or machines"
    )
    store.add_argument("what", choices=("verify", "show", "merge"), help="merge: the parts of one capture")
    store.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    store.add_argument("--out", type=Path, metavar="FOLDER", help="of merge: the folder to make")


def run_capture(options: argparse.Namespace, display: Display) -> int:
    from potstill.capturing import capture

    out = options.out or Path("targets") / options.recipe.stem
    manifest = capture(options.recipe, options.overrides, out, options.part, display)
    if manifest is None:
        display.note(f"{out}: this part is done, others are not: no manifest yet")
        return 0
    _show(out, manifest, options.json, display)
    return 0


def run_store(options: argparse.Namespace, display: Display) -> int:
    """Exit code 2 where a flaw was found, or a merged store is not whole."""
    from potstill.targets.store import merge, read_manifest, verify

    if (options.what == "merge") != (options.out is not None):
        raise UserError("store: --out goes with merge, which needs it.")
    if options.what == "merge":
        if missing := merge(options.folders, options.out):
            display.note(f"{options.out}: {missing} shards are missing: merge the other parts, too")
            return 2
        _show(options.out, read_manifest(options.out), options.json, display)
        return 0
    if options.what == "show":
        for folder in options.folders:
            _show(folder, read_manifest(folder), options.json, display)
        return 0
    found = {str(folder): list(verify(folder)) for folder in options.folders}
    if options.json:
        display.result(json.dumps(found, indent=2))
    else:
        for folder, flaws in found.items():
            display.error(tuple(flaws))
            display.result(f"{folder}: {f'{len(flaws)} flaws' if flaws else 'sound, to the last byte'}")
    return 2 if any(found.values()) else 0


def _show(folder: Path, manifest: dict[str, Any], as_json: bool, display: Display) -> None:
    told = {name: value for name, value in manifest.items() if name not in ("files", "runs", "seal")}
    if as_json:
        display.result(json.dumps({"store": str(folder)} | told, indent=2))
        return
    display.result(f"{folder}: {manifest['bytes_per_position']} bytes per position")
    for name, value in told.items():
        if name not in ("bytes_per_position", "certificate", "tokenizer"):
            display.result(f"  {name}: {value if isinstance(value, str) else json.dumps(value)}")
    measured = [[name, f"{value:.6g}"] for name, value in manifest["certificate"].items()]
    display.result(aligned(["certificate", "value"], measured))
