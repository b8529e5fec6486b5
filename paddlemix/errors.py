"""Errors that a user can act on.

Each message is one sentence that names the file, field or sample and says what to do. Command-line programs print the
message alone and exit with code 1 (:func:`command_main`); in a library the class tells what kind of thing was wrong.
"""

import errno
import functools
import mmap
import os
import sys
import threading
import warnings


class UserError(ValueError):
    """Base of every error whose cause is an input, a file or an argument rather than a fault in this package."""


class ConfigError(UserError):
    """A configuration file is missing, broken, or describes something that is not supported."""


class CheckpointError(UserError):
    """A weight file is missing, damaged, unsafe, or does not fit the model."""


class TokenizerError(UserError):
    """Tokenizer files are missing or broken, or a required token is absent."""


class ImageError(UserError):
    """A picture cannot be read."""


class VideoError(UserError):
    """A video cannot be read, or holds no frame in the requested range."""


class PromptError(UserError):
    """A question, its pictures and its history do not fit together, or do not fit the model's context."""


class DataError(UserError):
    """A training set cannot be read, or a record of it cannot be used."""


class TrainingError(UserError):
    """Training went wrong for what it was given: the loss is not a number."""


class DeviceError(UserError):
    """The requested device or dtype is not available on this machine."""


class ParallelError(UserError):
    """Processes that compute together cannot start, or one of them has ended."""


def command_main(main):
    """Decorate a command's ``main()``: a :class:`UserError` becomes one line on stderr and exit code 1; Ctrl-C gives 130.

    What the system says about a path or a full disk is printed alike, where no code nearer to it had more to say, and so is
    what to install where a module of another package is missing. Paddle's notices at its start, about loaded libraries and
    a compiler cache, are left out.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        os.environ.setdefault("GLOG_minloglevel", "2")
        warnings.filterwarnings("ignore", message="No ccache found")
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a locale that lacks a character must not cost the answer
                stream.reconfigure(errors="backslashreplace")
        try:
            _start_threads()
            done = main(*args, **kwargs)
            if sys.stdout is not None:  # None where it was closed before the start (`>&-`)
                sys.stdout.flush()  # here, where a closed pipe can still be met quietly
            return done
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        except BrokenPipeError:
            # Who reads has seen enough (`| head -1`). What is left in the buffer must not fail again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except (MemoryError, RuntimeError, ImportError) as error:
            if isinstance(error, ModuleNotFoundError):
                from paddlemix.extras import missing  # nobody else pays for it

                print(f"error: {missing(error)}", file=sys.stderr)
                raise SystemExit(1) from None
            problem = _exhausted(error)
            if problem is None:
                raise
            print(f"error: {problem}", file=sys.stderr)
            raise SystemExit(1) from None
        except OSError as error:
            if error.errno == errno.ENOMEM:
                print(f"error: {_exhausted(MemoryError())}", file=sys.stderr)
                raise SystemExit(1) from None
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                print(f"error: {error.filename or 'a file'} cannot be written: the disk is full: make room", file=sys.stderr)
            elif error.filename is not None:
                print(f"error: {error.filename} cannot be used ({error.strerror}): check the path", file=sys.stderr)
            else:
                raise
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapper


def _start_threads():
    """Raise the error of threads that cannot be started: NumPy and Paddle would wait for them for ever, or raise SIGINT.

    Their pools have a thread for each core, two more are for reading ahead and writing; who has many cores has room.
    """
    enough = threading.Event()
    started = []
    try:
        for _ in range(min(2 * len(os.sched_getaffinity(0)), 64) if hasattr(os, "sched_getaffinity") else 2):
            thread = threading.Thread(target=enough.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        enough.set()
        for thread in started:
            thread.join()


def room_for_paddle():
    """Raise MemoryError where a limit (``ulimit -v``) leaves no room to import Paddle, which would crash half-way."""
    if "paddle" in sys.modules or os.name != "posix":
        return
    try:  # addresses only: no memory is taken
        mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ).close()
    except OSError:
        raise MemoryError("less than 1 GB of address space for Paddle") from None


def _exhausted(error):
    """What the machine has run out of, in a sentence; None if it is something else."""
    said = str(error)
    if isinstance(error, MemoryError) or any(
        sign in said for sign in ("ResourceExhausted", "failed to map segment", "annot allocate memory")
    ):
        return "there is not enough memory: use a smaller model, fewer pictures or tiles (--max_num), or raise the limit"
    if "start new thread" in said:
        return "no more threads or processes can be started: raise the limit (ulimit -u), or close other programs"
    return None
