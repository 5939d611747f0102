#!/usr/bin/env python3
"""One command per task; makes its own environment, and needs nothing but Python.

The environment is `.venv` in the checkout, made on first use and again when its Python has gone or what the
project requires has changed. A Python of another version than the one that made it gets `.venv-3.12` and so on.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever `python3` is, and has to say so when that is too old
    sys.exit(
        "eventrun needs Python 3.11 or newer; this is %d.%d (%s).\n"  # noqa: UP031 - as above
        "Install a newer one and start it by its name, for instance: python3.12 tools/dev.py --help"
        % (sys.version_info[0], sys.version_info[1], sys.executable)
    )

import argparse
import difflib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
PROBE_TIMEOUT_S = 20
STAMP = "dev-stamp.json"  # in an environment: what it was made from; written last
TOP_LEVEL = {"pyproject.toml", "eventrun", "tests", "tools", "README.md"}


class Failure(Exception):
    """What went wrong and what to do, for the terminal."""


def say(text: str) -> None:
    """Talk on stderr; stdout belongs to what is run."""
    print(text, file=sys.stderr, flush=True)


def in_ci() -> bool:
    """Tell whether a CI system runs this."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def run(command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> int:
    """Run a program on this terminal; Ctrl-C is for it to handle."""
    with subprocess.Popen(command, cwd=cwd, env=env) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def run_quietly(command: Sequence[str], *, cwd: Path | None = None, advice: str) -> str:
    """Run a program and return its stdout; show everything it said, and the advice, only when it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise Failure(f"{command[0]} could not be started: {error}\n{advice}") from error
    if done.returncode:
        said = (done.stdout + done.stderr).rstrip()
        raise Failure(f"$ {' '.join(command)}\n{said}\n\n{advice}")
    return done.stdout


# --- Pythons ------------------------------------------------------------------------------------------------


class Python(NamedTuple):
    """An installed interpreter."""

    version: tuple[int, int]
    full_version: str
    executable: str
    has_venv: bool
    unfit: str  # why eventrun can't be tested on it; empty when it can

    @property
    def label(self) -> str:
        """Return the version as in `python3.12`, without the word."""
        return f"{self.version[0]}.{self.version[1]}"


def this_python() -> Python:
    """Return the interpreter that runs this file, or the one below it when that is a virtual environment."""
    return Python(
        version=sys.version_info[:2],
        full_version=platform.python_version(),
        # resolved, since /usr/bin/python3 may become another version below an environment made with it
        executable=os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable),
        # Debian ships venv without ensurepip, and then it makes no environment
        has_venv=all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
        unfit="",
    )


PROBE = """
import importlib.util, json, os, platform, sys, sysconfig
unfit = ""
if sys.implementation.name != "cpython":
    unfit = "not CPython"
elif sysconfig.get_config_var("Py_GIL_DISABLED"):
    unfit = "built without the GIL"
elif sys.version_info.releaselevel != "final":
    unfit = "not released yet"
executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
has_venv = all(importlib.util.find_spec(name) for name in ("venv", "ensurepip"))
print(json.dumps([sys.version_info[:2], platform.python_version(), executable, has_venv, unfit]))
"""


def probe(executable: Path) -> Python | None:
    """Ask an interpreter what it is; None when it doesn't start, like pyenv's shim of a version not in use."""
    command = [str(executable), "-I", "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True)
        version, full_version, real, has_venv, unfit = json.loads(done.stdout)
        return Python((version[0], version[1]), full_version, real, has_venv, unfit)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def installed_pythons() -> list[Python]:
    """Find one Python per version, oldest first: the running one, else of PATH, the system, pyenv or uv."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders += [Path("/usr/local/bin"), Path("/usr/bin")]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv" / "python")
    for versions in (pyenv, uv):
        newest_first = sorted(versions.glob("*"), key=lambda path: numbers(path.name), reverse=True)
        folders += [path / "bin" for path in newest_first]

    chosen = {sys.version_info[:2]: this_python()}
    for path in dict.fromkeys(path for folder in folders for path in sorted(folder.glob("python3.*"))):
        name = re.fullmatch(r"python3\.(\d+)", path.name)
        version = (3, int(name[1])) if name else (0, 0)
        known = chosen.get(version)
        if version < OLDEST or (known and known.has_venv and not known.unfit):
            continue
        found = probe(path)
        if found and (known is None or (not found.unfit, found.has_venv) > (not known.unfit, known.has_venv)):
            chosen[version] = found
    return [chosen[version] for version in sorted(chosen)]


