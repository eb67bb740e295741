"""`potstill publish`: a finished run becomes a repository on the Hub, with its card, or is refused.

    RUN/publish/README.md        the card
                manifest.json    every file with its sha256
                provenance.json  what the student came from
                recipe.yaml      as given
                plan.json        what is, or would be, uploaded: path, bytes and sha256 of each file

Refused, one line each: a run that is not finished, a red check, an export that fails where others load it or
is of another student, weights that are not finite, files that are not those of the receipt, a student behind
the untouched one (unless that is allowed, and then stated on the card), a license that is unknown or does not
fit, and anything that looks like a token. The plan is uploaded, and nothing else.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potstill.errors import UserError
from potstill.io.hashing import file_sha256
from potstill.io.safe_open import read_object
from potstill.io.terminal import Display
from potstill.models.model_files import folder_sha256, tensor_shapes
from potstill.models.ollama import MODELFILE, modelfile
from potstill.models.safetensors_files import check_safetensors
from potstill.publish import hub
from potstill.publish.hub import MANIFEST, Item
from potstill.publish.licenses import Parent, license_of, settle
from potstill.publish.metadata import eval_results, metadata
from potstill.publish.model_card import CardInputs, card
from potstill.recipe.load import publish_section
from potstill.recipe.paths import short_name
from potstill.recipe.sections_training import PublishConfig
from potstill.runs.answers import side_by_side
from potstill.runs.comparison import RESULT, read_comparison
from potstill.runs.gains import profile_of
from potstill.runs.run_dir import READABLE, RunDir, write_whole

FOLDER, CARD, PROVENANCE = "publish", "README.md", "provenance.json"
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}\b")
MAX_TEXT_BYTES = 32 * 2**20
EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}
"""Of each type, the exponent bits, which are all set in an infinity or a NaN."""
PIECE = 2**24
BETTER = {"heldout/kl": min, "heldout/ce": min, "heldout/agreement": max}


@dataclass(frozen=True)
class Prepared:
    """A run that may be published, and its plan; its files are not touched while it is locked."""

    run: RunDir
    repo: str
    plan: Sequence[Item]

    @property
    def card(self) -> Path:
        return self.run.path / FOLDER / CARD

    def as_dict(self) -> dict[str, Any]:
        """The content of `plan.json`."""
        files = []
        for item in self.plan:
            inside = item.file.is_relative_to(self.run.path)
            file = item.file.relative_to(self.run.path) if inside else item.file.name
            files.append(asdict(item) | {"file": str(file)})
        return {"repo": self.repo, "files": files}


def prepare(path: Path, repo: str, overrides: Sequence[str] = (), allow_regression: bool = False) -> Prepared:
    """Check the run and write RUN/publish/, without any network.

    Args:
        overrides: `publish.…=value`, over the run's own recipe.
        allow_regression: publish a student that is behind the untouched one, stated on the card.

    Raises:
        UserError: one line for each reason not to publish.
    """
    run = _opened(path, repo)
    with run.locked():
        return _prepared(run, repo, overrides, allow_regression)


def publish(
    path: Path,
    repo: str,
    overrides: Sequence[str] = (),
    allow_regression: bool = False,
    *,
    private: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Prepared, str]:
    """Prepare, upload and download again to compare; returns the plan and the commit that holds it.

    Raises:
        UserError: a reason not to publish, or the Hub fails. The same call again continues.
    """
    run = _opened(path, repo)
    with run.locked():
        prepared = _prepared(run, repo, overrides, allow_regression)
        folder = prepared.card.parent
        return prepared, hub.upload(repo, prepared.plan, private=private, folder=folder, note=note)


def note_card(path: Path, display: Display) -> None:
    """The end of a demo: what `potstill publish RUN --repo you/demo --dry-run` does."""
    try:
        prepared = prepare(path, "you/demo")
    except UserError as error:  # overrides can make a demo unfit to publish; the run itself is done
        display.warn(f"not to be published: {error.mistakes[0]}")
    else:
        display.note(f"model card, as `potstill publish {path} --dry-run` writes it: {prepared.card}")


def _opened(path: Path, repo: str) -> RunDir:
    if not REPO.fullmatch(repo):
        raise UserError(f"--repo {repo:.200}: not a repository name. Give OWNER/NAME.")
    if (path / RESULT).is_file():
        raise UserError(f"{path}: a comparison of several runs. Give one of them, such as {path / 'kd-0'}.")
    return RunDir.open(path)


def _prepared(run: RunDir, repo: str, overrides: Sequence[str], allow_regression: bool) -> Prepared:
    path = run.path
    state = run.status().get("state", "unknown")
    receipt = run.receipt()
    if state != "finished" or not receipt:
        raise UserError(
            f"{path}: the run is {state}, not finished. Continue it with --resume, then publish it."
        )
    given = run.path / "recipe.yaml"
    tree, publish = publish_section(run.resolved.read_text("utf-8"), str(run.resolved), overrides)
    files = _sound_files(run, receipt)
    exports, gguf = _sound_exports(run, receipt)
    # An exported folder takes the place of the student's own files; both together would be two models.
    files = exports if "config.json" in exports else files | exports
    comparison = read_comparison(path.absolute().parent)
    if comparison is not None and path.absolute().name not in comparison.get("runs", []):
        comparison = None
    regressions = list(_regressions(receipt, tree, comparison))
    if regressions and not allow_regression:
        raise UserError(
            *(f"{path}: {one}. --allow-regression publishes it and says so." for one in regressions)
        )
    if (red := receipt.get("check_red", [])) or not receipt.get("check"):
        why = f"the check `{red[0]}` failed" if red else "its receipt has no check"
        raise UserError(f"{path}: {why}, so its numbers prove nothing. Correct the recipe and run it again.")
    parents = _parents(tree, publish, receipt)
    student = run.student / "config.json"
    inputs = CardInputs(
        repo=repo,
        recipe=given.read_text("utf-8", "replace"),
        resolved=tree,
        publish=publish,
        receipt=receipt,
        corpus=run.corpus(),
        config=read_object(student, READABLE),
        parameters=sum(int(np.prod(shape)) for shape in tensor_shapes(run.student).values()),
        command=read_object(run.path / "environment.json", READABLE).get("command", []),
        faults=len(run.faults()),
        humaneval=_humaneval(run.evals / "humaneval" / "humaneval.json", receipt),
        tasks=[
            _of_this_student(path, _result(path) or {}, receipt)
            for path in sorted(run.evals.glob("task-*/result.json"))
        ],
        lm_eval=_result(run.evals / "lm-eval" / "result.json"),
        comparison=comparison,
        profile=profile_of(run),
        # Others are of the corpus, which may not be the publisher's to show.
        answers=[each for each in side_by_side(run) if each["how"] == "greedy"],
        gguf=gguf,
        license=settle(parents, publish.license),
        parents=parents,
        regressions=regressions,
    )
    return _written(run, inputs, files)


def _sound_files(run: RunDir, receipt: Mapping[str, Any]) -> dict[str, Path]:
    """The student's files by their names in the repository: those of the receipt, with finite weights."""
    recorded = receipt.get("output", {})
    there = {file.name: file for file in sorted(run.student.iterdir())} if run.student.is_dir() else {}
    for name in sorted(recorded.keys() | there.keys()):
        what = ""
        if name not in there:
            what = "is missing"
        elif name not in recorded:
            what = "is not in the receipt"
        elif file_sha256(there[name]) != recorded[name]:
            what = "is not the file of the receipt: its sha256 differs"
        if what:
            raise UserError(
                f"{run.student / name}: {what}. Only what the run wrote is published; restore its files."
            )
    for name, file in there.items():
        if name.endswith(".safetensors") and (tensor := not_finite(file)):
            raise UserError(
                f"{file}: tensor {tensor} has a value that is not finite. Such a model is not published."
            )
    return there


