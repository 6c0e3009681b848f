"""What a row of check_model.py's table says. No torch here."""

from typing import NamedTuple

from manako.experiments.common.markdown_table import MarkdownTable


class Row(NamedTuple):
    """What holds for a model, each in a word or two."""

    family: str
    acts: str
    learns: str = "no"
    adapter: str = "no"
    lora: str = "no"
    shared_prefix: str = "no"
    needs: str = "nothing"


TABLE = MarkdownTable(
    "python experiments/check_model.py FOLDER ... --table FILE",
    Row("family", "acts", "learns", "adapter", "LoRA", "shared prefix", "needs"),
)