def numbers(text: str) -> list[int]:
    """Return the numbers in a name, to sort 3.9 before 3.10."""
    return [int(number) for number in re.findall(r"\d+", text)]


# --- Environments -------------------------------------------------------------------------------------------


def program(environment: Path, name: str) -> str:
    """Return the path of a program in a virtual environment."""
    return str(environment / "Scripts" / f"{name}.exe" if os.name == "nt" else environment / "bin" / name)


def project() -> dict[str, Any]:
    """Read pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def prepare(python: Python, *, dev: bool) -> Path:
    """Return a Python's environment with eventrun installed from this checkout, made anew when it has to be."""
    with one_at_a_time():
        path = ROOT / ".venv"
        stamp = read_stamp(path)
        if stamp and stamp["version"] != list(python.version):
            path = ROOT / f".venv-{python.label}"
            stamp = read_stamp(path)
        settings = project()
        required = [settings["build-system"], settings["project"], settings["dependency-groups"]]
        wanted = {
            "root": str(ROOT),  # the editable install and the programs hold absolute paths
            "requirements": hashlib.sha256(json.dumps(required, sort_keys=True).encode()).hexdigest(),
        }
        fits = stamp is not None and all(stamp.get(key) == value for key, value in wanted.items())
        if fits and stamp is not None and (stamp["dev"] or not dev):
            return path

        what = "what tests and checks need" if dev else "eventrun and its core dependencies"
        say(f"Preparing {path.name} (Python {python.full_version}) with {what}. This takes a moment, once.")
        if not fits:
            make_venv(python, path)
        if dev:
            extras = ",".join(settings["project"]["optional-dependencies"])
            install(path, "--editable", f"{ROOT}[{extras}]", *settings["dependency-groups"]["dev"])
        else:
            install(path, "--editable", str(ROOT))
        stamp = {**wanted, "version": python.version, "base": python.executable, "dev": dev}
        (path / STAMP).write_text(json.dumps(stamp, indent=1), encoding="utf-8")
        return path


def read_stamp(path: Path) -> dict[str, Any] | None:
    """Read what an environment was made from; None when it isn't finished or its Python has gone."""
    try:
        stamp: dict[str, Any] = json.loads((path / STAMP).read_text(encoding="utf-8"))
        complete = {"version", "base", "dev"} <= stamp.keys()
    except (OSError, ValueError, AttributeError):
        return None
    if not complete or not os.path.exists(program(path, "python")) or not os.path.exists(stamp["base"]):
        return None
    return stamp


def make_venv(python: Python, path: Path) -> None:
    """Make an empty virtual environment in the place of whatever is there."""
    advice = f"On Debian and Ubuntu: apt install python3-venv (or python{python.label}-venv); then try again."
    if not python.has_venv:
        raise Failure(f"Python {python.full_version} ({python.executable}) lacks its venv module.\n{advice}")
    run_quietly([python.executable, "-m", "venv", "--clear", str(path)], advice=advice)


