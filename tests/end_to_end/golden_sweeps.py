"""Two sweeps with the numbers they gave before the modules moved: what they train, and what their reports show.

`golden/<name>/` is such a sweep as `lorabench.slim` copies it: records, histories and test results. `golden/reports.json`
has the SHA-256 of each file of the report made of it. `python tests/end_to_end/golden_sweeps.py` writes that file anew,
for a change of a report's words; the records are never written anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "golden"
REPORTS = HERE / "reports.json"
COMMANDS = {
    "mixed": ["--config-dir", str(HERE / "conf"), "+experiment=mixed", "trainer.precision=32"],
    "smoke": ["+experiment=smoke", "trainer.precision=32"],
}
# Seconds, bytes and the machine's own words differ from run to run; everything else of a record may not.
MEASURED = {"resources", "provenance"}


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """The parts of a record that are the same each time its run is trained."""
    return {key: value for key, value in record.items() if key not in MEASURED}


def machine() -> dict[str, Any]:
    """What the last bits of a float32 result depend on: the processor's instructions, its vendor, torch's version."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    vendor = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "unknown")
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__.partition("+")[0], "vendor": vendor, "capability": capability}


def report_hashes(report: Path) -> dict[str, str]:
    """SHA-256 of each file of a report but its PNG pictures, whose compression is the library's own, and its mark."""
    from lorabench.report.directory import MARK

    return {
        str(path.relative_to(report)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(report.rglob("*"))
        if path.is_file() and path.suffix != ".png" and path.name != MARK  # the mark lists the checksums of all
    }


def main() -> None:
    """Render both reports and write their hashes."""
    from lorabench.report import render

    found = {}
    for name in COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            render(HERE / name, Path(folder) / "report")
            found[name] = report_hashes(Path(folder) / "report")
    REPORTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
