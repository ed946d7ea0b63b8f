"""Who owns the folder of a run: one process at a time, of one machine or of several that share a file system."""

import _thread
import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HEARTBEAT = 15.0  # seconds between two signs of life of an owner
DEAD_AFTER = 180.0  # seconds without one until an owner on another machine counts as dead
_held: dict[Path, "Claim"] = {}


class FolderTakenError(RuntimeError):
    """The folder of a run belongs to a process that is alive."""

    def __init__(self, folder: Path, owner: "Owner") -> None:
        super().__init__(f"{folder} is run by {owner}")
        self.folder, self.owner = folder, owner


@dataclass(frozen=True)
class Owner:
    """A process.

    Attributes:
        host: its machine.
        pid: its number there.
        start: when it started, so that a later process of the same number is another one.
        numbers: which numbers of processes these are; containers of one machine may each have their own.
    """

    host: str
    pid: int
    start: str
    numbers: str

    def __str__(self) -> str:
        return f"{self.host} {self.pid}"


class Claim:
    """A folder that this process owns, until it releases it or dies.

    A process that others took for dead while it slept is interrupted when it wakes.

    Args:
        path: the file of the claim.

    Attributes:
        lost: another process owns the folder now.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = False
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self.path)
            if _last_number(self.path.parent) > int(self.path.name):
                # this machine slept, or lost the file system, for so long that others took it for dead
                self.lost = True
                _thread.interrupt_main()
                return

    def release(self) -> None:
        """Leave the folder to others."""
        self._released.set()
        _held.pop(self.path.parent, None)
        if self.lost:
            return
        with suppress(OSError):  # a claim that stays is that of a dead process soon
            scratch = _scratch(self.path.parent, {})
            scratch.replace(self.path)


def claim(folder: Path) -> Claim:
    """Make this process the owner of a folder.

    Claims are numbered, and the highest number counts. None is ever removed while it is the highest, and each is made
    exclusively, as a hard link, which holds on NFS too: of several processes that find the same dead owner one wins.

    Raises:
        FolderTakenError: another process owns it that is alive. One of the same machine is as long as its number and
            start are; one of another machine as long as it gave a sign of life in the last ``DEAD_AFTER`` seconds.
    """
    place = (folder / ".claim").absolute()
    if place in _held and _held[place].path.exists():
        return _held[place]
    place.mkdir(parents=True, exist_ok=True)
    while True:
        number = _last_number(place)
        if (owner := _living_owner(place / str(number))) is not None:
            raise FolderTakenError(folder, owner)
        path = place / str(number + 1)
        if not _create(path):
            continue
        if _last_number(place) == number + 1:
            for lower in _numbers(place)[:-1]:
                (place / str(lower)).unlink(missing_ok=True)
            _held[place] = Claim(path)
            return _held[place]
        path.unlink(missing_ok=True)  # others were faster, by more than one number


@contextmanager
def claimed(folder: Path) -> Iterator[Claim | None]:
    """Own a folder inside of the context; further processes of one distributed run share what the first one owns.

    Raises:
        FolderTakenError: another process owns it.
    """
    own = claim(folder) if is_first_process() else None
    try:
        yield own
    finally:
        if own is not None:
            own.release()


def owner_of(folder: Path) -> Owner | None:
    """Return the process that owns a folder, ``None`` where none does that is alive."""
    place = folder / ".claim"
    return _living_owner(place / str(_last_number(place)))


def is_first_process() -> bool:
    """Return whether this is the first, or only, process of a distributed run: the one that writes."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # those that Lightning reads
    ranks = (os.environ.get(name) for name in names)
    return next((rank for rank in ranks if rank), "0") == "0"


def _numbers(place: Path) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(place) if name.isdecimal())
    except OSError:
        return []


def _last_number(place: Path) -> int:
    return max(_numbers(place), default=0)


def _living_owner(path: Path) -> Owner | None:
    """Return the owner that a file names if it is alive; a file that was cut is of one that is just writing it."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        owner = Owner(**content) if content else None
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError):
        owner = Owner("an unknown machine", 0, "", "unknown")
    if owner is None or owner == (this := _this()):
        return None
    if (owner.host, owner.numbers) == (this.host, this.numbers):
        return owner if _start(owner.pid) == owner.start else None
    return owner if _age(path) < DEAD_AFTER else None


def _this() -> Owner:
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return Owner(socket.gethostname(), os.getpid(), _start(os.getpid()), numbers)


def _start(pid: int) -> str:
    """Return when a process started, nothing if it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {rest[18]}"
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return ""
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True).stdout
    return "" if shown.startswith("Z") else " ".join(shown.split()[1:])


def _age(path: Path) -> float:
    """Return the seconds since a file was touched, by the clock of the file system: machines may disagree."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="now-") as now:
        try:
            return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return DEAD_AFTER


def _scratch(place: Path, content: dict[str, Any]) -> Path:
    with tempfile.NamedTemporaryFile("w", dir=place, prefix="part-", delete=False) as file:
        json.dump(content, file)
    return Path(file.name)


def _create(path: Path) -> bool:
    """Make the file of a claim, whole; returns whether this process was the one that made it."""
    scratch = _scratch(path.parent, asdict(_this()))
    try:
        try:
            os.link(scratch, path)
        except FileExistsError:
            # NFS may answer so to a request that it had carried out and whose answer was lost
            return scratch.stat().st_nlink == 2
        except OSError:  # a file system without hard links
            try:
                with path.open("x") as file:
                    file.write(scratch.read_text())
            except FileExistsError:
                return False
        return True
    finally:
        scratch.unlink(missing_ok=True)
