"""Supervised fine-tuning with TRL's SFTTrainer, in LLaVA's two stages, and what an architecture learns before them.

    python experiments/run_sft.py --stage align --policy smollm2 --env manako/GoTo-v0
    python experiments/run_sft.py --stage instruct --policy runs/.../final --dataset data/goto
    python experiments/run_sft.py --resume runs/...

represent   an architecture's own losses on frames and captions, where it has such a stage
align       encoder and language model stay as they are; the adapter learns to put frames into words: frame -> caption,
            which the environment makes of its state; an architecture that says no captions has losses of its own
instruct    the adapter and LoRA (or everything, --trainable full) learn demonstrations of experiments/collect.py; the
            loss is on the answer alone: on its tokens, or (--loss actions, behaviour cloning) on its probability among
            the actions, as the policy acts

The run folder holds final/ for --policy of any other runner, the evaluation beside its controls, and what the language
model has forgotten: perplexity of text and questions answered, before and after.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.stopping import answer_signals  # noqa: E402

if __name__ == "__main__":
    answer_signals()  # while the rest is imported

from manako.experiments.common.command_line import (  # noqa: E402
    CommandLine,
    UsageError,
    read_command_line,
    run_main,
    show,
    show_loading,
)
from manako.experiments.common.resuming import starting  # noqa: E402
from manako.experiments.common.settings import SFTCommand  # noqa: E402
from manako.experiments.common.what_learns import with_trainable  # noqa: E402


def main() -> int:
    """Runs one stage; returns the exit code."""
    started = time.perf_counter()
    line = read_line()
    with starting(line) as start:
        show("run", start.in_words())
        command = start.command
        check_evaluated(command)
        if command.sft.stage == "instruct":  # before it the architecture may say what learns
            command = with_trainable(command)
        show_loading()
        from manako.experiments.common.sft_training import train  # torch and all

        return train(dataclasses.replace(start, command=command), started)


def read_line(arguments: Sequence[str] | None = None) -> CommandLine[SFTCommand]:
    """Returns the settings of these words, by default of this program's command line.

    Raises:
        UsageError: no dataset, or settings of the other stage.
    """
    about = "Supervised fine-tuning with TRL: captions, then demonstrations."
    line = read_command_line(SFTCommand, about, arguments)
    command, sft = line.settings, line.settings.sft
    if command.run.resume is not None:
        return line  # the run's own settings were checked
    if sft.stage == "instruct" and sft.dataset is None:
        raise UsageError("--dataset is missing: give the folder of trajectories that experiments/collect.py wrote.")
    if sft.stage != "instruct" and sft.dataset is not None:
        raise UsageError(f"--dataset is for --stage instruct: {sft.stage} makes its captions from the environment.")
    check_evaluated(command)
    if sft.stage != "instruct" and sft.loss == "actions":
        raise UsageError("--loss actions is for --stage instruct: captions are no actions, leave it out.")
    if command.policy.next_frame_coef and (sft.stage, sft.loss) != ("instruct", "actions"):
        raise UsageError(
            f"--next_frame_coef is {command.policy.next_frame_coef}, but only --stage instruct --loss actions learns "
            "what follows an action: expected 0 here, leave it out."
        )
    return line


def check_evaluated(command: SFTCommand) -> None:
    """Raises where a policy is to be evaluated while it does not learn to act.

    Raises:
        UsageError: at another stage than instruct.
    """
    if command.run.eval_every and command.sft.stage != "instruct":
        raise UsageError(
            f"--eval_every {command.run.eval_every} is for --stage instruct, which teaches to act: at "
            f"{command.sft.stage} expected 0, leave it out."
        )


if __name__ == "__main__":
    run_main(main)