def not_finite(file: Path) -> str | None:
    """Name of the first tensor of a safetensors file that holds an infinity or a NaN."""
    check_safetensors(file)
    content = np.memmap(file, np.uint8, "r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in EXPONENTS:
            continue
        kind, mask = EXPONENTS[entry["dtype"]]
        first, last = (start + at for at in entry["data_offsets"])
        for at in range(first, last, PIECE):
            bits = content[at : min(at + PIECE, last)].view(kind)
            if bool(((bits & mask) == mask).any()):
                return str(name)
    return None


def _sound_exports(run: RunDir, receipt: Mapping[str, Any]) -> tuple[dict[str, Path], list[str]]:
    """Exported files by their names in the repository, and those of them that are GGUF."""
    files: dict[str, Path] = {}
    gguf: list[str] = []
    again = f"Run `potstill export {run.path}` again."
    student = folder_sha256(run.student) if receipt.get("exports") else ""
    for record in receipt.get("exports", []):
        place = run.path / record["file"]
        where = f"{place}: export {record['format']}"
        if record["student_sha256"] != student:
            raise UserError(f"{where} was made from another student. {again}")
        failed = [one for one in record.get("three_path", {}).items() if one[1]["status"] == "failed"]
        if failed and ("files" in record or place.exists()):
            ((name, result), *_) = failed
            todo = "Remove the file to publish without it; the card says so."
            raise UserError(
                f"{where} fails when {name} loads it: {result.get('why', 'no reason was recorded')}."
                f" {again if 'files' in record else todo}"
            )
        if failed:
            continue
        parts = record.get("files") or {place.name: record}
        for name, part in parts.items():
            file = place / name if "files" in record else place
            if not file.is_file() or file_sha256(file) != part["sha256"]:
                raise UserError(f"{file}: missing, or not the file that was exported. {again}")
            files[name] = file
            if name.endswith(".safetensors") and (tensor := not_finite(file)):
                raise UserError(f"{file}: tensor {tensor} has a value that is not finite. {again}")
        if "files" not in record:
            gguf.append(place.name)
    return files, gguf


def _regressions(
    receipt: Mapping[str, Any], tree: Mapping[str, Any], comparison: Mapping[str, Any] | None
) -> Iterator[str]:
    """Where the student is behind the untouched one, in what the recipe gives weight to."""
    first, best = receipt["heldout_first"], receipt["heldout_best"]
    if receipt["student_is_of_step"] == 0:
        yield "no evaluation was better than the untouched student, which is the one that was saved"
        return
    weights = {"heldout/kl": "kd_weight", "heldout/ce": "ce_weight", "heldout/agreement": "kd_weight"}
    for name, better in BETTER.items():
        counts = name in first and name in best and tree["objective"][weights[name]]
        if counts and better(first[name], best[name]) != best[name]:
            yield f"{name} is {best[name]:.4f}, that of the untouched student {first[name]:.4f}"
    for one in (comparison or {}).get("differences", []):
        if one["against"] == "untouched" and one["ahead"] == "untouched" and one["arm"] == "KD":
            yield f"the comparison shows the untouched student ahead of {one['arm']} in {one['metric']}"


def _parents(tree: Mapping[str, Any], publish: PublishConfig, receipt: Mapping[str, Any]) -> list[Parent]:
    """Whose licenses bind the student: the model it started from, its teacher, its data, of several each one's."""
    student, teacher = tree["student"], receipt["teacher"]
    teachers = {f"teacher/{each['name']}": each.get("source") for each in teacher.get("teachers", ())}
    sources = {
        "student": student.get("model") if student["name"] == "checkpoint" else None,
        **(teachers or {"teacher": teacher.get("source") or tree["teacher"].get("path")}),
    }
    data = {f"data/{each['source']}": each for each in tree["corpus"].get("sources", ())}
    sources |= {
        of: corpus.get("path") or corpus["name"] for of, corpus in (data or {"data": tree["corpus"]}).items()
    }
    parents = []
    for of, source in sources.items():
        if source is None:  # cut from the teacher, made from a config, or a teacher without weights
            continue
        role, _, name = of.partition("/")
        stated = getattr(publish, f"{role}_license")
        read = receipt.get("licences", {}).get(of) or license_of(source, role)
        what = name or getattr(publish, role) or short_name(source)
        if stated is not None:
            read = {"license": stated, "read_from": "the publisher's word"}
        parents.append(Parent(role, what, read["license"], read["read_from"]))
    return parents


def _humaneval(path: Path, receipt: Mapping[str, Any]) -> dict[str, Any] | None:
    """Its result; refused where it is seen to be another student's."""
    result = _result(path)
    if result is not None and result.get("status") == "not_judged":
        return None  # completions alone say nothing of a score
    return None if result is None else _of_this_student(path, result, receipt)


def _of_this_student(path: Path, result: dict[str, Any], receipt: Mapping[str, Any]) -> dict[str, Any]:
    settings = result.get("settings", {})
    # Only the last step's weights have a hash in the receipt, and it holds for one dtype.
    is_last = receipt["student_is_of_step"] == receipt["steps"]
    comparable = is_last and settings.get("dtype") == receipt["weights_dtype"]
    if comparable and settings.get("weights_sha256") != receipt["student"]["weights_sha256_end"]:
        raise UserError(f"{path}: the evaluation of another student. Evaluate this run again, or remove it.")
    return result


def _result(path: Path) -> dict[str, Any] | None:
    return read_object(path, READABLE) if path.is_file() else None


def _written(run: RunDir, inputs: CardInputs, files: Mapping[str, Path]) -> Prepared:
    """Write RUN/publish/ afresh, and plan what is uploaded."""
    folder = run.path / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    texts = {
        CARD: card(inputs, metadata(inputs)),
        PROVENANCE: json.dumps(_provenance(inputs), indent=2) + "\n",
        "recipe.yaml": inputs.recipe,
    }
    if (results := eval_results(inputs)) is not None:
        texts[".eval_results/humaneval.yaml"] = results
    if inputs.gguf:
        texts[MODELFILE] = modelfile([files[name] for name in inputs.gguf], files["config.json"].parent)
    for name, content in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_whole(folder / name, content.encode("utf-8", "backslashreplace"))
    plan = [_item(name, file) for name, file in {**files, **{name: folder / name for name in texts}}.items()]
    manifest = {item.path: {"bytes": item.bytes, "sha256": item.sha256} for item in plan}
    write_whole(folder / MANIFEST, (json.dumps({"files": manifest}, indent=2) + "\n").encode())
    plan = sorted([*plan, _item(MANIFEST, folder / MANIFEST)], key=lambda item: item.path)
    for item in plan:
        if item.bytes <= MAX_TEXT_BYTES and TOKEN.search(item.file.read_bytes()):
            raise UserError(
                f"{item.file}: holds what looks like a token of the Hub. Remove it; nothing was uploaded."
            )
    prepared = Prepared(run, inputs.repo, plan)
    write_whole(folder / "plan.json", (json.dumps(prepared.as_dict(), indent=2) + "\n").encode())
    return prepared


def _item(path: str, file: Path) -> Item:
    return Item(path, file, file.stat().st_size, file_sha256(file))


def _provenance(inputs: CardInputs) -> dict[str, Any]:
    """Hashes of everything that the student came from, and of the code that made it."""
    receipt = inputs.receipt
    plain = ("potstill", "commit", "uncommitted_changes", "recipe_sha256", "corpus_fingerprint")
    exports = [
        {name: value for name, value in record.items() if name != "file"}
        for record in receipt.get("exports", [])
    ]
    return {
        **{name: receipt.get(name) for name in (*plain, "tokenizer_sha256", "seed", "steps", "positions")},
        "license": inputs.license.license,
        "parents": [asdict(parent) for parent in inputs.parents],
        "teacher": {"id": inputs.teacher, "weights_sha256": receipt["teacher"].get("weights_sha256")},
        "student": {
            "base": inputs.base,
            "weights_sha256_start": receipt["student"]["weights_sha256_start"],
            "is_of_step": receipt["student_is_of_step"],
            "files": receipt["output"],
        },
        "exports": exports,
        "libraries": receipt["environment"]["libraries"],
    }
