"""What the machine is, as JSON: card, driver, versions of everything installed, cores, memory, disk."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CARD = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit")


def main() -> int:
    carried = Path(sys.argv[1])
    print(json.dumps(environment() | json.loads((carried / "packed.json").read_text()), indent=1))
    return 0


def environment() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "free_disk_gib": round(shutil.disk_usage("/tmp").free / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(CARD)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        said = f"not read: {error}"
    found["card"] = dict(zip(CARD, map(str.strip, said.split(",")), strict=False))
    distributions = importlib.metadata.distributions()
    found["packages"] = dict(sorted((each.name.lower(), each.version) for each in distributions))
    return found


if __name__ == "__main__":
    sys.exit(main())
