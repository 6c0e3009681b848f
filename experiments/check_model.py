"""What holds for a vision-language model as a policy: how it acts, reads and learns, what it takes, how fast it is.

    python experiments/check_model.py path/to/model
    python experiments/check_model.py org/model --env my_env:Corridor-v0 --dtype bfloat16 --trainable lora
    python experiments/check_model.py a b c --table models.md

Each model is loaded for what the environment shows and compared with plain transformers, `model(**processor(text,
images))`, alone and in a padded batch; then it says a few tokens, is asked for gradients and is timed. The table is one
row a model, without times, which differ by machine. Exit code 0 where everything holds, 1 where something does not, 2
for a model that cannot be loaded or a command line that cannot be read; the worst of several models.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.stopping import answer_signals  # noqa: E402

if __name__ == "__main__":
    answer_signals()  # while the rest is imported

from manako.experiments.common.command_line import parse, run_main  # noqa: E402
from manako.experiments.common.model_table import TABLE  # noqa: E402
from manako.experiments.common.settings import CheckModelCommand  # noqa: E402


def main() -> int:
    """Checks the models one after another; returns the worst exit code."""
    command = read_line()
    TABLE.check(command.check.table)
    from manako.experiments.common.model_check import check_models  # torch and all

    checked = check_models(command)
    if command.check.table:
        TABLE.write(Path(command.check.table), [row for row, _ in checked])
    return max(code for _, code in checked)


def read_line(arguments: Sequence[str] | None = None) -> CheckModelCommand:
    """Returns the settings of these words, by default of this program's command line."""
    about = "Checks vision-language models as policies; exit code 0 where everything holds."
    return parse(CheckModelCommand, about, arguments, positional="models")


if __name__ == "__main__":
    run_main(main)
