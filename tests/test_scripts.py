"""Set-up: one environment per checkout, made once, remade when half made; every failure is one line. And the pins.

The scripts run for real, on a stand-in for Python that notes its calls and installs nothing.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("launch/setup_env.sh", "launch/run_sft_training.sh", "tests/run.sh", ".ci/run")
TOOLS = ("bash", "cat", "cp", "dirname", "find", "flock", "grep", "head", "ls", "mkdir", "mv", "rm", "sed", "sha256sum")
TOOLS += ("sleep", "tail", "touch")

PYTHON = """#!/usr/bin/env bash
# Notes each call as one line, with | between the arguments; makes an environment that holds a copy of itself.
version=3.11
if [ -e "$0.version" ]; then version=$(cat "$0.version"); fi
case "$1 $2" in
  "-c import sys"*) [ "$version" ] && echo "$version"; exit ;;
  "-c import venv"*) [ ! -e "$0.no_venv" ]; exit ;;
esac
(IFS="|"; echo "$*" >>"$CALLS")
if [ "$1 $2" = "-m venv" ]; then
  if [ -L "$3" ]; then exit 1; fi # as venv does
  mkdir "$3/bin"
  cp "$0" "$3/bin/python"
  if [ -e "$0.version" ]; then cp "$0.version" "$3/bin/python.version"; fi
elif [ "$1 $2 $PIP" = "-m pip fails" ]; then
  cat "$PIP_SAYS"; exit 1
elif [ "$1 $2 $PIP" = "-m pip sleeps" ]; then
  sleep 1
