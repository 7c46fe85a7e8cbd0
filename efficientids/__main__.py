"""`python -m efficientids COMMAND …`: the commands, each in a module of its own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from core.platform import prefer_memory_fraction
from efficientids.errors import UserError
from efficientids.log import quiet_libraries

# Command → (module, what it does). A module is imported only when its command is asked for.
COMMANDS = {
    "prepare": ("efficientids.data.preparation.cli", "interaction logs → a data set folder"),
    "embed-items": ("efficientids.tokenizing.embed_cli", "item vectors of a run, of titles, of histories: a .npy file"),
    "tokenize": ("efficientids.tokenizing.cli", "items → semantic IDs: a tokenizer folder"),
    "train": ("efficientids.train", "the same as train_llama.py"),
    "plan": ("efficientids.planning.cli", "will it fit: memory and time of a training run, without a GPU"),
    "evaluate": ("efficientids.evaluation.cli", "a run's ranking metrics on validation or test"),
    "compare": ("efficientids.evaluation.compare_cli", "runs on the same data: which is better, and is it chance"),
    "recommend": ("efficientids.serving.cli", "top-k items for users, as a Parquet file"),
    "export": ("efficientids.exporting.cli", "a run as files for others: Hugging Face, PEFT, safetensors"),
    "report": ("efficientids.pages.run_report", "a run's report.html again, from what its folder holds"),
}


def start(name: str, arguments: Sequence[str]) -> int:
    """Runs the command of this name; how much of a GPU it takes is settled before its module imports jax."""
    prefer_memory_fraction()
    return run(importlib.import_module(COMMANDS[name][0]).main, arguments)


def run(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Runs a command; what a person can mend is said in one line on stderr, with exit code 2."""
    quiet_libraries()
    try:
        return command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output (`| head`) has gone; Python would say so once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def main() -> int:
    """The console script `efficientids`."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: efficientids COMMAND [--help] …\n")
        print("\n".join(f"  {command:<11} {what}" for command, (_, what) in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return start(name, arguments)


if __name__ == "__main__":
    sys.exit(main())
