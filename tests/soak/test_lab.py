"""The comparison that every soak rests on: it sees one bit, and one file too many."""

from __future__ import annotations

import shutil
from pathlib import Path

from soak.lab import SHORT, Lab, account, differing


def test_a_single_bit_and_a_file_too_many_are_seen(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lab.whole("gpt2", SHORT), run)
    whole = account(run)
    assert differing(account(run), whole) == []
    for path in [p for p in run.rglob("*") if p.suffix in (".safetensors", ".yaml")]:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert differing(account(run), whole) == [str(path.relative_to(run))]
        path.write_bytes(content)
    content = (run / "metrics.jsonl").read_bytes()
    at = content.index(b"train/loss") + len(b"train/loss: 1.2345678")
    (run / "metrics.jsonl").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert differing(account(run), whole) == ["metrics"]
    (run / "metrics.jsonl").write_bytes(content)
    (run / "student.old").mkdir()
    assert differing(account(run), whole) == ["names", "only in one: student.old"]
