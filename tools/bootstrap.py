"""Build the development environment in ``.venv``, or finish one that was interrupted.

It uses the standard library only and parses under Python 3.6, because it runs before anything is
installed and must be able to say that the interpreter is too old.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
READY = VENV / ".ready"
CONSTRAINTS = ROOT / "constraints.txt"
INPUTS = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__).resolve())

OLDEST = (3, 10)
FREE_GB = 3  # the finished environment takes 1.7 GB, its downloads up to half as much again


def main() -> int:
    """Check the machine and install in three stages; the stamp that says "ready" comes last."""
    check_version()
    fingerprint = hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS)).hexdigest()
    discard_unfinished()
    version = version_of(PYTHON)
    if version >= OLDEST and READY.is_file() and READY.read_text() == fingerprint:
        READY.touch()  # only dates have changed, and make goes by dates
        return 0

    if not installed("torch"):
        check_disk()
    if READY.exists():
        READY.unlink()
    if version < OLDEST:
        check_venv()
        say("[1/3] Making .venv with Python {}.{}".format(*sys.version_info))
        run(sys.executable, "-m", "venv", "--clear", str(VENV))
    else:
        say("[1/3] Keeping .venv with its Python {}.{}".format(*version))
        if not installed("pip"):
            run(str(PYTHON), "-m", "ensurepip")
    say("[2/3] Installing torch, the largest part")
    pip_install("pip")
    pip_install("torch")
    say("[3/3] Installing gaborium, what it can use, and the tools that check it")
    pip_install("--editable", str(ROOT) + "[dev]")
    # A package that does not learn, for the test that says so. Its metadata ask for an old torch.
    pip_install("--no-deps", "GaborNet")

    unfinished = READY.with_name(".ready.new")
    unfinished.write_text(fingerprint)
    unfinished.replace(READY)
    say("The environment is ready.")
    return 0


def check_version() -> None:
    """Stop with one sentence if this interpreter is too old."""
    if sys.version_info < OLDEST:
        raise SystemExit(
            "Gaborium needs Python >= {}.{}, this is {}.{} ({}). ".format(
                *OLDEST, *sys.version_info[:2], sys.executable
            )
            + "Name another one: make PYTHON=/path/to/python3"
        )


def check_venv() -> None:
    """Stop with one sentence if this interpreter cannot make an environment that has pip."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            "{} cannot make an environment with pip ({}). ".format(sys.executable, error)
            + "On Debian and Ubuntu: apt install python3-venv. "
            + "Or name another interpreter: make PYTHON=/path/to/python3"
        ) from None


def check_disk() -> None:
    """Stop with one sentence if torch would fill the disk."""
    free = shutil.disk_usage(str(ROOT)).free / 1e9
    if free < FREE_GB:
        raise SystemExit(
            "Only {:.1f} GB are free under {}; the environment needs {} GB, ".format(
                free, ROOT, FREE_GB
            )
            + "and several more where pip finds a torch built for accelerators."
        )


def version_of(python: Path) -> "tuple[int, ...]":
    """Return ``(major, minor)`` of an interpreter, ``()`` if it is missing or does not run."""
    command = [str(python), "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        answer = subprocess.check_output(command, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return tuple(int(number) for number in answer.split())


def installed(name: str) -> bool:
    """Tell whether ``.venv`` holds a whole copy of a package."""
    return any(VENV.glob("lib/python*/site-packages/{}-*.dist-info/INSTALLER".format(name)))


def discard_unfinished() -> None:
    """Make pip forget packages whose installation was cut off, so that it installs them again.

    It takes a package for installed as soon as the metadata lies there, although scripts may be
    missing; INSTALLER is what it writes after them. Names that start with ~ are old versions
    that an upgrade had set aside.
    """
    for site in VENV.glob("lib/python*/site-packages"):
        for metadata in site.glob("*.dist-info"):
            if not (metadata / "INSTALLER").exists():
                shutil.rmtree(str(metadata))
        for aside in site.glob("~*"):
            shutil.rmtree(str(aside))


def pip_install(*what: str) -> None:
    """Run pip in ``.venv`` under the constraints, which builds started by pip must see too."""
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONUNBUFFERED="1")
    for variable in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
        given = os.environ.get(variable, "").split()
        # pip splits the variable at spaces; in a URL a space of the path is written %20
        environment[variable] = " ".join([*given, CONSTRAINTS.as_uri()])
    run(str(PYTHON), "-m", "pip", "install", *what, environment=environment)


def run(*command: str, environment: "dict[str, str] | None" = None) -> None:
    """Run one step and leave nothing of it running, whatever ends this script."""
    step = subprocess.Popen(command, env=environment, cwd=str(ROOT))
    try:
        failed = step.wait()
    except BaseException:
        step.terminate()
        step.wait()
        raise
    if failed:
        raise SystemExit(
            "Stopped: {} failed, see its message above. ".format(" ".join(command))
            + "Once the cause is gone, the same call goes on from here."
        )


def say(line: str) -> None:
    """Print at once, also into a pipe."""
    print(line, flush=True)


if __name__ == "__main__":
    # Being ended by a time limit leaves the same clean state as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted; the next call finishes the installation.")