def install(environment: Path, *requirements: str) -> None:
    """Install into a virtual environment."""
    pip = [program(environment, "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    advice = "pip could not install this; above is what it said."
    run_quietly([*pip, "install", *requirements], advice=advice)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one process at a time prepare environments in this checkout."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(__file__, "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another dev.py that prepares an environment here.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- Verbs --------------------------------------------------------------------------------------------------


def demo(arguments: list[str]) -> int:
    """Run the demo, as a user would who has only just installed eventrun."""
    environment = prepare(this_python(), dev=False)
    return run([program(environment, "python"), "-m", "eventrun", "demo", *arguments])


def test(arguments: list[str]) -> int:
    """Run the tests; what isn't listed below goes to pytest."""
    parser = verb_parser(
        test,
        "[pytest's arguments]",
        "dev.py test\ndev.py test tests/test_codec.py -k nan -x\ndev.py test --all-pythons",
    )
    parser.add_argument(
        "--all-pythons", action="store_true", help="on each CPython from 3.11 on that is installed"
    )
    parser.add_argument(
        "--only-others", action="store_true", help="with --all-pythons: leave out the one that runs this"
    )
    options, for_pytest = split(parser, arguments)
    if options.only_others and not options.all_pythons:
        parser.error("--only-others goes with --all-pythons")
    if not options.all_pythons:
        return run_tests(prepare(this_python(), dev=True), for_pytest)
    pythons = [
        python
        for python in installed_pythons()
        if not (options.only_others and python.version == sys.version_info[:2])
    ]
    if not pythons:
        say("No other CPython from 3.11 on is installed.")
        return 0
    return test_on(pythons, for_pytest)


def test_on(pythons: list[Python], for_pytest: list[str]) -> int:
    """Run the tests on several Pythons, then list how it went; 1 if it went wrong on any."""
    rows = []
    failed = False
    for python in pythons:
        if python.unfit:
            rows.append((python.full_version, f"left out: {python.unfit}"))
            continue
        say(f"\n=== Python {python.full_version} ({python.executable})")
        start = time.perf_counter()
        try:
            code = run_tests(prepare(python, dev=True), for_pytest)
            result = "ok" if code == 0 else f"FAILED (pytest's exit code {code})"
        except Failure as failure:
            say(str(failure))
            code, result = 1, "FAILED (no environment)"
        failed = failed or code != 0
        rows.append((python.full_version, f"{result}, {time.perf_counter() - start:.0f} s"))
    print("\nPython    result")
    for version, result in rows:
        print(f"{version:<9} {result}")
    return 1 if failed else 0


def run_tests(environment: Path, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Run pytest from the checkout's top, wherever the caller stands."""
    return run([program(environment, "python"), *pytest(arguments)], cwd=ROOT, env=env)


def pytest(arguments: Sequence[str]) -> list[str]:
    """Return pytest's arguments to Python; paths given from another folder are made absolute."""
    here = Path.cwd()
    seen_from_top = [
        str(here / argument) if is_path(argument) and here != ROOT else argument for argument in arguments
    ]
    return ["-m", "pytest", *(["-p", "no:cacheprovider"] if in_ci() else []), *seen_from_top]


def is_path(argument: str) -> bool:
    """Tell whether an argument names something that exists, as `tests/test_codec.py::test_nan` does."""
    path = argument.split("::")[0]
    return bool(path) and os.path.exists(path)


def check(arguments: list[str]) -> int:
    """Check format, lint, types, imports and tests with coverage; show the output only of what fails."""
    parser = verb_parser(check, "", "dev.py check\ndev.py check --no-tests")
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests, which take the longest")
    options = parser.parse_args(arguments)
    environment = prepare(this_python(), dev=True)
    python = program(environment, "python")
    steps = {
        "format": [python, "-m", "ruff", "format", "--check", "--quiet", "."],
        "lint": [python, "-m", "ruff", "check", "--output-format=concise", "."],
        "types": [python, "-m", "mypy"],
        "imports": [program(environment, "lint-imports"), "--no-logo"],
    }
    if not options.no_tests:
        steps["tests"] = [python, *pytest(["-q", "--cov", "--cov-report=term"])]
    ruff = os.path.relpath(program(environment, "ruff"))
    mending = {"format": f"{ruff} format {ROOT}", "lint": f"{ruff} check --fix {ROOT}"}

    failures = []
    start = time.perf_counter()
    for name, command in steps.items():
        print(f"{name:<8}", end=" ", flush=True)
        begun = time.perf_counter()
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        took = time.perf_counter() - begun
        print(f"{'FAILED' if done.returncode else 'ok':<6} {took:6.1f} s  {gist(done.stdout)}".rstrip())
        if done.returncode:
            failures.append((name, done.stdout))
    for name, output in failures:
        print(f"\n--- {name}\n{output.rstrip()}")
        if name in mending:
            print(f"What can be mended by itself: {mending[name]}")
    verdict = f"{len(failures)} of {len(steps)} failed" if failures else "all good"
    print(f"\n{verdict}, {time.perf_counter() - start:.0f} s")
    return 1 if failures else 0


def gist(output: str) -> str:
    """Return the figures of a test run in a few words: how many passed, how much was covered."""
    counts = re.findall(r"^=*\s*((?:\d+ [a-z]+, )*\d+ [a-z]+) in [\d.]+s.*$", output, re.MULTILINE)
    covered = re.findall(r"^TOTAL\s.*\s(\d+(?:\.\d+)?)%$", output, re.MULTILINE)
    return ", ".join([*counts[-1:], *(f"{percent} % covered" for percent in covered[-1:])])


def bench(arguments: list[str]) -> int:
    """Measure the figures that eventrun promises; all arguments go to tools/bench/run.py."""
    script = ROOT / "tools" / "bench" / "run.py"
    if not script.exists():
        raise Failure("tools/bench/run.py isn't there: this checkout has no benchmarks.")
    return run([program(prepare(this_python(), dev=True), "python"), str(script), *arguments])


def crash(arguments: list[str]) -> int:
    """Run the tests that try to lose data; what isn't listed below goes to pytest."""
    parser = verb_parser(
        crash,
        "[pytest's arguments]",
        "dev.py crash --install\ndev.py crash\ndev.py crash --full\ndev.py crash --rounds 20 -k power -x",
    )
    parser.add_argument(
        "--install", action="store_true", help="install what they need (Debian, Ubuntu), and stop"
    )
    parser.add_argument("--full", action="store_true", help="try everything, for the better part of an hour")
    parser.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help="try each fault N times, where it can be tried any number of times",
    )
    options, for_pytest = split(parser, arguments)
    if options.install:
        return install_crash_tools()
    # -m "" selects everything; many rounds may take one test longer than a hanging test is given
    everything = [str(ROOT / "tests" / "crash"), "-m", "", "-o", "faulthandler_timeout=0"]
    env = {**os.environ}
    if options.full:
        env["EVENTRUN_CRASH_FULL"] = "1"
    if options.rounds:
        env["EVENTRUN_CRASH_ROUNDS"] = str(options.rounds)
    return run_tests(prepare(this_python(), dev=True), [*everything, *for_pytest], env)


CRASH_TOOLS = {  # program -> Debian's package
    "strace": "strace",
    "faketime": "faketime",
    "setpriv": "util-linux",
    "mount": "mount",
    "mkfs.ext4": "e2fsprogs",
}


def install_crash_tools() -> int:
    """Install the programs that the crash tests need and that aren't there."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = sorted({p for name, p in CRASH_TOOLS.items() if shutil.which(name, path=places) is None})
    if not missing:
        say("All programs that the crash tests need are there.")
        return 0
    if shutil.which("apt-get") is None:
        raise Failure(f"This is not Debian: install {', '.join(missing)} by this system's own means.")
    say(f"Installing {', '.join(missing)}.")
    as_root = [] if os.geteuid() == 0 else ["sudo"]
    advice = "The packages could not be installed; above is what apt-get said."
    env = ["env", "DEBIAN_FRONTEND=noninteractive"]
    run_quietly([*as_root, "apt-get", "update", "-qq"], advice=advice)
    run_quietly(
        [*as_root, *env, "apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
        advice=advice,
    )
    return 0


def positive(text: str) -> int:
    """Read a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a whole number from 1 on")
    return int(text)


def wheel(arguments: list[str]) -> int:
    """Build the wheel by way of the sdist, and use it in an environment that holds nothing else."""
    verb_parser(wheel, "", "dev.py wheel").parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="eventrun-wheel-") as name:
        folder = Path(name)
        python = program(prepare(this_python(), dev=True), "python")
        build = [python, "-m", "build", "--outdir", name, str(ROOT)]
        run_quietly(build, advice="The package could not be built; above is what build said.")
        [sdist], [built] = folder.glob("*.tar.gz"), folder.glob("*.whl")
        check_contents(sdist, built)
        make_venv(this_python(), folder / "venv")
        install(folder / "venv", str(built))
        use_installed(folder)
        size = f"{built.stat().st_size / 1000:.0f} kB"
        print(f"{built.name}: {size}, installed, started, three values written and read back")
    return 0


def check_contents(sdist: Path, built: Path) -> None:
    """See that the wheel holds the package with all its data, and that neither file holds anything else."""
    with tarfile.open(sdist) as tar:
        packed = {Path(member).parts[1] for member in tar.getnames() if len(Path(member).parts) > 1}
    junk = packed - TOP_LEVEL - {"PKG-INFO", ".gitignore"}
    with zipfile.ZipFile(built) as archive:
        shipped = {member for member in archive.namelist() if ".dist-info/" not in member}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "eventrun").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    if junk or shipped != sources:
        raise Failure(
            f"Only in the wheel: {sorted(shipped - sources)}. Not in the wheel: {sorted(sources - shipped)}."
            f" Not wanted in the sdist: {sorted(junk)}."
        )


