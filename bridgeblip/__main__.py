"""The command line, ``bridgeblip VERB``; the verbs are in ``commands/``."""

import os
import signal
import sys

if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "bridgeblip":

    def _leave(number, frame):
        """Be quiet where a Ctrl-C comes while what is below is imported."""
        os.write(2, b"error: interrupted: run the same again\n")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background
        signal.signal(signal.SIGINT, _leave)

import argparse
import errno
import io
import warnings
from contextlib import contextmanager
from pathlib import Path

import bridgeblip
from bridgeblip import IN_REPOSITORY, InputError, __version__
from bridgeblip.commands import VERBS, make, use  # noqa: F401 (their verbs fill the first)
from bridgeblip.files import remedy_for

EXIT_CODES = """exit codes: 0 done; 1 doctor found a problem; 2 unusable input; 3 answers to rows
with problems; 130 interrupted, run the same again to go on"""
PRESSED: list[int] = []  # each Ctrl-C or SIGTERM: some libraries make another exception of it


class Stream(io.TextIOWrapper):
    """Standard output in any encoding, whose reader may go, as ``head`` does, and ``tee`` at a
    Ctrl-C: the work goes on unheard."""

    @contextmanager
    def _unheard(self):
        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe's and a terminal's
                raise

    def write(self, text: str) -> int:
        with self._unheard():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._unheard():
            super().flush()


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; {self.prog} --help shows what there is\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; importing nothing heavy, so that ``--help`` is quick."""
    name = "bridgeblip" if Path(sys.argv[0]).name == "bridgeblip" else "python -m bridgeblip"
    parser = Parser(
        prog=name,
        description=bridgeblip.__doc__,
        epilog=f"example: {name} demo\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bridgeblip {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    for verb, (function, example, options, _) in VERBS.items():
        text = function.__doc__
        epilog = f"example: %(prog)s {example}".rstrip()
        raw = argparse.RawDescriptionHelpFormatter  # an example is one line, to be copied
        sub = verbs.add_parser(
            verb, help=text, description=text, epilog=epilog, formatter_class=raw
        )
        for names, settings in options:
            sub.add_argument(*names, **settings)
    return parser


def _require(verb: str, extras: tuple[str, ...]) -> None:
    """Refuse to begin what would fail for want of a package.

    Raises:
        InputError: naming what to install.
    """
    from bridgeblip.hosting.runtime import installed, requirements

    missing = [one.name for one in requirements(*extras) if not installed(one.name)]
    if missing:
        what = f"'bridgeblip[{','.join(extras)}]'" if extras else "bridgeblip"
        remedy = "pip install " + ("-r requirements.txt" if IN_REPOSITORY else what)
        raise InputError(f"{verb} needs {', '.join(missing)}, not installed here: {remedy}")


def _require_surroundings() -> None:
    if sys.flags.optimize > 1:
        raise InputError("transformers needs its docstrings: set PYTHONOPTIMIZE to 1 at most")
    if sys.getfilesystemencoding() == "ascii":
        raise InputError("this Python reads names as ASCII: set PYTHONUTF8=1")
    try:
        os.getcwd()
    except FileNotFoundError as error:  # torch would end the process
        raise InputError("the folder that this runs in is gone: cd to one that is there") from error


def main(arguments: list[str] | None = None) -> int:
    """Run a verb and return its exit code; whatever the user can mend is one line on stderr.

    The codes are those of ``EXIT_CODES``.
    """
    warnings.formatwarning = lambda message, *where: f"warning: {message}\n"
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")  # the first process says it for all
    try:
        _require_surroundings()
        args = build_parser().parse_args(arguments)
        run, _, _, extras = VERBS[args.verb]
        _require(args.verb, extras)
        code = run(args) or 0
        sys.stdout.flush()  # or a full disk is met when Python ends
        return code
    except (Exception, KeyboardInterrupt) as error:
        message, code = _last_words(error)
    from tqdm import tqdm

    for bar in list(tqdm._instances):
        bar.close()  # else the message would stand at its end
    print(f"error: {message}", file=sys.stderr)
    return code


def _last_words(error: BaseException) -> tuple[str, int]:
    """What to say of what has ended a verb, and its exit code; a fault of ours is raised again."""
    if isinstance(error, InputError) and (error.exit_code == 130 or not PRESSED):
        return " ".join(str(error).split()), error.exit_code
    if PRESSED or isinstance(error, KeyboardInterrupt):
        return "interrupted: run the same again", 130
    remedy = remedy_for(error)
    if not remedy:
        raise error
    return f"{' '.join(str(error).split())[:300]}: {remedy}, then run the same again", 2


def _press(number, frame):
    PRESSED.append(number)
    raise KeyboardInterrupt


def _warn_of(failed) -> None:
    """What else ends in a traceback: a loader, let go when a signal has ended its worker, too."""
    print(f"warning: {failed.exc_type.__name__}: {failed.exc_value}", file=sys.stderr)


def _open_streams() -> None:
    """Have a stream that the caller has closed lead nowhere: a file that is opened later would get
    its number, and what is said with it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number is free
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
        if number:
            how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            file = open(number, "wb", -1 + stream.write_through, closefd=False)  # noqa: SIM115
            stream = Stream(file, stream.encoding, "backslashreplace", **how)
        setattr(sys, name, stream)


def run() -> None:
    """The command: it exits with ``main``'s code, and a signal then ends it without a traceback."""
    _open_streams()
    sys.unraisablehook = _warn_of
    os.environ.pop("MPLBACKEND", None)  # pages need none, and a notebook's is not there
    numbers = signal.SIGINT, signal.SIGTERM
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heard:  # the others are ignored in the background
        signal.signal(number, _press)
    code = main()
    for number in heard:
        signal.signal(number, signal.SIG_DFL)
    sys.exit(code)


if __name__ == "__main__":
    run()
