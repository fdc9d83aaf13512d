"""Everything Puna raises on purpose, drawn as a tree; the exit code of each branch.

PunaError (1)
├── UserError (2)         a mistake the user can mend; the message says what, where and the fix
│   ├── RecipeError       a key or value of a recipe
│   ├── DataError         a file, a corpus, token shards
│   ├── TokenizerError    a tokenizer file
│   ├── CheckpointError   a checkpoint or a Hugging Face folder
│   │   └── DiskFull      no room for a checkpoint
│   ├── ShardingError     a model or optimiser that cannot be sharded as it is
│   └── DeviceError       a device, a port, a machine
├── RunLocked (3)         another process holds the run directory
├── Unfinished (4)        the run stopped before the steps that were asked for
├── NonFinite (5)         a loss or gradient was not finite; no weight was changed
├── RankFailed (6)        a worker process died
├── Hung (7)              a rank stopped, or waits for what never comes; RUN/hang.txt says which
├── RanksDiffer (8)       the ranks do not run the same thing; RUN/hang.txt says which and in what
└── OutOfMemory (9)       the device or the machine had no memory left; the newest checkpoint is as it was
"""


class PunaError(Exception):
    """Base of every error that Puna raises on purpose; `exit_code` is the status of the process."""

    exit_code = 1


class UserError(PunaError):
    """A mistake the user can mend: `problem` names the file, key or row; `fix` says what to do."""

    exit_code = 2

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"{problem.rstrip('.')}. {fix}")
        self.problem, self.fix = problem, fix


class RecipeError(UserError):
    """An unknown key, a value of the wrong type, or two values that contradict each other."""


class DataError(UserError):
    """A corpus or token-shard folder that is missing, empty or damaged."""


class TokenizerError(UserError):
    """A tokenizer file that is missing, damaged or of an unknown form."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete or of another shape."""


class DiskFull(CheckpointError):
    """A checkpoint for which the disk has no room; the ones that are there are as they were."""


class ShardingError(UserError):
    """A parameter of two FSDP units, or an optimiser made before sharding."""


class DeviceError(UserError):
    """A device, port or machine that is not there or not free."""


class RunLocked(UserError):
    """Another process holds the run directory."""

    exit_code = 3


class Unfinished(PunaError):
    """The run stopped in good order before the work that was asked for was done."""

    exit_code = 4


class NonFinite(PunaError):
    """A loss or gradient was not finite on some rank; every rank stopped before a weight changed."""

    exit_code = 5


class RankFailed(PunaError):
    """A worker process died; the others were stopped."""

    exit_code = 6


class Hung(PunaError):
    """A rank stopped, or waits for what never comes; the run was ended and a page names it."""

    exit_code = 7


class RanksDiffer(PunaError):
    """The ranks have other recipes, code, data or weights than each other; the run was ended before it went wrong."""

    exit_code = 8


class OutOfMemory(PunaError):
    """A rank was refused memory, or the kernel ended it for the lack of it; the newest checkpoint is as it was."""

    exit_code = 9