WRITE = """
import importlib.util, sys
import eventrun

for name in ("numpy", "pandas", "pyarrow", "pytest", "rich"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed: this shows nothing"
assert eventrun.__version__ == sys.argv[2], eventrun.__version__
client = eventrun.open(sys.argv[1])
with client:
    trial = client.trial("wheel", params={"lr": 0.1})
    with trial:
        for step, loss in enumerate((0.5, 0.25, 0.125)):
            trial.log(loss=loss, step=step)
print(trial.id)
"""

READ = """
import sys
import eventrun

client = eventrun.open(sys.argv[1])
with client:
    series = client.history(sys.argv[2], "loss").result(30)
    state = client.get(sys.argv[2]).result(30)
assert list(series.values) == [0.5, 0.25, 0.125], list(series.values)
assert list(series.steps) == [0, 1, 2], list(series.steps)
assert state.metrics["loss"].last == 0.125, state.metrics["loss"]
assert state.status == "completed", state.status
"""


def use_installed(folder: Path) -> None:
    """Start the installed program, write three values and read them back in another process."""
    advice = "The installed wheel doesn't work without the development dependencies."
    program_help = run_quietly([program(folder / "venv", "eventrun"), "--help"], cwd=folder, advice=advice)
    if "usage: eventrun" not in program_help:
        raise Failure(f"`eventrun --help` says:\n{program_help}\n\n{advice}")
    # -I: nothing of this checkout or of the environment's variables is seen
    isolated = [program(folder / "venv", "python"), "-I", "-W", "error", "-c"]
    runs, version = str(folder / "runs"), project()["project"]["version"]
    trial = run_quietly([*isolated, WRITE, runs, version], cwd=folder, advice=advice).strip()
    run_quietly([*isolated, READ, runs, trial], cwd=folder, advice=advice)


