"""What CI runs beyond `make test`: tests that are left out there for the time they take."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def selections(script: str) -> list[list[str]]:
    """The arguments of every pytest of a script of .ci/ that names test files."""
    text = (ROOT / ".ci" / script).read_text().replace("\\\n", " ")
    found = re.findall(r"python\" -m pytest (tests/\S+\.py .*?)(?:\|\||\n)", text)
    return [[word for word in shlex.split(part) if word != "-q"] for part in found]


def collected(arguments: list[str]) -> set[str]:
    """Names of the tests that pytest would run."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "-n", "0", "--collect-only", "-q"],
        cwd=ROOT,
        env={**os.environ, "RELPROP_NO_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line}


def test_every_kernel_is_compiled_for_every_architecture() -> None:
    (arguments,) = (found for found in selections("run") if "test_cuda_compiled.py" in found[0])
    cases = {f"test_resources[{path.name}-sm_{a}]" for path in (ROOT / "csrc").glob("*.cu") for a in (80, 90)}
    assert cases <= collected(arguments)


def test_the_oldest_torch_compiles_kernels_and_shares_its_binary_with_the_newest() -> None:
    compiled, shared = selections("versions")
    assert collected(compiled) == {"test_a_few_on_hopper", "test_boolean_mask_and_shared_keys_on_hopper"}
    assert collected(shared) == {"test_one_binary_under_two_versions_of_torch"}


@pytest.mark.parametrize("installs", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_browser_is_installed_or_missed_aloud(there: bool, installs: bool, tmp_path: Path) -> None:
    """On a machine whose PATH has no more than what is put there."""
    text = (ROOT / ".ci" / "run").read_text()
    check = text[text.index("browser()") : text.index("make test")]
    browser = tmp_path / "chromium"
    installing = f"echo '#!/bin/sh' > {browser}; chmod +x {browser}" if installs else "exit 100"
    programs = {
        "id": "echo 0",
        "timeout": 'shift; exec "$@"',
        "apt-get": f'echo "$@" >> {tmp_path}/calls; [ "$1" = update ] || {{ {installing}; }}',
    }
    for name, line in (programs | ({"chromium": ""} if there else {})).items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("bash", "sh", "chmod"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", check], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ("WARNING: no page was looked at" in done.stderr) == (not there and not installs)
    assert (tmp_path / "calls").exists() == (not there)


def test_no_nvcc_is_a_failure_unless_none_is_asked_for() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    check = re.findall(r"^if \[\[ -n \"\$no_nvcc\".*?^fi\n", text, re.MULTILINE | re.DOTALL)[0]

    def status(no_nvcc: str, no_cuda: str) -> int:
        environment = {**os.environ, "no_nvcc": no_nvcc, "RELPROP_NO_CUDA": no_cuda}
        return subprocess.run(["bash", "-euc", check], env=environment, capture_output=True).returncode

    assert status("no nvcc was found", "") == 1 and status("no nvcc was found", "0") == 1
    assert status("RELPROP_NO_CUDA was set", "1") == 0 and status("", "") == 0