fi
"""


class Checkout:
    """A checkout with the scripts in it, on a machine that has a few tools and the Pythons given."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.calls_file = folder / "check out", folder / "bin", folder / "calls"
        for name in (*SCRIPTS, "launch/constraints.txt", "pyproject.toml"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.environ = {"PATH": str(self.bin), "CALLS": str(self.calls_file), "PIP_SAYS": str(folder / "pip_says")}

    def add_python(self, name: str = "python3", version: str = "3.11") -> Path:
        python = self.bin / name
        python.write_text(PYTHON.replace("#!/usr/bin/env bash", f"#!{shutil.which('bash')}"))
        python.chmod(0o755)
        Path(f"{python}.version").write_text(version)
        return python

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen:
        command = [shutil.which("bash"), *arguments]
        kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen(command, cwd=self.root, env=self.environ | environ, **kinds)

    def run(self, *arguments: str, **environ: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environ)
        out, err = process.communicate(timeout=20)
        return process.returncode, out, err

    def calls(self, *beginning: str) -> list[list[str]]:
        """The calls of Python so far that begin with these arguments, each without them."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        calls = [line.split("|") for line in lines]
        return [call[len(beginning) :] for call in calls if tuple(call[: len(beginning)]) == beginning]

    def made(self) -> tuple[int, int]:
        """How often an environment was made, and how often this package was installed into one."""
        return len(self.calls("-m", "venv")), sum("--editable" in call for call in self.calls("-m", "pip"))

    def error(self, *arguments: str, **environ: str) -> str:
        code, out, err = self.run(*arguments or ("launch/run_sft_training.sh",), **environ)
        lines = [line for line in err.splitlines() if not line.startswith("setup: ")]
        assert (code, out, len(lines)) == (2, "", 1) and lines[0].startswith("error: ")
        assert not self.calls(str(self.root / "launch" / "train.py"))
        return lines[0]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    checkout = Checkout(tmp_path)
    checkout.add_python()
    return checkout


# Made once


def test_the_first_call_sets_up_and_trains_and_the_second_only_trains(checkout: Checkout) -> None:
    code, out, err = checkout.run("launch/run_sft_training.sh")
    assert (code, out) == (0, "") and re.search(r"^setup: environment ready after \d+ s$", err, re.MULTILINE)
    before = time.monotonic()
    assert checkout.run("launch/run_sft_training.sh") == (0, "", "")
    assert time.monotonic() - before < 3
    assert checkout.made() == (1, 1)
    assert len(checkout.calls(str(checkout.root / "launch" / "train.py"))) == 2


def test_arguments_reach_training_untouched(checkout: Checkout) -> None:
    arguments = ["--question", "two  words, $HOME and *", "--include", "localhost:0,1", "--val_list="]
    checkout.run("launch/run_sft_training.sh", *arguments)
    assert checkout.calls(str(checkout.root / "launch" / "train.py")) == [arguments]


def test_pip_takes_the_pins_and_keeps_the_users_index(checkout: Checkout) -> None:
    checkout.run("launch/setup_env.sh")
    tools, package = checkout.calls("-m", "pip", "install")
    for call in (tools, package):
        assert call[call.index("--constraint") + 1] == str(checkout.root / "launch" / "constraints.txt")
        assert not [argument for argument in call if "index" in argument or "find-links" in argument]
    assert tools[-1] == "setuptools" and package[-1] == str(checkout.root)


def test_tests_add_their_extra_and_hand_their_arguments_to_pytest(checkout: Checkout) -> None:
    checkout.run("launch/run_sft_training.sh")
    assert checkout.run("tests/run.sh", "-k", "loss or dice")[0] == 0
    assert checkout.made() == (1, 2)
    assert checkout.calls("-m", "pip")[-1][-1] == f"{checkout.root}[test]"
    assert checkout.calls("-m", "ruff") == [["check", "."], ["format", "--check", "."]]
    assert checkout.calls("-m", "pytest")[0][-2:] == ["-k", "loss or dice"]
    checkout.run("launch/run_sft_training.sh")
    assert checkout.run("tests/run.sh")[2] == "" and checkout.made() == (1, 2)


def test_ci_runs_everything_from_anywhere(checkout: Checkout) -> None:
    process = subprocess.run([checkout.root / ".ci" / "run"], cwd="/", env=checkout.environ, capture_output=True)
    assert process.returncode == 0
    (pytest_call,) = checkout.calls("-m", "pytest")
    assert "-k" not in pytest_call


def test_changed_pins_update_the_environment_with_its_extra(checkout: Checkout) -> None:
    checkout.run("launch/setup_env.sh", "test")
    with open(checkout.root / "launch" / "constraints.txt", "a") as pins:
        pins.write("one-more==1\n")
    code, _, err = checkout.run("launch/run_sft_training.sh")
    assert code == 0 and "updating .venv" in err and checkout.made() == (1, 2)
    assert checkout.calls("-m", "pip")[-1][-1].endswith("[test]")


def test_another_python_makes_a_new_environment(checkout: Checkout) -> None:
    checkout.run("launch/setup_env.sh")
    other = checkout.add_python("python3.12", "3.12")
    checkout.run("launch/setup_env.sh")
    assert checkout.made() == (1, 1), "not asked for"
    checkout.run("launch/setup_env.sh", PYTHON=str(other))
    assert checkout.made() == (2, 2)
    checkout.run("launch/setup_env.sh")
    assert checkout.made() == (2, 2)


def test_a_moved_checkout_makes_a_new_environment(checkout: Checkout) -> None:
    checkout.run("launch/setup_env.sh")
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert checkout.run("launch/setup_env.sh")[0] == 0 and checkout.made() == (2, 2)


def test_two_calls_at_once_make_one_environment(checkout: Checkout) -> None:
    both = [checkout.start("launch/run_sft_training.sh", PIP="sleeps") for _ in range(2)]
    said = [process.communicate(timeout=20)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("waiting for it" in text for text in said) == [False, True]
    assert checkout.made() == (1, 1)


# Half made


def test_what_pip_left_half_made_is_made_anew(checkout: Checkout) -> None:
    Path(checkout.environ["PIP_SAYS"]).write_text("".join(f"line {number}\n" for number in range(40)))
    code, _, err = checkout.run("launch/run_sft_training.sh", PIP="fails")
    assert code == 2 and "line 24\n" not in err and "line 25\n" in err and "line 39\nerror: pip failed" in err
    leftover = checkout.root / ".venv" / "lib" / "torch"
    leftover.mkdir(parents=True)
    assert checkout.run("launch/run_sft_training.sh")[0] == 0
    assert not leftover.exists() and checkout.made()[0] == 2


def test_ctrl_c_ends_set_up_and_the_next_call_starts_again(checkout: Checkout) -> None:
    process = checkout.start("launch/run_sft_training.sh", PIP="sleeps")
    end = time.monotonic() + 15
    while not checkout.calls("-m", "pip"):
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert "error: interrupted; the next call starts again" in process.communicate(timeout=20)[1]
    assert process.returncode != 0
    assert checkout.run("launch/run_sft_training.sh")[0] == 0 and checkout.made()[0] == 2


def test_an_environment_of_someone_else_is_left_alone(checkout: Checkout) -> None:
    own = checkout.root / ".venv" / "bin" / "activate"
    own.parent.mkdir(parents=True)
    own.touch()
    assert "was not made by this script" in checkout.error()
    assert own.exists()


def test_the_environment_may_lie_on_another_disk(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (checkout.root / ".venv").symlink_to(tmp_path / "scratch")
    for environ in ({"PIP": "fails"}, {}):
        checkout.run("launch/setup_env.sh", **environ)
    assert (checkout.root / ".venv").is_symlink() and (tmp_path / "scratch" / "bin" / "python").exists()


# No environment to be had


def test_no_python(tmp_path: Path) -> None:
    error = Checkout(tmp_path).error()
    assert "Python 3.11 or 3.12" in error and "(python3 not found)" in error and "PYTHON=/path" in error


def test_unfit_pythons_are_named_with_their_reasons(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.add_python("python3", "3.9")
    checkout.add_python("python3.12", "")
    Path(f"{checkout.add_python('python3.11')}.no_venv").touch()
    reasons = "python3 is 3.9, python3.12 does not start, python3.11 has no venv: apt install python3.11-venv"
    assert f"({reasons})" in checkout.error()
    checkout.add_python("python", "3.12")
    assert checkout.run("launch/setup_env.sh")[0] == 0


def test_a_python_that_is_asked_for_is_never_replaced(checkout: Checkout) -> None:
    checkout.run("launch/setup_env.sh")
    assert "(/opt/python3.12 not found)" in checkout.error(PYTHON="/opt/python3.12")
    assert "is 3.13)" in checkout.error(PYTHON=str(checkout.add_python("python3.13", "3.13")))
    assert checkout.made() == (1, 1) and checkout.run("launch/setup_env.sh") == (0, "", "")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("WARNING: Retrying after connection broken by 'ProxyError(...)'\nERROR: nothing\n", "cannot reach its index"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device\n", "the disk is full"),
    ],
)
def test_no_network_and_a_full_disk_are_one_line(checkout: Checkout, said: str, expected: str) -> None:
    Path(checkout.environ["PIP_SAYS"]).write_text(said)
    assert expected in checkout.error(PIP="fails")


def test_no_place_for_the_environment_is_one_line(checkout: Checkout) -> None:
    (checkout.root / ".venv").touch()
    assert "cannot make" in checkout.error()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_checkout_is_one_line(checkout: Checkout) -> None:
    (checkout.root / "launch" / "constraints.txt").chmod(0o444)
    assert "no permission to write" in checkout.error()


# What is shipped


def pins() -> dict[str, str]:
    """Distribution -> version; fails on a line that is not an exact public version, or is there twice."""
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in wanted if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9.]*", line)] == []
    versions = {canonicalize_name(name): version for name, version in (line.split("==") for line in wanted)}
    assert len(versions) == len(wanted)
    return versions


def test_every_dependency_is_pinned_to_a_version_that_pyproject_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    for text in itertools.chain(wanted, *project["project"]["optional-dependencies"].values()):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), text
    assert pins()["torch"] == "2.13.0"


def test_the_package_holds_sft_with_all_its_parts_and_nothing_else() -> None:
    from setuptools import find_packages

    parts = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sft").rglob("*.py")}
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert set(find_packages(str(ROOT), include=options["include"])) == parts


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_and_can_be_started(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / name], check=False).returncode == 0