# --- Command line -------------------------------------------------------------------------------------------

VERBS: dict[str, Callable[[list[str]], int]] = {
    verb.__name__: verb for verb in (demo, test, check, bench, crash, wheel)
}


def summary(verb: Callable[[list[str]], int]) -> str:
    """Return the first line of a verb's docstring."""
    return (verb.__doc__ or "").splitlines()[0]


def verb_parser(verb: Callable[[list[str]], int], rest: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser with a verb's help."""
    return argparse.ArgumentParser(
        prog=f"dev.py {verb.__name__}",
        usage=f"dev.py {verb.__name__} [options] {rest}".rstrip(),
        description=summary(verb),
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def split(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Part a verb's own options from those that go on to pytest; all after `--` goes on."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, others = parser.parse_known_args(arguments[:end])
    return options, others + arguments[end + 1 :]


def usage() -> str:
    """Return the help of the whole command."""
    width = max(map(len, VERBS)) + 2
    lines = ["usage: python3 tools/dev.py VERB [arguments]", ""]
    lines += [f"  {name:<{width}}{summary(verb)}" for name, verb in VERBS.items()]
    lines += ["", "`dev.py VERB --help` tells more (that of demo and bench is their own)."]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run a verb and return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        say(f"dev.py knows no verb `{name}`.{hint}\n\n{usage()}")
        return 2
    try:
        return VERBS[name](rest)
    except Failure as failure:
        say(str(failure))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
