"""That the benchmarks start and print what can be compared later; never how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parent.parent / "tools" / "bench" / "run.py"


def test_each_line_on_stdout_is_a_figure_with_spread_machine_and_versions(tmp_path: Path) -> None:
    command = [sys.executable, str(RUN), "--quick", "--only", "import", "--store", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert [figure["name"] for figure in figures] == ["import"]
    for figure in figures:
        assert 0 < figure["min"] <= figure["median"] <= figure["max"]
        assert figure["rounds"] > 1
        assert figure["unit"] == "ms"
        assert figure["target"] == "<= 100 ms"
        assert figure["machine"]["cores"] >= 1
        assert figure["versions"]["python"]
    assert list(tmp_path.iterdir()) == []  # the stores made for measuring are gone
